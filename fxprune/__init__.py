"""Structured pruning of PyTorch models that torch.fx can trace.

:func:`prune` removes the least important channels of a model and returns a smaller model.
:func:`analyze` shows which channels are coupled, and :func:`sensitivity` how narrow each group may
be. :func:`verify` proves a result, :func:`apply` replays a plan, and :func:`load` reads a saved
result.
"""

from fxprune import criteria, training
from fxprune.api import analyze, apply, load, prune
from fxprune.api_pruned import compensate, verify
from fxprune.api_sensitivity import sensitivity
from fxprune.coupling import Axis, Coupling, Group, Pinned
from fxprune.errors import (
    ArgumentError,
    BudgetError,
    CallbackError,
    ChanceError,
    ExportError,
    FxpruneError,
    FxpruneWarning,
    InputError,
    InternalError,
    ModelError,
    PlanError,
    ResourceError,
    RewriteError,
    SignatureError,
    TraceError,
    VerificationError,
)
from fxprune.evaluation import Search, Sensitivity, SensitivityPoint
from fxprune.inference import deploy
from fxprune.ops import register_rule
from fxprune.result.plan import GroupPlan, Plan
from fxprune.result.pruned import Pruned
from fxprune.result.report import Report
from fxprune.runtimes import export
from fxprune.steps import Steps
from fxprune.training.compensation import Compensation
from fxprune.training.sparsity import GroupSparsity
from fxprune.verification import Verification
from fxprune.version import __version__

__all__ = [
    "ArgumentError",
    "Axis",
    "BudgetError",
    "CallbackError",
    "ChanceError",
    "Compensation",
    "Coupling",
    "ExportError",
    "FxpruneError",
    "FxpruneWarning",
    "Group",
    "GroupPlan",
    "GroupSparsity",
    "InputError",
    "InternalError",
    "ModelError",
    "Pinned",
    "Plan",
    "PlanError",
    "Pruned",
    "Report",
    "ResourceError",
    "RewriteError",
    "Search",
    "Sensitivity",
    "SensitivityPoint",
    "SignatureError",
    "Steps",
    "TraceError",
    "Verification",
    "VerificationError",
    "__version__",
    "analyze",
    "apply",
    "compensate",
    "criteria",
    "deploy",
    "export",
    "load",
    "prune",
    "register_rule",
    "sensitivity",
    "training",
    "verify",
]
