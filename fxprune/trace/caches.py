"""Results that forward keeps for later calls: a grid for a size, a table of positions.

A call before pruning may have left such a result on a module, or in a dict or an object beside the
model. forward then reads it, and a graph traced from this state holds for that size only. If the
result is removed, forward computes it from sizes, and so does the graph, for inputs of any size.
This is the same model if what is computed equals what was kept.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from fxprune.common.dispatch import META, holds_tensors, map_tensors
from fxprune.errors import FxpruneError
from fxprune.inputs import Call
from fxprune.trace.assigned import assigned_names
from fxprune.trace.execution import execute
from fxprune.trace.module_state import (
    AttributeChange,
    Attributes,
    changes_to_next_call,
    values_read,
)
from fxprune.trace.reach import Entry, Reach

__all__ = ["forgotten_caches"]


@contextmanager
def forgotten_caches(
    model: nn.Module,
    outside: Reach,
    arguments: Call,
    follow: Callable[[Call], tuple[fx.Graph, Mapping[str, Tensor]]],
    real: Callable[[Tensor], Tensor | None],
) -> Iterator[None]:
    """Remove cached results that forward computes again from sizes, if it computes the same.

    They are removed from the modules for good, because these are a copy. What is outside of the
    modules is restored on exit.

    Parameters
    ----------
    model:
        The meta copy that is traced.
    outside:
        What the model's code can reach.
    arguments:
        The arguments of the example, on the meta device.
    follow:
        Traces the model in its present state, and returns the graph and its constants by name.
        What it sets on the model is undone here.
    real:
        Returns the data of a buffer or of another tensor of the model.
    """
    candidates: dict[Any, _ModuleAttribute | Entry] = {
        **dict(_cached_attributes(model)),
        **{entry.key: entry for entry in outside.entries},
    }
    forgetting = _Forgetting(model, outside, arguments, follow, real, candidates)
    try:
        if candidates:
            forgetting.run()
        yield
    finally:
        forgetting.put_back()


@dataclass(frozen=True)
class _ModuleAttribute:
    """An attribute of a module that may hold a cached result."""

    store: dict[str, Any]
    name: str

    @property
    def value(self) -> Any:
        """The present value."""
        return self.store[self.name]

    @property
    def empty_values(self) -> list[Any]:
        """Further values that may be there before the attribute is filled."""
        return []

    def put(self, value: Any) -> None:
        """Set the attribute."""
        self.store[self.name] = value


@dataclass(frozen=True)
class _TracedCall:
    """A traced call: its graph and constants, and the attributes that forward has set, by path."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    changes: Mapping[Any, AttributeChange]

    @property
    def results(self) -> list[Any]:
        """The shapes and dtypes of the results; numbers as they are."""
        outputs: list[fx.Node] = []
        fx.node.map_arg(next(iter(reversed(self.graph.nodes))).args, outputs.append)
        values = [leaf for node in outputs for leaf in tree_leaves(node.meta["val"])]
        return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in values]


