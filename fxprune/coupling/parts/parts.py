"""Labelled runs of a model that cannot be traced whole: its parts are traced when called."""

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
    """Labelled runs of a model on data, in which each part is traced when Python code calls it.

    Parameters
    ----------
    meta_copy:
        The model.
    context:
        Holds the labels.
    watch:
        Gives, for a prefix of node names, the ``watch`` function of :func:`fxprune.trace.trace`.

    Attributes
    ----------
    traces:
        (path of a part, whether for training) -> its graph.
    decided:
        The line at which Python code may go another way, so that nothing between parts is removed;
        empty if there is none.
    """

    def __init__(self, meta_copy: MetaCopy, context: Context, watch: Callable[[str], Any]) -> None:
        self.meta_copy, self.context, self.watch = meta_copy, context, watch
        self.traces: dict[tuple[str, bool], Trace] = {}
        # tensor with data -> meta tensor that parts are traced with
        self._stand_ins: IdentityMap[Tensor, Tensor] = IdentityMap()
        self.decided = ""
        self._by = "values"  # what the line in ``decided`` decides by
        self._read: list[Tensor] = []  # parameters that Python code reads outside of parts
        # tensors between parts: the tensor, whether a part or the model itself gives it, whether
        # it can be passed on at full width
        self._handed: list[tuple[Tensor, bool, bool]] = []

    def run(self, explored: Explored, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """Run the model on each route that its Python code can take.

        Parameters
        ----------
        explored:
            The parts and the routes of the model.
        args, kwargs:
            The arguments of the example's call.

        Returns
        -------
        list
            What the model returns on each route. Routes for inputs of other sizes may fail, and
            are then missing.
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
            # only the first route counts as costs of the example
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
        # A module that has not run may read parameters that it shares with a part as they are.
        if self.decided:
            self._handed += [
                (tensor, True, False) for tensor in self._outside() if tensor in inside
            ]
        return results

    def _leave_whole_what_training_may_call(self) -> None:
        """Keep tensors between parts whole if training mode may call modules that have not run.

        That is possible only where training mode cannot be followed.
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
        """Run the model on one route under labels, and return its result."""
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
        """Return the parameters and buffers of modules that are in no part."""
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
        """Decide which labels between parts keep their full width, and pin some of them.

        A tensor that has such a label keeps all its labels at full width. They are pinned where a
        tensor cannot be passed on at full width.

        Python code may decide by values, or by sizes in a way that was not followed. Then it may
        call parts in another order, and on other tensors, than for the example. In that case
        nothing is removed between parts, because a part whose inputs and outputs are whole is
        right wherever it is called.
        """
        ctx = self.context
        if self.decided:
            with ctx.at(PYTHON + self.decided):
                for tensor, _, _ in self._handed:
                    why = f"passes Python code that decides by {self._by}"
                    ctx.pin_all(ctx.fields(tensor), why)
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
                        with ctx.at("python"):
                            ctx.pin(f.labels, "is read in Python code that is not traced")
                    wide = np.union1d(wide, f.labels[f.labels > 0])
        ctx.found.wide = [wide]

    def _traced(self, path: str, args: Any, kwargs: Any, training: bool) -> Trace:
        """Trace a call of a part under labels, and return its graph.

        The graph for training mode is traced, too, if the part depends on the mode.
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
        """Trace a call of a part in one mode.

        The graph of the part's first call is the one that is emitted. The labels of a later call
        are united with those of the first one.
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
        """Unite the labels of a part's outputs in both modes.

        Python code that could not be followed in training mode then gets the same channels as in
        evaluation mode, or all of them.
        """
        self.context.node = f"{trained.prefix}output"  # it stays current, as a node of the part
        self._unite([own.outputs for own in (traced, trained)], "is given in training only")

    def _laid_out_alike(self, first: Trace, again: Trace) -> None:
        """Unite the labels of inputs and outputs of two calls of a part.

        One graph serves all calls of a part, so they must keep the same positions.
        """
        self.context.node = f"{first.prefix}output"  # it stays current, as a node of the part
        self._unite(
            [(own.placeholders, own.outputs) for own in (first, again)],
            "is laid out in another way in another call",
        )

    def _unite(self, both: Sequence[Any], why: str) -> None:
        """Unite the labels of two nested values leaf by leaf; pin them where layouts differ."""
        ctx, (ones, others) = self.context, map(leaves_of, both)
        for one, other in itertools.zip_longest(ones, others):
            fields, theirs = ctx.fields(one), ctx.fields(other)
            if [f.labels.shape for f in fields] == [f.labels.shape for f in theirs]:
                for f, g in zip(fields, theirs, strict=True):
                    ctx.unite(f.labels, g.labels)
            else:
                ctx.pin_all([*fields, *theirs], why)

    def _stand_in(self, real: Any) -> Any:
        """Return the meta tensor for a tensor with data, with its labels."""
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
    """Return a plain number for a width or a size, and other values as they are.

    Parts are called with numbers, and models return numbers, that must be the same in the smaller
    model. So the labels of such a width are noted.
    """
    return leaf.told() if type(leaf) is Width else plain_sizes(leaf)


def _tensors_by_name(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a model, shared ones once for each name."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return [tensor for _, tensor in named]
