"""What forward keeps so as not to compute it again: a grid for the size of its last call, a table
of positions.

Where a call before pruning has left one, on a module or in a dict or an object beside the model,
forward reads it, and a graph followed from there holds for that size only. Where it is forgotten,
forward computes it from sizes, and so does the graph, for inputs of any size. That is the same
model if what is computed is what was kept.
"""

from __future__ import annotations

import dis
import functools
import inspect
import operator
import types
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
from fxprune.trace.execution import execute
from fxprune.trace.module_state import AttributeChange, Attributes, carried, values_read
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
    """What forward computes anew from sizes, and computes as it was, is not there.

    It is taken from the modules for good, which are a copy, and for the time of this context from
    what is outside of them.

    Parameters
    ----------
    outside:
        What the model's code can reach.
    arguments:
        The example's, on the meta device.
    follow:
        Traces the model as it is: the graph, and its constants by name. What it sets on the model
        is undone here.
    real:
        The data of a buffer or of another tensor of the model.
    """
    kept: dict[Any, _ModuleAttribute | Entry] = {
        **dict(_kept(model)),
        **{entry.key: entry for entry in outside.entries},
    }
    forgetting = _Forgetting(model, outside, arguments, follow, real, kept)
    try:
        if kept:
            forgetting.run()
        yield
    finally:
        forgetting.put_back()


@dataclass(frozen=True)
class _ModuleAttribute:
    """An attribute of a module."""

    store: dict[str, Any]
    name: str

    @property
    def value(self) -> Any:
        return self.store[self.name]

    @property
    def instead(self) -> list[Any]:
        return []

    def put(self, value: Any) -> None:
        self.store[self.name] = value


