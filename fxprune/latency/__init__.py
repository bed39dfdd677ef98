"""How long models take, on the device at hand, and how far that is from the device's limits.

``clock`` times callables in turns, ``roofline`` measures what the device can do at best,
``measuring`` brings a model and its inputs into a precision, layout and mode and times it.

What a latency budget needs: ``table`` keeps what single operations take, ``layers`` runs the
operations of a model at other widths, ``surface`` interpolates between measured widths,
``forecast`` puts them together, ``search`` chooses, measures and corrects.
"""

from fxprune.latency.clock import Timing, time_in_turns
from fxprune.latency.measuring import MODES, PRECISIONS, Latency, Setting, measure
from fxprune.latency.roofline import Roofline, roofline

__all__ = [
    "MODES",
    "PRECISIONS",
    "Latency",
    "Roofline",
    "Setting",
    "Timing",
    "measure",
    "roofline",
    "time_in_turns",
]
