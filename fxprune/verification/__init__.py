"""The proof that the emitted model equals the original with all removed elements at zero.

``structure`` emits the graph again and compares it with the given one. ``weights`` compares the
parameters with those that the plan leaves. ``runs`` runs ``copies`` of both models on the same
``values``, and ``bench`` compares what comes out (``comparing``, ``rounding``). The original runs
as the user's own code, under ``modes`` that take statistics over the surviving elements and give
both runs the same random numbers. If that code cannot be followed, the traced ``graph`` runs
instead. ``gradients`` compares gradients. ``check`` chooses the situations that are tried, and
``outcomes`` defines how a comparison can end.
"""

from fxprune.verification.check import check
from fxprune.verification.outcomes import LIMITS
from fxprune.verification.verification import Verification

__all__ = ["LIMITS", "Verification", "check"]
