"""Write the smaller graph, node by node, and check it while writing.

A new node runs at once, on meta tensors that carry the *old* labels of their survivors: two old
units that meet anywhere prove the emission wrong. That is the first of the two checks of an
emitted model.

A node whose ops treat all positions of an axis alike, and whose arguments need no correction,
commutes with removal: it gives the survivors of what it gave before. Such a node is run by the
thorough check only.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.contents import leaves_of
from fxprune.coupling import Coupling
from fxprune.dispatch import META, map_tensors
from fxprune.errors import RewriteError
from fxprune.hooks import has_own_forward, in_mode
from fxprune.identity import IdentityMap
from fxprune.labels import Array, Field, compact, varied
from fxprune.memory import Memory, first_of, name_of, shares
from fxprune.module_sizes import sizes_of
from fxprune.moments import counts_removed
from fxprune.ops import Context
from fxprune.ops.calls import Call, call_of
from fxprune.propagation import run_node
from fxprune.references import HOOKS, hooks_of
from fxprune.rewrite.extents import Extent, Extents
from fxprune.rewrite.leaves import resize
from fxprune.rewrite.literals import correct
from fxprune.rewrite.module import PrunedModule
from fxprune.rewrite.numbers import Numbers
from fxprune.rewrite.survivors import Mask, Survivors
from fxprune.trace import Trace, attribute, is_leaf, plain_attention, put_tensors

__all__ = ["emit"]


def emit(
    coupling: Coupling, survivors: Survivors, name: str = "Pruned", *, thorough: bool = False
) -> nn.Module:
    """The smaller model, with the surviving elements of the user's parameters.

    Parameters
    ----------
    thorough:
        Run and check every node, those as well that cannot go wrong unless a rule is wrong.

    Raises
    ------
    RewriteError
        If a node cannot be made smaller, or units that were separate meet; it carries the node's
        name.
    """
    meta_copy, parts = coupling.meta_copy, coupling.parts
    smaller = {id(own): _smaller(own, survivors) for own in coupling.parameters.values()}
    made: dict[int, nn.Module] = {}
    root = _skeleton(meta_copy.model, smaller, made, keep_classes=bool(parts))
    context = _old_units(coupling)
    original = {id(smaller[id(tensor)]): tensor for tensor in coupling.parameters.values()}
    emitted: dict[str, tuple[nn.Module, list[fx.Graph]]] = {}
    for path in parts or ("",):
        below, own = (
            root.get_submodule(path),
            [trace for trace in coupling.traces if trace.path == path],
        )
        for trace in own:
            for target in trace.constants:
                constant = operator.attrgetter(target)(trace.meta_copy.model)
                _set(below, target, constant if constant.is_meta else constant.cpu())
        graphs = [
            _Emission(coupling, survivors, trace, below, original, context, thorough).run()
            for trace in own
        ]
        if len(graphs) > 1 and str(graphs[0]) == str(graphs[1]):
            del graphs[1]  # the model asks for its mode, but does the same in both
        emitted[path] = below, graphs
    filled = _survivors_of(coupling, survivors)
    _fill_tensors(root, filled, smaller)
    for trace in coupling.traces:
        for target, tensor in trace.constants.items():
            _set(emitted[trace.path][0], target, tensor)
    standing: dict[int, nn.Module] = {}
    for path, (below, graphs) in emitted.items():
        _place_positions(below, coupling.meta_copy.device)
        module = PrunedModule(
            below, graphs[0], type(below).__name__ if path else name, *graphs[1:]
        )
        standing[id(below)] = (
            module.behaving_like(below)
            if path
            else module.holding_modes(_own_modes(meta_copy.model))
        )
        root = _replaced(root, below, standing[id(below)])
    final = {key: standing.get(id(below), below) for key, below in made.items()}
    if parts or any(map(has_own_forward, made.values())):
        _refer_to(made, final, filled)
    if parts:
        _hook(meta_copy.modules, final)
        for module in final.values():
            vars(module).update(sizes_of(module))
    return root


_POSITIONS = "_positions"
"""How the names of buffers begin that say which positions Python sees."""


def _smaller(tensor: Tensor, survivors: Survivors) -> Tensor:
    """A tensor of the size that is left of a parameter or buffer, without data where that has
    none.
    """
    made = (
        torch.empty(survivors.shape(tensor), dtype=tensor.dtype, device=META)
        if tensor.is_meta
        else tensor.clone()
    )
    return nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made


def _place_positions(module: nn.Module, device: torch.device) -> None:
    """Put the buffers of positions on the device of the model."""
    for name in module._non_persistent_buffers_set:
        if name.startswith(_POSITIONS):
            module.register_buffer(name, module.get_buffer(name).to(device), persistent=False)


class _Emission:
    def __init__(
        self,
        coupling: Coupling,
        survivors: Survivors,
        trace: Trace,
        root: nn.Module,
        original: dict[int, Tensor],
        context: Context,
        thorough: bool,
    ) -> None:
        self.coupling, self.survivors, self.trace, self.root, self.context = (
            coupling,
            survivors,
            trace,
            root,
            context,
        )
        self.original = original  # by the id of a parameter of the smaller model: the meta copy's
        self.thorough = thorough
        self.prefix = trace.prefix
        self.graph = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        # the values of the new nodes, but for those that nobody has needed yet
        self.env: dict[fx.Node, Any] = {}
        # the original's result, for new nodes that need not run
        self.unrun: dict[fx.Node, Tensor] = {}
        # for a tensor of the original what stands for it in the smaller model
        self.standing: IdentityMap[Tensor, Tensor] = IdentityMap()
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.units = coupling.units[survivors.alive[coupling.units]]
        self.checked = context.units.version
        self.numbers = Numbers(
            Extents(survivors, trace.meta_copy.model, self.ran), self.graph, self.made, self.env
        )

    @functools.cached_property
    def memory(self) -> Memory:
        """Who shares memory with whom in the original's graph."""
        return Memory(self.trace.graph, self.trace.meta_copy.model)

    def value(self, new: fx.Node) -> Any:
        """The value of a node of the new graph; of one that was not run, a tensor with the labels
        of the original's survivors.
        """
        if new not in self.env:
            self.env[new] = self._stand_in(self.unrun[new])
        return self.env[new]

    def _stand_in(self, old: Tensor) -> Tensor:
        """A tensor with the labels of what is left of one of the original."""
        if old not in self.standing:
            stand_in = self.standing[old] = torch.empty(
                self.survivors.shape(old), dtype=old.dtype, device=META
            )
            self.context.put(stand_in, self._left(old))
        return self.standing[old]

    def call(self, node: fx.Node) -> Call | None:
        """The ATen op that a node of the original is, if it is one."""
        return call_of(node, self.ran(node), self.numbers.old)

    def ran(self, node: fx.Node) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
        """The ops that a node of the original ran, with their arguments."""
        return self.coupling.context.found.ran.get(self.prefix + node.name, [])

    def left_of(self, node: fx.Node) -> tuple[int, int] | None:
        """Of how many elements that a statistic reduces to one how many are left; None if all are,
        or if it is none.
        """
        mask = self.survivors.mask(
            self.coupling.context.found.rescaled.get(self.prefix + node.name, [])
        )
        kept, total = int(np.count_nonzero(mask)), mask.size
        common = math.gcd(kept, total)
        return None if kept == total else (kept // common, total // common)

    # -- the graph

    def run(self) -> fx.Graph:
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
        if node.op == "placeholder":
            new = self._taken_in(self.graph.node_copy(node), next(inputs))
        elif node.op == "output":
            handed = fx.node.map_arg(node.args, self._handed_out)
            new = self.graph.create_node("output", "output", handed, name=node.name)
        else:
            emitted = self._call(node)
            if emitted is None:
                return
            new = self._copied(node, emitted) if self._may_become_a_view(node) else emitted
        new.meta = (
            {"rank": value.dim()} if isinstance(value := node.meta.get("val"), Tensor) else {}
        )
        self.made[node] = new

    def _taken_in(self, new: fx.Node, value: Any) -> fx.Node:
        """An input as it comes from Python code: smaller too, or as wide as it was, and what is
        still read is taken from it.
        """
        self.env[new] = map_tensors(
            lambda old: self._stand_in(old) if self.coupling.labels(old) else old, value
        )
        for dim, alive in self._padded(value):
            kept = np.flatnonzero(alive)
            # Counted from the end: Python may drop a batch of one, which layers take for a single
            # input.
            new = self.graph.call_function(
                torch.index_select, (new, dim - value.dim(), self._positions(kept))
            )
            self.env[new] = self._stand_in(value)
        return new

    def _handed_out(self, node: fx.Node) -> Any:
        """A result as Python code gets it: smaller, or as wide as it was, with zeros where
        something is gone.
        """
        new, value = self.numbers.original(node), _value(node)
        if isinstance(value, Tensor):
            return self._widened(new, value)
        if not any(True for leaf in leaves_of(value) for _ in self._padded(leaf)):
            return new
        # a named tuple, or another object that holds tensors: made of what is handed out
        if isinstance(node.target, type):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._handed_out)
            return self.graph.call_function(node.target, args, kwargs)
        items = [
            self._widened(self.graph.call_function(operator.getitem, (new, i)), item)
            for i, item in enumerate(value)
        ]
        return (
            type(value)(items)
            if type(value) in (tuple, list)
            else self.graph.call_function(type(value), (items,))
        )

    def _widened(self, new: fx.Node, old: Any) -> fx.Node:
        for dim, alive in self._padded(old):
            padding = [0, 0] * (old.dim() - 1 - dim) + [0, 1]
            new = self.graph.call_function(torch.nn.functional.pad, (new, padding))
            places = np.where(alive, np.cumsum(alive) - 1, np.count_nonzero(alive))
            new = self.graph.call_function(
                torch.index_select, (new, dim - old.dim(), self._positions(places))
            )
        return new

    def _padded(self, tensor: Any) -> Iterator[tuple[int, Mask]]:
        """The dimensions of an input or output that Python sees as wide as they were, and which of
        their positions are left.
        """
        for dim in self.coupling.wide_dims(tensor) if self.trace.path else ():
            rows = self.survivors.rows(tensor, dim)
            if rows is not None:
                yield dim, rows[0]

    def _positions(self, index: Array) -> fx.Node:
        """A node that reads these positions, which are a buffer outside the state dict."""
        name = next(
            n
            for n in map(f"{_POSITIONS}{{}}".format, itertools.count())
            if not hasattr(self.root, n)
        )
        with torch.inference_mode(False):
            self.root.register_buffer(name, torch.tensor(index), persistent=False)
        return self.graph.get_attr(name)

    def _call(self, node: fx.Node) -> fx.Node | None:
        value = _value(node)
        if (
            self.numbers.shrunk(node)
            or self._is_idle(node)
            or (node.target is torch._assert and not self._open(node.args[0]))
        ):
            return None
        target, args, kwargs = correct(self.numbers, node, self.call(node), self.left_of(node))
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
        if module is not None:
            for tensor in (*module.parameters(), *module.buffers()):
                self._label(tensor)
        self.env[new] = run_node(self.context, self.root, new, self.value)
        if op == "get_attr":
            self._label(self.env[new])
        if self.prefix + node.name in self.coupling.context.found.rescaled:
            new = self._rescale(new, node)
        self._check(node, value, self.env[new])
        if isinstance(value, Tensor) and value.is_meta:
            self.standing[value] = self.env[new]
        if self.prefix + node.name in self.coupling.context.found.moved:
            self._check_order(node, new, value)
        return new

    def _may_become_a_view(self, node: fx.Node) -> bool:
        """Whether a tensor laid out anew is memory of its own, and what is left of it may not be,
        where that shows.

        An axis of which one position is left lies in memory as one likes.
        """
        source, value = shares(node, self.trace.meta_copy.model), _value(node)
        old = None if source is None else _value(source)
        if (
            not isinstance(old, Tensor)
            or not isinstance(value, Tensor)
            or not hasattr(torch.ops.aten, name_of(node))
        ):
            return False
        alone = any(
            left == 1 != size
            for size, left in zip(old.shape, self.survivors.shape(old), strict=True)
        )
        both = {_storage(old), _storage(value)}
        if not alone or len(both) == 1:
            return False
        written = (_value(to) for to in self.memory.written_after(node))
        return any(
            isinstance(to, Tensor) and _storage(to) in both for to in written
        ) and self.memory.changed_behind(node)

    def _copied(self, node: fx.Node, new: fx.Node) -> fx.Node:
        """A copy of what a node gives, as the original's is one, for inputs of sizes that do not
        change that.
        """
        self.numbers.hold_layout(cast(fx.Node, first_of(node)))
        copied = self.graph.call_method("clone", (new,))
        if new in self.unrun:
            self.unrun[copied] = self.unrun[new]
        else:
            self.env[copied] = run_node(self.context, self.root, copied, self.value)
        return copied

    def _open(self, held: Any) -> bool:
        """Whether what an assertion holds can be otherwise for other inputs: it does not follow
        from widths alone.
        """
        return not self._counts_widths(held) and isinstance(self.numbers.original(held), fx.Node)

    def _counts_widths(self, held: Any) -> bool:
        """Whether an assertion says into how many parts a width is cut, which is the same for
        every input.
        """
        cut = self.numbers.extents.counted(held)
        if cut is None:
            return False
        if self.survivors.rows(_value(cut[0]), cut[1]) is not None:
            self.numbers.hold_positions(*cut)  # fewer parts may be left
            return True
        return self.numbers.extents.of(*cut) is Extent.FIXED

    def _is_idle(self, node: fx.Node) -> bool:
        """Whether a number is read by assertions alone that count the parts of a width."""
        if node.target is len:
            return bool(node.users) and all(map(self._is_idle, node.users))
        return (
            node.target is operator.eq
            and self._counts_widths(node)
            and all(n.target is torch._assert for n in node.users)
        )

    def _label(self, smaller: Any) -> None:
        """Give what is left of a parameter the units of its elements, when it is first needed."""
        tensor = self.original.get(id(smaller))
        if tensor is None or not tensor.is_meta or self.context.record(smaller) is not None:
            return
        fields = []
        for labels in self.coupling.labels(tensor):
            left = np.ascontiguousarray(
                self.survivors.take(tensor, torch.from_numpy(np.ascontiguousarray(labels))).numpy()
            )
            if not _shrank_away(labels, left, self.coupling):
                fields.append(Field(left, True))
        self.context.parameter(smaller, "", tuple(-1 for _ in smaller.shape), fields)

    def _commutes(self, node: fx.Node) -> bool:
        """Whether a node, its arguments as they are, gives the survivors of what it gave
        before.
        """
        name, seen, value = self.prefix + node.name, self.coupling.context.found, _value(node)
        if node.op == "get_attr" or name in seen.positional or name in seen.rescaled:
            return False
        if not isinstance(value, Tensor) or not value.is_meta:
            return False
        for operand in node.all_input_nodes:
            own = _value(operand)
            if isinstance(own, Tensor):
                if not own.is_meta:
                    return False
            elif isinstance(own, (tuple, list, dict)) or self.numbers.shrunk(operand):
                return False
        return True

    def _check_order(self, node: fx.Node, new: fx.Node, value: Any) -> None:
        """Labels of units cannot tell two positions of one unit apart: where positions are laid
        out anew, tell them one by one.

        Every position of every operand gets a number of its own. The emitted node must bring the
        survivors' numbers to where the original's node brings them.
        """
        if node.op == "call_module" and any(
            True for _ in self.modules[str(node.target)].parameters()
        ):
            return
        operands = [
            n
            for n in node.all_input_nodes
            if isinstance(_value(n), Tensor) and self.survivors.fields(_value(n))
        ]
        if not operands:
            return
        before, after = Context(), Context()
        before.units.pinning = after.units.pinning = False
        numbered: dict[fx.Node, list[Array]] = {}
        for operand in operands:
            labels = self.coupling.labels(_value(operand))
            numbered[operand] = [before.units.fresh(a.size, -1).reshape(a.shape) for a in labels]
            before.put(_value(operand), [Field(a, True) for a in numbered[operand]])
        after.units.fresh(before.units.count - 1, -1)
        for operand, arrays in numbered.items():
            old = _value(operand)
            taken = [
                compact(self.survivors.take(old, torch.from_numpy(a)).numpy()) for a in arrays
            ]
            after.put(
                self.value(self.made[operand]),
                [Field(np.ascontiguousarray(a), True) for a in taken if a.size > 1],
            )
        count = before.units.count
        result = run_node(before, self.trace.meta_copy.model, node, _value)
        emitted = run_node(after, self.root, new, self.value)
        for own, old, now in zip(
            tree_leaves(result), tree_leaves(value), tree_leaves(emitted), strict=True
        ):
            if not isinstance(old, Tensor):
                continue
            found = [
                before.units.find(np.where(f.labels < count, f.labels, 0))
                for f in after.fields(now)
            ]
            for f in before.fields(own):
                left = self.survivors.take(
                    old, torch.from_numpy(np.ascontiguousarray(f.labels))
                ).numpy()
                wanted = compact(before.units.find(left))
                wanted = np.where(wanted < count, wanted, 0)
                # labels that were made here, by a dimension that is repeated, say nothing
                if wanted.size == 1 or not wanted.any():
                    continue
                if not any(g.shape == wanted.shape and np.array_equal(g, wanted) for g in found):
                    raise self._mixed(node)

    def _rescale(self, new: fx.Node, node: fx.Node) -> fx.Node:
        """A mean over fewer elements keeps the original's divisor: the removed ones were zeros."""
        left = self.left_of(node)
        # they count what is gone by themselves
        if left is None or counts_removed(new.target):
            return new
        call = self.call(node)
        if call is None or call.name != "mean":
            raise RewriteError(
                f"node {node.name!r} ({node.target}) averages inside a larger operation", node.name
            )
        scaled = self.graph.call_function(operator.mul, (new, left[0] / left[1]))
        self.env[scaled] = run_node(self.context, self.root, scaled, self.value)
        return scaled

    def _check(self, node: fx.Node, old: Any, new: Any) -> None:
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
        if self.context.units.version != self.checked:
            self.checked = self.context.units.version
            if not np.array_equal(self.context.units.find(self.units), self.units):
                raise self._mixed(node)
        if node.op != "get_attr":
            for before, after in pairs:
                if isinstance(before, Tensor):
                    self._compare(node, before, after)

    def _compare(self, node: fx.Node, old: Tensor, new: Tensor) -> None:
        """The labels that the emitted node gives must be those of the original's survivors, in the
        same order.

        The next node then starts from these: a channel axis that shrank to size 1 has no labels of
        its own any more.
        """
        found = self.context.fields(new)
        if not self.coupling.labels(old) and not found:
            return
        left = self._taken(old)
        for g in found:
            # Labels made in this run (padding, expanded dimensions) stand for those that the
            # original's run made here.
            right = (g.labels == 0) | (g.labels >= self.coupling.context.units.count)
            for _, labels in left:
                right = right | (g.labels == labels)
            if left and not right.all():
                raise self._mixed(node)
        self.context.put(new, self._left(old, left))

    def _taken(self, old: Tensor) -> list[tuple[Field, Array]]:
        """Each field of a tensor of the original, and its labels at the survivors."""
        fields = self.coupling.context.fields(old)
        return [
            (
                f,
                compact(
                    self.survivors.take(
                        old, torch.from_numpy(np.ascontiguousarray(f.labels))
                    ).numpy()
                ),
            )
            for f in fields
        ]

    def _left(self, old: Tensor, taken: list[tuple[Field, Array]] | None = None) -> list[Field]:
        """The fields of what is left of a tensor of the original."""
        return [
            Field(labels, f.zero)
            for f, labels in (self._taken(old) if taken is None else taken)
            if labels.size > 1 and not _shrank_away(f.labels, labels, self.coupling)
        ]

    def _mixed(self, node: fx.Node) -> RewriteError:
        return RewriteError(
            f"node {node.name!r} ({node.target}) brings channels together that were apart in the "
            "original. Pass the module's name in keep= to leave it whole.",
            node.name,
        )


