"""The whole proof, situation by situation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxprune.common.contents import tensors_of
from fxprune.common.hooks import put_in_mode
from fxprune.common.random_state import seeded
from fxprune.coupling import Coupling
from fxprune.errors import FxpruneError, VerificationError
from fxprune.inputs import Call, as_call
from fxprune.resized import other_batch, other_sizes
from fxprune.result.plan import Plan
from fxprune.result.stored_inputs import unpack_inputs
from fxprune.rewrite import Survivors
from fxprune.trace.reach import Reached, restoring_draws
from fxprune.verification.bench import Bench
from fxprune.verification.comparing import NotFiniteError, kinds
from fxprune.verification.copies import plain_copy
from fxprune.verification.gradients import check_gradients
from fxprune.verification.modes import clone
from fxprune.verification.outcomes import (
    GuardedError,
    Outcome,
    PrunedFailsError,
    RefusedError,
    describe_error,
)
from fxprune.verification.reasons import (
    Comparison,
    compare_in_some_dtype,
    describe_conversion,
    why_uncompared,
    without_sizes,
)
from fxprune.verification.structure import check_emission
from fxprune.verification.values import choices, inputs_of, to_float32, weights_of
from fxprune.verification.verification import Verification
from fxprune.verification.weights import changed_tensors

__all__ = ["check"]


def check(
    model: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    coupling: Coupling,
    kept: dict[str, tuple[int, ...]],
    *,
    example_inputs: Any = None,
    dtype: torch.dtype = torch.float64,
    randomize: bool = True,
    seed: int = 0,
    numeric: bool = True,
    fresh: bool = False,
) -> Verification:
    """Check the structure and the numbers of a pruned model; see :func:`fxprune.verify`.

    Parameters
    ----------
    model:
        The original model.
    pruned:
        The pruned model.
    plan:
        The plan that it was pruned by. Its inputs are used if there are no ``example_inputs``.
    coupling:
        The analysis of the original.
    kept:
        The indices of the surviving units, by the name of their group.
    example_inputs, dtype, randomize, seed, numeric:
        See :func:`fxprune.verify`.
    fresh:
        Whether the pruned model was just made. Its weights must then be exactly those that the
        plan leaves of the original's.

    Raises
    ------
    VerificationError
        If the models differ (except by the error for the example's sizes, which is returned), if
        nothing can be compared, or if the check itself fails.
    """
    with _own_errors():
        survivors = Survivors(coupling, kept)
        check_emission(pruned, coupling, survivors)
        if not numeric:
            return Verification(float("nan"), 0, dtype)
        call = unpack_inputs(plan.inputs) if example_inputs is None else as_call(example_inputs)
        weights = changed_tensors(model, pruned, coupling, survivors)
        if fresh and weights:
            raise VerificationError(f"{next(iter(weights.values()))[0]}.")
        proof = _Proof(model, pruned, coupling, survivors, call, randomize, seed)
        return proof.run(dtype, weights)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Convert unexpected errors to a VerificationError."""
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise VerificationError(f"the check itself failed: {describe_error(error)}") from error


class _Proof:
    """One proof: the values that are tried, and the situations that are compared."""

    def __init__(
        self,
        model: nn.Module,
        pruned: nn.Module,
        coupling: Coupling,
        survivors: Survivors,
        call: Call,
        randomize: bool,
        seed: int,
    ) -> None:
        self.model, self.pruned, self.coupling, self.survivors = model, pruned, coupling, survivors
        self.call, self.randomize, self.seed = call, randomize, seed
        self.dtype = torch.float64  # the dtype of most situations
        self.compared: list[str] = []
        self.left_out: list[str] = []
        self._failure: Exception | None = None  # why no values could be compared so far

    def run(self, dtype: torch.dtype, weights: Mapping[str, tuple[str, float]]) -> Verification:
        """Compare the models in all situations, the example's sizes first.

        Parameters
        ----------
        dtype:
            The dtype to try first.
        weights:
            The pruned model's tensors that are not what the plan leaves
            (:func:`~fxprune.verification.weights.changed_tensors`).
        """
        bench, inputs, outcome = self._compare_example(dtype)
        self.dtype = bench.dtype
        found = Verification(outcome.error, outcome.outputs, bench.dtype)
        self._note("the example's sizes", outcome)
        if outcome.error <= found.limit:
            others = [*self._compare_situations(bench, inputs), *self._compare_weights(weights)]
            found = replace(found, error=max([outcome.error, *others]))
        return replace(found, compared=tuple(self.compared), left_out=tuple(self.left_out))

    def _compare_weights(self, changed: Mapping[str, tuple[str, float]]) -> Iterator[float]:
        """Note whether the pruned model's own weights are those that the plan leaves.

        Yield their error if the proof uses the models' own values.
        """
        if not changed:
            self.compared.append(_WEIGHTS)
            return
        first, more = next(iter(changed.values()))[0], len(changed) - 1
        others = f", and so have {more} more" if more else ""
        ran = "the error says how far"
        if self.randomize:
            ran = "both models ran on values drawn at random"
        self.left_out.append(
            f"{_WEIGHTS}: {first}{others}: one of the models was trained since, or changed; {ran}"
        )
        if not self.randomize:
            yield max(error for _, error in changed.values())

    # -- values on which the original runs

    def _compare_example(self, dtype: torch.dtype) -> tuple[Bench, Call, Outcome]:
        """Return the first values, in the first dtype, on which both models run, and the outcome.

        Raises
        ------
        VerificationError
            If there are none, or if the outputs differ in more than their values.
        """
        for tried in (dtype, torch.float32) if dtype is torch.float64 else (dtype,):
            found = self._compare_in(tried)
            if found is not None:
                if tried is not dtype:
                    self.left_out.append(f"{dtype}: {self._failure}")
                self._failure = None  # its traceback refers to the values
                return found
        if isinstance(self._failure, VerificationError):
            raise self._failure
        raise VerificationError(why_uncompared(self._failure)) from self._failure

    def _compare_in(self, dtype: torch.dtype) -> tuple[Bench, Call, Outcome] | None:
        """Return the first values on which both models run in a dtype; None if there are none."""
        for bench, inputs in self._benches(dtype):
            try:
                return bench, inputs, bench.compare(inputs)
            except (RefusedError, NotFiniteError) as error:
                # Report the first values, which show the most.
                self._failure = self._failure or error
            except (PrunedFailsError, GuardedError) as error:
                self._failure = error
                return None
            except VerificationError as error:
                if bench.both_vary(inputs, training=False):
                    raise VerificationError(
                        "both models do something else when they are called again on the "
                        "same inputs, so that nothing can be compared."
                    ) from error
                raise
        return None

    def _benches(self, dtype: torch.dtype) -> Iterator[tuple[Bench, Call]]:
        for choice in choices(self.randomize, self.call):
            values = weights_of(self.model, dtype, choice, self.seed)
            inputs = inputs_of(self.model, self.call, dtype, choice, self.seed)
            bench = Bench(
                self.model,
                self.pruned,
                self.coupling,
                self.survivors,
                values,
                own_values=not self.randomize,
                seed=self.seed,
            )
            yield bench, inputs

    # -- situations

    def _compare_situations(self, bench: Bench, inputs: Call) -> Iterator[float]:
        """Yield the errors in all situations other than the example's sizes.

        A model that takes long runs on smaller inputs or in float32 where that is enough.
        """
        is_long = self.coupling.macs() > _LONG
        quick = inputs
        self._run_example()
        if bench.written:
            yield from self._try("a second call", "", Bench.compare, bench, inputs, times=2)
        for error, call in self._compare_sizes(bench, inputs, 1 if is_long else 2):
            yield error
            if is_long and _size_of_call(call) < _size_of_call(inputs):
                quick = call
        yield from self._compare_training(bench, inputs, quick)
        if is_long and quick is inputs:
            bench, quick = bench.in_float32(), to_float32(inputs)
        batch = other_batch(quick)
        yield from self._try(
            "another batch", "" if batch else "no input has rows", Bench.compare, bench, batch
        )
        yield from self._compare_gradients(bench, quick)

    def _compare_training(self, bench: Bench, inputs: Call, quick: Call) -> list[float]:
        """Return the error in training mode, on ``quick`` if possible, else on ``inputs``."""
        name, why_not = "training mode", self._why_no_training()
        found = [*self._try(name, why_not, Bench.compare, bench, quick, training=True)]
        if not found and quick is not inputs and not why_not:
            # Small inputs may leave one value per channel, which has no variance: use the full
            # size instead.
            del self.left_out[-1]
            found += self._try(name, why_not, Bench.compare, bench, inputs, training=True)
        return found

    def _compare_gradients(self, bench: Bench, call: Call) -> Iterator[float]:
        yield from self._try("gradients", "", check_gradients, bench, call, training=False)
        if any(trace.training or trace.path for trace in self.coupling.traces):
            name, why_not = "gradients in training mode", self._why_no_training()
            yield from self._try(name, why_not, check_gradients, bench, call, training=True)

    def _try(
        self, name: str, why_not: str, compare: Comparison, bench: Bench, call: Any, **mode: Any
    ) -> Iterator[float]:
        """Compare the models in one situation and yield the error, if there is one.

        Nothing is yielded where the original cannot run or ``compare`` measures no error. The
        situation is noted in ``compared`` or ``left_out``.

        Parameters
        ----------
        name:
            The name of the situation.
        why_not:
            The reason why it cannot be compared; empty if it can.
        compare:
            The method or function of a bench that compares.
        bench, call, mode:
            Its arguments.

        Raises
        ------
        VerificationError
            If the pruned model fails or differs.
        """
        if bench.dtype is not self.dtype:
            name += ", in float32"
        if why_not:
            self.left_out.append(f"{name}: {why_not}")
            return
        outcome = self._outcome(name, compare, bench, call, **mode)
        if isinstance(outcome, Outcome):
            self._note(name, outcome)
            if not outcome.error <= bench.limit:
                raise VerificationError(
                    f"{name}: the pruned model differs from the masked original by "
                    f"{outcome.error:.1e}, relative. Modules in keep= are left as they are."
                )
            # Rounding in float32 says nothing about the other situations, so it is not reported.
            yield outcome.error if bench.dtype is self.dtype else 0.0
        elif outcome is not None:
            self.compared.append(name)

    def _outcome(
        self, name: str, compare: Comparison, bench: Bench, call: Any, **mode: Any
    ) -> Outcome | int | None:
        """Return what ``compare`` gives; None if the models cannot be compared."""
        try:
            return compare_in_some_dtype(compare, bench, call, **mode)
        except (RefusedError, GuardedError, NotFiniteError) as error:
            self.left_out.append(f"{name}: {error}")
        except PrunedFailsError as error:
            raise VerificationError(
                f"{name}: the pruned model fails where the original runs: {error}."
            ) from error
        except VerificationError as error:
            if not bench.both_vary(call, training=mode.get("training", False)):
                raise VerificationError(f"{name}: {error}") from error
            self.left_out.append(
                f"{name}: both models do something else when they are called again on the "
                "same inputs"
            )
        return None

    def _compare_sizes(
        self, bench: Bench, inputs: Call, enough: int
    ) -> Iterator[tuple[float, Call]]:
        """Yield the error and the inputs of other input sizes, ``enough`` of them at most.

        Sizes that the original refuses do not count.
        """
        taken, before = 0, len(self.left_out)
        for text, call in itertools.islice(other_sizes(inputs), _SIZES_TRIED):
            for error in self._try(f"another size ({text})", "", Bench.compare, bench, call):
                yield error, call
                taken += 1
            if taken == enough:
                break
        # One reason is enough, and none is needed if another size was compared.
        del self.left_out[before + (0 if taken else 1) :]

    def _note(self, name: str, outcome: Outcome) -> None:
        self.compared.append(name)
        for note in outcome.notes:
            self.left_out.append(f"{name}: instead of the original's own code, {note}")

    def _why_no_training(self) -> str:
        """Return why training mode cannot be compared; an empty text if it can."""
        both = {trace.path for trace in self.coupling.traces if trace.training}
        for trace in self.coupling.traces:
            if trace.asked_mode and not trace.training and trace.path not in both:
                return "only the path of evaluation was traced"
        return ""

    # -- the example itself

    def _run_example(self) -> None:
        """Run the pruned model on the unchanged example, on its own device and in its own dtype.

        Raises
        ------
        VerificationError
            If it fails where the original runs, or gives other shapes or dtypes.
        """
        why_not = self._why_no_example()
        if why_not:
            self.left_out.append(f"the example itself: {why_not}")
            return
        try:
            wanted = kinds(self._call(self.model))
        except Exception as error:
            self.left_out.append(f"the example itself: {describe_error(error)}")
            return
        try:
            found = kinds(self._call(self.pruned))
        except Exception as error:
            raise VerificationError(
                "the pruned model fails on the example, where the original runs: "
                f"{describe_error(error)}."
            ) from error
        if not self._are_alike(found, wanted):
            raise VerificationError(
                f"on the example the pruned model gives {', '.join(found)}, the original "
                f"{', '.join(wanted)}."
            )
        self.compared.append("the example itself")

    def _why_no_example(self) -> str:
        """Return why the example cannot be run as it is; an empty text if it can."""
        if any(leaf.is_meta for leaf in tensors_of(self.call)):
            return "only its shapes are known"
        return describe_conversion(self.model, self.pruned)

    def _are_alike(self, found: list[str], wanted: list[str]) -> bool:
        """Tell whether the outputs of both models have the same shapes and dtypes.

        Python code between parts may make sizes depend on values, and this original is not masked.
        With the masked original, sizes have been compared already.
        """
        if self.coupling.parts:
            return [*map(without_sizes, found)] == [*map(without_sizes, wanted)]
        return found == wanted

    def _call(self, model: nn.Module) -> Any:
        args, kwargs = clone(self.call)
        with seeded(self.seed), restoring_draws(Reached(self.model)), torch.no_grad():
            return put_in_mode(plain_copy(model), False)(*args, **kwargs)


_WEIGHTS = "the weights themselves"

_SIZES_TRIED = 12
"""The largest number of other input sizes to try."""

_LONG = 3e8
"""The number of MACs above which a model takes long."""


def _size_of_call(call: Call) -> int:
    return sum(leaf.numel() for leaf in tensors_of(call))
