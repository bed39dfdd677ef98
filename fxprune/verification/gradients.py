"""Which parameters get a gradient."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fxprune.contents import leaves
from fxprune.errors import VerificationError
from fxprune.verification.modes import InDtype, clone, seeded
from fxprune.verification.runs import Bench, GuardedError, PrunedFailsError, RefusedError, said
from fxprune.verification.values import Call

__all__ = ["check_gradients"]


def check_gradients(bench: Bench, call: Call, *, training: bool) -> int:
    """Run both models forward and backward; the number of parameters that get a gradient.

    Raises
    ------
    RefusedError, PrunedFailsError, GuardedError
    VerificationError
        If they are others in the pruned model; it names the first.
    """
    try:
        wanted = _reached(bench.original(training), bench, call)
    except Exception as error:
        raise RefusedError(said(error)) from error
    try:
        found = _reached(bench.smaller(training), bench, call)
    except AssertionError as error:
        raise (GuardedError if str(error) in bench.guards else PrunedFailsError)(said(error)) from error
    except Exception as error:
        raise PrunedFailsError(said(error)) from error
    for name in _in_order(bench.model, wanted ^ found):
        has, lacks = ("the original", "the pruned model") if name in wanted else ("the pruned model", "the original")
        raise VerificationError(f"{name!r} gets a gradient in {has}, and none in {lacks}{' in training mode' if training else ''}.")
    return len(found)


def _reached(model: nn.Module, bench: Bench, call: Call) -> set[str]:
    args, kwargs = clone(call)
    with seeded(bench.seed), torch.enable_grad(), InDtype(bench.dtype):
        found = [leaf for leaf in leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
        if found:
            torch.autograd.backward([leaf.abs().sum() if leaf.is_complex() else leaf.sum() for leaf in found])
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def _in_order(model: nn.Module, names: Iterable[str]) -> list[str]:
    order = {name: n for n, (name, _) in enumerate(model.named_parameters())}
    return sorted(names, key=lambda name: order.get(name, len(order)))
