"""The comparison of both models' runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.errors import VerificationError
from fxprune.inputs import Call
from fxprune.trace.reach import REPEATED_CALLS, watching_draws
from fxprune.verification.comparing import difference
from fxprune.verification.modes import (
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
from fxprune.verification.runs import Run, Runs, Situation, copy_leaves
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

    def in_float32(self) -> Bench:
        """Return a bench with the same values in float32."""
        other = copy.copy(self)
        other.masked, other.kept = to_float32(self.masked), to_float32(self.kept)
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
        situation = Situation([call] * times, training)
        try:
            return self._compare(situation)
        except MismatchError:
            situation = replace(situation, constant=True)
        try:
            return self._compare(situation)
        except MismatchError as error:
            raise VerificationError(
                f"the random numbers of both models cannot be compared: {error}."
            ) from error

    def _compare(self, situation: Situation) -> Outcome:
        reference, result = self._run_both(situation)
        if (
            not reference.notes
            and reference.state != result.state
            and self._draws_in_python(situation.calls[0], situation.training)
        ):
            raise MismatchError("Python code draws them in one model, and not in the other")
        outcome = self._measure(result, reference)
        if outcome.error <= self.limit:
            return outcome
        return self._compare_beyond_rounding(situation, result, reference)

    def _run_both(self, situation: Situation) -> tuple[Run, Run]:
        """Run the original and the pruned model on the same random numbers.

        The traced graph runs instead of the original if 0/0 at removed elements spreads.
        """
        reference = self._run_reference(situation)
        result = self._run_pruned(situation, reference.draws)
        if not reference.notes and _has_more_nan(reference, result):
            reference = self._run_graph(situation)
            reference.notes = ("the traced graph: 0/0 at removed elements",)
            result = self._run_pruned(situation, reference.draws)
        return reference, result

    def _compare_beyond_rounding(
        self, situation: Situation, result: Run, reference: Run
    ) -> Outcome:
        """Compare again, and accept gaps that rounding explains.

        Raises
        ------
        RoundingError
            If rounding is amplified so much that outputs cannot be compared.
        VerificationError
            If the original gives other outputs when it runs again.
        """
        again = self._run_reference(situation)
        if not reference.notes and self._differ(again.outputs, reference.outputs):
            raise VerificationError(
                "the original gives other outputs when it runs again: random numbers that it "
                "draws cannot be compared."
            )
        perturbed = [bench._run_reference(situation) for bench in self.perturbed()]
        rounding = measure_rounding(reference, perturbed, self.dtype)
        outcome = self._measure(result, reference, rounding)
        if not outcome.error <= self.limit:
            for run in perturbed:
                moved, _ = difference(run.outputs, reference.outputs, rounding.outputs)
                refuse_rounding(outcome.error, moved, "what it gives")
        return outcome

    def _differ(self, got: Any, wanted: Any) -> bool:
        """Tell whether two runs of one model differ by more than rounding.

        Rounding may differ because threads add up sums in another order.
        """
        return difference(got, wanted, largest_rounding(self.dtype))[0] > 0.0

    def perturbed(self) -> Iterator[Bench]:
        """Yield several benches with the original's weights rounded differently."""
        generator = torch.Generator().manual_seed(self.seed)
        for _ in range(5):
            other = copy.copy(self)
            masked = self.masked.items()
            other.masked = {name: _perturb(value, generator) for name, value in masked}
            yield other

    def _measure(self, result: Run, reference: Run, rounding: Rounding = EXACT) -> Outcome:
        """Return the largest error over all that both runs gave.

        Raises
        ------
        VerificationError
            If the runs differ in more than values.
        """
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
        for tensor, wanted in result.deciding:
            error = max(error, difference(tensor, wanted, rounding.deciding)[0])
        error = max(error, self._buffer_error(result, reference, rounding))
        return Outcome(error, count, reference.notes)

    def _buffer_error(self, result: Run, reference: Run, rounding: Rounding) -> float:
        error = 0.0
        for name, buffer in result.buffers.items():
            wanted = reference.buffers.get(name)
            if wanted is not None and name in self.coupling.parameters:
                wanted = self.survivors.take(self.coupling.parameters[name], wanted)
                gap = rounding.buffers.get(name, 0.0)
                error = max(error, difference([buffer], [wanted], gap)[0])
        return error

    def _draws_in_python(self, call: Call, training: bool) -> bool:
        """Tell whether Python code of one of the models draws random numbers.

        A changed state of the generators does not prove this, because another thread may have
        drawn.
        """
        found = False
        for model in (self.masked_copy(training), self.pruned_copy(training)):
            args, kwargs = clone(call)
            with self._running(model, torch.no_grad()), watching_draws(self.model) as has_drawn:
                model(*args, **kwargs)
                found |= has_drawn()
        return found

    def both_vary(self, call: Call, *, training: bool) -> bool:
        """Tell whether both models give other outputs when they run again on the same values.

        A model may depend on a clock, for example.
        """
        return self._varies(lambda: self.masked_copy(training), call) and self._varies(
            lambda: self.pruned_copy(training), call
        )

    def _varies(self, copy_model: Callable[[], nn.Module], call: Call) -> bool:
        first: list[Any] | None = None
        for _ in range(REPEATED_CALLS + 1):
            (args, kwargs), model = clone(call), copy_model()
            try:
                with self._running(model, torch.no_grad()):
                    out = copy_leaves(model(*args, **kwargs))
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

    def _run_reference(self, situation: Situation) -> Run:
        """Run the original's own code, or the traced graph if that code cannot be followed."""
        try:
            return self._run_original(situation)
        except NotFollowedError as error:
            run = self._run_graph(situation)
            run.notes = (f"the traced graph: {error}",)
            return run


def _perturb(value: Tensor, generator: torch.Generator) -> Tensor:
    """Round weights differently: move each by up to two steps of its dtype."""
    if not value.is_floating_point():
        return value
    steps = torch.randint(-2, 3, value.shape, generator=generator)
    return value * (1 + steps.to(value.dtype) * torch.finfo(value.dtype).eps)


def _has_more_nan(reference: Run, result: Run) -> bool:
    """Tell whether the original gives NaN where the pruned model gives a number.

    This happens if 0/0 at a removed element spreads to others.
    """
    pairs = zip(tree_leaves(reference.outputs), tree_leaves(result.outputs), strict=False)
    return any(_has_nan_beside_number(old, new) for old, new in pairs)


def _has_nan_beside_number(old: Any, new: Any) -> bool:
    """Tell whether the first of two values of one shape is NaN where the second is a number."""
    if not (isinstance(old, Tensor) and isinstance(new, Tensor)):
        return False
    if old.shape != new.shape or not old.is_floating_point():
        return False
    return bool((old.isnan() & ~new.isnan()).any())
