"""The two models that run: copies of the user's and of the pruned one, with other values in
another dtype.
"""

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
    """Write zeros into these values at everything that is removed."""
    for name, tensor in coupling.parameters.items():
        for _, _, alive in survivors.fields(tensor):
            values[name].masked_fill_(torch.from_numpy(~alive), 0)


def cut(
    pruned: nn.Module, coupling: Coupling, survivors: Survivors, values: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What the pruned model holds of these values, in memory of its own."""
    found: dict[str, Tensor] = {}
    for name in named_tensors(pruned):
        if name in coupling.parameters:
            old = coupling.parameters[name]
            found[name] = (
                survivors.take(old, values[name]) if old.is_meta else values[name]
            ).clone()
    return found


def original(model: nn.Module, values: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of the user's model, its code, its hooks and all that it holds, with these values;
    parameters share their memory.
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
    """A copy of a model where it lies, as it is."""
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
    """A copy of the pruned model with these values, whose memory its parameters share, and with
    its own where there are none.
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
    """What ``copy.deepcopy`` makes of tensors that it meets; of one that autograd made, it would
    make none.
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