class _Forgetting:
    """Removes cached results of one model.

    Parameters
    ----------
    model, outside, arguments, follow, real:
        See :func:`forgotten_caches`.
    candidates:
        The attributes and entries that may hold cached results, by path or key.
    """

    def __init__(
        self,
        model: nn.Module,
        outside: Reach,
        arguments: Call,
        follow: Any,
        real: Any,
        candidates: Mapping[Any, _ModuleAttribute | Entry],
    ) -> None:
        self.model = model
        self.outside = outside
        self.arguments = arguments
        self.follow = follow
        self.real = real
        self._candidates = candidates
        # removed entries outside of the model, each with the value that is there instead
        self._removed: list[tuple[Entry, Any]] = []

    def run(self) -> None:
        """Remove all cached results that forward computes again."""
        now = self._trace(self.arguments)
        if now is None or not any(node.target is torch._assert for node in now.graph.nodes):
            return  # the graph already holds for inputs of any size
        done: set[Any] = set()
        for path, place in self._candidates.items():
            if path not in done and self._is_read(place, now):
                done |= self._try_without(path, now)

    def _try_without(self, path: Any, now: _TracedCall) -> set[Any]:
        """Remove the value at a path if forward computes it again.

        Returns
        -------
        The paths that forward sets after the removal; empty if the value is left as it was.
        """
        place = self._candidates[path]
        was = place.value
        for absent in [*place.empty_values, *_empty_values(was)]:
            place.put(absent)
            set_again = self._paths_set_again(path, was, now)
            if set_again:
                self._removed += [(place, absent)] if isinstance(place, Entry) else []
                return set_again
            place.put(was)
        return set()

    def put_back(self) -> None:
        """Restore what is outside of the model, unless another thread has computed it again."""
        for entry, absent in self._removed:
            if entry.now() is absent:
                entry.put(entry.value)

    def _is_read(self, place: _ModuleAttribute | Entry, now: _TracedCall) -> bool:
        """Tell whether the graph may contain a cached value.

        An attribute of a module may always be read. A value outside may if it is a number, or if
        one of its tensors equals a constant of the graph.
        """
        tensors = [leaf for leaf in tree_leaves(place.value) if isinstance(leaf, Tensor)]
        if isinstance(place, _ModuleAttribute) or not tensors:
            return isinstance(place, _ModuleAttribute) or type(place.value) in (int, float)
        for tensor in tensors:
            for constant in now.constants.values():
                if tensor.shape == constant.shape and self._same(tensor, constant, "whole"):
                    return True
        return False

    def _trace(self, arguments: Call) -> _TracedCall | None:
        """Trace a call, and restore the attributes of the model; None if it cannot be traced."""
        attributes = Attributes(self.model)
        try:
            graph, constants = self.follow(arguments)
            found = attributes.changes(constants)
            changes: dict[Any, AttributeChange] = {change.path: change for change in found}
            return _TracedCall(graph, constants, changes | self._outside())
        except FxpruneError:
            return None
        finally:
            attributes.restore()

    def _outside(self) -> dict[Any, AttributeChange]:
        """Return what forward has set outside of the modules."""
        changes: dict[Any, AttributeChange] = {}
        for key, value in self.outside.taken.items():
            place = self._candidates.get(key)
            before = place.value if isinstance(place, Entry) else None
            changes[key] = AttributeChange({}, "", str(key), before, None, value)
        return changes

    def _paths_set_again(self, path: Any, was: Any, now: _TracedCall) -> set[Any]:
        """Return the paths that forward sets once the value at a path is removed.

        Empty if the removal may make another model of it. What forward sets is compared with what
        was kept, for the example and for shorter inputs.

        Parameters
        ----------
        path:
            The path or key of the removed value.
        was:
            The removed value.
        now:
            The call before the removal. A value that this call sets, it does not read as kept; of
            such a value only the overlap is compared.
        """
        again = self._trace(self.arguments)
        if (
            again is None
            or path not in again.changes
            or changes_to_next_call(again.changes.values())
            or again.results != now.results
        ):
            return set()
        kept = {key: change.before for key, change in again.changes.items()} | {path: was}
        for key, value in self._values(again).items():
            if not self._same(kept[key], value, "overlaps" if key in now.changes else "whole"):
                return set()
        return set(again.changes) if self._fits_shorter(path, kept) else set()

    def _fits_shorter(self, path: Any, kept: Mapping[Any, Any]) -> bool:
        """Tell whether kept values begin with what forward sets for shorter inputs.

        False if there are no shorter inputs with which forward can be traced.

        Parameters
        ----------
        path:
            The path or key of the removed value.
        kept:
            The kept values by path or key, the removed one included.
        """
        compared, place = False, self._candidates[path]
        absent = place.now() if isinstance(place, Entry) else place.value
        for arguments in _shorter(self.arguments):
            without = self._trace(arguments)
            place.put(kept[path])
            stored = None if without is None else self._trace(arguments)
            place.put(absent)
            if without is None or stored is None:
                continue
            compared = True
            for key, value in self._values(without).items():
                if key not in stored.changes and not self._same(kept.get(key), value, "begins"):
                    return False
        return compared

    def _values(self, followed: _TracedCall) -> dict[Any, Any]:
        """Return what forward has set, computed from sizes and buffers.

        A value that depends on more is None.
        """
        computed: dict[fx.Node, Any] = {}
        for node in followed.graph.nodes:
            computed[node] = self._value(node, computed, followed.constants)

        def value(node: fx.Node) -> Any:
            """Return the value of a node. A size that nobody reads is in no graph."""
            is_computed = node in computed or holds_tensors(node.meta["val"])
            return computed[node] if is_computed else node.meta["val"]

        return {path: change.computed(value) for path, change in followed.changes.items()}

    def _value(
        self, node: fx.Node, computed: Mapping[fx.Node, Any], constants: Mapping[str, Tensor]
    ) -> Any:
        """Compute the value of one node from the values of others."""
        value = node.meta.get("val")
        if value == META:
            return _CPU
        if node.op == "get_attr" and isinstance(value, Tensor):
            name = str(node.target)
            is_constant = name in constants
            return self._data(
                constants[name] if is_constant else operator.attrgetter(name)(self.model)
            )
        if node.op in ("call_function", "call_method") and (holds_tensors(value) or value is None):
            return self._result(node, computed)
        return None if holds_tensors(value) else value

    def _result(self, node: fx.Node, computed: Mapping[fx.Node, Any]) -> Any:
        """Run a call on computed values; None if that is impossible."""
        if any(computed[operand] is None for operand in values_read(node)):
            return None
        try:  # if it cannot be computed here, for whatever reason, the attribute is kept
            args, kwargs = fx.node.map_arg(
                (node.args, node.kwargs), lambda operand: _or_zeros(computed[operand], operand)
            )
            return execute(self.model, node, args, kwargs)
        except Exception:
            return None

    def _data(self, tensor: Any) -> Tensor | None:
        """Return a tensor of the model with its data, on the CPU.

        None for a parameter, because training may change it.
        """
        if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter):
            return None
        data = self.real(tensor)
        return None if data is None or data.is_meta else data.detach().cpu()

    def _same(self, kept: Any, computed: Any, how: str) -> bool:
        """Compare a kept value with a computed one.

        Parameters
        ----------
        kept, computed:
            Tensors, numbers, or containers of these.
        how:
            ``"whole"``: they are equal; ``"begins"``: the kept one begins with the computed one;
            ``"overlaps"``: they are equal where they overlap.
        """
        if isinstance(computed, dict):
            same = isinstance(kept, dict) and kept.keys() == computed.keys()
            return same and all(self._same(kept[key], computed[key], how) for key in computed)
        if isinstance(computed, (tuple, list)):
            same = isinstance(kept, (tuple, list)) and len(kept) == len(computed)
            pairs = zip(kept, computed, strict=True) if same else ()
            return same and all(self._same(*pair, how) for pair in pairs)
        if not isinstance(computed, Tensor):
            return how == "overlaps" or bool(kept == computed)
        return self._same_tensor(kept, computed, how)

    def _same_tensor(self, kept: Any, computed: Tensor, how: str) -> bool:
        """Compare a kept tensor with a computed one (see ``_same``)."""
        data = self._data(kept)
        if data is None or data.dim() != computed.dim():
            return False
        common = [min(sizes) for sizes in zip(data.shape, computed.shape, strict=True)]
        if how == "begins" and common != list(computed.shape):
            return False
        if how == "whole" and data.shape != computed.shape:
            return False
        data, computed = data[tuple(map(slice, common))], computed[tuple(map(slice, common))]
        is_rounded = data.dtype.is_floating_point and data.dtype is computed.dtype
        close = 16 * torch.finfo(data.dtype).eps if is_rounded else 0.0
        data = data.to(computed.dtype)
        return torch.allclose(data, computed, rtol=close, atol=close, equal_nan=True)


