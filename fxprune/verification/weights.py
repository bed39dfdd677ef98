"""The comparison of the pruned model's own parameters and buffers with the original's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.common.contents import named_tensors
from fxprune.coupling import Coupling
from fxprune.rewrite import Survivors
from fxprune.verification.comparing import dense, relative_error

__all__ = ["changed_tensors"]


def changed_tensors(
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
    pairs = _common_tensors(model, pruned, coupling)
    dtypes = {(old.dtype, new.dtype) for old, new in pairs.values()}
    is_converted_whole = len({before for before, _ in dtypes}) == len(dtypes)
    found: dict[str, tuple[str, float]] = {}
    for name, (old, new) in pairs.items():
        if old.dtype is not new.dtype and not is_converted_whole:
            found[name] = f"{name!r} is {new.dtype}, the original's {old.dtype}", 0.0
        elif not (old.is_meta or new.is_meta):
            labelled = coupling.parameters[name]
            kept = survivors.take(labelled, old.detach()) if labelled.is_meta else old
            error = _relative_error(new, kept)
            if error:
                text = f"{name!r} has other values than the plan leaves of the original's"
                found[name] = text, error
    return found


def _common_tensors(
    model: nn.Module, pruned: nn.Module, coupling: Coupling
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the tensors of both models for each name that they and the analysis share."""
    known = named_tensors(model)
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, new in named_tensors(pruned).items():
        if name in known and name in coupling.parameters:
            pairs[name] = known[name], new
    return pairs


def _relative_error(new: Tensor, kept: Tensor) -> float:
    found, wanted = dense(new), dense(kept).to(new.device, new.dtype)
    return 0.0 if torch.equal(wanted, found) else relative_error(found, wanted)
