"""Results that forward keeps for later calls: a grid for a size, a table of positions.

A call before pruning may have left such a result on a module, or in a dict or an object beside the
model. forward then reads it, and a graph traced from this state holds for that size only. If the
result is removed, forward computes it from sizes, and so does the graph, for inputs of any size.
This is the same model if what is computed equals what was kept.
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
        What
        it sets on the model is undone here.
    real:
        Returns the data of a buffer or of another tensor of the model.
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
class _FollowedCall:
    """A traced call: its graph and constants, and the attributes that forward has set, by path."""

    graph: fx.Graph
    constants: Mapping[str, Tensor]
    changes: Mapping[Any, AttributeChange]

    @property
    def gives(self) -> list[Any]:
        """The shapes and dtypes of the results; numbers as they are."""
        results: list[fx.Node] = []
        fx.node.map_arg(next(iter(reversed(self.graph.nodes))).args, results.append)
        values = [leaf for node in results for leaf in tree_leaves(node.meta["val"])]
        return [(leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in values]


class _Forgetting:
    """Removes cached results of one model.

    Parameters are those of :func:`forgotten_caches`; ``kept`` holds the candidates by path or key.
    """

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
        # removed entries outside of the model, each with the value that is there empty_values
        self._away: list[tuple[Entry, Any]] = []

    def run(self) -> None:
        """Remove all cached results that forward computes again."""
        now = self._followed(self.arguments)
        if now is None or not any(node.target is torch._assert for node in now.graph.nodes):
            return  # the graph already holds for inputs of any size
        done: set[Any] = set()
        for path, place in self._kept.items():
            was = place.value
            for absent in (
                ()
                if path in done or not self._is_read(place, now)
                else [*place.empty_values, *_absent(was)]
            ):
                place.put(absent)
                anew = self._computed_anew(path, was, now)
                if anew:
                    done |= anew
                    self._away += [(place, absent)] if isinstance(place, Entry) else []
                    break
                place.put(was)

    def put_back(self) -> None:
        """Restore what is outside of the model, unless another thread has computed it again."""
        for entry, absent in self._away:
            if entry.now() is absent:
                entry.put(entry.value)

    def _is_read(self, place: _ModuleAttribute | Entry, now: _FollowedCall) -> bool:
        """Tell whether the graph may contain a cached value.

        An attribute of a module may always be read. A value outside may if it is a number, or if
        one of its tensors equals a constant of the graph.
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
        """Trace a call, and restore the attributes of the model; None if it cannot be traced."""
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
        """Return what forward has set outside of the modules."""
        known = {key: place.value for key, place in self._kept.items() if isinstance(place, Entry)}
        return {
            key: AttributeChange({}, "", str(key), known.get(key), None, value)
            for key, value in self.outside.taken.items()
        }

    def _computed_anew(self, path: Any, was: Any, now: _FollowedCall) -> set[Any]:
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
            such a
            value only the overlap is compared.
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
        """Return what forward has set, computed from sizes and buffers.

        A value that depends on more is None.
        """
        computed: dict[fx.Node, Any] = {}
        for node in followed.graph.nodes:
            computed[node] = self._value(node, computed, followed.constants)

        def value(node: fx.Node) -> Any:
            """Return the value of a node. A size that nobody reads is in no graph."""
            return (
                computed[node]
                if node in computed or holds_tensors(node.meta["val"])
                else node.meta["val"]
            )

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
            return self._data(
                constants[name] if name in constants else operator.attrgetter(name)(self.model)
            )
        if node.op in ("call_function", "call_method") and (holds_tensors(value) or value is None):
            if any(computed[n] is None for n in values_read(node)):
                return None
            try:  # if it cannot be computed here, for whatever reason, the attribute is kept
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
        """Return a tensor of the model with its data, on the CPU.

        None for a parameter, because training may change it.
        """
        data = (
            None
            if not isinstance(tensor, Tensor) or isinstance(tensor, nn.Parameter)
            else self.real(tensor)
        )
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
        """Compare a kept tensor with a computed one (see ``_same``)."""
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
    """Return the computed value of an argument.

    If only its shape and dtype are read, return any tensor that has these.
    """
    value = node.meta["val"]
    return (
        torch.zeros(value.shape, dtype=value.dtype)
        if computed is None and isinstance(value, Tensor)
        else computed
    )


def _shorter(arguments: Call) -> Iterator[Call]:
    """Yield the example with one of its sizes made smaller by one, and halved.

    The size is changed in all tensors that have it at the same dimension.
    """
    tensors: list[Tensor] = []
    map_tensors(tensors.append, arguments)
    for dim in range(max((tensor.dim() for tensor in tensors), default=0)):
        size = next(tensor.shape[dim] for tensor in tensors if tensor.dim() > dim)
        for less in sorted({size - 1, size // 2} - {0}):

            def shorter(
                tensor: Tensor, dim: int = dim, size: int = size, less: int = less
            ) -> Tensor:
                """Cut a tensor to the smaller size."""
                return (
                    tensor.narrow(dim, 0, less)
                    if tensor.dim() > dim and tensor.shape[dim] == size
                    else tensor
                )

            yield map_tensors(shorter, arguments)


def _absent(value: Any) -> list[Any]:
    """Return values that may be in place of a cached result before it is computed."""
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
    """Yield attributes of modules that code which forward calls sets, with their paths.

    Buffers are left out, because they may be loaded from a file.
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
    """Return the names of attributes to which methods assign that forward calls.

    Methods are found by the names in the code.
    """
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
    """Yield a function's code and the code of functions inside it."""
    if code is not None:
        yield code
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                yield from _codes_of(constant)
