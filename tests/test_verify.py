"""``verify`` finds wrong results, even those of a wrong rule, and accepts correct ones."""

import dataclasses
import math
import operator
import random
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import RewriteError, VerificationError
from fxprune.ops import OPS, Context
from fxprune.verification import check
from fxprune.verification import runs as verification_runs
from fxprune.verification.comparing import difference
from fxprune.verification.rounding import measure_rounding
from fxprune.verification.runs import Run
from fxprune.verification.structure import is_guard
from tests.support.callables import apart
from tests.test_rewrite import WritesIntoACopy


class Flipped(nn.Module):
    """A sum of two branches, one of them reversed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.a(x) + self.b(x).flip(-1))


X = torch.randn(2, 4)


def as_identity(context: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Label the output of flip like its input, which is wrong."""
    context.put(out, context.fields(a["self"]))


def pruned(model: nn.Module | None = None, inputs: Any = X) -> tuple[nn.Module, Any]:
    model = Flipped() if model is None else model
    return model, fxprune.prune(model, inputs, channels=0.5)


# -- structure


def test_the_right_rule_is_proved() -> None:
    assert fxprune.verify(*pruned()).error < 1e-9


def test_a_wrong_rule_is_caught() -> None:
    wrong = dataclasses.replace(OPS["flip"], rule=as_identity)
    with mock.patch.dict(OPS, flip=wrong):
        fxprune.ops.find_row.cache_clear()
        try:
            error = fxprune.verify(*pruned()).error
        except (RewriteError, VerificationError):
            error = math.inf
        finally:
            fxprune.ops.find_row.cache_clear()
    assert error > 1e-3


@pytest.mark.parametrize("how", ["target", "order", "argument"])
def test_a_changed_graph_is_caught(how: str) -> None:
    model, result = pruned()
    (add,) = (n for n in result.model.graph.nodes if n.target is operator.add)
    (flip,) = (n for n in result.model.graph.nodes if "flip" in str(n.target))
    if how == "target":
        add.target = operator.sub
    elif how == "order":
        add.args = add.args[::-1]
    else:
        flip.args = (flip.args[0], 0)
    result.model.recompile()
    with pytest.raises(VerificationError, match="changed after pruning"):
        fxprune.verify(model, result)


def test_a_changed_shape_is_caught() -> None:
    model, result = pruned()
    result.model.c.bias = nn.Parameter(torch.zeros(1))
    with pytest.raises(VerificationError, match=r"c\.bias.*\(1,\).*\(3,\)"):
        fxprune.verify(model, result)


def test_a_lost_tensor_is_caught() -> None:
    model, result = pruned()
    result.model.c.bias = None
    with pytest.raises(VerificationError, match=r"c\.bias.*None.*\(3,\)"):
        fxprune.verify(model, result)


def test_structure_alone() -> None:
    with mock.patch("fxprune.verification.check.Bench", side_effect=AssertionError):
        proof = fxprune.verify(*pruned(), numeric=False)
    assert math.isnan(proof.error)
    assert proof.outputs == 0


# -- values


def test_weights_as_they_are() -> None:
    """A changed weight is visible only if weights are not randomised."""
    model, result = pruned()
    assert fxprune.verify(model, result, X, randomize=False).error < 1e-9
    with torch.no_grad():
        result.model.c.bias.add_(1.0)
    assert fxprune.verify(model, result, X, randomize=False).error > 1e-3
    assert fxprune.verify(model, result, X).error < 1e-9


def test_what_is_not_finite() -> None:
    model, result = pruned()
    with pytest.raises(VerificationError, match="not finite"):
        fxprune.verify(model, result, torch.full((2, 4), math.inf), randomize=False)


def test_seeds_and_dtypes() -> None:
    model, result = pruned()
    errors = {
        fxprune.verify(model, result, dtype=torch.float32, seed=seed).error for seed in range(3)
    }
    assert len(errors) > 1
    assert max(errors) < 1e-5
    assert fxprune.verify(model, result, seed=1) == fxprune.verify(model, result, seed=1)


def test_printing() -> None:
    assert str(fxprune.verify(*pruned())).endswith("over 1 outputs in float64")


@dataclasses.dataclass
class Held:
    sum: Tensor
    hidden: Tensor


class Of(nn.Module):
    """Two layers, and a given function as forward."""

    def __init__(self, forward: Callable[[Any, Any], Any], **extra: nn.Module) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 8)
        for name, module in extra.items():
            self.add_module(name, module)
        self.own = forward

    def forward(self, x: Tensor) -> Any:
        return self.own(self, x)


