"""Example inputs: tensors, nested containers, constants and other objects."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import InputError, ModelError, PlanError
from fxprune.inputs import as_call, batch_size, random_like, read, shapes_of, with_larger_batch

IMAGES = [torch.zeros(3, 8, 8), torch.zeros(3, 6, 9)]


@pytest.mark.parametrize(
    ("example", "rows"),
    [
        (torch.zeros(5, 2), 5),
        ((torch.tensor(1.0), {"x": torch.zeros(4, 2)}), 4),
        ({"images": IMAGES, "sizes": torch.zeros(7)}, 2),
        ((IMAGES,), 2),
        ((1, None), 1),
    ],
)
def test_how_many_examples(example: Any, rows: int) -> None:
    assert batch_size(example) == rows
    assert batch_size(random_like(example)) == rows


def test_another_batch_of_a_tensor() -> None:
    x = torch.ones(2, 3, dtype=torch.float64)
    new = random_like(x, batch=5)
    assert new.shape == (5, 3)
    assert new.dtype == torch.float64
    assert new.unique().numel() == 15
    assert torch.equal(new, random_like(x, batch=5))
    assert not torch.equal(new, random_like(x, batch=5, seed=1))


def test_another_batch_of_images_of_several_sizes() -> None:
    (images,) = random_like((IMAGES,), batch=3)
    assert [tuple(image.shape) for image in images] == [(3, 8, 8), (3, 6, 9), (3, 8, 8)]


def test_a_list_at_the_top_is_one_argument() -> None:
    assert batch_size(IMAGES) == 2
    new = random_like(IMAGES, batch=3)
    assert isinstance(new, list)
    assert [tuple(image.shape) for image in new] == [(3, 8, 8), (3, 6, 9), (3, 8, 8)]


def test_only_what_has_a_row_per_example_changes() -> None:
    new = random_like(
        {
            "x": torch.zeros(2, 3),
            "index": torch.tensor([1, 0]),
            "table": torch.zeros(3, 3),
            "scale": 2.0,
        },
        batch=4,
    )
    assert {name: tuple(t.shape) for name, t in new.items() if isinstance(t, torch.Tensor)} == {
        "x": (4, 3),
        "index": (4,),
        "table": (3, 3),
    }
    assert new["index"].tolist() == [1, 0, 1, 0]
    assert new["scale"] == 2.0


def test_calls() -> None:
    x = torch.zeros(1)
    assert as_call(x) == ((x,), {})
    assert as_call((x, 2)) == ((x, 2), {})
    assert as_call([x, 2]) == (([x, 2],), {})  # a list is a single argument
    assert as_call({"x": x}) == ((), {"x": x})


# -- what a call contains besides tensors


class Takes(nn.Module):
    """A model that is called with nested tensors, a number, a mask, a text and a switch."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        self.net, self.python = (
            nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3)),
            python,
        )

    def forward(
        self,
        batch: dict[str, Any],
        scale: int = 1,
        mask: Tensor | None = None,
        mode: str = "",
        whole: bool = False,
    ) -> Any:
        outs = [self.net(x) * scale for x in batch["xs"]]
        if self.python:
            batch["xs"][0].sum().item()
        if batch["mask"] is not None:
            outs = [y * batch["mask"] for y in outs]
        y = sum(outs) if mode == "sum" else outs[0]
        return {"y": y if mask is None else y * mask, "all": outs if whole else None}


X = torch.randn(2, 4, dtype=torch.float64)
CALL = {
    "batch": {"xs": [X, X + 1], "mask": None, "n": 3},
    "scale": 2,
    "mask": None,
    "mode": "sum",
    "whole": True,
}
OTHERS: dict[str, Any] = {
    "batch['xs']": {"batch": {"xs": [X], "mask": None, "n": 3}},
    "batch['mask']": {"batch": {"xs": [X, X], "mask": X[:, :3], "n": 3}},
    "scale": {"scale": 3},
    "mask": {"mask": X[:, :3]},
    "mode": {"mode": "first"},
    "whole": {"whole": False},
}


@pytest.mark.parametrize("python", [False, True])
def test_constants_of_a_call_are_held(python: bool) -> None:
    model = Takes(python).double().eval()
    pruned = fxprune.prune(model, CALL, channels=0.5, verify=True)
    assert pruned.report.error < 1e-9
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    assert pruned.model(**CALL)["y"].shape == (2, 3)
    assert fxprune.verify(model, pruned, CALL).error < 1e-9
    replayed = fxprune.apply(fxprune.Plan.from_json(pruned.plan.to_json()), model)
    assert replayed.plan == pruned.plan
    assert torch.equal(replayed.model(**CALL)["y"], pruned.model(**CALL)["y"])
    for name, change in OTHERS.items():
        if python:  # Python between parts handles every value
            assert pruned.model(**{**CALL, **change})["y"].shape == (2, 3)
        else:
            with pytest.raises(AssertionError, match=re.escape(name)):
                pruned.model(**{**CALL, **change})


