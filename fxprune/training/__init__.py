"""Measures before and after pruning: sparsity, and compensation for what was removed."""
