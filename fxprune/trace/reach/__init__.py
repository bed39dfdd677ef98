"""The objects that a model's code can reach beside its arguments.

A run may change these objects, or draw random numbers from them. This package finds them,
compares them with an earlier state, and restores them.
"""

from fxprune.trace.reach.changes import REPEATED_CALLS, Entry, Reach
from fxprune.trace.reach.draws import restoring_draws, watching_draws
from fxprune.trace.reach.holders import MISSING, have_same_value
from fxprune.trace.reach.reached import Reached

__all__ = [
    "MISSING",
    "REPEATED_CALLS",
    "Entry",
    "Reach",
    "Reached",
    "have_same_value",
    "restoring_draws",
    "watching_draws",
]