def _value(node: fx.Node) -> Any:
    """What a node of the original's graph gave for the example."""
    return node.meta["val"]


def _storage(tensor: Tensor) -> int:
    """Which memory a tensor looks at, also where it has no data."""
    return tensor.untyped_storage()._cdata


def _shrank_away(before: Array, after: Array, coupling: Coupling) -> bool:
    """Whether a field over several dimensions has one position left along the shrinking one.

    What is left varies along the blocks only, where it would be taken for labels of whole blocks.
    """
    return len(varied(before)) > 1 and after.shape[coupling.shrinking_dim(before)] == 1


def _old_units(coupling: Coupling) -> Context:
    """A context in which labels are the units of the original, and nothing carries any yet."""
    context = Context()
    context.units.pinning = False
    context.units.fresh(coupling.context.units.count - 1, -1)
    context.found.summed_groups = coupling.context.found.summed_groups
    return context


def _replaced(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The tree with one module in the place of another, wherever that stands."""
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return new if root is old else root


def _refer_to(
    made: dict[int, nn.Module], final: dict[int, nn.Module], tensors: dict[int, Tensor]
) -> None:
    """What Python holds of the meta copy's modules and tensors (in lists, methods, closures) are
    the emitted ones from now on.

    ``made`` leads from the id of a meta copy's module to its skeleton, ``final`` to the module
    that was emitted.
    """
    memo: dict[int, Any] = {**final, **tensors}
    for key, below in made.items():
        own = vars(final[key])
        for name, value in vars(below).items():
            if name not in (*_SKELETON_STORES, *HOOKS) and own.get(name) is value:
                own[name] = attribute(name, value, memo)


def _hook(users: dict[int, nn.Module], final: dict[int, nn.Module]) -> None:
    """The emitted modules have the hooks of the user's: those of the meta copy collected what was
    run for the analysis.
    """
    memo: dict[int, Any] = {id(user): final[key] for key, user in users.items() if key in final}
    for key, user in users.items():
        for store in HOOKS if key in final else ():
            vars(final[key])[store] = hooks_of(vars(user)[store], memo)


_SKELETON_STORES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "training",
)


def _skeleton(
    module: nn.Module,
    replaced: dict[int, Tensor],
    done: dict[int, nn.Module],
    whole: bool = False,
    keep_classes: bool = False,
) -> nn.Module:
    """The module tree of the emitted model. Sharing is kept.

    Leaves are copied with all below them, the rest are plain containers, unless there is Python
    that calls their methods, or their forward was replaced: what a user has put on a module stays
    on it.
    """
    if id(module) in done:
        return done[id(module)]
    kind: Any = type(module)
    leaf = whole or is_leaf(module)
    keep_classes = keep_classes or has_own_forward(module)
    own_class = leaf or keep_classes
    new = kind.__new__(kind) if own_class else nn.Module()
    if own_class:
        new.__dict__.update(module.__dict__)
    if isinstance(module, fx.GraphModule) and own_class:
        # each has a class of its own, which gets its forward with the graph
        new.graph = copy.deepcopy(module.graph)
    for store in _SKELETON_STORES[:-1]:
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
            new._modules[name] = _skeleton(child, replaced, done, leaf, keep_classes)
    return new


def _own_modes(model: nn.Module) -> dict[bool, dict[str, bool]]:
    """For both modes of the model the modules that have another mode then, as a ``train()`` or an
    ``eval()`` of the user's says.
    """
    before = {module: module.training for module in model.modules()}
    found = {}
    try:
        for mode in (True, False):
            in_mode(model, mode)
            found[mode] = {
                name: module.training
                for name, module in model.named_modules()
                if module.training is not mode
            }
    finally:
        for module, mode in before.items():
            module.training = mode
    return found


def _survivors_of(coupling: Coupling, survivors: Survivors) -> dict[int, Tensor]:
    """The surviving elements of the user's tensors, by the id of the meta copy's tensor."""
    real = coupling.meta_copy.real
    out: dict[int, Tensor] = {}
    for tensor in coupling.parameters.values():
        source = real[id(tensor)]
        if source.layout is not torch.strided:
            out[id(tensor)] = source.detach().clone()
            continue
        taken = survivors.take(tensor, source.detach()) if tensor.is_meta else source.detach()
        if taken.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            taken = taken.clone()
        taken = _in_format_of(source, taken)
        out[id(tensor)] = (
            nn.Parameter(taken, source.requires_grad)
            if isinstance(source, nn.Parameter)
            else taken
        )
    return out


def _in_format_of(source: Tensor, taken: Tensor) -> Tensor:
    """Contiguous, in the memory format of the source. Strides tell it, also where sizes of 1 make
    both formats contiguous.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if (
        last is None
        or source.stride() != torch.empty(source.shape, device=META, memory_format=last).stride()
    ):
        return taken.contiguous()
    return torch.empty_like(taken, memory_format=last).copy_(taken)


def _fill_tensors(root: nn.Module, real: dict[int, Tensor], meta: dict[int, Tensor]) -> None:
    """Put real tensors in the place of the meta tensors that the graph was checked with."""
    put_tensors(root, {id(stand_in): real[key] for key, stand_in in meta.items()})
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                delattr(module, name)  # a hook computes it at each call


def _set(root: nn.Module, target: str, value: Tensor) -> None:
    path, _, name = target.rpartition(".")
    setattr(root.get_submodule(path), name, value)
