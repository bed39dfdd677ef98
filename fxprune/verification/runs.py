"""Runs of both models on the same values, and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import leaves, named_tensors
from fxprune.common.hooks import put_in_mode
from fxprune.common.random_state import seeded
from fxprune.coupling import Coupling
from fxprune.coupling.parts import intercepted
from fxprune.errors import FxpruneError, VerificationError
from fxprune.inputs import Call
from fxprune.rewrite import Survivors
from fxprune.trace.aliasing import UndoWrites
from fxprune.trace.reach import Reached, restoring_draws
from fxprune.verification.comparing import dense, form
from fxprune.verification.copies import copy_original, copy_pruned, cut, mask
from fxprune.verification.dtypes import DtypeMode
from fxprune.verification.graph import GraphRun
from fxprune.verification.modes import (
    Draw,
    MismatchError,
    NotFollowedError,
    RecordingMode,
    ReplayMode,
    clone,
    events_of,
    lose_elements,
    python_state,
)
from fxprune.verification.outcomes import (
    GuardedError,
    PrunedFailsError,
    RefusedError,
    describe_error,
)
from fxprune.verification.structure import is_guard
from fxprune.verification.values import dtype_of

__all__ = ["Run", "Runs", "Situation", "copy_leaves"]


@contextmanager
def _composites_whole() -> Iterator[None]:
    """Turn gradients off, and let modes see composite operations before they are decomposed.

    ``torch.inference_mode()`` would do the same, but under it some versions of torch compute other
    gradients in the transforms of ``torch.func``.
    """
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield


@contextmanager
def _converted_errors(convert: Callable[[Exception], Exception]) -> Iterator[None]:
    """Convert the errors of a model's code; let those of the proof and of fxprune pass."""
    try:
        yield
    except (NotFollowedError, MismatchError, FxpruneError):
        raise
    except Exception as error:
        raise convert(error) from error


def _refusal(error: Exception) -> RefusedError:
    return RefusedError(describe_error(error))


@dataclass(frozen=True)
class Situation:
    """The calls of a run, and the way in which they are made.

    Attributes
    ----------
    calls:
        The arguments of each call. Each call sees what the one before has written into the model.
    training:
        Whether the model is in training mode.
    constant:
        Whether one number replaces all random ones.
    """

    calls: Sequence[Call]
    training: bool = False
    constant: bool = False


@dataclass
class Run:
    """The result of one run.

    Attributes
    ----------
    outputs:
        The outputs of the parts and the leaves of the model's output, in order.
    form:
        The form of the model's output (:func:`~fxprune.verification.comparing.form`). None if the
        traced graph ran, which does not keep it.
    buffers:
        The buffers after a run in training mode, by name.
    draws:
        The random numbers that were drawn. Empty for the pruned model, which replays them.
    dropped:
        The rate of each dropout, in order. Dropout itself is off.
    deciding:
        Pairs of tensors that decide what is drawn: the pruned model's, and the original's. Only
        for runs of the pruned model.
    state:
        The state of the generators of Python and NumPy after the run.
    notes:
        What ran instead of the original's own code, and why. Empty if that code ran.
    """

    outputs: list[Any] = field(default_factory=list)
    form: Any = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    deciding: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    state: Any = None
    notes: tuple[str, ...] = ()

    def record(self, out: Any) -> None:
        """Record the model's output and its form."""
        self.outputs.append(copy_leaves(out))
        self.form = form(out)


