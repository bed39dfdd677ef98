"""Views of the weights by unit: the input of every criterion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.arrays import Floats
from fxprune.common.public import calling_user_code, iterate_user_input, public, short_repr
from fxprune.coupling import Coupling, Group
from fxprune.errors import ArgumentError, ModelError
from fxprune.labels import Array

__all__ = [
    "ROLES",
    "UnitView",
    "Views",
    "at_least_float32",
    "check_roles",
    "check_values",
    "check_view",
    "score_by_views",
    "sums_per_label",
]

ROLES = ("own", "scale", "dependent")
"""The roles of a unit's elements: its own filters and biases (``"own"``), the scale of a
normalisation (``"scale"``), and the slices of the next layers' weights that read it
(``"dependent"``).
"""

Elementwise = Callable[[Tensor], Tensor]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float64 if it has that dtype, else in float32.

    Sums in half precision overflow.

    >>> half, double = torch.ones(2, dtype=torch.float16), torch.ones(2, dtype=torch.float64)
    >>> [at_least_float32(half).dtype, at_least_float32(double).dtype]
    [torch.float32, torch.float64]
    """
    return tensor.to(torch.float64 if tensor.dtype is torch.float64 else torch.float32)


def check_roles(roles: Iterable[str]) -> tuple[str, ...]:
    """Return the roles as a tuple.

    Parameters
    ----------
    roles:
        One role, or several of :data:`ROLES`.

    Raises
    ------
    ArgumentError
        If a role is unknown, or there is none: then every sum would be 0.
    """
    found: tuple[str, ...] = ()
    if isinstance(roles, str):
        found = (roles,)
    elif isinstance(roles, Iterable):
        found = tuple(iterate_user_input(roles, "roles"))
    if not found or not all(isinstance(role, str) and role in ROLES for role in found):
        raise ArgumentError(
            f"roles={short_repr(roles)}: choose one or several of {', '.join(map(repr, ROLES))}."
        )
    return found


def check_view(view: Any) -> None:
    """Refuse a value that a criterion cannot score.

    Raises
    ------
    ArgumentError
        If it is not a :class:`UnitView`.
    """
    if not isinstance(view, UnitView):
        raise ArgumentError(
            "a criterion takes a UnitView, as Views(coupling, tensors) gives them, and got a "
            f"{type(view).__name__}."
        )


