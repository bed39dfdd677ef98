"""Hypothesis profiles, chosen with ``pytest --hypothesis-profile=NAME``.

Only ``tests/conftest.py`` imports this module: pytest reads it before it looks the name up.

``fast``
    What ``--fast`` runs.
``default``
    What everyone and CI run: a few hundred networks over all properties, the same ones each time.
``thorough``
    Five thousand networks for the property that matters most and a fifth of that for each of the
    others, new ones each time; a failure prints the blob that reproduces it.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

# An example traces, prunes and verifies a network of up to thirty layers: tens of milliseconds on
# a quiet machine and far more on a busy one. A deadline, or the health check on slow draws, would
# fail at random.
_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("fast", max_examples=10, derandomize=True, **_COMMON)
settings.register_profile("default", max_examples=150, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=5000, print_blob=True, **_COMMON)
settings.load_profile("default")
