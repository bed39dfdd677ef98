"""Gated weights: parametrisations that multiply the weights of each unit by a gate."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fxprune.common.contents import named_tensors, tensors_of
from fxprune.common.identity import IdentityMap, IdentitySet
from fxprune.coupling import Coupling, check_coupling
from fxprune.errors import ArgumentError, ModelError
from fxprune.ops import bind

__all__ = ["GatedWeights"]

_MAKING = ("own", "scale")
"""The roles of the elements that make a unit. The others read it."""


class GatedWeights:
    """The weights of a model, multiplied by the gates of their units until :meth:`fold`.

    Parameters
    ----------
    model:
        The model, changed in place.
    coupling:
        Its analysis.
    gates:
        A module that gives the gates, shape (units,), whenever a weight is read.

    Raises
    ------
    ModelError, ArgumentError
        If ``coupling`` is not an analysis of ``model``, or gates cannot mask its units.
    """

    def __init__(self, model: nn.Module, coupling: Coupling, gates: nn.Module) -> None:
        check_coupling(coupling, model)
        _check_statistics(coupling)
        factors = _factors(model, coupling, gates)
        _check_reached(model, factors)
        gated = [_Gated(module, factors) for module in model.modules()]
        self._gated = [one for one in gated if one.originals]
        try:
            for one in self._gated:
                one.attach()
        except BaseException:
            self._detach()
            raise

    def _detach(self) -> None:
        """Take the factors away, and leave the tensors as before."""
        for one in self._gated:
            one.detach()
        self._gated = []

    def fold(self) -> None:
        """Write the gated weights into the tensors, and take the gates away.

        The tensors are the same objects as before. A second call does nothing.
        """
        # a tensor in several places has one value, which is written once for each
        writes = [(one.originals, one.values()) for one in self._gated]
        self._detach()
        with torch.no_grad():
            for originals, values in writes:
                for name, tensor in originals.items():
                    tensor.copy_(values[name])


class _Factor(nn.Module):
    """Multiplies a tensor by the gates of the units that its elements belong to.

    Parameters
    ----------
    gates:
        Gives the gates, shape (units,).
    fields:
        For each field of the tensor the place of each element's gate, and whether the elements
        make the unit. Those that only read it are multiplied by 0 if the gate is 0, else by 1.
    """

    def __init__(self, gates: nn.Module, fields: list[tuple[Tensor, bool]]) -> None:
        super().__init__()
        self.gates = gates
        self.makes = [makes for _, makes in fields]
        for number, (place, _) in enumerate(fields):
            # not saved: it follows from the coupling
            self.register_buffer(f"place{number}", place, persistent=False)

    def forward(self, tensor: Tensor) -> Tensor:
        """Return the gated tensor."""
        gates = self.gates()
        # elements of no unit have the factor 1 behind the last gate
        gates = torch.cat([gates, gates.new_ones(1)]).to(tensor.dtype)
        for number, makes in enumerate(self.makes):
            factors = gates if makes else (gates.detach() != 0).to(tensor.dtype)
            tensor = tensor * factors[self.get_buffer(f"place{number}")]
        return tensor


class _Gated:
    """A module some of whose tensors get gates.

    Parameters
    ----------
    module:
        The module.
    factors:
        The factor of each tensor that gets gates.

    Attributes
    ----------
    originals:
        Its tensors that get gates, by name.
    """

    def __init__(self, module: nn.Module, factors: IdentityMap[Tensor, _Factor]) -> None:
        self.module, self._kind = module, type(module)
        self._stores = [(store, dict(store)) for store in (module._parameters, module._buffers)]
        self._unsaved = set(module._non_persistent_buffers_set)
        self.originals: dict[str, Tensor] = {}
        for _, tensors in self._stores:
            self.originals |= {name: t for name, t in tensors.items() if t in factors}
        self._factors = factors

    def attach(self) -> None:
        """Put the factors before the tensors."""
        if parametrize.is_parametrized(self.module):
            # torch adds properties to the class, which copies of the module share
            members = {k: v for k, v in vars(self._kind).items() if k not in _NOT_COPIED}
            self.module.__class__ = type(self._kind.__name__, self._kind.__bases__, members)
        for name, tensor in self.originals.items():
            parametrize.register_parametrization(self.module, name, self._factors[tensor])

    def values(self) -> dict[str, Tensor]:
        """Return copies of the gated tensors by name."""
        return {name: getattr(self.module, name).detach().clone() for name in self.originals}

    def detach(self) -> None:
        """Make the tensors ordinary ones again, in their order.

        The class with the gates stays as it is, because copies of the module may have it, too.
        """
        for name in self.originals:
            if parametrize.is_parametrized(self.module, name):
                del self.module.parametrizations[name]
        if "parametrizations" in self.module._modules and not self.module.parametrizations:
            del self.module._modules["parametrizations"]
        self.module.__class__ = self._kind
        for store, tensors in self._stores:
            store.clear()
            store.update(tensors)
        self.module._non_persistent_buffers_set.update(self._unsaved)


_NOT_COPIED = ("__dict__", "__weakref__")


def _factors(
    model: nn.Module, coupling: Coupling, gates: nn.Module
) -> IdentityMap[Tensor, _Factor]:
    """Return the factor of each tensor of a model that holds elements of units."""
    place = np.full(coupling.context.units.count, len(coupling.units), dtype=np.int64)
    place[coupling.units] = np.arange(len(coupling.units))
    # training writes running statistics
    statistics = _tensors_given(coupling, _STATISTICS)
    # A direction is divided by its norm. The length that multiplies it makes the unit.
    directions = _tensors_given(coupling, ("v",), "g")
    found: IdentityMap[Tensor, _Factor] = IdentityMap()
    for name, tensor in named_tensors(model).items():
        labelled = coupling.parameters.get(name)
        if labelled is None or labelled in statistics or not tensor.is_floating_point():
            continue
        fields = []
        for labels in coupling.parameter_labels(name):
            makes = coupling.role(name, coupling.shrinking_dim(labels)) in _MAKING
            if not (makes and labelled in directions):
                fields.append((torch.from_numpy(place[labels]).to(tensor.device), makes))
        if fields:
            found[tensor] = _Factor(gates, fields)
    return found


def _calls_with(coupling: Coupling, *names: str) -> Iterator[dict[str, Tensor]]:
    """Yield the arguments of each operation of the graphs that is given tensors of these names."""
    for calls in coupling.context.found.ran.values():
        for func, args, kwargs in calls:
            given = bind(func, args, kwargs)
            if all(isinstance(given.get(name), Tensor) for name in names):
                yield given


_STATISTICS = ("running_mean", "running_var")


def _tensors_given(coupling: Coupling, names: Sequence[str], *also: str) -> IdentitySet[Tensor]:
    """Return the tensors of these names that operations are given, together with other ones."""
    calls = _calls_with(coupling, *names, *also)
    return IdentitySet(given[name] for given in calls for name in names)


def _check_statistics(coupling: Coupling) -> None:
    """Refuse units whose running statistics no scale multiplies: they are not zero when closed."""
    names = IdentityMap((tensor, name) for name, tensor in coupling.parameters.items())
    for given in _calls_with(coupling, *_STATISTICS):
        mean = given["running_mean"]
        if given.get("weight") is None and coupling.labels(mean):
            name = names.get(mean, "running_mean").rpartition(".")[0]
            raise ArgumentError(
                f"{name!r} normalises by running statistics without a scale, so that a closed "
                "gate would leave minus the mean. Give it a scale (affine=True), or analyse the "
                f"model with keep={name!r}."
            )


def _check_reached(model: nn.Module, factors: IdentityMap[Tensor, _Factor]) -> None:
    """Refuse a model that holds a gated tensor where its module's attribute does not lead.

    Raises
    ------
    ModelError
        If there is one. Forward could read it without its gates.
    """
    registers = ("_parameters", "_buffers", "_modules")
    for path, module in model.named_modules():
        others = [value for name, value in vars(module).items() if name not in registers]
        if any(tensor in factors for tensor in tensors_of(others)):
            raise ModelError(
                f"{path or 'the model'!r} also keeps its parameters in a list, as recurrent "
                "layers do, where gates do not reach them. Analyse the model with it in keep=."
            )
