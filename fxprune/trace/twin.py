"""A copy of a model without data in its parameters: it is traced, while the user's model is never called nor changed."""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import TraceError
from fxprune.lowering import lower
from fxprune.shapes import META

__all__ = ["Twin", "put_tensors", "twin_of"]


@dataclass(frozen=True)
class Twin:
    """A structural copy of a model with parameters on the meta device.

    ``real`` leads from the id of a twin's tensor to the tensor of the user's model that it stands for; ``tensors`` are the twin's
    parameters and buffers by name.
    """

    model: nn.Module
    real: dict[int, Tensor]
    tensors: dict[str, Tensor]

    @contextmanager
    def holding(self, values: Mapping[int, Tensor]) -> Iterator[nn.Module]:
        """The twin's model with other tensors, given by the ids of the twin's, for a while."""
        changed = put_tensors(self.model, values)
        try:
            yield self.model
        finally:
            for store, name, tensor in changed:
                store[name] = tensor

    def instance(self, values: Mapping[int, Tensor] | None = None) -> nn.Module:
        """A copy of the twin's model to run: with these tensors, by the ids of the twin's, or the user's (buffers copied)."""
        memo: dict[int, Any] = {}
        for tensor in self.tensors.values():
            own = self.real[id(tensor)].detach() if values is None else values[id(tensor)]
            memo[id(tensor)] = nn.Parameter(own, False) if isinstance(tensor, nn.Parameter) else own.clone()
        if values is not None:  # where these lie, the model's constants have to be
            place = next((value.device for value in values.values()), self.device)
            constants = {key: own for key, own in self.real.items() if key not in memo and own.grad_fn is None}
            memo |= {key: own.detach().to(place, copy=True) for key, own in constants.items()}
        return _copy_module(self.model, memo)

    @property
    def device(self) -> torch.device:
        """Where the user's model lies; without any tensor, on the CPU."""
        return next((tensor.device for tensor in self.real.values()), torch.device("cpu"))

    def part(self, path: str) -> Twin:
        """The twin of a module below."""
        model = self.model.get_submodule(path)
        return Twin(model, self.real, {**dict(model.named_parameters()), **dict(model.named_buffers())})


def twin_of(model: nn.Module) -> Twin:
    """Copy a model's structure; parameters and float buffers become meta tensors, other buffers data on the CPU, constants stay.

    Raises
    ------
    TraceError
        If an attribute of the model cannot be copied.
    """
    memo: dict[int, Any] = {}
    real: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> None:
        if id(tensor) in memo:
            return
        if isinstance(tensor, nn.Parameter):
            new: Tensor = nn.Parameter(torch.empty_like(tensor, device=META), requires_grad=False)
        elif tensor.is_floating_point() or tensor.is_complex():
            new = torch.empty_like(tensor, device=META)
        else:
            new = tensor.detach().to("cpu", copy=True)
        memo[id(tensor)] = new
        real[id(new)] = tensor

    modules = list(model.modules())
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                stand_in(tensor)
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor) and id(value) not in memo:
                # Not a parameter, not a buffer: a constant whose value may matter, or one that a hook computes at each call.
                held = value.detach().clone() if value.grad_fn is None else torch.empty_like(value, device=META)
                memo[id(value)], real[id(held)] = held, value
    try:
        copied = _copy_module(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied ({error}). fxprune traces a copy so that your model stays untouched: "
            "make every attribute of the model copyable with copy.deepcopy (no locks, open files or generators)."
        ) from error
    twin = lower(copied)
    return Twin(twin, real, {**dict(twin.named_parameters()), **dict(twin.named_buffers())})


def put_tensors(model: nn.Module, new: Mapping[int, Tensor]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Put tensors into the places of registered ones, by the ids of these; returns (place, name, what was there)."""
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and id(tensor) in new:
                    changed.append((store, name, tensor))
    for store, name, tensor in changed:
        value = new[id(tensor)]
        wrap = isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter)
        store[name] = nn.Parameter(value, False) if wrap else value
    return changed


_PLAIN = frozenset({bool, int, float, str, torch.dtype, type(None), types.FunctionType, types.BuiltinFunctionType, type})
_STORES = frozenset({dict, collections.OrderedDict, set})


def _copy_module(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """copy.deepcopy for a module tree, several times faster: most attributes are numbers, which need no copy."""
    if id(module) in memo:
        copied: nn.Module = memo[id(module)]
        return copied
    if hasattr(type(module), "__deepcopy__"):
        return copy.deepcopy(module, memo)
    kind: Any = type(module)
    new = kind.__new__(kind)
    memo[id(module)] = new
    for child in module._modules.values():
        if child is not None and id(child) not in memo:
            _copy_module(child, memo)
    for name, value in vars(module).items():
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value)):
            new.__dict__[name] = value
        elif kind in _STORES and not value:
            new.__dict__[name] = value.copy()
        elif kind is dict and name in ("_parameters", "_buffers", "_modules"):
            new.__dict__[name] = {key: None if item is None else memo[id(item)] for key, item in value.items()}
        else:
            new.__dict__[name] = copy.deepcopy(value, memo)
    return new
