"""What both runs are under: one dtype, the same random numbers, and statistics over what
survives.
"""

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
    """Python that says float32 means the model's dtype here, or it could not be run in another.

    Under a mode as this one, torch.nn leaves its fused inference paths alone.
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
            return out.to(self.dtype)  # made without a dtype, or from data of its own
        return out

    def _meant(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in _LOW else value


_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)
_dtype = torch.Tensor.dtype.__get__


def python_state() -> tuple[Any, ...]:
    """Where the generators of Python and of NumPy stand: two runs that draw the same leave them
    alike.
    """
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(keys).tobytes(), rest


class NotFollowedError(Exception):
    """The original's own run does not execute the operations that were traced."""


class MismatchError(Exception):
    """Random numbers of the two runs cannot be brought together."""


@dataclass
class Draw:
    """Random numbers that the original drew, the tensors and numbers that decide how, and the
    event of the analysis that it was.
    """

    op: Any
    values: Any
    given: list[Tensor]
    numbers: list[float]
    event: Event | None


@dataclass
class _Ahead:
    """The events that are still to come in one call of a graph."""

    statistics: list[Event] = field(default_factory=list)
    draws: list[Event] = field(default_factory=list)


def events_of(coupling: Coupling) -> dict[str, list[Event]]:
    """The events of the analysis by the prefix of their graph, each graph's as they came when it
    ran first.
    """
    found: dict[str, list[Event]] = {}
    for event in coupling.context.found.events:
        prefix = event.node[: max(event.node.rfind(":"), event.node.rfind(".")) + 1]
        own = found.setdefault(prefix, [])
        if not own or own[0].run is event.run:
            own.append(event)
    return found


def _over_survivors(func: Any, args: Any, kwargs: Any, event: Event, survivors: Survivors) -> Any:
    """What a fused normalisation gives with statistics over the survivors; None where nothing
    leaves them.

    The input may have another number of dimensions than where the code was traced, a batch of one
    that was squeezed, say.

    Raises
    ------
    NotFollowedError
        If it cannot be told which of its dimensions the removed elements lie on.
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
    """The original's run: what it normalises is normalised over survivors, and what it draws is
    kept.

    Enter it below autograd, where composite ops arrive whole.
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
        """While the code runs that this path's graph was traced from."""
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
            with self:  # a composite without a rule: the analysis has seen its parts
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
        # of copies: it may write into what is remembered
        own = func(args[0], *clone(args[1:]), **clone(kwargs))
        return tree_map(_with_strides_of, found, own)

    def _drawn(self, func: Any, args: Any, kwargs: Any) -> Any:
        ahead = self._stack[-1][1] if self._stack else _Ahead()
        event = ahead.draws.pop(0) if ahead.draws else None
        if event is not None and event.op._schema.name != func._schema.name:
            event = None
            ahead.draws.clear()  # from here on nothing is known
        given = [clone(t) for t in _deciding(func, args, kwargs)]
        out = func(*args, **kwargs)
        if self.constant:
            _fill_constant(out)
        self.draws.append(Draw(func, clone(out), given, _probabilities(func, args, kwargs), event))
        return out


class Replayed(DispatchMode):
    """The pruned model's run: it draws what the original drew, without what is removed.

    ``compared`` gets pairs of tensors that decide what is drawn: the pruned model's, and the
    original's. ``dropped`` gets the share that each dropout would drop, as it does in
    :class:`Followed`.
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
    """A tensor that lies in memory as another one: which views of it are copies goes by that."""
    if not isinstance(tensor, Tensor) or tensor.stride() == own.stride():
        return tensor
    return torch.empty_strided(
        own.shape, own.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def clone(value: Any) -> Any:
    """A nested value with tensors of its own."""
    return tree_map_only(Tensor, Tensor.clone, value)


@functools.cache
def _options(func: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in func._schema.arguments)


def _draws(func: Any) -> bool:
    """Whether an op draws random numbers, other than those of a dropout, which is turned off."""
    return torch.Tag.nondeterministic_seeded in func.tags and not _options(func) & _SWITCHES.keys()


_SWITCHES: dict[str, Any] = {"train": False, "training": False, "dropout": 0.0, "dropout_p": 0.0}
"""Arguments of ops that draw random numbers for training alone, with the values for which they
draw none.
"""


def _without_dropout(func: Any, args: Any, kwargs: Any, dropped: list[float]) -> Any:
    """Dropout drops nothing, as its mask has another shape in the pruned model; what it would drop
    is noted.
    """
    bound = bind(func, args, kwargs)
    share = next((bound[name] for name in ("p", "dropout", "dropout_p") if name in bound), 0.0)
    if share and bound.get("train", True) is not False:
        dropped.append(share)
    bound = {name: _SWITCHES.get(name, value) for name, value in bound.items()}
    positional = [bound.pop(a.name) for a in func._schema.arguments if not a.kwarg_only]
    return func(*positional, **bound)


def _deciding(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors whose values decide what an op draws: not what is overwritten, nor what only
    lends its size.
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
    """The numbers that decide what an op draws, as a probability. Whole ones may be sizes."""
    return [value for value in bind(func, args, kwargs).values() if isinstance(value, float)]


def _fill_constant(out: Any) -> Any:
    """One number in the place of all random ones: where they cannot be brought together, as their
    shapes differ.
    """
    for leaf in tree_leaves(out):
        leaf.fill_(1 if leaf.is_floating_point() else 0)
    return out


def _cleaned(func: Any, args: Any, kwargs: Any) -> Any:
    """A filter that is gone divided by its norm is 0/0, and stays nothing."""
    out = func(*args, **kwargs)
    if all(bool(tensor.isfinite().all()) for tensor in tensors_in(args, kwargs)):
        for leaf in tree_leaves(out):
            leaf.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return out
