"""Models of the transformers library, built from small configurations with random weights."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from tests.support.checking import TOLERANCE, randomise

transformers = pytest.importorskip(
    "transformers", reason="the transformers library is not installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of the library do not matter here

TOKENS = torch.arange(8)[None] + 3
SMALL = {
    "vocab_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}


def llama(**options: Any) -> nn.Module:
    """Two query heads per key-value head, rotary positions, RMSNorm and a gated MLP."""
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_key_value_heads=2, **SMALL, **options
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(hidden_size=32, intermediate_size=64, **SMALL)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    sizes = {"vocab_size": 64, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
    config = transformers.GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def masked(tokens: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(tokens)
    mask[:, -2:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


CASES = {
    "bert": (bert, masked, 0.33),
    "llama": (lambda: llama(use_cache=False), masked, 0.33),
    "gpt2": (gpt2, masked, 0.33),
}
"""The model, its inputs, and the largest share of parameters that may be left.

All widths are halved, except the vocabulary.
"""


LONG = [
    pytest.param("gpt2", "heads", marks=pytest.mark.slow),
    pytest.param("llama", "dims", marks=pytest.mark.slow),
]
"""Slow combinations of a model and a kind of units; the same model is tested with the other kind.

They take ten seconds each.
"""


@pytest.mark.parametrize(
    ("name", "units"),
    [("bert", "dims"), ("bert", "heads"), ("gpt2", "dims"), ("llama", "heads"), *LONG],
)
def test_half_the_width(name: str, units: str) -> None:
    build, inputs, at_most = CASES[name]
    torch.manual_seed(0)
    model = randomise(build()).eval()
    pruned = fxprune.prune(model, inputs(TOKENS), channels=0.5, units=units)
    assert fxprune.verify(model, pruned).error <= TOLERANCE
    assert pruned.report.params_after <= at_most * pruned.report.params_before, pruned.report
    for tokens in (TOKENS, TOKENS.repeat(3, 2)):
        out, before = pruned.model(**inputs(tokens)), model(**inputs(tokens))
        assert type(out) is type(before)
        assert out.logits.shape == before.logits.shape
        assert torch.isfinite(out.logits).all()


@pytest.mark.long
def test_a_decoder_that_remembers_still_generates() -> None:
    """Keys and values are kept in an object of the library.

    The modules around it are pruned, and the object is used as before.
    """
    torch.manual_seed(0)
    model = llama().eval()
    pruned = fxprune.prune(model, {"input_ids": TOKENS}, channels=0.5, verify=True, units="heads")
    assert pruned.report.parts
    assert pruned.report.params_after < 0.4 * pruned.report.params_before
    assert type(pruned.model).__name__ == "LlamaForCausalLM"
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 63}
    remembered = pruned.model.generate(TOKENS, **options)
    assert torch.equal(remembered, pruned.model.generate(TOKENS, use_cache=False, **options))


@pytest.mark.long
def test_a_pruned_decoder_trains() -> None:
    torch.manual_seed(0)
    model = llama(use_cache=False)
    pruned = fxprune.prune(model, masked(TOKENS), channels=0.5)
    pruned.model.train()
    optimizer = torch.optim.SGD(pruned.model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = pruned.model(**masked(TOKENS), labels=TOKENS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in pruned.model.parameters())
