"""Blocks of drawn networks, by what they are about."""

from . import (  # noqa: F401  each enters its blocks into the tables
    attention,
    control,
    elementwise,
    ends,
    layers,
    movement,
    norms,
    places,
    recurrent,
    regions,
    scans,
    shapes,
    sharing,
    statistics,
)
from .registry import BLOCKS, OPTIONS, RESULTS, SOURCES, Block

__all__ = ["BLOCKS", "OPTIONS", "RESULTS", "SOURCES", "Block"]
