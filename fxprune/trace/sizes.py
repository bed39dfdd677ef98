"""Find sizes that C++ computed from a tensor's shape, and replace them by numbers of the graph.

With numbers of the graph in their place, the graph takes inputs of other sizes. The operations of
a scripted function or of ``torch.vmap`` arrive as ATen operations with plain numbers as arguments.
The target sizes of a reshape can be matched with the tensor's own sizes. Any other number that
depends on sizes limits the graph to the example's sizes, which are guarded: the code of a scripted
function shows which sizes it decides by, and traces of inputs with other sizes show which numbers
change.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch

from fxprune.common.reshape import reshape_blocks
from fxprune.ops import Axes, Trait, has_trait, name_of_op, row_or_empty, takes_sizes
from fxprune.trace.tensors import TracedTensor

__all__ = ["ALL_DIMS", "decisive_dims", "reads_size", "with_traced_sizes", "wrapped_dims"]


def with_traced_sizes(
    func: Any,
    args: tuple[Any, ...],
    shape: Sequence[int],
    size: Callable[[int], Any],
    guard: Callable[[int], None],
) -> tuple[Any, ...]:
    """Replace sizes of the first argument, in an operation's arguments, by numbers of the graph.

    Parameters
    ----------
    func:
        The overload of the ATen operation.
    args:
        Its positional arguments.
    shape:
        The shape of the first argument for the example.
    size:
        Returns the number of the graph for the size of an axis of the first argument.
    guard:
        Guards the size of an axis. It is called for an axis that a reshape splits, because the
        split of another size is unknown.

    Returns
    -------
    tuple
        The positional arguments to record.
    """
    name = name_of_op(func).removesuffix("_copy")
    if name == "native_group_norm" and tuple(args[3:5]) == tuple(shape[:2]):
        return (*args[:3], size(0), size(1), _product(map(size, range(2, len(shape)))), *args[6:])
    if func._overloadname != "default" or not takes_sizes(name):
        return args
    operation = row_or_empty(name)
    if operation.axes is Axes.EXPANDED:
        sizes = _expanded_sizes(args[1], shape)
    elif Trait.READS_SHAPE in operation.traits:
        sizes = _created_sizes(args[1], shape, size)
    elif operation.axes is Axes.RESHAPED and 0 not in shape and _is_plain(args[1]):
        sizes = _reshaped_sizes(args[1], shape, size, guard)
    else:
        return args
    return (args[0], sizes, *args[2:])


def _is_plain(sizes: Sequence[Any]) -> bool:
    """Tell whether all sizes are plain numbers, not numbers of the graph."""
    return all(type(n) is int for n in sizes)


def _expanded_sizes(target: Sequence[Any], shape: Sequence[int]) -> list[Any]:
    """Return the sizes of an ``expand``, with -1 for each axis that keeps its size."""
    lead = len(target) - len(shape)
    return [-1 if d >= lead and n == shape[d - lead] else n for d, n in enumerate(target)]


def _created_sizes(
    target: Sequence[Any], shape: Sequence[int], size: Callable[[int], Any]
) -> list[Any]:
    """Return the sizes of a new tensor, such as ``new_zeros`` makes.

    A size that equals the tensor's own on the same axis is taken for it, unless it is 1.
    """
    sizes = list(target)
    for d, (n, own) in enumerate(zip(target, shape, strict=False)):
        if n == own != 1:
            sizes[d] = size(d)
    return sizes


def _reshaped_sizes(
    target: Sequence[int],
    shape: Sequence[int],
    size: Callable[[int], Any],
    guard: Callable[[int], None],
) -> list[Any]:
    """Return the sizes of a reshape; a merged or kept axis gets the product of its own sizes."""
    sizes: list[Any] = list(target)
    rest = torch.Size(shape).numel() // abs(torch.Size(target).numel())
    new = tuple(rest if n == -1 else n for n in target)
    for ins, outs in reshape_blocks(tuple(shape), new):
        if len(outs) > 1:
            for d in ins:
                guard(d)
        elif sizes[outs[0]] != -1:
            sizes[outs[0]] = _product(map(size, ins))
    return sizes


def _product(numbers: Iterable[Any]) -> Any:
    """Return the product of numbers of the graph.

    It is not multiplied by a 1 to start with, because each multiplication is a node.
    """
    first, *rest = [*numbers, 1]
    return functools.reduce(operator.mul, rest[:-1], first)


def reads_size(func: Any) -> bool:
    """Tell whether a torch function reads sizes of a tensor."""
    name = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(func.__self__, "__name__", "")
    return name in _SIZE_QUESTIONS


_SIZE_QUESTIONS = frozenset({"shape", "size", "numel", "nelement", "__len__"})


def wrapped_dims(tensor: Any) -> list[tuple[Any, int]]:
    """Return the axes that a tensor shows inside a transform, as axes of the stand-in it wraps.

    Returns
    -------
    list of (TracedTensor, int)
        Pairs of the stand-in and one of its axes; empty if the tensor wraps no stand-in.
    """
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


# -- scripted functions

ALL_DIMS = frozenset({"every"})
"""A marker for all axes of a tensor."""

_SIZE_LIST = frozenset({"list"})
"""A marker for the list of a tensor's sizes, whose entries are in the order of the axes."""

