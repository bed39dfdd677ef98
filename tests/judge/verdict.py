"""Judge one network: prune it, and compare it with its masked original in every setting."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import traceback
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fxprune

from .masked import (
    OVER_SURVIVORS,
    WITHOUT_DROPOUT,
    OverSurvivors,
    WithoutDropout,
    fill,
    in_backward,
    mask,
    stored,
    survivors,
)
from .source import Drawn, write
from .spec import Spec

LIMIT = 1e-7  # the largest relative error, in float64


class ShortError(Exception):
    """A comparison failed; it says in which setting, and how."""

    def __init__(self, setting: str, what: str) -> None:
        super().__init__(f"{setting}: {what}")
        self.setting = setting


@dataclass(frozen=True)
class Verdict:
    """The result for one network.

    Attributes
    ----------
    outcome:
        ``"right"``, ``"whole"`` (right, but nothing was pruned), ``"refused"`` (prune raised an
        FxpruneError), ``"wrong"``, or ``"invalid"`` (the network itself does not run).
    what:
        Details of the outcome.
    left:
        The share of parameters that is left.
    parts:
        Whether the pruned model is not a single graph.
    guarded:
        The number of inputs of another size that a network which asks for sizes refused.
    """

    spec: str
    outcome: str
    what: str = ""
    left: float = 1.0
    parts: bool = False
    guarded: int = 0  # inputs of another size that were refused


def judge(spec: Spec) -> Verdict:
    """Write the network's source, prune it, and compare."""
    drawn = write(spec)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # networks use deprecated functions of torch, which is not the pruner's fault
            warnings.simplefilter("ignore")
            return _judge(drawn)
    except ShortError as error:
        return Verdict(
            str(spec), "invalid" if error.setting == "original" else "wrong", str(error)
        )
    except fxprune.FxpruneError as error:
        return Verdict(str(spec), "refused", _text(error))
    finally:
        drawn.forget()


def _judge(drawn: Drawn) -> Verdict:
    torch.manual_seed(0)
    model, inputs = _original(drawn)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    try:
        pruned = _prune(model, inputs, drawn.options)
    except fxprune.FxpruneError:
        raise
    except Exception as error:
        raise ShortError("prune", _text(error)) from error
    _expect(
        "original untouched",
        modes == [m.training for m in model.modules()] and _same(before, model.state_dict()),
        "prune changed it",
    )
    emitted = pruned.model
    alive = survivors(model, emitted)
    reference = _filled(drawn)
    mask(reference, alive)
    _compare("example", reference, emitted, inputs)
    guarded = _others(drawn, reference, emitted)
    _saved(drawn, pruned, emitted, inputs)
    _deployed(drawn, emitted, inputs)
    kept = {name: t.clone() for name, t in emitted.state_dict().items()}
    _training(reference, emitted, inputs, alive)
    emitted.load_state_dict(kept)
    _proved(model, dataclasses.replace(pruned, model=emitted.eval()), inputs)
    left = _count(emitted) / max(1, _count(model))
    parts = not isinstance(emitted, torch.fx.GraphModule)
    return Verdict(
        str(drawn.spec), "whole" if left == 1 else "right", left=left, parts=parts, guarded=guarded
    )


def _prune(model: nn.Module, inputs: Any, options: dict[str, Any]) -> fxprune.Pruned:
    """Prune to the budget of the spec, or to half of every group if that cannot be reached."""
    try:
        return fxprune.prune(model, copy.deepcopy(inputs), **options)
    except fxprune.BudgetError:
        return fxprune.prune(model, copy.deepcopy(inputs), channels=0.5)


def _filled(drawn: Drawn) -> nn.Module:
    """Build the original once more.

    A copy would share the objects that its hooks hold.
    """
    torch.manual_seed(0)
    model = drawn.build().eval()
    fill(model)
    return model


def _original(drawn: Drawn) -> tuple[nn.Module, Any]:
    """Return the module with unique values, and its example.

    Raises
    ------
    ShortError
        If the network itself does not run.
    """
    inputs = drawn.example.make(3, 0)
    try:
        model = _filled(drawn)
        found = [t for t in leaves(run(model, inputs)) if t.is_floating_point()]
        training = [
            t for t in leaves(run(_filled(drawn).train(), inputs)) if t.is_floating_point()
        ]
    except Exception as error:
        raise ShortError("original", _text(error)) from error
    finite = all(
        bool(t.isfinite().all()) and float(t.abs().sum()) < 1e9 for t in (*found, *training)
    )
    _expect("original", found and finite, "no finite output")
    return model, inputs


def _others(drawn: Drawn, reference: nn.Module, emitted: nn.Module) -> int:
    """Compare for another batch, another resolution, and both.

    Inputs that the original does not take are skipped. Return the number of inputs that the pruned
    model refused.
    """
    guarded = 0
    for setting, batch, more in (
        ("batch 5", 5, 0),
        ("batch 1", 1, 0),
        ("other size", 3, 1),
        ("other size and batch", 2, 2),
    ):
        inputs = drawn.example.make(batch, more)
        try:
            run(reference, inputs)
        except Exception:
            continue  # the original does not accept it
        try:
            _compare(setting, reference, emitted, inputs)
        except (AssertionError, fxprune.FxpruneError) as error:
            _expect(setting, drawn.branches, _text(error))
            guarded += 1
    return guarded


