"""The skeleton of the smaller model: copies of the meta copy's modules, with smaller tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.common.dispatch import META
from fxprune.common.hooks import has_replaced_forward, put_in_mode
from fxprune.common.identity import IdentityMap, memo_of
from fxprune.coupling import Coupling
from fxprune.ops import Context
from fxprune.rewrite.survivors import Survivors
from fxprune.trace import copy_attribute, is_leaf, put_tensors
from fxprune.trace.copying import HOOKS, rebind_hooks

__all__ = [
    "copy_modules",
    "fill_tensors",
    "give_users_hooks",
    "modes_after_train",
    "redirect_attributes",
    "replace_module",
    "set_tensor",
    "smaller_tensor",
    "surviving_tensors",
    "units_of_original",
]


def smaller_tensor(tensor: Tensor, survivors: Survivors) -> Tensor:
    """Return a parameter or buffer of the size that survives of one of the meta copy.

    A meta tensor becomes a meta tensor. A tensor with data keeps its data and its size.
    """
    smaller = (
        torch.empty(survivors.shape(tensor), dtype=tensor.dtype, device=META)
        if tensor.is_meta
        else tensor.clone()
    )
    return nn.Parameter(smaller, False) if isinstance(tensor, nn.Parameter) else smaller


def units_of_original(coupling: Coupling) -> Context:
    """Return a context with the units of the original, in which no tensor has labels yet."""
    context = Context()
    context.units.pinning = False
    context.units.fresh(coupling.context.units.count - 1, -1)
    context.found.summed_groups = coupling.context.found.summed_groups
    return context


def replace_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Replace a module wherever the tree of ``root`` holds it, and return the new root."""
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return new if root is old else root


def redirect_attributes(
    copies: IdentityMap[nn.Module, nn.Module],
    final: IdentityMap[nn.Module, nn.Module],
    tensors: IdentityMap[Tensor, Tensor],
) -> None:
    """Make attributes of the emitted modules refer to emitted modules and tensors.

    Lists, methods and closures that a user's module holds may refer to modules and tensors of the
    meta copy. They are replaced by copies that refer to the emitted ones.

    Parameters
    ----------
    copies:
        Module of the meta copy -> its copy in the skeleton.
    final:
        Module of the meta copy -> the emitted module.
    tensors:
        Tensor of the meta copy -> tensor of the smaller model.
    """
    memo = memo_of([*final.items(), *tensors.items()])
    for key, copied in copies.items():
        attributes = vars(final[key])
        for name, value in vars(copied).items():
            if name not in (*_SKELETON_STORES, *HOOKS) and attributes.get(name) is value:
                attributes[name] = copy_attribute(name, value, memo)


def give_users_hooks(
    users: IdentityMap[nn.Module, nn.Module], final: IdentityMap[nn.Module, nn.Module]
) -> None:
    """Give the emitted modules the hooks of the user's modules.

    The hooks of the meta copy are not suitable: they collected what the analysis ran.

    Parameters
    ----------
    users:
        Module of the meta copy -> the user's module.
    final:
        Module of the meta copy -> the emitted module.
    """
    memo = memo_of((user, final[key]) for key, user in users.items() if key in final)
    for key, user in users.items():
        for store in HOOKS if key in final else ():
            vars(final[key])[store] = rebind_hooks(vars(user)[store], memo)


_SKELETON_STORES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "training",
)


def copy_modules(
    module: nn.Module,
    replaced: IdentityMap[Tensor, Tensor],
    done: IdentityMap[nn.Module, nn.Module],
    whole: bool = False,
    keep_classes: bool = False,
) -> nn.Module:
    """Return the module tree of the emitted model. Modules that are shared stay shared.

    Leaves are copied with all modules below them. Other modules become plain containers, unless
    Python code calls their methods, or a user replaced their forward. Such modules, and those
    below them, keep their class and their attributes.

    Parameters
    ----------
    module:
        The root of a tree of the meta copy.
    replaced:
        Tensor of the meta copy -> smaller tensor.
    done:
        Module of the meta copy -> its copy; this function adds to it.
    whole:
        Whether the module belongs to a leaf.
    keep_classes:
        Whether Python code calls methods of the module.
    """
    if module in done:
        return done[module]
    whole = whole or is_leaf(module)
    keep_classes = keep_classes or has_replaced_forward(module)
    new = done[module] = _copy_alone(module, keep_class=whole or keep_classes)
    stores: tuple[dict[str, Any], ...] = (new._parameters, new._buffers)
    for store in stores:
        for name, tensor in store.items():
            if tensor is not None and tensor in replaced:
                store[name] = replaced[tensor]
    for name, child in module._modules.items():
        if child is not None:
            new._modules[name] = copy_modules(child, replaced, done, whole, keep_classes)
    return new


