"""Values that a graph can hold as constants, and errors for those that it cannot hold."""

from __future__ import annotations

import enum
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.errors import TraceError
from fxprune.trace.asks import device_question_message
from fxprune.trace.decisions import formula
from fxprune.trace.sequences import SizeTuple, TracedPieces
from fxprune.trace.user_code import UNKNOWN, user_line

__all__ = [
    "CONSTANTS",
    "MADE_FROM_INPUT",
    "SEQUENCES",
    "as_plain_constant",
    "cannot_hold_error",
    "refuse_device_questions",
]


MADE_FROM_INPUT = (
    "Make it from an input, with x.new_zeros(...) or device=x.device, so that the graph makes it "
    "at each call."
)


SEQUENCES = frozenset({tuple, list, torch.Size, SizeTuple, TracedPieces})


CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    torch.dtype,
    torch.layout,
    torch.memory_format,
    enum.Enum,
)


def cannot_hold_error(kind: type) -> TraceError:
    """Return the error for an object of a class that a graph cannot create."""
    line = user_line()
    if line == UNKNOWN:  # forward has returned
        return TraceError(
            f"forward gives back a {kind.__qualname__}, which a graph cannot make. Give back a "
            "tensor, or tensors in a tuple, a list, a dict or a dataclass, and make of them what "
            "you need outside of the model."
        )
    return TraceError(
        f"forward handles a {kind.__qualname__} (at {line}), which a graph cannot hold."
    )


def as_plain_constant(value: Any) -> Any:
    """Convert a constant to a form that the code of a graph can express.

    Numbers of NumPy and instances of subclasses of ``int``, ``float``, ``complex`` and ``str``
    become plain Python values. Any other value is returned as it is.
    """
    if isinstance(value, (np.longdouble, np.complexfloating)) and not isinstance(value, complex):
        value = float(value.real)  # as torch converts it
    elif isinstance(value, np.generic):
        value = value.item()
    kind: Any
    for kind in (int, float, complex, str):
        if (
            isinstance(value, kind)
            and type(value) is not kind
            and not isinstance(value, (bool, enum.Enum))
        ):
            return kind(value)
    # x.type(...) accepts a tensor type such as torch.FloatTensor, or its name
    return (
        f"{value.__module__}.{value.__name__}" if type(value) is type(torch.FloatTensor) else value
    )


def refuse_device_questions(node: fx.Node) -> None:
    """Refuse a node whose result depends on the device of a tensor.

    Such a node compares a tensor's device with a constant one, or is ``x.type()``, which names the
    device. Comparing the devices of two tensors is allowed: they are equal wherever the model is.

    Raises
    ------
    TraceError
    """
    names_type = (
        node.op == "call_method"
        and node.target == "type"
        and len(node.args) == 1
        and not node.kwargs
    )
    if names_type or _compares_with_constant_device(node):
        raise TraceError(device_question_message(formula(node)))


def _compares_with_constant_device(node: fx.Node) -> bool:
    """Tell whether a node compares the device of a tensor with a constant."""
    if node.target not in (operator.eq, operator.ne):
        return False
    is_device = [_is_device_node(arg) for arg in node.args]
    return any(is_device) and not all(is_device)


def _is_device_node(arg: Any) -> bool:
    return isinstance(arg, fx.Node) and isinstance(arg.meta["val"], torch.device)