def _training(
    reference: nn.Module, emitted: nn.Module, inputs: Any, alive: dict[str, Tensor]
) -> None:
    """Compare in training mode: outputs, gradients of what survived, and statistics of norms."""
    reference, emitted = reference.train(), emitted.train()
    state = {name: t.clone() for name, t in reference.state_dict().items()}
    try:
        with WithoutDropout():
            _sum(leaves(run(reference, inputs, grad=True)))
        differentiable = True
    except RuntimeError:
        differentiable = False  # it writes into a view that autograd guards, for example
    reference.load_state_dict(state)
    with WithoutDropout():
        got, want = _compare("training", reference, emitted, inputs, grad=differentiable)
    # this comes before the backward pass, because checkpoints run again there
    ours, theirs = dict(emitted.named_buffers()), stored(reference)
    for name, old in dict(reference.named_buffers()).items():
        if name in ours and name in theirs:
            _near("statistics after training", [ours[name].flatten()], [old[alive[name]]], name)
    if not differentiable:
        return
    with in_backward(WITHOUT_DROPOUT):
        try:
            with in_backward(OVER_SURVIVORS):
                _sum(want).backward()
        except RuntimeError:
            return  # the original itself has no gradient here
        try:
            _sum(got).backward()
        except RuntimeError as error:
            raise ShortError("gradients", _text(error)) from error
    ours, theirs = dict(emitted.named_parameters()), dict(reference.named_parameters())
    floor = (
        1e-3
        * max(
            (
                float(_grad(p).nan_to_num(0, 0, 0).abs().max())
                for p in theirs.values()
                if p.numel()
            ),
            default=0.0,
        )
        + 1e-6
    )
    for name, old in theirs.items():
        if (new := ours.get(name)) is None or name not in alive:
            continue
        _expect(
            "gradients",
            (old.grad is None) == (new.grad is None) or not bool(_grad(old)[alive[name]].any()),
            f"{name} has one in one of the two",
        )
        expected, found = _grad(old)[alive[name]], _grad(new).flatten()
        _expect(
            "gradients",
            expected.numel() == found.numel(),
            f"{name} is {tuple(new.shape)}, {expected.numel()} elements survived",
        )
        if bool(expected.isfinite().all()):
            try:
                _near("gradients", [found], [expected], name, floor)
            except ShortError:
                if not _is_rounding(reference, state, inputs, name, alive[name], expected - found):
                    raise


def _is_rounding(
    reference: nn.Module, state: dict[str, Tensor], inputs: Any, name: str, on: Tensor, gap: Tensor
) -> bool:
    """Tell whether rounding of the weights moves a gradient of the original as far as ``gap``.

    This happens where the network divides by nearly zero.
    """
    parameter, grads = (
        dict(reference.named_parameters())[name],
        [own.grad for own in reference.parameters()],
    )
    before, after = (
        _grad(parameter)[on].clone(),
        {key: t.clone() for key, t in reference.state_dict().items()},
    )
    eps, generator, moved = torch.finfo(torch.float64).eps, torch.Generator().manual_seed(0), 0.0
    for _ in range(5):
        reference.load_state_dict(state)
        with torch.no_grad():
            for own in reference.parameters():
                own.grad = None
                own.mul_(1 + torch.randint(-2, 3, own.shape, generator=generator).double() * eps)
        with WithoutDropout(), OverSurvivors():
            total = _sum(leaves(run(reference, inputs, grad=True)))
        with in_backward(WITHOUT_DROPOUT, OVER_SURVIVORS):
            total.backward()
        moved = max(moved, float((_grad(parameter)[on] - before).abs().max()))
    reference.load_state_dict(after)
    for own, grad in zip(reference.parameters(), grads, strict=True):
        own.grad = grad
    return float(gap.abs().max()) <= 10 * moved


def _grad(parameter: Tensor) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _sum(outputs: list[Tensor]) -> Tensor:
    return torch.stack(
        [
            (t * torch.linspace(0.5, 1.5, t.numel()).view(t.shape)).sum()
            for t in outputs
            if t.requires_grad
        ]
    ).sum()


