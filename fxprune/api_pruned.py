"""What a user calls with a pruned model: its proof, and its compensation on data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from fxprune.calibration import check_loader
from fxprune.common.compiled import uncompiled
from fxprune.common.models import check_model
from fxprune.common.numbers import check_bool, check_integer
from fxprune.common.public import public, short_repr
from fxprune.criteria.ridge import check_ridge
from fxprune.errors import ArgumentError
from fxprune.inputs import ExampleInputs, read
from fxprune.options import check_pruned
from fxprune.pipeline import proofs
from fxprune.result.plan import Plan
from fxprune.result.pruned import Pruned
from fxprune.rewrite import Survivors
from fxprune.stages import replay, stages_of
from fxprune.training.compensation import Compensation
from fxprune.training.methods import compensate_by, read_methods
from fxprune.verification import Verification

__all__ = ["compensate", "verify"]


@public
def verify(
    model: nn.Module,
    pruned: Pruned,
    example_inputs: ExampleInputs | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    randomize: bool = True,
    seed: int = 0,
    numeric: bool = True,
) -> Verification:
    """Prove that a pruned model computes what the original computes with removed channels at zero.

    There are two checks. First, the graph is emitted again with labels: every surviving element
    must carry its old label, and two labels that were separate must not meet. Second, both models
    run in ``dtype`` and their outputs are compared. The original runs as its own code, hooks
    included. Both runs draw the same random numbers.

    The second check compares the outputs for the example, for another batch, for other sizes that
    the original accepts, and in training mode without dropout. It also compares which parameters
    get a gradient, and the shapes and dtypes of the outputs for the unchanged example. A model
    with an operation that does not support float64 is compared in float32.

    Parameters
    ----------
    model:
        The original model. If the pruned model was pruned several times, this may also be the
        result of any earlier stage.
    pruned:
        The result of :func:`prune`, :func:`apply` or :func:`load`.
    example_inputs:
        The arguments of the model, as for :func:`prune`. With ``randomize`` only their integer and
        boolean tensors are used as they are. By default the inputs that the plan holds are used.
    dtype:
        The floating-point type in which both models run.
    randomize:
        If True, draw all parameters, buffers and floating-point inputs at random (variances are
        positive). Zeros in a fresh model then cannot hide an error, and a model that was trained
        after pruning can be proved too; ``left_out`` says that its own weights differ. If False,
        use the models' own values, and also compare the weights that no output depends on.
    seed:
        The seed for the random values.
    numeric:
        If False, only the first check is made.

    Returns
    -------
    Verification
        ``error`` is the relative error ``||out - reference|| / ||reference||``, the largest over
        all outputs and situations. ``compared`` lists the situations that were compared,
        ``left_out`` those that could not be, with the reasons.

    Raises
    ------
    VerificationError
        If the structures differ; if nothing can be compared, because no output is a finite tensor
        or the original itself fails; if the pruned model fails where the original runs; or if the
        models differ in any situation other than the example's sizes. For the example's sizes the
        error is returned, not raised.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> x = torch.zeros(1, 3, 8, 8)
    >>> fxprune.verify(net, fxprune.prune(net, x, channels=0.5), x).error < 1e-9
    True
    """
    options: dict[str, Any] = {
        "dtype": _checked_dtype(dtype),
        "randomize": check_bool("randomize", randomize),
        "seed": check_integer("seed", seed, 0) % 2**63,
        "numeric": check_bool("numeric", numeric),
    }
    check_pruned(pruned, "verify")
    model = uncompiled(model)
    check_model(model)
    if example_inputs is not None:
        read(example_inputs)  # raises InputError if they are not valid
    found = proofs(pruned.plan, model, pruned.model, example_inputs, **options)
    return max(found, key=lambda verification: verification.error)


def _checked_dtype(dtype: Any) -> torch.dtype:
    """Return ``dtype``, or raise an ArgumentError if it is not a floating-point type."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(
            f"dtype={short_repr(dtype)} is no floating-point type of torch, e.g. torch.float64."
        )
    return dtype


@public
def compensate(
    model: nn.Module,
    pruned: Pruned,
    loader: Iterable[object],
    *,
    method: str | Sequence[str] = "constants",
    ridge: float | None = None,
) -> Compensation:
    """Correct the weights that stay for the removed channels, before any fine-tuning.

    Removed channels no longer contribute to the next layers. This function measures that
    contribution on data and adds it to the biases or weights of those layers.

    Parameters
    ----------
    model:
        The model that was pruned, with its weights. It is not changed.
    pruned:
        The result of :func:`prune`. Its model is changed in place.
    loader:
        Calibration data: an iterable of batches ``(inputs, ...)``. Targets are not read.
    method:
        ``"constants"`` adds the mean of the missing contribution to the bias of the next layer. If
        that layer has no bias, it is subtracted from the running mean of the batch normalisation
        that follows. ``"least_squares"`` refits each next layer on the channels that it still
        reads. ``"batch_norm"`` sets the running statistics of batch normalisations to those of
        the data, unless that does harm on batches that are held back: the changes of the
        original's outputs count, too. A list combines one of the first two with the last: weights
        are corrected first, whatever the order of the names.
    ridge:
        The strength of the regularisation for least squares, as a share of the mean square of the
        inputs. It keeps weights where they are in directions that the data does not show. By
        default it is 50 over the number of samples: few samples say little about other data.

    Returns
    -------
    Compensation
        The names of the modules that were corrected (``changed``), and of those that read removed
        channels but could not be corrected (``uncorrected``). ``notes`` says where a method was
        not used as asked for.

    Warns
    -----
    FxpruneWarning
        If ``"batch_norm"`` refuses the data.

    Raises
    ------
    ArgumentError
        If the method or ``ridge`` is not valid, if there is no data, or if ``model`` is not the
        model before the last pruning.

    Notes
    -----
    Least squares are those of He et al., "Channel Pruning for Accelerating Very Deep Neural
    Networks", ICCV 2017, eq. 4. Statistics are estimated as in Wu and Johnson, "Rethinking 'Batch'
    in BatchNorm", 2021, section 3.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> x = torch.randn(16, 3, 8, 8)
    >>> fxprune.compensate(net, fxprune.prune(net, x, channels=0.5), [(x,)]).changed
    ('2',)
    """
    methods = read_methods("method", method)
    damping = check_ridge(ridge)
    check_pruned(pruned, "compensate")
    model = uncompiled(model)
    check_model(model)
    check_loader(loader)
    coupling, kept, _ = replay(_last_stage(pruned.plan, model), model)
    return compensate_by(
        methods, coupling, Survivors(coupling, kept), model, pruned.model, loader, ridge=damping
    )


def _last_stage(plan: Plan, model: nn.Module) -> Plan:
    """Return the only stage that leads from this model to the end of the plan.

    Raises
    ------
    ArgumentError
        If there are several, because the model was pruned more than once since.
    """
    stages = stages_of(plan, model)
    if len(stages) > 1:
        raise ArgumentError(
            "compensate takes the model that was pruned last: call it after each prune, with the "
            "model before it."
        )
    return stages[0]
