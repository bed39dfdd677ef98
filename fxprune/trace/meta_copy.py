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
from fxprune.common.hooks import put_in_mode
from fxprune.common.identity import IdentityMap, Memo, from_memo, in_memo, to_memo
from fxprune.errors import ModelError, TraceError
from fxprune.trace.copying import HOOKS, HOOKS_CALLED, copy_hooks, copy_rebound
from fxprune.trace.decompose import lower
from fxprune.trace.reach import Reached

__all__ = ["MetaCopy", "copy_attribute", "copy_module", "meta_copy_of", "put_tensors", "set_mode"]


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
    def with_tensors(self, values: IdentityMap[Tensor, Tensor]) -> Iterator[nn.Module]:
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
            new = self.real[tensor].detach() if values is None else values[tensor]
            is_parameter = isinstance(tensor, nn.Parameter)
            to_memo(memo, tensor, nn.Parameter(new, False) if is_parameter else new.clone())
        if values is not None:  # the model's constants have to be on the same device
            device = next((value.device for value in values.values()), self.device)
            for tensor, real in self.real.items():
                if not in_memo(memo, tensor) and real.grad_fn is None:
                    to_memo(memo, tensor, real.detach().to(device, copy=True))
        return copy_module(self.model, memo)

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
    modules = list(model.modules())
    for tensor in _registered_tensors(modules):
        if not in_memo(memo, tensor):
            real[to_memo(memo, tensor, _copied_registered(tensor))] = tensor
    for tensor in _tensor_attributes(modules):
        if not in_memo(memo, tensor):
            real[to_memo(memo, tensor, _copied_attribute(tensor))] = tensor
    try:
        new_model = copy_module(model, memo)
    except TraceError:
        raise
    except Exception as error:  # from a __deepcopy__ of the user
        raise TraceError(_uncopied(type(model).__name__, "", model, error)) from error
    lowered = lower(new_model)
    pairs = ((from_memo(memo, module), module) for module in modules)
    return MetaCopy(lowered, real, named_tensors(lowered), Reached(lowered), IdentityMap(pairs))


def _registered_tensors(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Yield the parameters and buffers of modules."""
    for module in modules:
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                yield tensor


def _copied_registered(tensor: Tensor) -> Tensor:
    """Return the meta copy of a parameter or buffer."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(torch.empty_like(tensor, device=META), requires_grad=False)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_meta:
        return torch.empty_like(tensor, device=META)
    return tensor.detach().to("cpu", copy=True)


def _tensor_attributes(modules: list[nn.Module]) -> Iterator[Tensor]:
    """Yield the tensors in plain attributes of modules."""
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor):
                yield value


def _copied_attribute(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that is neither a parameter nor a buffer.

    It is a constant, whose values may matter, or a hook computes it at each call.
    """
    if tensor.grad_fn is None:
        return tensor.detach().clone()
    return torch.empty_like(tensor, device=META)


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
        put_in_mode(model, training)
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


def copy_module(module: nn.Module, memo: Memo) -> nn.Module:
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
    for shell in shells:
        new = from_memo(memo, shell)
        for name, value in vars(shell).items():
            try:
                new.__dict__[name] = copy_attribute(name, value, memo)
            except Exception as error:  # the attribute's class may raise any error
                paths = (path for path, below in module.named_modules() if below is shell)
                path = f"{next(paths, '')}.{name}".lstrip(".")
                raise TraceError(_uncopied(type(module).__name__, path, value, error)) from error
    for root in whole:
        for old, new in zip(root.modules(), from_memo(memo, root).modules(), strict=True):
            _complete(new, old, memo)
    copied_module: nn.Module = from_memo(memo, module)
    return copied_module


def _complete(new: nn.Module, old: nn.Module, memo: Memo) -> None:
    """Give a module that a ``__deepcopy__`` has made its hooks and missing attributes.

    A ``__deepcopy__`` knows nothing of the objects that hooks refer to. It may leave out
    attributes of the user, as that of ``torch.fx.GraphModule`` does.
    """
    source, target = vars(old), vars(new)
    target.update({name: copy_hooks(source[name], memo) for name in HOOKS if source[name]})
    target.update({name: source[name].copy() for name in HOOKS_CALLED if source.get(name)})
    for name, value in source.items():
        if name not in target:
            target[name] = copy_attribute(name, value, memo)


def _uncopied(model: str, path: str, value: Any, error: Exception) -> str:
    """Return the message for a model, or an attribute of it, that cannot be copied."""
    where = f": its attribute {path!r} is a {type(value).__name__}" if path else ""
    return (
        f"{model} cannot be copied{where} ({type(error).__name__}: {error}). "
        "fxprune traces a copy so that your model stays untouched: make it copyable with "
        "copy.deepcopy, or keep it outside of the model."
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
            copy_module(child, memo)
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


def copy_attribute(name: str, value: Any, memo: Memo) -> Any:
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
        entries = value.items()
        return {key: item if item is None else from_memo(memo, item) for key, item in entries}
    return copy_hooks(value, memo) if name in HOOKS else copy_rebound(value, memo)
