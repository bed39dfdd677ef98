"""Write the smaller graph, node by node, and check it while writing.

Each new node runs at once, on meta tensors that carry the *old* labels of their survivors. So its sizes are known when the next
node needs them, and two old units that meet anywhere prove the emission wrong: the first of the two checks of an emitted model.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.balance import shrinking_dim
from fxprune.coupling import Coupling
from fxprune.errors import RewriteError
from fxprune.labels import Array, Field, compact, varied
from fxprune.propagation import run_node
from fxprune.rewrite.leaves import resize
from fxprune.rewrite.literals import correct
from fxprune.rewrite.module import PrunedModule
from fxprune.rewrite.survivors import Survivors
from fxprune.rules import Context
from fxprune.shapes import META
from fxprune.trace import Trace, is_leaf

__all__ = ["emit"]


def emit(coupling: Coupling, survivors: Survivors, name: str = "Pruned") -> tuple[PrunedModule, int]:
    """The smaller model, with the surviving elements of the user's parameters, and its MACs for the batch of the analysis.

    Raises
    ------
    RewriteError
        If a node cannot be made smaller, or units that were separate meet; it carries the node's name.
    """
    trace = coupling.traces[0]
    smaller: dict[int, Tensor] = {}
    for tensor in coupling.parameters.values():
        stand_in = torch.empty(survivors.shape(tensor), dtype=tensor.dtype, device=META) if tensor.is_meta else tensor.clone()
        smaller[id(tensor)] = nn.Parameter(stand_in, False) if isinstance(tensor, nn.Parameter) else stand_in
    root = _skeleton(trace.twin.model, smaller, {})
    context = _old_labels(coupling, survivors, smaller)
    for own in coupling.traces:
        for target in own.constants:
            _set(root, target, operator.attrgetter(target)(own.twin.model))
    graphs, macs = [], 0
    for own, values in zip(coupling.traces, coupling.values, strict=True):
        graphs.append(_Emission(coupling, survivors, own, values, root, context).run())
        macs = macs or context.macs  # of the first trace
    if len(graphs) > 1 and str(graphs[0]) == str(graphs[1]):
        del graphs[1]  # the model asks for its mode, but does the same in both
    _fill(root, _survivors_of(coupling, survivors), smaller)
    for target, tensor in (item for own in coupling.traces for item in own.constants.items()):
        _set(root, target, tensor)
    return PrunedModule(root, graphs[0], name, *graphs[1:]), macs


class _Emission:
    def __init__(
        self, coupling: Coupling, survivors: Survivors, trace: Trace, values: dict[fx.Node, Any], root: nn.Module, context: Context
    ) -> None:
        self.coupling, self.survivors, self.trace, self.root, self.context = coupling, survivors, trace, root, context
        self.values = values
        self.prefix = "train." if trace.training else ""
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.env: dict[fx.Node, Any] = {}
        groups = coupling.groups
        self.units = np.array(sorted(u for g in groups for u in g.units if survivors.alive[u]), dtype=np.int64)
        self.checked = context.units.version

    # -- what correctors ask

    def old(self, value: Any) -> Any:
        return fx.node.map_arg(value, self.values.__getitem__)

    def new(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: self.env[self.made.get(n, n)])

    def sized(self, value: Any, wanted: Any) -> Any:
        """A literal becomes the wanted number; so does an expression of sizes that all changed. One that also depends on sizes
        which did not change (a batch, a resolution) is scaled, so that it stays right for other inputs."""
        if not isinstance(value, fx.Node) or not self._dynamic(value):
            return wanted
        now = self.new(value)
        if isinstance(now, float) or isinstance(wanted, float):
            return self._scalar(operator.mul, self.made[value], wanted / now)
        return self._scalar(operator.floordiv, self._scalar(operator.mul, self.made[value], wanted), now)

    def _dynamic(self, node: fx.Node) -> bool:
        scalars = [n for n in node.all_input_nodes if not isinstance(self.values[n], Tensor)]
        if not scalars:
            return bool(self.values[node] == self.new(node))
        return any(self._dynamic(n) for n in scalars)

    def _scalar(self, function: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(function, args)
        self.env[node] = function(*fx.node.map_arg(args, self.env.__getitem__))
        return node

    # -- the graph

    def run(self) -> fx.Graph:
        inputs = iter(self.trace.placeholders)
        with torch.inference_mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            if self.root.training is not self.trace.training:
                self.root.train(self.trace.training)
            for node in self.trace.graph.nodes:
                try:
                    self._emit(node, inputs)
                except RewriteError as error:
                    error.node = error.node or node.name
                    raise
        return self.graph

    def _emit(self, node: fx.Node, inputs: Any) -> None:
        if node.op == "placeholder":
            new = self.graph.node_copy(node)
            self.env[new] = next(inputs)
        elif node.op == "output":
            new = self.graph.node_copy(node, self.made.__getitem__)
        else:
            emitted = self._call(node)
            if emitted is None:
                return
            new = emitted
        new.meta = {}
        self.made[node] = new

    def _call(self, node: fx.Node) -> fx.Node | None:
        value = self.values[node]
        if node.target is torch._assert and not self.new(node.args[0]):
            return None  # held for the original's widths only
        target, args, kwargs = correct(self, node, value)
        op = "call_function" if callable(target) and node.op == "call_method" else node.op
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: self.made.get(n, n))
        new = self.graph.create_node(op, target, args, kwargs, name=node.name)
        if op == "call_module":
            first = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
            wanted = self.survivors.shape(value) if isinstance(value, Tensor) else None
            resize(self.survivors, self.root.get_submodule(str(target)), self.old(first), self.new(first), wanted)
        self.env[new] = run_node(self.context, self.root, new, self.env.__getitem__)
        if self.prefix + node.name in self.coupling.context.rescaled:
            new = self._rescale(new, node)
        self._check(node, value, self.env[new])
        if self.prefix + node.name in self.coupling.context.moved:
            self._check_order(node, new, value)
        return new

    def _check_order(self, node: fx.Node, new: fx.Node, value: Any) -> None:
        """Labels of units cannot tell two positions of one unit apart: where positions are laid out anew, tell them one by one.

        Every position of every operand gets a number of its own. The emitted node must bring the survivors' numbers to where the
        original's node brings them.
        """
        if node.op == "call_module" and any(True for _ in self.root.get_submodule(str(node.target)).parameters()):
            return
        operands = [n for n in node.all_input_nodes if isinstance(self.values[n], Tensor) and self.survivors.fields(self.values[n])]
        if not operands:
            return
        before, after = Context(), Context()
        before.units.pinning = after.units.pinning = False
        numbered: dict[fx.Node, list[Array]] = {}
        for operand in operands:
            labels = self.coupling.labels(self.values[operand])
            numbered[operand] = [before.units.fresh(a.size, -1).reshape(a.shape) for a in labels]
            before.put(self.values[operand], [Field(a, True) for a in numbered[operand]])
        after.units.fresh(before.units.count - 1, -1)
        for operand, arrays in numbered.items():
            old = self.values[operand]
            taken = [compact(self.survivors.take(old, torch.from_numpy(a)).numpy()) for a in arrays]
            after.put(self.env[self.made[operand]], [Field(np.ascontiguousarray(a), True) for a in taken if a.size > 1])
        count = before.units.count
        result = run_node(before, self.trace.twin.model, node, self.values.__getitem__)
        emitted = run_node(after, self.root, new, self.env.__getitem__)
        for own, old, now in zip(tree_leaves(result), tree_leaves(value), tree_leaves(emitted), strict=True):
            if not isinstance(old, Tensor):
                continue
            found = [before.units.find(np.where(f.labels < count, f.labels, 0)) for f in after.fields(now)]
            for f in before.fields(own):
                left = self.survivors.take(old, torch.from_numpy(np.ascontiguousarray(f.labels))).numpy()
                wanted = compact(before.units.find(left))
                wanted = np.where(wanted < count, wanted, 0)
                if wanted.size > 1 and not any(g.shape == wanted.shape and np.array_equal(g, wanted) for g in found):
                    raise self._mixed(node)

    def _rescale(self, new: fx.Node, node: fx.Node) -> fx.Node:
        """A mean over fewer elements keeps the original's divisor: the removed ones were zeros."""
        share = float(self.survivors.mask(self.coupling.context.rescaled[self.prefix + node.name]).mean())
        if share == 1.0:
            return new
        scaled = self.graph.call_function(operator.mul, (new, share))
        self.env[scaled] = run_node(self.context, self.root, scaled, self.env.__getitem__)
        return scaled

    def _check(self, node: fx.Node, old: Any, new: Any) -> None:
        pairs = [(old, new)] if isinstance(old, Tensor) else list(zip(tree_leaves(old), tree_leaves(new), strict=True))
        for before, after in pairs:
            if isinstance(before, Tensor):
                wanted = self.survivors.shape(before)
                if wanted != list(after.shape):
                    raise RewriteError(
                        f"node {node.name!r} ({node.target}) gives {tuple(after.shape)} in the smaller model, where its labels say "
                        f"{tuple(wanted)} (original: {tuple(before.shape)}). Pass the module's name in keep= to leave it whole.",
                        node.name,
                    )
        if self.context.units.version != self.checked:
            self.checked = self.context.units.version
            if not np.array_equal(self.context.units.find(self.units), self.units):
                raise self._mixed(node)
        if node.op != "get_attr":
            for before, after in pairs:
                if isinstance(before, Tensor):
                    self._compare(node, before, after)

    def _compare(self, node: fx.Node, old: Tensor, new: Tensor) -> None:
        """The labels that the emitted node gives must be those of the original's survivors, in the same order.

        The next node then starts from these: a channel axis that shrank to size 1 has no labels of its own any more.
        """
        expected = self.coupling.context.fields(old)
        found = self.context.fields(new)
        if not expected and not found:
            return
        left = [compact(self.survivors.take(old, torch.from_numpy(np.ascontiguousarray(f.labels))).numpy()) for f in expected]
        for g in found:
            # Labels born in this run (padding, expanded dimensions) stand for those that the original bore here.
            right = (g.labels == 0) | (g.labels >= self.coupling.context.units.count)
            for labels in left:
                right = right | (g.labels == labels)
            if left and not right.all():
                raise self._mixed(node)
        kept = [
            Field(labels, f.zero)
            for f, labels in zip(expected, left, strict=True)
            if labels.size > 1 and not _shrank_away(f.labels, labels, self.coupling)
        ]
        self.context.put(new, kept)

    def _mixed(self, node: fx.Node) -> RewriteError:
        return RewriteError(
            f"node {node.name!r} ({node.target}) brings channels together that were apart in the original. "
            "Pass the module's name in keep= to leave it whole.",
            node.name,
        )


