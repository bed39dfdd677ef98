"""How the score depends on the width of each group alone: exact, cached, shown."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import ArgumentError, CallbackError, PlanError
from tests.support.checking import assert_unharmed, snapshot


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.GroupNorm(1, 8),  # its statistics are taken over the survivors: a mask is not exact
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 16, 5),
    ).eval()


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def norm(model: nn.Module) -> float:
    """Return a number that tells any two functions apart."""
    with torch.no_grad():
        return model(X).norm().item()


class Counted:
    """A score that counts its calls, and stops after some of them."""

    def __init__(self, stop: int | None = None) -> None:
        self.calls, self.stop = 0, stop

    def __call__(self, model: nn.Module) -> float:
        if self.calls == self.stop:
            raise KeyboardInterrupt
        self.calls += 1
        return norm(model)


@pytest.mark.parametrize("criterion", ["cpmc", "l2"])
def test_each_point_is_the_score_of_the_model_with_one_narrow_group(criterion: str) -> None:
    """The model is the one that prune gives with `layers` for this group alone."""
    model = network()
    before = snapshot(model)
    found = fxprune.sensitivity(model, X, norm, removed=(0.25, 0.5), criterion=criterion)
    assert_unharmed(model, before)
    assert found.dense == norm(model)
    groups = [group.name for group in fxprune.analyze(model, X).groups]
    assert [(p.group, p.removed) for p in found.points] == [
        (group, share) for group in groups for share in (0.25, 0.5)
    ]
    for point in found.points:
        layers = {point.group.partition(":")[0]: 1 - point.removed}
        alone = fxprune.prune(model, X, layers=layers, criterion=criterion)
        kept = {g.name: len(g.kept) for g in alone.plan.groups}
        assert kept == {
            **{g.name: g.size for g in alone.plan.groups},
            point.group: round((1 - point.removed) * point.total),
        }
        assert point.kept == kept[point.group] < point.total
        assert point.score == norm(alone.model) != found.dense


def test_a_group_that_can_lose_nothing_has_the_score_of_the_whole_model() -> None:
    """A norm without positions needs two channels for its statistics, so of two none goes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 2), nn.GroupNorm(1, 2), nn.Linear(2, 4))
    score = Counted()
    found = fxprune.sensitivity(model, X, score, removed=(0.5, 0.9))
    assert score.calls == 1
    assert found.points == tuple(
        fxprune.SensitivityPoint("1.weight:0", share, 2, 2, found.dense) for share in (0.5, 0.9)
    )


def test_shares_that_keep_equally_many_are_scored_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    score = Counted()
    found = fxprune.sensitivity(model, X, score, removed=(0.4, 0.45, 0.5))
    assert [point.kept for point in found.points] == [2, 2, 2]
    assert len({point.score for point in found.points}) == 1
    assert score.calls == 2  # the whole model, and the one with two units


def test_what_is_kept_has_no_points() -> None:
    found = fxprune.sensitivity(network(), X, norm, removed=(0.5,), keep="0")
    assert {point.group for point in found.points} == {"3.weight:0"}


# -- the cache


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_goes_on_where_it_was_interrupted(tmp_path: Path, stop: int) -> None:
    model, path = network(), tmp_path / "new" / "scores.json"
    expected = fxprune.sensitivity(model, X, norm, removed=(0.25, 0.5, 0.75))
    with pytest.raises(KeyboardInterrupt):
        fxprune.sensitivity(model, X, Counted(stop), removed=(0.25, 0.5, 0.75), cache=path)
    assert path.exists() == (stop > 0)
    again = Counted()
    assert fxprune.sensitivity(model, X, again, removed=(0.25, 0.5, 0.75), cache=path) == expected
    assert again.calls == 7 - max(stop - 1, 0)  # the whole model is scored anew each time
    assert [file.name for file in path.parent.iterdir()] == ["scores.json"]


def test_only_what_is_missing_is_computed(tmp_path: Path) -> None:
    """Other shares and another criterion add their points to the same file."""
    model, path = network(), tmp_path / "scores.json"

    def calls(**options: Any) -> int:
        score = Counted()
        found = fxprune.sensitivity(model, X, score, cache=path, **options)
        assert found == fxprune.sensitivity(model, X, norm, **options)
        return score.calls

    assert calls(removed=(0.25, 0.5)) == 5
    assert calls(removed=(0.25, 0.5)) == 1
    assert calls(removed=(0.25, 0.75)) == 3
    assert calls(removed=(0.25,), criterion=fxprune.criteria.Random(3)) == 3
    assert calls(removed=(0.25,)) == 1


@pytest.mark.parametrize("change", ["weights", "class", "score"])
def test_a_cache_of_another_model_or_score_is_refused(tmp_path: Path, change: str) -> None:
    class Other(nn.Sequential):
        pass

    path, model = tmp_path / "scores.json", network()
    fxprune.sensitivity(model, X, norm, removed=(0.5,), cache=path)
    before = path.read_bytes()
    score: Callable[[nn.Module], float] = norm
    if change == "weights":
        with torch.no_grad():
            model.get_parameter("0.weight")[0, 0, 0, 0] += 1e-3
    elif change == "class":
        model = Other(*network()).eval()
    else:
        score = Counted()
    what = "score" if change == "score" else "model"
    with pytest.raises(ArgumentError, match=rf"belongs to another {what}.*Give another file"):
        fxprune.sensitivity(model, X, score, removed=(0.5,), cache=path)
    assert path.read_bytes() == before


