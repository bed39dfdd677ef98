"""A copy of a model without data in its parameters: it is traced, while the user's model is never
called nor changed.
"""

from __future__ import annotations

import collections
import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.compiled import Uncompiled, is_compiled
from fxprune.common.contents import named_tensors
from fxprune.common.dispatch import META
from fxprune.common.hooks import in_mode
from fxprune.common.identity import IdentityMap, Memo, from_memo, in_memo, to_memo
from fxprune.errors import ModelError, TraceError
from fxprune.trace.copying import HOOKS, HOOKS_CALLED, copied, hooks_apart
from fxprune.trace.decompose import lower
from fxprune.trace.reach import Reached

__all__ = ["MetaCopy", "attribute", "copy_of", "meta_copy_of", "put_tensors", "set_mode"]


@dataclass(frozen=True)
class MetaCopy:
    """A structural copy of a model with parameters on the meta device.

    ``real`` leads from a tensor of the meta copy to the tensor of the user's model that it stands
    for, ``modules`` from a module of the meta copy to the user's; ``tensors`` are the meta copy's
    parameters and buffers by name. ``reached`` is what the code of the whole model can reach.
    """

    model: nn.Module
    real: IdentityMap[Tensor, Tensor]
    tensors: dict[str, Tensor]
    reached: Reached
    modules: IdentityMap[nn.Module, nn.Module] = field(default_factory=IdentityMap)

    @contextmanager
    def holding(self, values: IdentityMap[Tensor, Tensor]) -> Iterator[nn.Module]:
        """The meta copy's model with other tensors, given by its own, for a while."""
        changed = put_tensors(self.model, values)
        try:
            yield self.model
        finally:
            for store, name, tensor in changed:
                store[name] = tensor

    def instance(self, values: IdentityMap[Tensor, Tensor] | None = None) -> nn.Module:
        """A copy of the meta copy's model to run: with these tensors, by its own, or with the
        user's (buffers copied).
        """
        memo: Memo = {}
        for tensor in self.tensors.values():
            own = self.real[tensor].detach() if values is None else values[tensor]
            to_memo(
                memo,
                tensor,
                nn.Parameter(own, False) if isinstance(tensor, nn.Parameter) else own.clone(),
            )
        if values is not None:  # where these lie, the model's constants have to be
            place = next((value.device for value in values.values()), self.device)
            for key, own in self.real.items():
                if not in_memo(memo, key) and own.grad_fn is None:
                    to_memo(memo, key, own.detach().to(place, copy=True))
        return copy_of(self.model, memo)

    @property
    def device(self) -> torch.device:
        """Where the user's model lies; without any tensor, on the CPU."""
        return next((tensor.device for tensor in self.real.values()), torch.device("cpu"))

    def part(self, path: str) -> MetaCopy:
        """The meta copy of a module below."""
        model = self.model.get_submodule(path)
        tensors = named_tensors(model)
        return replace(self, model=model, tensors=tensors)


def meta_copy_of(model: nn.Module) -> MetaCopy:
    """Copy a model's structure; parameters and float buffers become meta tensors, other buffers
    data on the CPU, constants stay.

    Raises
    ------
    TraceError
        If an attribute of the model cannot be copied.
    """
    memo: Memo = {}
    real: IdentityMap[Tensor, Tensor] = IdentityMap()

    def stand_in(tensor: Tensor) -> None:
        if in_memo(memo, tensor):
            return
        if isinstance(tensor, nn.Parameter):
            new: Tensor = nn.Parameter(torch.empty_like(tensor, device=META), requires_grad=False)
        elif tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta:
            new = torch.empty_like(tensor, device=META)
        else:
            new = tensor.detach().to("cpu", copy=True)
        to_memo(memo, tensor, new)
        real[new] = tensor

    modules = list(model.modules())
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                stand_in(tensor)
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor) and not in_memo(memo, value):
                # Not a parameter, not a buffer: a constant whose value may matter, or one that a
                # hook computes at each call.
                held = (
                    value.detach().clone()
                    if value.grad_fn is None
                    else torch.empty_like(value, device=META)
                )
                real[held] = value
                to_memo(memo, value, held)
    try:
        new_model = copy_of(model, memo)
    except TraceError:
        raise
    except Exception as error:  # of a __deepcopy__ of the user's
        raise TraceError(_uncopied(type(model).__name__, "", model, error)) from error
    meta_copy = lower(new_model)
    tensors = named_tensors(meta_copy)
    return MetaCopy(
        meta_copy,
        real,
        tensors,
        Reached(meta_copy),
        IdentityMap((from_memo(memo, module), module) for module in modules),
    )


