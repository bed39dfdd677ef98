"""What Python code does between parts, seen on data: labels are carried on, and what would be wrong for fewer channels is noted."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxprune import rules
from fxprune.labels import Array
from fxprune.propagation import LabelMode, keeps_order
from fxprune.rules import Context
from fxprune.shapes import tensors_in
from fxprune.trace import SizeTuple, user_line

__all__ = ["PYTHON", "RealMode", "Sizes"]

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


class Sizes(TorchFunctionMode):
    """Sees Python read sizes, and give them back."""

    def __init__(self, mode: RealMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == Tensor.shape.__get__:
            return self._sizes(args[0])
        if name == "size" and isinstance(args[0], Tensor):
            found = self._sizes(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return found if dim is None else found[dim]
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


class RealMode(LabelMode):
    """Executes ATen ops on data, carries labels on, and notes what the Python code around could not do on fewer channels."""

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.widths: list[Width] = []  # among the sizes that this call is given
        self._number = itertools.count()

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        ctx, rule, tensors = self.context, rules.find(func), tensors_in(args, kwargs)
        ctx.node = f"{PYTHON}{user_line()}#{next(self._number)}"
        ctx.target = func
        labelled = any(t in ctx.records for t in tensors)
        creates = rule is not None and rule.family == "creation"
        out = func(*args, **kwargs)
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
        if keeps_order(ctx, func, rule, bound):
            return True
        needed = {live.ravel().tobytes() for live in map(ctx.units.live, before) if live.any()}
        return needed == {f.labels.ravel().tobytes() for leaf in tree_leaves(out) for f in ctx.fields(leaf)}
