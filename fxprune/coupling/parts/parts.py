"""Labelled runs of a model that cannot be traced whole: its parts are traced when called."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
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
from fxprune.labels import Array
from fxprune.ops import Context, Record
from fxprune.trace import MetaCopy, Trace, trace
from fxprune.trace.aliasing import UndoWrites
from fxprune.trace.tensors import map_leaves

__all__ = ["Parts"]


@dataclass(frozen=True, eq=False)
class _Passed:
    """A tensor that passes between parts and Python code.

    Attributes
    ----------
    tensor:
        The tensor of the labelled run.
    is_given:
        Whether Python code gets it, from a part or as a parameter; else a part takes it.
    can_be_wide:
        Whether it can be passed on at full width.
    """

    tensor: Tensor
    is_given: bool
    can_be_wide: bool


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
        self._passed: list[_Passed] = []

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
                self.decided = self.decided or f"inputs of other sizes, {route.sizes}"
                self._by = "sizes of inputs"
            # only the first route counts as costs of the example
            if route is not explored.routes[0]:
                del self.context.found.contractions[contractions:]
        self._keep_whole_for_training()
        self._add_parameters_read_outside()
        return results

    def _add_parameters_read_outside(self) -> None:
        """Add the parameters that Python code may read to the tensors between parts."""
        inside: IdentityMap[Tensor, None] = IdentityMap()
        for path, _ in self.traces:
            for tensor in _tensors_by_name(self.meta_copy.model.get_submodule(path)):
                inside[tensor] = None
        read = IdentityMap((tensor, None) for tensor in self._read)
        for tensor in _tensors_by_name(self.meta_copy.model):
            record = self.context.record(tensor)
            if (tensor not in inside or tensor in read) and record is not None and record.fields:
                self._passed.append(_Passed(tensor, is_given=True, can_be_wide=False))
        if not self.decided:
            return
        # A module that has not run may read parameters that it shares with a part as they are.
        for tensor in self._outside():
            if tensor in inside:
                self._passed.append(_Passed(tensor, is_given=True, can_be_wide=False))

    def _keep_whole_for_training(self) -> None:
        """Keep tensors between parts whole if training mode may call modules that have not run.

        That is possible only where training mode cannot be followed.
        """
        if not self._untrained or not self.traces or self.decided:
            return
        for tensor in self._outside():
            record = self.context.record(tensor) if tensor.is_floating_point() else None
            if record is not None and record.unmet:
                self.decided = "training, which the example cannot take"

    def _run(
        self, parts: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any], route: Route
    ) -> Any:
        """Run the model on one route under labels, and return its result."""
        real, mode = self.meta_copy.instance(), RealMode(self.context)
        self._share_labels(real, mode)
        undone = UndoWrites(dict(real.named_parameters()))

        def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            if not path:
                self._note_inputs(args, kwargs)
                return NotImplemented
            args, kwargs = map_leaves(_as_number, (args, kwargs))
            mode.memory.find_labels(tensors_in(args, kwargs))
            with unwatched():
                traced = self._traced(path, args, kwargs, route.training)
            out = _call_unseen(call, mode, undone)
            self._carry_outputs(mode, out, traced)
            return out

        with undone.undoing(), intercepted(real, {*parts, ""}, part):
            out = run_route(real, args, kwargs, route, SizeReader(mode), mode)[0]
        for leaf in leaves(out):
            _as_number(leaf)
            mode.memory.find_labels(tensors_in((leaf,), {}))
        self._read += mode.read
        return out

    def _note_inputs(self, args: Any, kwargs: Any) -> None:
        """Note the tensors that the model itself is called with."""
        for tensor in tensors_of((args, kwargs)):
            self.context.note_input(tensor)

    def _share_labels(self, real: nn.Module, mode: RealMode) -> None:
        """Give the parameters of a model with data the labels of those of the meta copy."""
        tensors, stand_ins = _tensors_by_name(real), _tensors_by_name(self.meta_copy.model)
        for tensor, stand_in in zip(tensors, stand_ins, strict=True):
            mode.meta_of[tensor] = stand_in
            record = self.context.record(stand_in)
            if record is not None:
                self.context.records[tensor] = record
        mode.memory.note([*mode.meta_of], True)
        note_sizes(real, mode)

    def _carry_outputs(self, mode: RealMode, out: Any, traced: Trace) -> None:
        """Give the outputs of a part the labels of its graph's outputs."""
        for leaf, stand_in in zip(leaves_of(out), leaves_of(traced.outputs), strict=True):
            if isinstance(leaf, Tensor):
                self._passed.append(_Passed(stand_in, is_given=True, can_be_wide=True))
                mode.carry(leaf, self.context.fields(stand_in))

    def _outside(self) -> list[Tensor]:
        """Return the parameters and buffers of modules that are in no part."""
        paths = {path for path, _ in self.traces}
        tensors: list[Tensor] = []
        for name, module in self.meta_copy.model.named_modules(remove_duplicate=False):
            if not any(name == path or name.startswith(f"{path}.") for path in paths):
                own = (*module._parameters.values(), *module._buffers.values())
                tensors += [tensor for tensor in own if tensor is not None]
        return tensors

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
                for passed in self._passed:
                    why = f"passes Python code that decides by {self._by}"
                    ctx.pin_all(ctx.fields(passed.tensor), why)
        labels = [ctx.units.live(array).ravel() for array in ctx.found.full_width]
        wide = np.unique(np.concatenate([np.zeros(0, np.int64), *labels]))
        wide, before = wide[wide > 0], -1
        while len(wide) != before:
            before = len(wide)
            for passed in self._passed:
                wide = self._widened(passed, wide)
        ctx.found.full_width = [wide]

    def _widened(self, passed: _Passed, wide: Array) -> Array:
        """Return the wide labels, extended by those of a tensor if it has any of them."""
        ctx = self.context
        fields = ctx.fields(passed.tensor)
        if not any(np.isin(f.labels, wide).any() for f in fields):
            return wide
        for f in fields:
            is_zero = f.zero or not passed.is_given
            if not passed.can_be_wide or len(f.dims) > 1 or not is_zero:
                with ctx.at("python"):
                    ctx.pin(f.labels, "is read in Python code that is not traced")
            wide = np.union1d(wide, f.labels[f.labels > 0])
        return wide

    def _traced(self, path: str, args: Any, kwargs: Any, training: bool) -> Trace:
        """Trace a call of a part under labels, and return its graph.

        The graph for training mode is traced, too, if the part depends on the mode.
        """
        inputs = tree_map(self._stand_in, (args, kwargs))
        traced = self._follow(path, inputs, training=False)
        if traced.asked_mode:
            trained = self._follow(path, inputs, training=True)
            if self._untrained:
                self._unite_modes(traced, trained)
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
            self._unite_calls(first, traced)
        ctx.found.ran = {**before, **ctx.found.ran} if first is traced else before
        for value in traced.placeholders:
            for leaf in tensors_of(value):
                can_be_wide = isinstance(value, Tensor)
                self._passed.append(_Passed(leaf, is_given=False, can_be_wide=can_be_wide))
        return traced

    def _unite_modes(self, traced: Trace, trained: Trace) -> None:
        """Unite the labels of a part's outputs in both modes.

        Python code that could not be followed in training mode then gets the same channels as in
        evaluation mode, or all of them.
        """
        self.context.node = f"{trained.prefix}output"  # it stays current, as a node of the part
        self._unite([each.outputs for each in (traced, trained)], "is given in training only")

    def _unite_calls(self, first: Trace, again: Trace) -> None:
        """Unite the labels of inputs and outputs of two calls of a part.

        One graph serves all calls of a part, so they must keep the same positions.
        """
        self.context.node = f"{first.prefix}output"  # it stays current, as a node of the part
        self._unite(
            [(each.placeholders, each.outputs) for each in (first, again)],
            "is laid out in another way in another call",
        )

    def _unite(self, both: Sequence[Any], why: str) -> None:
        """Unite the labels of two nested values leaf by leaf; pin them where layouts differ."""
        ctx, (ones, others) = self.context, map(leaves_of, both)
        for one, other in itertools.zip_longest(ones, others):
            fields, other_fields = ctx.fields(one), ctx.fields(other)
            if [f.labels.shape for f in fields] == [f.labels.shape for f in other_fields]:
                for f, g in zip(fields, other_fields, strict=True):
                    ctx.unite(f.labels, g.labels)
            else:
                ctx.pin_all([*fields, *other_fields], why)

    def _stand_in(self, real: Any) -> Any:
        """Return the meta tensor for a tensor with data, with its labels."""
        if not isinstance(real, Tensor):
            return real
        if real not in self._stand_ins:
            self._stand_ins[real] = shape_of(real)
        made = self._stand_ins[real]
        fields = self.context.fields(real)
        self.context.note_causes([real], [made])
        if fields:
            self.context.records[made] = Record(made, list(fields))
        return made


def _call_unseen(call: Callable[[], Any], mode: RealMode, undone: UndoWrites) -> Any:
    """Call a part on data, seen by no mode but the one that notes what is written."""
    with _disable_current_modes(), torch.inference_mode(), mode.paused(), undone.watching():
        return call()


def _as_number(leaf: Any) -> Any:
    """Return a plain number for a width or a size, and other values as they are.

    Parts are called with numbers, and models return numbers, that must be the same in the smaller
    model. So the labels of such a width are noted.
    """
    return leaf.use() if type(leaf) is Width else plain_sizes(leaf)


def _tensors_by_name(model: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a model, shared ones once for each name."""
    named = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    return [tensor for _, tensor in named]
