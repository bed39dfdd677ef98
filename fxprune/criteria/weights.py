"""Criteria that read weights alone: pure functions from a group's units to scores, the larger the more important."""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.criteria.views import UnitView
from fxprune.errors import ArgumentError

__all__ = ["bn_scale", "fpgm", "l1", "l2", "lamp"]


def l1(view: UnitView) -> Tensor:
    r""":math:`\sum |w|` over all elements that vanish with a unit: own filter, bias, scales and dependent slices.

    Returns shape (units,). Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, there over the own filter alone.
    """
    return view.sum(torch.abs)


def l2(view: UnitView) -> Tensor:
    r""":math:`\sqrt{\sum w^2}` over all elements that vanish with a unit. Returns shape (units,).

    Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023 (group magnitude).
    """
    return view.sum(torch.square).sqrt()


def bn_scale(view: UnitView) -> Tensor:
    r""":math:`\sum |\gamma|` over the scales of the normalisations that a unit passes. Returns shape (units,).

    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.

    Raises
    ------
    ArgumentError
        If the group has no normalisation: nothing can be ranked.
    """
    found = view.sum(torch.abs, roles=("scale",))
    if not any(view.views.coupling.role(axis.parameter, axis.dim) == "scale" for axis in view.group.axes):
        raise ArgumentError(
            f"criterion 'bn_scale': group {view.group.name!r} has no normalisation with a scale. Pass its modules in keep=, or "
            "choose another criterion."
        )
    return found


def lamp(view: UnitView) -> Tensor:
    r""":math:`s_u / \sum_{v : s_v \ge s_u} s_v` with :math:`s_u = \sum w^2`: what a unit adds to all that are no smaller.

    Returns shape (units,), values in (0, 1]. Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021,
    eq. 3, with units in the place of single weights. Scores of different groups compare as they are.
    """
    squares = view.sum(torch.square)
    order = torch.argsort(squares, stable=True)
    ascending = squares[order]
    rest = ascending.flip(0).cumsum(0).flip(0)
    scores = torch.empty_like(squares)
    scores[order] = ascending / rest.clamp_min(torch.finfo(rest.dtype).tiny)
    return scores


def fpgm(view: UnitView) -> Tensor:
    r""":math:`\sum_v \lVert w_u - w_v \rVert_2` over the other units' own filters: a filter near the geometric median is redundant.

    Returns shape (units,). He et al., "Filter Pruning via Geometric Median", CVPR 2019, eq. 6. A group without filters of its own
    (all its units are read only) is compared by its dependent slices.
    """
    rows = view.rows(("own",))
    rows = rows if rows.shape[1] else view.rows()
    return torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
