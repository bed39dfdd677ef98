"""The exception tree: every error names what failed, where, and the way out.

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
    """Everything that fxprune raises; catch this to catch them all."""


class FxpruneWarning(UserWarning):
    """A call did what it was asked for, and the result is hardly what was meant."""


class ArgumentError(FxpruneError, ValueError):
    """An option is outside what it may be (``channels``, ``keep``, ``round_to``,
    ``min_channels``).
    """


class SignatureError(ArgumentError, TypeError):
    """A public function was called with an argument that it has not, or without one that it
    needs.
    """


class BudgetError(FxpruneError, ValueError):
    """A budget is below what the smallest model has that the analysis and the other arguments
    allow.
    """


class InputError(FxpruneError, ValueError):
    """The example inputs do not fit the model: no tensor, or a shape that the model refuses.

    ``line`` is the line of the model's code at which they do not; empty where the call itself does
    not fit.
    """

    def __init__(self, message: str, line: str = "") -> None:
        super().__init__(message)
        self.line = line


class ModelError(FxpruneError, ValueError):
    """The model itself cannot be pruned: on two devices, with NaN weights, already quantised."""


class TraceError(FxpruneError):
    """The model's Python code cannot be turned into a graph; the message names the line."""


class ChanceError(TraceError):
    """The model's Python code goes by random numbers: another way at each call, where a graph has
    one.
    """


class PlanError(FxpruneError, ValueError):
    """A plan is damaged, or was made for another architecture."""


class RewriteError(FxpruneError):
    """The smaller graph could not be emitted; the message names the node.

    ``node`` is the name of the fx node at which it failed: the analysis can be repeated with that
    node's channels pinned, or, where the name ends with ``@`` and a number, with that axis of its
    first operand pinned.
    """

    def __init__(self, message: str, node: str = "", *, axis: int | None = None) -> None:
        super().__init__(message)
        self.node = node
        self.axis = axis


class CallbackError(FxpruneError):
    """Code that the caller handed in (a factory, a loader, a loss, a criterion) raised something;
    the message says where.
    """


class InternalError(FxpruneError):
    """Something failed that nobody foresaw: a bug in fxprune. The error it came from is its
    cause.
    """


class ResourceError(FxpruneError):
    """Memory ran out."""


class ExportError(FxpruneError):
    """A model cannot be written in another format."""


class VerificationError(FxpruneError):
    """The emitted model does not compute what the masked original computes."""
