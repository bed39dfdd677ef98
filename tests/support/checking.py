"""One check for every module: the pruned model is exact and small, and the original is unchanged.

Two references are used. `fxprune.verify` is the project's own. `masked` is independent of it:
parameters are drawn at random, so every number is unique, and an element of the original was
removed exactly if its value no longer occurs in the emitted model. It uses neither the plan nor
the coupling.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune

TOLERANCE = 1e-9
"""Largest relative error allowed in float64."""

Inputs = Tensor | tuple[Any, ...] | dict[str, Any]


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Run `model` on `inputs`, which are read as `fxprune.prune` reads them.

    They are a tensor, positional arguments or keyword arguments.
    """
    if isinstance(inputs, Tensor):
        return model(inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def nesting(structure: Any) -> Any:
    """Return how an output is nested.

    An OrderedDict counts as a dict, because a graph cannot make one.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value

    return pytree.tree_structure(plain(structure))


def tensors(structure: Any) -> list[Tensor]:
    """Return the tensors of a nested output, in order."""
    return [leaf for leaf in pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def as_dtype(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return `inputs` with floating-point tensors cast; indices stay as they are."""
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if leaf.is_floating_point() else leaf, inputs
    )


def count(model: nn.Module) -> int:
    """Return the number of parameter elements, tied parameters counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def randomise(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Draw every parameter and statistic of `model` anew, in place, and return it in `dtype`.

    Weights get the scale of a usual initialisation. Scales and biases are moved away from 1 and 0,
    because a wrong slice of a constant cannot be seen. Masks and tables (buffers that are not
    named like a statistic) stay.
    """
    model.to(dtype)
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn_like(parameter) / max(fan_in, 1) ** 0.5)
        for name, buffer in model.named_buffers():
            if not buffer.is_floating_point():
                continue
            if "var" in name:
                buffer.copy_(torch.rand_like(buffer) + 0.5)
            elif any(part in name for part in ("mean", "weight", "bias")):
                buffer.copy_(torch.randn_like(buffer))
    return model


def relative_error(output: Any, reference: Any) -> float:
    """Return `||output - reference|| / ||reference||`, the largest over an output's tensors."""
    assert nesting(output) == nesting(reference), "the outputs are nested differently"
    worst = 0.0
    for out, ref in zip(tensors(output), tensors(reference), strict=True):
        assert out.shape == ref.shape, f"output {tuple(out.shape)}, reference {tuple(ref.shape)}"
        assert torch.isfinite(ref).all(), (
            "the reference is not finite: the test model is badly scaled"
        )
        assert torch.isfinite(out).all(), "the output is not finite"
        if not ref.is_floating_point():  # an argmax
            assert torch.equal(out, ref)
            continue
        difference = float((out.detach() - ref.detach()).norm())
        if difference:  # if a network ends in a ReLU, all zeros may be right
            worst = max(worst, difference / float(ref.detach().norm().clamp_min(1e-300)))
    return worst


def masked(model: nn.Module, pruned: nn.Module) -> nn.Module:
    """Return a copy of `model` in which every parameter element that `pruned` lacks is zero.

    An element is missing if its value does not occur in `pruned` (see the module docstring).
    """
    reference = copy.deepcopy(model)
    kept = dict(pruned.named_parameters()) | dict(pruned.named_buffers())
    with torch.no_grad():
        for name, value in [*reference.named_parameters(), *reference.named_buffers()]:
            if name in kept and value.is_floating_point() and kept[name].shape != value.shape:
                value.mul_(torch.isin(value, kept[name]))
    return reference


@dataclass(frozen=True)
class Snapshot:
    """A copy of everything that a user could notice about a model."""

    state: Mapping[str, Tensor]
    identities: Mapping[str, int]
    pointers: Mapping[str, int]
    formats: Mapping[str, tuple[Any, ...]]
    modes: Mapping[str, bool]
    classes: Mapping[str, type]
    hooks: Mapping[str, tuple[int, ...]]
    attributes: Mapping[str, tuple[str, ...]]


