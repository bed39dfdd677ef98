"""The comparison of both models' runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import VerificationError
from fxprune.inputs import Call
from fxprune.trace.reach import AGAIN, drawing
from fxprune.verification.comparing import difference
from fxprune.verification.modes import (
    InDtype,
    MismatchError,
    NotFollowedError,
    clone,
)
from fxprune.verification.outcomes import (
    LIMITS,
    Outcome,
    refuse_rounding,
)
from fxprune.verification.rounding import EXACT, Rounding, largest_rounding, measure_rounding
from fxprune.verification.runs import Run, Runs, taken
from fxprune.verification.values import to_float32

__all__ = ["Bench"]


class Bench(Runs):
    """Comparisons of both models with one choice of weights in one dtype.

    The parameters are those of :class:`~fxprune.verification.runs.Runs`.
    """

    @property
    def limit(self) -> float:
        """The largest relative error that still counts as rounding."""
        return LIMITS.get(self.dtype, LIMITS[torch.float32])

    def single(self) -> Bench:
        """Return a bench with the same values in float32."""
        other = copy.copy(self)
        other.masked, other.kept = (
            {name: to_float32(value) for name, value in own.items()}
            for own in (self.masked, self.kept)
        )
        return other

    def compare(self, call: Call, *, training: bool = False, times: int = 1) -> Outcome:
        """Run both models and compare their outputs, buffers, random numbers and dropout rates.

        Parameters
        ----------
        call:
            The inputs.
        training:
            Whether both models are in training mode.
        times:
            The number of calls. Each call sees what the one before has written into the model.

        Raises
        ------
        RefusedError
            If the original fails.
        PrunedFailsError, GuardedError
            If the pruned model fails.
        VerificationError
            If outputs differ in more than their values, or random numbers cannot be compared.
        """
        try:
            outcome = self._compare([call] * times, training, constant=False)
        except MismatchError:
            outcome = None
        if outcome is not None:
            return outcome
        try:
            return self._compare([call] * times, training, constant=True)
        except MismatchError as error:
            raise VerificationError(
                f"the random numbers of both models cannot be compared: {error}."
            ) from error

    def _compare(self, calls: Sequence[Call], training: bool, constant: bool) -> Outcome:
        reference, notes = self._reference(calls, training, constant)
        result, deciding = self._smaller(calls, training, constant, reference.draws)
        if not notes and _undefined(reference, result):
            reference, notes = (
                self._graph(calls, training, constant),
                ("the traced graph: 0/0 at removed elements",),
            )
            result, deciding = self._smaller(calls, training, constant, reference.draws)
        if (
            not notes
            and reference.state != result.state
            and self._draw_in_python(calls[0], training)
        ):
            raise MismatchError("Python code draws them in one model, and not in the other")
        outcome = self._held(result, reference, deciding, notes)
        if outcome.error <= self.limit:
            return outcome
        second, _ = self._reference(calls, training, constant)
        if not notes and self._differ(second.outputs, reference.outputs):
            raise VerificationError(
                "the original gives other outputs when it runs again: random numbers that it "
                "draws cannot be compared."
            )
        shaken = [other._reference(calls, training, constant)[0] for other in self.shaken()]
        rounding = measure_rounding(reference, shaken, self.dtype)
        outcome = self._held(result, reference, deciding, notes, rounding)
        if not outcome.error <= self.limit:
            for run in shaken:
                moved, _ = difference(run.outputs, reference.outputs, rounding.outputs)
                refuse_rounding(outcome.error, moved, "what it gives")
        return outcome

    def _differ(self, got: Any, wanted: Any) -> bool:
        """Tell whether two runs of one model differ by more than the rounding of sums that
        threads add up in another order.
        """
        return difference(got, wanted, largest_rounding(self.dtype))[0] > 0.0

    def shaken(self) -> Iterator[Bench]:
        """Yield several benches with the original's weights rounded differently."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(5):
            other = copy.copy(self)
            other.masked = {
                name: _rounded_otherwise(value, generator) for name, value in self.masked.items()
            }
            yield other

    def _held(
        self,
        result: Run,
        reference: Run,
        deciding: list[tuple[Tensor, Tensor]],
        notes: tuple[str, ...],
        rounding: Rounding = EXACT,
    ) -> Outcome:
        error, count = difference(result.outputs, reference.outputs, rounding.outputs)
        if None not in (reference.form, result.form) and reference.form != result.form:
            raise VerificationError(
                f"the pruned model's output has the form {result.form}, the original's "
                f"{reference.form}."
            )
        if reference.dropped != result.dropped:
            raise VerificationError(
                f"the pruned model's dropouts drop the shares {result.dropped}, the original's "
                f"{reference.dropped}."
            )
        for mine, yours in deciding:
            error = max(error, difference(mine, yours, rounding.deciding)[0])
        for name, buffer in result.buffers.items():
            wanted = reference.buffers.get(name)
            if wanted is not None and name in self.coupling.parameters:
                wanted = self.survivors.take(self.coupling.parameters[name], wanted)
                gap = rounding.buffers.get(name, 0.0)
                error = max(error, difference([buffer], [wanted], gap)[0])
        return Outcome(error, count, notes)

    def _draw_in_python(self, call: Call, training: bool) -> bool:
        """Tell whether Python code of one of the models draws random numbers.

        Without this check it may have been the code of another thread.
        """
        found = False
        for model in (self.original(training), self.smaller(training)):
            args, kwargs = clone(call)
            with (
                self._undone(model),
                self.drawing(),
                torch.no_grad(),
                InDtype(self.dtype),
                drawing(self.model) as drawn,
            ):
                model(*args, **kwargs)
                found |= drawn()
        return found

    def vary(self, call: Call, *, training: bool) -> bool:
        """Tell whether both models give other outputs when they run again on the same values.

        A model may depend on a clock, for example.
        """
        return self._varies(lambda: self.original(training), call) and self._varies(
            lambda: self.smaller(training), call
        )

    def _varies(self, copied: Callable[[], nn.Module], call: Call) -> bool:
        first: list[Any] | None = None
        for _ in range(AGAIN + 1):
            (args, kwargs), model = clone(call), copied()
            try:
                with self._undone(model), self.drawing(), torch.no_grad(), InDtype(self.dtype):
                    out = taken(model(*args, **kwargs))
                if first is None:
                    difference(out, out)
            except Exception:  # the model fails, or gives nothing that can be compared
                return False
            try:
                if first is not None and self._differ(out, first):
                    return True
            except VerificationError:
                return True
            first = out if first is None else first
        return False

    def _reference(
        self, calls: Sequence[Call], training: bool, constant: bool
    ) -> tuple[Run, tuple[str, ...]]:
        try:
            return self._followed(calls, training, constant), ()
        except NotFollowedError as error:
            return self._graph(calls, training, constant), (f"the traced graph: {error}",)


def _rounded_otherwise(value: Tensor, generator: torch.Generator) -> Tensor:
    if not value.is_floating_point():
        return value
    steps = torch.randint(-2, 3, value.shape, generator=generator)
    return value * (1 + steps.to(value.dtype) * torch.finfo(value.dtype).eps)


def _undefined(reference: Run, result: Run) -> bool:
    """Tell whether the original gives NaN where the pruned model gives a number.

    This happens if 0/0 at a removed element spreads to others.
    """
    pairs = zip(tree_leaves(reference.outputs), tree_leaves(result.outputs), strict=False)
    return any(
        isinstance(old, Tensor)
        and isinstance(new, Tensor)
        and old.shape == new.shape
        and old.is_floating_point()
        and bool((old.isnan() & ~new.isnan()).any())
        for old, new in pairs
    )