def test_objects_in_a_call_leave_it_to_python() -> None:
    class Settings:
        scale = 2

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, settings: Any) -> Tensor:
            return self.b(self.a(x).relu()) * settings.scale

    model = Net().double().eval()
    pruned = fxprune.prune(model, (X, Settings()), channels=0.5)
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    assert pruned.report.parts
    assert pruned.model(X, Settings()).shape == (2, 3)
    assert fxprune.verify(model, pruned, (X, Settings())).error < 1e-9
    with pytest.raises(PlanError, match="an example with Settings in it"):
        fxprune.apply(pruned.plan, model)


def test_no_tensor_at_all() -> None:
    with pytest.raises(InputError, match="must hold tensors, got int: 3"):
        read((3, None))
    with pytest.raises(InputError, match="ndarray"):
        read((X, X.numpy()))


def test_rows_are_repeated_where_a_batch_of_one_is_widened() -> None:
    (ids, x), kwargs = with_larger_batch(((torch.tensor([5]), torch.ones(1, 2)), {"scale": 2}))
    assert ids.tolist() == [5, 5]
    assert (x.shape, kwargs) == ((2, 2), {"scale": 2})
    (x, table), _ = with_larger_batch(((torch.ones(1, 2), torch.ones(3)), {}))
    assert (x.shape, table.shape) == ((1, 2), (3,))


def test_shapes_keep_dtypes_and_constants() -> None:
    (x, ids), kwargs = shapes_of(((X, torch.tensor([1])), {"mask": None}))
    assert (x.is_meta, x.dtype, ids.dtype, ids.shape, kwargs) == (
        True,
        torch.float64,
        torch.int64,
        (1,),
        {"mask": None},
    )


def test_objects_in_a_call_stay_as_they_are() -> None:
    """Pruning does not change objects in a call, for example a cache that forward fills."""

    class Cache:
        def __init__(self) -> None:
            self.kept: list[Tensor] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, cache: Any) -> Tensor:
            y = self.b(self.a(x).relu())
            cache.kept.append(y)
            return torch.stack(cache.kept).sum(0)

    cache = Cache()
    pruned = fxprune.prune(Net().double().eval(), (X, cache), channels=0.5)
    assert not cache.kept
    assert pruned.report.params_after < 0.6 * pruned.report.params_before
    assert pruned.model(X, cache).shape == (2, 3)


def test_a_loader_may_leave_out_the_constants_of_the_example() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor, mask: Tensor | None, scale: int) -> Tensor:
            y = self.b(self.a(x).relu()) * scale
            return y if mask is None else y * mask

    model, loader = Net().double().eval(), [({"x": X},), ([X, None, 2],)]
    criterion = fxprune.criteria.Activation(loader)
    example = {"x": X, "mask": None, "scale": 2}
    pruned = fxprune.prune(model, example, channels=0.5, criterion=criterion)
    assert pruned.model.get_parameter("a.weight").shape == (8, 4)


class Fails(nn.Module):
    def __init__(self, fails: Any) -> None:
        super().__init__()
        self.layer, self.fails = nn.Linear(4, 16), fails

    def forward(self, x: Tensor) -> Tensor:
        return self.fails(self, self.layer(x))


def imports(model: Any, x: Tensor) -> Tensor:
    import a_package_that_is_not_there

    return a_package_that_is_not_there.of(x)


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        (lambda model, x: model.missing(x), ModelError),
        (lambda model, x: nn.functional.missing(x), ModelError),
        (lambda model, x: missing(x), ModelError),  # type: ignore[name-defined]  # noqa: F821
        (imports, ModelError),
        (lambda model, x: x.missing(), InputError),
        (lambda model, x: x.view(3, 3), InputError),
    ],
)
def test_a_model_that_fails_whatever_it_is_called_with(fails: Any, error: Any) -> None:
    with pytest.raises(error, match=r"test_inputs\.py:\d+"):
        fxprune.analyze(Fails(fails).double(), X)


def test_a_forward_without_self() -> None:
    class Static(nn.Module):
        @staticmethod
        def forward(x: Tensor, scale: float = 1.0) -> Tensor:
            return x * scale

    layers = nn.Sequential(nn.Linear(4, 16), Static(), nn.Linear(16, 3)).double()
    report = fxprune.prune(layers, X, channels=0.5).report
    assert report.params_after < 0.6 * report.params_before
    static = Static()
    static.weight = nn.Parameter(torch.zeros(1))
    assert fxprune.analyze(static, {"x": X}).groups == ()
    with pytest.raises(InputError, match=r"3 positional inputs, but forward takes 2 \(x, scale\)"):
        fxprune.analyze(static, (X, X, X))


# older versions of torch warn when an exported module is copied
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_module_is_refused() -> None:
    exported = torch.export.export(nn.Sequential(nn.Linear(4, 16)).double(), (X,)).module()
    for model in (exported, nn.Sequential(exported)):
        with pytest.raises(ModelError, match="give the model that was exported"):
            fxprune.analyze(model, X)
