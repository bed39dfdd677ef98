"""From a model and an example to what is coupled: traced whole where that can be, else part by
part.
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
from fxprune.coupling.parts import Explored, decisions_of, explore, runnable
from fxprune.errors import ChanceError, FxpruneError, TraceError
from fxprune.inputs import Call, placed, shapes_of, widened
from fxprune.trace import MetaCopy, meta_copy_of, set_mode, slow_path, trace
from fxprune.trace.reach import Reached, undrawn_by
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
    """The coupling of a model that is called as in the example, whose tensors may be meta tensors.

    Raises
    ------
    InputError, TraceError
    """
    clock = clock or Clock()
    with clock("trace"):
        options: dict[str, Any] = {"known": {}}
        if terms.heads:
            first = _label(model, example, terms, coupling=False, **options)
            options |= {
                "unread": first.labelling.unread(),
                "ties": first.labelling.head_ties(terms.heads),
            }
        found = _label(model, example, terms, **options)
        # what one call leaves, the next one meets
        while not found.labelling.overwritten() <= options.get("overwritten", set()):
            options["overwritten"] = (
                options.get("overwritten", set()) | found.labelling.overwritten()
            )
            found = _label(model, example, terms, **options)
    with clock("couple"):
        coupling = couple(found.labelling, _batch_share(example, found.labelling.inputs))
        coupling.example, coupling.not_one_graph, coupling.untrained = (
            found.example,
            found.refused,
            found.untrained,
        )
        return coupling


@dataclass
class _Found:
    """Labels; the example as far as it was read, in shapes or in values; why the model is not one
    graph, or evaluation's alone.
    """

    labelling: Labelling
    example: Call
    refused: str = ""
    untrained: str = ""


_ExploredByPath = dict[str, Explored]
"""How a model runs on calls of these shapes."""


def _label(
    model: nn.Module, example: Call, terms: Terms, *, known: _ExploredByPath, **options: Any
) -> _Found:
    """Labels (see :class:`~fxprune.coupling.Labelling` for the options) on the model: as one
    graph, or in parts, or neither.

    The error is that of the first attempt on the example itself, unless the model fails on it for
    real.
    """
    try:
        return _label_whole(model, shapes_of(example), terms, **options)
    except ElsewhereError:
        raise  # Python that stays would compute there, too
    except Exception as error:  # of any kind: what fails in a graph may well be done in parts
        try:
            return _label_parts(model, example, terms, error, known, **options)
        except FxpruneError:
            if not isinstance(error, _UntrainedError):
                raise
            return _label_whole(model, shapes_of(example), terms, untrained=str(error), **options)


class _UntrainedError(TraceError):
    """The graph of evaluation is there, that of training is not."""


def _label_whole(
    model: nn.Module, example: Call, terms: Terms, *, untrained: str = "", **options: Any
) -> _Found:
    """Labels on one graph for each mode; ``untrained`` says why there is none for training, where
    evaluation's has to do.
    """

    def evaluated(call: Call) -> Labelling:
        labelling = Labelling(meta_copy_of(model), terms, **options)
        labelling.trace(*call)
        return labelling

    def decided(call: Call) -> _Decided:
        return {("", False): trace(meta_copy_of(model), *call).decisions}

    wide = widened(example)
    try:
        labelling, call = _deciding_alike(evaluated, decided, wide, example)
    except FxpruneError:
        if _all_sizes(wide) == _all_sizes(example):
            raise
        labelling, call = evaluated(example), example  # a model may insist on its batch of 1
    if untrained:
        _say_untrained(labelling, untrained)
        return _Found(labelling, example, untrained=untrained)
    if labelling.traces[0].asked_mode:
        try:
            labelling.trace(*call, training=True)
        except ChanceError:
            raise  # Python that stays draws at each call
        except FxpruneError as error:
            raise _UntrainedError(str(error)) from error
    return _Found(labelling, example)


def _say_untrained(labelling: Labelling, why: str) -> None:
    what = (
        "training mode takes another path, which the example cannot take; only evaluation's is "
        "emitted"
    )
    labelling.traces[0].decisions.append(f"{what}: {why}")


_Decided = dict[tuple[str, bool], list[str]]
"""What each graph decides by the sizes of a call, by its path and for evaluation or training."""


def _deciding_alike(
    label: Callable[[Call], Labelling],
    decided: Callable[[Call], _Decided],
    wide: Call,
    example: Call,
) -> tuple[Labelling, Call]:
    """The labels for a call of a larger batch than the example's, unless the model decides
    otherwise for the example itself.
    """
    labelling = label(wide)
    decisions = {(own.path, own.training): own.decisions for own in labelling.traces}
    if any(decisions.values()) and _all_sizes(wide) != _all_sizes(example):
        try:
            alike = decided(example) == decisions
        except Exception:  # whatever it is, the labels for the example meet it, too
            alike = False
        if not alike:
            return label(example), example
    return labelling, wide


def _label_parts(
    model: nn.Module,
    example: Call,
    terms: Terms,
    refused: Exception,
    known: _ExploredByPath,
    **options: Any,
) -> _Found:
    """The labels of a model that cannot be traced whole, for the reason given."""

    @contextmanager
    def running(call: Call) -> Iterator[tuple[MetaCopy, Call]]:
        meta_copy = meta_copy_of(model)
        set_mode(meta_copy.model, training=False)
        with slow_path(), seeded(0), undrawn_by(Reached(meta_copy.model)):
            yield meta_copy, placed(call, meta_copy.device)

    def explored(call: Call) -> Explored:
        shapes = str(_all_sizes(call))
        if shapes not in known:
            with running(call) as (meta_copy, placed_call):
                known[shapes] = explore(meta_copy, *placed_call)
        return known[shapes]

    def run(call: Call) -> Labelling:
        found = explored(call)
        with running(call) as (meta_copy, placed_call):
            labelling = Labelling(meta_copy, terms, **options)
            labelling.run(*placed_call, found)
        return labelling

    def decided(call: Call) -> _Decided:
        with running(call) as (meta_copy, placed_call):
            return decisions_of(meta_copy, explored(wide), *placed_call)

    with seeded(0):
        call = runnable(meta_copy_of(model), example, refused)
    try:
        wide = widened(call)
        labelling, ran = _deciding_alike(run, decided, wide, call)
    except ElsewhereError:
        raise
    except Exception as error:
        # whatever the model's own Python raises, and what cannot be followed in it
        raise refused from error
    if not labelling.traces:
        raise refused  # there is nothing to prune
    if explored(ran).untrained:
        _say_untrained(labelling, explored(ran).untrained)
    why = (
        str(refused)
        if isinstance(refused, FxpruneError)
        else f"{type(refused).__name__}: {refused}"
    )
    return _Found(labelling, call, why)


def _batch_share(example: Call, ran: Any) -> Fraction:
    """The example's batch over the labelled one, which may be 2 where the example has 1."""
    asked, given = (
        sum(tensor.numel() for tensor in tensors_of(tree) if tensor.dim())
        for tree in (example, ran)
    )
    return Fraction(asked, given) if given else Fraction(1)


def _all_sizes(call: Call) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors_of(call)]
