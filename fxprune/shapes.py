"""What an ATen op returns on tensors without storage: its shape, its dtype, nothing else.

The analysis runs models on ``meta`` tensors, which hold no data, so its cost does not depend on
the resolution. PyTorch's own meta kernels are exact but some are Python programs of a millisecond
each; the ops that make up most of a network (pointwise ops, normalisations, poolings) have a shape
that is plain to see, and are answered here at once. An op that is made of others is run as these,
each answered here. Every other op goes to PyTorch, many of whose kernels import sympy and the
compiler at their first call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fxprune.contents import tensors_of

aten = torch.ops.aten

__all__ = [
    "META",
    "DispatchMode",
    "ShapeMode",
    "aten",
    "is_composite",
    "is_quick",
    "map_tensors",
    "reshape_blocks",
    "run",
    "tensors_in",
]

META = torch.device("meta")

# as they are, also while tracing has others in their place
_empty, _empty_strided = torch.empty, torch.empty_strided


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an ATen op's arguments, which nest them in lists at most."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def holds_tensors(value: Any) -> bool:
    """Whether there is a tensor anywhere in nested containers."""
    return bool(tensors_of(value))


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Nested arguments of an ATen op, with the function's result in the place of each tensor."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute an ATen overload on meta tensors.

    Tensors with data (integer tables, masks) may stand among the arguments. If all of them hold
    data the op is executed for real, which is how constants fold; otherwise they are taken to the
    meta device first.

    Raises whatever the op raises on a wrong shape.
    """
    tensors = tensors_in(args, kwargs)
    if not any(t.is_meta for t in tensors):
        if func.overloadpacket is aten.arange and kwargs.get("device") == META:
            return _empty_like(func(*args, **{**kwargs, "device": "cpu"}))
        return func(*args, **kwargs)
    quick = _quick(func)
    if quick is not None:
        out = quick(func, args, kwargs)
        if out is not None:
            return out
    if "device" in kwargs or not all(t.is_meta for t in tensors):
        args, kwargs = tree_map(_as_meta, (args, kwargs))
    if is_composite(func):
        with ShapeMode():
            return func.decompose(*args, **kwargs)
    return func(*args, **kwargs)


@functools.cache
def is_composite(func: Any) -> bool:
    """Whether an op is made of others, for every kind of tensor."""
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def is_quick(func: Any) -> bool:
    """Whether the shape of an op's result is known here, op by op."""
    return func.overloadpacket in _QUICK


@functools.cache
def _quick(func: Any) -> Callable[..., Any] | None:
    if func.overloadpacket in _QUICK:
        return _QUICK[func.overloadpacket]
    if func._schema.name.endswith("_") and torch.Tag.inplace_view not in func.tags:
        return _first_argument
    return _pointwise if torch.Tag.pointwise in func.tags else None


