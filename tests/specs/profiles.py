"""Hypothesis profiles, chosen with ``pytest --hypothesis-profile=NAME``.

Only ``tests/conftest.py`` imports this module, because pytest reads that file before it looks up
the name.

``fast``
    The profile of ``--fast``.
``default``
    The profile that is used otherwise, also in CI: a few hundred networks over all properties,
    the same ones each time.
``thorough``
    Five thousand networks for the most important property and a fifth of that for each of the
    others, new ones each time. A failure prints the blob that reproduces it.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, settings

# An example traces, prunes and verifies a network of up to thirty layers. This takes tens of
# milliseconds on an idle machine and much longer on a busy one, so a deadline, or the health check
# for slow draws, would fail at random.
_COMMON: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("fast", max_examples=10, derandomize=True, **_COMMON)
settings.register_profile("default", max_examples=150, derandomize=True, **_COMMON)
settings.register_profile("thorough", max_examples=5000, print_blob=True, **_COMMON)
settings.load_profile("default")


def networks_drawn(divisor: int) -> settings:
    """Return the current profile with its number of examples divided by ``divisor``."""
    return settings(max_examples=max(1, settings.default.max_examples // divisor))
