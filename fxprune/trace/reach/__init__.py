"""The objects that a model's code can reach beside its arguments.

A run may change these objects, or draw random numbers from them. This package finds them,
compares them with an earlier state, and restores them.
"""

from fxprune.trace.reach.draws import restoring_draws, watching_draws
from fxprune.trace.reach.holders import MISSING, same
from fxprune.trace.reach.reached import Reached
from fxprune.trace.reach.walk import AGAIN, Entry, Reach

__all__ = [
    "AGAIN",
    "MISSING",
    "Entry",
    "Reach",
    "Reached",
    "restoring_draws",
    "same",
    "watching_draws",
]
