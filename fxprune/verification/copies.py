"""The two models that run: copies of the user's and of the pruned one, with other values in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.coupling import Coupling
from fxprune.rewrite import Survivors
from fxprune.trace import copy_of

__all__ = ["masked", "original", "plain", "smaller"]


def masked(coupling: Coupling, survivors: Survivors, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values with zeros at everything that is removed."""
    found = dict(values)
    for name in coupling.parameters:
        for labels in coupling.parameter_labels(name):
            found[name] = found[name] * torch.from_numpy(survivors.alive[labels]).to(found[name].dtype)
    return found


def original(model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of the user's model, its code, its hooks and all that it holds, with these values."""
    memo: dict[int, Any] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        value = values[name]
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(value, tensor.requires_grad) if parameter else value.clone()
    with _Tensors(lambda tensor: _in_dtype(tensor, dtype)):
        return copy_of(model, memo)


def plain(model: nn.Module) -> nn.Module:
    """A copy of a model where it lies, as it is."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        own = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own
    with _Tensors(lambda tensor: tensor.detach().clone()):
        return copy_of(model, memo)


def smaller(
    pruned: nn.Module, coupling: Coupling, survivors: Survivors, values: Mapping[str, Tensor] | None, dtype: torch.dtype
) -> nn.Module:
    """A copy of the pruned model with the survivors of these values; None: with its own."""
    memo: dict[int, Any] = {}
    for name, old in [*pruned.named_parameters(), *pruned.named_buffers()]:
        if values is None or name not in coupling.parameters:
            value = _in_dtype(old, dtype)
        elif coupling.parameters[name].is_meta:
            value = survivors.take(coupling.parameters[name], values[name]).clone()
        else:
            value = values[name].clone()
        memo[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    with _Tensors(lambda tensor: _in_dtype(tensor, dtype)):
        return copy_of(pruned, memo)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)


class _Tensors(TorchFunctionMode):
    """What ``copy.deepcopy`` makes of tensors that it meets; of one that autograd made, it would make none."""

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = self.copied(tensor)
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
