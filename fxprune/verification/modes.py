"""The modes of both runs: one dtype, equal random numbers, statistics over surviving elements."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fxprune.common.dispatch import DispatchMode, tensors_in
from fxprune.coupling import Coupling
from fxprune.coupling.propagation import is_seen_whole, takes_statistics
from fxprune.ops import Event, Trait, bind, has_trait, name_of_op, row_or_empty
from fxprune.rewrite import Survivors

__all__ = [
    "Draw",
    "MismatchError",
    "NotFollowedError",
    "RecordingMode",
    "ReplayMode",
    "clone",
    "events_of",
    "lose_elements",
    "python_state",
]


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
    deciding:
        The tensors that decide what is drawn.
    probabilities:
        The numbers that decide what is drawn.
    event:
        The event of the analysis for this operation; None if it is not known.
    """

    op: Any
    values: Any
    deciding: list[Tensor]
    probabilities: list[float]
    event: Event | None


@dataclass
class _PendingEvents:
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
        events = found.setdefault(prefix, [])
        if not events or events[0].run is event.run:
            events.append(event)
    return found


def lose_elements(events: Iterable[Event], survivors: Survivors) -> bool:
    """Tell whether the statistics of some event lose elements."""
    return any(
        not survivors.mask(event.removed_labels).all() for event in events if event.removed_labels
    )


def _over_survivors(func: Any, args: Any, kwargs: Any, event: Event, survivors: Survivors) -> Any:
    """Return the result of a fused normalisation with statistics over the surviving elements.

    Return None if no element is removed. The input may have another number of dimensions than in
    the trace, for example after a batch of one was squeezed.

    Raises
    ------
    NotFollowedError
        If the dimensions of the removed elements cannot be determined.
    """
    mask = survivors.mask(event.removed_labels)
    if mask.all():
        return None
    rank, name = args[0].dim(), name_of_op(func)
    if mask.ndim != rank:
        dropped = mask.shape[: max(0, mask.ndim - rank)]
        if not has_trait(name, Trait.FROM_THE_END) or any(size > 1 for size in dropped):
            raise NotFollowedError(f"{func} was traced for another number of dimensions")
        mask = mask.reshape(mask.shape[-rank:])
    over = row_or_empty(name).survivors
    return None if over is None else over(bind(func, args, kwargs), torch.from_numpy(mask))


