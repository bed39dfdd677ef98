"""The tests of fxprune, one file per subject."""