def _saved(drawn: Drawn, pruned: fxprune.Pruned, emitted: nn.Module, inputs: Any) -> None:
    """Check that saving and loading returns the same model, bit for bit."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            pruned.save(folder)
            loaded = fxprune.load(folder, lambda: drawn.build().eval().double()).model
        except Exception as error:
            raise ShortError("save and load", _text(error)) from error
    _expect("save and load", _same(emitted.state_dict(), loaded.state_dict()), "other tensors")
    _near(
        "save and load",
        _outputs("save and load", loaded, inputs),
        leaves(run(emitted, inputs)),
        "the loaded model",
    )


def _deployed(drawn: Drawn, emitted: nn.Module, inputs: Any) -> None:
    """Compare the outputs of the inference form, also for another batch.

    Models that write into views cannot be deployed channels-last.
    """
    try:
        try:
            fast = fxprune.deploy(emitted)
        except fxprune.ModelError as error:
            if "channels_last=False" not in str(error):
                raise
            fast = fxprune.deploy(emitted, channels_last=False)
    except Exception as error:
        raise ShortError("deploy", _text(error)) from error
    for given in (inputs, drawn.example.make(2, 0)):
        try:
            want = leaves(run(emitted, given))
        except (AssertionError, fxprune.FxpruneError):
            continue
        try:
            _near("deploy", _outputs("deploy", fast, given), want, "the deployed model")
        except ShortError:
            if not _rounds_to_others(emitted, given):
                raise


def _rounds_to_others(model: nn.Module, inputs: Any) -> bool:
    """Tell whether rounding of the weights changes the outputs.

    This happens where the network chooses among equal values, for example.
    """
    state, want = (
        {name: t.clone() for name, t in model.state_dict().items()},
        leaves(run(model, inputs)),
    )
    generator = torch.Generator().manual_seed(0)
    try:
        for _ in range(5):
            for own in model.parameters():
                with torch.no_grad():
                    own.mul_(
                        1
                        + torch.randint(-2, 3, own.shape, generator=generator).double()
                        * torch.finfo(torch.float64).eps
                    )
            _near("rounding", leaves(run(model, inputs)), want, "itself")
    except ShortError:
        return True
    finally:
        model.load_state_dict(state)
    return False


def _proved(model: nn.Module, pruned: fxprune.Pruned, inputs: Any) -> None:
    """Check that ``verify`` accepts a model that is right."""
    try:
        measured = fxprune.verify(model, pruned, inputs).error
    except Exception as error:
        raise ShortError("verify", _text(error)) from error
    _expect("verify", measured <= 1e-6, f"measures {measured:.1e}")


# --- comparisons


def run(model: nn.Module, inputs: Any, grad: bool = False) -> Any:
    """Call a model, with the same random numbers each time."""
    torch.manual_seed(7)
    inputs = copy.deepcopy(inputs)
    with torch.set_grad_enabled(grad):
        if isinstance(inputs, dict):
            return model(**inputs)
        return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def leaves(value: Any) -> list[Tensor]:
    """Return all tensors and numbers of an output in order, whatever containers hold them."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (bool, int, float)):
        return [torch.tensor(float(value), dtype=torch.float64)]
    if value is None or isinstance(value, str):
        return []
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in leaves(getattr(value, f.name))]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in leaves(v)]
    if isinstance(value, Iterable):
        return [t for v in value for t in leaves(v)]
    return [t for v in vars(value).values() for t in leaves(v)]


def _outputs(setting: str, model: nn.Module, inputs: Any, grad: bool = False) -> list[Tensor]:
    try:
        return leaves(run(model, inputs, grad))
    except (AssertionError, fxprune.FxpruneError):
        raise
    except Exception as error:
        raise ShortError(setting, f"the pruned model raises {_text(error)}") from error


def _compare(
    setting: str, reference: nn.Module, emitted: nn.Module, inputs: Any, grad: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    with OverSurvivors():
        want = leaves(run(reference, inputs, grad))
    try:
        got = _outputs(setting, emitted, inputs, grad)
    except (AssertionError, fxprune.FxpruneError) as error:
        if setting.startswith(("batch", "other")):
            raise
        raise ShortError(setting, f"the pruned model raises {_text(error)}") from error
    _near(setting, got, want, "the masked original")
    return got, want


def _near(
    setting: str, got: list[Tensor], want: list[Tensor], whom: str, floor: float = 1e-6
) -> None:
    """Raise if something differs, relative to the largest element.

    ``floor`` is added to that element, because smaller values may be the rest of a cancellation.
    """
    shapes = [[tuple(t.shape) for t in values] for values in (got, want)]
    _expect(setting, shapes[0] == shapes[1], f"shapes {shapes[0]}, {whom} has {shapes[1]}")
    for n, (a, b) in enumerate(zip(got, want, strict=True)):
        if not a.numel():
            continue
        a, b = a.detach().double(), b.detach().double()
        gap = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
        wrong = float(gap.max() / (b.nan_to_num(0, 0, 0).abs().max() + floor))
        _expect(setting, wrong <= LIMIT, f"output {n} differs by {wrong:.1e} from {whom}")


def _expect(setting: str, holds: Any, what: str) -> None:
    if not holds:
        raise ShortError(setting, what)


def _same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return set(one) == set(other) and all(
        torch.equal(t.nan_to_num(), other[name].nan_to_num()) for name, t in one.items()
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _text(error: BaseException) -> str:
    """Return the error in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = next(
        (
            f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno} {f.name}"
            for f in reversed(frames)
            if "fxprune" in f.filename
        ),
        "",
    )
    return (
        f"{type(error).__name__}: "
        f"{' '.join(str(error).split())[:300]}{f' [{place}]' if place else ''}"
    )
