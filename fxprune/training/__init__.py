"""Training that prepares a model for pruning, and repairs it afterwards.

Before: penalties on units (:class:`GroupSparsity`, :class:`BNScaleSparsity`,
:class:`GrowingRegularisation`), gates (:class:`Gates`, :class:`HardConcreteGates`), and schedules
of their strength. After: :class:`Compensation` of what was removed, and :class:`Distillation` from
the dense model.
"""

from fxprune.training.compensation import Compensation
from fxprune.training.distillation import Distillation, soft_target_loss
from fxprune.training.gates import Gates, HardConcreteGates
from fxprune.training.growing import GrowingRegularisation
from fxprune.training.penalty import Penalty
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
    "Distillation",
    "Gates",
    "Geometric",
    "GroupSparsity",
    "Growing",
    "GrowingRegularisation",
    "HardConcreteGates",
    "Linear",
    "Penalty",
    "Schedule",
    "soft_target_loss",
]
