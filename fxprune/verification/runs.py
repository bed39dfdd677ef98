"""One run of each model on the same values, and what comes out of them."""

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
from fxprune.verification.copies import cut, mask, original, smaller
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
    said,
)
from fxprune.verification.structure import is_guard

__all__ = ["Run", "Runs", "taken"]


@contextmanager
def _composites_whole() -> Iterator[None]:
    """Without gradients; composite operations arrive whole.

    Not ``torch.inference_mode()``: there some versions of torch give the transforms of
    ``torch.func`` other gradients.
    """
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        yield


@dataclass
class Run:
    """What a run gives: outputs of the parts and of the model, its buffers after it, the numbers
    it drew, and dropout's shares.
    """

    outputs: list[Any] = field(default_factory=list)
    form: Any = None  # of the model's output; None where it is not the model's own
    buffers: dict[str, Tensor] = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)
    dropped: list[float] = field(default_factory=list)
    state: Any = None  # of the generators that Python code draws from

    def take(self, out: Any) -> None:
        """The model's own output."""
        self.outputs.append(taken(out))
        self.form = form(out)


def taken(out: Any) -> list[Any]:
    """The leaves of an output, as they are now."""
    return [dense(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves(out)]


def _buffers(model: nn.Module, held: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """What buffers hold; of those that were ``held`` before, if they are given, and have not been
    exchanged.
    """
    return {
        name: own.clone()
        for name, own in model.named_buffers()
        if held is None or held.get(name) is own
    }


class Runs:
    """Both models, with one choice of weights in one dtype, and how each is run.

    Parameters
    ----------
    values:
        The original's tensors, by name. They become its own: what is removed is overwritten with
        zeros.
    own:
        The pruned model runs on its own tensors instead of the survivors of these.
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
        # names of the tensors that forward has written so far, in either model
        self.written: set[str] = set()
        self._modes: dict[str, bool] = {}
        self._reached = Reached(model)

    @property
    def dtype(self) -> torch.dtype:
        """In which both run."""
        return next(
            (value.dtype for value in self.masked.values() if value.is_floating_point()),
            torch.get_default_dtype(),
        )

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Every run draws the same random numbers, also from generators that the model has of its
        own.
        """
        with seeded(self.seed), undrawn_by(self._reached):
            yield

    @contextmanager
    def _undone(self, model: nn.Module) -> Iterator[None]:
        """What a run writes into the model's tensors is undone: its parameters share their memory
        with those of other runs.
        """
        undone = Undone(named_tensors(model))
        try:
            with undone.afterwards():
                yield
        finally:
            self.written |= undone.written

    def _own(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Values in the memory of all runs, but for those that a run would write."""
        return {
            name: value.clone() if name in self.written else value
            for name, value in values.items()
        }

    def original(self, training: bool) -> nn.Module:
        """The user's model with zeros at what is removed, in the mode that its own train() gives
        each module.
        """
        model = original(self.model, self._own(self.masked), self.dtype)
        in_mode(model, training)
        self._modes = {
            name: module.training for name, module in model.named_modules(remove_duplicate=False)
        }
        return model

    def _followed(self, calls: Sequence[Call], training: bool, constant: bool) -> Run:
        """The user's own code."""
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
                raise RefusedError(said(error)) from error
            run.state = python_state()
            # One that forward exchanges for another is a cache: the graph computes it (see
            # fxprune.trace.module_state).
            run.buffers = _buffers(model, held) if training else {}
        return run

    def _graph(self, calls: Sequence[Call], training: bool, constant: bool) -> Run:
        """The traced graph; where there are parts, in the user's code around them."""
        graph = GraphRun(
            self.coupling, self.survivors, self.masked, training=training, constant=constant
        )
        run = Run(draws=graph.draws, dropped=graph.dropped)
        calls, model = clone(calls), self.original(training)

        def part(path: str, instead: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            out = graph.run(path, args, kwargs)
            run.outputs.append(clone(self._cut(path, out)))
            return clone(out)  # what Python may write into

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
                raise RefusedError(said(error)) from error
        return run

    def _parts(
        self, model: nn.Module, instead: Callable[..., Any]
    ) -> AbstractContextManager[None]:
        """While calls of the parts go to a function; see :func:`intercepted`."""
        return (
            intercepted(model, self.coupling.parts, instead)
            if self.coupling.parts
            else nullcontext()
        )

    def _cut(self, path: str, out: Any) -> list[Any]:
        """What is left of a part's outputs, as the pruned model's part gives them."""
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
        """The pruned model, in the mode that its own train() gives each module: it must be the
        original's.
        """
        model = smaller(self.pruned, self._own(self.kept), self.dtype)
        in_mode(model, training)
        for name, module in model.named_modules(remove_duplicate=False):
            if module.training is not self._modes.get(name, module.training):
                raise VerificationError(
                    f"train({training}) gives {name!r} another mode in the pruned model than in "
                    "the original."
                )
        return model

    def failure(self, model: nn.Module, error: Exception) -> PrunedFailsError | GuardedError:
        """What an error of the pruned model says."""
        return (
            GuardedError(str(error))
            if is_guard(error, model, self.coupling)
            else PrunedFailsError(said(error))
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
