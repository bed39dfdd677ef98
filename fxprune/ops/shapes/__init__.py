"""Shape functions, a column of the table: the results of ops on tensors without data, by family.

A shape function takes an op, its positional arguments and its keyword arguments. It returns a
tensor on the meta device with the shape, the dtype and, where they matter, the strides of the op's
result. It returns None to leave the call to PyTorch, which also reports wrong arguments.
"""
