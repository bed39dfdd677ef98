"""Runs of both models on the same values, and their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import leaves, named_tensors
from fxprune.common.hooks import in_mode
from fxprune.common.random_state import seeded
from fxprune.coupling import Coupling
from fxprune.coupling.parts import intercepted
from fxprune.errors import FxpruneError, VerificationError
from fxprune.inputs import Call
from fxprune.rewrite import Survivors
from fxprune.trace.aliasing import Undone
from fxprune.trace.reach import Reached, undrawn_by
from fxprune.verification.comparing import dense, form
from fxprune.verification.copies import copy_original, copy_pruned, cut, mask
from fxprune.verification.graph import GraphRun
from fxprune.verification.modes import (
    Draw,
    Followed,
    InDtype,
    MismatchError,
    NotFollowedError,
    Replayed,
    clone,
    events_of,
    python_state,
)
from fxprune.verification.outcomes import (
    GuardedError,
    PrunedFailsError,
    RefusedError,
    describe_error,
)
from fxprune.verification.structure import is_guard

__all__ = ["Run", "Runs", "taken"]


@contextmanager
def _composites_whole() -> Iterator[None]:
    """Turn gradients off, and let modes see composite operations before they are decomposed.

    ``torch.inference_mode()`` would do the same, but under it some versions of torch compute other
    gradients in the transforms of ``torch.func``.
    """
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield


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
    state:
        The state of the generators of Python and NumPy after the run.
    """

    outputs: list[Any] = field(default_factory=list)
    form: Any = None
    buffers: dict[str, Tensor] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    state: Any = None

    def take(self, out: Any) -> None:
        """Record the model's output and its form."""
        self.outputs.append(taken(out))
        self.form = form(out)


