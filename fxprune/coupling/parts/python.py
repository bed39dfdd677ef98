"""What Python code does between parts, seen on data: labels are carried on, and what would be
wrong for fewer channels is noted.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from fxprune import ops
from fxprune.common.contents import tensors_of
from fxprune.common.dispatch import map_tensors, tensors_in
from fxprune.common.identity import IdentityMap
from fxprune.common.module_sizes import remembered
from fxprune.coupling.parts.decisions import WHOLE
from fxprune.coupling.parts.memory import LabelledMemory
from fxprune.coupling.parts.narrowing import narrows, of_one_size
from fxprune.coupling.parts.width import Width
from fxprune.coupling.propagation import LabelMode
from fxprune.errors import FxpruneError
from fxprune.labels import Array, Field
from fxprune.ops import Context, Kind
from fxprune.trace import SizeTuple, user_line
from fxprune.trace.tensors import map_leaves

__all__ = ["PYTHON", "RealMode", "SizeReader", "note_sizes"]

PYTHON = "python:"
"""What the names of nodes begin with that are no nodes: lines of Python code."""


_READING = frozenset(
    {
        "numel",
        "nelement",
        "nbytes",
        "__len__",
        "stride",
        "storage_offset",
        "storage",
        "untyped_storage",
    }
)
"""What gives numbers that follow from the sizes of a tensor's memory."""


_FILLED = {"full": 1, "new_full": 2}
"""Functions that take sizes, and a number for what these hold, with its place."""


def _number_arguments(name: str, args: Any, kwargs: Any) -> Any:
    """The arguments of a call that are not taken as sizes."""
    if name in _FILLED:
        return args[_FILLED[name] :], kwargs.get("fill_value")
    # with a width that Python read off a tensor they give the right sizes for a smaller one too
    return () if ops.takes_sizes(name) else (args, kwargs)


def _widths(value: Any) -> list[Width]:
    """The widths in nested arguments."""
    found: list[Width] = []

    def note(leaf: Any) -> Any:
        if type(leaf) is Width:
            found.append(leaf)
        return leaf

    map_leaves(note, value)
    return found


def _plain_leaf(leaf: Any) -> Any:
    return leaf.number if type(leaf) is Width else leaf


class SizeReader(TorchFunctionMode):
    """Sees Python read sizes, and give them back."""

    def __init__(self, mode: RealMode) -> None:
        super().__init__()
        self.mode = mode

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.mode.pausing:
            args, kwargs = map_leaves(_plain_leaf, (args, kwargs))
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func == Tensor.shape.__get__:
            return self._sizes(args[0])
        if name == "size" and isinstance(args[0], Tensor):
            found = self._sizes(args[0])
            dim = args[1] if len(args) > 1 else kwargs.get("dim")
            return found if dim is None else found[dim]
        if (
            name in _READING
            or getattr(getattr(func, "__self__", None), "__name__", "") in _READING
        ):
            # whatever widths are in it are told
            math.prod(self._sizes(args[0])[: 1 if name == "__len__" else None])
        if name in WHOLE:
            self.mode.memory.meet([args[0]])
            self.mode.context.found.wide += [f.labels for f in self.mode.context.fields(args[0])]
        for width in _widths(_number_arguments(name, args, kwargs)):
            width.told()
        before, self.mode.widths = (
            self.mode.widths,
            _widths((args, kwargs)) if ops.takes_sizes(name) else [],
        )
        args, kwargs = map_leaves(_plain_leaf, (args, kwargs))
        given = tensors_in(args, kwargs)
        self.mode.memory.meet(given)
        try:
            out = func(*args, **kwargs)
        finally:
            self.mode.widths = before
        self.mode.memory.explain(given, tensors_in((out,), {}))
        return out

    def _sizes(self, tensor: Tensor) -> Any:
        context, sizes = self.mode.context, list[Any](tensor.size())
        self.mode.memory.meet([tensor])
        fields = context.fields(tensor)
        self.mode.reads(tensor)
        for dim in {dim for field in fields for dim in field.dims}:
            labels = [f.labels for f in fields if dim in f.dims]
            sizes[dim] = Width(
                int(sizes[dim]),
                functools.partial(_live, context, labels),
                context.found.wide.extend,
            )
        return SizeTuple(sizes) if fields else torch.Size(sizes)


