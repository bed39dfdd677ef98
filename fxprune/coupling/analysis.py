"""Analysis of a model, given example inputs: its coupling.

The model is traced whole if possible, else part by part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fxprune.common.contents import tensors_of
from fxprune.common.random_state import seeded
from fxprune.coupling import Coupling, Labelling, Terms, couple
from fxprune.coupling.parts import Explored, decisions_of, explore, find_runnable
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.inputs import Call, copied_to, shapes_of, with_larger_batch, without_floats
from fxprune.trace import MetaCopy, meta_copy_of, set_mode, trace, without_fast_path
from fxprune.trace.reach import Reached, restoring_draws
from fxprune.trace.user_code import ElsewhereError

__all__ = ["Clock", "label_and_couple"]


@dataclass
class Clock:
    """Wall-clock seconds per stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def label_and_couple(
    model: nn.Module, example: Call, terms: Terms, clock: Clock | None = None
) -> Coupling:
    """Return the coupling of a model.

    Parameters
    ----------
    model:
        The model. It is copied, not changed.
    example:
        A call of the model. Its tensors may be meta tensors.
    terms:
        What the caller wants kept or pinned.
    clock:
        Adds up the seconds of the stages "trace" and "couple", if given.

    Raises
    ------
    InputError
        If the model fails on the example.
    TraceError
        If the model can be traced neither whole nor in parts.
    """
    clock = clock or Clock()
    with clock("trace"):
        found = _label_until_stable(model, example, terms)
    with clock("couple"):
        coupling = couple(found.labelling, _batch_share(example, found.labelling.inputs))
        coupling.example, coupling.not_one_graph = found.example, found.refused
        coupling.untrained, coupling.inputs = found.untrained, without_floats(example)
        return coupling


def _label_until_stable(model: nn.Module, example: Call, terms: Terms) -> _Labelled:
    """Label a model, with heads kept whole, until no further buffers are overwritten.

    The next call of the model reads the buffers that this one has written.
    """
    options: dict[str, Any] = {"known": {}}
    if terms.heads:
        first = _label(model, example, terms, coupling=False, **options).labelling
        options |= {"unread": first.unread(), "ties": first.head_ties(terms.heads)}
    found = _label(model, example, terms, **options)
    overwritten: set[str] = set()
    while not found.labelling.overwritten() <= overwritten:
        overwritten |= found.labelling.overwritten()
        found = _label(model, example, terms, overwritten=overwritten, **options)
    return found


@dataclass
class _Labelled:
    """A labelled model.

    Attributes
    ----------
    labelling:
        The labels.
    example:
        The example: with meta tensors if only its shapes were read, else with values.
    refused:
        Why the model is not one graph; empty if it is.
    untrained:
        Why there is a graph for evaluation mode only; empty if training mode has one, too.
    """

    labelling: Labelling
    example: Call
    refused: str = ""
    untrained: str = ""


_ExploredByShapes = dict[str, Explored]
"""How the model runs, by the shapes of the call's tensors (as text)."""


def _label(
    model: nn.Module, example: Call, terms: Terms, *, known: _ExploredByShapes, **options: Any
) -> _Labelled:
    """Label a model as one graph, or in parts if that fails.

    The options are those of :class:`~fxprune.coupling.Labelling`.

    If both fail, the error says why the model is not one graph, unless the model itself fails on
    the example: then it says so. A model that has a graph for evaluation mode only, and no parts,
    is labelled in evaluation mode alone.
    """
    try:
        return _label_whole(model, shapes_of(example), terms, **options)
    except ElsewhereError:
        raise  # in parts, Python would compute in another thread as well
    except Exception as error:  # any kind: what fails in one graph may work in parts
        try:
            return _label_parts(model, example, terms, error, known, **options)
        except FxpruneError:
            if not isinstance(error, _UntrainedError):
                raise
            return _label_whole(model, shapes_of(example), terms, untrained=str(error), **options)


class _UntrainedError(TraceError):
    """Evaluation mode could be traced, training mode could not."""


def _label_whole(
    model: nn.Module, example: Call, terms: Terms, *, untrained: str = "", **options: Any
) -> _Labelled:
    """Label the model as one graph for each mode.

    If ``untrained`` is given, only evaluation mode is traced; it says why training mode cannot be.
    """
    labelling, call = _label_evaluation(model, example, terms, **options)
    if untrained:
        _say_untrained(labelling, untrained)
        return _Labelled(labelling, example, untrained=untrained)
    if labelling.traces[0].asked_mode:
        try:
            labelling.trace(*call, training=True)
        except ChanceError:
            raise  # in parts, Python draws random numbers at each call
        except FxpruneError as error:
            raise _UntrainedError(str(error)) from error
    return _Labelled(labelling, example)


def _label_evaluation(
    model: nn.Module, example: Call, terms: Terms, **options: Any
) -> tuple[Labelling, Call]:
    """Label the model as one graph in evaluation mode, and return the labels and the call."""

    def label(call: Call) -> Labelling:
        labelling = Labelling(meta_copy_of(model), terms, **options)
        labelling.trace(*call)
        return labelling

    def decided(call: Call) -> _DecidedByGraph:
        return {("", False): trace(meta_copy_of(model), *call).decisions}

    wide = with_larger_batch(example)
    try:
        return _label_widened(label, decided, wide, example)
    except FxpruneError:
        if _all_sizes(wide) == _all_sizes(example):
            raise
        return label(example), example  # the model may only accept a batch of 1


