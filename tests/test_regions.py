"""Regions without gradients or in another precision are kept in the emitted model."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import TraceError
from fxprune.trace import example_of, meta_copy_of, trace
from fxprune.trace.context_managers import enter, leave
from tests.support.checking import relative_error


class Around(nn.Module):
    """Two convolutions, and between them a function that calls a third."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.Conv2d(8, 8, 1),
            nn.Conv2d(8, 4, 1),
        )
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.inner, self.first(x)))


def without_gradients(inner: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return inner(x)


def gradients_off(inner: nn.Module, x: Tensor) -> Tensor:
    with torch.set_grad_enabled(False):
        return inner(x)


@torch.no_grad()
def decorated(inner: nn.Module, x: Tensor) -> Tensor:
    return inner(x)


def nested(inner: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = x.sigmoid()
        with torch.enable_grad():
            y = inner(y)
        z = x * 2
    return y + z


def in_full(inner: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return inner(x.float())


def in_half(inner: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = inner(x)
    return y.float()


REGIONS = [without_gradients, gradients_off, decorated, nested, in_full, in_half]


def trained(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output, and the gradients of the parameters that have one."""
    model.zero_grad()
    out = model(x)
    out.float().square().sum().backward()
    return out.detach(), {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("function", REGIONS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("outer", [False, True], ids=["plain", "autocast"])
def test_outputs_and_gradients_are_those_of_the_original(
    function: Callable[..., Tensor], outer: bool
) -> None:
    torch.manual_seed(0)
    model, x = Around(function), torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=1.0)
    assert not pruned.report.parts
    for emitted in (pruned.model, copy.deepcopy(pruned.model)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outer):
            (wanted, gradients), (given, own) = trained(model, x), trained(emitted, x)
        assert given.dtype == wanted.dtype
        assert relative_error(given, wanted) == 0
        assert own.keys() == gradients.keys()
        for name in gradients:
            assert relative_error(own[name], gradients[name]) < 1e-6, name


@pytest.mark.parametrize("function", REGIONS, ids=lambda function: function.__name__)
def test_regions_are_pruned_deployed_compiled_and_pruned_again(
    function: Callable[..., Tensor],
) -> None:
    torch.manual_seed(0)
    model, x = Around(function).eval(), torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5, verify=True)
    assert pruned.report.error is not None
    assert pruned.report.error < 1e-12
    assert pruned.model.get_submodule("inner").weight.shape[:2] == (4, 4)
    again = fxprune.prune(pruned.model, x, channels=1.0).model
    compiled = torch.compile(pruned.model, backend="eager", fullgraph=True)
    deployed = fxprune.deploy(pruned.model)
    with torch.no_grad():
        wanted = pruned.model(x)
        for other in (again, compiled, deployed):
            assert relative_error(other(x), wanted) < 1e-6
    assert again.code == pruned.model.code


def test_the_code_has_blocks() -> None:
    code = fxprune.prune(Around(nested), torch.randn(2, 3, 8, 8), channels=1.0).model.code
    lines = [line.strip() for line in code.splitlines() if "with " in line]
    assert lines == ["with torch.no_grad():", "with torch.enable_grad():"]
    assert "leave" not in code


def test_a_region_is_left_when_something_in_it_fails() -> None:
    emitted = fxprune.prune(Around(without_gradients), torch.randn(2, 3, 8, 8), channels=1.0).model
    emitted.get_submodule("inner").weight.data = torch.zeros(8, 5, 1, 1)
    with pytest.raises(RuntimeError):
        emitted(torch.randn(2, 3, 8, 8))
    assert torch.is_grad_enabled()


def test_what_is_empty_leaves_no_trace() -> None:
    def forward(inner: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            assert x.dim() == 4
        return inner(x)

    graph = trace(meta_copy_of(Around(forward)), *example_of(torch.randn(2, 3, 8, 8))).graph
    assert not {enter, leave} & {node.target for node in graph.nodes}


def test_a_region_whose_content_is_gone() -> None:
    """A user may erase nodes from a graph, so a region may become empty."""
    emitted = fxprune.prune(Around(without_gradients), torch.randn(2, 3, 8, 8), channels=1.0).model
    node = next(node for node in emitted.graph.nodes if node.target == "inner")
    node.replace_all_uses_with(node.args[0])
    emitted.graph.erase_node(node)
    emitted.recompile()
    assert emitted(torch.randn(2, 3, 8, 8)).shape == (2, 4, 6, 6)
    assert "pass" in emitted.code


@pytest.mark.parametrize(
    "question", ["is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"]
)
def test_what_the_caller_decides_is_not_asked_in_a_graph(question: str) -> None:
    def forward(inner: nn.Module, x: Tensor) -> Tensor:
        return inner(x) if getattr(torch, question)() else inner(x) * 2

    model, x = Around(forward), torch.randn(2, 3, 8, 8)
    with pytest.raises(TraceError, match=rf"torch\.{question}\(\) \(at test_regions.py:\d+\)"):
        trace(meta_copy_of(model), *example_of(x))
    emitted = fxprune.prune(model, x, channels=1.0).model
    for state in (
        torch.enable_grad(),
        torch.no_grad(),
        torch.inference_mode(),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        with state:
            assert relative_error(emitted(x).float(), model(x).float()) == 0


def test_regions_inside_of_torch_are_its_own() -> None:
    """Regions that torch opens itself are not copied into the graph.

    Checkpointing computes first without gradients and later again with them; the graph computes
    once.
    """

    def forward(inner: nn.Module, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False)

    model, x = Around(forward), torch.randn(2, 3, 8, 8)
    emitted = fxprune.prune(model, x, channels=1.0).model
    assert isinstance(emitted, torch.fx.GraphModule)
    assert trained(emitted, x)[1].keys() == trained(model, x)[1].keys()


def test_checkpoints_that_only_training_has() -> None:
    """A checkpoint that only runs in training is traced in training mode."""

    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.part, self.down = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.up(x)
            if self.training:
                x = x + torch.utils.checkpoint.checkpoint(self.part, x, use_reentrant=False)
            return self.down(x)

    model, x = Trained(), torch.randn(4, 6)
    emitted = fxprune.prune(model, x, channels=1.0, verify=True).model
    for training in (True, False):
        assert torch.equal(emitted.train(training)(x), model.train(training)(x))


def test_functions_do_without_generated_code() -> None:
    """``torch.fx.Interpreter`` calls the functions that enter and leave a region."""
    pruned = fxprune.prune(Around(without_gradients), torch.randn(2, 3, 8, 8), channels=1.0).model
    out = torch.fx.Interpreter(pruned).run(torch.randn(2, 3, 8, 8))
    assert out.grad_fn is not None
    assert out.grad_fn.next_functions[0][0] is None  # no gradient beyond the last convolution
    assert torch.is_grad_enabled()


def test_saved_and_loaded(tmp_path) -> None:  # type: ignore[no-untyped-def]
    model, x = Around(nested).eval(), torch.randn(2, 3, 8, 8)
    pruned = fxprune.prune(model, x, channels=0.5)
    pruned.save(tmp_path / "saved")
    loaded = fxprune.load(tmp_path / "saved", lambda: Around(nested))
    assert loaded.model.code == pruned.model.code
    file = io.BytesIO()
    torch.save(pruned.model.state_dict(), file)
    assert file.tell() > 0
