"""Formulas for the number of multiply-accumulates of an ATen operation.

**One MAC is one multiply-accumulate.** Only contractions have a formula (matrix products,
convolutions, attention, recurrent layers): additions, activations and normalisations cost memory
traffic, not MACs. Formulas read only shapes.

The table of operations has formulas for the functions that people call (``conv2d``,
``scaled_dot_product_attention``) and for the kernels that versions of torch run for them on
different devices (``mkldnn_convolution``, ``_scaled_dot_product_flash_attention_for_cpu``). A
count therefore never depends on what the installed :mod:`torch.utils.flop_counter` knows; the
tests compare the two where both know an operation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from torch import Tensor

from fxprune.ops.table import exact_row

__all__ = [
    "attention_by_token_macs",
    "attention_macs",
    "attention_module_macs",
    "conv_tbc_macs",
    "convolution_macs",
    "einsum_macs",
    "element_macs",
    "encoder_layer_macs",
    "grouped_matrices_macs",
    "has_formula",
    "matmul_macs",
    "matrices_macs",
    "op_macs",
    "per_input_macs",
    "per_output_macs",
    "recurrent_cell_macs",
    "recurrent_direction_macs",
    "recurrent_macs",
    "recurrent_of_library_macs",
    "trilinear_macs",
]


def op_macs(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int | None:
    """Return the multiply-accumulates of one ATen operation, or None if it has no formula.

    Call it from a ``TorchDispatchMode``. An operation that the table lacks is counted by the
    formula registered with :func:`torch.utils.flop_counter.register_flop_formula`, whose count is
    halved because it counts a multiply and an add as two.

    Parameters
    ----------
    func, args, kwargs:
        The operation and its arguments, as ``__torch_dispatch__`` receives them.
    out:
        The operation's result. Only shapes are read.

    Examples
    --------
    >>> import torch
    >>> a, b = torch.empty(3, 5), torch.empty(5, 7)
    >>> op_macs(torch.ops.aten.mm.default, (a, b), {}, a @ b) == 3 * 5 * 7
    True
    >>> op_macs(torch.ops.aten.relu.default, (a,), {}, a) is None
    True
    """
    row = exact_row(func)
    if row is not None and row.macs is not None:
        return row.macs(args, out)
    registered = _registered().get(getattr(func, "overloadpacket", func))
    return None if registered is None else int(registered(*args, **kwargs, out_val=out)) // 2


def has_formula(func: Any) -> bool:
    """Tell whether :func:`op_macs` counts an operation."""
    row = exact_row(func)
    formula = None if row is None else row.macs
    return formula is not None or getattr(func, "overloadpacket", func) in _registered()


def _registered() -> Mapping[Any, Callable[..., int]]:
    """Return the formulas registered with torch's counter.

    The counter is not imported here, because importing it loads Triton. Whoever registered a
    formula has imported it already.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    return {} if counter is None else counter.flop_registry


def _sizes_of(tensor: Any) -> tuple[int, ...]:
    """Return a tensor's shape as a plain tuple."""
    return tuple(tensor.shape)


def element_macs(index: int) -> Callable[[tuple[Any, ...], Any], int]:
    """Return the formula for matrix-vector and vector-vector products.

    It counts one MAC per element of the argument at ``index``.
    """
    return lambda args, out: prod(_sizes_of(args[index]))


def per_output_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count linear layers and convolutions.

    Each output element is a dot product with one row of the weight.
    """
    return prod(_sizes_of(out)) * prod(_sizes_of(args[1])[1:])


def per_input_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count transposed convolutions: each input element is multiplied by one row of the weight."""
    return prod(_sizes_of(args[0])) * prod(_sizes_of(args[1])[1:])


def matrices_macs(index: int) -> Callable[[tuple[Any, ...], Any], int]:
    """Return the formula for a matrix product, or a batch of them.

    The argument at ``index`` is (..., m, k); the next argument is (..., k, n).
    """
    return lambda args, out: prod(_sizes_of(args[index])) * _sizes_of(args[index + 1])[-1]


def convolution_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count ``aten.convolution``, whose argument at index 6 says whether it is transposed."""
    return per_input_macs(args, out) if args[6] else per_output_macs(args, out)


def conv_tbc_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count ``conv_tbc``: input (time, batch, channels), weight (kernel, in, out)."""
    kernel, inputs, _ = _sizes_of(args[1])
    return prod(_sizes_of(out)) * kernel * inputs


def grouped_matrices_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count the grouped products of a mixture of experts.

    The shapes are (m, k) by (groups, k, n), (groups, m, k) by (k, n), (m, k) by (k, n), or
    (groups, m, k) by (groups, k, n). In the first three, each row, column or summed position
    belongs to one group.
    """
    a, b = _sizes_of(args[0]), _sizes_of(args[1])
    return prod(a[-2:] if len(b) == 2 else a) * b[-1]


def attention_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count attention: L x S x (E + V) for each head.

    It is softmax(q k^T) v with q (..., L, E), k (..., S, E) and v (..., S, V).
    """
    result = out if isinstance(out, Tensor) else out[0]  # kernels return more than the result
    (*batch, length, _), keys, values = _sizes_of(result), _sizes_of(args[1]), _sizes_of(args[2])
    return prod(batch) * length * keys[-2] * (keys[-1] + values[-1])