@public
class Views:
    """All groups of a coupling, with the tensors to score them by.

    Iterating over it gives one :class:`UnitView` per group.

    Parameters
    ----------
    coupling:
        The analysis.
    tensors:
        One tensor per parameter name, of the parameter's shape and of any float dtype and device:
        the weights, or other values per element, such as weights times gradients. Parameters
        without a tensor count nothing.

    Raises
    ------
    ArgumentError
        If the arguments are of other types, or a tensor has another shape than its parameter.

    Examples
    --------
    >>> import fxprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.ReLU(),
    ...     torch.nn.Linear(3, 1))
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 2))
    >>> (view,) = Views(coupling, {"0.weight": torch.tensor([[1., -2.], [0., 3.], [4., 4.]]),
    ...     "2.weight": torch.ones(1, 3)})
    >>> view.sum(torch.abs), view.sum(torch.abs, roles=("dependent",))
    (tensor([4., 4., 9.], dtype=torch.float64), tensor([1., 1., 1.], dtype=torch.float64))
    """

    def __init__(self, coupling: Coupling, tensors: Mapping[str, Tensor]) -> None:
        if not isinstance(coupling, Coupling) or not isinstance(tensors, Mapping):
            given = f"a {type(coupling).__name__} and a {type(tensors).__name__}"
            raise ArgumentError(
                "Views(coupling, tensors) takes what fxprune.analyze gives and a dict of "
                f"tensors, and got {given}."
            )
        for name, analysed in coupling.parameters.items():
            tensor = tensors.get(name, analysed)
            if not isinstance(tensor, Tensor) or tensor.shape != analysed.shape:
                raise ArgumentError(
                    f"{name!r} is {_shape_or_type(tensor, 'of shape')}: give a tensor of the "
                    f"parameter's shape, {tuple(analysed.shape)}."
                )
        self.coupling, self.tensors = coupling, tensors
        self._totals: dict[tuple[Elementwise, tuple[str, ...]], Floats] = {}

    def __iter__(self) -> Iterator[UnitView]:
        """Iterate over the groups' views."""
        return (UnitView(self, group) for group in self.coupling.groups)

    @public
    def totals(self, function: Elementwise, roles: Iterable[str] = ROLES) -> Floats:
        """Return the sum of ``function(tensor)`` over each unit's elements.

        Each tensor is summed once per field, however many groups lie on it, and the result is kept
        for the next call.

        Parameters
        ----------
        function:
            Works element by element, such as ``torch.abs`` or ``torch.square``.
        roles:
            Which elements count, of :data:`ROLES`.

        Returns
        -------
        Floats
            Sums of shape (labels,), 0 for labels of no unit.

        Raises
        ------
        ArgumentError
            If ``function`` gives no number per element, or a role is unknown.
        ModelError
            If a tensor is on the meta device and has no values.
        """
        if not callable(function):
            raise ArgumentError(
                f"the function that is summed is a {type(function).__name__}: give one like "
                "torch.abs."
            )
        key = (function, check_roles(roles))
        if key not in self._totals:
            self._totals[key] = self._summed(*key)
        return self._totals[key]

    def _summed(self, function: Elementwise, roles: tuple[str, ...]) -> Floats:
        """Return the sum of ``function(tensor)`` over each unit's elements, shape (labels,)."""
        units: list[Array] = [np.zeros(0, dtype=np.int64)]
        weights: list[Floats] = [np.zeros(0)]
        for name, fields in self._fields(roles):
            values = self._values(function, name)
            for labels in fields:
                units.append(labels.ravel())
                weights.append(sums_per_label(values, labels))
        count = self.coupling.context.units.count
        totals = np.bincount(np.concatenate(units), np.concatenate(weights), count)
        totals[0] = 0
        return totals.astype(np.float64, copy=False)  # bincount gives integers without units

    def _values(self, function: Elementwise, name: str) -> Tensor:
        """Return ``function`` of a tensor.

        Raises
        ------
        ArgumentError
            If it is no tensor of the same shape.
        """
        tensor = at_least_float32(self.tensors[name].detach())
        with calling_user_code(f"the function that is summed over {name!r}"):
            values = function(tensor)
        if not isinstance(values, Tensor) or values.shape != tensor.shape:
            raise ArgumentError(
                f"the function that is summed gave {_shape_or_type(values, 'shape')} for "
                f"{tuple(tensor.shape)}: it must give a number for each element."
            )
        return values

    def _fields(self, roles: tuple[str, ...]) -> Iterator[tuple[str, list[Array]]]:
        """Yield each tensor's name and its labels that lie on an axis of one of the roles."""
        for name in self.coupling.parameters:
            if name not in self.tensors:
                continue
            if self.tensors[name].is_meta:
                raise _error_without_values(name)
            fields = []
            for labels in self.coupling.parameter_labels(name):
                if self.coupling.role(name, self.coupling.shrinking_dim(labels)) in roles:
                    fields.append(labels)
            if fields:
                yield name, fields


def _shape_or_type(value: Any, shape: str) -> str:
    """Return the shape of a tensor, or the type of another value, for a message."""
    if isinstance(value, Tensor):
        return f"{shape} {tuple(value.shape)}"
    return f"a {type(value).__name__}"


def sums_per_label(values: Tensor, labels: Array) -> Floats:
    """Return the sum of the elements that lie at each label; shape (labels.size,)."""
    first = next(d for d, size in enumerate(labels.shape) if size > 1)
    rest = [d for d, size in enumerate(labels.shape) if size == 1 and d > first]
    # Sum leading dimensions first: then both sums read memory in order.
    sums = values.sum(list(range(first)), keepdim=True) if first else values
    sums = sums.sum(rest, keepdim=True) if rest else sums
    return sums.expand(labels.shape).cpu().numpy().ravel()


