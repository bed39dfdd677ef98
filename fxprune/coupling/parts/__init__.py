"""Labelling of models that cannot be traced whole: they run on data, and their parts are traced.

Python code that depends on data (proposals, matching, a loop over refinements) stays Python code.
The largest submodules that it calls and that can be traced are the *parts* of the model. Each part
is traced, pruned and emitted as a graph of its own.

Labels pass from part to part through the Python code in between, which cannot be rewritten. Some
of this code would be wrong for a smaller width: literal sizes, operations that distinguish
positions, statistics and means over channels, numbers computed from a width. Such code still sees
the original width: a part returns the axis with zeros at the removed positions, and a part that
receives it selects the positions that it still reads.
"""

from fxprune.coupling.parts.calls import intercepted
from fxprune.coupling.parts.exploring import Explored, decisions_of, explore
from fxprune.coupling.parts.parts import Parts
from fxprune.coupling.parts.python import PYTHON
from fxprune.coupling.parts.values import find_runnable

__all__ = [
    "PYTHON",
    "Explored",
    "Parts",
    "decisions_of",
    "explore",
    "find_runnable",
    "intercepted",
]
