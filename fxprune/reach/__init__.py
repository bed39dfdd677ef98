"""What code can reach beside its arguments, what a run leaves there, whether it draws numbers."""

from fxprune.reach.draws import drawing, undrawn_by
from fxprune.reach.holders import MISSING, same
from fxprune.reach.reached import Reached
from fxprune.reach.walk import AGAIN, Entry, Reach

__all__ = ["AGAIN", "MISSING", "Entry", "Reach", "Reached", "drawing", "same", "undrawn_by"]
