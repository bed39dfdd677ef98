"""The masked original: what the pruned model must equal, found without asking the pruner.

Every element of the original gets a value that occurs once. What is found again in the pruned model survived; all else is set to
zero in the original, built once more. Fused norms take their statistics over the channels whose weight survived.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Floating-point parameters and saved buffers with axes, each once, by their first name."""
    computed = {f"{path}.{name}".lstrip(".") for path, m in model.named_modules() for name in m._non_persistent_buffers_set}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: t for name, t in named if t.is_floating_point() and t.dim() and name not in computed}


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every element its own value, in float64, of a size that keeps activations near one; variances are positive."""
    model.to(torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in stored(model).items():
            values = torch.randn(t.shape, generator=generator, dtype=torch.float64)
            if "running_var" in name:
                values = values.abs() + 0.5
            elif t.dim() > 1:
                values *= max(1, t[0].numel()) ** -0.5
            else:
                values = values * 0.2 + (1.0 if name.endswith("weight") else 0.0)
            t.copy_(values)
    elements = torch.cat([t.detach().flatten() for t in stored(model).values()] or [torch.zeros(0)])
    assert len(elements.unique()) == len(elements), "two elements drew the same value"


def survivors(model: nn.Module, pruned: nn.Module) -> dict[str, Tensor]:
    """For each stored tensor of the original, which elements are found again in the pruned model."""
    held = [t.detach().double().flatten() for t in (*pruned.parameters(), *pruned.buffers()) if t.is_floating_point()]
    alive = torch.cat([*held, torch.zeros(0, dtype=torch.float64)]).unique()
    return {name: torch.isin(t.detach(), alive) for name, t in stored(model).items()}


def mask(model: nn.Module, alive: dict[str, Tensor]) -> None:
    """Set every element that did not survive to zero.

    Directions of weight_norm of which nothing survived stay: their magnitude is zero, and 0 / 0 is no number.
    """
    with torch.no_grad():
        for name, t in stored(model).items():
            on = alive[name]
            if name.endswith("parametrizations.weight.original1"):
                on = on | ~on.flatten(1).any(1).view(-1, *[1] * (t.dim() - 1))
            t.mul_(on.to(t.dtype))


class WithoutDropout(TorchFunctionMode):
    """Dropout does nothing, so that training can be compared."""

    drops = frozenset(
        f
        for f in (
            F.dropout,
            F.dropout1d,
            F.dropout2d,
            F.dropout3d,
            F.alpha_dropout,
            torch.dropout,
            torch.feature_dropout,
            torch.dropout_,
        )
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.drops:
            return args[0] if args else (kwargs or {})["input"]
        return func(*args, **(kwargs or {}))


class OverSurvivors(TorchFunctionMode):
    """Fused norms take their statistics over the channels whose weight is not zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        norm = {F.layer_norm: _layer_norm, torch.layer_norm: _layer_norm, F.rms_norm: _rms_norm, torch.rms_norm: _rms_norm}.get(
            func
        )
        norm = {F.group_norm: _group_norm, torch.group_norm: _group_norm}.get(func, norm)
        return (norm or func)(*args, **(kwargs or {}))


def _standardised(x: Tensor, on: Tensor, dims: tuple[int, ...], eps: float, centred: bool = True) -> Tensor:
    count = (on.expand(x.shape)).sum(dims, keepdim=True).clamp(min=1)
    mean = (x * on).sum(dims, keepdim=True) / count if centred else x.new_zeros(())
    variance = ((x - mean) ** 2 * on).sum(dims, keepdim=True) / count
    return (x - mean) / (variance + eps).sqrt() * on


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: Any = None
) -> Tensor:
    if weight is None:
        return torch.native_layer_norm(input, list(normalized_shape), weight, bias, eps)[0]
    on = (weight != 0).to(input.dtype)
    y = _standardised(input, on, tuple(range(-weight.dim(), 0)), eps) * weight
    return y if bias is None else y + bias * on


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    on = torch.ones(tuple(normalized_shape), dtype=input.dtype) if weight is None else (weight != 0).to(input.dtype)
    y = _standardised(input, on, tuple(range(-on.dim(), 0)), torch.finfo(input.dtype).eps if eps is None else eps, centred=False)
    return y if weight is None else y * weight


def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn: Any = None
) -> Tensor:
    channels = input.shape[1]
    on = torch.ones(channels, dtype=input.dtype) if weight is None else (weight != 0).to(input.dtype)
    split = input.reshape(input.shape[0], num_groups, channels // num_groups, -1)
    y = _standardised(split, on.view(1, num_groups, -1, 1), (2, 3), eps).reshape(input.shape)
    wide = (1, -1) + (1,) * (input.dim() - 2)
    y = y if weight is None else y * weight.view(wide)
    return y if bias is None else y + (bias * on).view(wide)