def test_a_score_that_has_changed_its_data_is_noticed(tmp_path: Path) -> None:
    path, data = tmp_path / "scores.json", [X]

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return model(data[0]).norm().item()

    fxprune.sensitivity(network(), X, score, removed=(0.5,), cache=path)
    data[0] = 2 * X + 1
    with pytest.raises(ArgumentError, match=r"now it is.*have changed.*another cache="):
        fxprune.sensitivity(network(), X, score, removed=(0.5,), cache=path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}', "\xff"])
def test_a_file_that_holds_no_scores(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ArgumentError, match=r"holds no scores.*another file"):
        fxprune.sensitivity(network(), X, norm, cache=path)
    with pytest.raises(ArgumentError, match=r"Name a file"):
        fxprune.sensitivity(network(), X, norm, cache=tmp_path)


# -- the result


FOUND = fxprune.Sensitivity(
    0.9625,
    (
        fxprune.SensitivityPoint("conv1.weight:0", 0.25, 24, 32, 0.93),
        fxprune.SensitivityPoint("conv1.weight:0", 0.5, 16, 32, 0.815),
        fxprune.SensitivityPoint("a.long.name.weight:0", 0.25, 1500, 2000, 0.96),
        fxprune.SensitivityPoint("a.long.name.weight:0", 0.5, 1000, 2000, -12.34567),
    ),
)


def test_the_table() -> None:
    assert str(FOUND).splitlines() == [
        "score with a share of one group's units removed; 0.9625 with none",
        "group                 units  25 %    50 %",
        "conv1.weight:0           32  0.93   0.815",
        "a.long.name.weight:0  2,000  0.96  -12.35",
    ]


def test_a_model_without_groups() -> None:
    found = fxprune.sensitivity(nn.Linear(3, 2), torch.ones(1, 3), lambda model: 1.0)
    assert found == fxprune.Sensitivity(1.0, ())
    assert "1 with none" in str(found)


def test_as_data() -> None:
    data = json.loads(json.dumps(FOUND.to_dict()))
    assert fxprune.Sensitivity.from_dict(data) == FOUND
    assert data["points"][0] == {
        "group": "conv1.weight:0",
        "removed": 0.25,
        "kept": 24,
        "total": 32,
        "score": 0.93,
    }
    for damaged in (
        {},
        {"dense": 1.0, "points": [{"group": "a"}]},
        [],
        {"dense": "", "points": []},
    ):
        with pytest.raises(PlanError, match="no sensitivity analysis"):
            fxprune.Sensitivity.from_dict(damaged)  # type: ignore[arg-type]


def test_a_plot_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r'matplotlib: pip install "fxprune\[plot\]"'):
        FOUND.plot(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())


def test_the_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="it draws")
    FOUND.plot(tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert "<svg" in text
    assert "units of one group removed" in text
    fxprune.Sensitivity(1.0, ()).plot(tmp_path / "empty.png")
    assert (tmp_path / "empty.png").read_bytes().startswith(b"\x89PNG")
    for file in ("figure.nothing", "missing/figure.png"):
        with pytest.raises(ArgumentError, match="cannot be written"):
            FOUND.plot(tmp_path / file)


# -- errors


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, "0.9", True, torch.ones(2)])
def test_a_score_that_is_no_number(value: Any) -> None:
    with pytest.raises(ArgumentError, match=r"score of the model with all.*finite number"):
        fxprune.sensitivity(network(), X, lambda model: value)


def test_nan_of_one_point_names_it() -> None:
    scores = iter([1.0, 0.5, float("nan")])
    with pytest.raises(ArgumentError, match=r"4 of 8 units of 0\.weight:0 is nan"):
        fxprune.sensitivity(network(), X, lambda model: next(scores), removed=(0.25, 0.5))


def test_an_error_of_the_score_is_its_own() -> None:
    def score(model: nn.Module) -> float:
        raise ValueError("no data")

    with pytest.raises(CallbackError, match=r"score of the model with.*ValueError: no data"):
        fxprune.sensitivity(network(), X, score)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"removed": 0.5}, "no list of shares"),
        ({"removed": ()}, "shares below 1"),
        ({"removed": (0.5, 1.0)}, "shares below 1"),
        ({"removed": (0.0,)}, "outside"),
        ({"removed": "0.5"}, "no list of shares"),
        ({"score": 0.5}, "no function"),
        ({"score": nn.Linear(1, 1)}, "no function"),
        ({"cache": 3}, "give a path"),
        ({"keep": "nothing"}, "matches no module"),
    ],
)
def test_arguments_that_are_not_valid(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ArgumentError, match=text):
        fxprune.sensitivity(network(), X, **{"score": norm, **options})
