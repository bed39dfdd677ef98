"""Propagation of labels through the Python code between parts, which runs on data.

Axes for which this code would be wrong on fewer channels are noted as wide: they keep their width.
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
from fxprune.common.module_sizes import size_attributes
from fxprune.coupling.parts.decisions import WHOLE
from fxprune.coupling.parts.memory import LabelledMemory
from fxprune.coupling.parts.narrowing import commutes_with_removal, is_of_one_size
from fxprune.coupling.parts.width import Width
from fxprune.coupling.propagation import LabelMode
from fxprune.errors import FxpruneError
from fxprune.labels import Array, Field
from fxprune.ops import Context, Kind
from fxprune.trace import SizeTuple, user_line
from fxprune.trace.tensors import map_leaves

__all__ = ["PYTHON", "RealMode", "SizeReader", "note_sizes"]

PYTHON = "python:"
"""Prefix of node names that stand for lines of Python code."""


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
"""Functions that return numbers derived from the sizes of a tensor."""


_FILLED = {"full": 1, "new_full": 2}
"""Functions that take sizes and a fill value -> position of the fill value."""


def _number_arguments(name: str, args: Any, kwargs: Any) -> Any:
    """Return the arguments of a call that are not taken as sizes."""
    if name in _FILLED:
        return args[_FILLED[name] :], kwargs.get("fill_value")
    # A function that takes sizes is right for a smaller width, too, if the size was read off a
    # tensor.
    return () if ops.takes_sizes(name) else (args, kwargs)


def _widths(value: Any) -> list[Width]:
    """Return the widths in nested arguments."""
    found: list[Width] = []

    def note(leaf: Any) -> Any:
        if type(leaf) is Width:
            found.append(leaf)
        return leaf

    map_leaves(note, value)
    return found


def _owner_name(func: Any) -> str:
    """Return the name of the attribute whose getter ``func`` is; empty for other functions."""
    return getattr(getattr(func, "__self__", None), "__name__", "")


def _plain_leaf(leaf: Any) -> Any:
    """Return the number of a width, and other values as they are."""
    return leaf.number if type(leaf) is Width else leaf


class SizeReader(TorchFunctionMode):
    """A mode that makes sizes of labelled tensors known as such, and sees where they are used.

    Parameters
    ----------
    mode:
        The mode that sees the operations of the same run.
    """

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
        if name in _READING or _owner_name(func) in _READING:
            # the product reads the number of every width in it
            math.prod(self._sizes(args[0])[: 1 if name == "__len__" else None])
        if name in WHOLE:
            self.mode.memory.find_labels([args[0]])
            self.mode.context.found.full_width += [
                f.labels for f in self.mode.context.fields(args[0])
            ]
        for width in _widths(_number_arguments(name, args, kwargs)):
            width.use()
        return self._call(func, name, args, kwargs)

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Call a function with plain numbers, while :class:`RealMode` knows the widths in it."""
        before = self.mode.widths
        self.mode.widths = _widths((args, kwargs)) if ops.takes_sizes(name) else []
        args, kwargs = map_leaves(_plain_leaf, (args, kwargs))
        given = tensors_in(args, kwargs)
        self.mode.memory.find_labels(given)
        try:
            out = func(*args, **kwargs)
        finally:
            self.mode.widths = before
        self.mode.memory.explain(given, tensors_in((out,), {}))
        return out

    def _sizes(self, tensor: Tensor) -> Any:
        """Return the shape of a tensor, with a :class:`Width` for each labelled dimension."""
        context, sizes = self.mode.context, list[Any](tensor.size())
        self.mode.memory.find_labels([tensor])
        fields = context.fields(tensor)
        self.mode.note_read(tensor)
        for dim in {dim for field in fields for dim in field.dims}:
            labels = [f.labels for f in fields if dim in f.dims]
            read = functools.partial(_live, context, labels)
            sizes[dim] = Width(int(sizes[dim]), read, context.found.full_width.extend)
        return SizeTuple(sizes) if fields else torch.Size(sizes)


def _nonzero_sizes(value: Any) -> Any:
    """Return sizes with another size in place of 0: -1 where it can be inferred, else 2."""
    if not isinstance(value, (list, tuple)) or not all(type(size) is int for size in value):
        return value
    free = -1 if -1 not in value and list(value).count(0) == 1 else 2
    return [size or free for size in value]


def _live(context: Context, labels: list[Array]) -> list[Array]:
    """Return the live labels of each array."""
    return [*map(context.units.live, labels)]


