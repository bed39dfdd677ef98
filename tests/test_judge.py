"""The judge of drawn networks: its networks are varied and run, and it finds wrong models."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fxprune
from tests.judge.blocks import BLOCKS, OPTIONS, RESULTS, SOURCES
from tests.judge.campaign import Summary, campaign
from tests.judge.shrink import shrunk
from tests.judge.source import write
from tests.judge.spec import Item, Spec, draw
from tests.judge.verdict import Verdict, judge, leaves, run


def test_a_seed_gives_one_network() -> None:
    """A seed always draws the same spec with the same source, and the spec can be parsed again."""
    for seed in range(60):
        spec = draw(seed)
        assert spec == draw(seed) == Spec.parse(str(spec))
        assert write(spec).text == write(spec).text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "image:3",
        "image:3 classify:9",
        "image layer:3 classify:1 half:2",
        "image:3 layer:4) classify:9 half:1",
    ],
)
def test_what_is_no_spec_is_said(text: str) -> None:
    """A text that is not a complete spec is refused."""
    with pytest.raises(ValueError, match="is no spec"):
        Spec.parse(text)


@pytest.mark.filterwarnings("ignore")
def test_every_block_is_drawn_and_nearly_every_network_runs() -> None:
    """Every kind of block occurs, and at least 96 of 100 networks run before pruning."""
    kinds: collections.Counter[str] = collections.Counter()

    def count(items: tuple[Item, ...]) -> None:
        for item in items:
            kinds[item.kind] += 1
            count(item.children)

    for seed in range(800):
        spec = draw(seed)
        count((spec.source, *spec.blocks, spec.result, spec.options))
    assert set(kinds) == {*BLOCKS, *SOURCES, *RESULTS, *OPTIONS}
    fail = 0
    for seed in range(100):
        drawn = write(draw(seed))
        try:
            outputs = leaves(run(drawn.build().double().eval(), drawn.example.make(3, 0)))
            assert outputs
        except (RuntimeError, KeyError):
            fail += 1
        finally:
            drawn.forget()
    assert fail <= 4


ONCE_WRONG = {
    "gradients where a norm of a removed row divides nothing by nothing": (
        "tokens:594 attention:429 objects:961 scope:767"
    ),
    "what a checkpoint computes again": (
        "image:730 layer:779 checkpointed:995(activation:857) layer:3 classify:9 half:2"
    ),
    "a gradient that is rounding, amplified": (
        "ids:572 layer:192 layer:634 container:860 attention:328 layer:216 scan:768 "
        "attention:882 classify:686 channels:37"
    ),
    "a size of a parametrised layer": (
        "image:363 layer:181 over_channels:689 classify:807 budget:452"
    ),
    "a size behind an operation of two tensors": (
        "image:363 layer:181 layer:81 joined:975 mixture:326 over_channels:689 norm:383 "
        "classify:807 budget:452"
    ),
    "a size of what was written into": (
        "tokens:247 layer:661 in_place:323 over_channels:560 classify:63 scope:583"
    ),
    "an axis that is cut, counted from the end": (
        "image:367 layer:205 layer:511 pooled:943 training_only:781(bottleneck:929 layer:653) "
        "layer:959 over_channels:674 cut:819 objects:833 half:696"
    ),
    "a size that is held, of axes that may be dropped": (
        "image:367 layer:205 pooled:943 cut:819 objects:833 half:696"
    ),
    "nothing by nothing, of which a choice makes numbers": (
        "tokens:866 layer:814 layer:417 scale:870 checkpointed:302(layer:499 over_groups:735) "
        "nested:998 budget:880"
    ),
    "axes that are dropped with a batch of one": (
        "image:739 layer:325 layer:221 squeeze_excite:759 plain:618 scope:383"
    ),
    "dropout in what a checkpoint computes again": (
        "ids:805 checkpointed:831(called_twice:483(dropout:143)) plain:49 channels:2"
    ),
    "random slopes before other random numbers": (
        "vector:132 functions_of_two:369 activation:946 drop_path:632 classify:603 half:0"
    ),
    "a norm whose result lies elsewhere": (
        "image:982 layer:379 norm:670 in_place:371 classify:554 budget:721"
    ),
    "activations that are kept with their gradients": (
        "image:620 layer:199 layer:590 activation:159 over_channels:418 "
        "without_gradients:531(captured:739 early_return:464(joined:269)) over_positions:877 "
        "optional:308(hooked:420) classify:411 budget:791"
    ),
    "a size behind moved axes": "image:73 layer:306 over_channels:560 dense:495 half:595",
}


@pytest.mark.parametrize("name", ONCE_WRONG)
def test_what_was_wrong_once_is_right(name: str) -> None:
    verdict = judge(Spec.parse(ONCE_WRONG[name]))
    assert verdict.outcome in ("right", "whole"), verdict.what


def test_blocks_can_be_dropped() -> None:
    """A spec without any one of its blocks is still a network with source."""
    spec = Spec.parse(
        "tokens:2 layer:1 residual:4(norm:8 activation:1) attention:5 pooled:3 norm:2 classify:9 "
        "half:2"
    )
    smaller = list(spec.without_one())
    assert len({str(s) for s in smaller}) == len(smaller) == 8
    for s in smaller:
        assert "class Network(nn.Module)" in write(s).text


def _changed(model: nn.Module) -> None:
    """Scale one weight tensor by 1.001."""
    with torch.no_grad():
        next(p for p in model.parameters() if p.dim() > 1).mul_(1.001)


def _in_training(model: nn.Module) -> None:
    """Change the momentum of a norm."""
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).momentum = 0.9


def _frozen(model: nn.Module) -> None:
    next(model.parameters()).requires_grad_(False)


@pytest.mark.parametrize(
    ("spoil", "setting"),
    [(_changed, "example"), (_in_training, "statistics after training"), (_frozen, "gradients")],
)
def test_a_wrong_model_is_called_wrong(
    spoil: Callable[[nn.Module], None], setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The judge finds a pruner's mistake, in the setting in which the mistake matters."""
    specs = (
        Spec.parse(f"image:3 layer:1 norm:{n} activation:4 classify:9 half:2") for n in range(1000)
    )
    spec = next(spec for spec in specs if "nn.BatchNorm2d" in write(spec).text)
    assert judge(spec).outcome == "right"
    right = fxprune.prune

    def wrong(*args: object, **options: object) -> fxprune.Pruned:
        pruned = right(*args, **options)  # type: ignore[arg-type]
        spoil(pruned.model)
        return pruned

    monkeypatch.setattr(fxprune, "prune", wrong)
    verdict = judge(spec)
    assert (verdict.outcome, verdict.what.split(":")[0]) == ("wrong", setting)


