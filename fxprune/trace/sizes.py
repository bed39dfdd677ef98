"""Sizes that C++ computed from a tensor's shape: numbers of the graph in their place, so that it takes inputs of other sizes.

What a scripted function or ``torch.vmap`` does arrives as ATen operations with plain numbers among their arguments. The sizes to
which a tensor is laid out anew say by themselves which of its own sizes they are; elsewhere the graph is held to the example's.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from fxprune.shapes import reshape_blocks
from fxprune.trace.values import TracedTensor

__all__ = ["own_sizes", "reads_size", "with_sizes"]

aten = torch.ops.aten
_LAID_OUT = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.view_copy.default})
_EXPANDED = frozenset({aten.expand.default, aten.expand_copy.default})


def with_sizes(
    func: Any, args: tuple[Any, ...], shape: Sequence[int], size: Callable[[int], Any], hold: Callable[[int], None]
) -> tuple[Any, ...]:
    """The positional arguments of an operation, with sizes of its first one as numbers of the graph.

    Parameters
    ----------
    shape:
        Of the first argument, for the example.
    size:
        Gives the number of the graph for one of its dimensions.
    hold:
        Called for a dimension that is split: into what, for another size, nobody can know.
    """
    if func in _EXPANDED:
        lead = len(args[1]) - len(shape)
        kept = [-1 if d >= lead and n == shape[d - lead] else n for d, n in enumerate(args[1])]
        return (args[0], kept, *args[2:])
    if func is aten.native_group_norm.default and tuple(args[3:5]) == tuple(shape[:2]):
        return (*args[:3], size(0), size(1), _product(map(size, range(2, len(shape)))), *args[6:])
    if func not in _LAID_OUT or 0 in shape or not all(type(n) is int for n in args[1]):
        return args
    given = list(args[1])
    known = torch.Size(shape).numel() // abs(torch.Size(given).numel())
    for ins, outs in reshape_blocks(tuple(shape), tuple(known if n == -1 else n for n in given)):
        if len(outs) > 1:
            for d in ins:
                hold(d)
        elif given[outs[0]] != -1:
            given[outs[0]] = _product(map(size, ins))
    return (args[0], given, *args[2:])


def _product(numbers: Iterable[Any]) -> Any:
    """The product, without a factor that is known to be 1: each multiplication is a node."""
    first, *rest = [*numbers, 1]
    return functools.reduce(operator.mul, rest[:-1], first)


def reads_size(func: Any) -> bool:
    """Whether one of torch's functions asks a tensor for its size."""
    name = getattr(func, "__name__", "")
    return (getattr(func.__self__, "__name__", "") if name == "__get__" else name) in _SIZES


_SIZES = frozenset({"shape", "size", "numel", "nelement", "__len__"})


def own_sizes(tensor: Any) -> list[tuple[Any, int]]:
    """The dimensions that a tensor shows inside of a transform, each as one of the stand-in that it wraps."""
    functorch = torch._C._functorch
    batched: list[int] = []
    while functorch.is_batchedtensor(tensor) or functorch.is_gradtrackingtensor(tensor):
        batched += [functorch.maybe_get_bdim(tensor)] if functorch.is_batchedtensor(tensor) else []
        tensor = functorch.get_unwrapped(tensor)
    if not isinstance(tensor, TracedTensor):
        return []
    dims = list(range(tensor.example.dim()))
    for dim in reversed(batched):
        del dims[dim]
    return [(tensor, dim) for dim in dims]
