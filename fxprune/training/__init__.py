"""What helps before and after: compensation of what was removed, sparsity."""
