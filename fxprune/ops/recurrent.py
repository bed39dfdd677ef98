"""Recurrent layers.

A hidden unit has a row in every gate, and a column that reads it at the next step. The rows of all
gates lie on one axis of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fxprune.labels import Array, Field
from fxprune.ops import macs
from fxprune.ops.context import Context
from fxprune.ops.convolution import channel_fields
from fxprune.ops.records import Operand, place
from fxprune.ops.table import computes, row

_STEPS_REASON = "is an axis of positions that a recurrent layer steps over"
_NOT_ZERO_REASON = (
    "is a hidden unit that does not start at zero, or does not stay there, where it is removed"
)


@computes(
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
    in_order=False,
    macs=macs.recurrent_macs,
)
def recurrent(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Unite the hidden units of all layers and directions, which share one initial state.

    A removed unit starts at zero and stays there: its gates get no input, so all that is ever
    added to it is tanh(0).
    """
    x, weights = a["data"] if "data" in a else a["input"], list(a["params"])
    directions = 2 if a["bidirectional"] else 1
    output, units, zero = _units(ctx, a["hx"])
    incoming = channel_fields(ctx, x, x.dim() - 1, _STEPS_REASON)
    count = len(weights) // (a["num_layers"] * directions)  # weights of a layer and direction
    for start in range(0, len(weights), count):
        if start >= count * directions:
            incoming = [Field(np.tile(output, directions), zero)]
        layer = weights[start : start + count]
        _step(ctx, incoming, output, units, zero, layer[:2], layer[2:4] if a["has_biases"] else ())
        if output is not units:
            _meet(ctx, output, _product_fields(ctx, [Field(units, zero)], layer[-1]))
    for result, labels in zip(out, (np.tile(output, directions), output, units), strict=False):
        _put_last(ctx, result, labels, zero)


@computes("_pack_padded_sequence", "_pad_packed_sequence", in_order=False)
def packed(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Keep the labels of the features, which stay on the last axis.

    The steps of several sequences are concatenated, or padded to one length.
    """
    x, padding = (a["input"], 0) if "input" in a else (a["data"], a["padding_value"])
    fields = channel_fields(ctx, x, x.dim() - 1, _STEPS_REASON)
    rank = out[0].dim()
    placed = [Field(place(f.labels, (rank - 1,), rank), f.zero and padding == 0) for f in fields]
    ctx.put(out[0], placed)


@computes(
    "lstm_cell",
    "gru_cell",
    "rnn_tanh_cell",
    "rnn_relu_cell",
    in_order=False,
    macs=macs.recurrent_cell_macs,
)
def recurrent_cell(ctx: Context, func: Any, a: dict[str, Any], out: Any) -> None:
    """Merge the labels of one step of a recurrent layer."""
    x = a["input"]
    output, units, zero = _units(ctx, a["hx"])
    incoming = channel_fields(ctx, x, x.dim() - 1, _STEPS_REASON)
    biases = [b for b in (a["b_ih"], a["b_hh"]) if b is not None]
    _step(ctx, incoming, output, units, zero, [a["w_ih"], a["w_hh"]], biases)
    for state in [out] if isinstance(out, Tensor) else out:
        _put_last(ctx, state, units, zero)


def _units(ctx: Context, hx: Tensor | Sequence[Tensor]) -> tuple[Array, Array, bool]:
    """Return new labels of the output and of the hidden units, united with the initial states.

    The output is what the next step and the next layer read. It has the labels of the hidden
    units, unless an LSTM projects them. The third item says whether a removed unit starts at zero.
    """
    states = [hx] if isinstance(hx, Tensor) else list(hx)
    sizes = [state.shape[-1] for state in (states[0], states[-1])]
    units = ctx.units.fresh(sizes[1], -1)
    output = units if sizes[0] == sizes[1] else ctx.units.fresh(sizes[0], -1)
    zero = True
    for state, labels in zip(states, (output, units), strict=False):
        fields = channel_fields(ctx, state, state.dim() - 1, "is an axis of layers or of a batch")
        _meet(ctx, labels, fields)
        zero = zero and all(f.zero for f in fields)
    for labels in (output, units):
        if not zero:
            ctx.pin(labels, _NOT_ZERO_REASON)
        elif labels.size == 1:
            ctx.pin(labels, "its removal would empty a tensor")
    return output, units, zero


def _step(
    ctx: Context,
    incoming: list[Field],
    output: Array,
    units: Array,
    zero: bool,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
) -> None:
    """Merge the gates of one step: products with the input and the last output, and biases."""
    gates = np.tile(units, weights[0].shape[0] // len(units))
    for fields, weight in zip((incoming, [Field(output, zero)]), weights, strict=True):
        product = _product_fields(ctx, fields, weight)
        _meet(ctx, gates, product)
        ctx.pin_all([f for f in product if not f.zero], _NOT_ZERO_REASON)
    for bias in biases:
        met = ctx.merge([Operand([Field(gates, True)], {0}, {}), ctx.operand(bias, (0,), 1)], 1)
        for m in met:
            if not m.zero.get(1, True):
                ctx.pin(m.labels, _NOT_ZERO_REASON)


def _product_fields(ctx: Context, fields: list[Field], weight: Tensor) -> list[Field]:
    """Return the fields of a vector times the transposed weight (outputs, inputs)."""
    vector = Operand([Field(f.labels.reshape(1, -1), f.zero) for f in fields], {1}, {})
    found = ctx.contract([vector, ctx.operand(weight, (0, 1), 2)], 2, {1})
    return [Field(f.labels.reshape(-1), f.zero) for f in found]


def _meet(ctx: Context, labels: Array, fields: list[Field]) -> None:
    """Unite labels of one axis with a vector's fields, position by position."""
    ctx.merge([Operand([Field(labels, True)], {0}, {}), Operand(fields, {0}, {})], 1)


def _put_last(ctx: Context, out: Tensor, labels: Array, zero: bool) -> None:
    """Set the labels of a result along its last dimension."""
    if labels.size > 1:
        ctx.put(out, [Field(place(labels, (out.dim() - 1,), out.dim()), zero)])


# Kernels that versions of torch run for these ops.
row("_cudnn_rnn", "miopen_rnn", macs=macs.recurrent_of_library_macs)
row("mkldnn_rnn_layer", macs=macs.recurrent_direction_macs)
