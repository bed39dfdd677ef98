"""Analysis of which channels must be pruned together: units, groups, balanced blocks and pins.

``labelling`` runs the model on labels and unites labels that belong together. ``reading`` reads
the groups off the result.
"""

from fxprune.coupling.groups import Axis, Group, Pinned
from fxprune.coupling.labelling import Labelling, Terms
from fxprune.coupling.reading import couple
from fxprune.coupling.result import KEPT, OUTPUT, Coupling, check_coupling

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