def snapshot(model: nn.Module) -> Snapshot:
    """Return what `assert_unharmed` compares with later."""
    everything = dict(model.named_parameters(remove_duplicate=False))
    everything |= dict(model.named_buffers(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    return Snapshot(
        state={name: value.detach().clone() for name, value in everything.items()},
        identities={name: id(value) for name, value in everything.items()},
        pointers={
            name: value.data_ptr()
            for name, value in everything.items()
            if value.device.type != "meta"
        },
        formats={
            name: (
                value.dtype,
                value.device,
                value.requires_grad,
                value.stride(),
                value.grad is None,
            )
            for name, value in everything.items()
        },
        modes={name: module.training for name, module in modules.items()},
        classes={name: type(module) for name, module in modules.items()},
        hooks={
            name: (
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
                len(module._backward_hooks),
            )
            for name, module in modules.items()
        },
        # Attributes such as `_is_hf_initialized` count too: a user would find on the module what a
        # trace leaves there.
        attributes={name: tuple(sorted(vars(module))) for name, module in modules.items()},
    )


def assert_unharmed(model: nn.Module, before: Snapshot) -> None:
    """Raise unless `model` is bit for bit what it was at `before`.

    Values, objects, storage, modes, classes and hooks are compared.
    """
    after = snapshot(model)
    for name, value in before.state.items():
        same = value.device.type == "meta" or torch.equal(_bits(value), _bits(after.state[name]))
        assert same, f"the user's {name} changed"
    for what in ("identities", "pointers", "formats", "modes", "classes", "hooks", "attributes"):
        assert getattr(after, what) == getattr(before, what), f"{what} of the user's model changed"


def _bits(value: Tensor) -> Tensor:
    """Return `value` as integers, so that NaN equals NaN and 0.0 differs from -0.0."""
    sizes: dict[int, torch.dtype] = {
        1: torch.uint8,
        2: torch.int16,
        4: torch.int32,
        8: torch.int64,
    }
    return (
        value
        if value.is_quantized
        else value.contiguous().reshape(-1).view(sizes[value.element_size()])
    )


def check_exact(
    model: nn.Module,
    inputs: Inputs,
    *,
    channels: float = 0.5,
    at_most: float,
    zeroable: bool = True,
    batches: Callable[[int], Inputs] | None = None,
    **options: Any,
) -> Any:
    """Prune a randomised float64 `model` and assert everything that fxprune promises.

    Parameters
    ----------
    model:
        The model. It is changed in place: randomised, cast to float64 and set to eval mode.
    inputs:
        Example inputs, as `fxprune.prune` takes them.
    channels:
        The share of units that every group keeps.
    at_most:
        The largest share of parameters that may be left. Without it, pinning everything would
        pass.
    zeroable:
        Whether the original with zeros is a valid reference. It is not if statistics are taken
        over the surviving channels (LayerNorm, GroupNorm, RMSNorm, weight standardisation), or if
        a zeroed filter is divided by its own norm (weight_norm). Such models are checked by
        `fxprune.verify` alone.
    batches:
        A function from a batch size to inputs. Sizes 1, 2 and 5 are tried.
    options:
        Passed to `fxprune.prune`.

    Returns
    -------
    The `Pruned`, for further asserts.
    """
    randomise(model).eval()
    inputs = as_dtype(inputs, torch.float64)
    before = snapshot(model)
    pruned = fxprune.prune(model, inputs, channels=channels, **options)
    check = fxprune.verify(model, pruned, inputs, dtype=torch.float64, randomize=True)
    assert_unharmed(model, before)
    assert check.error <= TOLERANCE, f"relative error {check.error:.2e}"

    left = count(pruned.model) / count(model)
    assert left <= at_most, (
        f"{left:.3f} of the parameters are left, expected {at_most:.3f}\n{_why(model, inputs)}"
    )

    reference = masked(model, pruned.model) if zeroable else None
    for example in (
        [inputs]
        if batches is None
        else [as_dtype(batches(size), torch.float64) for size in (1, 2, 5)]
    ):
        with torch.no_grad():
            output, original = call(pruned.model, example), call(reference or model, example)
        if reference is not None:
            error = relative_error(output, original)
            assert error <= TOLERANCE, (
                f"relative error {error:.2e} against the original with zeros"
            )
        assert [out.shape for out in tensors(output)] == [out.shape for out in tensors(original)]
        assert all(torch.isfinite(out).all() for out in tensors(output))
        assert nesting(output) == nesting(original)
    return pruned


def _why(model: nn.Module, inputs: Inputs) -> str:
    """Return the pinned axes, for the message if a bound is missed."""
    return "\n".join(str(pinned) for pinned in fxprune.analyze(model, inputs).pinned)