def set_mode(model: nn.Module, training: bool) -> None:
    """Call a model's train() or eval().

    Raises
    ------
    ModelError
        If it fails.
    """
    try:
        in_mode(model, training)
    except Exception as error:  # of a train() of the model's own
        raise ModelError(
            f"train({training}) of this {type(model).__name__} fails: {type(error).__name__}: "
            f"{error} A module that torch.export has made is one graph in one mode: give the "
            "model that was exported."
        ) from error


def put_tensors(
    model: nn.Module, new: IdentityMap[Tensor, Tensor]
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Put tensors into the places of registered ones, by which they are; returns (place, name,
    what was there).
    """
    changed: list[tuple[dict[str, Any], str, Tensor]] = []
    for module in model.modules():
        stores: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for store in stores:
            for name, tensor in store.items():
                if tensor is not None and tensor in new:
                    changed.append((store, name, tensor))
    for store, name, tensor in changed:
        value = new[tensor]
        wrap = isinstance(tensor, nn.Parameter) and not isinstance(value, nn.Parameter)
        store[name] = nn.Parameter(value, False) if wrap else value
    return changed


_UNCOPIED = frozenset(
    {bool, int, float, str, torch.dtype, type(None), types.BuiltinFunctionType, type}
)
_STORE_KINDS = frozenset({dict, collections.OrderedDict, set})


def copy_of(module: nn.Module, memo: Memo) -> nn.Module:
    """copy.deepcopy for a module tree, several times faster: most attributes are numbers, which
    need no copy.

    All modules are there before their attributes are copied, which may refer to any of them.
    """
    shells: list[nn.Module] = []
    whole: list[nn.Module] = []
    _make_shells(module, memo, shells, whole)
    for own in shells:
        new = from_memo(memo, own)
        for name, value in vars(own).items():
            try:
                new.__dict__[name] = attribute(name, value, memo)
            except Exception as error:  # whatever its type says
                path = next((path for path, below in module.named_modules() if below is own), "")
                raise TraceError(
                    _uncopied(type(module).__name__, f"{path}.{name}".lstrip("."), value, error)
                ) from error
    for own in whole:  # their own copies know nothing of what their hooks refer to
        for old, new in zip(own.modules(), from_memo(memo, own).modules(), strict=True):
            vars(new).update(
                {name: hooks_apart(vars(old)[name], memo) for name in HOOKS if vars(old)[name]}
            )
            vars(new).update(
                {name: vars(old)[name].copy() for name in HOOKS_CALLED if vars(old).get(name)}
            )
            # They may leave out what a user has put there, as those of a torch.fx.GraphModule do.
            vars(new).update(
                {
                    name: attribute(name, value, memo)
                    for name, value in vars(old).items()
                    if name not in vars(new)
                }
            )
    copied_module: nn.Module = from_memo(memo, module)
    return copied_module


def _uncopied(model: str, path: str, value: Any, error: Exception) -> str:
    what = f"{model} cannot be copied" + (
        f": its attribute {path!r} is a {type(value).__name__}" if path else ""
    )
    return (
        f"{what} ({type(error).__name__}: {error}). fxprune traces a copy so that your model "
        "stays untouched: make it copyable with copy.deepcopy, or keep it outside of the model."
    )


def _make_shells(
    module: nn.Module, memo: Memo, shells: list[nn.Module], whole: list[nn.Module]
) -> None:
    if in_memo(memo, module):
        return
    if hasattr(type(module), "__deepcopy__"):
        for child in module.children():
            copy_of(child, memo)
        to_memo(memo, module, copy.deepcopy(module, memo))
        whole.append(module)
        return
    if is_compiled(module):
        inner: Any = module._modules["_orig_mod"]
        _make_shells(inner, memo, shells, whole)
        to_memo(memo, module, Uncompiled(from_memo(memo, inner)))
        return
    kind: Any = type(module)
    to_memo(memo, module, kind.__new__(kind))
    shells.append(module)
    for child in module._modules.values():
        if child is not None:
            _make_shells(child, memo, shells, whole)


def attribute(name: str, value: Any, memo: Memo) -> Any:
    """A copy of a module's attribute; ``memo`` leads from the ``id`` of an object to what stands
    in its place.
    """
    if name == "_compiled_call_impl":  # it would call the module that is copied
        return None
    kind = type(value)
    if kind in _UNCOPIED or (kind is tuple and all(type(item) in _UNCOPIED for item in value)):
        return value
    if kind in _STORE_KINDS and not value:
        return value.copy()
    if kind is dict and name in ("_parameters", "_buffers", "_modules"):
        return {
            key: None if item is None else from_memo(memo, item) for key, item in value.items()
        }
    return hooks_apart(value, memo) if name in HOOKS else copied(value, memo)