def _copy_alone(module: nn.Module, keep_class: bool) -> nn.Module:
    """Return a copy of a module that shares its tensors and the modules below it.

    If the class is not kept, the copy is a plain container.
    """
    kind: Any = type(module)
    new: nn.Module = kind.__new__(kind) if keep_class else nn.Module()
    if keep_class:
        new.__dict__.update(module.__dict__)
    if isinstance(module, fx.GraphModule) and keep_class:
        # each GraphModule has a class of its own, which gets its forward when a graph is set
        new.graph = copy.deepcopy(module.graph)
    for store in _SKELETON_STORES[:-1]:
        new.__dict__[store] = module.__dict__[store].copy()
    new.training = module.training
    return new


def modes_after_train(model: nn.Module) -> dict[bool, dict[str, bool]]:
    """Return the modules whose mode differs from the model's after ``train()`` or ``eval()``.

    A user's ``train()`` may, for example, leave some normalisations in evaluation mode.

    Returns
    -------
    Mode of the model -> name of a module -> mode of that module.
    """
    before = {module: module.training for module in model.modules()}
    found = {}
    try:
        for mode in (True, False):
            put_in_mode(model, mode)
            found[mode] = _modes_other_than(mode, model)
    finally:
        for module, mode in before.items():
            module.training = mode
    return found


def _modes_other_than(mode: bool, model: nn.Module) -> dict[str, bool]:
    """Return the modules below that are not in a mode, by name, with the mode they are in."""
    modes = {name: module.training for name, module in model.named_modules()}
    return {name: own for name, own in modes.items() if own is not mode}


def surviving_tensors(coupling: Coupling, survivors: Survivors) -> IdentityMap[Tensor, Tensor]:
    """Return the surviving elements of the user's tensors, by tensor of the meta copy."""
    real = coupling.meta_copy.real
    out: IdentityMap[Tensor, Tensor] = IdentityMap()
    for tensor in coupling.parameters.values():
        source = real[tensor]
        if source.layout is not torch.strided:
            out[tensor] = source.detach().clone()
            continue
        taken = survivors.take(tensor, source.detach()) if tensor.is_meta else source.detach()
        if taken.untyped_storage().data_ptr() == source.untyped_storage().data_ptr():
            taken = taken.clone()
        taken = _in_format_of(source, taken)
        out[tensor] = (
            nn.Parameter(taken, source.requires_grad)
            if isinstance(source, nn.Parameter)
            else taken
        )
    return out


def _in_format_of(source: Tensor, taken: Tensor) -> Tensor:
    """Return a tensor contiguous in the memory format of ``source``.

    The strides tell which format that is. They do so, too, if sizes of 1 make a tensor contiguous
    in both formats.
    """
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(source.dim())
    if (
        last is None
        or source.stride() != torch.empty(source.shape, device=META, memory_format=last).stride()
    ):
        return taken.contiguous()
    return torch.empty_like(taken, memory_format=last).copy_(taken)


def fill_tensors(
    root: nn.Module, real: IdentityMap[Tensor, Tensor], meta: IdentityMap[Tensor, Tensor]
) -> None:
    """Replace the meta tensors, with which the graph was checked, by real tensors.

    Parameters
    ----------
    root:
        The emitted model.
    real:
        Tensor of the meta copy -> real tensor.
    meta:
        Tensor of the meta copy -> meta tensor in the emitted model.
    """
    put_tensors(root, IdentityMap((smaller, real[key]) for key, smaller in meta.items()))
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                delattr(module, name)  # a hook computes this tensor at each call


def set_tensor(root: nn.Module, target: str, value: Tensor) -> None:
    """Set the attribute at the dotted path ``target`` below ``root``."""
    path, _, name = target.rpartition(".")
    setattr(root.get_submodule(path), name, value)