def two(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x).relu())


def proved(model: nn.Module, inputs: Any = X, **options: Any) -> Any:
    """Verify a correctly pruned model, and return the result."""
    result = fxprune.prune(model, inputs, channels=0.5, verify=True)
    proof = fxprune.verify(model, result, inputs, **options)
    assert result.report.params_after < result.report.params_before
    assert proof.error <= (1e-9 if proof.dtype is torch.float64 else 1e-4)
    return proof


EVERYTHING = {
    "the example's sizes",
    "the example itself",
    "training mode",
    "another batch",
    "gradients",
}


def test_what_is_compared() -> None:
    proof = proved(Of(lambda m, x: two(m, x).mean(1)), torch.randn(2, 6, 4))
    assert set(proof.compared) >= EVERYTHING
    assert any(name.startswith("another size (3 for 6)") for name in proof.compared)
    assert not proof.left_out


def test_a_model_that_takes_one_size_alone() -> None:
    """What the original refuses is not an error of the pruned model."""
    proof = proved(Of(lambda m, x: two(m, x) + x.new_zeros(2, 6, 1)), torch.randn(2, 6, 4))
    assert "another size (3 for 6)" not in proof.compared
    assert any("another size" in reason for reason in proof.left_out)


def checked(
    model: nn.Module, result: Any, inputs: Any = X, analysed: nn.Module | None = None
) -> Any:
    """Verify with an analysis that was made before, of ``analysed`` if given."""
    kept = {group.name: group.kept for group in result.plan.groups}
    return check(
        model,
        result.model,
        result.plan,
        fxprune.analyze(analysed or model, inputs),
        kept,
        example_inputs=inputs,
    )


def test_a_model_without_a_tensor_among_its_outputs() -> None:
    """If no output is a tensor, nothing is proved."""
    model, mute = Of(two), Of(two)
    result = fxprune.prune(model, X, channels=0.5)
    mute.load_state_dict(model.state_dict())
    for silent in (mute, result.model):
        silent.register_forward_hook(lambda module, given, out: "done")
    with pytest.raises(VerificationError, match="no tensor"):
        checked(mute, result, analysed=model)


# -- results damaged in ways that no graph shows


def broken(
    model: nn.Module, inputs: Any, match: str, how: Callable[[nn.Module], None], **options: Any
) -> None:
    result = fxprune.prune(model, inputs, channels=0.5)
    assert fxprune.verify(model, result, inputs, **options).error < 1e-9
    how(result.model)
    with pytest.raises(VerificationError, match=match):
        fxprune.verify(model, result, inputs, **options)


def test_a_lost_output() -> None:
    def drop(model: nn.Module) -> None:
        model.register_forward_hook(lambda module, given, out: out[0])

    broken(Of(lambda m, x: (two(m, x), x.sum())), X, "gives 1 outputs", drop)


def test_another_container() -> None:
    broken(
        Of(two),
        X,
        "has the form",
        lambda model: _ignored(model.register_forward_hook(lambda module, given, out: (out,))),
    )


def test_another_number() -> None:
    def change(model: nn.Module) -> None:
        model.register_forward_hook(lambda module, given, out: (out[0], 5))

    broken(Of(lambda m, x: (two(m, x), x.shape[1])), X, "the number 5", change)


def test_a_frozen_parameter() -> None:
    def freeze(model: nn.Module) -> None:
        model.b.bias.requires_grad_(False)  # type: ignore[union-attr, operator]

    broken(Of(two), X, r"'b\.bias' gets a gradient in the original", freeze)


def test_a_path_that_carries_no_gradient() -> None:
    def detach(model: nn.Module) -> None:
        model.a.register_forward_hook(lambda module, given, out: out.detach())  # type: ignore[union-attr, operator]

    broken(Of(two), X, r"'a\.weight' gets a gradient in the original", detach)


def test_a_mode_that_is_lost() -> None:
    """A batch norm that stays in evaluation mode uses stored statistics in training."""

    def hold(model: nn.Module) -> None:
        model.norm.register_forward_pre_hook(
            lambda module, given: vars(module).update(training=False)
        )  # type: ignore[operator]

    broken(
        Of(lambda m, x: m.b(m.norm(m.a(x))), norm=nn.BatchNorm1d(16)),
        torch.randn(8, 4),
        "^training mode: ",
        hold,
    )


