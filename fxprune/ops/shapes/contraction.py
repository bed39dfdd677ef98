"""Shapes of products, linear layers, attention and convolutions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fxprune.common.dispatch import META, aten
from fxprune.ops.shapes.common import as_many, broadcast, empty


def product_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``mm``, (m, k) by (k, n), or of a batch of such products, ``bmm``."""
    a, b = args[:2]
    rank = 3 if func.overloadpacket in (aten.bmm, aten.baddbmm) else 2
    if len(args) > 2 or not a.dim() == b.dim() == rank or a.shape[:-2] != b.shape[:-2]:
        return None
    return matmul_shape(func, (a, b), kwargs)


def vector_product_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the shape of a product by a vector, ``mv`` or ``dot``."""
    rank = 2 if func.overloadpacket is aten.mv else 1
    is_product = args[0].dim() == rank and args[1].dim() == 1
    return matmul_shape(func, args, kwargs) if is_product else None


def matmul_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``matmul``, whose leading dimensions broadcast.

    A vector is a row on the left and a column on the right.
    """
    a, b = args
    if not a.dim() or not b.dim() or a.shape[-1] != b.shape[max(-2, -b.dim())]:
        return None
    if a.dtype != b.dtype:  # torch accepts it on meta tensors
        raise RuntimeError(f"matmul of {a.dtype} and {b.dtype}: their dtypes must be the same")
    batch = broadcast({a.shape[:-2], b.shape[:-2]})
    if batch is None:
        return None
    return empty(
        [*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.dim() > 1 else ())],
        dtype=a.dtype,
        device=META,
    )


def sum_of_product_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the shape of ``addmm`` or ``baddbmm``, a product plus a tensor."""
    out = product_shape(func, args[1:3], kwargs) if len(args) == 3 else None
    fits = (
        out is not None
        and args[0].dtype == out.dtype
        and broadcast({args[0].shape, out.shape}) == out.shape
    )
    return out if fits else None


def linear_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``linear``."""
    x, weight = args[0], args[1]
    if weight.dim() != 2 or x.dtype != weight.dtype or x.shape[-1:] != weight.shape[1:]:
        return None
    if len(args) > 2 and args[2] is not None and args[2].shape != weight.shape[:1]:
        return None
    return empty([*x.shape[:-1], weight.shape[0]], dtype=x.dtype, device=META)


def attention_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of attention on tensors of four dimensions."""
    query, key, value = args[:3]
    if (
        not query.dim() == key.dim() == value.dim() == 4
        or not query.shape[:2] == key.shape[:2] == value.shape[:2]
    ):
        return None
    if query.shape[3] != key.shape[3] or key.shape[2] != value.shape[2]:
        return None
    return empty([*query.shape[:-1], value.shape[-1]], dtype=query.dtype, device=META)


def convolution_shape(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Return the shape of ``conv1d``, ``conv2d`` or ``conv3d`` with numeric padding."""
    if func._overloadname == "padding" or kwargs:
        return None
    defaults: tuple[Any, ...] = (None, 1, 0, 1, 1)
    x, weight, bias, stride, padding, dilation, groups = (*args, *defaults[len(args) - 2 :])
    count = weight.dim() - 2
    fits = x.dim() == count + 2 and x.shape[1] == weight.shape[1] * groups
    if not fits or weight.shape[0] % groups or x.dtype != weight.dtype:
        return None  # PyTorch reports the error
    # PyTorch's meta kernel accepts such a bias
    if bias is not None and bias.shape != weight.shape[:1]:
        raise RuntimeError(
            f"a bias of shape {tuple(bias.shape)} for {weight.shape[0]} output channels"
        )
    stride, padding, dilation = (as_many(value, count) for value in (stride, padding, dilation))
    spatial = []
    for size, kernel, s, p, d in zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
    ):
        spatial.append((size + 2 * p - d * (kernel - 1) - 1) // s + 1)
    return _image(x, weight.shape[0], spatial)


def convolution_either_way_shape(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """Return the shape of ``aten.convolution``, transposed or not."""
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = args
    if not transposed:
        plain = (x, weight, bias, stride, padding, dilation, groups)
        return convolution_shape(func, plain, kwargs)
    count = weight.dim() - 2
    fits = x.dim() == count + 2 and x.shape[1] == weight.shape[0]
    if not fits or x.shape[1] % groups or x.dtype != weight.dtype:
        return None
    settings = (stride, padding, dilation, output_padding)
    stride, padding, dilation, more = (as_many(value, count) for value in settings)
    outputs = weight.shape[1] * groups
    if any(m >= max(s, d) for m, s, d in zip(more, stride, dilation, strict=True)):
        return None
    if bias is not None and tuple(bias.shape) != (outputs,):
        return None
    spatial = []
    for size, kernel, s, p, d, m in zip(
        x.shape[2:], weight.shape[2:], stride, padding, dilation, more, strict=True
    ):
        spatial.append((size - 1) * s - 2 * p + d * (kernel - 1) + m + 1)
    return _image(x, outputs, spatial)


def _image(x: Tensor, channels: int, spatial: list[int]) -> Tensor | None:
    """Return a batch of images of these sizes with the dtype of ``x``; None if one is empty."""
    if min(spatial) <= 0:
        return None
    return empty([x.shape[0], channels, *spatial], dtype=x.dtype, device=META)
