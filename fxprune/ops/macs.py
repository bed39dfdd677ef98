"""How many multiply-accumulates one ATen operation takes: formulas, which read shapes alone.

**One MAC is one multiply-accumulate.** Only contractions have a formula (matrix products,
convolutions, attention, recurrent layers): additions, activations and normalisations cost memory
traffic, not MACs.

The table of operations has formulas for what people call (``conv2d``,
``scaled_dot_product_attention``) and for the kernels that one or another version of torch runs for
it on one or another device (``mkldnn_convolution``,
``_scaled_dot_product_flash_attention_for_cpu``). So a count never depends on what
:mod:`torch.utils.flop_counter` knows in the version at hand; the tests compare the two where both
know an operation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from torch import Tensor

from fxprune.ops.table import own_row

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
    """Multiply-accumulates of one ATen operation, or None where it has no formula.

    Meant for a ``TorchDispatchMode``: ``func``, ``args`` and ``kwargs`` are what
    ``__torch_dispatch__`` receives, ``out`` is what the operation returned. Only shapes are read.
    Operations that the table lacks are counted by the formula that was registered for them with
    :func:`torch.utils.flop_counter.register_flop_formula`, which counts a multiply and an add as
    two.

    Example:
        >>> import torch
        >>> a, b = torch.empty(3, 5), torch.empty(5, 7)
        >>> op_macs(torch.ops.aten.mm.default, (a, b), {}, a @ b) == 3 * 5 * 7
        True
        >>> op_macs(torch.ops.aten.relu.default, (a,), {}, a) is None
        True
    """
    own = own_row(func)
    if own is not None and own.macs is not None:
        return own.macs(args, out)
    registered = _registered().get(getattr(func, "overloadpacket", func))
    return None if registered is None else int(registered(*args, **kwargs, out_val=out)) // 2


def has_formula(func: Any) -> bool:
    """Whether :func:`op_macs` counts an operation."""
    own = own_row(func)
    formula = None if own is None else own.macs
    return formula is not None or getattr(func, "overloadpacket", func) in _registered()


def _registered() -> Mapping[Any, Callable[..., int]]:
    """Formulas that were registered with torch's counter. Who registers one has imported it;
    importing it loads Triton.
    """
    counter = sys.modules.get("torch.utils.flop_counter")
    return {} if counter is None else counter.flop_registry


def _sizes_of(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape)


def element_macs(index: int) -> Callable[[tuple[Any, ...], Any], int]:
    """One MAC per element of the argument at ``index``: matrix-vector and vector-vector
    products.
    """
    return lambda args, out: prod(_sizes_of(args[index]))


def per_output_macs(args: tuple[Any, ...], out: Any) -> int:
    """Linear layers and convolutions: each output element is a dot product with one row of the
    weight.
    """
    return prod(_sizes_of(out)) * prod(_sizes_of(args[1])[1:])


def per_input_macs(args: tuple[Any, ...], out: Any) -> int:
    """Transposed convolutions: each input element is spread over one row of the weight."""
    return prod(_sizes_of(args[0])) * prod(_sizes_of(args[1])[1:])


def matrices_macs(index: int) -> Callable[[tuple[Any, ...], Any], int]:
    """(..., m, k), the argument at ``index``, by (..., k, n), the one behind it: a matrix, or one
    for each batch.
    """
    return lambda args, out: prod(_sizes_of(args[index])) * _sizes_of(args[index + 1])[-1]


def convolution_macs(args: tuple[Any, ...], out: Any) -> int:
    """As torch's own entry takes it: the argument at 6 says whether it is transposed."""
    return per_input_macs(args, out) if args[6] else per_output_macs(args, out)


def conv_tbc_macs(args: tuple[Any, ...], out: Any) -> int:
    """Over (time, batch, channels) with a weight of (kernel, in, out)."""
    kernel, inputs, _ = _sizes_of(args[1])
    return prod(_sizes_of(out)) * kernel * inputs


def grouped_matrices_macs(args: tuple[Any, ...], out: Any) -> int:
    """Products of a mixture of experts: rows, columns or what is summed fall into groups, each in
    one.

    (m, k) by (groups, k, n), (groups, m, k) by (k, n), (m, k) by (k, n); or (groups, m, k) by
    (groups, k, n).
    """
    a, b = _sizes_of(args[0]), _sizes_of(args[1])
    return prod(a[-2:] if len(b) == 2 else a) * b[-1]


def attention_macs(args: tuple[Any, ...], out: Any) -> int:
    """softmax(q k^T) v with q (..., L, E), k (..., S, E), v (..., S, V): L x S x (E + V) for each
    head.
    """
    result = out if isinstance(out, Tensor) else out[0]  # kernels give more than the result
    (*batch, length, _), keys, values = _sizes_of(result), _sizes_of(args[1]), _sizes_of(args[2])
    return prod(batch) * length * keys[-2] * (keys[-1] + values[-1])