@public
@dataclass(frozen=True, eq=False)
class UnitView:
    """One group of units, as a criterion sees it.

    Attributes
    ----------
    views:
        The views that this one belongs to; they hold the tensors.
    group:
        The group.

    Examples
    --------
    >>> import fxprune
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1))
    >>> weights = {"0.weight": torch.tensor([[1., -2.], [0., 3.], [4., 4.]])}
    >>> (view,) = Views(fxprune.analyze(net, torch.zeros(1, 2)), weights)
    >>> view.group.size, view.sum(torch.abs).tolist(), view.network_mean(torch.abs)
    (3, [3.0, 3.0, 8.0], 4.666666666666667)
    >>> view.rows(("own",)).tolist()
    [[1.0, -2.0], [0.0, 3.0], [4.0, 4.0]]
    """

    views: Views
    group: Group

    @public
    def sum(self, function: Elementwise, roles: Iterable[str] = ROLES) -> Tensor:
        """Return the sum of ``function(weights)`` over each unit's elements.

        Parameters
        ----------
        function:
            Works element by element, such as ``torch.abs`` or ``torch.square``.
        roles:
            Which elements count, of :data:`ROLES`.

        Returns
        -------
        Tensor
            Sums of shape (units,), float64.

        Raises
        ------
        ArgumentError, ModelError
            As for :meth:`Views.totals`.
        """
        return torch.from_numpy(self.views.totals(function, roles)[self.group.units])

    @public
    def network_mean(self, function: Elementwise, roles: Iterable[str] = ROLES) -> float:
        """Return the mean of :meth:`sum` over the units of all groups.

        Parameters
        ----------
        function, roles:
            As for :meth:`sum`.
        """
        units = self.views.coupling.units
        return float(self.views.totals(function, roles)[units].mean()) if len(units) else 0.0

    @property
    def blocks(self) -> Tensor:
        """The block of each unit, shape (units,), int64.

        Only units of one block can replace each other. All are 0 except in groups that are split
        (grouped convolutions, attention heads).
        """
        return self.views.coupling.blocks(self.group)

    @public
    def rows(self, roles: Iterable[str] = ROLES) -> Tensor:
        """Return the elements of each unit as a row.

        Elements of units of one block (:attr:`blocks`) have the same order, so their rows can be
        compared.

        Parameters
        ----------
        roles:
            Which elements count, of :data:`ROLES`.

        Returns
        -------
        Tensor
            Elements of shape (units, elements), float64. A unit that has fewer elements than
            others is padded with zeros.

        Raises
        ------
        ArgumentError
            If a role is unknown.
        """
        coupling, roles = self.views.coupling, check_roles(roles)
        index = np.full(coupling.context.units.count, -1, dtype=np.int64)
        index[self.group.units] = np.arange(self.group.size)
        parts = [torch.zeros(self.group.size, 0, dtype=torch.float64)]
        for name in dict.fromkeys(axis.parameter for axis in self.group.axes):
            if name not in self.views.tensors:
                continue
            tensor = self.views.tensors[name].detach()
            for labels in coupling.parameter_labels(name):
                place = index[labels]
                if not (place >= 0).any():
                    continue
                if coupling.role(name, coupling.shrinking_dim(labels)) in roles:
                    parts.append(_rows_of(tensor, place, self.group.size))
        return torch.cat(parts, dim=1)


def _rows_of(tensor: Tensor, index: Array, size: int) -> Tensor:
    """Return a tensor's elements unit by unit, padded with zeros; shape (size, elements), float64.

    Parameters
    ----------
    tensor:
        The tensor that the units lie on.
    index:
        For each element the index of its unit, -1 for none; broadcastable to the tensor.
    size:
        Number of units.
    """
    varied = [d for d, extent in enumerate(index.shape) if extent > 1]
    rest = [d for d in range(tensor.dim()) if d not in varied]
    flat = index.ravel()
    taken = np.flatnonzero(flat >= 0)
    taken = taken[np.argsort(flat[taken], kind="stable")]
    counts = np.bincount(flat[taken], minlength=size)
    columns = np.arange(len(taken)) - np.repeat(np.cumsum(counts) - counts, counts)
    elements = tensor.permute(*varied, *rest).reshape(len(flat), -1)
    elements = elements[torch.from_numpy(taken).to(tensor.device)]
    block = elements.new_zeros(size, int(counts.max()), elements.shape[1])
    block[torch.from_numpy(flat[taken]), torch.from_numpy(columns)] = elements
    return block.reshape(size, -1).cpu().double()


def score_by_views(
    coupling: Coupling, model: nn.Module, score: Callable[[UnitView], Floats]
) -> Floats:
    """Return scores of shape (labels,) that a function gives group by group.

    Parameters
    ----------
    coupling:
        The analysis.
    model:
        The model whose weights the views show.
    score:
        Returns one score for each unit of a view.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    value = np.zeros(coupling.context.units.count)
    for view in Views(coupling, parameters):
        value[view.group.units] = score(view)
    return value


def check_values(coupling: Coupling, model: nn.Module) -> None:
    """Check that the parameters which hold units have finite values.

    Raises
    ------
    ModelError
        If one is on the meta device, or holds infinity or NaN.
    """
    for name, parameter in model.named_parameters():
        if name not in coupling.parameters or not parameter.is_floating_point():
            continue
        if parameter.is_meta:
            raise _error_without_values(name)
        # a finite sum is several times as fast to find, and has finite addends
        if not bool(parameter.sum().isfinite()) and not bool(parameter.isfinite().all()):
            raise ModelError(
                f"parameter {name!r} holds infinity, so its units cannot be ranked: load or "
                "initialise the weights anew."
            )


def _error_without_values(name: str) -> ModelError:
    return ModelError(
        f"{name!r} is on the meta device and has no values, so nothing can be ranked: load the "
        'weights first, or take criterion="random". fxprune.analyze needs none.'
    )
