"""Numbers that the smaller graph computes from sizes, for inputs of any size.

A number that depends on a size which shrinks becomes two numbers in the smaller graph. Each use
gets the right one:

- Used as a number (a scale, a divisor, a condition), it keeps its value in the original.
  :meth:`Numbers.original` computes it from sizes that are scaled back.
- Used as a size, it gets its value in the smaller model: :meth:`Numbers.new_size`.

If a number does not follow for inputs of other sizes, the graph asserts that it has the example's
value.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.common.dispatch import holds_tensors
from fxprune.errors import RewriteError
from fxprune.rewrite.extents import Extent, Extents, axes_read
from fxprune.trace import execute, formula
from fxprune.trace.aliasing import name_of, squeezes_all

__all__ = ["Numbers"]


class Numbers:
    """The numbers of one graph while its smaller form is written.

    Parameters
    ----------
    extents:
        What is known of the sizes in the original's graph.
    graph:
        The smaller graph. This class adds nodes for numbers that depend on a size which shrinks,
        when they are requested.
    new_nodes:
        Node of the original's graph -> node of the smaller graph. Grows with the graph.
    values:
        Node of the smaller graph -> its value for the example. Grows with the graph.
    """

    def __init__(
        self,
        extents: Extents,
        graph: fx.Graph,
        new_nodes: dict[fx.Node, fx.Node],
        values: dict[fx.Node, Any],
    ) -> None:
        self.extents, self.survivors, self.root = extents, extents.survivors, extents.root
        self.graph, self.new_nodes, self.values = graph, new_nodes, values
        self._shrunk: dict[fx.Node, bool] = {}
        self._originals: dict[fx.Node, Any] = {}
        self._news: dict[fx.Node, Any] = {}
        self._sizes: dict[tuple[fx.Node, int], Any] = {}
        self._held: set[fx.Node] = set()
        self._held_ranks: set[fx.Node] = set()  # tensors held to the example's number of axes
        self._held_axes: set[tuple[fx.Node, int]] = set()  # axes held to the example's size

    def old_value(self, value: Any) -> Any:
        """Return an argument with nodes replaced by their values in the original."""
        return fx.node.map_arg(value, lambda node: node.meta["val"])

    # -- numbers that change

    def is_shrunk(self, node: fx.Node) -> bool:
        """Tell whether a node is a number that depends on a size which shrinks."""
        if node not in self._shrunk:
            self._shrunk[node] = self._depends_on_shrunk(node)
        return self._shrunk[node]

    def _depends_on_shrunk(self, node: fx.Node) -> bool:
        """Compute :meth:`is_shrunk`."""
        if (
            node.op in ("placeholder", "get_attr", "output")
            or holds_tensors(node.meta["val"])
            or not _is_number(node.meta["val"])
        ):
            return False
        if any(self.is_shrunk(n) for n in node.all_input_nodes):
            return True
        read = axes_read(node)
        if read is not None:
            old = read[0].meta["val"]
            smaller = self.survivors.shape(old)
            return any(smaller[axis] != old.shape[axis] for axis in read[1])
        return (
            _asks(node)
            and type(node.meta["val"]) is not bool
            and self.new_value(node) != node.meta["val"]
        )

    def new_value(self, value: Any) -> Any:
        """Return an argument with nodes replaced by their values in the smaller model.

        These are the values that the original's code computes there, for the example; ``nan``
        where it fails.
        """
        return fx.node.map_arg(value, self._new)

    def _new(self, node: fx.Node) -> Any:
        if node in self.values:
            return self.values[node]
        if node not in self._news:
            self._news[node] = self._computed(node)
        return self._news[node]

    def _computed(self, node: fx.Node) -> Any:
        value = node.meta["val"]
        if isinstance(value, Tensor):
            if not value.is_meta:
                return value
            return _laid_out_like(value, self.survivors.shape(value))
        if node.op in ("placeholder", "get_attr") or holds_tensors(value):
            return value
        try:
            return execute(self.root, node, *fx.node.map_arg((node.args, node.kwargs), self._new))
        except Exception:
            return math.nan

    # -- numbers used as numbers

    def original(self, value: Any) -> Any:
        """Return an argument with nodes replaced by nodes that have the original's values.

        They have these for inputs of any size. A number that is the same for every input may
        replace a node.
        """
        return fx.node.map_arg(value, self._original)

    def _original(self, node: fx.Node) -> Any:
        if node.graph is self.graph:
            return node
        if not self.is_shrunk(node):
            return self.new_nodes[node]
        if node not in self._originals:
            self._originals[node] = self._original_value(node)
        return self._originals[node]

    def _original_value(self, node: fx.Node) -> Any:
        """Return the original's value of a number that depends on a shrunk size."""
        value = node.meta["val"]
        read = axes_read(node)
        if read is not None:
            return self._scaled_back(node, *read)
        if _asks(node):
            sizes = self._all_sizes(node)
            return self._hold_to_example(node) if sizes is None else sizes
        args, kwargs = self.original((node.args, node.kwargs))
        if not _nodes_in(args, kwargs):
            return tuple(value) if isinstance(value, tuple) else value
        return self.create(node.op, node.target, args, kwargs, value)

    def _all_sizes(self, node: fx.Node) -> Any:
        """Return the original's ``x.shape`` or ``x.size()``; None if the node is neither."""
        calls_size = name_of(node) == "size" and len(node.args) == 1 and not node.kwargs
        if not calls_size and not (node.target is getattr and node.args[1] == "shape"):
            return None
        sizes = [self.original_size(node.args[0], d) for d in range(len(node.meta["val"]))]
        return (
            self.create("call_function", torch.Size, (sizes,), {}, node.meta["val"])
            if _nodes_in(sizes)
            else tuple(sizes)
        )

    def original_size(self, tensor: fx.Node, axis: int) -> Any:
        """Return the original's size of an axis, as a number or as a node of the new graph.

        If the size does not follow from the smaller model's, the axis is held to the example's
        size.
        """
        old = tensor.meta["val"].shape[axis]
        extent = self.extents.of(tensor, axis)
        if extent is Extent.FIXED:
            return old
        if extent is Extent.UNKNOWN:
            self.hold_positions(tensor, axis)
            return old
        if (tensor, axis) not in self._sizes:
            now = self._size_now(tensor, axis)
            self._sizes[tensor, axis] = self.times(now, old, self.values[now])
        return self._sizes[tensor, axis]

    def _scaled_back(self, node: fx.Node, tensor: fx.Node, axes: Sequence[int]) -> Any:
        """Return the original's value of a size, or of a product of sizes, of a tensor.

        An axis is held to the example's size if the share to which it shrank is not known.
        """
        old, smaller = tensor.meta["val"].shape, self.survivors.shape(tensor.meta["val"])
        shrunk = [axis for axis in axes if smaller[axis] != old[axis]]
        if len(axes) == 1:
            return self.original_size(tensor, axes[0])
        if all(self.extents.is_fixed(tensor, axis) for axis in axes):
            return node.meta["val"]
        for axis in shrunk:
            if not self.extents.is_known(tensor, axis):
                self.original_size(tensor, axis)  # holds the axis to the example's size
        before, after = math.prod(old[a] for a in shrunk), math.prod(smaller[a] for a in shrunk)
        return self.times(self.new_node(node), before, after)

    def _hold_to_example(self, node: fx.Node) -> Any:
        """Hold another property of a tensor, such as a stride, to its value for the example.

        Returns that value in the original.
        """
        self.hold(self.new_node(node), self._new(node), formula(node), node.meta["val"])
        return node.meta["val"]

    # -- numbers used as sizes

    def new_node(self, node: fx.Node) -> fx.Node:
        """Return the node that computes a number from the smaller model's sizes.

        It computes the number as the original's code does.
        """
        if node.graph is self.graph:
            return node
        if node not in self.new_nodes:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.new_node)
            self.new_nodes[node] = self.create(node.op, node.target, args, kwargs, self._new(node))
        return self.new_nodes[node]

    def new_size(self, value: Any, old: Any, wanted: Any, *, even: bool = True) -> Any:
        """Return a size for the smaller model, right for inputs of any size.

        Parameters
        ----------
        value:
            The size in the original: a literal, or a node of its graph.
        old:
            Its value in the original, for the example.
        wanted:
            Its value in the smaller model, for the example.
        even:
            Whether the wanted size is the same share of the original's for inputs of any size. If
            not, the number is held to the example's value.

        Returns
        -------
        A number, or a node of the smaller graph.
        """
        if not isinstance(value, fx.Node):
            return wanted
        if wanted == old:
            return self._original(value)
        if self.is_shrunk(value) and self._new(value) == wanted and self._is_product(value):
            return wanted if self.extents.is_constant(value) else self.new_node(value)
        original = self._original(value)
        if not isinstance(original, fx.Node):
            return wanted
        if not even:
            self.hold(original, old, formula(value), old)
            return wanted
        return self.times(original, wanted, old)

    def hold_positions(self, tensor: fx.Node, axis: int, *bounds: Any) -> None:
        """Hold an axis that shrinks, and numbers for positions on it, to the example's values.

        Literals can then replace these numbers.

        Parameters
        ----------
        tensor, axis:
            A node of the original's graph, and the axis of its tensor.
        bounds:
            Arguments that give positions on the axis.

        Raises
        ------
        RewriteError
            If an axis with the same size for every input is cut to a length that depends on the
            input, as a table of positional embeddings is.
        """
        if not self.extents.is_fixed(tensor, axis) and (tensor, axis) not in self._held_axes:
            self._held_axes.add((tensor, axis))
            now = self._size_now(tensor, axis)
            name, old = f"{tensor.name}.size({axis})", tensor.meta["val"].shape[axis]
            self.hold(now, self.values[now], name, old)
        for number in _nodes_in(bounds):
            if _is_number(number.meta["val"]):
                if isinstance(self.original(number), fx.Node) and self.extents.is_fixed(
                    tensor, axis
                ):
                    raise RewriteError(
                        f"axis {axis} of {tensor.name!r} is cut to {formula(number)}, which "
                        "inputs decide",
                        axis=axis,
                    )
                value = number.meta["val"]
                self.hold(self.original(number), value, formula(number), value)

    def _size_now(self, tensor: fx.Node, axis: int) -> fx.Node:
        """Return a node with the size of an axis in the smaller model.

        If the graph has a ``squeeze()``, which drops as many axes as have size 1, the axis keeps
        its index only while the tensor has as many axes as for the example: the graph asserts it.
        """
        if any(map(squeezes_all, tensor.graph.nodes)) and tensor not in self._held_ranks:
            self._held_ranks.add(tensor)
            rank = tensor.meta["val"].dim()
            now = self.create("call_method", "dim", (self.new_nodes[tensor],), {}, rank)
            self.hold(now, rank, f"{tensor.name}.dim()", rank)
        smaller = self.survivors.shape(tensor.meta["val"])[axis]
        return self.create("call_method", "size", (self.new_nodes[tensor], axis), {}, smaller)

    def hold_layout(self, tensor: fx.Node) -> None:
        """Hold a tensor to sizes with which its memory layout is that of the example.

        For a dense tensor, it suffices that the same axes have size 1. Otherwise, the graph is
        held to all sizes.
        """
        old = tensor.meta["val"]
        is_dense = old.permute(_in_memory(old)).is_contiguous()
        for axis, size in enumerate(old.shape):
            if not self.extents.is_fixed(tensor, axis):
                number, value = self.original_size(tensor, axis), size
                name = f"{tensor.name}.size({axis})"
                if is_dense and isinstance(number, fx.Node):
                    value, name = size == 1, f"({name} == 1)"
                    number = self.create("call_function", operator.eq, (number, 1), {}, value)
                self.hold(number, value, name, value)

    def _is_product(self, value: Any) -> bool:
        """Tell whether a number is a product of sizes, each a known share of the original's.

        The product is then such a share, too.
        """
        if not isinstance(value, fx.Node) or not self.is_shrunk(value):
            return True
        read = axes_read(value)
        if read is not None:
            return all(self.extents.is_known(read[0], axis) for axis in read[1])
        return value.target is operator.mul and all(map(self._is_product, value.args))

    # -- new nodes

    def create(self, op: str, target: Any, args: Any, kwargs: Any, value: Any) -> fx.Node:
        """Add a node to the smaller graph, record its ``value`` for the example, and return it."""
        node = self.graph.create_node(op, target, tuple(args), kwargs)
        self.values[node] = value
        return node

    def times(self, number: fx.Node, numerator: int, denominator: int) -> fx.Node:
        """Return a number multiplied by a fraction; the result is known to be an integer."""
        shared = math.gcd(numerator, denominator)
        numerator, denominator = numerator // shared, denominator // shared
        for function, factor in ((operator.mul, numerator), (operator.floordiv, denominator)):
            if factor != 1:
                value = function(self.values[number], factor)
                number = self.create("call_function", function, (number, factor), {}, value)
        return number

    def hold(self, number: Any, value: Any, name: str, old: Any) -> None:
        """Add an assertion that a number has the same value as for the example.

        Parameters
        ----------
        number:
            A node of the smaller graph. Nothing is added for anything else.
        value:
            Its value for the example.
        name, old:
            The name and the value of the number in the original, for the error message.
        """
        if not isinstance(number, fx.Node) or number in self._held:
            return
        self._held.add(number)
        same = self.create("call_function", operator.eq, (number, value), {}, True)
        message = (
            f"this graph was pruned for inputs with {name} == {old!r}: what follows from it for "
            "others is not known"
        )
        self.create("call_function", torch._assert, (same, message), {}, None)


def _laid_out_like(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a tensor of other sizes, with its axes in the same order in memory."""
    if list(sizes) == list(tensor.shape):
        return tensor
    return torch.empty_permuted(
        sizes, _in_memory(tensor), dtype=tensor.dtype, device=tensor.device
    )


def _in_memory(tensor: Tensor) -> list[int]:
    """Return a tensor's axes in the order in which they lie in memory, largest stride first."""
    return sorted(range(tensor.dim()), key=tensor.stride, reverse=True)


def _is_number(value: Any) -> bool:
    """Tell whether a value is a number, or a sequence with a number in it."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_number, value))
    return isinstance(value, (bool, int, float, complex))


def _asks(node: fx.Node) -> bool:
    """Tell whether a node asks an object for a number, and does not compute with numbers alone."""
    return not all(_is_number(n.meta["val"]) for n in node.all_input_nodes)


def _nodes_in(*values: Any) -> list[fx.Node]:
    """Return the nodes in nested arguments."""
    found: list[fx.Node] = []
    fx.node.map_arg(values, found.append)
    return found