def test_an_input_that_the_original_refuses_is_none() -> None:
    """An input that the original refuses is not compared.

    A norm over groups of one value refuses a batch of one. The masked original, with its own
    statistics over survivors, would accept it.
    """
    assert (
        "nn.GroupNorm(4, 4)"
        in write(spec := Spec.parse("vector:524 layer:655 norm:430 plain:301 half:616")).text
    )
    assert judge(spec).outcome in ("right", "whole")


def test_a_failure_is_shrunk_to_its_cause() -> None:
    """Shrinking removes the blocks that do not contribute to a failure."""

    def fails_with_norm(spec: Spec) -> Verdict:
        return Verdict(
            str(spec), "wrong" if "norm:" in str(spec) else "right", "example: other numbers"
        )

    spec = Spec.parse("image:3 layer:17 residual:4(norm:8 activation:1) layer:9 classify:9 half:2")
    assert str(shrunk(spec, fails_with_norm)) == "image:3 norm:8 classify:9 half:2"


@pytest.mark.long
def test_a_campaign_counts_what_came_of_each_network() -> None:
    """A campaign judges each seed once, and its summary counts the outcomes."""
    summary = Summary("a command")
    for verdict in campaign(range(3)):
        summary.add(verdict)
    assert summary.count == 3
    assert "drawn: 3" in str(summary)
    summary.add(dataclasses.replace(verdict, outcome="wrong", what="batch 5: shapes"))
    assert summary.as_dict()["wrong_by_setting"]["batch 5"] >= 1


def _judged(seeds: range) -> collections.Counter[str]:
    """Return the number of networks of each outcome.

    Fail if a network is wrong, with the command that reproduces it.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    for seed in seeds:
        verdict = judge(draw(seed))
        assert verdict.outcome != "wrong", (
            f"{verdict.what}\n    python -m tests.judge --spec '{verdict.spec}'"
        )
        outcomes[verdict.outcome] += 1
    return outcomes


@pytest.mark.parametrize("first", range(0, 40, 10))
def test_drawn_networks_equal_their_masked_originals(first: int) -> None:
    """Pruned networks equal their masked originals in every setting, and most get smaller.

    The settings are the example, other batches and sizes, training, save and load, and deployment.
    """
    assert _judged(range(first, first + 10))["right"] >= 7


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 3000, 100))
def test_two_thousand_drawn_networks_equal_their_masked_originals(first: int) -> None:
    """The same holds for more networks.

    ``python -m tests.judge --count 20000`` draws any number of them.
    """
    assert _judged(range(first, first + 100))["right"] >= 85
