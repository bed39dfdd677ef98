"""Shapes that fxprune computes itself equal PyTorch's, and what PyTorch refuses is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from fxprune.common.dispatch import tensors_in
from fxprune.ops.running import ShapeMode, run

FLOATS = (torch.float32, torch.float64, torch.bfloat16)
DTYPES = (*FLOATS, torch.int64, torch.uint8, torch.bool)
sizes = st.integers(1, 5)
seldom = st.integers(0, 2)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the shapes and dtypes of the result, or "refused" if there is none."""
    try:
        out = function(*args, **kwargs)
    except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError, AssertionError):
        return "refused"
    return tree_map(
        lambda t: (tuple(t.shape), t.dtype, t.device.type) if isinstance(t, Tensor) else t, out
    )


def agree(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Assert that a function does under ``ShapeMode`` what it does on meta tensors or real data.

    Return its outcome under ``ShapeMode``.
    """
    with torch.inference_mode():
        expected = outcome(function, *args, **kwargs)
        with ShapeMode():
            found = outcome(function, *args, **kwargs)
    assert found == expected or found == outcome_with_data(function, *args, **kwargs)
    return found


def outcome_with_data(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Return the outcome with real data.

    Some of PyTorch's meta kernels accept what the real kernels refuse, and some of torch 2.11
    return other shapes.
    """
    args, kwargs = tree_map(
        lambda t: torch.ones_like(t, device="cpu") if isinstance(t, Tensor) else t, (args, kwargs)
    )
    return tree_map(
        lambda leaf: "meta" if leaf == "cpu" else leaf, outcome(function, *args, **kwargs)
    )


def strided(draw: Any, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a meta tensor of a shape with its axes in some order in memory."""
    order = draw(st.permutations(range(len(shape))))
    return meta(*(shape[d] for d in order), dtype=dtype).permute(
        [order.index(d) for d in range(len(shape))]
    )


# -- convolutions and products


@settings(max_examples=30)
@given(data=st.data(), count=st.integers(1, 3), groups=st.integers(1, 3), bias=st.booleans())
def test_convolution(data: Any, count: int, groups: int, bias: bool) -> None:
    draw = data.draw
    each = st.one_of(st.integers(1, 3), st.tuples(*[st.integers(1, 3)] * count))
    kernel, spatial = (
        draw(st.tuples(*[st.integers(1, 3)] * count)),
        draw(st.tuples(*[st.integers(1, 8)] * count)),
    )
    inputs, outputs = groups * draw(sizes), groups * draw(sizes)
    padding = draw(
        st.one_of(seldom, st.tuples(*[seldom] * count), st.sampled_from(["valid", "same"]))
    )
    x = strided(draw, (draw(sizes), inputs, *spatial))
    weight = meta(outputs, inputs // groups, *kernel)
    function = getattr(F, f"conv{count}d")
    agree(
        function,
        x,
        weight,
        meta(outputs) if bias else None,
        draw(each),
        padding,
        draw(each),
        groups,
    )


@pytest.mark.parametrize("shape", [(4, 5, 5), (2, 4, 5), (2, 5, 5, 5), (2, 4, 1, 5), (4,)])
def test_convolution_of_another_rank_or_width(shape: tuple[int, ...]) -> None:
    agree(F.conv2d, meta(*shape), meta(6, 4, 3, 3))


@pytest.mark.parametrize("groups", [2, 3, 4])
def test_convolution_whose_groups_do_not_divide(groups: int) -> None:
    agree(F.conv2d, meta(2, 4, 5, 5), meta(6, 2, 3, 3), groups=groups)


def test_bias_of_a_wrong_width_is_refused() -> None:
    assert agree(F.linear, meta(2, 4), meta(6, 4), meta(5)) == "refused"


@settings(max_examples=30)
@given(
    lead=st.lists(sizes, max_size=3),
    inputs=sizes,
    outputs=sizes,
    wrong=st.booleans(),
    bias=st.booleans(),
)
def test_linear(lead: list[int], inputs: int, outputs: int, wrong: bool, bias: bool) -> None:
    weight = meta(outputs, inputs + wrong)
    assert (
        agree(F.linear, meta(*lead, inputs), weight, meta(outputs) if bias else None) == "refused"
    ) == wrong


@settings(max_examples=30)
@given(batch=sizes, heads=sizes, tokens=sizes, source=sizes, width=sizes, out=sizes)
def test_attention(batch: int, heads: int, tokens: int, source: int, width: int, out: int) -> None:
    q, k, v = (
        meta(batch, heads, tokens, width),
        meta(batch, heads, source, width),
        meta(batch, heads, source, out),
    )
    agree(F.scaled_dot_product_attention, q, k, v)
    agree(F.scaled_dot_product_attention, q, k, v, meta(tokens, source, dtype=torch.bool))
    agree(F.scaled_dot_product_attention, q[0], k[0], v[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [((2, 3, 5, 4), (2, 3, 5, 8)), ((2, 3, 5, 8), (2, 3, 6, 8)), ((2, 4, 5, 8), (2, 4, 5, 8))],
)
def test_attention_of_wrong_shapes_is_refused(
    key: tuple[int, ...], value: tuple[int, ...]
) -> None:
    assert (
        agree(F.scaled_dot_product_attention, meta(2, 3, 5, 8), meta(*key), meta(*value))
        == "refused"
    )


# -- normalisations


@settings(max_examples=30)
@given(data=st.data(), rank=st.integers(2, 4), affine=st.booleans(), training=st.booleans())
def test_batch_norm(data: Any, rank: int, affine: bool, training: bool) -> None:
    x = strided(data.draw, data.draw(st.tuples(*[st.integers(2, 5)] * rank)))
    vector = meta(x.shape[1])
    agree(
        F.batch_norm,
        x,
        vector,
        vector,
        vector if affine else None,
        vector if affine else None,
        training,
    )


@settings(max_examples=30)
@given(data=st.data(), rank=st.integers(1, 4), dtype=st.sampled_from(FLOATS), affine=st.booleans())
def test_layer_norm_and_rms_norm(data: Any, rank: int, dtype: torch.dtype, affine: bool) -> None:
    x = strided(data.draw, data.draw(st.tuples(*[sizes] * rank)), dtype)
    shape = tuple(x.shape[rank - data.draw(st.integers(1, rank)) :])
    weight = meta(*shape, dtype=dtype) if affine else None
    agree(F.layer_norm, x, shape, weight, weight)
    agree(F.rms_norm, x, shape, weight)


@settings(max_examples=30)
@given(data=st.data(), groups=st.integers(1, 3), width=sizes, rank=st.integers(2, 4))
def test_group_norm(data: Any, groups: int, width: int, rank: int) -> None:
    x = strided(
        data.draw,
        (
            data.draw(st.integers(2, 4)),
            groups * width,
            *data.draw(st.tuples(*[st.integers(2, 4)] * (rank - 2))),
        ),
    )
    agree(F.group_norm, x, groups, meta(groups * width), meta(groups * width))


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: F.layer_norm(x, (7,)),
        lambda x, w: F.layer_norm(x, (8,), w, w),
        lambda x, w: F.rms_norm(x, (7,)),
        lambda x, w: F.group_norm(x, 3),
        lambda x, w: F.group_norm(x, 2, w, w),
    ],
    ids=["layer_norm", "layer_norm weight", "rms_norm", "group_norm", "group_norm weight"],
)
def test_normalisation_of_a_wrong_width_is_refused(function: Callable[..., Any]) -> None:
    assert agree(function, meta(2, 8, 8), meta(7)) == "refused"


def test_batch_norm_of_a_wrong_width_is_refused() -> None:
    assert agree(F.batch_norm, meta(2, 8, 4), meta(6), meta(6), meta(6), meta(6)) == "refused"


# -- pointwise


UNARY = [
    torch.relu,
    torch.sigmoid,
    torch.exp,
    torch.abs,
    torch.neg,
    torch.sqrt,
    torch.logical_not,
    torch.isnan,
    F.gelu,
    F.silu,
]
UNARY += [F.relu6, F.hardswish, F.hardsigmoid, F.leaky_relu, F.dropout]
BINARY = [
    torch.add,
    torch.sub,
    torch.mul,
    torch.div,
    torch.pow,
    torch.maximum,
    torch.eq,
    torch.lt,
    torch.ge,
    torch.logical_and,
]
BINARY += [torch.floor_divide, torch.remainder, torch.bitwise_and, torch.atan2]
named = {"ids": lambda function: function.__name__}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", UNARY, **named)
def test_unary(function: Callable[..., Any], dtype: torch.dtype) -> None:
    agree(function, meta(2, 3, dtype=dtype))
    agree(function, meta(dtype=dtype))


def operand(draw: Any, shape: tuple[int, ...]) -> Any:
    """Return a tensor that broadcasts to a shape, or a Python number."""
    kind = draw(st.sampled_from(["tensor", "tensor", "scalar tensor", "number"]))
    if kind == "number":
        return draw(st.sampled_from([2, 0.5, True]))
    if kind == "scalar tensor":
        return meta(dtype=draw(st.sampled_from(DTYPES)))
    own = tuple(draw(st.sampled_from([n, 1])) for n in shape[draw(st.integers(0, len(shape))) :])
    return strided(draw, own, draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("function", BINARY, **named)
@settings(max_examples=30)
@given(data=st.data())
def test_binary_promotes_and_broadcasts(function: Callable[..., Any], data: Any) -> None:
    shape = data.draw(st.lists(sizes, max_size=3).map(tuple))
    x = strided(data.draw, shape, data.draw(st.sampled_from(DTYPES)))
    agree(function, x, operand(data.draw, shape))


@settings(max_examples=30)
@given(data=st.data())
def test_where_clamp_and_addcmul(data: Any) -> None:
    shape = data.draw(st.lists(sizes, min_size=1, max_size=3).map(tuple))
    mask, x = strided(data.draw, shape, torch.bool), operand(data.draw, shape)
    agree(torch.where, mask, x, operand(data.draw, shape))
    agree(torch.addcmul, meta(*shape), meta(*shape[-1:]), meta(*shape))
    agree(torch.clamp, strided(data.draw, shape), 0, 1.5)


def test_sizes_that_do_not_broadcast_are_refused() -> None:
    assert agree(torch.add, meta(2, 3), meta(2, 4)) == "refused"
    assert agree(torch.cat, [meta(2, 3), meta(4, 3)], 1) == "refused"


@settings(max_examples=30)
@given(data=st.data())
def test_a_contiguous_result_stays_viewable(data: Any) -> None:
    """The memory layout may differ, but a view that PyTorch allows must not fail."""
    shape = data.draw(st.lists(st.integers(2, 5), min_size=2, max_size=4).map(tuple))
    x, y = strided(data.draw, shape), strided(data.draw, shape)
    width = meta(x.shape[1])
    functions = [
        lambda x, y, width: torch.relu(x),
        lambda x, y, width: x + y,
        lambda x, y, width: x + y[..., :1],
        lambda x, y, width: torch.softmax(x, -1),
        lambda x, y, width: F.dropout(x),
        lambda x, y, width: F.layer_norm(x, x.shape[1:]),
        lambda x, y, width: F.rms_norm(x, x.shape[1:]),
        lambda x, y, width: F.group_norm(x, 1),
        lambda x, y, width: F.batch_norm(x, width, width),
    ]
    given = x, y, width
    with_data = tuple(torch.empty_strided(t.shape, t.stride()).fill_(1.0) for t in given)
    for function in functions:
        with torch.inference_mode():
            expected = function(*given)
            with ShapeMode():
                found = function(*given)
            viewable = (
                expected.is_contiguous() and function(*with_data).is_contiguous()
            )  # group_norm's meta kernel of torch 2.11 is wrong
        assert found.is_contiguous() or not viewable


# -- in place


@pytest.mark.parametrize(
    "name", ["add_", "mul_", "clamp_", "relu_", "copy_", "fill_", "zero_", "masked_fill_"]
)
def test_in_place_gives_the_tensor_itself(name: str) -> None:
    x = meta(2, 3)
    rest: dict[str, tuple[Any, ...]] = {"clamp_": (0,), "relu_": (), "zero_": (), "fill_": (1.0,)}
    rest["masked_fill_"] = (meta(2, 3, dtype=torch.bool), 0.0)
    with torch.inference_mode(), ShapeMode():
        assert getattr(x, name)(*rest.get(name, (meta(3),))) is x


@pytest.mark.parametrize("name", ["unsqueeze_", "squeeze_", "t_"])
def test_in_place_views_change_the_shape(name: str) -> None:
    arguments = (0,) if "squeeze" in name else ()
    with torch.inference_mode(), ShapeMode():
        x, y = meta(1, 3), meta(1, 3)
        getattr(x, name)(*arguments)
    with torch.inference_mode():
        assert x.shape == getattr(y, name)(*arguments).shape
    assert x.shape != (1, 3)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 3)])
def test_in_place_of_a_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    assert agree(Tensor.add_, meta(2, 3), meta(*shape)) == "refused"


def test_in_place_of_a_wrong_dtype_is_refused() -> None:
    assert agree(Tensor.add_, meta(2, 3, dtype=torch.int64), 0.5) == "refused"


# -- concatenation, softmax, pooling and upsampling


@settings(max_examples=30)
@given(data=st.data(), rank=st.integers(1, 4), count=st.integers(1, 3))
def test_cat(data: Any, rank: int, count: int) -> None:
    shape, dim = data.draw(st.tuples(*[sizes] * rank)), data.draw(st.integers(-rank, rank - 1))
    along = [list(shape) for _ in range(count)]
    for own in along:
        own[dim] = data.draw(sizes)
    agree(torch.cat, [meta(*own, dtype=data.draw(st.sampled_from(DTYPES))) for own in along], dim)


def test_cat_of_a_legacy_empty_tensor() -> None:
    agree(torch.cat, [meta(0), meta(2, 3)], 1)


@pytest.mark.parametrize("dim", [-2, 2])
def test_dims_outside_are_refused(dim: int) -> None:
    x = meta(3)
    assert agree(torch.cat, [x, x], dim) == "refused"


@settings(max_examples=30)
@given(data=st.data(), dtype=st.sampled_from(DTYPES), to=st.sampled_from([None, *FLOATS]))
def test_softmax(data: Any, dtype: torch.dtype, to: torch.dtype | None) -> None:
    x = strided(data.draw, data.draw(st.lists(sizes, min_size=1, max_size=4).map(tuple)), dtype)
    dim = data.draw(st.integers(-x.dim(), x.dim() - 1))
    assert agree(torch.softmax, x, dim, to) == (tuple(x.shape), to or dtype, "meta")


@settings(max_examples=30)
@given(data=st.data(), count=st.integers(1, 3), batched=st.booleans())
def test_adaptive_pool(data: Any, count: int, batched: bool) -> None:
    x = meta(*data.draw(st.tuples(*[sizes] * (count + 1 + batched))))
    size = data.draw(st.one_of(sizes, st.tuples(*[st.one_of(sizes, st.none())] * count)))
    agree(
        getattr(F, f"adaptive_avg_pool{count}d"),
        x,
        size if count > 1 or isinstance(size, int) else size[0] or 2,
    )


UPSAMPLES = [
    ("nearest", 1),
    ("nearest", 2),
    ("nearest", 3),
    ("linear", 1),
    ("bilinear", 2),
    ("trilinear", 3),
    ("bicubic", 2),
]


@pytest.mark.parametrize(("mode", "count"), UPSAMPLES)
@settings(max_examples=30)
@given(data=st.data())
def test_upsample(mode: str, count: int, data: Any) -> None:
    x = meta(*data.draw(st.tuples(*[sizes] * (count + 2))))
    agree(F.interpolate, x, size=data.draw(st.tuples(*[sizes] * count)), mode=mode)
    factor = data.draw(
        st.one_of(
            st.sampled_from([1.0, 1.5, 2.0, 2.7, 3.0]),
            st.tuples(*[st.sampled_from([1.0, 2.0, 1.3])] * count),
        )
    )
    agree(F.interpolate, x, scale_factor=factor, mode=mode)


# -- other operations of networks

REDUCTIONS = [
    torch.mean,
    torch.sum,
    torch.amax,
    torch.amin,
    torch.std,
    torch.var,
    torch.norm,
    torch.linalg.vector_norm,
]
REDUCTIONS += [
    torch.prod,
    torch.std_mean,
    torch.var_mean,
    torch.aminmax,
    torch.argmax,
    torch.argmin,
    torch.any,
    torch.all,
]
REDUCTIONS += [torch.logsumexp]


@pytest.mark.parametrize("function", REDUCTIONS, ids=lambda function: function.__name__)
@given(data=st.data(), rank=st.integers(0, 4), dtype=st.sampled_from(DTYPES), keep=st.booleans())
def test_reductions(
    function: Callable[..., Any], data: Any, rank: int, dtype: torch.dtype, keep: bool
) -> None:
    x = strided(data.draw, tuple(data.draw(st.lists(sizes, min_size=rank, max_size=rank))), dtype)
    dims = data.draw(
        st.one_of(
            st.none(),
            st.integers(-rank - 1, rank),
            st.lists(st.integers(-rank, max(0, rank - 1)), max_size=3),
        )
    )
    if function in (torch.mean, torch.sum) and dims is None:
        agree(function, x)
    agree(function, x, dim=dims, keepdim=keep)


LEADS = st.lists(st.sampled_from([1, 2]), max_size=2)


@given(
    left=LEADS,
    right=LEADS,
    rows=st.integers(0, 3),
    shared=sizes,
    columns=st.integers(0, 3),
    wrong=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_products(
    left: list[int],
    right: list[int],
    rows: int,
    shared: int,
    columns: int,
    wrong: bool,
    dtype: torch.dtype,
) -> None:
    """With 0 rows or columns, the operand is a vector."""
    a = meta(*left, *([rows] if rows else []), shared) if rows else meta(shared)
    b = (
        meta(*right, shared + wrong, columns, dtype=dtype)
        if columns
        else meta(shared + wrong, dtype=dtype)
    )
    agree(torch.matmul, a, b)
    agree(torch.mm, a, b)
    agree(torch.bmm, a, b)
    for bias in (meta(columns or 1), meta(rows or 1, 1), meta(columns + 3)):
        agree(torch.addmm, bias, a, b)
        agree(torch.baddbmm, bias, a, b)


@pytest.mark.parametrize("count", [1, 2, 3])
@given(data=st.data(), groups=st.sampled_from([1, 2]), bias=st.booleans())
def test_transposed_convolution(data: Any, count: int, groups: int, bias: bool) -> None:
    draw = data.draw
    x = meta(2, 4, *draw(st.lists(sizes, min_size=count, max_size=count)))
    weight = meta(4, 3, *draw(st.lists(st.integers(1, 3), min_size=count, max_size=count)))
    stride, dilation = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    function = getattr(F, f"conv_transpose{count}d")
    agree(
        function,
        x,
        weight,
        meta(3 * groups) if bias else None,
        stride,
        draw(seldom),
        draw(seldom),
        groups,
        dilation,
    )


@pytest.mark.parametrize(
    "name", ["max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"]
)
@given(data=st.data(), batched=st.booleans(), ceil=st.booleans())
def test_pool(name: str, data: Any, batched: bool, ceil: bool) -> None:
    count, draw = int(name[-2]), data.draw
    x = meta(
        *([2] if batched else []),
        3,
        *draw(st.lists(st.integers(1, 9), min_size=count, max_size=count)),
    )
    kernel, stride, padding = (
        draw(st.integers(1, 4)),
        draw(st.one_of(st.none(), st.integers(1, 3))),
        draw(seldom),
    )
    agree(getattr(F, name), x, kernel, stride, padding, ceil_mode=ceil)


@given(data=st.data(), rank=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_movements(data: Any, rank: int, dtype: torch.dtype) -> None:
    draw = data.draw
    x = strided(draw, tuple(draw(st.lists(sizes, min_size=rank, max_size=rank))), dtype)
    dim = draw(st.integers(-rank - 2, rank + 1))
    agree(torch.stack, [x] * draw(st.integers(1, 3)), dim)
    agree(torch.stack, [x, meta(2)], 0)
    agree(F.glu, x, dim)
    agree(torch.flip, x, (dim,))
    agree(torch.roll, x, 1, dim)
    agree(x.repeat, *draw(st.lists(seldom, min_size=1, max_size=4)))
    for like in (torch.empty_like, torch.zeros_like, torch.ones_like, torch.rand_like):
        agree(like, x)
        agree(like, x, dtype=torch.float16)
    agree(torch.full_like, x, 3)


@given(shape=st.lists(st.integers(1, 8), min_size=3, max_size=4), factor=st.integers(1, 3))
def test_pixels(shape: list[int], factor: int) -> None:
    agree(F.pixel_shuffle, meta(*shape), factor)
    agree(F.pixel_unshuffle, meta(*shape), factor)


@given(
    shape=st.lists(sizes, max_size=3),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.float32]),
)
def test_embedding(shape: list[int], dtype: torch.dtype) -> None:
    agree(F.embedding, meta(*shape, dtype=dtype), meta(7, 4))


@given(shape=st.lists(sizes, min_size=1, max_size=4), width=sizes)
def test_prelu(shape: list[int], width: int) -> None:
    agree(F.prelu, meta(*shape), meta(width))


@pytest.mark.parametrize(
    "function", [torch.einsum, torch.tensordot, F.normalize, F.cosine_similarity]
)
def test_what_is_made_of_others(function: Callable[..., Any]) -> None:
    x = meta(2, 3, 4)
    given = {
        torch.einsum: ("bij,bkj->bik", x, x),
        torch.tensordot: (x, meta(3, 4, 2)),
        F.cosine_similarity: (x, x),
    }.get(function, (x,))
    assert agree(function, *given) != "refused"


def test_a_range_is_on_the_device_that_was_asked_for() -> None:
    agree(torch.arange, 5, device="meta")
    agree(torch.arange, 1, 6, 2, dtype=torch.float64, device="meta")
    agree(torch.arange, 0.0, 1.0, 0.25, device="meta")


def test_data_is_computed_with_data() -> None:
    out = run(torch.ops.aten.add.Tensor, (torch.tensor([1, 2]), torch.tensor([3, 4])), {})
    assert out.tolist() == [4, 6]


def test_data_beside_meta_goes_to_meta() -> None:
    out = run(torch.ops.aten.mm.default, (torch.ones(2, 3), meta(3, 4)), {})
    assert (out.device.type, tuple(out.shape)) == ("meta", (2, 4))


def test_tensors_in_lists_are_found() -> None:
    x, y, z = meta(1), meta(2), meta(3)
    assert [
        t is u for t, u in zip(tensors_in(([x, None, y], 1), {"out": z}), (x, y, z), strict=True)
    ] == [True] * 3


@settings(max_examples=30)
@given(data=st.data(), rank=st.integers(0, 3), dtype=st.sampled_from(DTYPES))
def test_along_one_dimension(data: Any, rank: int, dtype: torch.dtype) -> None:
    draw = data.draw
    x = strided(draw, tuple(draw(st.lists(sizes, min_size=rank, max_size=rank))), dtype)
    dim = draw(st.integers(-rank - 1, rank))
    for function in (torch.log_softmax, torch.cumsum, torch.cumprod, torch.sort, torch.argsort):
        agree(function, x, dim)
    agree(torch.topk, x, draw(seldom), dim)
    agree(torch.tril, x)
    agree(torch.triu, x, 1)
    index = meta(
        *draw(st.lists(seldom, min_size=rank, max_size=rank)),
        dtype=draw(st.sampled_from([torch.int64, torch.float32])),
    )
    agree(torch.gather, x, dim, index)


@pytest.mark.parametrize("count", [1, 2, 3])
@settings(max_examples=30)
@given(data=st.data(), batched=st.booleans())
def test_pads(count: int, data: Any, batched: bool) -> None:
    draw = data.draw
    x = meta(*([2] if batched else []), 3, *draw(st.lists(sizes, min_size=count, max_size=count)))
    pads = draw(st.lists(st.integers(-2, 4), min_size=2 * count, max_size=2 * count))
    for mode in ("reflect", "replicate", "constant", "circular"):
        agree(F.pad, x, pads, mode)
    agree(F.pad, x, [1, -1] * (x.dim() + draw(st.booleans())))


@pytest.mark.parametrize("count", [2, 3])
@settings(max_examples=30)
@given(data=st.data(), batched=st.booleans())
def test_pools_with_indices(count: int, data: Any, batched: bool) -> None:
    draw = data.draw
    x = meta(
        *([2] if batched else []),
        3,
        *draw(st.lists(st.integers(1, 7), min_size=count, max_size=count)),
    )
    agree(getattr(F, f"adaptive_max_pool{count}d"), x, draw(sizes), True)
    agree(
        getattr(F, f"max_pool{count}d"),
        x,
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
        draw(seldom),
        return_indices=True,
    )


@settings(max_examples=30)
@given(data=st.data(), batched=st.booleans())
def test_columns(data: Any, batched: bool) -> None:
    draw = data.draw
    two = st.tuples(st.integers(1, 3), st.integers(1, 3))
    lead, height, width = [2] * batched, draw(sizes), draw(sizes)
    kernel, rest = draw(two), (draw(two), draw(st.tuples(seldom, seldom)), draw(two))
    columns = agree(F.unfold, meta(*lead, 3, height, width), kernel, *rest)
    agree(F.fold, meta(*lead, 6, 5), (height, width), kernel, *rest)
    if columns != "refused":
        assert agree(F.fold, meta(*columns[0]), (height, width), kernel, *rest) != "refused"


@settings(max_examples=30)
@given(
    shape=st.lists(sizes, min_size=1, max_size=4),
    dim=st.integers(-1, 4),
    wrong=st.booleans(),
    dtype=st.sampled_from(FLOATS),
)
def test_weight_norm(shape: list[int], dim: int, wrong: bool, dtype: torch.dtype) -> None:
    norm = meta(*(size + wrong if at == dim else 1 for at, size in enumerate(shape)), dtype=dtype)
    agree(torch._weight_norm, meta(*shape, dtype=dtype), norm, dim)


@settings(max_examples=30)
@given(data=st.data(), shape=st.lists(sizes, min_size=1, max_size=4))
def test_indices(data: Any, shape: list[int]) -> None:
    draw = data.draw
    one = st.sampled_from([(2,), (3, 1), (1,), (), (3, 2)]).map(
        lambda own: meta(*own, dtype=torch.int64)
    )
    indices = draw(st.lists(st.one_of(st.none(), one), min_size=1, max_size=len(shape) + 1))
    x = meta(*shape)
    found = agree(torch.ops.aten.index, x, indices)
    if found != "refused":
        for values in (meta(), meta(*found[0]), meta(*found[0][-1:]), meta(7, 7)):
            agree(torch.ops.aten.index_put, x, indices, values)


@settings(max_examples=30)
@given(data=st.data(), rank=st.sampled_from([2, 3]), wrong=st.booleans())
def test_grid_sample(data: Any, rank: int, wrong: bool) -> None:
    places = data.draw(st.lists(sizes, min_size=rank, max_size=rank))
    agree(
        F.grid_sample, meta(2, 3, *[4] * rank), meta(2, *places, rank + wrong), align_corners=False
    )


@settings(max_examples=30)
@given(shape=st.lists(sizes, min_size=2, max_size=5), groups=st.integers(1, 3))
def test_channel_shuffle(shape: list[int], groups: int) -> None:
    agree(F.channel_shuffle, meta(*shape), groups)


@settings(max_examples=30)
@given(left=st.lists(sizes, max_size=3), right=st.lists(sizes, max_size=2))
def test_products_by_a_vector(left: list[int], right: list[int]) -> None:
    agree(torch.mv, meta(*left), meta(*right))
    agree(torch.dot, meta(*left), meta(*right))
