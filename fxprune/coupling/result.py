"""The result of the analysis: groups of units, pinned axes with their reasons, and labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import networkx as nx
import numpy as np
import torch
from torch import Tensor, nn

from fxprune.common.identity import IdentityMap
from fxprune.common.public import public, short_repr
from fxprune.coupling.balance import Balance, shrinking_dim
from fxprune.coupling.groups import Group, Pinned
from fxprune.errors import ArgumentError, ModelError
from fxprune.inputs import Call
from fxprune.labels import Array
from fxprune.ops import Context, Contraction
from fxprune.ops.convolution import is_convolution
from fxprune.trace import MetaCopy, Trace

__all__ = ["KEPT", "OUTPUT", "Coupling", "check_coupling"]


KEPT = "is kept by request"
"""The reason of a pin that the caller asks for."""


OUTPUT = "is an output of the model"
"""The reason of a pin on an output of the model."""


@public
@dataclass(eq=False)
class Coupling:
    """The result of the analysis; ``print`` it, or draw :meth:`to_networkx`.

    Attributes
    ----------
    groups:
        The groups of units that can be pruned.
    pinned:
        The axes that cannot be pruned, with the reasons.
    untouched:
        Names of parameters that no executed op met. They stay as they are.
    decisions:
        Control flow that was decided while tracing, one line each.
    graph:
        The coupling graph (see :meth:`to_networkx`).
    meta_copy:
        The model that was traced.
    traces:
        Its graphs.
    context:
        The labels of all tensors of the labelled run.
    balance:
        The balance constraints of the units.
    parameters:
        Parameters and buffers of the meta copy, by name.
    contractions:
        The operations that cost MACs, in evaluation mode.
    example:
        What the model is called with: meta tensors, or values where its Python code runs on them.
    inputs:
        The example as the caller gave it, but for floating-point values, which no criterion may
        rely on: those are meta tensors.
    not_one_graph:
        Why the model is not one graph, with the line; empty if it is.
    untrained:
        Why there is a graph for evaluation mode only, with the line; empty if there is one for
        training mode, too.
    """

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    untouched: tuple[str, ...]
    decisions: tuple[str, ...]
    graph: nx.Graph
    meta_copy: MetaCopy
    traces: tuple[Trace, ...]
    context: Context
    balance: Balance
    parameters: dict[str, Tensor]
    contractions: tuple[Contraction, ...]
    example: Call = field(default_factory=lambda: Call((), {}))
    inputs: Call = field(default_factory=lambda: Call((), {}))
    not_one_graph: str = ""
    untrained: str = ""
    _labels: IdentityMap[Tensor, list[Array]] = field(
        default_factory=IdentityMap, init=False, repr=False
    )
    _dims: IdentityMap[Array, int] = field(default_factory=IdentityMap, init=False, repr=False)

    @property
    def parts(self) -> tuple[str, ...]:
        """Paths of the parts of the model; empty if it was traced whole."""
        return tuple(dict.fromkeys(traced.path for traced in self.traces if traced.path))

    @property
    def not_set(self) -> tuple[str, ...]:
        """Names of attributes that forward sets to values computed from the inputs.

        No graph sets them, because nothing reads them.
        """
        names: dict[str, None] = {}
        for traced in self.traces:
            for name in traced.not_set:
                names[f"{traced.path}.{name}".lstrip(".")] = None
        return tuple(names)

    @functools.cached_property
    def units(self) -> Array:
        """Labels of the units of all groups: shape (units,), ascending."""
        return np.sort(
            np.concatenate([np.zeros(0, dtype=np.int64), *(group.units for group in self.groups)])
        )

    @public
    def to_networkx(self) -> nx.Graph:
        """Return a copy of the coupling graph.

        Its nodes are :class:`Axis` objects. The attribute ``nodes`` of an edge names the fx nodes
        that tied its two ends.
        """
        return self.graph.copy()

    def labels(self, tensor: Any) -> list[Array]:
        """Return the live labels of a tensor of the labelled run, one array per field.

        The list is empty if the tensor has no labels. It must not be changed.
        """
        known = self._labels.get(tensor)
        if known is None:
            record = self.context.record(tensor)
            if record is None:
                return []
            known = self._labels[tensor] = [f.labels for f in record.fields]
        return known

    def wide_dims(self, tensor: Any) -> list[int]:
        """Return the labelled dimensions of a tensor between parts that keep their size.

        They do because Python code that is not traced has to see them at full width.
        """
        wide = self.context.found.full_width
        if not wide:
            return []
        found = [array for array in self.labels(tensor) if np.isin(array, wide[0]).any()]
        return sorted({self.shrinking_dim(array) for array in found})

    def shrinking_dim(self, labels: Array) -> int:
        """Return the dimension along which a tensor with these live labels gets smaller.

        See :func:`fxprune.coupling.balance.shrinking_dim`.
        """
        if labels not in self._dims:
            self._dims[labels] = shrinking_dim(labels, self.balance.block)
        return self._dims[labels]

    @public
    def macs(
        self,
        shape: Callable[[Tensor], Sequence[int]] | None = None,
        of: Iterable[Contraction] | None = None,
    ) -> int:
        """Return the number of MACs (multiply-accumulates) of the model on the example.

        Layers that the example reaches with empty tensors only, such as the mask head of a
        detector that finds nothing, count as for two elements. Otherwise no budget would see them.

        Parameters
        ----------
        shape:
            Gives the shape to count with for each tensor of the labelled run; by default its own.
        of:
            The contractions to count; by default all.

        Raises
        ------
        ArgumentError
            If ``shape`` is not callable.
        """
        if shape is not None and not callable(shape):
            raise ArgumentError(
                f"shape is {short_repr(shape)}: give a function from a tensor to its sizes, or "
                "None."
            )
        contractions = self.contractions if of is None else of
        return round(sum(ran.share * ran.macs(shape) for ran in contractions))

    @public
    def pinned_macs(self) -> dict[str, float]:
        """Return the share of the MACs that each reason of a pin keeps, the largest first.

        The MACs of a layer count in equal parts for its two channel axes. An axis counts in
        proportion to its pinned positions. If all inputs and half of the outputs of a layer are
        pinned, one reason keeps one half of its MACs and the other one quarter.

        Returns
        -------
        dict
            Reason -> share of all MACs, between 0 and 1.
        """
        pinned = self._pinned_parts()
        names = IdentityMap((tensor, name) for name, tensor in self.parameters.items())
        shares: dict[str, Fraction] = {}
        for ran in self.contractions:
            axes = self._channel_axes(ran)
            for weight, dim in axes:
                if weight in names:
                    reasons = pinned.get((names[weight], dim), [])
                else:
                    reasons = self._pinned_part_of_result(weight, dim)
                for reason, part in reasons:
                    macs = ran.share * ran.macs() * part / len(axes)
                    shares[reason] = shares.get(reason, Fraction(0)) + macs
        total = self.macs() or 1
        largest_first = sorted(shares.items(), key=lambda item: -item[1])
        return {reason: float(share / total) for reason, share in largest_first}

    def _pinned_parts(self) -> dict[tuple[str, int], list[tuple[str, Fraction]]]:
        """Return for each axis of a parameter the reasons of pins, and the parts they keep."""
        parts: dict[tuple[str, int], list[tuple[str, Fraction]]] = {}
        for pinned in self.pinned:
            for axis in pinned.axes:
                part = Fraction(axis.stop - axis.start, axis.length)
                parts.setdefault((axis.parameter, axis.dim), []).append((pinned.reason, part))
        return parts

    def _channel_axes(self, ran: Contraction) -> list[tuple[Tensor, int]]:
        """Return the channel axes of the weights that a contraction reads."""
        channels = 2 if is_convolution(ran.func) else None  # the other axes are the kernel's
        axes = []
        for weight in ran.read:
            if weight.dim() > 1 and self.context.is_from_weights(weight):
                sizes = enumerate(weight.shape[:channels])
                axes += [(weight, dim) for dim, size in sizes if size > 1]
        return axes

    def _pinned_part_of_result(self, weight: Tensor, dim: int) -> list[tuple[str, Fraction]]:
        """Return why an axis of a weight that forward computes is kept, and how much of it.

        The list is empty if the axis has labels.
        """
        if any(labels.shape[dim] > 1 for labels in self.labels(weight)):
            return []
        return [(self.context.why_fixed([weight], dims=[dim])[0], Fraction(1))]

    def _parameter(self, name: str) -> Tensor:
        """Return the parameter of this name, or raise an error if there is none."""
        if not isinstance(name, str) or name not in self.parameters:
            raise ArgumentError(
                f"{short_repr(name)} is no parameter of the model that was analysed: they are the "
                "keys of .parameters."
            )
        return self.parameters[name]

    def _check_group(self, group: Group) -> Group:
        """Return the group, or raise an error if it belongs to another coupling."""
        if not isinstance(group, Group) or not any(group is known for known in self.groups):
            raise ArgumentError(
                f"{short_repr(group)} is no group of this coupling: give one of its .groups."
            )
        return group

    @public
    def role(self, name: str, dim: int) -> str:
        """Return the role of a parameter's axis for the units on it.

        Parameters
        ----------
        name:
            Name of the parameter.
        dim:
            Dimension of the axis.

        Returns
        -------
        str
            ``"own"`` for filters and biases of the units, ``"scale"`` for the scale of a
            normalisation, ``"dependent"`` for the weights with which later layers read the units.

        Raises
        ------
        ArgumentError
            If there is no such parameter or axis.
        """
        tensor = self._parameter(name)
        if not isinstance(dim, int) or not 0 <= dim < max(tensor.dim(), 1):
            raise ArgumentError(
                f"dim={short_repr(dim)} is no axis of {name!r}, which has {tensor.dim()}."
            )
        record = self.context.record(tensor)
        number = record.axes[dim] if record is not None and record.axes else -1
        if number in self.context.found.scale_axes:
            return "scale"
        return "dependent" if number in self.context.found.summed_axes else "own"

    @public
    def parameter_labels(self, name: str) -> list[Array]:
        """Return the live labels of a parameter, one array per field.

        Raises
        ------
        ArgumentError
            If there is no such parameter.
        """
        return self.labels(self._parameter(name))

    @public
    def elements(self, group: Group) -> dict[str, list[Tensor]]:
        """Return which unit of a group each element of the group's parameters belongs to.

        Returns
        -------
        dict
            Name of a parameter -> integer tensors that broadcast to its shape. An entry is the
            index of the unit in the group, or -1 where no unit of the group lies. A parameter has
            two tensors if the group lies on it twice.

        Raises
        ------
        ArgumentError
            If the group belongs to another coupling.
        """
        group = self._check_group(group)
        index = np.full(self.context.units.count, -1, dtype=np.int64)
        index[group.units] = np.arange(group.size)
        elements: dict[str, list[Tensor]] = {}
        for name in dict.fromkeys(axis.parameter for axis in group.axes):
            indices = [index[labels] for labels in self.parameter_labels(name)]
            elements[name] = [torch.from_numpy(array) for array in indices if (array >= 0).any()]
        return elements

    @public
    def blocks(self, group: Group) -> Tensor:
        """Return the number of the block in which each unit of a group lies.

        Every block keeps a number of units of its own, so one unit can be pruned instead of
        another only within a block. All numbers are 0 if the group is not balanced.

        Returns
        -------
        torch.Tensor
            Integers, shape (size,).

        Raises
        ------
        ArgumentError
            If the group belongs to another coupling.
        """
        cells = self.balance.cell[self._check_group(group).units]
        return torch.from_numpy(np.unique(cells, return_inverse=True)[1].reshape(-1))

    def __str__(self) -> str:
        lines = [f"{len(self.groups)} groups, {sum(g.size for g in self.groups)} units"]
        lines += [f"  {g}" for g in self.groups]
        if self.pinned:
            lines.append("pinned")
            lines += [f"  {p}" for p in self.pinned]
            shares = []
            for reason, share in self.pinned_macs().items():
                because = reason if reason.startswith("its ") else f"it {reason}"
                shares.append(f"{share:.1%} because {because}")
            lines += [f"multiply-accumulates held: {', '.join(shares)}"] if shares else []
        if self.untouched:
            lines.append(f"untouched: {', '.join(self.untouched)}")
        if self.not_one_graph:
            lines.append(f"in parts, not one graph: {self.not_one_graph}")
        if self.not_set:
            lines.append(f"set by forward, not by its graph: {', '.join(self.not_set)}")
        if self.decisions:
            lines.append("decided while tracing")
            lines += [f"  {d}" for d in self.decisions]
        return "\n".join(lines)


def check_coupling(coupling: Any, model: Any) -> None:
    """Raise an error unless ``coupling`` is the analysis of a model like ``model``.

    Raises
    ------
    ModelError
        If ``model`` is no module.
    ArgumentError
        If ``coupling`` is no :class:`Coupling`, or that of another architecture.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module as model, got a {type(model).__name__}.")
    if not isinstance(coupling, Coupling):
        raise ArgumentError(
            f"coupling is a {type(coupling).__name__}: give what fxprune.analyze(model, "
            "example_inputs) gives."
        )
    parameters = dict(model.named_parameters())
    for name, analysed in coupling.parameters.items():
        if isinstance(analysed, nn.Parameter) and (
            name not in parameters or parameters[name].shape != analysed.shape
        ):
            raise ArgumentError(
                f"the coupling is of another architecture than this {type(model).__name__}: it "
                f"has {name!r} of shape {tuple(analysed.shape)}. Analyse the very model."
            )