_PLAIN_NODES = frozenset(
    {
        "Constant",
        "ListConstruct",
        "ListUnpack",
        "TupleConstruct",
        "TupleUnpack",
        "TupleIndex",
        "If",
        "Loop",
    }
)
_PLAIN_NODES |= frozenset(
    {
        "min",
        "max",
        "DictConstruct",
        "GetAttr",
        "RaiseException",
        "Uninitialized",
        "unchecked_cast",
        "dtype",
        "device",
    }
)
_IDENTITY = frozenset({"__is__", "__isnot__"})  # of a tensor and None


def decisive_dims(graph: Any) -> frozenset[Any] | None:
    """Return the axes whose sizes a scripted function decides by or computes with.

    Sizes that are only passed on to tensor operations do not count.

    Parameters
    ----------
    graph:
        The function's TorchScript graph, inlined.

    Returns
    -------
    frozenset or None
        Axes, of whichever tensor, or :data:`ALL_DIMS`. None if the code contains operations that
        cannot be followed.
    """
    asked: set[Any] = set()
    for node in _nodes_of_block(graph):
        space, _, name = node.kind().partition("::")
        if space not in ("aten", "prim") or (space == "prim" and name not in _PLAIN_NODES):
            return None
        if space == "prim" or has_trait(name, Trait.READS_KIND) or name in _IDENTITY:
            continue
        if name in ("size", "len", "numel") and _is_tensor(node.inputsAt(0)):
            asked |= _decisive(node.output(), _dims_read_by(node))
        elif _takes_tensors(node) and not _gives_tensors(node):
            return None
    return frozenset(asked)


def _nodes_of_block(block: Any) -> Iterator[Any]:
    """Yield the nodes of a TorchScript block and of the blocks inside it."""
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes_of_block(inner)


def _is_tensor(value: Any) -> bool:
    return bool(value.type().kind() == "TensorType")


def _dims_read_by(node: Any) -> frozenset[Any]:
    """Return the axes whose sizes a node reads.

    The node is ``size(x)``, ``size(x, dim)``, ``len(x)``, ``numel(x)`` or ``sizes[dim]``.
    """
    if node.kind() == "aten::numel":
        return ALL_DIMS
    if node.kind() == "aten::len":
        return frozenset({0})
    if node.kind() == "aten::size" and node.inputsSize() == 1:
        return _SIZE_LIST
    dim = node.inputsAt(1).toIValue()
    return ALL_DIMS if dim is None else frozenset({dim})


def _dims_in_slice(node: Any) -> frozenset[Any]:
    """Return the axes in a slice of a list of sizes, such as ``sizes[-2:]`` or ``sizes[:2]``."""
    values = [*node.inputs()][1:]
    start, stop, step = (value.toIValue() for value in values)
    written = all(value.node().kind() == "prim::Constant" for value in values) and step == 1
    if written and stop is None and start is not None and start < 0:
        return frozenset(range(start, 0))
    if written and stop is not None and min(start or 0, stop) >= 0:
        return frozenset(range(start or 0, stop))
    return ALL_DIMS


def _decisive(value: Any, dims: frozenset[Any]) -> frozenset[Any]:
    """Return the axes whose sizes are used by anything but tensor operations.

    Parameters
    ----------
    value:
        A TorchScript value that holds these sizes or is computed from them.
    dims:
        The axes of the sizes in ``value``.
    """
    asked: frozenset[Any] = frozenset()
    for use in value.uses():
        node = use.user
        if node.kind() == "prim::ListUnpack":
            for dim, entry in enumerate(node.outputs()):
                asked |= _decisive(entry, frozenset({dim}) if dims == _SIZE_LIST else dims)
        elif node.kind() == "aten::__getitem__" and use.offset == 0:
            asked |= _decisive(node.output(), _dims_read_by(node) if dims == _SIZE_LIST else dims)
        elif node.kind() == "aten::slice" and use.offset == 0:
            asked |= _decisive(node.output(), _dims_in_slice(node) if dims == _SIZE_LIST else dims)
        elif node.kind() == "prim::ListConstruct":
            asked |= _decisive(node.output(), ALL_DIMS if dims == _SIZE_LIST else dims)
        elif node.kind() == "aten::len":
            continue  # the number of sizes is the rank
        elif not (
            node.kind().startswith("aten::") and _takes_tensors(node) and _gives_tensors(node)
        ):
            asked |= ALL_DIMS if dims == _SIZE_LIST else dims
    return asked


def _takes_tensors(node: Any) -> bool:
    return any(map(_is_tensor, node.inputs()))


def _gives_tensors(node: Any) -> bool:
    return all("Tensor" in str(value.type()) for value in node.outputs())