def _shrank_away(before: Array, after: Array, coupling: Coupling) -> bool:
    """Whether a field over several dimensions has one position left along the shrinking one.

    What is left varies along the blocks only, where it would be taken for labels of whole blocks.
    """
    return len(varied(before)) > 1 and after.shape[shrinking_dim(before, coupling.balance.block)] == 1


def _old_labels(coupling: Coupling, survivors: Survivors, smaller: dict[int, Tensor]) -> Context:
    """A context in which every surviving element of every parameter carries its unit of the original."""
    context = Context()
    context.units.pinning = False
    context.units.fresh(coupling.context.units.count - 1, -1)
    for name, tensor in coupling.parameters.items():
        if not tensor.is_meta:
            continue
        fields = []
        for labels in coupling.parameter_labels(name):
            left = np.ascontiguousarray(survivors.take(tensor, torch.from_numpy(np.ascontiguousarray(labels))).numpy())
            if not _shrank_away(labels, left, coupling):
                fields.append(Field(left, True))
        context.parameter(smaller[id(tensor)], name, tuple(-1 for _ in tensor.shape), fields)
    return context


def _skeleton(module: nn.Module, replaced: dict[int, Tensor], done: dict[int, nn.Module], whole: bool = False) -> nn.Module:
    """The module tree of the emitted model: leaves copied with all below them, the rest plain containers. Sharing is kept."""
    if id(module) in done:
        return done[id(module)]
    kind = type(module)
    leaf = whole or is_leaf(module)
    new = kind.__new__(kind) if leaf else nn.Module()
    if leaf:
        new.__dict__.update(module.__dict__)
    for store in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
        new.__dict__[store] = module.__dict__[store].copy()
    new.training = module.training
    done[id(module)] = new
    tensors: tuple[dict[str, Any], ...] = (new._parameters, new._buffers)
    for own in tensors:
        for name, tensor in own.items():
            if tensor is not None and id(tensor) in replaced:
                own[name] = replaced[id(tensor)]
    for name, child in module._modules.items():
        if child is not None:
            new._modules[name] = _skeleton(child, replaced, done, leaf)
    return new