@pytest.mark.parametrize("how", ["another share", "none", "evaluation alone"])
def test_a_dropout_that_drops_otherwise(how: str) -> None:
    """Dropout is off when outputs are compared, but its rates are compared."""

    def change(model: nn.Module) -> None:
        if how == "another share":
            model.drop.p = 0.4  # type: ignore[union-attr, assignment]
        elif how == "none":
            model.drop = nn.Identity()
        else:
            model.drop.register_forward_pre_hook(
                lambda module, given: vars(module).update(training=False)
            )  # type: ignore[operator]

    broken(
        Of(lambda m, x: m.b(m.drop(m.a(x))), drop=nn.Dropout(0.2)),
        X,
        "^training mode: .*dropouts",
        change,
    )


def test_a_module_that_keeps_its_mode() -> None:
    def keep(model: nn.Module) -> None:
        model.a.train = lambda mode=True: model.a  # type: ignore[union-attr, operator, assignment]

    broken(Of(two), X, r"gives 'a' another mode", lambda model: keep(model.train()))


def test_python_that_draws_by_other_odds() -> None:
    class Thinned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.odds = (
                nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 4)),
                0.5,
            )

        def forward(self, x: Tensor) -> Tensor:
            # this branch on a value makes the code stay Python
            h = self.block(x if float(x.sum()) > -1e9 else -x)
            return h * torch.empty(len(h), 1, dtype=h.dtype).bernoulli_(self.odds)

    broken(Thinned(), X, "bernoulli_.* draws with", lambda model: vars(model).update(odds=0.9))


def test_statistics_that_are_not_updated() -> None:
    """The outputs in training are correct, but the statistics afterwards are not."""

    def forget(model: nn.Module) -> None:
        model.norm.momentum = 0.0  # type: ignore[union-attr, assignment]

    broken(
        Of(lambda m, x: m.b(m.norm(m.a(x))), norm=nn.BatchNorm1d(16)),
        torch.randn(8, 4),
        "^training mode: ",
        forget,
    )


def test_a_batch_of_another_size() -> None:
    def square(model: nn.Module) -> None:
        model.register_forward_hook(lambda module, given, out: out if len(out) == 2 else out * 2)

    broken(Of(two), X, "^another batch: .*differs", square)


def test_a_failure_at_another_length() -> None:
    def count(module: nn.Module, given: Any, out: Tensor) -> None:
        if out.shape[1] != 6:
            raise ValueError("six words are needed")

    broken(
        Of(two),
        torch.randn(2, 6, 4),
        r"^another size .*ValueError: six words",
        lambda model: _ignored(model.register_forward_hook(count)),
    )


def _ignored(handle: Any) -> None:
    return None


def test_a_failure_on_the_example_itself() -> None:
    """The hook fails only in float32, the example's own dtype."""

    def insist(module: nn.Module, given: Any) -> None:
        if given[0].dtype is torch.float32:
            raise TypeError("no float32")

    broken(
        Of(two),
        X,
        "on the example, .*TypeError",
        lambda model: _ignored(model.register_forward_pre_hook(insist)),
    )


def test_a_guard_is_a_refusal() -> None:
    """A graph that was traced for another length refuses the input, so nothing is wrong."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return two(m, x if x.shape[1] > 4 else x * 2)

    proof = proved(Of(forward), torch.randn(2, 6, 4))
    assert (
        any("3 for 6" in reason and "traced for" in reason for reason in proof.left_out)
        or "another size (12 for 6)" in proof.compared
    )


def test_a_guard_that_is_gone() -> None:
    """Without the guard, the graph computes for all inputs what is right for long ones."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return two(m, x if x.shape[1] > 4 else x * 2)

    def remove(model: nn.Module) -> None:
        assert isinstance(model, fx.GraphModule)
        for node in reversed(list(model.graph.nodes)):
            if node.target is torch._assert:
                model.graph.erase_node(node)
        model.recompile()

    model = Of(forward)
    result = fxprune.prune(model, torch.randn(2, 6, 4), channels=0.5)
    remove(result.model)
    with (
        pytest.raises(VerificationError),
        mock.patch("fxprune.verification.check.check_emission"),
    ):
        fxprune.verify(model, result, torch.randn(2, 6, 4))
    with pytest.raises(VerificationError, match="changed after pruning"):
        fxprune.verify(model, result, torch.randn(2, 6, 4))


# -- comparisons with the user's code, not with what was traced