def copy_leaves(out: Any) -> list[Any]:
    """Return the leaves of an output, with tensors copied so that later writes do not show."""
    return [dense(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves(out)]


def _copy_buffers(
    model: nn.Module, before: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return copies of a model's buffers by name.

    With ``before``, the buffers before the run, leave out those that are other tensors now.
    """
    copies: dict[str, Tensor] = {}
    for name, buffer in model.named_buffers():
        if before is None or before.get(name) is buffer:
            copies[name] = buffer.clone()
    return copies


class Runs:
    """Runs of both models with one choice of weights in one dtype.

    Parameters
    ----------
    model:
        The original.
    pruned:
        The pruned model.
    coupling:
        The analysis of the original.
    survivors:
        The elements that the plan keeps.
    values:
        The original's tensors by name. Removed elements are overwritten with zeros.
    own_values:
        Whether the pruned model runs on its own tensors instead of the survivors of ``values``.
    seed:
        The seed of the random numbers that the models draw.

    Attributes
    ----------
    masked:
        The masked original's tensors by name.
    kept:
        The pruned model's tensors by name; empty with ``own_values``.
    events:
        The analysis's events by the prefix of their graph (:func:`events_of`).
    has_statistics:
        Whether an operation takes statistics that lose elements.
    written:
        The names of the tensors that forward has written so far, in either model.
    """

    def __init__(
        self,
        model: nn.Module,
        pruned: nn.Module,
        coupling: Coupling,
        survivors: Survivors,
        values: Mapping[str, Tensor],
        *,
        own_values: bool,
        seed: int,
    ) -> None:
        self.model, self.pruned, self.seed = model, pruned, seed
        self.coupling, self.survivors = coupling, survivors
        self.own_values = own_values
        self.kept = {} if own_values else cut(pruned, coupling, survivors, values)
        mask(coupling, survivors, values)
        self.masked = values
        self.events = events_of(coupling)
        by_graph = self.events.values()
        self.has_statistics = any(lose_elements(events, survivors) for events in by_graph)
        self.written: set[str] = set()
        self._modes: dict[str, bool] = {}  # whether each module of the original trains
        self._reached = Reached(model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which both models run."""
        return dtype_of(self.masked.values())

    @contextmanager
    def same_draws(self) -> Iterator[None]:
        """Let a run draw the same random numbers as every other run.

        This includes numbers from generators that the model itself holds.
        """
        with seeded(self.seed), restoring_draws(self._reached):
            yield

    @contextmanager
    def _undo_writes(self, model: nn.Module) -> Iterator[None]:
        """Undo what a run writes into the model's tensors, and note their names.

        The parameters share their memory with those of other runs.
        """
        undone = UndoWrites(named_tensors(model))
        try:
            with undone.undoing():
                yield
        finally:
            self.written |= undone.written

    @contextmanager
    def _running(
        self, model: nn.Module, gradients_off: AbstractContextManager[None]
    ) -> Iterator[None]:
        """Let a model run like every other one, and undo what it writes."""
        with (
            self._undo_writes(model),
            self.same_draws(),
            gradients_off,
            DtypeMode(self.dtype),
        ):
            yield

    def _shared(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values, with copies of those that forward is known to write."""
        shared: dict[str, Tensor] = {}
        for name, value in values.items():
            shared[name] = value.clone() if name in self.written else value
        return shared

    def masked_copy(self, training: bool) -> nn.Module:
        """Return a copy of the original with removed elements at zero.

        The model's own ``train()`` or ``eval()`` sets the mode of its modules.
        """
        model = copy_original(self.model, self._shared(self.masked), self.dtype)
        put_in_mode(model, training)
        modules = model.named_modules(remove_duplicate=False)
        self._modes = {name: module.training for name, module in modules}
        return model

    def _run_original(self, situation: Situation) -> Run:
        """Run the masked original as the user's own code.

        Raises
        ------
        NotFollowedError
            If the run does not execute the traced operations.
        RefusedError
            If the user's code fails.
        """
        model = self.masked_copy(situation.training)
        mode = RecordingMode(self.events, self.survivors, situation.training, situation.constant)
        run, before = Run(draws=mode.draws, dropped=mode.dropped), dict(model.named_buffers())

        def run_part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            """Run the part's own code and record its outputs."""
            with mode.expecting(path):
                out = call()
            run.outputs.append(clone(self._cut_outputs(path, out)))
            return out

        calls, parts = clone(situation.calls), self.coupling.parts
        with self._running(model, _composites_whole()), mode:
            with _converted_errors(_refusal):
                for args, kwargs in calls:
                    with self._intercepted(model, run_part) if parts else mode.expecting(""):
                        run.record(model(*args, **kwargs))
            run.state = python_state()
            # A buffer that forward replaces is a cache, which the graph computes (see
            # fxprune.trace.module_state).
            run.buffers = _copy_buffers(model, before) if situation.training else {}
        return run

    def _run_graph(self, situation: Situation) -> Run:
        """Run the traced graph on the masked original's values.

        If the model was traced in parts, the user's code around them runs.

        Raises
        ------
        RefusedError
            If the graph or the user's code fails.
        """
        training, constant = situation.training, situation.constant
        graph = GraphRun(
            self.coupling, self.survivors, self.masked, training=training, constant=constant
        )
        run = Run(draws=graph.draws, dropped=graph.dropped)
        calls, model = clone(situation.calls), self.masked_copy(training)

        def run_part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            """Run the part's graph instead of its code, and record its outputs."""
            out = graph.run(path, args, kwargs)
            run.outputs.append(clone(self._cut_outputs(path, out)))
            return clone(out)  # Python code may write into it

        running, parts = self._running(model, torch.no_grad()), self.coupling.parts
        try:
            with running, self._intercepted(model, run_part), _converted_errors(_refusal):
                for args, kwargs in calls:
                    out = model(*args, **kwargs) if parts else graph.run("", args, kwargs)
                    run.outputs.append(copy_leaves(out))
        except NotFollowedError as error:
            raise RefusedError(str(error)) from error
        return run

    def _intercepted(
        self, model: nn.Module, run_part: Callable[..., Any]
    ) -> AbstractContextManager[None]:
        """Send calls of the model's parts to a function; see :func:`intercepted`."""
        if not self.coupling.parts:
            return nullcontext()
        return intercepted(model, self.coupling.parts, run_part)

    def _cut_outputs(self, path: str, out: Any) -> list[Any]:
        """Return a part's outputs as the pruned model's part gives them.

        A tensor that Python code between the parts reads keeps its full size.
        """
        trace = next(trace for trace in self.coupling.traces if trace.path == path)
        found, traced = [*leaves(out)], [*leaves(trace.outputs)]
        if len(found) != len(traced):
            return found
        kept = []
        for leaf, labelled in zip(found, traced, strict=True):
            is_cut = isinstance(leaf, Tensor) and not self.coupling.wide_dims(labelled)
            kept.append(self.survivors.take(labelled, leaf) if is_cut else leaf)
        return kept

    def pruned_copy(self, training: bool) -> nn.Module:
        """Return a copy of the pruned model with the surviving values.

        The model's own ``train()`` or ``eval()`` sets the mode of its modules.

        Raises
        ------
        VerificationError
            If a module's mode differs from that in the original.
        """
        model = copy_pruned(self.pruned, self._shared(self.kept), self.dtype)
        put_in_mode(model, training)
        for name, module in model.named_modules(remove_duplicate=False):
            if module.training is not self._modes.get(name, module.training):
                raise VerificationError(
                    f"train({training}) gives {name!r} another mode in the pruned model than in "
                    "the original."
                )
        return model

    def pruned_failure(
        self, model: nn.Module, error: Exception
    ) -> PrunedFailsError | GuardedError:
        """Return the error to raise for an error of the pruned model."""
        if is_guard(error, model, self.coupling):
            return GuardedError(str(error))
        return PrunedFailsError(describe_error(error))

    def _run_pruned(self, situation: Situation, draws: list[Draw]) -> Run:
        """Run the pruned model with the random numbers that the original drew.

        Raises
        ------
        PrunedFailsError, GuardedError
            If the model fails.
        MismatchError
            If it does not draw the same random numbers.
        """
        model = self.pruned_copy(situation.training)
        mode = ReplayMode(draws, self.survivors, situation.constant)
        run = Run(dropped=mode.dropped, deciding=mode.compared)

        def run_part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            """Run the pruned part and record its outputs."""
            out = call()
            run.outputs.append(clone([*leaves(out)]))
            return out

        calls, running = clone(situation.calls), self._running(model, _composites_whole())
        with running, self._intercepted(model, run_part), mode:
            with _converted_errors(lambda error: self.pruned_failure(model, error)):
                for args, kwargs in calls:
                    run.record(model(*args, **kwargs))
            run.state = python_state()
            run.buffers = _copy_buffers(model) if situation.training else {}
        if mode.pending:
            raise MismatchError(
                f"the pruned model draws {len(mode.pending)} numbers fewer than the original"
            )
        return run
