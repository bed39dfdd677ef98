"""What both models are run on: weights, drawn at random or the user's own, and inputs, for the
example's sizes or others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.identity import IdentityMap, IdentitySet
from fxprune.inputs import Call

__all__ = ["Choice", "choices", "in_single", "inputs_of", "weights_of"]


@dataclass(frozen=True)
class Choice:
    """Where weights and inputs come from.

    Attributes
    ----------
    weights, floats:
        Whether they are drawn at random; else they are the user's, where there are any.
    whole:
        For whole numbers of which only the shape is known: 0, 1, or None for both, at random.
    """

    weights: bool
    floats: bool
    whole: int | None = None


def choices(randomize: bool, call: Call) -> Iterator[Choice]:
    """The values to try, until the original can be run on some and gives numbers.

    Values drawn at random show the most: no zero in a fresh model hides an error. A model may
    refuse them (an index that it computes leaves its table), or give nothing that is finite (the
    logarithm of a negative number).
    """
    unknown = any(leaf.is_meta and not _real(leaf) for leaf in tensors_of(call))
    for weights, floats in (
        ((True, True), (True, False), (False, False)) if randomize else ((False, False),)
    ):
        for whole in (None, 0, 1) if unknown else (None,):
            yield Choice(weights, floats, whole)


def weights_of(
    model: nn.Module, dtype: torch.dtype, choice: Choice, seed: int
) -> dict[str, Tensor]:
    """The original's tensors by name, on the CPU, in ``dtype``.

    Random ones keep activations of order one and variances positive. A tensor that has two names
    is one tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    values: dict[str, Tensor] = {}
    shared: IdentityMap[Tensor, Tensor] = IdentityMap()
    parameters = IdentitySet(model.parameters())
    for name, tensor in [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]:
        if tensor not in shared:
            if not _real(tensor):
                held = (
                    torch.zeros(tensor.shape, dtype=tensor.dtype)
                    if tensor.is_meta
                    else tensor.detach().cpu().clone()
                )
                shared[tensor] = held.to(_complex(dtype)) if held.is_complex() else held
            elif not choice.weights and not tensor.is_meta:
                shared[tensor] = tensor.detach().to("cpu", dtype, copy=True)
            elif tensor in parameters and tensor.dim() > 1:
                most = (4.5 / max(tensor[0].numel(), 1)) ** 0.5
                shared[tensor] = torch.empty(tensor.shape, dtype=dtype).uniform_(
                    -most, most, generator=generator
                )
            else:
                shared[tensor] = torch.rand(tensor.shape, generator=generator, dtype=dtype) + 0.5
        values[name] = shared[tensor]
    return values


def inputs_of(model: nn.Module, call: Call, dtype: torch.dtype, choice: Choice, seed: int) -> Call:
    """Inputs like the example's, on the CPU, in ``dtype``. Whole numbers that are known stay as
    they are.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    # An index must stay inside its table, whichever that is.
    top = min([2, *(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))])

    def value(tensor: Tensor) -> Tensor:
        if not _real(tensor):
            if not tensor.is_meta:
                own = tensor.detach().cpu()
                return own.to(_complex(dtype)) if own.is_complex() else own
            if choice.whole is not None:
                return torch.full(tensor.shape, min(choice.whole, top - 1)).to(tensor.dtype)
            return torch.randint(0, top, tensor.shape, generator=generator).to(tensor.dtype)
        if not choice.floats and not tensor.is_meta:
            return tensor.detach().to("cpu", dtype)
        if not choice.floats:
            return torch.rand(tensor.shape, generator=generator, dtype=dtype)
        return torch.randn(tensor.shape, generator=generator, dtype=dtype)

    return tree_map_only(Tensor, value, call)


def in_single(value: Any) -> Any:
    """A nested value with tensors in float32."""
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, value)


def _real(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _complex(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype is torch.float64 else torch.complex64