def attention_by_token_macs(args: tuple[Any, ...], out: Any) -> int | None:
    """Count attention as :func:`attention_macs` does, with q (batch, L, heads, E).

    Return None for sequences that are laid end to end, because their shape does not tell their
    lengths.
    """
    if any(isinstance(offsets, Tensor) and offsets.dim() == 1 for offsets in args[3:6]):
        return None
    (batch, length, heads, _), keys, values = (
        _sizes_of(args[0]),
        _sizes_of(args[1]),
        _sizes_of(args[2]),
    )
    return batch * heads * length * keys[1] * (keys[-1] + values[-1])


def attention_module_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count ``nn.MultiheadAttention`` as one operation.

    Arguments: (query, key, value, width, heads, qkv weight, qkv bias, projection weight, ...).
    """
    (batch, length, width), keys = _sizes_of(args[0]), _sizes_of(args[1])[1]
    inputs = length + 2 * keys
    return batch * (
        inputs * width * width + 2 * length * keys * width + length * prod(_sizes_of(args[7]))
    )


def encoder_layer_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count ``nn.TransformerEncoderLayer`` as one operation.

    Arguments: (tokens, width, heads, qkv weight, qkv bias, projection weight, ...).
    """
    (batch, length, width), linear = _sizes_of(args[0]), (args[3], args[5], args[14], args[16])
    return (
        batch * length * (sum(prod(_sizes_of(weight)) for weight in linear) + 2 * length * width)
    )


def einsum_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count ``einsum`` pair by pair from the left, as ATen computes it.

    An axis that only one operand of a pair has, and that nothing later needs, is summed first.
    If the pair then shares a summed axis, the product costs one MAC for each combination of
    positions on all axes; otherwise the product is elementwise and costs nothing.
    """
    tensors = list(args[1])
    names, result = _einsum_axes(args[0].replace(" ", ""), [tensor.dim() for tensor in tensors])
    sizes: dict[Any, int] = {}
    for letters, tensor in zip(names, tensors, strict=True):
        for axis, size in zip(letters, tensor.shape, strict=True):
            if sizes.get(axis, 1) == 1:  # a size of 1 broadcasts
                sizes[axis] = size
    total, axes = 0, set(names[0])  # axes of the product so far
    for i, letters in enumerate(names[1:], start=2):
        needed = {*result, *(axis for later in names[i:] for axis in later)}
        summed = (axes & set(letters)) - needed
        axes = (axes | set(letters)) & (needed | summed)
        total += prod(sizes[axis] for axis in axes) if summed else 0
        axes -= summed
    return total


def _einsum_axes(equation: str, ranks: list[int]) -> tuple[list[list[Any]], list[Any]]:
    """Return the axes of the operands, and of the result.

    An axis is a letter, or -1, -2, ... for the axes of an ellipsis, from the last one.

    >>> _einsum_axes("b...i,ij->b...j", [4, 2])
    ([['b', -2, -1, 'i'], ['i', 'j']], ['b', -2, -1, 'j'])
    """

    def axes(term: str, count: int) -> list[Any]:
        """Return the axes of a term whose ellipsis stands for ``count`` axes."""
        before, dots, after = term.partition("...")
        return [*before, *(range(-count, 0) if dots else ()), *after]

    terms, arrow, result = equation.partition("->")
    operands = terms.split(",")
    hidden = [rank - len(t.replace("...", "")) for t, rank in zip(operands, ranks, strict=True)]
    if not arrow:  # the result has every axis that occurs once
        letters = terms.replace("...", "").replace(",", "")
        once = sorted(c for c in set(letters) if letters.count(c) == 1)
        result = ("..." if "..." in terms else "") + "".join(once)
    return [axes(t, n) for t, n in zip(operands, hidden, strict=True)], axes(result, max(hidden))


def recurrent_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count recurrent layers.

    Every step multiplies by every weight matrix of every layer and direction once; ``args[0]`` is
    (..., features).
    """
    # packed sequences have their batch sizes as the second argument
    weights = args[2] if isinstance(args[3], bool) else args[3]
    return _recurrent_macs(args[0], weights)


def _recurrent_macs(steps: Tensor, weights: Sequence[Tensor]) -> int:
    """Count a product of every step, (..., features), with every weight matrix."""
    matrices = [weight for weight in weights if weight.dim() == 2]
    return prod(_sizes_of(steps)[:-1]) * sum(prod(_sizes_of(matrix)) for matrix in matrices)


def recurrent_of_library_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count recurrent layers of cuDNN and MIOpen. Arguments: (input, weights, ...)."""
    return _recurrent_macs(args[0], args[1])


def recurrent_direction_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count one recurrent layer in one direction, as oneDNN runs it.

    Arguments: (input, weight of the input, weight of the hidden state, ...).
    """
    return prod(_sizes_of(args[0])[:-1]) * (prod(_sizes_of(args[1])) + prod(_sizes_of(args[2])))


def recurrent_cell_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count one recurrent step: the weight matrices of the input and of the hidden state."""
    return prod(_sizes_of(args[0])[:-1]) * (prod(_sizes_of(args[2])) + prod(_sizes_of(args[3])))


def matmul_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count (..., m, k) by (..., k, n): k MACs for each element of the result."""
    return prod(_sizes_of(out)) * _sizes_of(args[0])[-1]


def trilinear_macs(args: tuple[Any, ...], out: Any) -> int:
    """Count ``nn.Bilinear``: in1 x in2 MACs per output element; weight (1, out, in1, in2)."""
    return prod(_sizes_of(out)) * prod(_sizes_of(args[1])[-2:])
