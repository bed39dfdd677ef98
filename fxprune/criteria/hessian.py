"""Criteria of the second order: how the loss curves where a unit is removed.

With a loss they estimate its Hessian. Without one they need no labels: they estimate the Fisher
information of the network's own outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fxprune.calibration import LoaderBatch
from fxprune.common.arrays import Floats
from fxprune.common.contents import tensors_of
from fxprune.common.numbers import check_integer
from fxprune.common.public import calling_user_code, public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.meter import unchanged
from fxprune.criteria.readers import (
    Loss,
    Reader,
    check_loss,
    each_output,
    gradients_of,
    loss_of,
    mean_over_samples,
    process_number,
    unit_products,
)
from fxprune.criteria.views import Views, at_least_float32
from fxprune.errors import ArgumentError

__all__ = ["OBDC", "HessianDiagonal"]

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _Curvature(Reader):
    """A criterion of the second order, with its loader, its loss and its probes."""

    loss: Loss | None = None
    probes: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss is not None:
            check_loss(self.loss)
        object.__setattr__(self, "probes", check_integer("probes", self.probes))
        object.__setattr__(self, "seed", check_integer("seed", self.seed, 0))

    def _scores(
        self,
        coupling: Coupling,
        model: nn.Module,
        of_hessian: Callable[[Tensors, Tensors], Iterator[Floats]],
        of_fisher: Callable[[Tensors], Floats],
    ) -> Floats:
        """Return half of the mean of what each batch and probe gives, shape (labels,).

        Parameters
        ----------
        coupling:
            The analysis.
        model:
            The model.
        of_hessian:
            Takes the weights and the gradients of a batch's loss, which can be differentiated
            again, and yields the estimate of each probe.
        of_fisher:
            Takes the gradients of one probe of the outputs and gives the estimate.
        """
        check_coupling(coupling, model)
        total, samples = np.zeros(coupling.context.units.count), 0
        # every process has its own samples, so that it needs its own probes of outputs
        generator = torch.Generator().manual_seed(self.seed + process_number())

        def visit(output: Any, batch: LoaderBatch, weights: Tensors) -> None:
            """Add the estimates of one batch to the total."""
            nonlocal total, samples
            samples += batch.size
            if self.loss is not None:
                loss = loss_of(self.loss, output, batch)
                gradients = gradients_of(loss, weights, create_graph=True)
                for estimate in of_hessian(weights, gradients):
                    total += batch.size * estimate
                return
            for _ in range(self.probes):
                probe = _probe_of_outputs(output, generator)
                total += of_fisher(gradients_of(probe, weights, retain_graph=True))

        # only this form of attention can be differentiated twice
        with sdpa_kernel(SDPBackend.MATH):
            each_output(model, self.loader, coupling.example, visit)
        return mean_over_samples(total, samples) / (2 * self.probes)


@public
@dataclass(frozen=True)
class HessianDiagonal(_Curvature):
    r"""Optimal Brain Damage, summed over a unit's elements.

    .. math:: \frac{1}{2} \sum_i h_{ii} w_i^2

    The sum goes over a unit's elements. With a loss, :math:`h` is the Hessian of the mean loss
    over all samples. Its diagonal is estimated with Hutchinson's method, :math:`h_{ii} \approx
    \mathrm{E}[v_i (H v)_i]`. The probes v are vectors of random signs, the same for all batches,
    so that the split into batches makes no difference. A score is negative where the loss curves
    downwards. With few probes, the sign of a small score is left to chance.

    Without a loss, labels are not read. :math:`h` is then the Fisher information of the network's
    own outputs, taken as means of Gaussians of variance 1: :math:`\sum_n J_n^T J_n / N`, where
    :math:`J_n` is the Jacobian of the outputs of sample n. This is the Gauss-Newton matrix of half
    the squared error. It is estimated by the squared gradients of the outputs' sum under random
    signs, :math:`\mathrm{E}[(J^T r)_i^2]`. Its scores are never negative.

    Parameters
    ----------
    loader:
        As for :class:`Taylor`.
    loss:
        ``loss(output, *targets)``, a mean over the batch that can be differentiated twice; or
        None.
    probes:
        Number of probes for each batch. The error of the estimate falls with the root of it.
    seed:
        Seed of the probes, at least 0.

    Raises
    ------
    ArgumentError
        As for :class:`Taylor`; also if ``probes`` or ``seed`` is not such a number, or if there is
        no loss and the model gives no differentiable output.
    CallbackError
        If an operation cannot be differentiated twice.

    Notes
    -----
    LeCun et al., "Optimal Brain Damage", NIPS 1989, for single weights. The estimator is that of
    Bekas et al., "An estimator for the diagonal of a matrix", Applied Numerical Mathematics 2007,
    as in Yao et al., "PyHessian", IEEE Big Data 2020.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., 3.]])
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = HessianDiagonal([(torch.tensor([[2.]]),)]).scores(coupling, net)
    >>> # by either factor of a product, the output's gradient times the factor is 2 and 12:
    >>> # (2 ** 2 + 2 ** 2) / 2 and (12 ** 2 + 12 ** 2) / 2
    >>> scores[coupling.groups[0].units].tolist()
    [4.0, 144.0]
    """

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Compute the score of each label.

        Returns
        -------
        Floats
            Scores of shape (labels,), 0 for labels of no unit.

        Raises
        ------
        ModelError, ArgumentError
            If ``coupling`` is not an analysis of ``model``, or the loader or the loss does not
            fit.
        """

        def of_hessian(weights: Tensors, gradients: Tensors) -> Iterator[Floats]:
            """Yield the sum of v w² (H v) over each unit's elements for each probe v."""
            generator = torch.Generator().manual_seed(self.seed)
            for _ in range(self.probes):
                signs = {name: _signs(weight, generator) for name, weight in weights.items()}
                found = {}
                for name, product in _hessian_product(gradients, weights, signs).items():
                    weight = at_least_float32(weights[name].detach())
                    found[name] = weight.square() * signs[name] * product
                yield Views(coupling, found).totals(unchanged)

        def of_fisher(gradients: Tensors) -> Floats:
            """Return the sum of (w g)² over each unit's elements."""
            parameters = dict(model.named_parameters())
            products = {name: parameters[name].detach() * g for name, g in gradients.items()}
            return Views(coupling, products).totals(torch.square)

        return self._scores(coupling, model, of_hessian, of_fisher)


@public
@dataclass(frozen=True)
class OBDC(_Curvature):
    r"""Optimal Brain Damage of whole units.

    .. math:: \frac{1}{2} \theta_u^T H_{uu} \theta_u

    :math:`\theta_u` are a unit's elements, and :math:`H_{uu}` is their block of the Hessian. So
    this is the second-order change of the loss when the whole unit is removed, while
    :class:`HessianDiagonal` leaves out that its elements act together.

    It is the second derivative of the loss by a mask on the unit's elements. Its diagonal is
    estimated as by :class:`HessianDiagonal`, with one random sign per unit. Without a loss it is
    half of what :class:`Fisher` is for a loss, for the network's own outputs.

    Parameters
    ----------
    loader, loss, probes, seed:
        As for :class:`HessianDiagonal`.

    Raises
    ------
    ArgumentError, CallbackError
        As for :class:`HessianDiagonal`.

    Notes
    -----
    This is C-OBD of Wang et al., "EigenDamage: Structured Pruning in the Kronecker-Factored
    Eigenbasis", ICML 2019. There the elements are those of a filter, and H is approximated by
    Kronecker factors of the Fisher information; here they are all coupled elements, and the
    estimate is without bias.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., 3.]])
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = OBDC([(torch.tensor([[2.]]),)]).scores(coupling, net)
    >>> # both factors of a product together: (2 + 2) ** 2 / 2 and (12 + 12) ** 2 / 2
    >>> scores[coupling.groups[0].units].tolist()
    [8.0, 288.0]
    """

    @public
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Compute the score of each label.

        Returns
        -------
        Floats
            Scores of shape (labels,), 0 for labels of no unit.

        Raises
        ------
        ModelError, ArgumentError
            If ``coupling`` is not an analysis of ``model``, or the loader or the loss does not
            fit.
        """

        def of_hessian(weights: Tensors, gradients: Tensors) -> Iterator[Floats]:
            """Yield z (θᵀ H v) of each unit for each probe z, where v is the sum of all z θ."""
            random = np.random.default_rng(self.seed)
            for _ in range(self.probes):
                signs = random.choice((-1.0, 1.0), coupling.context.units.count)
                signs[0] = 0.0  # label 0 is no unit
                direction = {}
                for name, weight in weights.items():
                    direction[name] = weight.detach() * _sum_at(coupling, name, signs, weight)
                products = _hessian_product(gradients, weights, direction)
                yield signs * unit_products(coupling, model, products)

        def of_fisher(gradients: Tensors) -> Floats:
            """Return the square of the sum of w g over each unit's elements."""
            return np.square(unit_products(coupling, model, gradients))

        return self._scores(coupling, model, of_hessian, of_fisher)


def _hessian_product(
    gradients: Mapping[str, Tensor], weights: Mapping[str, Tensor], direction: Tensors
) -> Tensors:
    """Return the product of the Hessian with a direction, by the name of each weight.

    Weights that the product does not depend on are left out: their part is 0.

    Parameters
    ----------
    gradients:
        The gradients of the loss, which can be differentiated again.
    weights:
        The weights.
    direction:
        The direction: one tensor of the shape of each weight.
    """
    parts = [(g * direction[name]).sum() for name, g in gradients.items() if g.requires_grad]
    if not parts:  # a loss that is linear in every weight
        return {}
    with calling_user_code("the second derivative of the loss"):
        products = torch.autograd.grad(
            sum(parts), list(weights.values()), allow_unused=True, retain_graph=True
        )
    found = {}
    for name, product in zip(weights, products, strict=True):
        if product is not None:
            found[name] = at_least_float32(product)
    return found


def _sum_at(coupling: Coupling, name: str, values: Floats, like: Tensor) -> Tensor:
    """Return for each element of a parameter the sum of the values of its units.

    Parameters
    ----------
    coupling:
        The analysis.
    name:
        The name of the parameter.
    values:
        A value for each label, shape (labels,).
    like:
        The parameter.
    """
    total = torch.zeros_like(like)
    for labels in coupling.parameter_labels(name) if name in coupling.parameters else ():
        total += torch.from_numpy(values[labels]).to(like.device, like.dtype)
    return total


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs of a tensor's shape, dtype and device."""
    signs = torch.randint(0, 2, like.shape, generator=generator) * 2 - 1
    return signs.to(like.device, like.dtype)


def _probe_of_outputs(output: Any, generator: torch.Generator) -> Tensor:
    """Return the sum of all outputs under random signs.

    Raises
    ------
    ArgumentError
        If no output has a gradient.
    """
    outputs = [t for t in tensors_of(output) if t.requires_grad and not t.is_complex()]
    if not outputs:
        raise ArgumentError(
            "the model gives no real output that depends on its weights through differentiable "
            "operations: give a loss."
        )
    return torch.stack([(t * _signs(t, generator)).sum() for t in outputs]).sum()
