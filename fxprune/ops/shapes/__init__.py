"""What ops return on tensors without data: the shape column of the table, by families.

A shape function takes an op, its positional and its keyword arguments. It returns a tensor on the
meta device of the shape, the dtype and, where they matter, the strides that the op returns, or
None where PyTorch is to say: it says what is wrong with the arguments, too.
"""