def _say_untrained(labelling: Labelling, why: str) -> None:
    """Add to the reported decisions that training mode could not be traced, and why."""
    notice = (
        "training mode takes another path, which the example cannot take; only evaluation's is "
        "emitted"
    )
    labelling.traces[0].decisions.append(f"{notice}: {why}")


_DecidedByGraph = dict[tuple[str, bool], list[str]]
"""(path of the part, whether for training) -> what its graph decided by the sizes of the call."""


def _label_widened(
    label: Callable[[Call], Labelling],
    decided: Callable[[Call], _DecidedByGraph],
    wide: Call,
    example: Call,
) -> tuple[Labelling, Call]:
    """Label the model on a call with a batch larger than 1, and return the labels and the call.

    If the model decides something else for the example itself, label it on the example instead.
    """
    labelling = label(wide)
    decisions = {(each.path, each.training): each.decisions for each in labelling.traces}
    if any(decisions.values()) and _all_sizes(wide) != _all_sizes(example):
        try:
            alike = decided(example) == decisions
        except Exception:  # labelling the example meets the same error and reports it
            alike = False
        if not alike:
            return label(example), example
    return labelling, wide


def _label_parts(
    model: nn.Module,
    example: Call,
    terms: Terms,
    refused: Exception,
    known: _ExploredByShapes,
    **options: Any,
) -> _Labelled:
    """Label a model in parts, because it cannot be traced whole for the reason ``refused``."""
    runs = _PartRuns(model, terms, known, options)
    with seeded(0):
        call = find_runnable(meta_copy_of(model), example, refused)
    try:
        wide = with_larger_batch(call)
        labelling, ran = _label_widened(runs.label, runs.decided_as(wide), wide, call)
    except ElsewhereError:
        raise
    except Exception as error:
        # the model's own Python raised, or does something that cannot be followed
        raise refused from error
    if not labelling.traces:
        raise refused  # no part was traced: there is nothing to prune
    if runs.explored(ran).untrained:
        _say_untrained(labelling, runs.explored(ran).untrained)
    return _Labelled(labelling, call, _reason_of(refused))


def _reason_of(refused: Exception) -> str:
    """Return the message of an error, with its type if it is not one of fxprune."""
    if isinstance(refused, FxpruneError):
        return str(refused)
    return f"{type(refused).__name__}: {refused}"


@dataclass
class _PartRuns:
    """Runs of a model in parts.

    Attributes
    ----------
    known:
        What earlier runs have explored; it is extended.
    options:
        The options of :class:`~fxprune.coupling.Labelling`.
    """

    model: nn.Module
    terms: Terms
    known: _ExploredByShapes
    options: dict[str, Any]

    @contextmanager
    def _running(self, call: Call) -> Iterator[tuple[MetaCopy, Call]]:
        """Prepare a run: a meta copy in evaluation mode, and the call on its device."""
        meta_copy = meta_copy_of(self.model)
        set_mode(meta_copy.model, training=False)
        with without_fast_path(), seeded(0), restoring_draws(Reached(meta_copy.model)):
            yield meta_copy, copied_to(call, meta_copy.device)

    def explored(self, call: Call) -> Explored:
        """Return the parts and routes of the model for calls of these shapes."""
        shapes = str(_all_sizes(call))
        if shapes not in self.known:
            with self._running(call) as (meta_copy, placed_call):
                self.known[shapes] = explore(meta_copy, *placed_call)
        return self.known[shapes]

    def label(self, call: Call) -> Labelling:
        """Label the model on a call."""
        explored = self.explored(call)
        with self._running(call) as (meta_copy, placed_call):
            labelling = Labelling(meta_copy, self.terms, **self.options)
            labelling.run(*placed_call, explored)
        return labelling

    def decided_as(self, explored_call: Call) -> Callable[[Call], _DecidedByGraph]:
        """Return a function that tells what the parts found for one call decide for another."""

        def decided(call: Call) -> _DecidedByGraph:
            with self._running(call) as (meta_copy, placed_call):
                return decisions_of(meta_copy, self.explored(explored_call), *placed_call)

        return decided


def _batch_share(example: Call, ran: Any) -> Fraction:
    """Return the size of the example's tensors as a fraction of that of the labelled call.

    It is below 1 where the example has one row and was labelled with two.
    """
    elements, labelled = _count_elements(example), _count_elements(ran)
    return Fraction(elements, labelled) if labelled else Fraction(1)


def _count_elements(call: Any) -> int:
    """Return the number of elements of all tensors of a call, scalars aside."""
    return sum(tensor.numel() for tensor in tensors_of(call) if tensor.dim())


def _all_sizes(call: Call) -> list[torch.Size]:
    """Return the shapes of all tensors of a call."""
    return [tensor.shape for tensor in tensors_of(call)]