class RecordingMode(DispatchMode):
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
    loses_elements:
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
        self.events, self.survivors = events, survivors
        self.training, self.constant = training, constant
        self.draws: list[Draw] = []
        self.dropped: list[float] = []
        self.loses_elements: dict[str, bool] = {}
        for prefix, of_graph in events.items():
            self.loses_elements[prefix] = lose_elements(of_graph, survivors)
        self._stack: list[tuple[str, _PendingEvents]] = []

    @contextmanager
    def expecting(self, path: str) -> Iterator[None]:
        """Expect the events of the graph at a path, while the code that it was traced from runs.

        Raises
        ------
        NotFollowedError
            If an expected normalisation does not run.
        """
        prefix = f"{path}:" if path else ""
        if self.training and f"{prefix}train." in self.events:
            prefix += "train."
        events = self.events.get(prefix, ())
        pending = _PendingEvents(
            [event for event in events if takes_statistics(event.op)],
            [event for event in events if _is_random(event.op)],
        )
        self._stack.append((prefix, pending))
        try:
            yield
            if pending.statistics and self.loses_elements[prefix]:
                raise NotFollowedError(f"{pending.statistics[0].op} is not executed")
        finally:
            self._stack.pop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_seen_whole(func):
            with self:  # a composite without a rule: the analysis saw the operations inside it
                return func.decompose(*args, **kwargs)
        if takes_statistics(func):
            return self._normalise(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            if not _is_random(func):
                return _without_dropout(func, args, kwargs, self.dropped)
            return self._record_draw(func, args, kwargs)
        if "_weight_norm" in func._schema.name:
            return _norm_without_nan(func, args, kwargs)
        return func(*args, **kwargs)

    def _normalise(self, func: Any, args: Any, kwargs: Any) -> Any:
        prefix, pending = self._stack[-1] if self._stack else ("", _PendingEvents())
        if not self.loses_elements.get(prefix):
            return func(*args, **kwargs)
        if not pending.statistics or pending.statistics[0].op._schema.name != func._schema.name:
            raise NotFollowedError(f"{func} was not traced")
        found = _over_survivors(func, args, kwargs, pending.statistics.pop(0), self.survivors)
        if found is None:
            return func(*args, **kwargs)
        # Run the op itself on copies, because it may write into running statistics. Only the
        # strides of its results are used.
        plain = func(args[0], *clone(args[1:]), **clone(kwargs))
        return tree_map(_with_strides_of, found, plain)

    def _record_draw(self, func: Any, args: Any, kwargs: Any) -> Any:
        pending = self._stack[-1][1] if self._stack else _PendingEvents()
        event = pending.draws.pop(0) if pending.draws else None
        if event is not None and event.op._schema.name != func._schema.name:
            event = None
            pending.draws.clear()  # the events do not fit from here on
        deciding = clone(_deciding_tensors(func, args, kwargs))
        out = func(*args, **kwargs)
        if self.constant:
            _fill_constant(out)
        numbers = _probabilities(func, args, kwargs)
        self.draws.append(Draw(func, clone(out), deciding, numbers, event))
        return out


class ReplayMode(DispatchMode):
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
    pending:
        The draws that are still to come.
    compared:
        Pairs of tensors that decide what is drawn: the pruned model's, and the original's.
    dropped:
        The rate of each dropout, in order.
    """

    def __init__(self, draws: Sequence[Draw], survivors: Survivors, constant: bool) -> None:
        super().__init__()
        self.pending, self.survivors, self.constant = list(draws), survivors, constant
        self.compared: list[tuple[Tensor, Tensor]] = []
        self.dropped: list[float] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_seen_whole(func):
            with self:
                return func.decompose(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if not _is_random(func):
            return _without_dropout(func, args, kwargs, self.dropped)
        return self._replay(func, args, kwargs)

    def _replay(self, func: Any, args: Any, kwargs: Any) -> Any:
        deciding = clone(_deciding_tensors(func, args, kwargs))
        out = func(*args, **kwargs)
        draw = self._next_draw(func, _probabilities(func, args, kwargs))
        self._note_deciding(deciding, draw)
        if self.constant:
            return _fill_constant(out)
        drawn = tree_leaves(draw.values)
        labelled = [None] * len(drawn) if draw.event is None else tree_leaves(draw.event.out)
        for new, old, labels in zip(tree_leaves(out), drawn, labelled, strict=True):
            new.copy_(self._cut(new, old, labels))
        return out

    def _next_draw(self, func: Any, numbers: list[float]) -> Draw:
        """Take the next draw, which must be of the same op with the same probabilities."""
        if not self.pending or self.pending[0].op._schema.name != func._schema.name:
            raise MismatchError(f"{func} draws what the original does not draw")
        draw = self.pending.pop(0)
        wanted = draw.probabilities
        if len(numbers) != len(wanted) or not np.allclose(numbers, wanted, equal_nan=True):
            raise MismatchError(
                f"{func} draws with {numbers}, where the original draws with {wanted}"
            )
        return draw

    def _cut(self, new: Tensor, drawn: Tensor, labelled: Any) -> Tensor:
        if labelled is not None and drawn.dim() == labelled.dim():
            drawn = self.survivors.take(labelled, drawn)
        if drawn.shape != new.shape:
            raise MismatchError(
                f"random numbers of shape {tuple(new.shape)} are drawn, where the original draws "
                f"{tuple(drawn.shape)}"
            )
        return drawn

    def _note_deciding(self, deciding: list[Tensor], draw: Draw) -> None:
        if draw.event is None or len(deciding) != len(draw.deciding):
            return
        labelled = tree_leaves(draw.event.out)[0]
        for tensor, reference in zip(deciding, draw.deciding, strict=True):
            if reference.shape == tree_leaves(draw.values)[0].shape:
                reference = self.survivors.take(labelled, reference)
            if tensor.shape == reference.shape:
                self.compared.append((tensor, reference))


def _with_strides_of(tensor: Any, other: Any) -> Any:
    """Return a tensor with the strides of another, because they decide which views are copies."""
    if not isinstance(tensor, Tensor) or tensor.stride() == other.stride():
        return tensor
    return torch.empty_strided(
        other.shape, other.stride(), dtype=tensor.dtype, device=tensor.device
    ).copy_(tensor)


def clone(value: Any) -> Any:
    """Return a nested value with copies of its tensors."""
    return tree_map_only(Tensor, Tensor.clone, value)


@functools.cache
def _options(func: Any) -> frozenset[str]:
    return frozenset(argument.name for argument in func._schema.arguments)


def _is_random(func: Any) -> bool:
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
    rate = next((bound[name] for name in ("p", "dropout", "dropout_p") if name in bound), 0.0)
    if rate and bound.get("train", True) is not False:
        dropped.append(rate)
    bound = {name: _SWITCHES.get(name, value) for name, value in bound.items()}
    positional = [bound.pop(a.name) for a in func._schema.arguments if not a.kwarg_only]
    return func(*positional, **bound)


def _deciding_tensors(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors whose values decide what an op draws.

    Leave out tensors that it overwrites, and those that only give a size.
    """
    if func._schema.name.endswith("_like"):
        return []
    bound = bind(func, args, kwargs)
    for argument in func._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            bound.pop(argument.name, None)
    return tensors_in([*bound.values()], {})


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


def _norm_without_nan(func: Any, args: Any, kwargs: Any) -> Any:
    """Run a weight normalisation, and set NaN to zero.

    A removed filter divided by its norm is 0/0. If an input is not finite, NaN stays.
    """
    out = func(*args, **kwargs)
    if all(bool(tensor.isfinite().all()) for tensor in tensors_in(args, kwargs)):
        for leaf in tree_leaves(out):
            leaf.nan_to_num_(nan=0.0, posinf=math.inf, neginf=-math.inf)
    return out
