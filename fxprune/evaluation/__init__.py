"""Choices that are measured: scores that the caller's own function gives to pruned models.

* ``scoring`` calls the function, ``cache`` keeps its scores on disk.
* ``points`` measures how sensitive each group is; ``sensitivity`` and ``plotting`` show it.
* ``candidates`` draws widths, ``search`` keeps those of the best score.
"""

from fxprune.evaluation.scoring import Score, Search
from fxprune.evaluation.sensitivity import Sensitivity, SensitivityPoint

__all__ = ["Score", "Search", "Sensitivity", "SensitivityPoint"]