def attention_by_token_macs(args: tuple[Any, ...], out: Any) -> int | None:
    """As :func:`attention_macs` with q (batch, L, heads, E). Sequences that lie end to end have
    no length in their shape: None.
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
    """nn.MultiheadAttention in one operation: (query, key, value, width, heads, qkv weight, its
    bias, projection, ...).
    """
    (batch, length, width), keys = _sizes_of(args[0]), _sizes_of(args[1])[1]
    inputs = length + 2 * keys
    return batch * (
        inputs * width * width + 2 * length * keys * width + length * prod(_sizes_of(args[7]))
    )


def encoder_layer_macs(args: tuple[Any, ...], out: Any) -> int:
    """nn.TransformerEncoderLayer in one operation: (tokens, width, heads, qkv weight, its bias,
    projection, ...).
    """
    (batch, length, width), linear = _sizes_of(args[0]), (args[3], args[5], args[14], args[16])
    return (
        batch * length * (sum(prod(_sizes_of(weight)) for weight in linear) + 2 * length * width)
    )


def einsum_macs(args: tuple[Any, ...], out: Any) -> int:
    """Pair by pair, from the left, as ATen does it.

    What only one of the two has, and nothing later needs, is summed first; if they then share an
    axis that is summed, the product costs one MAC for each value of all axes together, else it is
    elementwise and none is counted.
    """
    tensors = list(args[1])
    names, result = _einsum_axes(args[0].replace(" ", ""), [tensor.dim() for tensor in tensors])
    sizes: dict[Any, int] = {}
    for own, tensor in zip(names, tensors, strict=True):
        for axis, size in zip(own, tensor.shape, strict=True):
            if sizes.get(axis, 1) == 1:  # a size of 1 broadcasts
                sizes[axis] = size
    total, held = 0, set(names[0])
    for i, own in enumerate(names[1:], start=2):
        needed = {*result, *(axis for later in names[i:] for axis in later)}
        summed = (held & set(own)) - needed
        held = (held | set(own)) & (needed | summed)
        total += prod(sizes[axis] for axis in held) if summed else 0
        held -= summed
    return total


def _einsum_axes(equation: str, ranks: list[int]) -> tuple[list[list[Any]], list[Any]]:
    """The axes of the operands and of the result: letters, and -1, -2, ... for those of an
    ellipsis, from the last.

    >>> _einsum_axes("b...i,ij->b...j", [4, 2])
    ([['b', -2, -1, 'i'], ['i', 'j']], ['b', -2, -1, 'j'])
    """

    def axes(term: str, more: int) -> list[Any]:
        before, dots, after = term.partition("...")
        return [*before, *(range(-more, 0) if dots else ()), *after]

    terms, arrow, result = equation.partition("->")
    more = [
        rank - len(term.replace("...", ""))
        for term, rank in zip(terms.split(","), ranks, strict=True)
    ]
    if not arrow:  # every axis that occurs once
        letters = terms.replace("...", "").replace(",", "")
        result = ("..." if "..." in terms else "") + "".join(
            sorted(c for c in set(letters) if letters.count(c) == 1)
        )
    return [axes(term, own) for term, own in zip(terms.split(","), more, strict=True)], axes(
        result, max(more)
    )


def recurrent_macs(args: tuple[Any, ...], out: Any) -> int:
    """Every step multiplies with every weight matrix of every layer and direction once; args[0] is
    (..., features).
    """
    # packed sequences have their batch sizes in front
    weights = args[2] if isinstance(args[3], bool) else args[3]
    return prod(_sizes_of(args[0])[:-1]) * sum(
        prod(_sizes_of(weight)) for weight in weights if weight.dim() == 2
    )


def recurrent_of_library_macs(args: tuple[Any, ...], out: Any) -> int:
    """As cuDNN and MIOpen take it: (input, weights, ...)."""
    return prod(_sizes_of(args[0])[:-1]) * sum(
        prod(_sizes_of(weight)) for weight in args[1] if weight.dim() == 2
    )


def recurrent_direction_macs(args: tuple[Any, ...], out: Any) -> int:
    """One layer in one direction, as oneDNN takes it: (input, weight of the input, weight of the
    hidden state, ...).
    """
    return prod(_sizes_of(args[0])[:-1]) * (prod(_sizes_of(args[1])) + prod(_sizes_of(args[2])))


def recurrent_cell_macs(args: tuple[Any, ...], out: Any) -> int:
    """One step: both weight matrices, of the input and of the hidden state."""
    return prod(_sizes_of(args[0])[:-1]) * (prod(_sizes_of(args[2])) + prod(_sizes_of(args[3])))


def matmul_macs(args: tuple[Any, ...], out: Any) -> int:
    """(..., m, k) by (..., k, n): k for each element of the result."""
    return prod(_sizes_of(out)) * _sizes_of(args[0])[-1]


def trilinear_macs(args: tuple[Any, ...], out: Any) -> int:
    """nn.Bilinear: for each row and output an in1 x in2 form; the weight is (1, out, in1, in2)."""
    return prod(_sizes_of(out)) * prod(_sizes_of(args[1])[-2:])