def note_sizes(model: nn.Module, mode: RealMode) -> None:
    """Replace sizes that modules remember (``in_features``) by :class:`Width` numbers.

    In the smaller model, these attributes hold the smaller sizes. An axis is pinned if Python code
    computes with its size, because the result must not change.

    Parameters
    ----------
    model:
        The model that runs on data; its attributes are replaced.
    mode:
        The mode that sees the operations of the run.
    """
    context = mode.context

    def width_of(tensor: Tensor, dim: int) -> Width:
        def read() -> list[Array]:
            if mode.pausing:
                return []
            mode.note_read(tensor)
            return [f.labels for f in context.fields(tensor) if dim in f.dims]

        def pin(labels: list[Array]) -> None:
            for array in labels:
                context.pin(array, "has its size read in Python code")

        return Width(tensor.shape[dim], read, pin)

    for module in model.modules():
        for name, tensor, dim in [*size_attributes(module)]:
            if tensor in mode.meta_of and context.record(tensor) is not None:
                vars(module)[name] = width_of(tensor, dim)


class RealMode(LabelMode):
    """A mode that runs ATen ops of Python code on data and propagates labels through them.

    It notes axes as wide where the Python code would be wrong on fewer channels.

    Parameters
    ----------
    context:
        Holds the labels.

    Attributes
    ----------
    widths:
        The widths among the sizes that the running function is called with.
    meta_of:
        Parameter or buffer of the model that runs -> that of the meta copy.
    read:
        Parameters and buffers of the meta copy that Python code reads outside of parts.
    memory:
        The memory of labelled tensors.
    pausing:
        Whether a part is running.
    """

    def __init__(self, context: Context) -> None:
        super().__init__(context)
        self.widths: list[Width] = []
        self.meta_of: IdentityMap[Tensor, Tensor] = IdentityMap()
        self.read: IdentityMap[Tensor, None] = IdentityMap()
        self.memory = LabelledMemory(context)
        self.pausing = False
        self._number = itertools.count()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Mark that a part runs: sizes that it reads itself are not read by Python code."""
        self.pausing = True
        try:
            yield
        finally:
            self.pausing = False

    def note_read(self, tensor: Tensor) -> None:
        """Record that Python code reads a tensor or its size.

        Only parameters and buffers are recorded. Python code sees them as they are in the smaller
        model, not at full width.
        """
        if tensor in self.meta_of:
            self.read[self.meta_of[tensor]] = None

    def _execute(self, func: Any, args: Any, kwargs: Any) -> Any:
        ctx, rule, tensors = self.context, ops.find_row(func), tensors_in(args, kwargs)
        self.memory.find_labels(tensors)
        for tensor in tensors:
            self.note_read(tensor)
        # The line stays current until the next operation: Python code reads sizes in between.
        ctx.node, ctx.target = f"{PYTHON}{user_line()}#{next(self._number)}", func
        labelled = any(t in ctx.records for t in tensors)
        creates = rule is not None and rule.kind is Kind.CREATES
        follows = rule is not None and (labelled or any(map(self.memory.is_followed, tensors)))
        out = func(*args, **kwargs)
        if labelled or (creates and self.widths):
            self._label(func, rule, args, kwargs, out)
        written = tensors if func._schema.is_mutable else []
        self.memory.note([*written, *tensors_in((out,), {})], follows)
        return out

    def _label(self, func: Any, rule: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Propagate labels through a call, also if some of its tensors have no elements."""
        tensors = tensors_in(args, kwargs)
        labelled = any(t in self.context.records for t in tensors)
        if labelled and any(not leaf.numel() for leaf in (*tensors, *tensors_of(out))):
            self._note_with_elements(func, args, kwargs, out)
        else:
            self._note(func, rule, args, kwargs, out)

    def _note(self, func: Any, rule: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Propagate labels through a call, and note labels whose full width the call needs."""
        ctx, tensors = self.context, tensors_in(args, kwargs)
        if rule is None:
            ctx.found.full_width += [f.labels for tensor in tensors for f in ctx.fields(tensor)]
            return
        before = [f.labels for t in tensors for f in ctx.fields(t)]
        statistics = len(ctx.found.statistics)
        bound = ops.bind(func, args, kwargs)
        if any(tensor in ctx.records for tensor in tensors) or (
            isinstance(out, Tensor) and out.is_floating_point()
        ):
            self._follow(rule, func, bound, out)
        if rule.kind is Kind.CREATES:
            self._unite_with_widths(out)
        elif not self._narrows(func, args, kwargs, rule, out, statistics):
            ctx.found.full_width += [*before, *(a for width in self.widths for a in width.labels)]
            ctx.found.full_width += [
                f.labels for leaf in tree_leaves(out) for f in ctx.fields(leaf)
            ]

    def _unite_with_widths(self, made: Tensor) -> None:
        """Unite the labels of a new tensor with those of the widths that gave it its sizes.

        A size that is a plain number keeps its full width.
        """
        for f in self.context.fields(made):
            known = [array for width in self.widths for array in width.labels]
            equal = [labels for labels in known if labels.size == f.labels.size]
            for labels in equal:
                self.context.unite(f.labels.ravel(), labels.ravel())
            if not equal:
                self.context.found.full_width.append(f.labels)

    def _note_with_elements(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Propagate labels through a call on tensors without elements.

        The call is made on tensors with some elements instead, and the labels of its results are
        used. If that fails, the operands keep their full width.
        """
        ctx, given = self.context, tensors_in(args, kwargs)
        some = IdentityMap((tensor, self._with_elements(tensor)) for tensor in given)
        new_args, new_kwargs = map_tensors(some.__getitem__, (args, kwargs))
        if ops.takes_sizes(ops.name_of_op(func)):
            new_args = tuple(_nonzero_sizes(value) for value in new_args)
        try:
            made = func(*new_args, **new_kwargs)
            self._note(func, ops.find_row(func), new_args, new_kwargs, made)
            pairs = list(zip(tree_leaves(out), tree_leaves(made), strict=True))
        except (RuntimeError, ValueError, IndexError, TypeError, FxpruneError):
            ctx.found.full_width += [f.labels for tensor in given for f in ctx.fields(tensor)]
            pairs = [(leaf, None) for leaf in tree_leaves(out)]
        for leaf, stand_in in pairs:
            if isinstance(leaf, Tensor):
                self.carry(leaf, ctx.fields(stand_in))

    def _with_elements(self, tensor: Tensor) -> Tensor:
        """Return a tensor with size 2 in place of 0, and the same labels.

        For a mask that selects nothing, return one that selects the first two elements. Return any
        other tensor as it is.
        """
        if tensor.numel():
            if tensor.dtype is not torch.bool or bool(tensor.any()):
                return tensor
            chosen = torch.zeros(tensor.shape, dtype=torch.bool, device=tensor.device)
            chosen.view(-1)[:2] = True
            return chosen
        sizes = [size or 2 for size in tensor.shape]
        made = torch.zeros(sizes, dtype=tensor.dtype, device=tensor.device)
        if made.dtype is torch.bool:
            made[...] = True
        elif not made.is_floating_point() and not made.is_complex():
            # Indices must differ: of two values written to one place, either may be the last.
            place = tensor.shape.index(0)
            along = [-1 if dim == place else 1 for dim in range(made.dim())]
            made += torch.arange(sizes[place], dtype=made.dtype, device=made.device).view(along)
        self.carry(made, self.context.fields(tensor))
        return made

    def carry(self, tensor: Tensor, fields: list[Field]) -> None:
        """Label a tensor with the fields of another one.

        Fields that do not fit the tensor's shape keep their full width.

        Parameters
        ----------
        tensor:
            The tensor to label.
        fields:
            The fields. The tensor they come from may have other sizes on dimensions without
            labels.
        """
        fitting = []
        for f in fields:
            has_sizes = all(f.labels.shape[d] == tensor.shape[d] for d in f.dims)
            if has_sizes and f.labels.ndim == tensor.dim():
                fitting.append(f)
            else:
                self.context.found.full_width.append(f.labels)
        self.context.put(tensor, fitting)
        self.memory.note([tensor], True)

    def _narrows(
        self, func: Any, args: Any, kwargs: Any, rule: Any, out: Any, statistics: int
    ) -> bool:
        """Tell whether the same call does the right thing on fewer channels."""
        ctx, name = self.context, ops.name_of_op(func)
        if ctx.found.rescaled.pop(ctx.node, None) is not None:
            return False
        if len(ctx.found.statistics) > statistics:
            # statistics are taken at full width, with zeros counted as in the masked original
            ctx.found.statistics.popitem()
            return False
        bound = ops.bind(func, args, kwargs)
        if self._scales_by_width(bound):
            return False
        if rule.kind is Kind.COMPUTES:
            return bound.get("groups", 1) <= 1
        if ops.takes_sizes(name) and self._has_read_sizes(out):
            return True

        def labels(tensor: Tensor) -> list[Array]:
            return [f.labels for f in ctx.fields(tensor)]

        if is_of_one_size(name, bound, out, labels):
            return False
        return commutes_with_removal(func, args, kwargs, out, labels)

    def _scales_by_width(self, bound: dict[str, Any]) -> bool:
        """Tell whether a call is attention that scales by the width of a labelled query."""
        if bound.get("scale", 1) is not None:
            return False
        query = bound["query"]
        return any(query.dim() - 1 in f.dims for f in self.context.fields(query))

    def _has_read_sizes(self, out: Any) -> bool:
        """Tell whether the size of each labelled axis of ``out`` was read off a tensor."""
        live = self.context.units.live
        read = {live(a).ravel().tobytes() for width in self.widths for a in width.labels}
        fields = [f for leaf in tree_leaves(out) for f in self.context.fields(leaf)]
        return all(f.labels.ravel().tobytes() in read for f in fields)