@dataclass(frozen=True)
class _FollowedCall:
    """A graph, and the attributes that forward has set, by their paths."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    changes: Mapping[Any, AttributeChange]

    @property
    def gives(self) -> list[Any]:
        """Shapes and dtypes of the results."""
        results: list[fx.Node] = []
        fx.node.map_arg(next(iter(reversed(self.graph.nodes))).args, results.append)
        values = [leaf for node in results for leaf in tree_leaves(node.meta["val"])]
        return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in values]


class _Forgetting:
    def __init__(
        self,
        model: nn.Module,
        outside: Reach,
        arguments: Call,
        follow: Any,
        real: Any,
        kept: Mapping[Any, _ModuleAttribute | Entry],
    ) -> None:
        self.model, self.outside, self.arguments, self.follow, self.real = (
            model,
            outside,
            arguments,
            follow,
            real,
        )
        self._kept = kept
        # what was put away outside of the model, and what stands there instead
        self._away: list[tuple[Entry, Any]] = []

    def run(self) -> None:
        """Forget what can be forgotten."""
        now = self._followed(self.arguments)
        if now is None or not any(node.target is torch._assert for node in now.graph.nodes):
            return  # it is for inputs of any size as it is
        done: set[Any] = set()
        for path, place in self._kept.items():
            was = place.value
            for absent in (
                ()
                if path in done or not self._is_read(place, now)
                else [*place.instead, *_absent(was)]
            ):
                place.put(absent)
                anew = self._computed_anew(path, was, now)
                if anew:
                    done |= anew
                    self._away += [(place, absent)] if isinstance(place, Entry) else []
                    break
                place.put(was)

    def put_back(self) -> None:
        """Let what is outside be as it was, unless another thread has computed it meanwhile."""
        for entry, absent in self._away:
            if entry.now() is absent:
                entry.put(entry.value)

    def _is_read(self, place: _ModuleAttribute | Entry, now: _FollowedCall) -> bool:
        """Whether the graph may hold this: of what is outside, tensors are among its constants, or
        numbers beside them.
        """
        tensors = [leaf for leaf in tree_leaves(place.value) if isinstance(leaf, Tensor)]
        if isinstance(place, _ModuleAttribute) or not tensors:
            return isinstance(place, _ModuleAttribute) or type(place.value) in (int, float)
        held = [*now.constants.values()]
        return any(
            one.shape == other.shape and self._same(one, other, "whole")
            for one in tensors
            for other in held
        )

    def _followed(self, arguments: Call) -> _FollowedCall | None:
        attributes = Attributes(self.model)
        try:
            graph, constants = self.follow(arguments)
            changes: dict[Any, AttributeChange] = {
                change.path: change for change in attributes.changes(constants)
            }
            return _FollowedCall(graph, constants, changes | self._outside())
        except FxpruneError:
            return None
        finally:
            attributes.restore()

    def _outside(self) -> dict[Any, AttributeChange]:
        """What forward has set outside of the modules."""
        known = {key: place.value for key, place in self._kept.items() if isinstance(place, Entry)}
        return {
            key: AttributeChange({}, "", str(key), known.get(key), None, value)
            for key, value in self.outside.taken.items()
        }

    def _computed_anew(self, path: Any, was: Any, now: _FollowedCall) -> set[Any]:
        """What forward sets once it has forgotten the attribute at a path; nothing if that may
        make another model of it.

        ``now`` is what it does as long as it has not. What it sets there it does not read as it
        was kept.
        """
        anew = self._followed(self.arguments)
        if (
            anew is None
            or path not in anew.changes
            or carried(anew.changes.values())
            or anew.gives != now.gives
        ):
            return set()
        kept = {key: was if key == path else change.before for key, change in anew.changes.items()}
        values = self._values(anew)
        if not all(
            self._same(kept[key], values[key], "overlaps" if key in now.changes else "whole")
            for key in values
        ):
            return set()
        compared, place = False, self._kept[path]
        absent = place.now() if isinstance(place, Entry) else place.value
        for arguments in _shorter(self.arguments):
            then = self._followed(arguments)
            place.put(was)
            stored = None if then is None else self._followed(arguments)
            place.put(absent)
            if then is None or stored is None:
                continue
            values, compared = self._values(then), True
            if not all(
                self._same(kept.get(key), values[key], "begins")
                for key in values
                if key not in stored.changes
            ):
                return set()
        return set(anew.changes) if compared else set()

    def _values(self, followed: _FollowedCall) -> dict[Any, Any]:
        """What forward has set, computed from sizes and buffers; ``None`` where that is not all it
        takes.
        """
        computed: dict[fx.Node, Any] = {}
        for node in followed.graph.nodes:
            computed[node] = self._value(node, computed, followed.constants)

        def value(node: fx.Node) -> Any:
            """Sizes that nobody reads are in no graph."""
            return (
                computed[node]
                if node in computed or holds_tensors(node.meta["val"])
                else node.meta["val"]
            )

        return {path: change.computed(value) for path, change in followed.changes.items()}

    def _value(
        self, node: fx.Node, computed: Mapping[fx.Node, Any], constants: Mapping[str, Tensor]
    ) -> Any:
        value = node.meta.get("val")
        if value == META:
            return _CPU
        if node.op == "get_attr" and isinstance(value, Tensor):
            name = str(node.target)
            return self._data(
                constants[name] if name in constants else operator.attrgetter(name)(self.model)
            )
        if node.op in ("call_function", "call_method") and (holds_tensors(value) or value is None):
            if any(computed[n] is None for n in values_read(node)):
                return None
            try:  # whatever it is that cannot be computed here: the attribute is kept
                return execute(
                    self.model,
                    node,
                    *fx.node.map_arg(
                        (node.args, node.kwargs), lambda n: _stand_in_like(computed[n], n)
                    ),
                )
            except Exception:
                return None
        return None if holds_tensors(value) else value

    def _data(self, tensor: Any) -> Tensor | None:
        """A tensor of the model with data, on the CPU; None for parameters, which may be
        trained.
        """
        data = (
            None
            if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter)
            else self.real(tensor)
        )
        return None if data is None or data.is_meta else data.detach().cpu()

    def _same(self, kept: Any, computed: Any, how: str) -> bool:
        """Whether what was kept is the ``whole`` of what is computed, ``begins`` with it, or is
        equal where it ``overlaps``.
        """
        if isinstance(computed, dict):
            same = isinstance(kept, dict) and kept.keys() == computed.keys()
            return same and all(
                self._same(kept[key], value, how) for key, value in computed.items()
            )
        if isinstance(computed, (tuple, list)):
            same = isinstance(kept, (tuple, list)) and len(kept) == len(computed)
            return same and all(
                self._same(one, other, how) for one, other in zip(kept, computed, strict=True)
            )
        if not isinstance(computed, Tensor):
            return how == "overlaps" or bool(kept == computed)
        return self._same_tensor(kept, computed, how)

    def _same_tensor(self, kept: Any, computed: Tensor, how: str) -> bool:
        data = self._data(kept)
        if data is None or data.dim() != computed.dim():
            return False
        common = [min(sizes) for sizes in zip(data.shape, computed.shape, strict=True)]
        if common != list(computed.shape if how == "begins" else common) or (
            how == "whole" and data.shape != computed.shape
        ):
            return False
        data, computed = data[tuple(map(slice, common))], computed[tuple(map(slice, common))]
        close = (
            16 * torch.finfo(data.dtype).eps
            if data.dtype.is_floating_point and data.dtype is computed.dtype
            else 0.0
        )
        return torch.allclose(
            data.to(computed.dtype), computed, rtol=close, atol=close, equal_nan=True
        )


_CPU = torch.device("cpu")


def _stand_in_like(computed: Any, node: fx.Node) -> Any:
    """What was computed of an argument; of one whose shape and dtype alone are read anything that
    has these.
    """
    value = node.meta["val"]
    return (
        torch.zeros(value.shape, dtype=value.dtype)
        if computed is None and isinstance(value, Tensor)
        else computed
    )


def _shorter(arguments: Call) -> Iterator[Call]:
    """The example with one of its dimensions, wherever it occurs, one shorter, and half as
    long.
    """
    tensors: list[Tensor] = []
    map_tensors(tensors.append, arguments)
    for dim in range(max((tensor.dim() for tensor in tensors), default=0)):
        size = next(tensor.shape[dim] for tensor in tensors if tensor.dim() > dim)
        for less in sorted({size - 1, size // 2} - {0}):

            def shorter(
                tensor: Tensor, dim: int = dim, size: int = size, less: int = less
            ) -> Tensor:
                return (
                    tensor.narrow(dim, 0, less)
                    if tensor.dim() > dim and tensor.shape[dim] == size
                    else tensor
                )

            yield map_tensors(shorter, arguments)


def _absent(value: Any) -> list[Any]:
    """What may stand for something that is not there yet."""
    if isinstance(value, Tensor):
        return [None, value.new_empty((0,) * value.dim())]
    return (
        [type(value)()]
        if isinstance(value, (list, dict))
        else [None, 0]
        if isinstance(value, int)
        else [None]
    )


def _kept(model: nn.Module) -> Iterator[tuple[str, _ModuleAttribute]]:
    """Plain attributes that are there and that code which forward calls would set. A buffer may be
    loaded from a file.
    """
    for path, module in model.named_modules():
        store, kind = vars(module), type(module)  # type: dict[str, Any], Any
        for name in sorted(_assigned_names(kind) & store.keys()):
            if (
                isinstance(store[name], (Tensor, tuple, list, dict, int, float))
                and type(store[name]) is not bool
            ):
                yield f"{path}.{name}".removeprefix("."), _ModuleAttribute(store, name)


@functools.cache
def _assigned_names(kind: type) -> frozenset[str]:
    """Names of attributes that methods which forward calls, by their names, assign to."""
    methods = {
        name: inspect.unwrap(own)
        for base in reversed(kind.__mro__)
        for name, own in vars(base).items()
        if callable(own)
    }
    if kind.__module__.partition(".")[0] == "torch":
        return frozenset()
    names: set[str] = set()
    seen, waiting = {"forward"}, ["forward"]
    while waiting:
        for code in _codes_of(getattr(methods.get(waiting.pop()), "__code__", None)):
            names |= {
                step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"
            }
            called = set(code.co_names) & methods.keys() - nn.Module.__dict__.keys() - seen
            seen |= called
            waiting += called
    return frozenset(names)


def _codes_of(code: types.CodeType | None) -> Iterator[types.CodeType]:
    """A function's code and that of functions inside it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from _codes_of(constant)
