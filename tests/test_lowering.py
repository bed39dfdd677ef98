"""PlainAttention computes what nn.MultiheadAttention computes, and has its parameters."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxprune.trace.decompose import PlainAttention, lower
from tests.support.checking import randomise, relative_error

WIDTH, HEADS, BATCH, TOKENS, SOURCE = 8, 2, 3, 5, 4


def pair(**options: Any) -> tuple[nn.MultiheadAttention, PlainAttention]:
    """Return a randomised attention module and its lowered form."""
    module = randomise(nn.MultiheadAttention(WIDTH, HEADS, **options)).eval()
    plain = lower(copy.deepcopy(module))
    assert isinstance(module, nn.MultiheadAttention)
    assert isinstance(plain, PlainAttention)
    return module, plain


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def inputs(module: nn.MultiheadAttention, batched: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value of different lengths, as the module's options require."""

    def lay(length: int, width: int) -> Tensor:
        x = draw(BATCH, length, width)
        return x[0] if not batched else x if module.batch_first else x.transpose(0, 1)

    return lay(TOKENS, WIDTH), lay(SOURCE, module.kdim), lay(SOURCE, module.vdim)


def same(module: nn.Module, plain: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        found, expected = plain(*args, **kwargs), module(*args, **kwargs)
    assert (found[1] is None) == (expected[1] is None)
    assert (
        relative_error([t for t in found if t is not None], [t for t in expected if t is not None])
        <= 1e-12
    )


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_self_attention(batched: bool, batch_first: bool, need_weights: bool) -> None:
    module, plain = pair(batch_first=batch_first)
    query = inputs(module, batched)[0]
    same(module, plain, query, query, query, need_weights=need_weights)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("widths", [{}, {"kdim": 6, "vdim": 10}, {"kdim": 6}])
@pytest.mark.parametrize("need_weights", [True, False])
def test_cross_attention(batched: bool, widths: dict[str, int], need_weights: bool) -> None:
    module, plain = pair(batch_first=True, **widths)
    same(module, plain, *inputs(module, batched), need_weights=need_weights)


OPTIONS = [
    dict(zip(("bias", "add_bias_kv", "add_zero_attn"), flags, strict=True))
    for flags in itertools.product([True, False], repeat=3)
]


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: " ".join(k for k, v in o.items() if v) or "none"
)
def test_biases_and_added_tokens(options: dict[str, bool], need_weights: bool) -> None:
    module, plain = pair(**options)
    masks = {"attn_mask": draw(TOKENS, SOURCE), "key_padding_mask": draw(BATCH, SOURCE)}
    same(module, plain, *inputs(module), need_weights=need_weights)
    same(module, plain, *inputs(module), need_weights=need_weights, **masks)


def mask(kind: str, *shape: int) -> Tensor:
    if kind == "float":
        return draw(*shape)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False  # a row with everything hidden is NaN
    return hidden


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize(
    "shape", [(TOKENS, SOURCE), (BATCH * HEADS, TOKENS, SOURCE)], ids=["2d", "3d"]
)
def test_attention_masks(kind: str, shape: tuple[int, ...], need_weights: bool) -> None:
    module, plain = pair(batch_first=True)
    same(module, plain, *inputs(module), attn_mask=mask(kind, *shape), need_weights=need_weights)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("batched", [True, False])
def test_padding_masks(kind: str, batched: bool, need_weights: bool) -> None:
    module, plain = pair(batch_first=True)
    padding = mask(kind, BATCH, SOURCE) if batched else mask(kind, SOURCE)
    same(
        module,
        plain,
        *inputs(module, batched),
        key_padding_mask=padding,
        need_weights=need_weights,
    )
    both = {"attn_mask": mask(kind, TOKENS, SOURCE), "key_padding_mask": padding}
    same(module, plain, *inputs(module, batched), need_weights=need_weights, **both)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_causal(need_weights: bool, padded: bool) -> None:
    module, plain = pair(batch_first=True)
    query = inputs(module)[0]
    hidden = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    padding = mask("bool", BATCH, TOKENS) if padded else None
    same(module, plain, query, query, query, padding, need_weights, hidden, is_causal=True)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_weights_of_each_head(average: bool, batched: bool) -> None:
    module, plain = pair(batch_first=True)
    same(module, plain, *inputs(module, batched), average_attn_weights=average)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_the_same_numbers(need_weights: bool) -> None:
    module, plain = pair(dropout=0.5, batch_first=True)
    query, outputs = inputs(module)[0], []
    for network in (module.train(), plain.train()):
        torch.manual_seed(3)
        outputs.append(network(query, query, query, need_weights=need_weights)[0])
    assert relative_error(*outputs) <= 1e-12
    assert relative_error(outputs[0], plain.eval()(query, query, query)[0]) > 0.1


@pytest.mark.parametrize(
    "options", [{}, {"kdim": 6, "vdim": 10}, {"add_bias_kv": True}, {"bias": False}], ids=str
)
def test_state_dict_keys(options: dict[str, Any]) -> None:
    module, plain = pair(**options)
    assert list(plain.state_dict()) == list(module.state_dict())


def test_parameters_are_shared_with_the_source() -> None:
    module = nn.MultiheadAttention(WIDTH, HEADS)
    assert all(
        a is b for a, b in zip(lower(module).parameters(), module.parameters(), strict=True)
    )


def test_a_module_under_two_names_stays_one() -> None:
    attention = nn.MultiheadAttention(WIDTH, HEADS)
    lowered = lower(
        nn.ModuleDict({"a": attention, "b": nn.Sequential(attention, nn.Linear(2, 2))})
    )
    assert isinstance(lowered["a"], PlainAttention)
    assert lowered["a"] is lowered["b"][0]
    assert type(lowered["b"][1]) is nn.Linear


def test_a_subclass_is_left_alone() -> None:
    """A subclass may have its own forward."""
    kind = type("Mine", (nn.MultiheadAttention,), {})
    assert type(lower(nn.Sequential(kind(WIDTH, HEADS)))[0]) is kind
