"""Runs a model for real, Python and all, and traces the modules that it calls."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import _pop_mode_temporarily as _without_function_mode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fxprune.eager.calls import intercepted, without_function_modes
from fxprune.eager.decisions import Answers, followed, ways_of
from fxprune.eager.finder import Finder, shape_of
from fxprune.eager.python import PYTHON, RealMode, Sizes, Width, measure
from fxprune.eager.straight import is_straight
from fxprune.identity import TensorMap
from fxprune.rules import Context, Record
from fxprune.shapes import leaves_of
from fxprune.trace import Trace, Twin, trace

__all__ = ["ONLY_EVALUATION", "Parts"]

ONLY_EVALUATION = "training mode takes another path, which the example cannot take; only evaluation's is emitted"


class Parts:
    """Runs a twin for real, Python and all, and traces the modules that it calls.

    Parameters
    ----------
    watch:
        Gives, for a prefix of node names, what nodes run under while they are traced (see :func:`fxprune.trace.trace`).
    """

    def __init__(self, twin: Twin, context: Context, watch: Callable[[str], Any]) -> None:
        self.twin, self.context, self.watch = twin, context, watch
        self.traces: dict[tuple[str, bool], Trace] = {}  # by path and whether for training
        self._stand_ins: TensorMap[Tensor] = TensorMap()
        self.decided = ""  # the line at which Python takes out numbers that depend on weights
        self._read: list[Tensor] = []  # parameters that Python reads itself, outside of parts
        self._handed: list[tuple[Tensor, bool, bool]] = []  # tensors between parts: whether one gives it, whether it can be wide

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """What the model returns for this call, and for each other way that its Python can go."""
        ways = ways_of(lambda answers: followed(self.twin.instance(), args, kwargs, answers)[1])
        self.decided = ways.decided
        self._found = found = Finder(self.twin)
        found.run(args, kwargs, ways.answers)
        if ways.taken_out:
            real = self.twin.instance()
            straight = is_straight(real, found.parts, lambda: followed(real, args, kwargs, ()))
            self.decided = "" if straight else ways.taken_out
        results = []
        for answers in ways.answers:
            contractions = len(self.context.contractions)
            results.append(self._run(found.parts, args, kwargs, answers))
            if answers:  # the example goes another way: what is computed there is not what it costs
                del self.context.contractions[contractions:]
        inside = TensorMap((t, None) for path, _ in self.traces for t in _tensors(self.twin.model.get_submodule(path)))
        read = TensorMap((tensor, None) for tensor in self._read)
        for tensor in _tensors(self.twin.model):
            record = self.context.record(tensor)
            if (tensor not in inside or tensor in read) and record is not None and record.fields:
                self._handed.append((tensor, True, False))
        if self.decided:  # what a part shares with a module that has not run is read there as it is
            self._handed += [(tensor, True, False) for tensor in self._outside() if tensor in inside]
        return results

    def _run(self, parts: Collection[str], args: tuple[Any, ...], kwargs: dict[str, Any], answers: Answers) -> Any:
        real, mode = self.twin.instance(), RealMode(self.context)
        for own, stand_in in zip(_tensors(real), _tensors(self.twin.model), strict=True):
            mode.own[own] = stand_in
            record = self.context.record(stand_in)
            if record is not None:
                self.context.records[own] = record
        measure(real, mode)

        def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            args, kwargs = tree_map(_as_number, (args, kwargs))
            with _disable_current_modes():
                with without_function_modes():
                    traced = self._traced(path, args, kwargs)
                # Of sizes; it is seen what the result depends on.
                with _without_function_mode(), torch.inference_mode(), mode.paused():
                    out = call()
            for leaf, stand_in in zip(leaves_of(out), leaves_of(traced.outputs), strict=True):
                if isinstance(leaf, Tensor):
                    self._handed.append((stand_in, True, True))
                    self.context.records[leaf] = Record(leaf, list(self.context.fields(stand_in)))
            return out

        with intercepted(real, parts, part):
            out = followed(real, args, kwargs, answers, Sizes(mode), mode)[0]
        self._read += mode.read
        return out

    def _outside(self) -> list[Tensor]:
        """The parameters and buffers of modules that are in no part."""
        paths = {path for path, _ in self.traces}
        modules = self.twin.model.named_modules(remove_duplicate=False)
        own = [m for name, m in modules if not any(name == path or name.startswith(f"{path}.") for path in paths)]
        return [t for m in own for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]

    def settle(self) -> None:
        """Extend what Python sees at full width to all that goes with it; pin it where it cannot be handed out so.

        Where Python decides by values, parts may be called in another order and on other things than for the example. Then nothing
        is removed between them: a part whose inputs and outputs are whole does the right thing wherever it is called.
        """
        ctx = self.context
        for tensor, _, _ in self._handed if self.decided else ():
            ctx.node = PYTHON + self.decided
            ctx.pin_all(ctx.fields(tensor), "passes Python code that decides by values")
        wide, before = np.unique(np.concatenate([np.zeros(0, np.int64), *(ctx.units.live(a).ravel() for a in ctx.wide)])), -1
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
        ctx.wide = [wide]

    def _traced(self, path: str, args: Any, kwargs: Any) -> Trace:
        inputs = tree_map(self._stand_in, (args, kwargs))
        traced = replace(trace(self.twin.part(path), *inputs, watch=self.watch(f"{path}:")), path=path)
        first = self.traces.setdefault((path, False), traced)
        if first is not traced:
            self._laid_out_alike(first, traced)
        for value in traced.placeholders:
            self._handed += [(leaf, False, isinstance(value, Tensor)) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if path in self._found.evaluated:
            traced.decisions.append(f"{ONLY_EVALUATION}: {self._found.evaluated[path]}")
        elif traced.asked_mode:
            training = trace(self.twin.part(path), *inputs, watch=self.watch(f"{path}:train."), training=True)
            self.traces.setdefault((path, True), replace(training, path=path))
        return traced

    def _laid_out_alike(self, first: Trace, again: Trace) -> None:
        """One graph stands for all calls of a part: what it takes and gives keeps the same positions in each of them."""
        ctx = self.context
        ctx.node = f"{first.path}:output"
        both = [leaves_of((own.placeholders, own.outputs)) for own in (first, again)]
        for one, other in zip(*both, strict=True):
            fields, others = ctx.fields(one), ctx.fields(other)
            if [f.labels.shape for f in fields] == [f.labels.shape for f in others]:
                for f, g in zip(fields, others, strict=True):
                    ctx.unite(f.labels, g.labels)
            else:
                ctx.pin_all([*fields, *others], "is laid out in another way in another call")

    def _stand_in(self, real: Any) -> Any:
        if not isinstance(real, Tensor):
            return real
        if real not in self._stand_ins:
            self._stand_ins[real] = shape_of(real)
        made = self._stand_ins[real]
        fields = self.context.fields(real)
        if fields:
            self.context.records[made] = Record(made, list(fields))
        return made


def _as_number(leaf: Any) -> Any:
    """A width that a part is called with is a number to its graph, which holds for no other one."""
    if not isinstance(leaf, Width):
        return leaf
    leaf.told()
    return int(leaf)


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, one for each name."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [tensor for _, tensor in named]