def test_a_trace_that_is_wrong_is_caught() -> None:
    """Graph and pruned model agree, but the model's code has changed since they were made."""
    factor = [1.0]
    model = Of(lambda m, x: two(m, x) * factor[0])
    result = fxprune.prune(model, X, channels=0.5)
    kept = {group.name: group.kept for group in result.plan.groups}
    coupling = fxprune.analyze(model, X)
    factor[0] = 3.0
    assert check(model, result.model, result.plan, coupling, kept, example_inputs=X).error > 1e-3


def test_a_hook_that_was_not_traced_is_caught() -> None:
    model, hooked = Of(two), Of(two)
    result = fxprune.prune(model, X, channels=0.5)
    assert checked(hooked, result, analysed=model).error < 1e-9
    hooked.register_forward_hook(lambda module, given, out: out + 1)
    assert checked(hooked, result, analysed=model).error > 1e-3


NORMS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "layer_norm": lambda m, x: F.layer_norm(x, (16,)),
    "layer_norm by its module": lambda m, x: m.layer(x),
    "rms_norm": lambda m, x: F.rms_norm(x, (16,), eps=1e-6),
    "group_norm": lambda m, x: F.group_norm(x, 4),
    "two of them": lambda m, x: F.layer_norm(F.rms_norm(x, (16,)) + x, (16,)),
    "one over a constant": lambda m, x: (
        F.layer_norm(x, (16,)) + F.layer_norm(torch.arange(5.0, dtype=x.dtype), (5,)).mean()
    ),
    "one over the input": lambda m, x: F.layer_norm(x, (16,)),
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms_over_survivors(norm: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = F.layer_norm(x, (4,)) if norm == "one over the input" else x
        return m.b(NORMS[norm](m, m.a(x)))

    proof = proved(Of(forward, layer=nn.LayerNorm(16)), torch.randn(3, 4))
    assert not [reason for reason in proof.left_out if "own code" in reason]


def test_a_copy_that_became_a_view_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the clone that emission adds, a copy becomes a view if one channel is left.

    ``verify`` sees it, because its norm over kept channels keeps the memory layout of the
    original.
    """
    emission = sys.modules["fxprune.rewrite.emit"]._Emission
    monkeypatch.setattr(emission, "_may_become_a_view", lambda *_: False)
    model = WritesIntoACopy().eval()
    assert fxprune.verify(*pruned(model, torch.randn(2, 3, 6, 6))).error < 1e-9
    fewer = fxprune.prune(model, torch.randn(2, 3, 6, 6), channels=0.25)
    assert fxprune.verify(model, fewer).error > 1e-3


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_norms_of_a_batch_that_is_squeezed(norm: str) -> None:
    """With a batch of one, one dimension is missing, and the last one is normalised as before."""
    proof = proved(Of(lambda m, x: m.b(NORMS[norm](m, m.a(x).squeeze()))), torch.randn(3, 4))
    assert "another batch" in proof.compared


def test_a_norm_that_cannot_be_followed_is_left_out() -> None:
    """With one dimension less, ``group_norm`` takes another one for the channels."""
    model = Of(lambda m, x: m.b(F.group_norm(m.a(x).mT.squeeze(), 4).mT))
    proof = proved(model, torch.randn(3, 8, 4))
    assert any(reason.startswith("another batch: node") for reason in proof.left_out)


class Twice(torch.autograd.Function):
    """Two norms in one node, of which the second has no labels."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        return F.layer_norm(x, (x.shape[-1],)) + F.layer_norm(table, (5,)).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


def test_two_norms_in_one_node() -> None:
    proved(Of(lambda m, x: m.b(Twice.apply(m.a(x), torch.arange(5.0, dtype=x.dtype)))))


def test_norms_in_parts() -> None:
    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2 if float(x.sum()) > -1e9 else 1):
                x = self.block(x)
            return x

    proof = proved(Looped().eval())
    assert not [reason for reason in proof.left_out if "own code" in reason]


