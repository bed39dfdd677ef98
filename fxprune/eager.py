"""Models that cannot be traced whole: run for real, under labels, and what they call is traced.

Python that depends on data (proposals, matching, a loop over refinements) stays Python. Every module that it calls on tensors alone
is a *part*: traced, pruned and emitted as a graph of its own. Labels pass from part to part through the Python in between, which
cannot be rewritten. Where that depends on a width in a way that would be wrong for a smaller one (literal sizes, positions told
apart, statistics and means over channels, numbers computed from a width), it goes on seeing the width that was: parts hand such an
axis out with zeros in the places of what is gone, and take from it what they still read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.overrides import _pop_mode_temporarily as _without_function_mode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from fxprune import rules
from fxprune.errors import FxpruneError
from fxprune.labels import Array
from fxprune.propagation import IN_ORDER, LabelMode
from fxprune.rules import Context, Record
from fxprune.shapes import META, holds_tensors, tensors_in
from fxprune.trace import SizeTuple, Trace, Twin, following, trace, user_line

__all__ = ["PYTHON", "Parts", "intercepted", "some_data"]

PYTHON = "python:"
"""What the names of nodes begin with that are no nodes: lines of Python code."""


class Width(int):
    """A size that shrinks, read by Python code: whatever is computed from it would change, so that its ``labels`` become wide."""

    labels: list[Array]  # of the axis, by field
    wide: list[Array]

    @classmethod
    def of(cls, value: int, labels: list[Array], wide: list[Array]) -> Width:
        made = cls(value)
        made.labels, made.wide = labels, wide
        return made

    def told(self) -> None:
        self.wide += self.labels


def _telling(name: str) -> Callable[..., Any]:
    plain = getattr(int, name)

    def method(self: Width, *args: Any) -> Any:
        self.told()
        return plain(self, *args)

    return method


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "truediv", "rtruediv", "mod", "rmod", "pow", "rpow"),
    *("lt", "le", "eq", "ne", "gt", "ge", "neg", "abs", "float", "bool", "divmod", "rdivmod", "lshift", "rshift"),
):
    setattr(Width, f"__{_name}__", _telling(f"__{_name}__"))
Width.__hash__ = int.__hash__  # type: ignore[method-assign]


_SIZED = frozenset(
    {"view", "reshape", "expand", "unflatten", "zeros", "ones", "empty", "full", "new_zeros", "new_ones", "new_empty", "new_full"}
    | {"repeat", "rand", "randn", "broadcast_to"}
)
"""Functions that take sizes as sizes: with a width that Python read off a tensor they give the right ones for a smaller one too."""


_READ = frozenset({"__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy"})
"""What gives the values of a tensor to Python, which may then do something else for other values."""


class _Sizes(TorchFunctionMode):
    """Sees Python read sizes, and give them back."""

    def __init__(self, mode: _RealMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == Tensor.shape.__get__:  # type: ignore[attr-defined]
            return self._sizes(args[0])
        if name == "size" and isinstance(args[0], Tensor):
            found = self._sizes(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return found if dim is None else found[dim]
        if name in _READ and id(args[0]) in self.mode.depends:
            self.mode.decided = self.mode.decided or user_line()
        if name in ("numel", "nelement", "__len__"):
            math.prod(self._sizes(args[0])[: 1 if name == "__len__" else None])  # whatever widths are in it are told
        widths = [leaf for leaf in tree_leaves((args, kwargs)) if type(leaf) is Width]
        if name not in _SIZED:
            for width in widths:
                width.told()
            widths = []
        before, self.mode.widths = self.mode.widths, widths
        try:
            return func(*args, **kwargs)
        finally:
            self.mode.widths = before

    def _sizes(self, tensor: Tensor) -> Any:
        context, sizes = self.mode.context, list(tensor.size())
        fields = context.fields(tensor)
        for dim in {dim for field in fields for dim in field.dims}:
            sizes[dim] = Width.of(sizes[dim], [f.labels for f in fields if dim in f.dims], context.wide)
        return SizeTuple(sizes) if fields else torch.Size(sizes)


class _RealMode(LabelMode):
    """Executes ATen ops on data, carries labels on, and notes what the Python code around could not do on fewer channels."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.widths: list[Width] = []  # among the sizes that this call is given
        self.depends: dict[int, Tensor] = {}  # tensors that depend on inputs or weights, by their ids
        self.decided = ""  # the first line that reads values of such a tensor
        self._number = itertools.count()

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        ctx, rule, tensors = self.context, rules.find(func), tensors_in(args, kwargs)
        ctx.node = f"{PYTHON}{user_line()}#{next(self._number)}"
        ctx.target = func
        labelled = any(id(t) in ctx.records for t in tensors)
        creates = rule is not None and rule.family == "creation"
        out = func(*args, **kwargs)
        if any(id(t) in self.depends for t in tensors):
            self.depends.update((id(leaf), leaf) for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        if not labelled and not (creates and self.widths):
            return out
        if rule is None:
            for tensor in tensors:
                ctx.pin_all(ctx.fields(tensor), f"{func._schema.name} has no rule")
            return out
        before = [f.labels for t in tensors for f in ctx.fields(t)]
        statistics = len(ctx.statistics)
        bound = rules.bind(func, args, kwargs)
        if labelled or (isinstance(out, Tensor) and out.is_floating_point()):
            self._follow(rule, func, bound, out)
        if creates:
            for f in ctx.fields(out):  # as wide as what it was measured by, or as a number says
                measured = [a for width in self.widths for a in width.labels if a.size == f.labels.size]
                for labels in measured:
                    ctx.unite(f.labels.ravel(), labels.ravel())
                ctx.wide += [] if measured else [f.labels]
            return out
        if not self._narrows(func, rule, bound, before, out, statistics):
            ctx.wide += [*before, *(a for width in self.widths for a in width.labels)]
            ctx.wide += [f.labels for leaf in tree_leaves(out) for f in ctx.fields(leaf)]
        return out

    def _narrows(self, func: Any, rule: Any, bound: Mapping[str, Any], before: list[Array], out: Any, statistics: int) -> bool:
        """Whether the same call does the right thing on fewer channels."""
        ctx, name = self.context, func._schema.name.removeprefix("aten::").rstrip("_")
        if ctx.rescaled.pop(ctx.node, None) is not None:
            return False
        if len(ctx.statistics) > statistics:
            ctx.statistics.popitem()  # they are taken at full width, where zeros count as in the masked original
            return False
        if rule.family == "convolution" and bound["groups"] > 1:
            return False
        if name in _SIZED | {"_unsafe_view", "_reshape_alias", "as_strided"}:
            read = {ctx.units.live(a).ravel().tobytes() for width in self.widths for a in width.labels}
            return all(f.labels.ravel().tobytes() in read for leaf in tree_leaves(out) for f in ctx.fields(leaf))
        if rule.family in ("pointwise", "contraction", "convolution", "normalisation", "reduction"):
            return True
        if name in IN_ORDER:
            return True
        needed = {live.ravel().tobytes() for live in map(ctx.units.live, before) if live.any()}
        return needed == {f.labels.ravel().tobytes() for leaf in tree_leaves(out) for f in ctx.fields(leaf)}


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
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}
        self.decided = ""  # the line at which Python reads values
        self._handed: list[tuple[Tensor, bool, bool]] = []  # tensors between parts: whether one gives it, whether it can be wide

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model returns, for inputs of these shapes."""
        found = _Finder(self.twin)
        found.run(args, kwargs)
        real, mode = self.twin.instance(), _RealMode(self.context)
        for own, stand_in in zip(_tensors(real), _tensors(self.twin.model), strict=True):
            record = self.context.record(stand_in)
            if record is not None:
                self.context.records[id(own)] = record
        mode.depends = {id(t): t for t in (*_tensors(real), *tree_leaves((args, kwargs)))}

        def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
            with _disable_current_modes(), _without_function_mode():
                traced = self._traced(path, args, kwargs)
                with torch.inference_mode():
                    out = call()
            for leaf, stand_in in zip(tree_leaves(out), tree_leaves(traced.outputs), strict=True):
                if isinstance(leaf, Tensor):
                    self._handed.append((stand_in, True, True))
                    mode.depends[id(leaf)] = leaf
                    self.context.records[id(leaf)] = Record(leaf, list(self.context.fields(stand_in)))
            return out

        with intercepted(real, found.parts, part), torch.inference_mode(), _Sizes(mode), mode, following():
            out = real(*args, **kwargs)
        self.decided = mode.decided
        inside = {id(t) for path, _ in self.traces for t in _tensors(self.twin.model.get_submodule(path))}
        for tensor in _tensors(self.twin.model):
            record = self.context.record(tensor)
            if id(tensor) not in inside and record is not None and record.fields:
                self._handed.append((tensor, True, False))
        return out

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
        self.traces.setdefault((path, False), traced)
        for value in traced.placeholders:
            self._handed += [(leaf, False, isinstance(value, Tensor)) for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        if traced.asked_mode:
            training = trace(self.twin.part(path), *inputs, watch=self.watch(f"{path}:train."), training=True)
            self.traces.setdefault((path, True), replace(training, path=path))
        return traced

    def _stand_in(self, real: Any) -> Any:
        if not isinstance(real, Tensor):
            return real
        if id(real) not in self._stand_ins:
            self._stand_ins[id(real)] = real, _shape_of(real)
        made = self._stand_ins[id(real)][1]
        fields = self.context.fields(real)
        if fields:
            self.context.records[id(made)] = Record(made, list(fields))
        return made


_CONSTANTS = (type(None), bool, int, float, str)
"""What a part may be called with beside tensors: its graph says so where it is called with another one."""


class _Finder:
    """Finds the largest modules that can be traced: called on tensors, and every time the same graph."""

    def __init__(self, twin: Twin) -> None:
        self.twin = twin
        self.python: set[str] = set()
        self.graphs: dict[str, str] = {}

    @property
    def parts(self) -> frozenset[str]:
        return frozenset(self.graphs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        real, known = self.twin.instance(), -1
        everything = frozenset(name for name, module in real.named_modules() if name and any(True for _ in module.parameters()))
        while known != len(self.python):
            known = len(self.python)
            with intercepted(real, everything - self.python, self._try), torch.inference_mode():
                real(*tree_map(Tensor.clone, args), **tree_map(Tensor.clone, kwargs))

    def _try(self, path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        if not self._traceable(path, args, kwargs):
            self.python.add(path)
            self.graphs.pop(path, None)
            return NotImplemented
        return call()

    def _traceable(self, path: str, args: Any, kwargs: Any) -> bool:
        every = [*args, *kwargs.values()]
        nested = [value for value in every if holds_tensors(value)]
        if not nested or not all(isinstance(leaf, Tensor) for leaf in tree_leaves(nested)):
            return False
        if not all(type(value) in _CONSTANTS for value in every if not holds_tensors(value)):
            return False
        try:
            graph = str(trace(self.twin.part(path), *tree_map(_shape_of, (args, kwargs))).graph)
        except FxpruneError:
            return False
        return self.graphs.setdefault(path, graph) == graph


def some_data(inputs: Any, device: torch.device) -> Any:
    """Inputs of these shapes with data, on every device the same: Python that is not traced reads them."""
    generator = torch.Generator().manual_seed(0)

    def filled(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.rand(tensor.shape, generator=generator).to(device, tensor.dtype)
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)

    return tree_map(filled, inputs)


@contextmanager
def intercepted(
    root: nn.Module, paths: Collection[str], instead: Callable[[str, Callable[[], Any], Any, Any], Any]
) -> Iterator[None]:
    """Calls of the modules at these paths, the outermost ones, go to ``instead(path, call, args, kwargs)``.

    ``call()`` makes the call; where ``NotImplemented`` is given back the module's own Python runs, and its calls are looked at.
    """
    original, inside = nn.Module.__call__, False
    known = {id(module): name for name, module in reversed(list(root.named_modules(remove_duplicate=False))) if name in paths}

    def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        path = known.get(id(module))
        if inside or path is None:
            return original(module, *args, **kwargs)
        inside = True
        try:
            out = instead(path, lambda: original(module, *args, **kwargs), args, kwargs)
        finally:
            inside = False
        return original(module, *args, **kwargs) if out is NotImplemented else out

    with mock.patch.object(nn.Module, "__call__", call):
        yield


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers, one for each name."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return [tensor for _, tensor in named]


def _shape_of(tensor: Any) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    return torch.empty(tuple(tensor.size()), dtype=tensor.dtype, device=META)
