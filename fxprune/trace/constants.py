"""What a graph can hold as it is, and what it cannot."""

from __future__ import annotations

import enum
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from fxprune.errors import TraceError
from fxprune.trace.asks import asks_device
from fxprune.trace.decisions import formula
from fxprune.trace.sequences import SizeTuple, TracedPieces
from fxprune.trace.user_code import UNKNOWN, user_line

__all__ = [
    "CONSTANTS",
    "MADE_FROM_INPUT",
    "SEQUENCES",
    "cannot_hold",
    "in_words_of_code",
    "refuse_to_tell_devices",
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


def cannot_hold(kind: type) -> TraceError:
    """Said of an object of a class that a graph cannot make."""
    line = user_line()
    if line == UNKNOWN:  # forward has come to its end
        return TraceError(
            f"forward gives back a {kind.__qualname__}, which a graph cannot make. Give back a "
            "tensor, or tensors in a tuple, a list, a dict or a dataclass, and make of them what "
            "you need outside of the model."
        )
    return TraceError(
        f"forward handles a {kind.__qualname__} (at {line}), which a graph cannot hold."
    )


def in_words_of_code(value: Any) -> Any:
    """A constant as the code of a graph can hold it: NumPy's numbers, and those of classes of
    their own, are Python's.
    """
    if isinstance(value, (np.longdouble, np.complexfloating)) and not isinstance(value, complex):
        value = float(value.real)  # as torch takes it
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
    # x.type(...) takes either
    return (
        f"{value.__module__}.{value.__name__}" if type(value) is type(torch.FloatTensor) else value
    )


def refuse_to_tell_devices(node: fx.Node) -> None:
    """From one that is written down, that is: two tensors lie on the same one wherever the model
    is. ``x.type()`` names it, too.
    """
    of_tensors = [
        isinstance(arg, fx.Node) and isinstance(arg.meta["val"], torch.device) for arg in node.args
    ]
    compares = (
        node.target in (operator.eq, operator.ne) and any(of_tensors) and not all(of_tensors)
    )
    if compares or (
        node.op == "call_method"
        and node.target == "type"
        and len(node.args) == 1
        and not node.kwargs
    ):
        raise TraceError(asks_device(formula(node)))