def test_a_part_that_gives_an_object() -> None:
    """The object is unknown to pytree, and holds a tensor that nobody reads at full width."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Held:
            h = self.a(x).relu()
            return Held(x + self.b(h), h)

    class Looped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.encoder, self.last = nn.Linear(4, 4), Encoder(), nn.Linear(4, 3)

        def forward(self, x: Tensor, n: int = 0) -> Tensor:
            # a slice by a number makes the code stay Python
            return self.last(self.encoder(self.first(x)).sum)[:, slice(-n, None)]

    proved(Looped(), torch.randn(2, 3, 4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_pruned_model_in_a_dtype_of_its_own(dtype: torch.dtype) -> None:
    """The example's dtype is then not the model's, and the difference in dtype is not an error."""
    model, result = pruned()
    result.model.to(dtype)
    proof = fxprune.verify(model, result, X)
    assert proof.error < 1e-9
    assert any(
        "the example itself: torch.float32 on cpu is" in reason for reason in proof.left_out
    )


def test_attention_of_torch() -> None:
    """The fused path of attention hides the widths, so the slow path is compared."""
    layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
    model = nn.Sequential(
        nn.Linear(4, 16),
        nn.TransformerEncoder(layer, 1, enable_nested_tensor=False),
        nn.Linear(16, 3),
    )
    proof = proved(model.eval(), torch.randn(2, 5, 4))
    assert set(proof.compared) >= EVERYTHING


def test_a_filter_that_is_gone_has_no_direction() -> None:
    """Weights divided by their norms would be 0/0 for a removed filter."""
    proved(
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 16)), nn.Linear(16, 3))
    )


# -- random numbers


DRAWS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "behind": lambda m, x: two(m, x) + torch.randn(x.shape[0], 8, dtype=x.dtype),
    "like the output": lambda m, x: (y := two(m, x)) + torch.rand_like(y),
    "of a width that shrinks": lambda m, x: m.b((h := m.a(x)) + torch.randn_like(h)),
    "of two widths": lambda m, x: (
        m.b((h := m.a(x)) + torch.randn_like(h)) + torch.randn(8, dtype=x.dtype)
    ),
    "by a mean and a deviation": lambda m, x: two(m, x) + torch.normal(x, 1.0)[:, :1],
    "dropout": lambda m, x: m.b(F.dropout(m.a(x), 0.5, training=True)),
    "dropout of the output": lambda m, x: F.dropout(two(m, x), 0.5, training=True),
    "dropout of channels": lambda m, x: m.b(
        F.dropout1d(m.a(x)[..., None], 0.5, training=True)[..., 0]
    ),
    "self-normalising dropout": lambda m, x: m.b(F.alpha_dropout(m.a(x), 0.5, training=True)),
    "bernoulli": lambda m, x: two(m, x) * torch.bernoulli(torch.sigmoid(x[:, :1])),
    "gumbel": lambda m, x: F.gumbel_softmax(two(m, x)),
    "a leaky ReLU of random slopes": lambda m, x: F.rrelu(two(m, x), training=True),
}


@pytest.mark.parametrize("draw", DRAWS)
def test_both_runs_draw_the_same(draw: str) -> None:
    proved(Of(DRAWS[draw]), torch.randn(3, 4))


def test_what_decides_a_draw_is_compared() -> None:
    """Both models get the original's draws, so their probabilities are compared as well."""
    model = Of(lambda m, x: torch.bernoulli(torch.sigmoid(two(m, x))))
    result = fxprune.prune(model, X, channels=0.5)
    assert fxprune.verify(model, result, X).error < 1e-9
    result.model.b.register_forward_hook(lambda module, given, out: out + 1)
    assert fxprune.verify(model, result, X).error > 1e-3


def test_what_no_seed_makes_the_same() -> None:
    """It cannot be compared, and the message does not call it a bug."""
    calls = iter(range(100))
    model, drifting = Of(two), Of(two)
    result = fxprune.prune(model, X, channels=0.5)
    drifting.b.register_forward_hook(lambda module, given, out: out * next(calls))
    with pytest.raises(
        VerificationError, match="random numbers that it draws cannot be compared"
    ) as raised:
        checked(drifting, result, analysed=model)
    assert "report" not in str(raised.value)


def test_nobody_elses_random_numbers_are_touched() -> None:
    model, result = pruned(Of(DRAWS["behind"]))
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]
    fxprune.verify(model, result, X)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # type: ignore[index]


# -- inputs and dtypes


class Looked(nn.Module):
    """A lookup of table rows by the difference of two integers in the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.net = nn.Embedding(9, 4), Of(two)

    def forward(self, spans: Tensor) -> Tensor:
        return self.net(self.table(spans[..., 1] - spans[..., 0]))


def test_whole_numbers_are_kept() -> None:
    proved(Looked(), torch.tensor([[2, 9], [1, 7], [3, 3]]))


def test_whole_numbers_of_which_only_the_shape_is_known() -> None:
    spans = torch.tensor([[2, 9], [1, 7], [3, 3]])
    model = Looked()
    assert fxprune.verify(model, fxprune.prune(model, spans, channels=0.5)).error < 1e-9


def test_values_that_a_model_insists_on() -> None:
    """The logarithm of a normal number may be NaN, so the example's own values are used."""
    proved(Of(lambda m, x: two(m, x.log()).sum() + x.new_zeros(1)), torch.rand(2, 4) + 0.5)


