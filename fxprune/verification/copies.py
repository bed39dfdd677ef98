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
from fxprune.rewrite import Survivors, memo_that_shares_graphs
from fxprune.trace import copy_module

__all__ = ["copy_original", "copy_pruned", "cut", "mask", "plain_copy"]


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
    kept: dict[str, Tensor] = {}
    for name in named_tensors(pruned):
        if name in coupling.parameters:
            labelled, value = coupling.parameters[name], values[name]
            kept[name] = (survivors.take(labelled, value) if labelled.is_meta else value).clone()
    return kept


def copy_original(model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
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
        _copy_as(memo, tensor, values[name])
    with _TensorCopies(lambda tensor: _copy_in(tensor, dtype)):
        return copy_module(model, memo)


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a model with the same values, on the same device and in the same dtype."""
    memo = memo_that_shares_graphs(model)
    for tensor in [*model.parameters(), *model.buffers()]:
        copied = tensor.detach().clone()
        if isinstance(tensor, nn.Parameter):
            copied = nn.Parameter(copied, tensor.requires_grad)
        to_memo(memo, tensor, copied)
    with _TensorCopies(lambda tensor: tensor.detach().clone()):
        return copy_module(model, memo)


def copy_pruned(pruned: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
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
    memo = memo_that_shares_graphs(pruned)
    for name, tensor in named_tensors(pruned).items():
        _copy_as(memo, tensor, values[name] if name in values else _copy_in(tensor, dtype))
    with _TensorCopies(lambda tensor: _copy_in(tensor, dtype)):
        return copy_module(pruned, memo)


def _copy_as(memo: Memo, tensor: Tensor, value: Tensor) -> None:
    """Set the copy of a tensor: ``value`` itself for a parameter, a clone of it for a buffer."""
    if isinstance(tensor, nn.Parameter):
        to_memo(memo, tensor, nn.Parameter(value, tensor.requires_grad))
    else:
        to_memo(memo, tensor, value.clone())


def _copy_in(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True)


class _TensorCopies(TorchFunctionMode):
    """A mode in which ``copy.deepcopy`` copies tensors with the given function.

    Without it, ``copy.deepcopy`` refuses tensors that autograd computed.
    """

    def __init__(self, copy: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.copy = copy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            if not in_memo(memo, tensor):
                to_memo(memo, tensor, self.copy(tensor))
            return from_memo(memo, tensor)
        return func(*args, **(kwargs or {}))
