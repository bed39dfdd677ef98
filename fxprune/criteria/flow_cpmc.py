"""CPMC by flow: its value is a property of the function that the network computes."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn

from fxprune.calibration import (
    Loader,
    LoaderBatch,
    batches_of,
    check_read,
    check_repeatable,
    device_of,
)
from fxprune.common.arrays import Floats
from fxprune.common.numbers import check_integer
from fxprune.common.public import public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.costs import DividingCosts, check_weights
from fxprune.criteria.cpmc import CPMC, share_left
from fxprune.criteria.flow import FlowWatcher
from fxprune.criteria.meter import watch_batch, watching
from fxprune.criteria.noise import EndlessRun, ending, noise_like
from fxprune.criteria.views import check_values, score_by_views
from fxprune.errors import FxpruneError, FxpruneWarning
from fxprune.inputs import batch_size, copied_to

__all__ = ["FlowCPMC"]


_NOISE_IS_WORTH = 256
"""As many samples of data count as much as the noise does."""


@public
@dataclass(frozen=True)
class FlowCPMC:
    r"""Importance by three criteria: weight value by what flows, computation and parameters.

    .. math::

       I(u) = \frac{V(u)}{r(u)} \frac{1}{C(u)^a P(u)^b}, \qquad
       V(u) = \sum_y \frac{1}{|y|} \sum_{o \in y}
              \frac{\mathrm{E}[(w_{o,u}^T x_u)^2]}{\mathrm{Var}(y_o)}

    The sum goes over all layers y that read the unit u. :math:`w_{o,u}` are the weights that lead
    from the unit to the output channel o, and :math:`x_u` is what they multiply: the unit's
    activation at all positions of the kernel. Mean square and variance go over samples and
    positions. So V is the share of the unit in what each next layer gives. Its own filters enter
    through its activation, the dependent weights of the next layers through what they make of it.
    C and P are the multiply-accumulates and the parameters that vanish with the unit, at the
    current widths. :math:`r(u)` is the share of its block that is left when all units of smaller
    V are gone, so that no group is emptied.

    V is a property of the function. If a layer's weights are scaled, channel by channel, and the
    next layers' inversely, V stays as it is; so groups compare globally, without a normalisation.
    Products of two activations (queries and keys) count by the mean squares of both.

    **Without data** the network runs on noise: normal numbers, or images whose spectrum and
    channels resemble those of photographs. Every batch normalisation then uses the statistics of
    its batch, because its running statistics belong to data that the noise does not look like.
    With ``data`` it runs as it is, and the two values are blended: n samples of data have the
    weight n, the noise has 256.

    Parameters
    ----------
    computation, parameters:
        The exponents a and b, at least 0. Fractions keep more of the costly layers.
    data:
        Batches ``(inputs, ...)`` that can be read repeatedly, or None. Labels are not read. Give
        some hundred samples from sources as varied as those that the network will see.
    seed:
        Seed of the noise, at least 0.

    Warns
    -----
    FxpruneWarning
        If the network cannot run on noise and there is no data: then the value is that of
        :class:`CPMC`, which reads weights alone.

    Raises
    ------
    ArgumentError
        If an exponent is negative or not finite, the seed is no whole number, or the loader gives
        no batches. When scoring: if the loader does not fit.

    Notes
    -----
    Weight dependency, the three aspects and the global ranking are those of Yan et al., "Channel
    Pruning via Multi-Criteria based on Weight Dependency", IJCNN 2021. The paper's value is the
    magnitude of the weights, and its costs are added (:class:`CPMC`); the flow and the quotient
    are fxprune's own.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 1, bias=False))
    >>> weights = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), torch.ones(1, 3)
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> pruned = fxprune.prune(net, torch.zeros(1, 2), channels=0.7, criterion=FlowCPMC())
    >>> pruned.plan.groups[0].kept
    (0, 1)
    >>> with torch.no_grad():  # the same function
    ...     _ = net[0].weight[2].mul_(100), net[1].weight[:, 2].div_(100)
    >>> again = fxprune.prune(net, torch.zeros(1, 2), channels=0.7, criterion=FlowCPMC())
    >>> again.plan.groups[0].kept
    (0, 1)
    """

    computation: float = 0.5
    parameters: float = 0.0
    data: Loader | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_weights(self, ("computation", "parameters"))
        object.__setattr__(self, "seed", check_integer("seed", self.seed, 0))
        if self.data is not None:
            check_repeatable(self.data)

    @property
    def costs(self) -> DividingCosts:
        """The cost terms, by which the selection divides the value."""
        return DividingCosts(self.computation, self.parameters)

    def with_data(self, data: Loader) -> FlowCPMC:
        """Return the same criterion with data, unless it has some."""
        return replace(self, data=data) if self.data is None else self

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Compute the value of each label.

        Returns
        -------
        Floats
            Values of shape (labels,), 0 for labels of no unit; none is negative.

        Raises
        ------
        ModelError, ArgumentError
            If ``coupling`` is not an analysis of ``model``, a parameter holds no finite values, or
            the loader does not fit.
        """
        check_coupling(coupling, model)
        check_values(coupling, model)  # infinite weights would give units that look worthless
        values = self._flow(coupling, model)
        if values is None:
            warnings.warn(
                "FlowCPMC: the model cannot run on noise, so units are ranked by their weights "
                "alone, as CPMC does. Give data= to measure what flows.",
                FxpruneWarning,
                stacklevel=2,
            )
            return score_by_views(coupling, model, lambda view: CPMC()(view).numpy())
        for group in coupling.groups:
            value = torch.from_numpy(values[group.units])
            values[group.units] = (value / share_left(value, coupling.blocks(group))).numpy()
        return values

    def _flow(self, coupling: Coupling, model: nn.Module) -> Floats | None:
        """Return the flow on noise, blended with that on data; shape (labels,).

        None if the model does not run on noise and there is no data.
        """
        noise = _flow_on_noise(coupling, model, self.seed)
        if self.data is None:
            return noise
        watcher = FlowWatcher(coupling, own_statistics=False)
        with watching(coupling, model) as filled:
            for batch in batches_of(self.data, model, coupling.example):
                watch_batch(watcher, coupling, filled, batch)
        check_read(watcher.samples)
        if noise is None:
            return watcher.total / watcher.samples
        total: Floats = watcher.total + _NOISE_IS_WORTH * noise
        return total / (watcher.samples + _NOISE_IS_WORTH)


def _flow_on_noise(coupling: Coupling, model: nn.Module, seed: int) -> Floats | None:
    """Return the flow on noise, shape (labels,); None if the model does not run on it."""
    device = device_of(model)
    for call in noise_like(coupling.inputs, seed):
        watcher = FlowWatcher(coupling, own_statistics=True)
        args, kwargs = copied_to(call, device)
        batch = LoaderBatch(args, kwargs, (), batch_size(call))
        try:
            limit = ending(coupling) if coupling.parts else nullcontext()
            with watching(coupling, model) as filled, limit:
                watch_batch(watcher, coupling, filled, batch)
        except (FxpruneError, EndlessRun):  # the model may take the sizes of the example only
            continue
        return watcher.total / watcher.samples
    return None
