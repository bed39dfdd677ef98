"""The modes of both runs: one dtype, equal random numbers, statistics over surviving elements."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fxprune.common.dispatch import DispatchMode, tensors_in
from fxprune.coupling import Coupling
from fxprune.coupling.propagation import seen_whole, takes_statistics
from fxprune.ops import Event, Trait, bind, has, known, name_of_op
from fxprune.rewrite import Survivors

__all__ = [
    "Draw",
    "Followed",
    "InDtype",
    "MismatchError",
    "NotFollowedError",
    "Replayed",
    "clone",
    "events_of",
    "python_state",
]

_LOW = frozenset({torch.float16, torch.bfloat16, torch.float32})


class InDtype(TorchFunctionMode):
    """A mode in which code that asks for a lower precision gets the model's float64.

    Without it, a model whose code says float32 could not run in float64. With another dtype than
    float64 the mode changes nothing. Under any function mode, ``torch.nn`` does not use its fused
    inference paths.

    Parameters
    ----------
    dtype:
        The dtype of the run.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not torch.float64:
            return func(*args, **kwargs)
        if func in _CASTS:
            return args[0].to(self.dtype)
        if any(
            value in _LOW for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype)
        ):
            args = tuple(self._meant(value) for value in args)
            kwargs = {name: self._meant(value) for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        if (
            isinstance(out, Tensor)
            and _dtype(out) in _LOW
            and not any(_dtype(t) in _LOW for t in tensors_in(args, kwargs))
        ):
            return out.to(self.dtype)  # created without a dtype, or from Python data
        return out

    def _meant(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in _LOW else value


_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_dtype = torch.Tensor.dtype.__get__


def python_state() -> tuple[Any, ...]:
    """Return the state of the generators of Python and NumPy.

    Two runs that draw the same numbers leave the same state.
    """
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), rest


class NotFollowedError(Exception):
    """A run of the original does not execute the traced operations."""


class MismatchError(Exception):
    """The random numbers of the two runs do not correspond."""


@dataclass
class Draw:
    """Random numbers that one operation of the original drew.

    Attributes
    ----------
    op:
        The ATen operation.
    values:
        The random tensors that it gave.
    given:
        The tensors that decide what is drawn.
    numbers:
        The numbers that decide what is drawn, such as a probability.
    event:
        The event of the analysis for this operation; None if it is not known.
    """

    op: Any
    values: Any
    given: list[Tensor]
    numbers: list[float]
    event: Event | None


@dataclass
class _Ahead:
    """The events that are still to come in one call of a graph: statistics, and random draws."""

    statistics: list[Event] = field(default_factory=list)
    draws: list[Event] = field(default_factory=list)


def events_of(coupling: Coupling) -> dict[str, list[Event]]:
    """Return the events of the analysis by the prefix of their graph.

    The events of a graph are those of its first run, in their order.
    """
    found: dict[str, list[Event]] = {}
    for event in coupling.context.found.events:
        prefix = event.node[: max(event.node.rfind(":"), event.node.rfind(".")) + 1]
        own = found.setdefault(prefix, [])
        if not own or own[0].run is event.run:
            own.append(event)
    return found


def _over_survivors(func: Any, args: Any, kwargs: Any, event: Event, survivors: Survivors) -> Any:
    """Return the result of a fused normalisation with statistics over the surviving elements.

    Return None if no element is removed. The input may have another number of dimensions than in
    the trace, for example after a batch of one was squeezed.

    Raises
    ------
    NotFollowedError
        If the dimensions of the removed elements cannot be determined.
    """
    mask = survivors.mask(event.gone)
    if mask.all():
        return None
    rank, name = args[0].dim(), name_of_op(func)
    if mask.ndim != rank:
        if not has(name, Trait.FROM_THE_END) or any(
            size > 1 for size in mask.shape[: max(0, mask.ndim - rank)]
        ):
            raise NotFollowedError(f"{func} was traced for another number of dimensions")
        mask = mask.reshape(mask.shape[-rank:])
    over = known(name).survivors
    return None if over is None else over(bind(func, args, kwargs), torch.from_numpy(mask))


class Followed(DispatchMode):
    """A mode for runs of the original.

    Fused normalisations take their statistics over the surviving elements, random numbers are
    recorded, and dropout is off. Enter the mode below autograd, where composite operations are not
    decomposed yet.

    Parameters
    ----------
    events:
        The events of the analysis by the prefix of their graph (:func:`events_of`).
    survivors:
        The elements that the plan keeps.
    training:
        Whether the run is in training mode.
    constant:
        Whether one number replaces all random ones.

    Attributes
    ----------
    draws:
        The random numbers that were drawn.
    dropped:
        The rate of each dropout, in order.
    matters:
        By the prefix of a graph, whether statistics in it lose elements.
    """

    def __init__(
        self,
        events: Mapping[str, Sequence[Event]],
        survivors: Survivors,
        training: bool,
        constant: bool,
    ) -> None:
        super().__init__()
        self.events, self.survivors, self.training, self.constant = (
            events,
            survivors,
            training,
            constant,
        )
        self.draws: list[Draw] = []
        self.dropped: list[float] = []
        self.matters = {
            prefix: any(not survivors.mask(e.gone).all() for e in own if e.gone)
            for prefix, own in events.items()
        }
        self._stack: list[tuple[str, _Ahead]] = []

    @contextmanager
    def inside(self, path: str) -> Iterator[None]:
        """Expect the events of the graph at a path, while the code that it was traced from runs.

        Raises
        ------
        NotFollowedError
            If an expected normalisation does not run.
        """
        prefix = f"{path}:" if path else ""
        if self.training and f"{prefix}train." in self.events:
            prefix += "train."
        own = self.events.get(prefix, ())
        ahead = _Ahead(
            [e for e in own if takes_statistics(e.op)], [e for e in own if _draws(e.op)]
        )
        self._stack.append((prefix, ahead))
        try:
            yield
            if ahead.statistics and self.matters[prefix]:
                raise NotFollowedError(f"{ahead.statistics[0].op} is not executed")
        finally:
            self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not seen_whole(func):
            with self:  # a composite without a rule: the analysis saw the operations inside it
                return func.decompose(*args, **kwargs)
        if takes_statistics(func):
            return self._normalised(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            if not _draws(func):
                return _without_dropout(func, args, kwargs, self.dropped)
            return self._drawn(func, args, kwargs)
        if "_weight_norm" in func._schema.name:
            return _cleaned(func, args, kwargs)
        return func(*args, **kwargs)

    def _normalised(self, func: Any, args: Any, kwargs: Any) -> Any:
        prefix, ahead = self._stack[-1] if self._stack else ("", _Ahead())
        if not self.matters.get(prefix):
            return func(*args, **kwargs)
        if not ahead.statistics or ahead.statistics[0].op._schema.name != func._schema.name:
            raise NotFollowedError(f"{func} was not traced")
        found = _over_survivors(func, args, kwargs, ahead.statistics.pop(0), self.survivors)
        if found is None:
            return func(*args, **kwargs)
        # Run the op itself on copies, because it may write into running statistics. Only the
        # strides of its results are used.
        own = func(args[0], *clone(args[1:]), **clone(kwargs))
        return tree_map(_with_strides_of, found, own)

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        ahead = self._stack[-1][1] if self._stack else _Ahead()
        event = ahead.draws.pop(0) if ahead.draws else None
        if event is not None and event.op._schema.name != func._schema.name:
            event = None
            ahead.draws.clear()  # the events do not fit from here on
        given = [clone(t) for t in _deciding(func, args, kwargs)]
        out = func(*args, **kwargs)
        if self.constant:
            _fill_constant(out)
        self.draws.append(Draw(func, clone(out), given, _probabilities(func, args, kwargs), event))
        return out


class Replayed(DispatchMode):
    """A mode for runs of the pruned model.

    Its random numbers are those that the original drew, without the removed elements. Dropout is
    off.

    Parameters
    ----------
    draws:
        The random numbers that the original drew.
    survivors:
        The elements that the plan keeps.
    constant:
        Whether one number replaces all random ones.

    Attributes
    ----------
    ahead:
        The draws that are still to come.
    compared:
        Pairs of tensors that decide what is drawn: the pruned model's, and the original's.
    dropped:
        The rate of each dropout, in order.
    """

    def __init__(self, draws: Sequence[Draw], survivors: Survivors, constant: bool) -> None:
        super().__init__()
        self.ahead, self.survivors, self.constant = list(draws), survivors, constant
        self.compared: list[tuple[Tensor, Tensor]] = []
        self.dropped: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not seen_whole(func):
            with self:
                return func.decompose(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if not _draws(func):
            return _without_dropout(func, args, kwargs, self.dropped)
        given = [clone(t) for t in _deciding(func, args, kwargs)]
        out = func(*args, **kwargs)
        if not self.ahead or self.ahead[0].op._schema.name != func._schema.name:
            raise MismatchError(f"{func} draws what the original does not draw")
        draw = self.ahead.pop(0)
        numbers = _probabilities(func, args, kwargs)
        if len(numbers) != len(draw.numbers) or not np.allclose(
            numbers, draw.numbers, equal_nan=True
        ):
            raise MismatchError(
                f"{func} draws with {numbers}, where the original draws with {draw.numbers}"
            )
        self._compare(given, draw)
        if self.constant:
            return _fill_constant(out)
        old = (
            tree_leaves(draw.event.out)
            if draw.event is not None
            else [None] * len(tree_leaves(draw.values))
        )
        pairs = zip(tree_leaves(out), tree_leaves(draw.values), old, strict=True)
        for new, drawn, labelled in pairs:
            new.copy_(self._cut(new, drawn, labelled))
        return out

    def _cut(self, new: Tensor, drawn: Tensor, labelled: Any) -> Tensor:
        if labelled is not None and drawn.dim() == labelled.dim():
            drawn = self.survivors.take(labelled, drawn)
        if drawn.shape != new.shape:
            raise MismatchError(
                f"random numbers of shape {tuple(new.shape)} are drawn, where the original draws "
                f"{tuple(drawn.shape)}"
            )
        return drawn

    def _compare(self, given: list[Tensor], draw: Draw) -> None:
        if draw.event is None or len(given) != len(draw.given):
            return
        leaf = tree_leaves(draw.event.out)[0]
        for mine, yours in zip(given, draw.given, strict=True):
            if yours.shape == tree_leaves(draw.values)[0].shape:
                yours = self.survivors.take(leaf, yours)
            if mine.shape == yours.shape:
                self.compared.append((mine, yours))


def _with_strides_of(tensor: Any, own: Any) -> Any:
    """Return a tensor with the strides of another, because they decide which views are copies."""
    if not isinstance(tensor, Tensor) or tensor.stride() == own.stride():
        return tensor
    return torch.empty_strided(
        own.shape, own.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def clone(value: Any) -> Any:
    """Return a nested value with copies of its tensors."""
    return tree_map_only(Tensor, Tensor.clone, value)


@functools.cache
def _options(func: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in func._schema.arguments)


def _draws(func: Any) -> bool:
    """Tell whether an op draws random numbers that no argument can turn off, as for dropout."""
    return torch.Tag.nondeterministic_seeded in func.tags and not _options(func) & _SWITCHES.keys()


_SWITCHES: dict[str, Any] = {"train": False, "training": False, "dropout": 0.0, "dropout_p": 0.0}
"""The arguments of ops that draw random numbers only in training, with the values that turn this
off.
"""


def _without_dropout(func: Any, args: Any, kwargs: Any, dropped: list[float]) -> Any:
    """Run an op with dropout turned off, and record its rate.

    Dropout masks cannot be compared, because they have another shape in the pruned model.
    """
    bound = bind(func, args, kwargs)
    share = next((bound[name] for name in ("p", "dropout", "dropout_p") if name in bound), 0.0)
    if share and bound.get("train", True) is not False:
        dropped.append(share)
    bound = {name: _SWITCHES.get(name, value) for name, value in bound.items()}
    positional = [bound.pop(a.name) for a in func._schema.arguments if not a.kwarg_only]
    return func(*positional, **bound)


def _deciding(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors whose values decide what an op draws.

    Leave out tensors that it overwrites, and those that only give a size.
    """
    name = func._schema.name
    written = [
        a.name
        for a in func._schema.arguments
        if a.alias_info is not None and a.alias_info.is_write
    ]
    found = [value for key, value in bind(func, args, kwargs).items() if key not in written]
    return [] if name.endswith("_like") else tensors_in(found, {})


def _probabilities(func: Any, args: Any, kwargs: Any) -> list[float]:
    """Return the floats that decide what an op draws, such as a probability.

    Integers are left out, because they may be sizes.
    """
    return [value for value in bind(func, args, kwargs).values() if isinstance(value, float)]


def _fill_constant(out: Any) -> Any:
    """Overwrite random numbers with a constant.

    This is done if the random numbers of the two runs do not correspond.
    """
    for leaf in tree_leaves(out):
        leaf.fill_(1 if leaf.is_floating_point() else 0)
    return out


def _cleaned(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a weight normalisation, and set NaN to zero.

    A removed filter divided by its norm is 0/0. If an input is not finite, NaN stays.
    """
    out = func(*args, **kwargs)
    if all(bool(tensor.isfinite().all()) for tensor in tensors_in(args, kwargs)):
        for leaf in tree_leaves(out):
            leaf.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return out
