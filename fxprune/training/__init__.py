"""Training that prepares a model for pruning, and repairs it afterwards.

Before: penalties on units (:class:`GroupSparsity`, :class:`BNScaleSparsity`,
:class:`GrowingRegularisation`), :class:`Gates`, and schedules of their strength. After:
:class:`Compensation` of what was removed.
"""

from fxprune.training.compensation import Compensation
from fxprune.training.gates import Gates
from fxprune.training.growing import GrowingRegularisation
from fxprune.training.schedules import (
    Constant,
    Cosine,
    Cubic,
    Geometric,
    Growing,
    Linear,
    Schedule,
)
from fxprune.training.sparsity import BNScaleSparsity, GroupSparsity

__all__ = [
    "BNScaleSparsity",
    "Compensation",
    "Constant",
    "Cosine",
    "Cubic",
    "Gates",
    "Geometric",
    "GroupSparsity",
    "Growing",
    "GrowingRegularisation",
    "Linear",
    "Schedule",
]
