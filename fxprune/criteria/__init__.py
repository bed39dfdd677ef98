"""Criteria: pure functions from a coupling and its tensors to one score per unit. The higher, the more important."""

from fxprune.criteria.magnitude import magnitude

__all__ = ["magnitude"]
