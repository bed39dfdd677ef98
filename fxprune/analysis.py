"""From a model and an example to what is coupled: traced whole where that can be, else part by part."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from fxprune.chance import seeded
from fxprune.contents import tensors_of
from fxprune.coupling import Coupling, Labelling, Terms, couple
from fxprune.eager import ONLY_EVALUATION, runnable
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.inputs import Arguments, placed, shapes_of, widened
from fxprune.trace import set_mode, slow_path, twin_of
from fxprune.trace.lines import ElsewhereError

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


def label_and_couple(model: nn.Module, example: Arguments, terms: Terms, clock: Clock | None = None) -> Coupling:
    """The coupling of a model that is called as in the example, whose tensors may be meta tensors.

    Raises
    ------
    InputError, TraceError
    """
    clock = clock or Clock()
    with clock("trace"):
        options: dict[str, Any] = {}
        if terms.heads:
            first = _label(model, example, terms, coupling=False)
            options = {"unread": first.labelling.unread(), "ties": first.labelling.head_ties(terms.heads)}
        found = _label(model, example, terms, **options)
    with clock("couple"):
        coupling = couple(found.labelling, _share(example, found.labelling.inputs))
        coupling.example, coupling.not_one_graph, coupling.untrained = found.example, found.refused, found.untrained
        return coupling


@dataclass
class _Found:
    """Labels; the example as far as it was read, in shapes or in values; why the model is not one graph, or evaluation's alone."""

    labelling: Labelling
    example: Arguments
    refused: str = ""
    untrained: str = ""


def _label(model: nn.Module, example: Arguments, terms: Terms, **options: Any) -> _Found:
    """Labels (see :class:`~fxprune.coupling.Labelling` for the options) on the model: as one graph, or in parts, or neither.

    The error is that of the first attempt on the example itself, unless the model fails on it for real.
    """
    try:
        return _label_whole(model, shapes_of(example), terms, **options)
    except ElsewhereError:
        raise  # Python that stays would compute there, too
    except Exception as error:  # of any kind: what fails in a graph may well be done in parts
        try:
            return _label_parts(model, example, terms, error, **options)
        except FxpruneError:
            if not isinstance(error, _UntrainedError):
                raise
            return _label_whole(model, shapes_of(example), terms, untrained=str(error), **options)


class _UntrainedError(TraceError):
    """The graph of evaluation is there, that of training is not."""


def _label_whole(model: nn.Module, example: Arguments, terms: Terms, *, untrained: str = "", **options: Any) -> _Found:
    """Labels on one graph for each mode; ``untrained`` says why there is none for training, where evaluation's has to do."""

    def evaluated(call: Arguments) -> Labelling:
        labelling = Labelling(twin_of(model), terms, **options)
        labelling.trace(*call)
        return labelling

    wide = widened(example)
    try:
        labelling, call = _deciding_alike(evaluated, wide, example)
    except FxpruneError:
        if _sizes(wide) == _sizes(example):
            raise
        labelling, call = evaluated(example), example  # a model may insist on its batch of 1
    if untrained:
        labelling.traces[0].decisions.append(f"{ONLY_EVALUATION}: {untrained}")
        return _Found(labelling, example, untrained=untrained)
    if labelling.traces[0].asked_mode:
        try:
            labelling.trace(*call, training=True)
        except ChanceError:
            raise  # Python that stays draws at each call
        except FxpruneError as error:
            raise _UntrainedError(str(error)) from error
    return _Found(labelling, example)


def _deciding_alike(label: Callable[[Arguments], Labelling], wide: Arguments, example: Arguments) -> tuple[Labelling, Arguments]:
    """The labels for a call of a larger batch than the example's, unless the model decides otherwise for the example itself."""
    labelling = label(wide)
    decisions = [own.decisions for own in labelling.traces]
    if any(decisions) and _sizes(wide) != _sizes(example):
        again = label(example)
        if [own.decisions for own in again.traces] != decisions:
            return again, example
    return labelling, wide


def _label_parts(model: nn.Module, example: Arguments, terms: Terms, refused: Exception, **options: Any) -> _Found:
    """The labels of a model that cannot be traced whole, for the reason given."""

    def run(call: Arguments) -> Labelling:
        twin = twin_of(model)
        set_mode(twin.model, training=False)
        labelling = Labelling(twin, terms, **options)
        with slow_path(), seeded(0):
            labelling.run(*placed(call, twin.device))
        return labelling

    with seeded(0):
        call = runnable(twin_of(model), example, refused)
    try:
        labelling, _ = _deciding_alike(run, widened(call), call)
    except ElsewhereError:
        raise
    except Exception as error:  # whatever the model's own Python raises, and what cannot be followed in it
        raise refused from error
    if not labelling.traces:
        raise refused  # there is nothing to prune
    why = str(refused) if isinstance(refused, FxpruneError) else f"{type(refused).__name__}: {refused}"
    return _Found(labelling, call, why)


def _share(example: Arguments, ran: Any) -> Fraction:
    """The example's batch over the labelled one, which may be 2 where the example has 1."""
    asked, given = (sum(tensor.numel() for tensor in tensors_of(tree) if tensor.dim()) for tree in (example, ran))
    return Fraction(asked, given) if given else Fraction(1)


def _sizes(call: Arguments) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_of(call)]
