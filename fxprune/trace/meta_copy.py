"""Copies of a model without data in its parameters.

Such a copy is traced, so that the user's model is neither called nor changed.
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
    """A copy of a model's structure, with parameters on the meta device.

    Attributes
    ----------
    model:
        The copied model.
    real:
        For each tensor of the copy, the tensor of the user's model.
    tensors:
        The parameters and buffers of the copy, by name.
    reached:
        What the code of the whole model can reach.
    modules:
        For each module of the copy, the module of the user's model.
    """

    model: nn.Module
    real: IdentityMap[Tensor, Tensor]
    tensors: dict[str, Tensor]
    reached: Reached
    modules: IdentityMap[nn.Module, nn.Module] = field(default_factory=IdentityMap)

    @contextmanager
    def holding(self, values: IdentityMap[Tensor, Tensor]) -> Iterator[nn.Module]:
        """Replace tensors of the copy inside this context.

        Parameters
        ----------
        values:
            For tensors of the copy, the tensors to use instead.
        """
        changed = put_tensors(self.model, values)
        try:
            yield self.model
        finally:
            for store, name, tensor in changed:
                store[name] = tensor

    def instance(self, values: IdentityMap[Tensor, Tensor] | None = None) -> nn.Module:
        """Return a copy of the meta copy's model that can be run.

        Parameters
        ----------
        values:
            For each tensor of the meta copy, the tensor to use instead. Default: the user's
            tensors, with buffers copied.
        """
        memo: Memo = {}
        for tensor in self.tensors.values():
            own = self.real[tensor].detach() if values is None else values[tensor]
            to_memo(
                memo,
                tensor,
                nn.Parameter(own, False) if isinstance(tensor, nn.Parameter) else own.clone(),
            )
        if values is not None:  # the model's constants have to be on the same device
            place = next((value.device for value in values.values()), self.device)
            for key, own in self.real.items():
                if not in_memo(memo, key) and own.grad_fn is None:
                    to_memo(memo, key, own.detach().to(place, copy=True))
        return copy_of(self.model, memo)

    @property
    def device(self) -> torch.device:
        """The device of the user's model; the CPU if the model has no tensors."""
        return next((tensor.device for tensor in self.real.values()), torch.device("cpu"))

    def part(self, path: str) -> MetaCopy:
        """Return the meta copy of a submodule.

        Parameters
        ----------
        path:
            The path of the submodule below the model.
        """
        model = self.model.get_submodule(path)
        tensors = named_tensors(model)
        return replace(self, model=model, tensors=tensors)


def meta_copy_of(model: nn.Module) -> MetaCopy:
    """Copy the structure of a model.

    Parameters and float buffers become meta tensors, other buffers become copies on the CPU, and
    constants keep their values.

    Parameters
    ----------
    model:
        The user's model; it is left as it is.

    Raises
    ------
    TraceError
        If an attribute of the model cannot be copied.
    """
    memo: Memo = {}
    real: IdentityMap[Tensor, Tensor] = IdentityMap()

    def stand_in(tensor: Tensor) -> None:
        """Make the meta copy's tensor for a parameter or buffer."""
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
                # neither a parameter nor a buffer: a constant whose value may matter, or a tensor
                # that a hook computes at each call
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
    except Exception as error:  # from a __deepcopy__ of the user
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
    """Call a model's ``train()`` or ``eval()``.

    Parameters
    ----------
    model:
        The model, changed in place.
    training:
        Whether to call ``train()``.

    Raises
    ------
    ModelError
        If the call fails.
    """
    try:
        in_mode(model, training)
    except Exception as error:  # from a train() of the model's own
        raise ModelError(
            f"train({training}) of this {type(model).__name__} fails: {type(error).__name__}: "
            f"{error} A module that torch.export has made is one graph in one mode: give the "
            "model that was exported."
        ) from error


def put_tensors(
    model: nn.Module, new: IdentityMap[Tensor, Tensor]
) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Replace registered parameters and buffers of a model.

    Parameters
    ----------
    model:
        The model, changed in place.
    new:
        For tensors of the model, the tensors to use instead.

    Returns
    -------
    For each replaced tensor the dictionary that holds it, its name there, and the old tensor.
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
    """Copy a module tree like ``copy.deepcopy``, but several times faster.

    Most attributes are numbers, which need no copy. All modules are created before their
    attributes are copied, because an attribute may refer to any module.

    Parameters
    ----------
    module:
        The root of the tree.
    memo:
        Objects to replace, and what replaces them. It must have all parameters and buffers; copies
        are added to it.

    Raises
    ------
    TraceError
        If an attribute cannot be copied; the message names it.
    """
    shells: list[nn.Module] = []
    whole: list[nn.Module] = []
    _make_shells(module, memo, shells, whole)
    for own in shells:
        new = from_memo(memo, own)
        for name, value in vars(own).items():
            try:
                new.__dict__[name] = attribute(name, value, memo)
            except Exception as error:  # the attribute's class may raise any error
                path = next((path for path, below in module.named_modules() if below is own), "")
                raise TraceError(
                    _uncopied(type(module).__name__, f"{path}.{name}".lstrip("."), value, error)
                ) from error
    for own in whole:  # their __deepcopy__ knows nothing of the objects that hooks refer to
        for old, new in zip(own.modules(), from_memo(memo, own).modules(), strict=True):
            vars(new).update(
                {name: hooks_apart(vars(old)[name], memo) for name in HOOKS if vars(old)[name]}
            )
            vars(new).update(
                {name: vars(old)[name].copy() for name in HOOKS_CALLED if vars(old).get(name)}
            )
            # it may leave out attributes of the user, as that of torch.fx.GraphModule does
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
    """Return the message for a model, or an attribute of it, that cannot be copied."""
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
    """Create the modules of a copy, without attributes.

    Parameters
    ----------
    shells:
        The modules whose attributes remain to be copied are added here.
    whole:
        The modules that copy themselves (by ``__deepcopy__``) are added here.
    """
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
    """Copy an attribute of a module.

    Parameters
    ----------
    name:
        The name of the attribute.
    value:
        Its value.
    memo:
        Objects to replace, and what replaces them.
    """
    if name == "_compiled_call_impl":  # it would call the original module
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
