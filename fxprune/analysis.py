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
from torch.utils._pytree import tree_leaves

from fxprune.coupling import Coupling, Labelling, Terms, couple
from fxprune.eager import some_data
from fxprune.errors import FxpruneError, TraceError
from fxprune.trace import example_of, twin_of

__all__ = ["Clock", "Inputs", "label_and_couple"]

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


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


def label_and_couple(model: nn.Module, exact: Inputs, terms: Terms, clock: Clock | None = None) -> Coupling:
    """The coupling of a model whose example's arguments are ``exact``, meta tensors.

    Raises
    ------
    InputError, TraceError
    """
    clock, inputs = clock or Clock(), _widened(exact)
    with clock("trace"):
        options: dict[str, Any] = {}
        if terms.heads:
            first = _label(model, inputs, exact, terms, coupling=False)
            options = {"unread": first.unread(), "ties": first.head_ties(terms.heads)}
        labelling = _label(model, inputs, exact, terms, **options)
    with clock("couple"):
        return couple(labelling, _share(exact, labelling.inputs))


def _label(model: nn.Module, inputs: Inputs, exact: Inputs, terms: Terms, **options: Any) -> Labelling:
    """Labels (see :class:`~fxprune.coupling.Labelling` for the options) on the model, traced whole if that can be."""

    def evaluated(values: Inputs) -> Labelling:
        labelling = Labelling(twin_of(model), terms, **options)
        labelling.trace(*values)
        return labelling

    try:
        labelling, inputs = _deciding_alike(evaluated, inputs, exact)
    except FxpruneError:
        try:
            if _sizes(inputs) == _sizes(exact):
                raise
            labelling, inputs = evaluated(exact), exact  # a model may insist on its batch of 1
        except TraceError as error:
            return _label_parts(model, inputs, exact, terms, error, **options)
    if labelling.traces[0].asked_mode:
        try:
            labelling.trace(*inputs, training=True)
        except FxpruneError as error:
            labelling = evaluated(inputs)  # without the labels of the failed attempt
            labelling.traces[0].decisions.append(
                f"training mode takes another path, which the example cannot take; only evaluation's is emitted: {error}"
            )
    return labelling


def _deciding_alike(label: Callable[[Inputs], Labelling], inputs: Inputs, exact: Inputs) -> tuple[Labelling, Inputs]:
    """The labels for inputs of a larger batch than the example's, unless the model decides otherwise for the example itself."""
    labelling = label(inputs)
    decisions = [own.decisions for own in labelling.traces]
    if any(decisions) and _sizes(inputs) != _sizes(exact):
        again = label(exact)
        if [own.decisions for own in again.traces] != decisions:
            return again, exact
    return labelling, inputs


def _label_parts(model: nn.Module, inputs: Inputs, exact: Inputs, terms: Terms, refused: FxpruneError, **options: Any) -> Labelling:
    """The labels of a model that cannot be traced whole, for the reason given."""

    def run(values: Inputs) -> Labelling:
        twin = twin_of(model)
        twin.model.eval()
        labelling = Labelling(twin, terms, **options)
        labelling.run(*some_data(values, twin.device))
        return labelling

    try:
        labelling, _ = _deciding_alike(run, inputs, exact)
    except FxpruneError:
        raise
    except Exception:
        raise refused from None  # it cannot be run on made-up data either
    if not labelling.traces or (labelling.decided and labelling.missed()):
        raise refused  # what did not run may be called for other values, on whatever there is
    return labelling


def _share(exact: Any, ran: Any) -> Fraction:
    """The example's batch over the labelled one, which may be 2 where the example has 1."""
    asked, given = (sum(leaf.numel() for leaf in tree_leaves(tree) if leaf.dim()) for tree in (exact, ran))
    return Fraction(asked, given) if given else Fraction(1)


def _sizes(inputs: Inputs) -> list[torch.Size]:
    return [leaf.shape for leaf in tree_leaves(inputs)]


def _widened(exact: Inputs) -> Inputs:
    """The inputs of the analysis: a batch of at least 2, because sizes of 1 say nothing."""
    args, kwargs = exact
    widened = example_of({**{str(i): a for i, a in enumerate(args)}, **kwargs}, 2)[1]
    return tuple(widened.pop(str(i)) for i in range(len(args))), widened
