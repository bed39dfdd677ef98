"""What code can reach beside its arguments, what a run leaves there, whether it draws numbers."""

from fxprune.trace.reach.draws import drawing, undrawn_by
from fxprune.trace.reach.holders import MISSING, same
from fxprune.trace.reach.reached import Reached
from fxprune.trace.reach.walk import AGAIN, Entry, Reach

__all__ = ["AGAIN", "MISSING", "Entry", "Reach", "Reached", "drawing", "same", "undrawn_by"]
