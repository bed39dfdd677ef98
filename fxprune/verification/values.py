"""The weights and inputs that both models run on, drawn at random or the user's own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.identity import IdentityMap, IdentitySet
from fxprune.inputs import Call

__all__ = ["Choice", "choices", "dtype_of", "inputs_of", "to_float32", "weights_of"]


@dataclass(frozen=True)
class Choice:
    """The source of weights and inputs.

    Attributes
    ----------
    weights, floats:
        Whether weights and floating-point inputs are drawn at random. If not, the user's values
        are used, where there are any.
    whole:
        The value for integer and boolean inputs of which only the shape is known: 0, 1, or None
        for random numbers.
    """

    weights: bool
    floats: bool
    whole: int | None = None


def choices(randomize: bool, call: Call) -> Iterator[Choice]:
    """Yield the choices to try, until the original runs and gives finite outputs.

    Random values come first, because they show the most errors: a zero in a fresh model cannot
    hide one. A model may refuse them (an index that it computes leaves its table), or give nothing
    finite (the logarithm of a negative number).

    Parameters
    ----------
    randomize:
        Whether random values are allowed.
    call:
        The example inputs.
    """
    random = ((True, True), (True, False)) if randomize else ()
    unknown = any(leaf.is_meta and not leaf.is_floating_point() for leaf in tensors_of(call))
    for weights, floats in (*random, (False, False)):
        for whole in (None, 0, 1) if unknown else (None,):
            yield Choice(weights, floats, whole)


def weights_of(
    model: nn.Module, dtype: torch.dtype, choice: Choice, seed: int
) -> dict[str, Tensor]:
    """Return values for the original's parameters and buffers, by name, on the CPU.

    Random values keep activations of order one and variances positive. A tensor that has two names
    gets one tensor under both.

    Parameters
    ----------
    model:
        The original.
    dtype:
        The dtype of the floating-point values. Complex values get the matching complex dtype, and
        other values keep theirs.
    choice:
        Whether to draw values at random. A tensor on the meta device has no value, so it is always
        drawn.
    seed:
        The seed for random values.
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
            if not tensor.is_floating_point():
                shared[tensor] = _copy_on_cpu(tensor, dtype)
            elif not choice.weights and not tensor.is_meta:
                shared[tensor] = tensor.detach().to("cpu", dtype, copy=True)
            else:
                is_matrix = tensor in parameters and tensor.dim() > 1
                shared[tensor] = _random_weight(tensor, is_matrix, dtype, generator)
        values[name] = shared[tensor]
    return values


def _copy_on_cpu(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy of a tensor without floating-point numbers; zeros if it has no values."""
    if tensor.is_meta:
        value = torch.zeros(tensor.shape, dtype=tensor.dtype)
    else:
        value = tensor.detach().cpu().clone()
    return _convert_complex(value, dtype)


def _random_weight(
    tensor: Tensor, is_matrix: bool, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """Return random numbers: around zero for a matrix, else from 0.5 to 1.5."""
    if not is_matrix:
        return torch.rand(tensor.shape, generator=generator, dtype=dtype) + 0.5
    bound = (4.5 / max(tensor[0].numel(), 1)) ** 0.5
    return torch.empty(tensor.shape, dtype=dtype).uniform_(-bound, bound, generator=generator)


def inputs_of(model: nn.Module, call: Call, dtype: torch.dtype, choice: Choice, seed: int) -> Call:
    """Return inputs like the example's, on the CPU, with floating-point values in ``dtype``.

    Integers and booleans keep their values if these are known.

    Parameters
    ----------
    model:
        The original. Its smallest embedding table bounds random integers.
    call:
        The example inputs. Tensors on the meta device have only a shape.
    dtype:
        The dtype of the floating-point values. Complex values get the matching complex dtype.
    choice:
        Which values to draw at random.
    seed:
        The seed for random values.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    # An index must lie inside every table, because it may be used for any of them.
    top = min([2, *(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))])

    def input_like(tensor: Tensor) -> Tensor:
        """Return a value for one tensor of the example."""
        if tensor.is_floating_point():
            if choice.floats:
                return torch.randn(tensor.shape, generator=generator, dtype=dtype)
            if tensor.is_meta:
                return torch.rand(tensor.shape, generator=generator, dtype=dtype)
            return tensor.detach().to("cpu", dtype)
        if not tensor.is_meta:
            return _convert_complex(tensor.detach().cpu(), dtype)
        if choice.whole is not None:
            return torch.full(tensor.shape, min(choice.whole, top - 1)).to(tensor.dtype)
        return torch.randint(0, top, tensor.shape, generator=generator).to(tensor.dtype)

    return tree_map_only(Tensor, input_like, call)


def dtype_of(values: Iterable[Tensor]) -> torch.dtype:
    """Return the dtype of the first floating-point tensor; without any, torch's default dtype."""
    found = (value.dtype for value in values if value.is_floating_point())
    return next(found, torch.get_default_dtype())


def to_float32(value: Any) -> Any:
    """Return a nested value with its floating-point tensors in float32."""
    return tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, value)


def _convert_complex(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a complex tensor to the complex dtype that matches; leave others as they are."""
    if not tensor.is_complex():
        return tensor
    return tensor.to(torch.complex128 if dtype is torch.float64 else torch.complex64)