def _first_argument(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """An op that writes into its first argument gives that argument back, whatever it writes."""
    returns = func._schema.returns
    written = (
        len(returns) == 1
        and returns[0].alias_info is not None
        and isinstance(args[0], Tensor)
        and args[0].is_meta
    )
    if not written:
        return None
    if torch.Tag.pointwise in func.tags:
        tensors = tensors_in(args, kwargs)
        if _broadcast({t.shape for t in tensors}) != args[0].shape:
            return None  # PyTorch says what is wrong
        # raises where the result's dtype does not fit in
        _pointwise_dtype(func, *_kinds(args, kwargs))
    return args[0]


def _as_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta and value.dim() > 0:
        return value.to(META)
    if isinstance(value, torch.device):
        return META
    return value


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if func._schema.is_mutable or len(func._schema.returns) != 1 or kwargs.get("out") is not None:
        return None
    tensors = [a for a in args if isinstance(a, Tensor)] + [
        a for a in kwargs.values() if isinstance(a, Tensor)
    ]
    shape = _broadcast({t.shape for t in tensors})
    if shape is None:
        return None
    dtype = _pointwise_dtype(func, *_kinds(args, kwargs))
    if dtype is None:
        return None
    for t in tensors:
        if t.is_meta and t.shape == shape:
            return _empty_like(t, dtype)
    return _empty(shape, dtype=dtype, device=META)


def _broadcast(shapes: set[torch.Size]) -> torch.Size | None:
    """The shape to which all of these broadcast. torch.broadcast_shapes imports sympy."""
    if len(shapes) == 1:
        return next(iter(shapes))
    out = [1] * max(map(len, shapes), default=0)
    for shape in shapes:
        for dim, size in enumerate(reversed(shape), start=1):
            if size != 1:
                if out[-dim] not in (1, size):
                    return None
                out[-dim] = size
    return torch.Size(out)


def _given_arguments(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that were given, by name."""
    return {**dict(zip((a.name for a in func._schema.arguments), args, strict=False)), **kwargs}


def _empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """torch.empty_like for meta tensors; that one is a Python program."""
    if x.is_contiguous() or 0 in x.stride():
        return _empty(x.shape, dtype=dtype or x.dtype, device=META)
    return _empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=META)


def _kinds(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], tuple[tuple[str, Any], ...]]:
    return tuple(map(_hashable, args)), tuple(sorted((k, _hashable(v)) for k, v in kwargs.items()))


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.dim() > 0)
    if isinstance(value, bool | str | torch.dtype) or value is None:
        return value
    return type(value)


@functools.cache
def _pointwise_dtype(
    func: Any, key: tuple[Any, ...], kwkey: tuple[tuple[str, Any], ...]
) -> torch.dtype | None:
    """Ask PyTorch once, on one-element tensors, which dtype the op returns for these kinds of
    argument.
    """

    def sample(kind: Any) -> Any:
        if isinstance(kind, tuple):
            return torch.ones((1,) if kind[1] else (), dtype=kind[0])
        if isinstance(kind, type):
            return kind(1) if kind in (int, float, complex) else None
        return kind

    if any(
        isinstance(k, type) and k not in (int, float, complex)
        for k in key + tuple(v for _, v in kwkey)
    ):
        return None
    out = func(*(sample(k) for k in key), **{k: sample(v) for k, v in kwkey})
    return out.dtype if isinstance(out, Tensor) else None


def _like_first(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = args[0]
    return _empty_like(x) if x.is_meta and x.is_floating_point() else None


def _contiguous(x: Tensor, keep_format: bool = False) -> Tensor | None:
    """A result that is laid out anew, whatever the strides of ``x``; ``keep_format``: but for
    channels-last.
    """
    if not x.is_meta or not x.is_floating_point():
        return None
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    if keep_format and last is not None and x.is_contiguous(memory_format=last):
        return _empty_like(x)
    return _empty(x.shape, dtype=x.dtype, device=META)


def _channel_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """batch_norm, instance_norm: up to four vectors over the channels."""
    x = args[0]
    vectors = [t for t in tensors_in(args, kwargs) if t is not x]
    fits = x.dim() > 1 and all(t.shape == x.shape[1:2] for t in vectors)
    return _contiguous(x, func.overloadpacket is not aten.instance_norm) if fits else None


def _group_norm_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return (
        _channel_norm(func, args, kwargs)
        if args[0].dim() > 1 and args[0].shape[1] % args[1] == 0
        else None
    )


def _last_norm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """layer_norm, rms_norm: statistics and weights over the last dimensions."""
    x, shape = args[0], tuple(args[1])
    fits = all(t.shape == shape for t in tensors_in(args[2:], kwargs))
    if not fits or not shape or x.shape[-len(shape) :] != shape:
        return None
    return _contiguous(x, func.overloadpacket is aten.rms_norm)


def _softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    if not -args[0].dim() <= dim < args[0].dim():
        return None
    dtype = kwargs.get(
        "dtype", args[2] if len(args) > 2 and isinstance(args[2], torch.dtype) else None
    )
    return None if dtype is not None else _contiguous(args[0])


def _adaptive(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, size = args[0], args[1] if len(args) > 1 else kwargs["output_size"]
    size = [int(s) for s in size]
    if any(s < 0 for s in size) or x.dim() < len(size) + 1:
        return None
    return x.new_empty([*x.shape[: x.dim() - len(size)], *size])


def _upsample(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if func._overloadname != "vec":
        return None
    given = _given_arguments(func, args, kwargs)
    x, size = given["input"], given.get("output_size")
    scale: Any = given.get("scale_factors")
    spatial: Sequence[int] = (
        size if size is not None else [int(s * f) for s, f in zip(x.shape[2:], scale, strict=True)]
    )
    return x.new_empty([*x.shape[:2], *spatial])


def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    if any(t.dtype != first.dtype or t.dim() != first.dim() or not t.is_meta for t in tensors):
        return None
    if not -first.dim() <= dim < first.dim():
        return None
    dim %= first.dim()
    rest = [*first.shape[:dim], *first.shape[dim + 1 :]]
    if any([*t.shape[:dim], *t.shape[dim + 1 :]] != rest for t in tensors):
        return None
    return first.new_empty(
        [*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]]
    )


def _convolution_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if func._overloadname == "padding" or kwargs:
        return None
    x, weight = args[0], args[1]
    count = weight.dim() - 2
    stride, padding, dilation = (
        _as_many(args[i] if len(args) > i else default, count)
        for i, default in ((3, 1), (4, 0), (5, 1))
    )
    groups = args[6] if len(args) > 6 else 1
    if (
        x.dim() != count + 2
        or x.shape[1] != weight.shape[1] * groups
        or weight.shape[0] % groups
        or x.dtype != weight.dtype
    ):
        return None  # PyTorch says what is wrong
    # PyTorch's own kernel for shapes takes it
    if len(args) > 2 and args[2] is not None and args[2].shape != weight.shape[:1]:
        raise RuntimeError(
            f"a bias of shape {tuple(args[2].shape)} for {weight.shape[0]} output channels"
        )
    spatial = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    return (
        _empty([x.shape[0], weight.shape[0], *spatial], dtype=x.dtype, device=META)
        if min(spatial) > 0
        else None
    )


def _as_many(value: int | Sequence[int], count: int) -> Sequence[int]:
    sizes = [value] if isinstance(value, int) else list(value)
    return sizes * count if len(sizes) == 1 else sizes


def _linear(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, weight = args[0], args[1]
    if weight.dim() != 2 or x.dtype != weight.dtype or x.shape[-1:] != weight.shape[1:]:
        return None
    if len(args) > 2 and args[2] is not None and args[2].shape != weight.shape[:1]:
        return None
    return _empty([*x.shape[:-1], weight.shape[0]], dtype=x.dtype, device=META)


def _attention_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    query, key, value = args[:3]
    if (
        not query.dim() == key.dim() == value.dim() == 4
        or not query.shape[:2] == key.shape[:2] == value.shape[:2]
    ):
        return None
    if query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2]:
        return None
    return _empty([*query.shape[:-1], value.shape[-1]], dtype=query.dtype, device=META)


def _convolution_either_way(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """aten.convolution, which the others become: transposed, or not."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    count = weight.dim() - 2
    if not transposed:
        return _convolution_shape(
            func, (x, weight, bias, stride, padding, dilation, groups), kwargs
        )
    stride, padding, dilation, more = (
        _as_many(value, count) for value in (stride, padding, dilation, output_padding)
    )
    if (
        x.dim() != count + 2
        or x.shape[1] != weight.shape[0]
        or x.shape[1] % groups
        or x.dtype != weight.dtype
    ):
        return None
    outputs = weight.shape[1] * groups
    if any(m >= max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
        return None
    if bias is not None and tuple(bias.shape) != (outputs,):
        return None
    spatial = [
        (n - 1) * s - 2 * p + d * (k - 1) + m + 1
        for n, k, s, p, d, m in zip(
            x.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True
        )
    ]
    return (
        _empty([x.shape[0], outputs, *spatial], dtype=x.dtype, device=META)
        if min(spatial) > 0
        else None
    )


def _product_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """mm: (m, k) by (k, n); bmm: one for each of a batch."""
    a, b = args[:2]
    rank = 3 if func.overloadpacket in (aten.bmm, aten.baddbmm) else 2
    if len(args) > 2 or not a.dim() == b.dim() == rank or a.shape[:-2] != b.shape[:-2]:
        return None
    return _matmul(func, (a, b), kwargs)


def _vector(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """mv, dot: by a vector."""
    rank = 2 if func.overloadpacket is aten.mv else 1
    return _matmul(func, args, kwargs) if args[0].dim() == rank and args[1].dim() == 1 else None


def _matmul(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """As :func:`_product_shape`, where leading dimensions broadcast; a vector is a row on the left
    and a column on the right.
    """
    a, b = args
    if not a.dim() or not b.dim() or a.shape[-1] != b.shape[max(-2, -b.dim())]:
        return None
    if a.dtype != b.dtype:  # which torch itself lets pass where there are no data
        raise RuntimeError(f"matmul of {a.dtype} and {b.dtype}: their dtypes must be the same")
    batch = _broadcast({a.shape[:-2], b.shape[:-2]})
    if batch is None:
        return None
    return _empty(
        [*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.dim() > 1 else ())],
        dtype=a.dtype,
        device=META,
    )


def _sum_of_product(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """addmm, baddbmm: a product, and what broadcasts to it."""
    out = _product_shape(func, args[1:3], kwargs) if len(args) == 3 else None
    fits = (
        out is not None
        and args[0].dtype == out.dtype
        and _broadcast({args[0].shape, out.shape}) == out.shape
    )
    return out if fits else None


def _reduction(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Sums, means, extremes, norms of floating-point values: the dimensions that are named go, or
    stay with a size of 1.
    """
    return _reduced_shape(func, args, kwargs) if args[0].is_floating_point() else None


def _reduced_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = _given_arguments(func, args, kwargs)
    x, dims, keep = given["self"], given.get("dim"), given.get("keepdim", False)
    if not (x.is_meta and x.dim() and x.numel()) or given.get("dtype") is not None:
        return None
    dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
    gone = {dim % x.dim() for dim in dims if -x.dim() <= dim < x.dim()}
    if len(gone) != len(dims):
        return None
    return x.new_empty(
        [1 if dim in gone else size for dim, size in enumerate(x.shape) if keep or dim not in gone]
    )


def _two_reductions(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """std_mean, var_mean, aminmax."""
    out = _reduction(func, args, kwargs)
    return None if out is None else (out, _empty_like(out))


def _position_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """argmax, argmin."""
    out = _reduction(func, args, kwargs)
    return None if out is None else _empty_like(out, torch.int64)


def _truth(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """any, all."""
    # which stays what it is
    out = _some_reduced(func, args, kwargs) if args[0].dtype is not torch.uint8 else None
    return None if out is None else _empty_like(out, torch.bool)


def _some_reduced(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """As :func:`_reduction`, of ops for which no dimension is none, not all of them."""
    return (
        None
        if _given_arguments(func, args, kwargs).get("dim") == []
        else _reduced_shape(func, args, kwargs)
    )


def _logsumexp(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return _some_reduced(func, args, kwargs) if args[0].is_floating_point() else None


def _with_positions(out: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Values, and where each of them was found."""
    return None if out is None else (out, _empty_like(out, torch.int64))


def _sort(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    given = _given_arguments(func, args, kwargs)
    x, dim = given["self"], given.get("dim", -1)
    return _with_positions(_empty_like(x)) if x.is_meta and -x.dim() <= dim < x.dim() else None


def _topk(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    given = _given_arguments(func, args, kwargs)
    x, dim, count = given["self"], given.get("dim", -1), given["k"]
    if not x.is_meta or not -x.dim() <= dim < x.dim() or not 0 <= count <= x.shape[dim]:
        return None
    dim %= x.dim()
    return _with_positions(x.new_empty([*x.shape[:dim], count, *x.shape[dim + 1 :]]))


def _index_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Whole numbers as indices. What stands apart from each other comes first in the result."""
    x, indices = args
    given = [index for index in indices if index is not None]
    if (
        not given
        or len(indices) > x.dim()
        or not x.numel()
        or any(t.dtype not in (torch.int64, torch.int32) for t in given)
    ):
        return None
    found = _broadcast({index.shape for index in given})
    if found is None:
        return None
    at = [dim for dim, index in enumerate(indices) if index is not None]
    together = at[-1] - at[0] + 1 == len(at)
    before = x.shape[: at[0]] if together else ()
    rest = [
        size for dim, size in enumerate(x.shape) if dim not in at and (not together or dim > at[0])
    ]
    return _empty([*before, *found, *rest], dtype=x.dtype, device=META)


def _index_put(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, indices, values = args[:3]
    place = _index_shape(func, (x, indices), {})
    fits = (
        place is not None
        and values.dtype == x.dtype
        and _broadcast({values.shape, place.shape}) == place.shape
    )
    return _empty_like(x) if fits and x.is_meta else None


def _gather(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, dim, index = args
    if (
        not -x.dim() <= dim < x.dim()
        or index.dim() != x.dim()
        or index.dtype not in (torch.int64, torch.int32)
    ):
        return None
    fits = all(
        own <= size
        for at, (own, size) in enumerate(zip(index.shape, x.shape, strict=True))
        if at != dim % x.dim()
    )
    return _empty(index.shape, dtype=x.dtype, device=META) if fits else None


def _repeat_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, times = args
    if len(times) < x.dim() or any(count < 0 for count in times):
        return None
    sizes = [1] * (len(times) - x.dim()) + list(x.shape)
    return _empty(
        [count * size for count, size in zip(times, sizes, strict=True)],
        dtype=x.dtype,
        device=META,
    )


def _embedding(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    weight, indices = args[:2]
    whole = weight.is_meta and weight.dim() == 2 and indices.dtype in (torch.int64, torch.int32)
    return weight.new_empty([*indices.shape, weight.shape[1]]) if whole else None


def _stack(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    given = _given_arguments(func, args, kwargs)
    tensors, dim = given["tensors"], given.get("dim", 0)
    first = tensors[0]
    if any(t.dtype != first.dtype or t.shape != first.shape or not t.is_meta for t in tensors):
        return None
    if not -first.dim() - 1 <= dim <= first.dim():
        return None
    dim %= first.dim() + 1
    return _empty(
        [*first.shape[:dim], len(tensors), *first.shape[dim:]], dtype=first.dtype, device=META
    )


def _reordered(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """roll, flip: over dimensions that are there, each once."""
    x, given = args[0], _given_arguments(func, args, kwargs)
    dims = given.get("dims") or ()
    fits = all(-x.dim() <= dim < x.dim() for dim in dims) and len(
        {dim % x.dim() for dim in dims}
    ) == len(dims)
    return (
        _like_first(func, args, kwargs)
        if fits and len(given.get("shifts", dims)) == len(dims)
        else None
    )


def _glu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, dim = args[0], args[1] if len(args) > 1 else -1
    if not x.is_floating_point() or not -x.dim() <= dim < x.dim() or x.shape[dim] % 2:
        return None
    dim %= x.dim()
    return x.new_empty([*x.shape[:dim], x.shape[dim] // 2, *x.shape[dim + 1 :]])


def _shuffle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """pixel_shuffle: channels become pixels; pixel_unshuffle: the other way."""
    x, factor = args
    if x.dim() < 3 or factor < 1:
        return None
    *batch, channels, height, width = x.shape
    if func.overloadpacket is aten.pixel_shuffle:
        fits, sizes = (
            channels % factor**2 == 0,
            (channels // factor**2, height * factor, width * factor),
        )
    else:
        fits, sizes = (
            height % factor == width % factor == 0,
            (channels * factor**2, height // factor, width // factor),
        )
    return x.new_empty([*batch, *sizes]) if fits else None


def _channel_shuffle_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    x, groups = args
    fits = (
        x.is_meta
        and x.is_floating_point()
        and x.dim() > 2
        and x.numel()
        and groups > 0
        and x.shape[1] % groups == 0
    )
    return _empty_like(x) if fits else None


def _grid_sampler(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Values at the places that a grid names, one coordinate for each spatial dimension."""
    x, grid = args[:2]
    rank = _rank(func)
    fits = (
        x.dim() == grid.dim() == rank + 2
        and x.shape[0] == grid.shape[0]
        and grid.shape[-1] == rank
        and x.dtype == grid.dtype
    )
    return (
        x.new_empty([*x.shape[:2], *grid.shape[1:-1]])
        if fits and x.is_meta and x.numel()
        else None
    )


def _blank(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """empty_like, zeros_like, ...: of the same kind, or of another dtype."""
    given = _given_arguments(func, args, kwargs)
    x, dtype = given["self"], given.get("dtype")
    plain = (
        x.is_meta and given.get("device") in (None, META) and given.get("memory_format") is None
    )
    return _empty_like(x, dtype) if plain else None


def _pool(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """max_pool, avg_pool: windows that lie inside of what is padded."""
    given = _given_arguments(func, args, kwargs)
    x, count = given["self"], _rank(func)
    kernel = _as_many(given["kernel_size"], count)
    stride, padding, dilation = (
        _as_many(given.get(name) or default, count)
        for name, default in (("stride", kernel), ("padding", 0), ("dilation", 1))
    )
    if (
        not x.is_meta
        or not x.is_floating_point()
        or given.get("ceil_mode")
        or x.dim() not in (count + 1, count + 2)
    ):
        return None
    sizes = list(zip(x.shape[-count:], kernel, stride, padding, dilation, strict=True))
    if any(2 * p > k or s < 1 or n < k for n, k, s, p, _ in sizes):
        return None  # PyTorch says what is wrong, if anything
    spatial = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in sizes]
    return x.new_empty([*x.shape[:-count], *spatial]) if min(spatial) > 0 and x.numel() else None


def _pool_with_indices(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    return _with_positions(_pool(func, args, kwargs))


def _adaptive_with_indices(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    x, count = args[0], len(args[1])
    whole = (
        x.is_meta
        and x.is_floating_point()
        and x.numel()
        and x.dim() in (count + 1, count + 2)
        and count == _rank(func)
    )
    return _with_positions(_adaptive(func, args, kwargs)) if whole else None


def _rank(func: Any) -> int:
    """The number of spatial dimensions that an op says in its name."""
    return int(next(letter for letter in func._schema.name if letter.isdigit()))


def _pad_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """reflection_pad, replication_pad: outwards."""
    x, pads = args
    count = _rank(func)
    if (
        not x.is_meta
        or not x.is_floating_point()
        or not x.numel()
        or x.dim() not in (count + 1, count + 2)
        or min(pads) < 0
    ):
        return None
    reflects = "reflection" in func._schema.name
    if len(pads) != 2 * count or (
        reflects and any(pad >= x.shape[-1 - n // 2] for n, pad in enumerate(pads))
    ):
        return None  # PyTorch says what is wrong
    return _padded(x, pads)


def _padded(x: Tensor, pads: Sequence[int]) -> Tensor | None:
    """Pads come in pairs, from the last dimension on."""
    sizes = list(x.shape)
    for n, pad in enumerate(pads):
        sizes[-1 - n // 2] += pad
    return x.new_empty(sizes) if min(sizes) > 0 else None


def _constant_pad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, pads = args[:2]
    plain = x.is_meta and len(pads) % 2 == 0 and len(pads) <= 2 * x.dim()
    within = plain and all(-pad <= x.shape[-1 - n // 2] for n, pad in enumerate(pads))
    return _padded(x, pads) if within and x.numel() else None


def _windows(
    sizes: Sequence[int], kernel: Any, dilation: Any, padding: Any, stride: Any
) -> list[int] | None:
    """How many windows there are along each of two dimensions."""
    lists = [list(value) for value in (sizes, kernel, dilation, padding, stride)]
    if (
        any(len(own) != 2 for own in lists)
        or min(map(min, (sizes, kernel, dilation, stride))) < 1
        or min(padding) < 0
    ):
        return None
    counts = [1 + (n + 2 * p - d * (k - 1) - 1) // s for n, k, d, p, s in zip(*lists, strict=True)]
    return counts if min(counts) > 0 else None


def _im2col(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, kernel = args[:2]
    counts = (
        _windows(x.shape[-2:], *args[1:])
        if x.is_meta and x.dim() in (3, 4) and x.numel()
        else None
    )
    return (
        None
        if counts is None
        else x.new_empty([*x.shape[:-3], x.shape[-3] * math.prod(kernel), math.prod(counts)])
    )


def _col2im(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, size, kernel = args[:3]
    counts = _windows(size, *args[2:]) if x.is_meta and x.dim() in (2, 3) and x.numel() else None
    if counts is None or x.shape[-1] != math.prod(counts) or x.shape[-2] % math.prod(kernel):
        return None
    return x.new_empty([*x.shape[:-2], x.shape[-2] // math.prod(kernel), *size])


def _weight_norm(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor] | None:
    """A weight of a given norm along one dimension, and the norm that it had."""
    given = _given_arguments(func, args, kwargs)
    v, g, dim = given["v"], given["g"], given.get("dim", 0)
    norm = [size if at == dim else 1 for at, size in enumerate(v.shape)]
    fits = (
        v.is_meta
        and v.is_floating_point()
        and v.dtype == g.dtype
        and list(g.shape) == norm
        and 0 <= dim < v.dim()
    )
    return (
        (_empty_like(v), _empty(norm, dtype=v.dtype, device=META))
        if fits and v.dtype is not torch.bfloat16
        else None
    )


def _triangle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = args[0]
    return _empty_like(x) if x.is_meta and x.dim() >= 2 else None


_QUICK: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((aten.mm, aten.bmm), _product_shape),
    **dict.fromkeys((aten.addmm, aten.baddbmm), _sum_of_product),
    **dict.fromkeys(
        (
            aten.mean,
            aten.sum,
            aten.prod,
            aten.amax,
            aten.amin,
            aten.std,
            aten.var,
            aten.norm,
            aten.linalg_vector_norm,
        ),
        _reduction,
    ),
    **dict.fromkeys((aten.std_mean, aten.var_mean, aten.aminmax), _two_reductions),
    **dict.fromkeys((aten.any, aten.all), _truth),
    **dict.fromkeys((aten.mv, aten.dot), _vector),
    **dict.fromkeys((aten.grid_sampler_2d, aten.grid_sampler_3d), _grid_sampler),
    aten.logsumexp: _logsumexp,
    aten.channel_shuffle: _channel_shuffle_shape,
    **dict.fromkeys((aten.argmax, aten.argmin), _position_shape),
    **dict.fromkeys(
        (
            aten.empty_like,
            aten.zeros_like,
            aten.ones_like,
            aten.full_like,
            aten.rand_like,
            aten.randn_like,
        ),
        _blank,
    ),
    **dict.fromkeys(
        (aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool2d, aten.avg_pool3d),
        _pool,
    ),
    **dict.fromkeys(
        (aten.max_pool2d_with_indices, aten.max_pool3d_with_indices), _pool_with_indices
    ),
    **dict.fromkeys((aten.adaptive_max_pool2d, aten.adaptive_max_pool3d), _adaptive_with_indices),
    **dict.fromkeys(
        (aten.reflection_pad1d, aten.reflection_pad2d, aten.reflection_pad3d), _pad_shape
    ),
    **dict.fromkeys(
        (aten.replication_pad1d, aten.replication_pad2d, aten.replication_pad3d), _pad_shape
    ),
    **dict.fromkeys((aten.tril, aten.triu), _triangle),
    **dict.fromkeys(
        (aten.softmax, aten._safe_softmax, aten.log_softmax, aten.cumsum, aten.cumprod), _softmax
    ),
    **dict.fromkeys((aten.pixel_shuffle, aten.pixel_unshuffle), _shuffle),
    **dict.fromkeys((aten.roll, aten.flip), _reordered),
    aten.convolution: _convolution_either_way,
    aten.matmul: _matmul,
    aten._weight_norm_interface: _weight_norm,
    aten.constant_pad_nd: _constant_pad,
    aten.im2col: _im2col,
    aten.col2im: _col2im,
    aten.index: _index_shape,
    aten.index_put: _index_put,
    aten.gather: _gather,
    aten.sort: _sort,
    aten.topk: _topk,
    aten.repeat: _repeat_shape,
    aten.embedding: _embedding,
    aten.stack: _stack,
    aten.glu: _glu,
    aten._prelu_kernel: _pointwise,
    aten.batch_norm: _channel_norm,
    aten.conv1d: _convolution_shape,
    aten.conv2d: _convolution_shape,
    aten.conv3d: _convolution_shape,
    aten.linear: _linear,
    aten.scaled_dot_product_attention: _attention_shape,
    aten.instance_norm: _channel_norm,
    aten.layer_norm: _last_norm,
    aten.group_norm: _group_norm_shape,
    aten.rms_norm: _last_norm,
    aten.dropout: _like_first,
    aten.hardsigmoid: _like_first,  # these three are pointwise, though not tagged so
    aten.hardswish: _like_first,
    aten.relu6: _like_first,
    aten.cat: _cat,
    aten.adaptive_avg_pool1d: _adaptive,
    aten.adaptive_avg_pool2d: _adaptive,
    aten.adaptive_avg_pool3d: _adaptive,
    aten.upsample_nearest1d: _upsample,
    aten.upsample_nearest2d: _upsample,
    aten.upsample_nearest3d: _upsample,
    aten.upsample_linear1d: _upsample,
    aten.upsample_bilinear2d: _upsample,
    aten.upsample_trilinear3d: _upsample,
    aten.upsample_bicubic2d: _upsample,
}


class DispatchMode(TorchDispatchMode):
    """A mode whose ``__torch_dispatch__`` is called as it is.

    torch wraps that of any other mode in what keeps the compiler out of it, which imports the
    compiler and sympy at the first call, hundreds of modules, and takes longer at every call than
    most operations on meta tensors.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def reshape_blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest independent blocks of dimensions: ``[(old dims, new dims),
    ...]``.

    Dimensions of size 1 on the new side belong to no block. Labels that do not vary within a block
    need not be touched, whatever the block's size.

    >>> reshape_blocks((2, 6, 7, 7), (2, 2, 3, 49))
    [([0], [0]), ([1], [1, 2]), ([2, 3], [3])]
    """
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    old_dims = [d for d, size in enumerate(old) if size != 1]
    new_dims = [d for d, size in enumerate(new) if size != 1]
    while i < len(old_dims) and j < len(new_dims):
        ins, outs = [old_dims[i]], [new_dims[j]]
        a, b = old[old_dims[i]], new[new_dims[j]]
        while a != b:
            if a < b:
                i += 1
                ins.append(old_dims[i])
                a *= old[old_dims[i]]
            else:
                j += 1
                outs.append(new_dims[j])
                b *= new[new_dims[j]]
        blocks.append((ins, outs))
        i, j = i + 1, j + 1
    return blocks


class ShapeMode(DispatchMode):
    """Run Python code on meta tensors through :func:`run`; enter it together with
    ``torch.inference_mode()``.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
