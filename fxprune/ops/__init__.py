"""The table of ATen operations, with one row per op.

Importing the package fills the table.
"""

from importlib import import_module

from fxprune.labels import Field
from fxprune.ops.context import Context
from fxprune.ops.records import READS_INPUT, Contraction, Event, Record, Rectangle
from fxprune.ops.registration import register_rule
from fxprune.ops.table import (
    OPS,
    Axes,
    Kind,
    Op,
    Trait,
    bind,
    exact_row,
    find_row,
    has_trait,
    name_of_op,
    row_or_empty,
    takes_sizes,
)

FAMILIES = (
    "contraction",
    "convolution",
    "creation",
    "cutting",
    "indexing",
    "joining",
    "movement",
    "normalisation",
    "pointwise",
    "recurrent",
    "reduction",
    "resampling",
    "reshaping",
)
"""The modules that write the rows of the table."""

for _family in FAMILIES:
    import_module(f"{__name__}.{_family}")

__all__ = [
    "FAMILIES",
    "OPS",
    "READS_INPUT",
    "Axes",
    "Context",
    "Contraction",
    "Event",
    "Field",
    "Kind",
    "Op",
    "Record",
    "Rectangle",
    "Trait",
    "bind",
    "exact_row",
    "find_row",
    "has_trait",
    "name_of_op",
    "register_rule",
    "row_or_empty",
    "takes_sizes",
]