def _sizes_of_some(value: Any) -> Any:
    """Sizes of which those that are 0 are found out, or two."""
    if not isinstance(value, (list, tuple)) or not all(type(size) is int for size in value):
        return value
    free = -1 if -1 not in value and list(value).count(0) == 1 else 2
    return [size or free for size in value]


def _live(context: Context, labels: list[Array]) -> list[Array]:
    return [*map(context.units.live, labels)]


def note_sizes(model: nn.Module, mode: RealMode) -> None:
    """Let the numbers that modules remember of their sizes (``in_features``) say so where Python
    reads them.

    They are those of the smaller model there. What is computed from one keeps its value: the axis
    stays.
    """
    context = mode.context

    def attribute(tensor: Tensor, dim: int) -> Width:
        def read() -> list[Array]:
            if mode.pausing:
                return []
            mode.reads(tensor)
            return [f.labels for f in context.fields(tensor) if dim in f.dims]

        def tell(labels: list[Array]) -> None:
            for own in labels:
                context.pin(own, "has its size read in Python code")

        return Width(tensor.shape[dim], read, tell)

    for module in model.modules():
        for name, tensor, dim in [*remembered(module)]:
            if tensor in mode.own and context.record(tensor) is not None:
                vars(module)[name] = attribute(tensor, dim)


