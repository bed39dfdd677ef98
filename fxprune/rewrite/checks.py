"""Check each emitted node: its labels must be those of the original's survivors.

The emitted node runs on meta tensors that carry the labels of the original's surviving units. If
it brings two units together, or puts them in another order than the original does, it is wrong.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.common.dispatch import META
from fxprune.common.identity import IdentityMap
from fxprune.coupling import Coupling
from fxprune.coupling.propagation import run_node
from fxprune.errors import RewriteError
from fxprune.labels import Array, Field, compact, varied
from fxprune.moments import counts_removed
from fxprune.ops import Context
from fxprune.ops.calls import OpCall, call_of
from fxprune.rewrite.extents import Extents
from fxprune.rewrite.numbers import Numbers
from fxprune.rewrite.survivors import Survivors
from fxprune.trace import Trace
from fxprune.trace.aliasing import Memory

__all__ = ["CheckedGraph", "storage_id", "value_of"]


def value_of(node: fx.Node) -> Any:
    """Return the value that a node of the original's graph has for the example."""
    return node.meta["val"]


def storage_id(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's memory; a meta tensor has one too."""
    return tensor.untyped_storage()._cdata


def _shrank_away(before: Array, after: Array, coupling: Coupling) -> bool:
    """Tell whether a field over several axes keeps one position along the axis that shrinks.

    The surviving labels then vary along the other axes only. They would be mistaken for labels of
    whole blocks, so such a field is dropped.
    """
    return len(varied(before)) > 1 and after.shape[coupling.shrinking_dim(before)] == 1


def _is_among(labels: Array, arrays: Sequence[Array]) -> bool:
    return any(np.array_equal(labels, array) for array in arrays)


@dataclass(eq=False)
class CheckedGraph:
    """A graph that is emitted node by node, with a check of each node against the original.

    Parameters
    ----------
    coupling, survivors:
        The analysis, and what survives of each tensor.
    trace:
        The graph of the original that is rewritten.
    root:
        The skeleton of the smaller model, or of the part that the graph belongs to.
    original:
        For each parameter and buffer of the smaller model, the meta copy's tensor.
    context:
        Labels of the smaller model's tensors; its units are those of the original.
    thorough:
        Whether to run and check nodes, too, that commute with removal.
    """

    coupling: Coupling
    survivors: Survivors
    trace: Trace
    root: nn.Module
    original: IdentityMap[Tensor, Tensor]
    context: Context
    thorough: bool

    def __post_init__(self) -> None:
        self.prefix = self.trace.prefix
        self.graph = fx.Graph()
        # node of the original's graph -> node of the new graph
        self.new_nodes: dict[fx.Node, fx.Node] = {}
        # node of the new graph -> its value; filled lazily for nodes in `unrun`
        self.values: dict[fx.Node, Any] = {}
        # node of the new graph that was not run -> the original's result
        self.unrun: dict[fx.Node, Tensor] = {}
        # tensor of the original -> its smaller counterpart, on the meta device
        self.counterparts: IdentityMap[Tensor, Tensor] = IdentityMap()
        self.modules = dict(self.root.named_modules(remove_duplicate=False))
        self.units = self.coupling.units[self.survivors.alive[self.coupling.units]]
        self.checked_version = self.context.units.version  # no units had met up to this version
        extents = Extents(self.survivors, self.trace.meta_copy.model, self.ran)
        self.numbers = Numbers(extents, self.graph, self.new_nodes, self.values)

    @functools.cached_property
    def memory(self) -> Memory:
        """The memory that nodes of the original's graph share."""
        return Memory(self.trace.graph, self.trace.meta_copy.model)

    def value(self, new: fx.Node) -> Any:
        """Return the value of a node of the new graph.

        For a node that was not run, the value is a tensor that carries the labels of the
        original's survivors.
        """
        if new not in self.values:
            self.values[new] = self._counterpart(self.unrun[new])
        return self.values[new]

    def _counterpart(self, old: Tensor) -> Tensor:
        """Return a meta tensor with the shape and the labels of what survives of a tensor."""
        if old not in self.counterparts:
            shape = self.survivors.shape(old)
            smaller = self.counterparts[old] = torch.empty(shape, dtype=old.dtype, device=META)
            self.context.put(smaller, self._surviving_fields(self._with_survivors(old)))
        return self.counterparts[old]

    def call(self, node: fx.Node) -> OpCall | None:
        """Return the ATen op that a node of the original's graph calls; None if it is not one."""
        return call_of(node, self.ran(node), self.numbers.old_value)

    def ran(self, node: fx.Node) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """Return the ops that a node of the original's graph ran, with their arguments."""
        return self.coupling.context.found.ran.get(self.prefix + node.name, [])

    def surviving_share(self, node: fx.Node) -> tuple[int, int] | None:
        """Return which share of the elements that a node averages survives.

        Returns
        -------
        The number of survivors and the number of all elements, with common factors removed. None
        if all elements survive, or if the node is neither a mean nor a variance.
        """
        rescaled = self.coupling.context.found.rescaled.get(self.prefix + node.name, [])
        mask = self.survivors.mask(rescaled)
        kept, total = int(np.count_nonzero(mask)), mask.size
        common = math.gcd(kept, total)
        return None if kept == total else (kept // common, total // common)

    def _label(self, smaller: Any) -> None:
        """Label the elements of a smaller parameter with their units, when it is first used."""
        tensor = self.original.get(smaller)
        if tensor is None or not tensor.is_meta or self.context.record(smaller) is not None:
            return
        fields = []
        for labels in self.coupling.labels(tensor):
            kept = np.ascontiguousarray(self.survivors.take_array(tensor, labels))
            if not _shrank_away(labels, kept, self.coupling):
                fields.append(Field(kept, True))
        self.context.parameter(smaller, "", tuple(-1 for _ in smaller.shape), fields)

    def _commutes(self, node: fx.Node) -> bool:
        """Tell whether a node with unchanged arguments gives the survivors of its old result.

        It does if its ops treat all positions alike, and if it depends on no number that changes.
        """
        name, found, value = self.prefix + node.name, self.coupling.context.found, value_of(node)
        if node.op == "get_attr" or name in found.positional or name in found.rescaled:
            return False
        if not isinstance(value, Tensor) or not value.is_meta:
            return False
        for operand in node.all_input_nodes:
            given = value_of(operand)
            if isinstance(given, Tensor):
                if not given.is_meta:
                    return False
            elif isinstance(given, (tuple, list, dict)) or self.numbers.is_shrunk(operand):
                return False
        return True

    def _check_order(self, node: fx.Node, new: fx.Node, value: Any) -> None:
        """Check that a node which rearranges positions keeps the order of the survivors.

        Labels of units cannot tell two positions of one unit apart. Therefore every position of
        every operand gets a number of its own. The emitted node must move the survivors' numbers
        to the places where the original's node moves them.

        Raises
        ------
        RewriteError
            If it does not.
        """
        operands = self._rearranged_operands(node)
        if not operands:
            return
        before, after = self._number_positions(operands)
        count = before.units.count
        result = run_node(before, self.trace.meta_copy.model, node, value_of)
        emitted = run_node(after, self.root, new, self.value)
        for numbered, old, smaller in zip(
            tree_leaves(result), tree_leaves(value), tree_leaves(emitted), strict=True
        ):
            if not isinstance(old, Tensor):
                continue
            found = []
            for field in after.fields(smaller):
                labels = np.where(field.labels < count, field.labels, 0)
                found.append(before.units.find(labels))
            for field in before.fields(numbered):
                kept = self.survivors.take_array(old, field.labels)
                wanted = compact(before.units.find(kept))
                wanted = np.where(wanted < count, wanted, 0)
                # labels that this run made, for an axis that is repeated, say nothing
                if wanted.size > 1 and wanted.any() and not _is_among(wanted, found):
                    raise self._mixed(node)

    def _rearranged_operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands that lose elements; none for a module with parameters."""
        if node.op == "call_module" and [*self.modules[str(node.target)].parameters()]:
            return []
        tensors = [n for n in node.all_input_nodes if isinstance(value_of(n), Tensor)]
        return [n for n in tensors if self.survivors.fields(value_of(n))]

    def _number_positions(self, operands: Sequence[fx.Node]) -> tuple[Context, Context]:
        """Give every position of every operand a number of its own.

        Returns
        -------
        A context in which the original's operands are labelled with the numbers, and one in which
        the smaller model's operands are labelled with the numbers of the survivors.
        """
        before, after = Context(), Context()
        before.units.pinning = after.units.pinning = False
        numbered: dict[fx.Node, list[Array]] = {}
        for operand in operands:
            labels = self.coupling.labels(value_of(operand))
            numbered[operand] = [before.units.fresh(a.size, -1).reshape(a.shape) for a in labels]
            before.put(value_of(operand), [Field(a, True) for a in numbered[operand]])
        after.units.fresh(before.units.count - 1, -1)
        for operand, arrays in numbered.items():
            old = value_of(operand)
            kept = [compact(self.survivors.take_array(old, array)) for array in arrays]
            fields = [Field(np.ascontiguousarray(a), True) for a in kept if a.size > 1]
            after.put(self.value(self.new_nodes[operand]), fields)
        return before, after

    def _rescale(self, new: fx.Node, node: fx.Node) -> fx.Node:
        """Scale a mean so that it keeps the original's divisor.

        The removed elements are zeros in the masked original, and still count there. Variances
        whose function counts removed elements itself are returned as they are.

        Raises
        ------
        RewriteError
            If the mean is taken inside a larger op.
        """
        share = self.surviving_share(node)
        # these functions count the removed elements themselves
        if share is None or counts_removed(new.target):
            return new
        call = self.call(node)
        if call is None or call.name != "mean":
            raise RewriteError(
                f"node {node.name!r} ({node.target}) averages inside a larger operation", node.name
            )
        scaled = self.graph.call_function(operator.mul, (new, share[0] / share[1]))
        self.values[scaled] = run_node(self.context, self.root, scaled, self.value)
        return scaled

    def _check(self, node: fx.Node, old: Any, new: Any) -> None:
        """Check shapes and labels of the value of an emitted node.

        Raises
        ------
        RewriteError
            If a shape is not the one that the labels say, or if units meet that were separate.
        """
        pairs = (
            [(old, new)]
            if isinstance(old, Tensor)
            else list(zip(tree_leaves(old), tree_leaves(new), strict=True))
        )
        for before, after in pairs:
            if isinstance(before, Tensor):
                wanted = self.survivors.shape(before)
                if wanted != list(after.shape):
                    raise RewriteError(
                        f"node {node.name!r} ({node.target}) gives {tuple(after.shape)} in the "
                        f"smaller model, where its labels say {tuple(wanted)} (original: "
                        f"{tuple(before.shape)}). Pass the module's name in keep= to leave it "
                        "whole.",
                        node.name,
                    )
        if self.context.units.version != self.checked_version:
            self.checked_version = self.context.units.version
            if not np.array_equal(self.context.units.find(self.units), self.units):
                raise self._mixed(node)
        if node.op != "get_attr":
            for before, after in pairs:
                if isinstance(before, Tensor):
                    self._compare(node, before, after)

    def _compare(self, node: fx.Node, old: Tensor, new: Tensor) -> None:
        """Check that the labels of a tensor are those of the original's survivors, in order.

        Then replace them by the original's. The next node starts from these, because the run loses
        the labels of a channel axis that shrank to size 1.
        """
        found = self.context.fields(new)
        if not self.coupling.labels(old) and not found:
            return
        wanted = self._with_survivors(old)
        for field in found:
            # This run makes new labels for padding and expanded axes, as the original's run did
            # at the same places: they are accepted.
            is_new = field.labels >= self.coupling.context.units.count
            is_right = (field.labels == 0) | is_new
            for _, labels in wanted:
                is_right = is_right | (field.labels == labels)
            if wanted and not is_right.all():
                raise self._mixed(node)
        self.context.put(new, self._surviving_fields(wanted))

    def _with_survivors(self, old: Tensor) -> list[tuple[Field, Array]]:
        """Return each field of a tensor of the original with its labels at the survivors."""
        fields = self.coupling.context.fields(old)
        return [(f, compact(self.survivors.take_array(old, f.labels))) for f in fields]

    def _surviving_fields(self, fields: list[tuple[Field, Array]]) -> list[Field]:
        """Return the fields of a smaller tensor, from those of :meth:`_with_survivors`."""
        surviving = []
        for field, labels in fields:
            if labels.size > 1 and not _shrank_away(field.labels, labels, self.coupling):
                surviving.append(Field(labels, field.zero))
        return surviving

    def _mixed(self, node: fx.Node) -> RewriteError:
        """Return the error for a node that brings channels together that were separate."""
        return RewriteError(
            f"node {node.name!r} ({node.target}) brings channels together that were apart in the "
            "original. Pass the module's name in keep= to leave it whole.",
            node.name,
        )
