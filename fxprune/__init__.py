"""fxprune: a compiled-graph structured pruner for PyTorch."""

from fxprune.api import Pruned, analyze, apply, prune, verify
from fxprune.coupling import Axis, Coupling, Group, Pinned
from fxprune.errors import (
    ArgumentError,
    FxpruneError,
    InputError,
    ModelError,
    PlanError,
    RewriteError,
    TraceError,
    VerificationError,
)
from fxprune.plan import GroupPlan, Plan
from fxprune.report import Report
from fxprune.verify import Verification

__version__ = "0.1.0"

__all__ = [
    "ArgumentError",
    "Axis",
    "Coupling",
    "FxpruneError",
    "Group",
    "GroupPlan",
    "InputError",
    "ModelError",
    "Pinned",
    "Plan",
    "PlanError",
    "Pruned",
    "Report",
    "RewriteError",
    "TraceError",
    "Verification",
    "VerificationError",
    "analyze",
    "apply",
    "prune",
    "verify",
]
