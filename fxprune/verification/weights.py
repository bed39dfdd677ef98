"""The comparison of the pruned model's own parameters and buffers with the original's."""

from __future__ import annotations

import torch
from torch import nn

from fxprune.common.contents import named_tensors
from fxprune.coupling import Coupling
from fxprune.rewrite import Survivors
from fxprune.verification.comparing import dense, relative_error

__all__ = ["changed"]


def changed(
    model: nn.Module, pruned: nn.Module, coupling: Coupling, survivors: Survivors
) -> dict[str, tuple[str, float]]:
    """Return the pruned model's tensors that are not what the plan leaves of the original's.

    A model that was converted to another dtype as a whole is compared in that dtype, so that the
    conversion is no difference.

    Returns
    -------
    dict
        By the tensor's name, a description of the difference and the relative error.
    """
    known = named_tensors(model)
    pairs = [
        (name, known[name], own)
        for name, own in named_tensors(pruned).items()
        if name in known and name in coupling.parameters
    ]
    dtypes = {(old.dtype, own.dtype) for _, old, own in pairs}
    whole = len({before for before, _ in dtypes}) == len(dtypes)
    found: dict[str, tuple[str, float]] = {}
    for name, old, own in pairs:
        if old.dtype is not own.dtype and not whole:
            found[name] = f"{name!r} is {own.dtype}, the original's {old.dtype}", 0.0
        elif not (old.is_meta or own.is_meta):
            labelled = coupling.parameters[name]
            wanted = dense(survivors.take(labelled, old.detach()) if labelled.is_meta else old).to(
                own.device, own.dtype
            )
            if not torch.equal(wanted, dense(own)) and (
                error := relative_error(dense(own), wanted)
            ):
                found[name] = (
                    f"{name!r} has other values than the plan leaves of the original's",
                    error,
                )
    return found
