"""Closing the gates of the units that a plan removes."""

import numpy as np
import torch

import fxprune
from fxprune.training import Gates

REFUSED = ("lstm", "gru", "rnn", "recurrent", "conv_batch_norm_plain")
"""The beginnings of the names of cases in which gates cannot mask every unit."""


def close(gates: Gates, coupling: fxprune.Coupling, plan: fxprune.Plan) -> None:
    """Set the gates of all units that `plan` removes to 0."""
    kept = {group.name: list(group.kept) for group in plan.groups}
    removed = [np.delete(group.units, kept[group.name]) for group in coupling.groups]
    closed = np.isin(coupling.units, np.concatenate(removed))
    with torch.no_grad():
        gates.values[torch.from_numpy(closed)] = 0