def test_an_index_that_is_computed() -> None:
    table = torch.randn(3, 4)

    def forward(m: Any, x: Tensor) -> Tensor:
        return two(m, table.to(x.dtype)[(x[:, 0] * 2).long()])

    proved(Of(forward), torch.rand(5, 4))


MADE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "zeros": lambda m, x: (
        two(m, x) + torch.zeros(2, 8).index_add_(0, torch.tensor([0, 1]), x.repeat(1, 2))
    ),
    "a range": lambda m, x: two(m, x) * torch.arange(8.0),
    "a table": lambda m, x: two(m, x) @ torch.tensor([[0.5] * 3] * 8),
    "a cast": lambda m, x: two(m, x.float()),
    "a cast by type": lambda m, x: two(m, x.to(torch.float32)),
}


@pytest.mark.parametrize("made", MADE)
def test_single_tensors_made_in_forward(made: str) -> None:
    assert proved(Of(MADE[made])).dtype is torch.float64


class Single(torch.autograd.Function):
    """An operation that has no float64 kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        if x.dtype is torch.float64:
            raise NotImplementedError("not for Double")
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad * 2


def test_an_operation_without_double() -> None:
    proof = proved(Of(lambda m, x: Single.apply(two(m, x))))
    assert proof.dtype is torch.float32
    assert proof.limit == 1e-3
    assert "float32" in str(proof)
    assert proved(Of(two)).limit == 1e-6


def test_infinities_in_the_same_places() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        return two(m, x).masked_fill(torch.arange(8) % 2 == 0, -math.inf)

    proved(Of(forward))


def test_what_is_no_number_in_the_same_places() -> None:
    proved(Of(lambda m, x: torch.where(torch.arange(8) < 2, math.nan, two(m, x))))


def test_no_error_but_its_own() -> None:
    """Each error names the user's line."""
    model, result = pruned(Of(two))
    with pytest.raises(VerificationError, match=r"original itself fails.*test_verify"):
        fxprune.verify(model, result, torch.randn(2, 5))
    with (
        mock.patch("fxprune.verification.check.check_emission", side_effect=KeyError("x")),
        pytest.raises(VerificationError),
    ):
        fxprune.verify(model, result, X)


def test_the_user_keeps_everything() -> None:
    """``verify`` changes neither weights, buffers, gradients nor modes."""
    model = Of(lambda m, x: m.b(m.norm(m.a(x))), norm=nn.BatchNorm1d(16)).train()
    model.norm.eval()
    x = torch.randn(5, 4)
    result = fxprune.prune(model, x, channels=0.5)
    state = {
        name: value.clone()
        for name, value in [*model.state_dict().items(), *result.model.state_dict().items()]
    }
    modes = [module.training for module in (*model.modules(), *result.model.modules())]
    fxprune.verify(model, result, x)
    after = dict([*model.state_dict().items(), *result.model.state_dict().items()])
    assert all(torch.equal(value, after[name]) for name, value in state.items())
    assert modes == [module.training for module in (*model.modules(), *result.model.modules())]
    assert all(
        parameter.grad is None for parameter in (*model.parameters(), *result.model.parameters())
    )


def test_a_model_without_data() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(16, 3)).to("meta")
    result = fxprune.prune(
        model, torch.zeros(2, 4, device="meta"), channels=0.5, criterion="random"
    )
    assert fxprune.verify(model, result).error < 1e-9


def test_a_path_that_carries_less_gradient() -> None:
    """Every parameter still gets a gradient, and the outputs are correct."""

    def detach(model: nn.Module) -> None:
        model.a.register_forward_hook(lambda module, given, out: (out + out.detach()) / 2)  # type: ignore[union-attr, operator]

    broken(Of(two), X, r"^gradients: the gradient of 'a\.weight' differs", detach)


def test_python_that_draws_no_more() -> None:
    """The original skips a layer half of the time."""

    def layer_drop(model: nn.Module) -> nn.Module:
        model.register_forward_hook(lambda module, given, out: out * (random.random() < 2.0))
        return model

    model, dropping = Of(two), layer_drop(Of(two))
    result = fxprune.prune(model, X, channels=0.5)
    with pytest.raises(
        VerificationError, match="random numbers of both models cannot be compared"
    ):
        checked(dropping, result, analysed=model)
    layer_drop(result.model)
    assert checked(dropping, result, analysed=model).error < 1e-9


