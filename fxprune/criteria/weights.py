"""Criteria that read only weights.

Each is a pure function from a group's units to scores, the larger the more important.
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
    r"""Return :math:`\sum |w|` over all elements that vanish with each unit.

    These are the elements of its own filter, its bias, its scales, and its dependent slices.

    Parameters
    ----------
    view:
        The units of one group.

    Returns
    -------
    Tensor
        Scores of shape (units,), float64.

    Raises
    ------
    ArgumentError
        If ``view`` is not a :class:`~fxprune.criteria.UnitView`.

    Notes
    -----
    Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, sum over the filter alone.

    Examples
    --------
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
    r"""Return :math:`\sqrt{\sum w^2}` over all elements that vanish with each unit.

    Parameters
    ----------
    view:
        The units of one group.

    Returns
    -------
    Tensor
        Scores of shape (units,), float64.

    Raises
    ------
    ArgumentError
        If ``view`` is not a :class:`~fxprune.criteria.UnitView`.

    Notes
    -----
    This is the group magnitude of Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR
    2023.

    Examples
    --------
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
    r"""Return the mean :math:`|\gamma|` over the normalisation scales that each unit passes.

    Parameters
    ----------
    view:
        The units of one group.

    Returns
    -------
    Tensor
        Scores of shape (units,), float64.

    Raises
    ------
    ArgumentError
        If units of the group pass no normalisation with a scale, so they cannot be ranked; or if
        ``view`` is not a :class:`~fxprune.criteria.UnitView`.

    Notes
    -----
    Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    have one scale per channel. The mean over several scales (a residual stream has one per block)
    keeps groups comparable. As in the paper, scales are ranked unchanged over the whole network.

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
    r"""Return each unit's share of the squared weights of all units that are no smaller.

    .. math:: \mathrm{lamp}(u) = s_u \Big/ \sum_{v : s_v \ge s_u} s_v, \qquad s_u = \sum w^2

    Equal units score equally. Scores of different groups are comparable as they are.

    Parameters
    ----------
    view:
        The units of one group.

    Returns
    -------
    Tensor
        Scores in [0, 1], shape (units,), float64.

    Raises
    ------
    ArgumentError
        If ``view`` is not a :class:`~fxprune.criteria.UnitView`.

    Notes
    -----
    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, define this
    score for single weights; here it is defined for units.

    Examples
    --------
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
    r"""Return :math:`s_u / \sum_{v : s_v \ge s_u} s_v` for each score :math:`s_u`.

    This is the unit's share of everything that is left when all smaller units are gone.

    Parameters
    ----------
    scores:
        Scores of shape (units,), none negative.

    Returns
    -------
    Tensor
        Shares of shape (units,), of the dtype of ``scores``.

    Examples
    --------
    >>> share_of_the_rest(torch.tensor([4., 1., 4.]))
    tensor([0.5000, 0.1111, 0.5000])
    """
    ascending = scores.sort().values
    no_smaller = ascending.flip(0).cumsum(0).flip(0)[torch.searchsorted(ascending, scores)]
    return scores / no_smaller.clamp_min(torch.finfo(scores.dtype).tiny)


@public
def fpgm(view: UnitView) -> Tensor:
    r"""Return the sum of each filter's distances to the other units' own filters.

    .. math:: \mathrm{fpgm}(u) = \sum_v \lVert w_u - w_v \rVert_2

    A filter near the geometric median has a small sum and is redundant. In a group that is split
    into blocks (grouped convolutions, heads), v runs over the units of the same block, because
    only they can replace u. A group without filters of its own is compared by its dependent
    slices.

    Parameters
    ----------
    view:
        The units of one group.

    Returns
    -------
    Tensor
        Scores of shape (units,), float64.

    Raises
    ------
    ArgumentError
        If ``view`` is not a :class:`~fxprune.criteria.UnitView`.

    Notes
    -----
    He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks
    Acceleration", CVPR 2019.

    Examples
    --------
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
    """Return the Euclidean distances between rows, shape (rows, rows).

    A squared distance below 1e-12 of the rows' summed squared norms (about the mean row) becomes
    0. The distances come from a matrix product, which is many times faster than differences. In
    float64 it is accurate except for almost equal rows, where the squares cancel and only rounding
    is left. Rows of float32 weights that differ by less than this are equal.
    """
    rows = rows - rows.mean(dim=0)
    squares = rows.square().sum(dim=1)
    norms = squares[:, None] + squares
    distances = norms - 2 * (rows @ rows.T)
    return torch.where(distances > 1e-12 * norms, distances, 0.0).sqrt()
