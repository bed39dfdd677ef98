"""The latency of models on the device at hand, next to the limits of the device.

``clock`` times callables in turns. ``roofline`` measures the peak rates of the device.
``measuring`` brings a model and its inputs into a precision, layout and mode, and times the model.

The other modules serve latency budgets: ``layers`` runs the operations of a model at other widths,
``table`` stores the times of single operations, ``surface`` interpolates between measured widths,
and ``forecast`` predicts the latency of a model from them. ``fxprune.latency_budget`` chooses by
the forecast, measures the result, and corrects the choice.
"""

from fxprune.latency.clock import Timing, time_in_turns
from fxprune.latency.measuring import Latency, measure
from fxprune.latency.roofline import Roofline, roofline
from fxprune.latency.setting import MODES, PRECISIONS, Setting

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
