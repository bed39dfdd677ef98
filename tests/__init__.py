"""The tests of fxprune: one file per idea."""