class RealMode(LabelMode):
    """Executes ATen ops on data, carries labels on, and notes what the Python code around could
    not do on fewer channels.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.widths: list[Width] = []  # among the sizes that this call is given
        # the model's parameters and buffers -> those of the meta copy
        self.own: IdentityMap[Tensor, Tensor] = IdentityMap()
        # those of the meta copy that Python reads itself, outside of parts
        self.read: IdentityMap[Tensor, None] = IdentityMap()
        self.memory = LabelledMemory(context)
        self.pausing = False  # while a part runs
        self._number = itertools.count()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While a part runs: what it reads of its own is no business of Python's."""
        self.pausing = True
        try:
            yield
        finally:
            self.pausing = False

    def reads(self, tensor: Tensor) -> None:
        """Python reads this tensor, or its size: what is a parameter is seen there as it is, and
        not as wide as it was.
        """
        if tensor in self.own:
            self.read[self.own[tensor]] = None

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        ctx, rule, tensors = self.context, ops.find(func), tensors_in(args, kwargs)
        self.memory.meet(tensors)
        for tensor in tensors:
            self.reads(tensor)
        ctx.node = f"{PYTHON}{user_line()}#{next(self._number)}"
        ctx.target = func
        labelled = any(t in ctx.records for t in tensors)
        creates = rule is not None and rule.kind is Kind.CREATES
        follows = rule is not None and (labelled or any(map(self.memory.follows, tensors)))
        out = func(*args, **kwargs)
        if labelled or (creates and self.widths):
            self._label(func, rule, args, kwargs, out)
        self.memory.note(
            [*tensors, *tensors_in((out,), {})]
            if func._schema.is_mutable
            else tensors_in((out,), {}),
            follows,
        )
        return out

    def _label(self, func: Any, rule: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Carry labels on, also on no elements."""
        tensors = tensors_in(args, kwargs)
        labelled = any(t in self.context.records for t in tensors)
        if labelled and any(not leaf.numel() for leaf in (*tensors, *tensors_of(out))):
            self._on_some(func, args, kwargs, out)
        else:
            self._note(func, rule, args, kwargs, out)

    def _note(self, func: Any, rule: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Carry labels on, and note whose width the call must see."""
        ctx, tensors = self.context, tensors_in(args, kwargs)
        if rule is None:
            ctx.found.wide += [f.labels for tensor in tensors for f in ctx.fields(tensor)]
            return
        before = [f.labels for t in tensors for f in ctx.fields(t)]
        statistics = len(ctx.found.statistics)
        bound = ops.bind(func, args, kwargs)
        if any(tensor in ctx.records for tensor in tensors) or (
            isinstance(out, Tensor) and out.is_floating_point()
        ):
            self._follow(rule, func, bound, out)
        if rule.kind is Kind.CREATES:
            for f in ctx.fields(out):  # as wide as what it was measured by, or as a number says
                measured = [
                    a for width in self.widths for a in width.labels if a.size == f.labels.size
                ]
                for labels in measured:
                    ctx.unite(f.labels.ravel(), labels.ravel())
                ctx.found.wide += [] if measured else [f.labels]
            return
        if not self._narrows(func, args, kwargs, rule, out, statistics):
            ctx.found.wide += [*before, *(a for width in self.widths for a in width.labels)]
            ctx.found.wide += [f.labels for leaf in tree_leaves(out) for f in ctx.fields(leaf)]

    def _on_some(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Carry labels through a call on no elements: the labels that it carries on some are found
        out, and are those of none.

        Where that cannot be found out Python sees the full width.
        """
        ctx, given = self.context, tensors_in(args, kwargs)
        some = IdentityMap((tensor, self._some(tensor)) for tensor in given)
        own, named = map_tensors(some.__getitem__, (args, kwargs))
        if ops.takes_sizes(ops.name_of_op(func)):
            own = tuple(_sizes_of_some(value) for value in own)
        try:
            made = func(*own, **named)
            self._note(func, ops.find(func), own, named, made)
            pairs = list(zip(tree_leaves(out), tree_leaves(made), strict=True))
        except (RuntimeError, ValueError, IndexError, TypeError, FxpruneError):
            ctx.found.wide += [f.labels for tensor in given for f in ctx.fields(tensor)]
            pairs = [(leaf, None) for leaf in tree_leaves(out)]
        for leaf, stand_in in pairs:
            if isinstance(leaf, Tensor):
                self.carry(leaf, ctx.fields(stand_in))

    def _some(self, tensor: Tensor) -> Tensor:
        """A tensor that has two of what there is none of; a mask that chooses the first two where
        it chooses nothing.
        """
        if tensor.numel():
            if tensor.dtype is not torch.bool or bool(tensor.any()):
                return tensor
            chosen = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
            chosen.view(-1)[:2] = True
            return chosen
        made = torch.zeros(
            [size or 2 for size in tensor.shape], dtype=tensor.dtype, device=tensor.device
        )
        if made.dtype is torch.bool:
            made[...] = True
        self.carry(made, self.context.fields(tensor))
        return made

    def carry(self, tensor: Tensor, fields: list[Field]) -> None:
        """Give a tensor the labels of another, of which it may have fewer elements; what does not
        fit is seen at full width.
        """
        fit = [
            f
            for f in fields
            if all(f.labels.shape[d] == tensor.shape[d] for d in f.dims)
            and f.labels.ndim == tensor.dim()
        ]
        self.context.found.wide += [f.labels for f in fields if f not in fit]
        self.context.put(tensor, fit)
        self.memory.note([tensor], True)

    def _narrows(
        self, func: Any, args: Any, kwargs: Any, rule: Any, out: Any, statistics: int
    ) -> bool:
        """Whether the same call does the right thing on fewer channels."""
        ctx, name = self.context, ops.name_of_op(func)
        if ctx.found.rescaled.pop(ctx.node, None) is not None:
            return False
        if len(ctx.found.statistics) > statistics:
            # they are taken at full width, where zeros count as in the masked original
            ctx.found.statistics.popitem()
            return False
        bound = ops.bind(func, args, kwargs)
        if rule.kind is Kind.COMPUTES and bound.get("groups", 1) > 1:
            return False
        if bound.get("scale", 1) is None and any(
            bound["query"].dim() - 1 in f.dims for f in ctx.fields(bound["query"])
        ):
            return False  # attention scales by the width of what it is given
        if rule.kind is Kind.COMPUTES:
            return True
        if ops.takes_sizes(name) and self._measured(out):
            return True

        def labels(tensor: Tensor) -> list[Array]:
            return [f.labels for f in ctx.fields(tensor)]

        return not of_one_size(name, bound, out, labels) and narrows(
            func, args, kwargs, out, labels
        )

    def _measured(self, out: Any) -> bool:
        """Whether every axis that shrinks was given its size by Python that read it off a
        tensor.
        """
        live = self.context.units.live
        read = {live(a).ravel().tobytes() for width in self.widths for a in width.labels}
        return all(
            f.labels.ravel().tobytes() in read
            for leaf in tree_leaves(out)
            for f in self.context.fields(leaf)
        )
