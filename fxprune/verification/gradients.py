"""The comparison of both models' gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import leaves
from fxprune.common.random_state import torch_states
from fxprune.coupling.parts.memory import place_of
from fxprune.errors import VerificationError
from fxprune.inputs import Call
from fxprune.verification.bench import Bench
from fxprune.verification.dtypes import DtypeMode
from fxprune.verification.modes import clone
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
        reference = _run_reference(bench, call, training)
    except Exception as error:
        raise RefusedError(describe_error(error)) from error
    pruned = bench.pruned_copy(training)
    try:
        result = _run_backward(pruned, bench, call)
    except Exception as error:
        raise bench.pruned_failure(pruned, error) from error
    kept = reference.gradients
    _check_names(bench, result.gradients, kept)
    if _are_comparable(bench, reference, result):
        shared = {name: grad for name, grad in kept.items() if name in result.gradients}
        try:
            _compare_gradients(bench, result.gradients, shared)
        except _GapError:
            moved = _moved(bench, kept, call, training)
            _compare_beyond_rounding(bench, result.gradients, shared, moved)
    return len(result.gradients)


def _check_names(bench: Bench, found: dict[str, Tensor], kept: dict[str, Tensor]) -> None:
    """Raise an error if a gradient that is not zero is missing in one of the models.

    A parameter that only led to removed elements may have a gradient of zeros, or none.
    """
    for name in _in_order(bench.model, kept.keys() ^ found.keys()):
        has, lacks = "the pruned model", "the original"
        if name in kept:
            has, lacks = lacks, has
        if bool((kept | found)[name].any()):
            raise VerificationError(f"{name!r} gets a gradient in {has}, and none in {lacks}.")


def _are_comparable(bench: Bench, reference: _Backward, result: _Backward) -> bool:
    """Tell whether the gradients themselves must be equal.

    In the masked original the norm of a removed row is 0/0. Attention, or an operation that
    chooses between two values, may turn this NaN into a number again, so that gradients can be
    compared only where they are finite and the outputs are equal.
    """
    if bench.dtype is not torch.float64 or bench.has_statistics or bench.own_values:
        return False
    gradients = reference.gradients.values()
    if reference.has_drawn or not all(bool(grad.isfinite().all()) for grad in gradients):
        return False
    return _are_close(reference.outputs, result.outputs)


@dataclass
class _Backward:
    """The result of a run forward and backward.

    Attributes
    ----------
    gradients:
        The gradients by parameter name.
    outputs:
        The outputs that require a gradient.
    has_drawn:
        Whether torch drew random numbers.
    """

    gradients: dict[str, Tensor]
    outputs: list[Tensor]
    has_drawn: bool


class _GapError(VerificationError):
    """A parameter's gradient differs between the models."""

    def __init__(self, name: str, gap: float, of: float) -> None:
        super().__init__(
            f"the gradient of {name!r} differs from the masked original's by {gap:.1e}, of "
            f"{of:.1e}."
        )
        self.name, self.size = name, gap


def _run_reference(bench: Bench, call: Call, training: bool) -> _Backward:
    """Run the masked original forward and backward; return the gradients of what is kept."""

    def cut(name: str, gradient: Tensor) -> Tensor:
        """Return the part of a gradient that the pruned model has, as a tensor of its own."""
        return bench.survivors.take(bench.coupling.parameters[name], gradient).clone()

    return _run_backward(bench.masked_copy(training), bench, call, cut)


def _run_backward(
    model: nn.Module,
    bench: Bench,
    call: Call,
    cut: Callable[[str, Tensor], Tensor] = lambda _, gradient: gradient,
) -> _Backward:
    """Run a model forward and backward.

    This runs without a dispatch mode, because under one some operations have other gradients. A
    parameter is left out if forward moved it to other memory: what lies there does not belong to
    the model, and an optimiser does not know it.

    Each gradient is cut as soon as it is there, so that no two whole ones take memory at a time.
    """
    args, kwargs = clone(call)
    parameters = dict(model.named_parameters())
    places = {name: place_of(parameter) for name, parameter in parameters.items()}
    gradients: dict[str, Tensor] = {}

    def collect(name: str, parameter: Tensor) -> None:
        """Move a gradient from the parameter to the collected ones."""
        assert parameter.grad is not None
        gradient = cut(name, parameter.grad.detach())
        gradients[name] = gradients[name] + gradient if name in gradients else gradient
        parameter.grad = None

    for name, parameter in parameters.items():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(functools.partial(collect, name))
    with bench.same_draws(), torch.enable_grad(), DtypeMode(bench.dtype):
        before = torch_states()
        outputs = [leaf for leaf in leaves(model(*args, **kwargs)) if _requires_grad(leaf)]
        if outputs:
            torch.autograd.backward([_weighted_sum(output) for output in outputs])
        has_drawn = not all(map(torch.equal, before, torch_states()))
    found: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if parameter.grad is not None:  # forward itself made it a parameter to train
            collect(name, parameter)
        if place_of(parameter) == places[name] and name in gradients:
            found[name] = gradients[name]
    return _Backward(found, [output.detach() for output in outputs], has_drawn)


def _requires_grad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad


def _are_close(outputs: list[Tensor], others: list[Tensor]) -> bool:
    """Tell whether the outputs of two runs are equal up to rounding. NaN equals NaN."""
    if [output.shape for output in outputs] != [output.shape for output in others]:
        return False
    return all(map(_is_close, outputs, others))


def _is_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-6, atol=1e-6 * _largest(one), equal_nan=True)


def _largest(tensor: Tensor) -> float:
    if not tensor.numel():
        return 0.0
    return float(torch.where(tensor.isfinite(), tensor.abs(), 0.0).max())


def _weighted_sum(output: Tensor) -> Tensor:
    """Return a sum in which every element has another weight.

    A plain sum has no gradient if the elements add up to a constant, as those of a softmax do.
    Complex numbers are replaced by their magnitudes, which are added up without weights.
    """
    if output.is_complex():
        return output.abs().sum()
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
    for perturbed in bench.perturbed():
        again = _run_reference(perturbed, call, training).gradients
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
