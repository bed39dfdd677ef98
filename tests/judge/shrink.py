"""Find a smaller network that fails in the same way as a given one."""

from __future__ import annotations

from collections.abc import Callable

from .spec import Spec
from .verdict import Verdict, judge


def shrunk(spec: Spec, judge: Callable[[Spec], Verdict] = judge) -> Spec:
    """Drop blocks one by one while the network fails in the same setting.

    Return the smallest network found.
    """
    fault = _fault(judge(spec))
    smaller: Spec | None = spec
    while smaller is not None:
        spec = smaller
        smaller = next((s for s in spec.without_one() if _fault(judge(s)) == fault), None)
    return spec


def _fault(verdict: Verdict) -> tuple[str, str]:
    """Return the outcome, and the setting or the kind of error."""
    return verdict.outcome, verdict.what.split(":")[0]
