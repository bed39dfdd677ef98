"""The whole proof, situation by situation."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fxprune.common.contents import named_tensors, tensors_of
from fxprune.common.hooks import in_mode
from fxprune.common.public import public
from fxprune.common.random_state import seeded
from fxprune.coupling import Coupling
from fxprune.errors import FxpruneError, VerificationError
from fxprune.inputs import Call, as_call
from fxprune.resized import other_batch, other_sizes
from fxprune.result.plan import Plan, unpack_inputs
from fxprune.rewrite import Survivors
from fxprune.trace.reach import Reached, undrawn_by
from fxprune.verification.bench import Bench
from fxprune.verification.comparing import NotFiniteError, kinds
from fxprune.verification.copies import plain_copy
from fxprune.verification.gradients import check_gradients
from fxprune.verification.modes import clone
from fxprune.verification.outcomes import (
    LIMITS,
    GuardedError,
    Outcome,
    PrunedFailsError,
    RefusedError,
    RoundingError,
    describe_error,
)
from fxprune.verification.structure import check_emission
from fxprune.verification.values import choices, inputs_of, to_float32, weights_of
from fxprune.verification.weights import changed_tensors

__all__ = ["Verification", "check"]


@public
@dataclass(frozen=True)
class Verification:
    """The result of a proof.

    Attributes
    ----------
    error:
        The relative error ``||out - reference|| / ||reference||``, the largest over the outputs
        and over all compared situations. NaN if only the structure was checked.
    outputs:
        The number of output tensors compared for the example.
    dtype:
        The dtype in which both models ran: float32 if an operation of the model does not support
        float64.
    compared:
        The situations in which both models agree.
    left_out:
        The situations that could not be compared, each with the reason, and those in which the
        traced graph ran instead of the original's code.
    """

    error: float
    outputs: int
    dtype: torch.dtype
    compared: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """The largest error that still counts as rounding in this dtype."""
        return LIMITS.get(self.dtype, LIMITS[torch.float32])

    def __str__(self) -> str:
        return (
            f"relative error {self.error:.1e} over {self.outputs} outputs in "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


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
    try:
        survivors = Survivors(coupling, kept)
        check_emission(pruned, coupling, survivors)
        if not numeric:
            return Verification(float("nan"), 0, dtype)
        call = unpack_inputs(plan.inputs) if example_inputs is None else as_call(example_inputs)
        weights = changed_tensors(model, pruned, coupling, survivors)
        if fresh and weights:
            raise VerificationError(f"{next(iter(weights.values()))[0]}.")
        return _Proof(model, pruned, coupling, survivors, call, randomize, seed).run(
            dtype, weights
        )
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

    def run(self, dtype: torch.dtype, weights: Mapping[str, tuple[str, float]]) -> Verification:
        bench, inputs, outcome = self._first(dtype)
        self.dtype = bench.dtype
        found = Verification(outcome.error, outcome.outputs, bench.dtype)
        self._note("the example's sizes", outcome)
        if outcome.error <= found.limit:
            worst = [outcome.error, *self._situations(bench, inputs), *self._weights(weights)]
            found = replace(found, error=max(worst))
        return replace(found, compared=tuple(self.compared), left_out=tuple(self.left_out))

    def _weights(self, changed: Mapping[str, tuple[str, float]]) -> Iterator[float]:
        """Note whether the pruned model's own weights are those that the plan leaves.

        Yield their error if the proof uses the models' own values.
        """
        if not changed:
            self.compared.append(_WEIGHTS)
            return
        first, more = next(iter(changed.values()))[0], len(changed) - 1
        others = f", and so have {more} more" if more else ""
        ran = (
            "both models ran on values drawn at random"
            if self.randomize
            else "the error says how far"
        )
        self.left_out.append(
            f"{_WEIGHTS}: {first}{others}: one of the models was trained since, or changed; {ran}"
        )
        if not self.randomize:
            yield max(error for _, error in changed.values())

    # -- values on which the original runs

    def _first(self, dtype: torch.dtype) -> tuple[Bench, Call, Outcome]:
        """Return the first values, in the first dtype, on which both models run, and the outcome.

        Raises
        ------
        VerificationError
            If there are none, or if the outputs differ in more than their values.
        """
        failed: Exception | None = None
        for own in (dtype, torch.float32) if dtype is torch.float64 else (dtype,):
            for bench, inputs in self._benches(own):
                try:
                    outcome = bench.compare(inputs)
                    if own is not dtype:
                        self.left_out.append(f"{dtype}: {failed}")
                    return bench, inputs, outcome
                except (RefusedError, NotFiniteError) as error:
                    failed = failed or error  # report the first values, which show the most
                except (PrunedFailsError, GuardedError) as error:
                    failed = error
                    break
                except VerificationError as error:
                    if bench.vary(inputs, training=False):
                        raise VerificationError(
                            "both models do something else when they are called again on the "
                            "same inputs, so that nothing can be compared."
                        ) from error
                    raise
        if isinstance(failed, VerificationError):
            raise failed
        if isinstance(failed, RoundingError):
            raise VerificationError(
                f"on values like the example's {failed}. Pass example_inputs on which it gives "
                "more."
            ) from failed
        if isinstance(failed, RefusedError):
            raise VerificationError(
                "the original itself fails on values like the example's, so that nothing can be "
                f"compared: {failed}. Pass example_inputs on which it runs."
            ) from failed
        raise VerificationError(
            f"the pruned model fails where the original runs: {failed}."
        ) from failed

    def _benches(self, dtype: torch.dtype) -> Iterator[tuple[Bench, Call]]:
        for choice in choices(self.randomize, self.call):
            values = weights_of(self.model, dtype, choice, self.seed)
            inputs = inputs_of(self.model, self.call, dtype, choice, self.seed)
            own = not self.randomize
            yield (
                Bench(
                    self.model,
                    self.pruned,
                    self.coupling,
                    self.survivors,
                    values,
                    own=own,
                    seed=self.seed,
                ),
                inputs,
            )

    # -- situations

    def _situations(self, bench: Bench, inputs: Call) -> Iterator[float]:
        """Yield the errors in all situations other than the example's sizes.

        A model that takes long runs on smaller inputs or in float32 where that is enough.
        """
        long = self.coupling.macs() > _LONG
        small = None
        self._as_given()
        if bench.written:
            yield from self._try("a second call", "", Bench.compare, bench, inputs, times=2)
        for error, call in self._resolutions(bench, inputs, 1 if long else 2):
            yield error
            small = call if _elements(call) < _elements(inputs) else small
        trained, quick = self._trains(), inputs if small is None or not long else small
        found = [*self._try("training mode", trained, Bench.compare, bench, quick, training=True)]
        if not found and quick is not inputs and not trained:
            # Small inputs may leave one value per channel, which has no variance: use the full
            # size instead.
            del self.left_out[-1]
            found += self._try(
                "training mode", trained, Bench.compare, bench, inputs, training=True
            )
        yield from found
        if long and quick is inputs:
            bench, quick = bench.single(), to_float32(inputs)
        batch = other_batch(quick)
        yield from self._try(
            "another batch", "" if batch else "no input has rows", Bench.compare, bench, batch
        )
        yield from self._try("gradients", "", check_gradients, bench, quick, training=False)
        if any(trace.training or trace.path for trace in self.coupling.traces):
            yield from self._try(
                "gradients in training mode", trained, check_gradients, bench, quick, training=True
            )

    def _try(
        self,
        name: str,
        why_not: str,
        compare: Callable[..., Any],
        bench: Bench,
        call: Any,
        **mode: Any,
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
        name += "" if bench.dtype is self.dtype else ", in float32"
        try:
            if why_not:
                raise RefusedError(why_not)
            try:
                outcome = compare(bench, call, **mode)
            except PrunedFailsError:
                if bench.dtype is not torch.float64:
                    raise
                # The model may create float32 tensors whatever dtype is asked for: try float32.
                outcome = compare(bench.single(), to_float32(call), **mode)
        except (RefusedError, GuardedError, NotFiniteError) as error:
            self.left_out.append(f"{name}: {error}")
            return
        except PrunedFailsError as error:
            raise VerificationError(
                f"{name}: the pruned model fails where the original runs: {error}."
            ) from error
        except VerificationError as error:
            if bench.vary(call, training=mode.get("training", False)):
                self.left_out.append(
                    f"{name}: both models do something else when they are called again on the "
                    "same inputs"
                )
                return
            raise VerificationError(f"{name}: {error}") from error
        if isinstance(outcome, Outcome):
            self._note(name, outcome)
            if not outcome.error <= bench.limit:
                raise VerificationError(
                    f"{name}: the pruned model differs from the masked original by "
                    f"{outcome.error:.1e}, relative. Modules in keep= are left as they are."
                )
            # Rounding in float32 says nothing about the other situations, so it is not reported.
            yield outcome.error if bench.dtype is self.dtype else 0.0
        else:
            self.compared.append(name)

    def _resolutions(
        self, bench: Bench, inputs: Call, enough: int
    ) -> Iterator[tuple[float, Call]]:
        """Yield the error and the inputs of other input sizes, ``enough`` of them at most.

        Sizes that the original refuses do not count.
        """
        taken, left = 0, len(self.left_out)
        for text, call in itertools.islice(other_sizes(inputs), _SIZES_TRIED):
            for error in self._try(f"another size ({text})", "", Bench.compare, bench, call):
                yield error, call
                taken += 1
            if taken == enough:
                break
        # One reason is enough, and none is needed if another size was compared.
        del self.left_out[left + (0 if taken else 1) :]

    def _note(self, name: str, outcome: Outcome) -> None:
        self.compared.append(name)
        self.left_out += [
            f"{name}: instead of the original's own code, {note}" for note in outcome.notes
        ]

    def _trains(self) -> str:
        """Return why training mode cannot be compared; an empty text if it can."""
        asked = [
            trace for trace in self.coupling.traces if trace.asked_mode and not trace.training
        ]
        both = {trace.path for trace in self.coupling.traces if trace.training}
        return (
            ""
            if all(trace.path in both for trace in asked)
            else "only the path of evaluation was traced"
        )

    # -- the example itself

    def _as_given(self) -> None:
        """Run the pruned model on the unchanged example, on its own device and in its own dtype.

        Raises
        ------
        VerificationError
            If it fails where the original runs, or gives other shapes or dtypes.
        """
        if any(leaf.is_meta for leaf in tensors_of(self.call)):
            self.left_out.append("the example itself: only its shapes are known")
            return
        moved = _moved(self.model, self.pruned)
        if moved:
            self.left_out.append(f"the example itself: {moved}")
            return
        try:
            wanted = kinds(self._called(self.model))
        except Exception as error:
            self.left_out.append(f"the example itself: {describe_error(error)}")
            return
        try:
            found = kinds(self._called(self.pruned))
        except Exception as error:
            raise VerificationError(
                "the pruned model fails on the example, where the original runs: "
                f"{describe_error(error)}."
            ) from error
        # Python code between parts may make sizes depend on values, and this original is not
        # masked. With the masked original, sizes have been compared already.
        if self.coupling.parts:
            alike = [_unsized(kind) for kind in found] == [_unsized(kind) for kind in wanted]
        else:
            alike = found == wanted
        if not alike:
            raise VerificationError(
                f"on the example the pruned model gives {', '.join(found)}, the original "
                f"{', '.join(wanted)}."
            )
        self.compared.append("the example itself")

    def _called(self, model: nn.Module) -> Any:
        args, kwargs = clone(self.call)
        with seeded(self.seed), undrawn_by(Reached(self.model)), torch.no_grad():
            return in_mode(plain_copy(model), False)(*args, **kwargs)


def _moved(model: nn.Module, pruned: nn.Module) -> str:
    """Return a text if the whole pruned model was moved to another dtype or device, else "".

    The example does not fit such a model.
    """
    old = {name: (tensor.dtype, tensor.device) for name, tensor in named_tensors(model).items()}
    pairs = {
        (old[name], (t.dtype, t.device))
        for name, t in named_tensors(pruned).items()
        if name in old
    }
    one = len({before for before, _ in pairs}) == len(pairs)
    return (
        "; ".join(
            f"{was[0]} on {was[1]} is {now[0]} on {now[1]} now" for was, now in pairs if was != now
        )
        if one
        else ""
    )


def _unsized(kind: str) -> tuple[str, int]:
    """Return the dtype and the number of commas of a text such as ``float32[2, 3]``.

    Two texts with the same result have the same dtype and, scalars aside, the same number of axes.
    """
    return kind.partition("[")[0], kind.count(",")


_WEIGHTS = "the weights themselves"

_SIZES_TRIED = 12
"""The largest number of other input sizes to try."""

_LONG = 3e8
"""The number of MACs above which a model takes long."""


def _elements(call: Call) -> int:
    return sum(leaf.numel() for leaf in tensors_of(call))
