"""What an ATen op returns on tensors without storage: its shape, its dtype, nothing else.

The analysis runs models on ``meta`` tensors, which hold no data, so its cost does not depend on the resolution. PyTorch's own meta
kernels are exact but some are Python programs of a millisecond each; the ops that make up most of a network (pointwise ops,
normalisations, poolings) have a shape that is plain to see, and are answered here at once. Every other op goes to PyTorch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

aten = torch.ops.aten

__all__ = ["META", "ShapeMode", "run", "tensors_in"]

META = torch.device("meta")


def tensors_in(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The tensors among an ATen op's arguments, which nest them in lists at most."""
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += [item for item in value if isinstance(item, Tensor)]
    return found


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Execute an ATen overload on meta tensors.

    Tensors with data (integer tables, masks) may stand among the arguments. If all of them hold data the op is executed for real,
    which is how constants fold; otherwise they are taken to the meta device first.

    Raises whatever the op raises on a wrong shape.
    """
    tensors = tensors_in(args, kwargs)
    if not any(t.is_meta for t in tensors):
        return func(*args, **kwargs)
    quick = _QUICK.get(func.overloadpacket)
    if quick is None and torch.Tag.pointwise in func.tags:
        quick = _pointwise
    if quick is not None:
        out = quick(func, args, kwargs)
        if out is not None:
            return out
    if "device" in kwargs or not all(t.is_meta for t in tensors):
        args, kwargs = tree_map(_to_meta, (args, kwargs))
    return func(*args, **kwargs)


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor) and not value.is_meta and value.dim() > 0:
        return value.to(META)
    if isinstance(value, torch.device):
        return META
    return value


def _pointwise(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if func._schema.is_mutable:
        target = args[0]
        return target if isinstance(target, Tensor) and func._schema.arguments[0].alias_info is not None else None
    if len(func._schema.returns) != 1 or kwargs.get("out") is not None:
        return None
    tensors = [a for a in args if isinstance(a, Tensor)] + [a for a in kwargs.values() if isinstance(a, Tensor)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    key = tuple((a.dtype, a.dim() > 0) if isinstance(a, Tensor) else _hashable(a) for a in args)
    dtype = _pointwise_dtype(func, key, tuple(sorted((k, _hashable(v)) for k, v in kwargs.items())))
    if dtype is None:
        return None
    for t in tensors:
        if t.is_meta and t.shape == shape:
            return torch.empty_like(t, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=META)


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return (value.dtype, value.dim() > 0)
    if isinstance(value, bool | str | torch.dtype) or value is None:
        return value
    return type(value)


@functools.cache
def _pointwise_dtype(func: Any, key: tuple[Any, ...], kwkey: tuple[tuple[str, Any], ...]) -> torch.dtype | None:
    """Ask PyTorch once, on one-element tensors, which dtype the op returns for these kinds of argument."""

    def sample(kind: Any) -> Any:
        if isinstance(kind, tuple):
            return torch.ones((1,) if kind[1] else (), dtype=kind[0])
        if isinstance(kind, type):
            return kind(1) if kind in (int, float, complex) else None
        return kind

    if any(isinstance(k, type) and k not in (int, float, complex) for k in key + tuple(v for _, v in kwkey)):
        return None
    out = func(*(sample(k) for k in key), **{k: sample(v) for k, v in kwkey})
    return out.dtype if isinstance(out, Tensor) else None


def _like_first(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x = args[0]
    return torch.empty_like(x) if x.is_meta and x.is_floating_point() else None


def _softmax(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    dtype = kwargs.get("dtype", args[2] if len(args) > 2 and isinstance(args[2], torch.dtype) else None)
    return None if dtype is not None else _like_first(func, args, kwargs)


def _adaptive(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    x, size = args[0], args[1] if len(args) > 1 else kwargs["output_size"]
    size = [int(s) for s in size]
    if any(s < 0 for s in size) or x.dim() < len(size) + 1:
        return None
    return x.new_empty([*x.shape[: x.dim() - len(size)], *size])


def _upsample(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if func._overloadname != "vec":
        return None
    names = [a.name for a in func._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, size = given["input"], given.get("output_size")
    scale: Any = given.get("scale_factors")
    spatial: Sequence[int] = size if size is not None else [int(s * f) for s, f in zip(x.shape[2:], scale, strict=True)]
    return x.new_empty([*x.shape[:2], *spatial])


def _cat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    tensors, dim = args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0)
    first = tensors[0]
    if any(t.dtype != first.dtype or t.dim() != first.dim() or not t.is_meta for t in tensors):
        return None
    dim %= first.dim()
    rest = [*first.shape[:dim], *first.shape[dim + 1 :]]
    if any([*t.shape[:dim], *t.shape[dim + 1 :]] != rest for t in tensors):
        return None
    return first.new_empty([*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]])


_QUICK: dict[Any, Callable[..., Tensor | None]] = {
    aten.batch_norm: _like_first,
    aten.instance_norm: _like_first,
    aten.layer_norm: _like_first,
    aten.group_norm: _like_first,
    aten.rms_norm: _like_first,
    aten.dropout: _like_first,
    aten.cat: _cat,
    aten.softmax: _softmax,
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


class ShapeMode(TorchDispatchMode):
    """Run Python code on meta tensors through :func:`run`; enter it together with ``torch.inference_mode()``."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
