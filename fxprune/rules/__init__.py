"""All knowledge of ATen ops: one small rule per op family, registered by name. Importing the
package fills the registry.
"""

from fxprune.labels import Field
from fxprune.rules import (
    contraction,
    convolution,
    creation,
    indexing,
    movement,
    normalisation,
    pointwise,
    recurrent,
    reduction,
    resampling,
)
from fxprune.rules.context import READS_INPUT, Context, Contraction, Event, Record, Sighting
from fxprune.rules.registry import REGISTRY, Rule, bind, find, register_rule

__all__ = [
    "READS_INPUT",
    "REGISTRY",
    "Context",
    "Contraction",
    "Event",
    "Field",
    "Record",
    "Rule",
    "Sighting",
    "bind",
    "contraction",
    "convolution",
    "creation",
    "find",
    "indexing",
    "movement",
    "normalisation",
    "pointwise",
    "recurrent",
    "reduction",
    "register_rule",
    "resampling",
]