def test_an_output_whose_zeros_are_left_out() -> None:
    proved(Of(lambda m, x: two(m, x).relu().to_sparse()))


def test_complex_outputs() -> None:
    proved(Of(lambda m, x: torch.fft.fft(two(m, x))))


@pytest.mark.parametrize("takes", ["other sizes", "one size"])
def test_a_model_that_takes_long(takes: str) -> None:
    """For slow models, most comparisons use small inputs or float32, with its own limit."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return two(m, x) + (x.new_zeros(1) if takes == "other sizes" else x.new_zeros(6, 1))

    with mock.patch("fxprune.verification.check._LONG", -1):
        proof = proved(Of(forward), torch.randn(2, 6, 4))
    assert (
        ("another batch, in float32" in proof.compared),
        ("another batch" in proof.compared),
    ) == (
        takes == "one size",
        takes == "other sizes",
    )


def test_what_cancels_is_no_error() -> None:
    """A sum over centred channels is zero but for rounding, so its relative error says nothing."""

    class Centred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = self.up(x)
            x = x - x.mean(-1, keepdim=True)
            return self.down(x), x.sum()

    model, x = Centred().eval(), torch.randn(4, 6)
    pruned = fxprune.prune(model, x, channels=1.0, verify=True)
    assert fxprune.verify(model, pruned, x).error < 1e-9


@pytest.mark.parametrize("scale", [1.0, 1e-13, 1e-20])
def test_small_outputs_are_compared(scale: float) -> None:
    """Outputs as small as rounding errors elsewhere are compared with the same relative error."""
    model, x = Of(lambda m, x: two(m, x) * scale), torch.randn(2, 6, 4)
    assert fxprune.prune(model, x, channels=0.5, verify=True).report.error < 1e-12
    wanted = torch.rand(5, dtype=torch.float64) * scale
    wrong, shaken = wanted * 1.01, wanted * (1 + 1e-15)
    rounding = measure_rounding(Run([wanted]), [Run([shaken])], torch.float64)
    assert difference([wrong], [wanted], rounding.outputs)[0] == pytest.approx(0.01)
    assert difference([shaken], [wanted], rounding.outputs)[0] == 0.0


class Amplified(nn.Module):
    """A rounding difference between two orders of one product, scaled to length one."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.up, self.inner, self.down = (
            nn.Linear(i, o, bias=False) for i, o in ((6, 100), (100, 8), (100, 3))
        )
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        rounding = self.inner(y) - F.linear(x, self.inner.weight @ self.up.weight)
        return self.down(y) + self.share * F.normalize(rounding, dim=-1, eps=1e-30).sum(
            -1, keepdim=True
        )


def test_rounding_that_is_amplified_is_no_error() -> None:
    """Differently rounded weights change the original just as much, so the difference is no error.

    A wrong model is still found.
    """
    model, x = Amplified(1e-3), torch.randn(4, 6)
    pruned = fxprune.prune(model, x, channels=0.5)
    assert pruned.model.get_submodule("up").out_features == 50
    assert fxprune.verify(model, pruned, x).error < 1e-6
    with torch.no_grad():
        pruned.model.get_submodule("down").weight.mul_(2)
    assert fxprune.verify(model, pruned, x, randomize=False).error > 1e-3


def test_the_proof_cuts_a_parameter_once() -> None:
    """On large models, cutting a parameter costs more than running both models."""
    model, result = pruned()
    with mock.patch("fxprune.verification.runs.cut", wraps=verification_runs.cut) as cut:
        assert len(fxprune.verify(model, result).compared) > 3
    assert cut.call_count == 1


@pytest.mark.parametrize("randomize", [True, False])
def test_the_proof_leaves_weights_as_they_are(randomize: bool) -> None:
    model, result = pruned()
    held = [tensor for one in (model, result.model) for tensor in one.state_dict().values()]
    before = [tensor.clone() for tensor in held]
    fxprune.verify(model, result, X, randomize=randomize, dtype=torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(held, before, strict=True))


@pytest.mark.filterwarnings("ignore")
def test_gradients_are_those_without_a_mode_that_looks_on() -> None:
    """PyTorch crashes if it computes gradients of second derivatives under a dispatch mode."""

    class Curved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return self.second(
                torch.vmap(torch.func.hessian(lambda row: row.pow(3).sum()))(h).sum(-1)
            )

    said = apart(
        lambda: str(
            fxprune.prune(Curved(), torch.randn(2, 4), channels=0.5, verify=True).report.error
            < 1e-9
        )
    )
    assert said == "True", said


