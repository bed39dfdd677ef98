"""Runs a model for real, Python and all, and traces the modules that it calls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from fxprune.common.contents import leaves, leaves_of, tensors_of
from fxprune.common.dispatch import tensors_in
from fxprune.common.identity import IdentityMap
from fxprune.coupling.parts.calls import intercepted, unwatched
from fxprune.coupling.parts.exploring import Explored
from fxprune.coupling.parts.finder import shape_of
from fxprune.coupling.parts.python import PYTHON, RealMode, SizeReader, note_sizes
from fxprune.coupling.parts.questions import plain_sizes
from fxprune.coupling.parts.routes import Route, run_route
from fxprune.coupling.parts.width import Width
from fxprune.ops import Context, Record
from fxprune.trace import MetaCopy, Trace, trace
from fxprune.trace.aliasing import Undone
from fxprune.trace.tensors import map_leaves

__all__ = ["Parts"]


class Parts:
    """Runs a meta copy for real, Python and all, and traces the modules that it calls.

    Parameters
    ----------
    watch:
        Gives, for a prefix of node names, what nodes run under while they are traced (see
        :func:`fxprune.trace.trace`).
    """

    def __init__(self, meta_copy: MetaCopy, context: Context, watch: Callable[[str], Any]) -> None:
        self.meta_copy, self.context, self.watch = meta_copy, context, watch
        self.traces: dict[tuple[str, bool], Trace] = {}  # by path and whether for training
        self._stand_ins: IdentityMap[Tensor, Tensor] = IdentityMap()
        self.decided = ""  # the line at which Python takes out numbers that depend on weights
        self._by = "values"  # what it decides by
        self._read: list[Tensor] = []  # parameters that Python reads itself, outside of parts
        # tensors between parts: whether one gives it, whether it can be wide
        self._handed: list[tuple[Tensor, bool, bool]] = []

    def run(self, explored: Explored, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What the model returns for this call, and on each other route that its Python can
        take.
        """
        self._untrained, self.decided, self._by = explored.untrained, explored.decided, explored.by
        results = []
        for route in explored.routes:
            contractions = len(self.context.found.contractions)
            try:
                results.append(self._run(explored.parts, args, kwargs, route))
            except Exception:
                if not route.is_of_sizes:
                    raise
                self.decided, self._by = (
                    self.decided or f"inputs of other sizes, {route.sizes}",
                    "sizes of inputs",
                )
            # what is computed there is not what the example costs
            if route is not explored.routes[0]:
                del self.context.found.contractions[contractions:]
        self._leave_whole_what_training_may_call()
        inside = IdentityMap(
            (t, None)
            for path, _ in self.traces
            for t in _tensors_by_name(self.meta_copy.model.get_submodule(path))
        )
        read = IdentityMap((tensor, None) for tensor in self._read)
        for tensor in _tensors_by_name(self.meta_copy.model):
            record = self.context.record(tensor)
            if (tensor not in inside or tensor in read) and record is not None and record.fields:
                self._handed.append((tensor, True, False))
        # what a part shares with a module that has not run is read there as it is
        if self.decided:
            self._handed += [
                (tensor, True, False) for tensor in self._outside() if tensor in inside
            ]
        return results

    def _leave_whole_what_training_may_call(self) -> None:
        """Where training cannot be followed, modules that have not run may be called there, on
        whatever is between the parts.
        """
        if not self._untrained or not self.traces:
            return
        records = [
            self.context.record(tensor) for tensor in self._outside() if tensor.is_floating_point()
        ]
        if any(record is not None and record.unmet for record in records) and not self.decided:
            self.decided = "training, which the example cannot take"

    def _run(
        self, parts: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any], route: Route
    ) -> Any:
        real, mode = self.meta_copy.instance(), RealMode(self.context)
        undone = Undone(dict(real.named_parameters()))
        for own, stand_in in zip(
            _tensors_by_name(real), _tensors_by_name(self.meta_copy.model), strict=True
        ):
            mode.own[own] = stand_in
            record = self.context.record(stand_in)
            if record is not None:
                self.context.records[own] = record
        mode.memory.note([*mode.own], True)
        note_sizes(real, mode)

        def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            if not path:
                for tensor in tensors_of((args, kwargs)):
                    self.context.is_input(tensor)
                return NotImplemented
            args, kwargs = map_leaves(_as_number, (args, kwargs))
            mode.memory.meet(tensors_in(args, kwargs))
            with unwatched():
                traced = self._traced(path, args, kwargs, route.training)
            with (
                _disable_current_modes(),
                torch.inference_mode(),
                mode.paused(),
                undone.watching(),
            ):
                out = call()
            for leaf, stand_in in zip(leaves_of(out), leaves_of(traced.outputs), strict=True):
                if isinstance(leaf, Tensor):
                    self._handed.append((stand_in, True, True))
                    mode.carry(leaf, self.context.fields(stand_in))
            return out

        with undone.afterwards(), intercepted(real, {*parts, ""}, part):
            out = run_route(real, args, kwargs, route, SizeReader(mode), mode)[0]
        for leaf in leaves(out):
            _as_number(leaf)
            mode.memory.meet(tensors_in((leaf,), {}))
        self._read += mode.read
        return out

    def _outside(self) -> list[Tensor]:
        """The parameters and buffers of modules that are in no part."""
        paths = {path for path, _ in self.traces}
        modules = self.meta_copy.model.named_modules(remove_duplicate=False)
        own = [
            m
            for name, m in modules
            if not any(name == path or name.startswith(f"{path}.") for path in paths)
        ]
        return [
            t
            for m in own
            for t in (*m._parameters.values(), *m._buffers.values())
            if t is not None
        ]

    def settle(self) -> None:
        """Extend what Python sees at full width to all that goes with it; pin it where it cannot
        be handed out so.

        Where Python decides by values, or by sizes in a way that was not followed, parts may be
        called in another order and on other things than for the example. Then nothing is removed
        between them: a part whose inputs and outputs are whole does the right thing wherever it is
        called.
        """
        ctx = self.context
        for tensor, _, _ in self._handed if self.decided else ():
            ctx.node = PYTHON + self.decided
            ctx.pin_all(ctx.fields(tensor), f"passes Python code that decides by {self._by}")
        wide, before = (
            np.unique(
                np.concatenate(
                    [np.zeros(0, np.int64), *(ctx.units.live(a).ravel() for a in ctx.found.wide)]
                )
            ),
            -1,
        )
        wide = wide[wide > 0]
        while len(wide) != before:
            before = len(wide)
            for tensor, given, can in self._handed:
                fields = ctx.fields(tensor)
                if not any(np.isin(f.labels, wide).any() for f in fields):
                    continue
                for f in fields:
                    if not can or len(f.dims) > 1 or (given and not f.zero):
                        ctx.node = "python"
                        ctx.pin(f.labels, "is read in Python code that is not traced")
                    wide = np.union1d(wide, f.labels[f.labels > 0])
        ctx.found.wide = [wide]

    def _traced(self, path: str, args: Any, kwargs: Any, training: bool) -> Trace:
        """A call of a part, under labels: its graph for evaluation, or for training where that is
        another.
        """
        inputs = tree_map(self._stand_in, (args, kwargs))
        traced = self._follow(path, inputs, training=False)
        if traced.asked_mode:
            trained = self._follow(path, inputs, training=True)
            if self._untrained:
                self._give_alike(traced, trained)
            return trained if training else traced
        return traced

    def _follow(self, path: str, inputs: Any, training: bool) -> Trace:
        """Trace a call. The graph of the first one is emitted; what others read and give has to be
        laid out as there.
        """
        ctx = self.context
        before, ctx.found.ran = ctx.found.ran, {}
        watch = self.watch(f"{path}:train." if training else f"{path}:")
        traced = replace(
            trace(self.meta_copy.part(path), *inputs, watch=watch, training=training), path=path
        )
        first = self.traces.setdefault((path, training), traced)
        if first is not traced:
            self._laid_out_alike(first, traced)
        ctx.found.ran = {**before, **ctx.found.ran} if first is traced else before
        for value in traced.placeholders:
            self._handed += [
                (leaf, False, isinstance(value, Tensor)) for leaf in tensors_of(value)
            ]
        return traced

    def _give_alike(self, traced: Trace, trained: Trace) -> None:
        """Python that was not followed in training gets there what it gets in evaluation, or the
        whole of what it gets.
        """
        self.context.node = f"{trained.prefix}output"
        self._unite([own.outputs for own in (traced, trained)], "is given in training only")

    def _laid_out_alike(self, first: Trace, again: Trace) -> None:
        """One graph stands for all calls of a part: what it takes and gives keeps the same
        positions in each of them.
        """
        self.context.node = f"{first.prefix}output"
        self._unite(
            [(own.placeholders, own.outputs) for own in (first, again)],
            "is laid out in another way in another call",
        )

    def _unite(self, both: Sequence[Any], why: str) -> None:
        """Unite the labels of two values leaf by leaf; pin them where they are laid out in two
        ways.
        """
        ctx, (ones, others) = self.context, map(leaves_of, both)
        for one, other in itertools.zip_longest(ones, others):
            fields, theirs = ctx.fields(one), ctx.fields(other)
            if [f.labels.shape for f in fields] == [f.labels.shape for f in theirs]:
                for f, g in zip(fields, theirs, strict=True):
                    ctx.unite(f.labels, g.labels)
            else:
                ctx.pin_all([*fields, *theirs], why)

    def _stand_in(self, real: Any) -> Any:
        if not isinstance(real, Tensor):
            return real
        if real not in self._stand_ins:
            self._stand_ins[real] = shape_of(real)
        made = self._stand_ins[real]
        fields = self.context.fields(real)
        self.context.carry_causes([real], [made])
        if fields:
            self.context.records[made] = Record(made, list(fields))
        return made


def _as_number(leaf: Any) -> Any:
    """A width that a part is called with, or that the model gives, is a number, and no other one
    in the smaller model.
    """
    return leaf.told() if type(leaf) is Width else plain_sizes(leaf)


def _tensors_by_name(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, one for each name."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return [tensor for _, tensor in named]