_CPU = torch.device("cpu")


def _or_zeros(computed: Any, node: fx.Node) -> Any:
    """Return the computed value of an argument.

    If it was not computed, because only its shape and dtype are read, return zeros.
    """
    value = node.meta["val"]
    if computed is None and isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype)
    return computed


def _shorter(arguments: Call) -> Iterator[Call]:
    """Yield the example with one of its sizes made smaller by one, and halved.

    The size is changed in all tensors that have it at the same dimension.
    """
    tensors: list[Tensor] = []
    map_tensors(tensors.append, arguments)
    for dim in range(max((tensor.dim() for tensor in tensors), default=0)):
        size = next(tensor.shape[dim] for tensor in tensors if tensor.dim() > dim)
        for less in sorted({size - 1, size // 2} - {0}):
            cut = functools.partial(_shorten, dim=dim, size=size, less=less)
            yield map_tensors(cut, arguments)


def _shorten(tensor: Tensor, dim: int, size: int, less: int) -> Tensor:
    """Shorten a tensor whose dimension ``dim`` has this size."""
    if tensor.dim() > dim and tensor.shape[dim] == size:
        return tensor.narrow(dim, 0, less)
    return tensor


def _empty_values(value: Any) -> list[Any]:
    """Return values that may be in place of a cached result before it is computed."""
    if isinstance(value, Tensor):
        return [None, value.new_empty((0,) * value.dim())]
    if isinstance(value, (list, dict)):
        return [type(value)()]
    return [None, 0] if isinstance(value, int) else [None]


def _cached_attributes(model: nn.Module) -> Iterator[tuple[str, _ModuleAttribute]]:
    """Yield attributes of modules that code which forward calls sets, with their paths.

    Buffers are left out, because they may be loaded from a file.
    """
    for path, module in model.named_modules():
        store, kind = vars(module), type(module)  # type: dict[str, Any], Any
        for name in sorted(assigned_names(kind) & store.keys()):
            value = store[name]
            is_cacheable = isinstance(value, (Tensor, tuple, list, dict, int, float))
            if is_cacheable and type(value) is not bool:
                yield f"{path}.{name}".removeprefix("."), _ModuleAttribute(store, name)
