"""Rules that users register.

The code on the page about rules works, invalid names are refused, and a wrong rule is caught.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

import fxprune
from fxprune.errors import ArgumentError, RewriteError, VerificationError
from fxprune.ops import table

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
IMAGE = torch.zeros(1, 3, 8, 8)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(table, "OPS", dict(table.OPS))
    for cached in (table.find_row, table.exact_row):
        cached.cache_clear()
    yield
    for cached in (table.find_row, table.exact_row):
        cached.cache_clear()


def op(function: Any) -> None:
    torch.library.custom_op(
        f"fxprune_test::{function.__name__}", function, mutates_args=()
    ).register_fake(torch.empty_like)


@op
def softsign(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


@op
def reversed_channels(x: Tensor) -> Tensor:
    return x.flip(1)


@op
def shared(x: Tensor) -> Tensor:
    return x + x.mean(1, keepdim=True)


@op
def shifted(x: Tensor) -> Tensor:
    return x + 1


class Between(nn.Module):
    """Two convolutions with a custom op between them."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.first, self.second, self.name = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3), name

    def forward(self, x: Tensor) -> Tensor:
        return self.second(getattr(torch.ops.fxprune_test, self.name)(self.first(x)))


def test_the_page_does_what_it_says() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 3
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    report = names["pruned"].report
    assert report.params_after < 0.6 * report.params_before
    # 16 channels of 14 x 14 pixels enter the gate, and its formula counts one MAC for each value
    net = names["Net"]()
    without = fxprune.prune(net, torch.zeros(1, 3, 16, 16), channels=1.0).report.macs_before
    assert without == 16 * 14 * 14 * 3 * 9 + 16 * 14 * 14 + 8 * 12 * 12 * 16 * 9


@op
def counted(x: Tensor) -> Tensor:
    return 2 * x


# nothing can be removed, which is what is tested
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_a_formula_that_torch_was_told_counts() -> None:
    plain = fxprune.prune(Between("counted"), IMAGE, channels=0.5).report.macs_before
    register_flop_formula(torch.ops.fxprune_test.counted)(
        lambda shape, out_shape=None, **_: 2 * torch.Size(shape).numel()
    )
    told = fxprune.prune(Between("counted"), IMAGE, channels=0.5).report.macs_before
    assert told - plain == 8 * 6 * 6


# nothing can be removed, which is what is tested
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_an_op_without_a_rule_pins_what_enters_it_and_one_with_a_rule_does_not() -> None:
    before = fxprune.prune(Between("softsign"), IMAGE, channels=0.5)
    assert before.report.params_after == before.report.params_before
    assert any(
        "fxprune_test::softsign has no rule" in pinned.reason for pinned in before.report.pinned
    )
    assert before.report.error is None
    fxprune.register_rule("fxprune_test::softsign", like="pointwise")
    after = fxprune.prune(Between("softsign"), IMAGE, channels=0.5)
    assert after.model.get_submodule("second").weight.shape == (4, 4, 3, 3)
    assert after.report.error is not None
    assert after.report.error < 1e-12


# nothing can be removed, which is what is tested
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_whether_zero_stays_zero_is_tried_not_believed() -> None:
    """An operation is run on zeros to see whether it keeps them, whatever its rule says.

    Here removed channels become ones. A convolution after the operation loses the weights that
    would read them, so they can be removed. A sum over channels would count them, so they are
    kept.
    """
    fxprune.register_rule("fxprune_test::shifted", like="pointwise")
    pruned = fxprune.prune(Between("shifted"), IMAGE, channels=0.5)
    assert pruned.model.get_submodule("second").weight.shape == (
        4,
        4,
        3,
        3,
    )  # the weights that read removed channels are removed, too
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-12

    class Summed(Between):
        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.fxprune_test.shifted(self.first(x)).sum(1)

    summed = fxprune.prune(Summed("shifted"), IMAGE, channels=0.5)
    assert summed.model.get_submodule("first").weight.shape == (8, 3, 3, 3)


@pytest.mark.parametrize("wrong", ["reversed_channels", "shared"])
def test_a_wrong_rule_is_caught(wrong: str) -> None:
    name = f"fxprune_test::{wrong}"
    fxprune.register_rule(name, like="pointwise")
    net = Between(wrong)
    with pytest.raises(
        VerificationError,
        match=rf"differs from the masked original by .* rules registered for {name}",
    ):
        fxprune.prune(net, IMAGE, channels=0.5)
    kept = fxprune.prune(net, IMAGE, channels=0.5, keep="first")
    assert kept.report.params_after == kept.report.params_before
    unproved = fxprune.prune(net, IMAGE, channels=0.5, verify=False)
    assert unproved.report.error is None
    assert fxprune.verify(net, unproved).error > 1e-3


# nothing can be removed, which is what is tested
@pytest.mark.filterwarnings("ignore::fxprune.FxpruneWarning")
def test_where_a_rule_forgets_a_dimension_nothing_is_pruned() -> None:
    @fxprune.register_rule("fxprune_test::softsign")
    def _(context: Any, op: Any, arguments: dict[str, Tensor], result: Tensor) -> None:
        """Set no labels on the result."""

    pruned = fxprune.prune(Between("softsign"), IMAGE, channels=0.5)
    assert pruned.report.params_after == pruned.report.params_before
    assert any(pinned.node == "softsign" for pinned in pruned.report.pinned)


def test_a_rule_that_fails_says_so() -> None:
    @fxprune.register_rule("fxprune_test::softsign")
    def _(context: Any, op: Any, arguments: dict[str, Tensor], result: Tensor) -> None:
        arguments["y"]

    with pytest.raises(
        RewriteError, match=r"the rule of fxprune_test::softsign failed at .*KeyError\('y'\)"
    ):
        fxprune.prune(Between("softsign"), IMAGE, channels=0.5)


@pytest.mark.parametrize(
    ("name", "like", "says"),
    [
        ("softsign", "pointwise", "give its name"),
        ("aten::relu", "pointwise", "no op of your own"),
        ("fxprune_test::", None, "give its name"),
        ("fxprune_test::softsign", "no_such_op", "docs/rules.md lists"),
    ],
)
def test_names_that_are_refused(name: str, like: str | None, says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        fxprune.register_rule(name, like=like)


def test_one_rule_for_one_op() -> None:
    fxprune.register_rule("fxprune_test::softsign", like="pointwise")
    with pytest.raises(ArgumentError, match="has a rule already"):
        fxprune.register_rule("fxprune_test::softsign", like="linear")
