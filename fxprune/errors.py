"""The exceptions of fxprune. Each message says what failed, where, and how to fix it.

>>> issubclass(TraceError, FxpruneError)
True
"""

from __future__ import annotations

__all__ = [
    "ArgumentError",
    "BudgetError",
    "CallbackError",
    "ChanceError",
    "ExportError",
    "FxpruneError",
    "FxpruneWarning",
    "InputError",
    "InternalError",
    "ModelError",
    "PlanError",
    "ResourceError",
    "RewriteError",
    "SignatureError",
    "TraceError",
    "VerificationError",
]


class FxpruneError(Exception):
    """The base class of all exceptions that fxprune raises."""


class FxpruneWarning(UserWarning):
    """A call did what it was asked to do, but the result is probably not what was wanted."""


class ArgumentError(FxpruneError, ValueError):
    """An argument has a value that is not allowed, ``channels=1.5`` for example."""


class SignatureError(ArgumentError, TypeError):
    """A public function was called with an unknown argument, or without a required one."""


class BudgetError(FxpruneError, ValueError):
    """A budget is smaller than what the smallest possible model needs.

    The analysis and the other arguments (``keep``, ``min_channels`` ...) decide how small that
    model can be.
    """


class InputError(FxpruneError, ValueError):
    """The example inputs do not fit the model: no tensor, or a shape that the model refuses.

    Attributes
    ----------
    line:
        The line of the model's code that failed; empty if the call itself does not fit.
    """

    def __init__(self, message: str, line: str = "") -> None:
        super().__init__(message)
        self.line = line


class ModelError(FxpruneError, ValueError):
    """The model itself cannot be pruned: it lies on two devices, or holds NaN, for example."""


class TraceError(FxpruneError):
    """The model's Python code cannot be turned into a graph; the message names the line."""


class ChanceError(TraceError):
    """The model's Python code depends on random numbers, a clock or an earlier call.

    Such code can take another path at each call, but a graph has only one.
    """


class PlanError(FxpruneError, ValueError):
    """A plan is damaged, or was made for another architecture."""


class RewriteError(FxpruneError):
    """The smaller graph could not be emitted; the message names the node.

    Attributes
    ----------
    node:
        The name of the fx node that failed. The analysis can be repeated with the channels of that
        node pinned. If the name ends with ``@`` and a number, only that axis of the node's first
        operand has to be pinned.
    axis:
        The axis on which it failed, if that is known.
    """

    def __init__(self, message: str, node: str = "", *, axis: int | None = None) -> None:
        super().__init__(message)
        self.node = node
        self.axis = axis


class CallbackError(FxpruneError):
    """Code of the caller (a factory, a loader, a loss, a criterion) raised an error.

    The message says where.
    """


class InternalError(FxpruneError):
    """An unexpected error: a bug in fxprune. The original error is its ``__cause__``."""


class ResourceError(FxpruneError):
    """Memory ran out."""


class ExportError(FxpruneError):
    """A model cannot be written in another format."""


class VerificationError(FxpruneError):
    """The emitted model does not compute what the masked original computes."""
