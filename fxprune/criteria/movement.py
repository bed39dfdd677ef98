"""Movement: how far training moves the weights of a unit away from zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fxprune.common.arrays import Floats
from fxprune.common.compiled import uncompiled
from fxprune.common.models import check_model
from fxprune.common.public import public
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.meter import RunningSum, unchanged
from fxprune.criteria.views import Views, at_least_float32
from fxprune.errors import ArgumentError

__all__ = ["Movement"]


@public
class Movement:
    r"""Movement of a unit's weights during training, towards zero or away from it.

    .. math:: - \sum_t \sum_w w^{(t)} \, \frac{\partial L}{\partial w}^{(t)}

    The sums go over the steps of training and over a unit's elements. A step against the gradient
    moves a weight away from zero if the product is negative. So units that training shrinks have
    the smallest scores, below 0.

    Call :meth:`update` after every backward pass, before the gradients are cleared. Then the
    object is a criterion for the model, with the weights that it has by then.

    Parameters
    ----------
    model:
        The model that is trained. Its parameters are read at each update. Of a model wrapped in
        ``DistributedDataParallel``, give the module inside the wrapper, ``ddp.module``: its
        gradients are those of all processes already.

    Raises
    ------
    ModelError
        If ``model`` is not a module that can be pruned.

    Notes
    -----
    Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", NeurIPS 2020, for single
    weights. The learning rate of the scores, a constant factor there, is 1 here. The paper masks
    weights while it trains; here the scores are read at the end. To prune repeatedly, call
    :func:`fxprune.prune` repeatedly, with a new object for each smaller model.
    :class:`fxprune.Steps` takes one criterion for all of its steps, so it cannot.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., -3.]])
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> movement = Movement(net)
    >>> net(torch.ones(1, 1)).sum().backward()
    >>> movement.update()
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> # the gradients are 1 and -3, 1 and 2: - (1 * 1 + 1 * 1) and - (2 * -3 + -3 * 2)
    >>> movement.scores(coupling, net)[coupling.groups[0].units].tolist()
    [-2.0, 12.0]
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = uncompiled(model)
        check_model(self.model)
        self._sums = RunningSum()

    @public
    @torch.no_grad()
    def update(self) -> None:
        """Add the movement of one step: minus each weight times its gradient.

        Raises
        ------
        ArgumentError
            If no parameter has a gradient, or a gradient holds infinity or NaN.
        """
        movements: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.grad is None or not parameter.is_floating_point():
                continue
            gradient = parameter.grad
            dense = gradient if gradient.layout is torch.strided else gradient.to_dense()
            if not bool(dense.isfinite().all()):
                raise ArgumentError(
                    f"the gradient of {name!r} holds infinity or NaN. With scaled gradients, call "
                    "scaler.unscale_(optimizer) before update(), and leave out the steps that the "
                    "scaler skips."
                )
            movements[name] = at_least_float32(parameter) * at_least_float32(dense)
        if not movements:
            raise ArgumentError(
                "no parameter of the model has a gradient: call update() after loss.backward() "
                "and before optimizer.zero_grad()."
            )
        self._sums.add(movements, -1.0)

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
            If ``coupling`` is not an analysis of ``model``, if the updates were those of another
            architecture, or if there were none.
        """
        check_coupling(coupling, model)
        sums = self._sums.tensors
        if not sums:
            raise ArgumentError(
                "Movement has no step to score by: call update() after each loss.backward()."
            )
        parameters = dict(model.named_parameters())
        for name, movement in sums.items():
            if name not in parameters or parameters[name].shape != movement.shape:
                raise ArgumentError(
                    f"the updates were those of another model: this {type(model).__name__} has no "
                    f"{name!r} of shape {tuple(movement.shape)}. Make a Movement for each model "
                    "that is trained."
                )
        return Views(coupling, sums).totals(unchanged)
