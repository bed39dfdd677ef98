"""The proof: the emitted model equals the original with every removed parameter element set to
zero.

``structure`` emits again and compares graphs. ``runs`` runs both models on the same ``values`` and
holds the outputs against each other (``comparing``); the original runs as the user's own code, in
``copies``, under ``modes`` that take statistics over what survives (``statistics``) and give both
runs the same random numbers. Where it cannot be followed so, the traced ``graph`` stands for it.
``gradients`` says which parameters are reached, ``check`` which situations are tried.
"""

from fxprune.verification.check import Verification, check
from fxprune.verification.outcomes import LIMITS

__all__ = ["LIMITS", "Verification", "check"]