def _survivors_of(coupling: Coupling, survivors: Survivors) -> dict[int, Tensor]:
    """The surviving elements of the user's tensors, by the id of the twin's tensor."""
    real = coupling.traces[0].twin.real
    out: dict[int, Tensor] = {}
    for tensor in coupling.parameters.values():
        source = real[id(tensor)]
        taken = survivors.take(tensor, source.detach()) if tensor.is_meta else source.detach()
        if taken.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            taken = taken.clone()
        taken = _laid_out_like(source, taken)
        out[id(tensor)] = nn.Parameter(taken, source.requires_grad) if isinstance(source, nn.Parameter) else taken
    return out


def _laid_out_like(source: Tensor, taken: Tensor) -> Tensor:
    """Contiguous, in the memory format of the source. Strides tell it, also where sizes of 1 make both formats contiguous."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if last is None or source.stride() != torch.empty(source.shape, device=META, memory_format=last).stride():
        return taken.contiguous()
    return torch.empty_like(taken, memory_format=last).copy_(taken)


def _fill(root: nn.Module, real: dict[int, Tensor], meta: dict[int, Tensor]) -> None:
    """Put real tensors in the place of the meta tensors that the graph was checked with."""
    by_stand_in = {id(stand_in): real[key] for key, stand_in in meta.items()}
    for module in root.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in by_stand_in:
                    store[name] = by_stand_in[id(tensor)]  # type: ignore[assignment]
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                delattr(module, name)  # a hook computes it at each call


def _set(root: nn.Module, target: str, value: Tensor) -> None:
    path, _, name = target.rpartition(".")
    setattr(root.get_submodule(path), name, value)
