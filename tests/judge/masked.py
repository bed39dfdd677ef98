"""The masked original that a pruned model must equal, found without asking the pruner.

Every element of the original gets a unique value. An element whose value occurs in the pruned
model survived. All others are set to zero in the original, which is built a second time for that.
Fused norms compute their statistics over the channels whose weight survived.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Return floating-point parameters and saved buffers with at least one axis, by name.

    A tensor with several names is listed once, under the first.
    """
    computed = {
        f"{path}.{name}".lstrip(".")
        for path, m in model.named_modules()
        for name in m._non_persistent_buffers_set
    }
    named = (*model.named_parameters(), *model.named_buffers())
    return {
        name: t for name, t in named if t.is_floating_point() and t.dim() and name not in computed
    }


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give every element its own value, in float64.

    Their size keeps activations near one, and variances are positive.
    """
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
    elements = torch.cat(
        [t.detach().flatten() for t in stored(model).values()] or [torch.zeros(0)]
    )
    assert len(elements.unique()) == len(elements), "two elements drew the same value"


def survivors(model: nn.Module, pruned: nn.Module) -> dict[str, Tensor]:
    """Return, for each stored tensor of the original, which elements occur in the pruned model."""
    held = [
        t.detach().double().flatten()
        for t in (*pruned.parameters(), *pruned.buffers())
        if t.is_floating_point()
    ]
    alive = torch.cat([*held, torch.zeros(0, dtype=torch.float64)]).unique()
    return {name: torch.isin(t.detach(), alive) for name, t in stored(model).items()}


def mask(model: nn.Module, alive: dict[str, Tensor]) -> None:
    """Set every element that did not survive to zero.

    In weight_norm, directions without any survivor stay: their magnitude is zero, and 0 / 0 is not
    a number.
    """
    with torch.no_grad():
        for name, t in stored(model).items():
            on = alive[name]
            if name.endswith("parametrizations.weight.original1"):
                on = on | ~on.flatten(1).any(1).view(-1, *[1] * (t.dim() - 1))
            t.mul_(on.to(t.dtype))


class WithoutDropout(TorchFunctionMode):
    """A mode that turns dropout off and gives random slopes their mean value.

    Training can be compared this way.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return WITHOUT_DROPOUT.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def in_backward(*instead: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """Replace functions of torch during the backward pass.

    Checkpoints run their code again there, and modes do not see those calls.
    """
    with ExitStack() as stack:
        for func, other in (pair for pairs in instead for pair in pairs.items()):
            for space in (torch, F):
                if getattr(space, func.__name__, None) is func:
                    stack.enter_context(mock.patch.object(space, func.__name__, other))
        yield


def _same(input: Tensor, *_: Any, **__: Any) -> Tensor:
    return input


def _mean_slope(
    input: Tensor,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    out = F.leaky_relu(input, (lower + upper) / 2, inplace)
    return (
        out.contiguous() if training and not inplace else out
    )  # the layout of the random slopes' result


class OverSurvivors(TorchFunctionMode):
    """A mode in which fused norms use only the channels whose weight is not zero."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return OVER_SURVIVORS.get(func, func)(*args, **(kwargs or {}))


def _standardised(
    x: Tensor, on: Tensor, dims: tuple[int, ...], eps: float, centred: bool = True
) -> Tensor:
    count = (on.expand(x.shape)).sum(dims, keepdim=True).clamp(min=1)
    mean = (x * on).sum(dims, keepdim=True) / count if centred else x.new_zeros(())
    variance = ((x - mean) ** 2 * on).sum(dims, keepdim=True) / count
    return (x - mean) / (variance + eps).sqrt() * on


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn: Any = None,
) -> Tensor:
    if weight is None:
        return torch.native_layer_norm(input, list(normalized_shape), weight, bias, eps)[0]
    on = (weight != 0).to(input.dtype)
    y = _standardised(input, on, tuple(range(-weight.dim(), 0)), eps) * weight
    return y if bias is None else y + bias * on


def _rms_norm(input: Tensor, normalized_shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    on = (
        torch.ones(tuple(normalized_shape), dtype=input.dtype)
        if weight is None
        else (weight != 0).to(input.dtype)
    )
    y = _standardised(
        input,
        on,
        tuple(range(-on.dim(), 0)),
        torch.finfo(input.dtype).eps if eps is None else eps,
        centred=False,
    )
    return y if weight is None else y * weight


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn: Any = None,
) -> Tensor:
    channels = input.shape[1]
    on = (
        torch.ones(channels, dtype=input.dtype)
        if weight is None
        else (weight != 0).to(input.dtype)
    )
    split = input.reshape(input.shape[0], num_groups, channels // num_groups, -1)
    y = _standardised(split, on.view(1, num_groups, -1, 1), (2, 3), eps).reshape(input.shape)
    wide = (1, -1) + (1,) * (input.dim() - 2)
    y = y if weight is None else y * weight.view(wide)
    return y if bias is None else y + (bias * on).view(wide)


def _where_it_lies(func: Any, norm: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``norm`` with a result that has the memory layout of ``func``'s result.

    Whether a view of the result is a copy depends on that layout.
    """

    def call(*args: Any, **kwargs: Any) -> Tensor:
        given = func(*args, **kwargs)
        return torch.empty_strided(given.shape, given.stride(), dtype=given.dtype).copy_(
            norm(*args, **kwargs)
        )

    return call


_NORMS = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "group_norm": _group_norm}
OVER_SURVIVORS = {
    func: _where_it_lies(func, norm)
    for n, norm in _NORMS.items()
    for func in (getattr(torch, n), getattr(F, n))
}

_DROPS = (
    F.dropout,
    F.dropout1d,
    F.dropout2d,
    F.dropout3d,
    F.alpha_dropout,
    torch.dropout,
    torch.feature_dropout,
    torch.dropout_,
)
WITHOUT_DROPOUT: dict[Any, Callable[..., Tensor]] = {
    **dict.fromkeys(_DROPS, _same),
    F.rrelu: _mean_slope,
}
