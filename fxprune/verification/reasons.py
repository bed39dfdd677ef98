"""Why models cannot be compared, and how they are compared all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from fxprune.common.contents import named_tensors
from fxprune.verification.bench import Bench
from fxprune.verification.outcomes import (
    PrunedFailsError,
    RefusedError,
    RoundingError,
)
from fxprune.verification.values import to_float32

__all__ = [
    "Comparison",
    "compare_in_some_dtype",
    "describe_conversion",
    "why_uncompared",
    "without_sizes",
]


Comparison: TypeAlias = Callable[..., Any]


def describe_conversion(model: nn.Module, pruned: nn.Module) -> str:
    """Return a text if the whole pruned model was moved to another dtype or device, else "".

    The example does not fit such a model.
    """
    old = {name: (tensor.dtype, tensor.device) for name, tensor in named_tensors(model).items()}
    pairs = set()
    for name, tensor in named_tensors(pruned).items():
        if name in old:
            pairs.add((old[name], (tensor.dtype, tensor.device)))
    if len({before for before, _ in pairs}) != len(pairs):
        return ""
    changed = ((before, after) for before, after in pairs if before != after)
    return "; ".join(f"{was[0]} on {was[1]} is {now[0]} on {now[1]} now" for was, now in changed)


def why_uncompared(failure: Exception | None) -> str:
    """Return a text that says why the models cannot be compared on the example."""
    if isinstance(failure, RoundingError):
        return (
            f"on values like the example's {failure}. Pass example_inputs on which it gives more."
        )
    if isinstance(failure, RefusedError):
        return (
            "the original itself fails on values like the example's, so that nothing can be "
            f"compared: {failure}. Pass example_inputs on which it runs."
        )
    return f"the pruned model fails where the original runs: {failure}."


def compare_in_some_dtype(compare: Comparison, bench: Bench, call: Any, **mode: Any) -> Any:
    """Compare in the bench's dtype, or in float32 if the pruned model fails in float64."""
    try:
        return compare(bench, call, **mode)
    except PrunedFailsError:
        if bench.dtype is not torch.float64:
            raise
        # The model may create float32 tensors whatever dtype is asked for.
        return compare(bench.in_float32(), to_float32(call), **mode)


def without_sizes(kind: str) -> tuple[str, int]:
    """Return the dtype and the number of commas of a text such as ``float32[2, 3]``.

    Two texts with the same result have the same dtype and, scalars aside, the same number of axes.
    """
    return kind.partition("[")[0], kind.count(",")
