"""Copies of the original and of the pruned model, with other values and in another dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxprune.common.contents import named_tensors
from fxprune.common.identity import Memo, from_memo, in_memo, to_memo
from fxprune.coupling import Coupling
from fxprune.rewrite import Survivors, sharing_graphs
from fxprune.trace import copy_of

__all__ = ["cut", "mask", "original", "plain_copy", "smaller"]


def mask(coupling: Coupling, survivors: Survivors, values: Mapping[str, Tensor]) -> None:
    """Write zeros at all removed elements.

    Parameters
    ----------
    coupling:
        The analysis.
    survivors:
        The elements that the plan keeps.
    values:
        The original's tensors by name; they are overwritten.
    """
    for name, tensor in coupling.parameters.items():
        for _, _, alive in survivors.fields(tensor):
            values[name].masked_fill_(torch.from_numpy(~alive), 0)


def cut(
    pruned: nn.Module, coupling: Coupling, survivors: Survivors, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the part of these values that the pruned model keeps, as new tensors by name.

    Parameters
    ----------
    pruned:
        The pruned model, for its names.
    coupling:
        The analysis.
    survivors:
        The elements that the plan keeps.
    values:
        The original's tensors by name.
    """
    found: dict[str, Tensor] = {}
    for name in named_tensors(pruned):
        if name in coupling.parameters:
            old = coupling.parameters[name]
            found[name] = (
                survivors.take(old, values[name]) if old.is_meta else values[name]
            ).clone()
    return found


def original(model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Return a copy of the user's model, with its code, hooks and attributes, and with new values.

    Parameters
    ----------
    model:
        The user's model.
    values:
        The values of its parameters and buffers by name. The copy's parameters share their memory.
    dtype:
        The dtype of all other floating-point tensors that the model holds.
    """
    memo: Memo = {}
    for name, tensor in named_tensors(model).items():
        value = values[name]
        parameter = isinstance(tensor, nn.Parameter)
        to_memo(
            memo, tensor, nn.Parameter(value, tensor.requires_grad) if parameter else value.clone()
        )
    with _Tensors(lambda tensor: _in_dtype(tensor, dtype)):
        return copy_of(model, memo)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the same values, on the same device and in the same dtype."""
    memo = sharing_graphs(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        own = tensor.detach().clone()
        to_memo(
            memo,
            tensor,
            nn.Parameter(own, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else own,
        )
    with _Tensors(lambda tensor: tensor.detach().clone()):
        return copy_of(model, memo)


def smaller(pruned: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """Return a copy of the pruned model with new values.

    Parameters
    ----------
    pruned:
        The pruned model.
    values:
        The values of its parameters and buffers by name. The copy's parameters share their memory.
        A tensor without a value here keeps its own.
    dtype:
        The dtype of all other floating-point tensors that the model holds.
    """
    memo = sharing_graphs(pruned)
    for name, old in named_tensors(pruned).items():
        value = values[name] if name in values else _in_dtype(old, dtype)
        to_memo(
            memo,
            old,
            nn.Parameter(value, old.requires_grad)
            if isinstance(old, nn.Parameter)
            else value.clone(),
        )
    with _Tensors(lambda tensor: _in_dtype(tensor, dtype)):
        return copy_of(pruned, memo)


def _in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)


class _Tensors(TorchFunctionMode):
    """A mode in which ``copy.deepcopy`` copies tensors with the given function.

    Without it, ``copy.deepcopy`` refuses tensors that autograd computed.
    """

    def __init__(self, copied: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copied = copied

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if not in_memo(memo, tensor):
                to_memo(memo, tensor, self.copied(tensor))
            return from_memo(memo, tensor)
        return func(*args, **(kwargs or {}))
