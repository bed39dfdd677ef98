"""Which channels are coupled: units, groups, balance partitions, and what is pinned and why.

The model runs once on labels (``labelling``); the result is read off (``reading``).
"""

from fxprune.coupling.labelling import Labelling, Terms
from fxprune.coupling.reading import couple
from fxprune.coupling.result import (
    KEPT,
    OUTPUT,
    Axis,
    Coupling,
    Group,
    Pinned,
    check_coupling,
)

__all__ = [
    "KEPT",
    "OUTPUT",
    "Axis",
    "Coupling",
    "Group",
    "Labelling",
    "Pinned",
    "Terms",
    "check_coupling",
    "couple",
]