class Asserts(nn.Module):
    """A block with an assertion of its own.

    With ``limit``, it branches on the size instead.
    """

    def __init__(self, channels: int, limit: int = 0) -> None:
        super().__init__()
        self.layer, self.limit = nn.Conv2d(channels, 8, 3, padding=1), limit

    def forward(self, x: Tensor) -> Tensor:
        if self.limit:
            x = x * 2 if x.shape[2] > self.limit else x
        else:
            torch._assert(x.shape[2] < 1000, "too large")
        return self.layer(x)


class InParts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = Asserts(3), Asserts(8, limit=8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if bool((x > 1e9).any()):
            x = x.clamp(-1, 1)
        return self.head(self.second(self.first(x)).relu())


def test_what_a_guard_refuses_is_told_by_the_guard() -> None:
    """The guard itself is identified, not just its name, which other assertions may have."""
    model, x = InParts().eval(), torch.randn(2, 3, 8, 8)
    result, coupling = fxprune.prune(model, x, channels=0.5), fxprune.analyze(model, x)
    fxprune.verify(model, result, x)
    with pytest.raises(AssertionError, match="was traced for") as refused:
        result.model(torch.randn(2, 3, 16, 16))
    assert is_guard(refused.value, result.model, coupling)


def test_an_assertion_of_the_users_is_no_guard() -> None:
    """Where the original passes its assertion, the pruned model must pass it too."""
    model, x = InParts().eval(), torch.randn(2, 3, 8, 8)
    result, coupling = fxprune.prune(model, x, channels=0.5), fxprune.analyze(model, x)
    result.model.first.graph = with_a_failing_assertion(result.model.first.graph)
    with pytest.raises(AssertionError, match="was traced for") as failed:
        result.model(x)
    assert not is_guard(failed.value, result.model, coupling)


def with_a_failing_assertion(graph: fx.Graph) -> fx.Graph:
    """Make the user's assertion fail with the text of a guard."""
    node = next(node for node in graph.nodes if node.target is torch._assert)
    node.args = False, "this graph was traced for inputs with x.size(2) == 8"
    return graph


class Hides(nn.Module):
    """A model with parameters that do not affect the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = (
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 4, 1),
        )
        self.unused, self.idle = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 1, 1))
        self.register_buffer("positions", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu()) + 0 * self.idle


@pytest.mark.parametrize(
    "name", ["first.weight", "norm.running_mean", "unused.weight", "idle", "positions"]
)
def test_weights_that_were_changed_are_told(name: str) -> None:
    model, x = Hides().eval(), torch.randn(2, 3, 6, 6)
    result = fxprune.prune(model, x, channels=0.5, verify=True)
    proof = fxprune.verify(model, result, x)
    assert "the weights themselves" in proof.compared
    assert not proof.left_out
    with torch.no_grad():
        result.model.state_dict()[name].add_(1)
    proof = fxprune.verify(model, result, x)
    assert proof.error < 1e-9
    assert f"the weights themselves: '{name}' has other values than the plan leaves" in str(
        proof.left_out
    )
    if name == "positions":  # a buffer is also compared after a run in training mode
        with pytest.raises(VerificationError, match="differs from the masked original"):
            fxprune.verify(model, result, x, randomize=False)
    else:
        assert fxprune.verify(model, result, x, randomize=False).error > 1e-3


def test_a_layer_in_another_dtype_is_told() -> None:
    model, x = Hides().eval(), torch.randn(2, 3, 6, 6)
    result = fxprune.prune(model, x, channels=0.5)
    result.model.unused.half()
    proof = fxprune.verify(model, result, x)
    assert (
        "'unused.weight' is torch.float16, the original's torch.float32, and so have 1 more"
        in str(proof.left_out)
    )
    result.model.half()
    assert "the weights themselves" in fxprune.verify(model, result, x).compared


def test_a_model_that_is_pruned_wrong_is_not_handed_out() -> None:
    model, x = Hides().eval(), torch.randn(2, 3, 6, 6)
    wrong = mock.patch(
        "fxprune.rewrite.skeleton._in_format_of", side_effect=lambda source, taken: taken.flip(0)
    )
    with wrong, pytest.raises(VerificationError, match="has other values than the plan leaves"):
        fxprune.prune(model, x, channels=0.5, verify=True)
