"""Models that cannot be traced whole: run for real, under labels, and what they call is traced.

Python that depends on data (proposals, matching, a loop over refinements) stays Python. Every
module that it calls on tensors alone is a *part*: traced, pruned and emitted as a graph of its
own. Labels pass from part to part through the Python in between, which cannot be rewritten. Where
that depends on a width in a way that would be wrong for a smaller one (literal sizes, positions
told apart, statistics and means over channels, numbers computed from a width), it goes on seeing
the width that was: parts hand such an axis out with zeros in the places of what is gone, and take
from it what they still read.
"""

from fxprune.coupling.parts.calls import intercepted
from fxprune.coupling.parts.exploring import Explored, decisions_of, explore
from fxprune.coupling.parts.parts import Parts
from fxprune.coupling.parts.python import PYTHON
from fxprune.coupling.parts.values import runnable

__all__ = ["PYTHON", "Explored", "Parts", "decisions_of", "explore", "intercepted", "runnable"]
