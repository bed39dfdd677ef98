"""The comparison of both models' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from fxprune.common.contents import leaves
from fxprune.common.random_state import torch_states
from fxprune.coupling.parts.memory import place_of
from fxprune.errors import VerificationError
from fxprune.inputs import Call
from fxprune.verification.bench import Bench
from fxprune.verification.modes import InDtype, clone
from fxprune.verification.outcomes import RefusedError, describe_error, refuse_rounding
from fxprune.verification.rounding import bound_rounding

__all__ = ["check_gradients"]


def check_gradients(bench: Bench, call: Call, *, training: bool) -> int:
    """Run both models forward and backward, and compare which parameters get a gradient.

    The gradients themselves are compared as well, unless the bench runs in another dtype than
    float64, the pruned model runs on its own tensors, statistics lose elements, random numbers are
    drawn, a gradient is not finite, or the outputs differ.

    Parameters
    ----------
    bench:
        Both models.
    call:
        The inputs.
    training:
        Whether both models are in training mode.

    Returns
    -------
    int
        The number of parameters of the pruned model that get a gradient.

    Raises
    ------
    RefusedError
        If the original fails.
    PrunedFailsError, GuardedError
        If the pruned model fails.
    VerificationError
        If gradients differ. The message names the first parameter.
    """
    try:
        wanted, outputs, drawn = _gradients(bench.original(training), bench, call)
    except Exception as error:
        raise RefusedError(describe_error(error)) from error
    pruned = bench.smaller(training)
    try:
        found, smaller, _ = _gradients(pruned, bench, call)
    except Exception as error:
        raise bench.failure(pruned, error) from error
    kept = {
        name: bench.survivors.take(bench.coupling.parameters[name], grad)
        for name, grad in wanted.items()
    }
    for name in _in_order(bench.model, kept.keys() ^ found.keys()):
        has, lacks = (
            ("the original", "the pruned model")
            if name in kept
            else ("the pruned model", "the original")
        )
        # A parameter that only led to removed elements has a gradient of zeros, or none.
        if bool((kept | found)[name].any()):
            raise VerificationError(f"{name!r} gets a gradient in {has}, and none in {lacks}.")
    # In the masked original the norm of a removed row is 0/0. Attention, or an operation that
    # chooses between two values, may turn this NaN into a number again, so that gradients can be
    # compared only where they are finite and the outputs are equal.
    finite = all(bool(grad.isfinite().all()) for grad in kept.values())
    if (
        bench.dtype is torch.float64
        and finite
        and not (drawn or bench.normalises or bench.own)
        and _are_equal(outputs, smaller)
    ):
        shared = {name: grad for name, grad in kept.items() if name in found}
        try:
            _compare_gradients(bench, found, shared)
        except _GapError:
            _compare_beyond_rounding(bench, found, shared, _moved(bench, wanted, call, training))
    return len(found)


class _GapError(VerificationError):
    """A parameter's gradient differs between the models."""

    def __init__(self, name: str, gap: float, of: float) -> None:
        super().__init__(
            f"the gradient of {name!r} differs from the masked original's by {gap:.1e}, of "
            f"{of:.1e}."
        )
        self.name, self.size = name, gap


def _gradients(
    model: nn.Module, bench: Bench, call: Call
) -> tuple[dict[str, Tensor], list[Tensor], bool]:
    """Return gradients by parameter name, the outputs, and whether torch drew random numbers.

    This runs without a dispatch mode, because under one some operations have other gradients. A
    parameter is left out if forward moved it to other memory: what lies there does not belong to
    the model, and an optimiser does not know it.
    """
    args, kwargs = clone(call)
    own = {name: (parameter, place_of(parameter)) for name, parameter in model.named_parameters()}
    with bench.drawing(), torch.enable_grad(), InDtype(bench.dtype):
        before = torch_states()
        found = [
            leaf
            for leaf in leaves(model(*args, **kwargs))
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        if found:
            torch.autograd.backward(
                [leaf.abs().sum() if leaf.is_complex() else _weighted(leaf) for leaf in found]
            )
        drawn = not all(map(torch.equal, before, torch_states()))
    kept = {
        name: parameter.grad
        for name, (parameter, place) in own.items()
        if place_of(parameter) == place
    }
    return (
        {name: gradient.detach() for name, gradient in kept.items() if gradient is not None},
        [leaf.detach() for leaf in found],
        drawn,
    )


def _are_equal(outputs: list[Tensor], others: list[Tensor]) -> bool:
    """Tell whether the outputs of two runs are equal up to rounding. NaN equals NaN."""
    return [own.shape for own in outputs] == [own.shape for own in others] and all(
        torch.allclose(own, other, rtol=1e-6, atol=1e-6 * _largest(own), equal_nan=True)
        for own, other in zip(outputs, others, strict=True)
    )


def _largest(tensor: Tensor) -> float:
    return (
        float(torch.where(tensor.isfinite(), tensor.abs(), 0.0).max()) if tensor.numel() else 0.0
    )


def _weighted(output: Tensor) -> Tensor:
    """Return a sum in which every element has another weight.

    A plain sum has no gradient if the elements add up to a constant, as those of a softmax do.
    """
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).reshape(output.shape)
    return (torch.where(output.isfinite(), output, 0.0) * weights).sum()


def _compare_gradients(
    bench: Bench,
    found: dict[str, Tensor],
    kept: dict[str, Tensor],
    rounding: Mapping[str, float] | None = None,
) -> None:
    largest = max((float(grad.norm()) for grad in kept.values()), default=0.0)
    for name in _in_order(bench.model, kept):
        gap, size = float((found[name] - kept[name]).norm()), float(kept[name].norm())
        limit = bench.limit * (size + 1e-3 * largest)
        if gap > max(limit, (rounding or {}).get(name, 0.0)):
            raise _GapError(name, gap, size)


def _moved(
    bench: Bench, wanted: dict[str, Tensor], call: Call, training: bool
) -> dict[str, list[float]]:
    """Return how far each gradient of the original moves if weights are rounded differently."""
    moved: dict[str, list[float]] = {name: [] for name in wanted}
    for shaken in bench.shaken():
        again, _, _ = _gradients(shaken.original(training), bench, call)
        for name in wanted.keys() & again.keys():
            moved[name].append(float((again[name] - wanted[name]).norm()))
    return moved


def _compare_beyond_rounding(
    bench: Bench,
    found: dict[str, Tensor],
    kept: dict[str, Tensor],
    moved: dict[str, list[float]],
) -> None:
    """Compare again, and accept gaps that rounding explains.

    Raises
    ------
    RoundingError
        If rounding is amplified so much that the gradient cannot be compared.
    VerificationError
        If a gradient differs.
    """
    rounding = {name: bound_rounding(far, bench.dtype) for name, far in moved.items()}
    try:
        _compare_gradients(bench, found, kept, rounding)
    except _GapError as gap:
        for far in moved[gap.name]:
            refuse_rounding(gap.size, far, f"the gradient of {gap.name!r}")
        raise


def _in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    order = {name: n for n, (name, _) in enumerate(model.named_parameters())}
    return sorted(names, key=lambda name: order.get(name, len(order)))
