"""Criteria that read weights alone: pure functions from a group's units to scores, the larger the
more important.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxprune.common.public import public
from fxprune.criteria.views import UnitView, check_view
from fxprune.errors import ArgumentError

__all__ = ["bn_scale", "fpgm", "l1", "l2", "lamp", "share_of_the_rest"]


@public
def l1(view: UnitView) -> Tensor:
    r""":math:`\sum |w|` over all elements that vanish with a unit: own filter, bias, scales and
    dependent slices.

    Returns shape (units,), float64. Li et al., "Pruning Filters for Efficient ConvNets", ICLR
    2017, of the filter alone there.

    >>> import fxprune; from fxprune.criteria import Views
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1))
    >>> weights = {"0.weight": torch.tensor([[1., -2.], [0., 3.], [4., 4.]]),
    ...     "1.weight": torch.tensor([[1., -1., 0.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 2)), weights)
    >>> l1(view)
    tensor([4., 4., 8.], dtype=torch.float64)
    """
    check_view(view)
    return view.sum(torch.abs)


@public
def l2(view: UnitView) -> Tensor:
    r""":math:`\sqrt{\sum w^2}` over all elements that vanish with a unit.

    Returns shape (units,), float64. Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR
    2023 (group magnitude).

    >>> import fxprune; from fxprune.criteria import Views
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1))
    >>> weights = {"0.weight": torch.tensor([[2., -2.], [0., 3.], [0., 0.]]),
    ...     "1.weight": torch.tensor([[1., 4., 0.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 2)), weights)
    >>> l2(view)
    tensor([3., 5., 0.], dtype=torch.float64)
    """
    check_view(view)
    return view.sum(torch.square).sqrt()


@public
def bn_scale(view: UnitView) -> Tensor:
    r"""Mean :math:`|\gamma|` over the scales of the normalisations that a unit passes.

    Returns shape (units,), float64. Liu et al., "Learning Efficient Convolutional Networks through
    Network Slimming", ICCV 2017, where a channel has one scale. The mean over several (a residual
    stream has one per block) keeps groups comparable, as the paper ranks them: by their scales as
    they are, over the whole network.

    Raises
    ------
    ArgumentError
        If units of the group pass no normalisation with a scale: they cannot be ranked.

    Examples
    --------
    >>> import fxprune; from fxprune.criteria import Views
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3),
    ...     torch.nn.Linear(3, 1))
    >>> weights = {"1.weight": torch.tensor([1., -2., 0.5])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(2, 2)), weights)
    >>> bn_scale(view)
    tensor([1.0000, 2.0000, 0.5000], dtype=torch.float64)
    """
    check_view(view)
    passed = view.sum(torch.ones_like, roles=("scale",))
    if not bool((passed > 0).all()):
        raise ArgumentError(
            f"criterion 'bn_scale': group {view.group.name!r} has no normalisation with a scale "
            "for all of its units. Pass its modules in keep=, or choose another criterion."
        )
    return view.sum(torch.abs, roles=("scale",)) / passed


@public
def lamp(view: UnitView) -> Tensor:
    r""":math:`s_u / \sum_{v : s_v \ge s_u} s_v` with :math:`s_u = \sum w^2`: a unit's share of all
    that are no smaller.

    Returns shape (units,), float64, values in [0, 1]; equal units score equally. Lee et al.,
    "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, with units in the place
    of single weights. Scores of different groups compare as they are.

    >>> import fxprune; from fxprune.criteria import Views
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3, bias=False), torch.nn.Linear(3, 1))
    >>> weights = {"1.weight": torch.tensor([[2., 1., 2.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 1)), weights)
    >>> lamp(view)  # 4 / (4 + 4), 1 / (4 + 1 + 4), 4 / (4 + 4)
    tensor([0.5000, 0.1111, 0.5000], dtype=torch.float64)
    """
    check_view(view)
    return share_of_the_rest(view.sum(torch.square))


def share_of_the_rest(scores: Tensor) -> Tensor:
    r""":math:`s_u / \sum_{v : s_v \ge s_u} s_v`: what a unit is of all that is left when every
    smaller one has gone.

    ``scores`` has shape (units,), none negative.

    >>> share_of_the_rest(torch.tensor([4., 1., 4.]))
    tensor([0.5000, 0.1111, 0.5000])
    """
    ascending = scores.sort().values
    no_smaller = ascending.flip(0).cumsum(0).flip(0)[torch.searchsorted(ascending, scores)]
    return scores / no_smaller.clamp_min(torch.finfo(scores.dtype).tiny)


@public
def fpgm(view: UnitView) -> Tensor:
    r""":math:`\sum_v \lVert w_u - w_v \rVert_2` over the other units' own filters: a filter near
    the geometric median is redundant.

    Returns shape (units,), float64. He et al., "Filter Pruning via Geometric Median for Deep
    Convolutional Neural Networks Acceleration", CVPR 2019. In a group that is split (grouped
    convolutions, heads) v goes over the units of the same block, which alone can take the place of
    u. A group without filters of its own is compared by its dependent slices.

    >>> import fxprune; from fxprune.criteria import Views
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(),
    ...     torch.nn.Linear(3, 1))
    >>> weights = {"0.weight": torch.tensor([[0., 0.], [3., 4.], [3., 0.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 2)), weights)
    >>> fpgm(view)
    tensor([8., 9., 7.], dtype=torch.float64)
    """
    check_view(view)
    rows = view.rows(("own",))
    rows = rows if rows.shape[1] else view.rows()
    blocks, scores = view.blocks, rows.new_zeros(len(rows))
    for block in blocks.unique():
        members = (blocks == block).nonzero().flatten()
        scores[members] = _distances(rows[members]).sum(dim=1)
    return scores


def _distances(rows: Tensor) -> Tensor:
    """Euclidean distances between rows, shape (rows, rows); those below 1e-6 of the rows' own
    spread are 0.

    A matrix product is many times faster than differences, and in float64 good enough but for rows
    that are all but equal: where the squares cancel, only rounding is left. Rows of float32
    weights that differ by less are equal.
    """
    rows = rows - rows.mean(dim=0)
    squares = rows.square().sum(dim=1)
    both = squares[:, None] + squares
    apart = both - 2 * (rows @ rows.T)
    return torch.where(apart > 1e-12 * both, apart, 0.0).sqrt()
