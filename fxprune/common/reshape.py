"""The correspondence between the dimensions of a tensor and of its reshaped form."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["reshape_blocks"]


def reshape_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest independent blocks of dimensions.

    A block is a set of old dimensions that becomes a set of new dimensions of the same total size.
    Labels that do not vary within a block need not be reshaped.

    Parameters
    ----------
    old, new:
        Shapes with the same number of elements.

    Returns
    -------
    ``[(old dims, new dims), ...]``. Dimensions of size 1 belong to no block.

    Examples
    --------

    >>> reshape_blocks((2, 6, 7, 7), (2, 2, 3, 49))
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    old_dims = [d for d, size in enumerate(old) if size != 1]
    new_dims = [d for d, size in enumerate(new) if size != 1]
    while i < len(old_dims) and j < len(new_dims):
        ins, outs = [old_dims[i]], [new_dims[j]]
        a, b = old[old_dims[i]], new[new_dims[j]]
        while a != b:
            if a < b:
                i += 1
                ins.append(old_dims[i])
                a *= old[old_dims[i]]
            else:
                j += 1
                outs.append(new_dims[j])
                b *= new[new_dims[j]]
        blocks.append((ins, outs))
        i, j = i + 1, j + 1
    return blocks
