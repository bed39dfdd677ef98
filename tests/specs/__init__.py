"""Random networks as printable data.

The output of a failing property can be pasted after ``from tests.specs import *``.
"""

from .network import Network, SpecModule, build, example
from .nodes import *  # noqa: F403
from .nodes import KINDS, Node, Signal, SpecError
from .strategy import networks

__all__ = [
    "KINDS",
    "Network",
    "Node",
    "Signal",
    "SpecError",
    "SpecModule",
    "build",
    "example",
    "networks",
]
__all__ += [kind.__name__ for kind in KINDS]
