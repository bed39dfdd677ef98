"""How the costs of a unit enter its rank: added to its value, or dividing it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fxprune.common.arrays import Floats
from fxprune.common.numbers import as_number
from fxprune.common.public import public, short_repr
from fxprune.errors import ArgumentError

__all__ = ["AddedCosts", "CostTerms", "DividingCosts", "check_weights"]


_TINY = float(np.finfo(np.float64).tiny)


class CostTerms(Protocol):
    """What the costs do to a rank: ``rank = of_value(value) + of_costs(...)``.

    The selection computes ``of_costs`` anew as widths shrink, because costs change.
    """

    @property
    def reads_costs(self) -> bool:
        """Whether costs matter at all."""

    def of_value(self, value: float) -> float:
        """Return the part of a rank that depends on the value of a unit."""

    def of_costs(self, computation: Floats, parameters: Floats) -> Floats:
        """Return the part of a rank that depends on the costs of a unit.

        Parameters
        ----------
        computation:
            The multiply-accumulates, or the time, that a unit of each pool saves, shape (pools,).
        parameters:
            The parameters that it saves, shape (pools,).

        Returns
        -------
        Floats
            The terms, shape (pools,).
        """


@public
@dataclass(frozen=True)
class AddedCosts:
    r"""Costs that are added to the value, as the paper of CPMC has it.

    .. math::

       I(u) = \alpha V(u) + \beta (1 - C'(u)) + \gamma (1 - P'(u)), \qquad
       C'(u) = \frac{\log_2 (1 + C(u))}{\max \log_2 (1 + C)}

    :math:`C` is the computation that a unit saves at the current widths, :math:`P'` is the same
    for parameters. The maximum goes over the network.

    Parameters
    ----------
    alpha, beta, gamma:
        Weights of value, computation and parameters; none negative, not all 0.

    Raises
    ------
    ArgumentError
        If a weight is negative or not finite, or all are 0.

    Notes
    -----
    Yan et al., "Channel Pruning via Multi-Criteria based on Weight Dependency", IJCNN 2021. The
    normalisation is that of COP (Wang et al., IJCAI 2019).

    Examples
    --------
    >>> terms = AddedCosts(beta=1.0)
    >>> terms.of_value(2.0), terms.of_costs(np.array([3.0, 1.0]), np.array([1.0, 1.0])).tolist()
    (2.0, [0.0, 0.5])
    """

    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        check_weights(self, ("alpha", "beta", "gamma"), all_zero=False)

    @property
    def reads_costs(self) -> bool:
        """Whether a cost has a weight."""
        return bool(self.beta or self.gamma)

    def of_value(self, value: float) -> float:
        """Return the weighted value."""
        return self.alpha * value

    def of_costs(self, computation: Floats, parameters: Floats) -> Floats:
        """Return the weighted terms of the costs, shape (pools,)."""
        terms = np.zeros(len(computation))
        for weight, cost in ((self.beta, computation), (self.gamma, parameters)):
            if weight:
                each = np.log2(1 + cost)
                terms += weight * (1 - each / max(each.max(initial=0.0), _TINY))
        return terms


@public
@dataclass(frozen=True)
class DividingCosts:
    r"""Costs that divide the value: what counts is the value per cost.

    .. math:: I(u) = \frac{V(u)}{C(u)^a P(u)^b}

    :math:`C` and :math:`P` are the computation and the parameters that a unit saves at the current
    widths. With a = 1 and b = 0 the units go that are worth least per multiply-accumulate.

    Parameters
    ----------
    computation, parameters:
        The exponents a and b, at least 0.

    Raises
    ------
    ArgumentError
        If an exponent is negative or not finite.

    Examples
    --------
    >>> terms = DividingCosts(computation=1.0)
    >>> value, cost = terms.of_value(8.0), terms.of_costs(np.array([4.0]), np.array([1.0]))
    >>> np.exp(value + cost).round(4).tolist()  # ranks are logarithms
    [2.0]
    """

    computation: float = 0.5
    parameters: float = 0.0

    def __post_init__(self) -> None:
        check_weights(self, ("computation", "parameters"))

    @property
    def reads_costs(self) -> bool:
        """Whether a cost has an exponent."""
        return bool(self.computation or self.parameters)

    def of_value(self, value: float) -> float:
        """Return the logarithm of the value; a value of at most 0 counts as the least number."""
        return math.log(max(value, _TINY))

    def of_costs(self, computation: Floats, parameters: Floats) -> Floats:
        """Return minus the logarithm of the costs' part, shape (pools,)."""
        # a unit that saves nothing now still saves something later
        return -(
            self.computation * np.log(np.maximum(computation, 1.0))
            + self.parameters * np.log(np.maximum(parameters, 1.0))
        )


def check_weights(owner: object, names: tuple[str, ...], *, all_zero: bool = True) -> None:
    """Turn attributes of a frozen dataclass into floats, and refuse what is no weight.

    Parameters
    ----------
    owner:
        The object; its attributes are set.
    names:
        The names of its weights.
    all_zero:
        Whether all of them may be 0.

    Raises
    ------
    ArgumentError
        If one is negative or not finite, or all are 0 and must not be.
    """
    given = [getattr(owner, name) for name in names]
    weights = [as_number(value) for value in given]
    valid = [w is not None and math.isfinite(w) and w >= 0 for w in weights]
    if not all(valid) or not (all_zero or any(weights)):
        listed = f"{', '.join(names[:-1])} and {names[-1]}"
        values = ", ".join(short_repr(value) for value in given)
        also = "" if all_zero else ", not all of them 0"
        raise ArgumentError(
            f"{type(owner).__name__}: {listed} are {values}: give numbers of at least 0{also}."
        )
    for name, weight in zip(names, weights, strict=True):
        object.__setattr__(owner, name, weight)
