"""Write the smaller graph node by node, and check each node.

A new node runs at once, on meta tensors that carry the labels of the original's survivors. If two
units meet that are separate in the original, the emission is wrong. This is the first of the two
checks of an emitted model.

Some nodes commute with removal: they give the survivors of their old result. These are nodes whose
ops treat all positions of an axis alike and whose arguments need no correction. They run only if
the check is thorough.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxprune.common.contents import leaves_of
from fxprune.common.dispatch import map_tensors
from fxprune.common.hooks import has_replaced_forward
from fxprune.common.identity import IdentityMap
from fxprune.common.module_sizes import current_sizes
from fxprune.coupling import Coupling
from fxprune.coupling.propagation import run_node
from fxprune.errors import RewriteError
from fxprune.labels import Array
from fxprune.rewrite.checks import CheckedGraph, storage_id, value_of
from fxprune.rewrite.leaves import resize
from fxprune.rewrite.literals import correct
from fxprune.rewrite.module import PrunedModule, copy_behaviour, hold_modes
from fxprune.rewrite.skeleton import (
    copy_modules,
    fill_tensors,
    give_users_hooks,
    modes_after_train,
    redirect_attributes,
    replace_module,
    set_tensor,
    smaller_tensor,
    surviving_tensors,
    units_of_original,
)
from fxprune.rewrite.survivors import Mask, Survivors
from fxprune.trace import Trace, plain_attention
from fxprune.trace.aliasing import first_argument, name_of, shared_argument

__all__ = ["emit"]


def emit(
    coupling: Coupling, survivors: Survivors, name: str = "Pruned", *, thorough: bool = False
) -> nn.Module:
    """Return the smaller model, with the surviving elements of the user's parameters.

    Parameters
    ----------
    coupling:
        The analysis of the model.
    survivors:
        What survives of each of its tensors.
    name:
        The name of the new class, if the model becomes one graph.
    thorough:
        Whether to run and check every node, including those that go wrong only if a rule is wrong.

    Returns
    -------
    A :class:`~fxprune.rewrite.PrunedModule` if the model was traced whole. Otherwise a module of
    the model's own class, in which each part is one.

    Raises
    ------
    RewriteError
        If a node cannot be made smaller, or if units meet that were separate. It carries the name
        of the node.
    """
    tensors, parts = coupling.parameters.values(), coupling.parts
    smaller = IdentityMap((tensor, smaller_tensor(tensor, survivors)) for tensor in tensors)
    copies: IdentityMap[nn.Module, nn.Module] = IdentityMap()
    root = copy_modules(coupling.meta_copy.model, smaller, copies, keep_classes=bool(parts))
    written = _write_graphs(coupling, survivors, root, smaller, thorough)
    filled = surviving_tensors(coupling, survivors)
    fill_tensors(root, filled, smaller)
    for trace in coupling.traces:
        for target, tensor in trace.constants.items():
            set_tensor(written[trace.path].module, target, tensor)
    root, modules = _put_graph_modules(coupling, root, written, name)
    final = IdentityMap((key, modules.get(copied, copied)) for key, copied in copies.items())
    if parts or any(map(has_replaced_forward, copies.values())):
        redirect_attributes(copies, final, filled)
    if parts:
        give_users_hooks(coupling.meta_copy.modules, final)
        for module in final.values():
            vars(module).update(current_sizes(module))
    return root


@dataclass
class _Written:
    """The graphs of a part or of the whole model, and the module of the skeleton they belong to.

    The second graph, if there is one, is that of training mode.
    """

    module: nn.Module
    graphs: list[fx.Graph]


def _write_graphs(
    coupling: Coupling,
    survivors: Survivors,
    root: nn.Module,
    smaller: IdentityMap[Tensor, Tensor],
    thorough: bool,
) -> dict[str, _Written]:
    """Write the smaller graphs of each part, or of the whole model, which has the path ``""``.

    ``smaller`` leads from a tensor of the meta copy to the smaller model's.
    """
    context = units_of_original(coupling)
    original = IdentityMap((smaller[tensor], tensor) for tensor in coupling.parameters.values())
    written = {}
    for path in coupling.parts or ("",):
        module = root.get_submodule(path)
        graphs: list[fx.Graph] = []
        traces = [trace for trace in coupling.traces if trace.path == path]
        for trace in traces:
            _set_constants(module, trace)
        for trace in traces:
            emission = _Emission(coupling, survivors, trace, module, original, context, thorough)
            graphs.append(emission.run())
        if len(graphs) > 1 and str(graphs[0]) == str(graphs[1]):
            del graphs[1]  # the model reads its mode, but does the same in both
        written[path] = _Written(module, graphs)
    return written


def _set_constants(module: nn.Module, trace: Trace) -> None:
    """Give a module of the skeleton the constants of a trace, as the meta copy has them."""
    for target in trace.constants:
        constant = operator.attrgetter(target)(trace.meta_copy.model)
        set_tensor(module, target, constant if constant.is_meta else constant.cpu())


def _put_graph_modules(
    coupling: Coupling, root: nn.Module, written: Mapping[str, _Written], name: str
) -> tuple[nn.Module, IdentityMap[nn.Module, nn.Module]]:
    """Replace the modules that have graphs by modules that run these graphs.

    Returns
    -------
    The new root, and a map from replaced modules to new ones.
    """
    modules: IdentityMap[nn.Module, nn.Module] = IdentityMap()
    for path, part in written.items():
        old, graphs = part.module, part.graphs
        _place_positions(old, coupling.meta_copy.device)
        module = PrunedModule(old, graphs[0], type(old).__name__ if path else name, *graphs[1:])
        if path:
            copy_behaviour(module, old)
        else:
            hold_modes(module, modes_after_train(coupling.meta_copy.model))
        modules[old] = module
        root = replace_module(root, old, module)
    return root, modules


_POSITIONS = "_positions"
"""Prefix of the names of buffers with positions: see :meth:`_Emission._positions`."""


def _place_positions(module: nn.Module, device: torch.device) -> None:
    """Move the buffers with positions to the device of the model."""
    for name in module._non_persistent_buffers_set:
        if name.startswith(_POSITIONS):
            module.register_buffer(name, module.get_buffer(name).to(device), persistent=False)


class _Emission(CheckedGraph):
    """Writes the smaller graph of one trace."""

    def run(self) -> fx.Graph:
        """Emit all nodes and return the smaller graph.

        Raises
        ------
        RewriteError
            If a node cannot be emitted. The error's ``node`` is the node's name with the prefix of
            its part, and ``@axis`` if only one axis of its operands is the reason.
        """
        inputs = iter(self.trace.placeholders)
        with torch.inference_mode(), plain_attention():
            if self.root.training is not self.trace.training:
                self.root.train(self.trace.training)
            for node in self.trace.graph.nodes:
                try:
                    self._emit(node, inputs)
                except RewriteError as error:
                    error.node = (
                        self.prefix
                        + (error.node or node.name)
                        + ("" if error.axis is None else f"@{error.axis}")
                    )
                    raise
        return self.graph

    def _emit(self, node: fx.Node, inputs: Any) -> None:
        """Add a node of the original's graph to the new one, unless it is not needed there.

        ``inputs`` yields the values of the placeholders, in order.
        """
        if node.op == "placeholder":
            new = self._input(self.graph.node_copy(node), next(inputs))
        elif node.op == "output":
            results = fx.node.map_arg(node.args, self._output)
            new = self.graph.create_node("output", "output", results, name=node.name)
        else:
            emitted = self._call(node)
            if emitted is None:
                return
            new = self._cloned(node, emitted) if self._may_become_a_view(node) else emitted
        value = node.meta.get("val")
        new.meta = {"rank": value.dim()} if isinstance(value, Tensor) else {}
        self.new_nodes[node] = new

    def _input(self, new: fx.Node, value: Any) -> fx.Node:
        """Return the node that reads an input which Python code passes to the graph.

        Python code passes a smaller tensor, or one that is as wide as in the original. From a wide
        tensor the node selects the survivors.
        """
        self.values[new] = map_tensors(
            lambda old: self._counterpart(old) if self.coupling.labels(old) else old, value
        )
        for dim, alive in self._padded(value):
            kept = np.flatnonzero(alive)
            # Count the axis from the end: Python code may drop a batch axis of size 1, and layers
            # accept such an unbatched input.
            new = self.graph.call_function(
                torch.index_select, (new, dim - value.dim(), self._positions(kept))
            )
            self.values[new] = self._counterpart(value)
        return new

    def _output(self, node: fx.Node) -> Any:
        """Return the node for a result that the graph returns to Python code.

        Python code receives a smaller tensor, or one that is as wide as in the original, with
        zeros at removed positions.
        """
        new, value = self.numbers.original(node), value_of(node)
        if isinstance(value, Tensor):
            return self._widened(new, value)
        if not any(True for leaf in leaves_of(value) for _ in self._padded(leaf)):
            return new
        # a named tuple, or another object that holds tensors: build it from widened tensors
        if isinstance(node.target, type):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._output)
            return self.graph.call_function(node.target, args, kwargs)
        items = []
        for i, item in enumerate(value):
            new_item = self.graph.call_function(operator.getitem, (new, i))
            items.append(self._widened(new_item, item))
        return (
            type(value)(items)
            if type(value) in (tuple, list)
            else self.graph.call_function(type(value), (items,))
        )

    def _widened(self, new: fx.Node, old: Any) -> fx.Node:
        """Return a node that widens a tensor to what Python code sees, with zeros inserted."""
        for dim, alive in self._padded(old):
            padding = [0, 0] * (old.dim() - 1 - dim) + [0, 1]
            new = self.graph.call_function(torch.nn.functional.pad, (new, padding))
            places = np.where(alive, np.cumsum(alive) - 1, np.count_nonzero(alive))
            new = self.graph.call_function(
                torch.index_select, (new, dim - old.dim(), self._positions(places))
            )
        return new

    def _padded(self, tensor: Any) -> Iterator[tuple[int, Mask]]:
        """Yield each axis of a tensor that stays wide for Python code, with its survivors.

        Only inputs and outputs of parts have such axes. The survivors are a mask over the axis.
        """
        for dim in self.coupling.wide_dims(tensor) if self.trace.path else ():
            rows = self.survivors.rows(tensor, dim)
            if rows is not None:
                yield dim, rows[0]

    def _positions(self, index: Array) -> fx.Node:
        """Return a node that reads these positions from a new buffer outside the state dict."""
        names = (f"{_POSITIONS}{number}" for number in itertools.count())
        name = next(name for name in names if not hasattr(self.root, name))
        with torch.inference_mode(False):
            self.root.register_buffer(name, torch.tensor(index), persistent=False)
        return self.graph.get_attr(name)

    def _call(self, node: fx.Node) -> fx.Node | None:
        """Emit a call or the read of a parameter, with corrected arguments, and check the result.

        Returns None, and emits nothing, for a number that depends on a size which shrinks
        (:class:`~fxprune.rewrite.numbers.Numbers` writes it where it is needed), and for an
        assertion that always holds.
        """
        value = value_of(node)
        if self._is_left_out(node):
            return None
        target, args, kwargs = correct(
            self.numbers, node, self.call(node), self.surviving_share(node)
        )
        op = "call_function" if callable(target) and node.op == "call_method" else node.op
        commutes = (
            not self.thorough
            and args == node.args
            and kwargs == node.kwargs
            and self._commutes(node)
        )
        args, kwargs = self.numbers.original((args, kwargs))
        new = self.graph.create_node(op, target, args, kwargs, name=node.name)
        module = self.modules[str(target)] if op == "call_module" else None
        if module is not None:
            resize(self.survivors, module, node, value)
        if commutes:
            self.unrun[new] = value
            return new
        return self._run_and_check(node, new)

    def _run_and_check(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """Run a new node, check its value, and return it; a mean is scaled by a further node."""
        name, value, found = self.prefix + node.name, value_of(node), self.coupling.context.found
        if new.op == "call_module":
            module = self.modules[str(new.target)]
            for tensor in (*module.parameters(), *module.buffers()):
                self._label(tensor)
        self.values[new] = run_node(self.context, self.root, new, self.value)
        if new.op == "get_attr":
            self._label(self.values[new])
        if name in found.rescaled:
            new = self._rescale(new, node)
        self._check(node, value, self.values[new])
        if isinstance(value, Tensor) and value.is_meta:
            self.counterparts[value] = self.values[new]
        if name in found.moved:
            self._check_order(node, new, value)
        return new

    def _may_become_a_view(self, node: fx.Node) -> bool:
        """Tell whether a call copies in the original, may give a view here, and that matters.

        ``reshape`` and its kind copy where no view is possible. If one position of an axis
        survives, a view becomes possible, because the stride of that axis no longer counts. It
        matters if one of the two tensors is written to later and the other one is read.
        """
        source, value = shared_argument(node, self.trace.meta_copy.model), value_of(node)
        old = None if source is None else value_of(source)
        if (
            not isinstance(old, Tensor)
            or not isinstance(value, Tensor)
            or not hasattr(torch.ops.aten, name_of(node))
        ):
            return False
        sizes = zip(old.shape, self.survivors.shape(old), strict=True)
        shrinks_to_one = any(smaller == 1 != size for size, smaller in sizes)
        storages = {storage_id(old), storage_id(value)}
        if not shrinks_to_one or len(storages) == 1:
            return False
        written = (value_of(to) for to in self.memory.written_after(node))
        is_written = any(isinstance(to, Tensor) and storage_id(to) in storages for to in written)
        return is_written and self.memory.must_stay_view(node)

    def _cloned(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """Return a node that copies a node's result, as the original's node does.

        The graph is held to inputs whose layout makes the original copy.
        """
        self.numbers.hold_layout(cast(fx.Node, first_argument(node)))
        copied = self.graph.call_method("clone", (new,))
        if new in self.unrun:
            self.unrun[copied] = self.unrun[new]
        else:
            self.values[copied] = run_node(self.context, self.root, copied, self.value)
        return copied

    def _is_left_out(self, node: fx.Node) -> bool:
        """Tell whether a call has no place of its own in the new graph.

        This holds for numbers that depend on a size which shrinks, for assertions that cannot
        fail, and for numbers that only such assertions read.
        """
        if self.numbers.is_shrunk(node) or self._is_only_asserted(node):
            return True
        return node.target is torch._assert and not self._can_fail(node.args[0])

    def _can_fail(self, condition: Any) -> bool:
        """Tell whether a condition that is asserted can fail for other inputs.

        It cannot if it depends on nothing but the widths of the model.
        """
        if self._counts_widths(condition):
            return False
        return isinstance(self.numbers.original(condition), fx.Node)

    def _counts_widths(self, condition: Any) -> bool:
        """Tell whether a condition compares the number of parts of an axis of fixed size.

        If the axis shrinks, fewer parts may survive: the axis is then held to the example's size.
        """
        cut = self.numbers.extents.cut_axis(condition)
        if cut is None:
            return False
        if self.survivors.rows(value_of(cut[0]), cut[1]) is not None:
            self.numbers.hold_positions(*cut)  # fewer parts may be left
            return True
        return self.numbers.extents.is_fixed(*cut)

    def _is_only_asserted(self, node: fx.Node) -> bool:
        """Tell whether a number is read only by assertions that count the parts of a width."""
        if node.target is len:
            return bool(node.users) and all(map(self._is_only_asserted, node.users))
        if node.target is not operator.eq or not self._counts_widths(node):
            return False
        return all(user.target is torch._assert for user in node.users)