def taken(out: Any) -> list[Any]:
    """Return the leaves of an output, with tensors copied so that later writes do not show."""
    return [dense(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves(out)]


def _buffers(model: nn.Module, held: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Return copies of a model's buffers by name.

    With ``held``, the buffers before the run, leave out those that are other tensors now.
    """
    return {
        name: own.clone()
        for name, own in model.named_buffers()
        if held is None or held.get(name) is own
    }


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
    own:
        Whether the pruned model runs on its own tensors instead of the survivors of ``values``.
    seed:
        The seed of the random numbers that the models draw.

    Attributes
    ----------
    masked:
        The masked original's tensors by name.
    kept:
        The pruned model's tensors by name; empty with ``own``.
    events:
        The analysis's events by the prefix of their graph (:func:`events_of`).
    normalises:
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
        own: bool,
        seed: int,
    ) -> None:
        self.model, self.pruned, self.coupling, self.survivors, self.seed = (
            model,
            pruned,
            coupling,
            survivors,
            seed,
        )
        self.own = own
        self.kept = {} if own else cut(pruned, coupling, survivors, values)
        mask(coupling, survivors, values)
        self.masked = values
        self.events = events_of(coupling)
        self.normalises = any(
            not survivors.mask(event.gone).all()
            for own in self.events.values()
            for event in own
            if event.gone
        )
        self.written: set[str] = set()
        self._modes: dict[str, bool] = {}  # whether each module of the original trains
        self._reached = Reached(model)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which both models run."""
        return next(
            (value.dtype for value in self.masked.values() if value.is_floating_point()),
            torch.get_default_dtype(),
        )

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let a run draw the same random numbers as every other run.

        This includes numbers from generators that the model itself holds.
        """
        with seeded(self.seed), undrawn_by(self._reached):
            yield

    @contextmanager
    def _undone(self, model: nn.Module) -> Iterator[None]:
        """Undo what a run writes into the model's tensors, and note their names.

        The parameters share their memory with those of other runs.
        """
        undone = Undone(named_tensors(model))
        try:
            with undone.afterwards():
                yield
        finally:
            self.written |= undone.written

    def _own(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the values, with copies of those that forward is known to write."""
        return {
            name: value.clone() if name in self.written else value
            for name, value in values.items()
        }

    def original(self, training: bool) -> nn.Module:
        """Return a copy of the original with removed elements at zero.

        The model's own ``train()`` or ``eval()`` sets the mode of its modules.
        """
        model = copy_original(self.model, self._own(self.masked), self.dtype)
        in_mode(model, training)
        self._modes = {
            name: module.training for name, module in model.named_modules(remove_duplicate=False)
        }
        return model

    def _followed(self, calls: Sequence[Call], training: bool, constant: bool) -> Run:
        """Run the masked original as the user's own code.

        Raises
        ------
        NotFollowedError
            If the run does not execute the traced operations.
        RefusedError
            If the user's code fails.
        """
        model = self.original(training)
        mode, held = (
            Followed(self.events, self.survivors, training, constant),
            dict(model.named_buffers()),
        )
        run = Run(draws=mode.draws, dropped=mode.dropped)

        def part(path: str, instead: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            with mode.inside(path):
                out = instead()
            run.outputs.append(clone(self._cut(path, out)))
            return out

        calls = clone(calls)
        with self._undone(model), self.drawing(), _composites_whole(), InDtype(self.dtype), mode:
            try:
                for args, kwargs in calls:
                    with self._parts(model, part) if self.coupling.parts else mode.inside(""):
                        run.take(model(*args, **kwargs))
            except (NotFollowedError, FxpruneError):
                raise
            except Exception as error:
                raise RefusedError(describe_error(error)) from error
            run.state = python_state()
            # A buffer that forward replaces is a cache, which the graph computes (see
            # fxprune.trace.module_state).
            run.buffers = _buffers(model, held) if training else {}
        return run

    def _graph(self, calls: Sequence[Call], training: bool, constant: bool) -> Run:
        """Run the traced graph on the masked original's values.

        If the model was traced in parts, the user's code around them runs.

        Raises
        ------
        RefusedError
            If the graph or the user's code fails.
        """
        graph = GraphRun(
            self.coupling, self.survivors, self.masked, training=training, constant=constant
        )
        run = Run(draws=graph.draws, dropped=graph.dropped)
        calls, model = clone(calls), self.original(training)

        def part(path: str, instead: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            out = graph.run(path, args, kwargs)
            run.outputs.append(clone(self._cut(path, out)))
            return clone(out)  # Python code may write into it

        with (
            self._undone(model),
            self.drawing(),
            torch.no_grad(),
            InDtype(self.dtype),
            self._parts(model, part),
        ):
            try:
                for args, kwargs in calls:
                    out = (
                        model(*args, **kwargs)
                        if self.coupling.parts
                        else graph.run("", args, kwargs)
                    )
                    run.outputs.append(taken(out))
            except FxpruneError:
                raise
            except NotFollowedError as error:
                raise RefusedError(str(error)) from error
            except Exception as error:
                raise RefusedError(describe_error(error)) from error
        return run

    def _parts(
        self, model: nn.Module, instead: Callable[..., Any]
    ) -> AbstractContextManager[None]:
        """Send calls of the model's parts to a function; see :func:`intercepted`."""
        return (
            intercepted(model, self.coupling.parts, instead)
            if self.coupling.parts
            else nullcontext()
        )

    def _cut(self, path: str, out: Any) -> list[Any]:
        """Return a part's outputs as the pruned model's part gives them.

        A tensor that Python code between the parts reads keeps its full size.
        """
        trace = next(trace for trace in self.coupling.traces if trace.path == path)
        found, old = [*leaves(out)], [*leaves(trace.outputs)]
        if len(found) != len(old):
            return found
        cut = []
        for leaf, labelled in zip(found, old, strict=True):
            narrow = isinstance(leaf, Tensor) and not self.coupling.wide_dims(labelled)
            cut.append(self.survivors.take(labelled, leaf) if narrow else leaf)
        return cut

    def smaller(self, training: bool) -> nn.Module:
        """Return a copy of the pruned model with the surviving values.

        The model's own ``train()`` or ``eval()`` sets the mode of its modules.

        Raises
        ------
        VerificationError
            If a module's mode differs from that in the original.
        """
        model = copy_pruned(self.pruned, self._own(self.kept), self.dtype)
        in_mode(model, training)
        for name, module in model.named_modules(remove_duplicate=False):
            if module.training is not self._modes.get(name, module.training):
                raise VerificationError(
                    f"train({training}) gives {name!r} another mode in the pruned model than in "
                    "the original."
                )
        return model

    def failure(self, model: nn.Module, error: Exception) -> PrunedFailsError | GuardedError:
        """Return the error to raise for an error of the pruned model."""
        return (
            GuardedError(str(error))
            if is_guard(error, model, self.coupling)
            else PrunedFailsError(describe_error(error))
        )

    def _smaller(
        self, calls: Sequence[Call], training: bool, constant: bool, draws: list[Draw]
    ) -> tuple[Run, list[tuple[Tensor, Tensor]]]:
        model = self.smaller(training)
        mode = Replayed(draws, self.survivors, constant)
        run = Run(dropped=mode.dropped)

        def part(path: str, instead: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            out = instead()
            run.outputs.append(clone([*leaves(out)]))
            return out

        calls = clone(calls)
        with (
            self._undone(model),
            self.drawing(),
            _composites_whole(),
            InDtype(self.dtype),
            self._parts(model, part),
            mode,
        ):
            try:
                for args, kwargs in calls:
                    run.take(model(*args, **kwargs))
            except (MismatchError, FxpruneError):
                raise
            except Exception as error:
                raise self.failure(model, error) from error
            run.state = python_state()
            run.buffers = _buffers(model) if training else {}
        if mode.ahead:
            raise MismatchError(
                f"the pruned model draws {len(mode.ahead)} numbers fewer than the original"
            )
        return run, mode.compared
