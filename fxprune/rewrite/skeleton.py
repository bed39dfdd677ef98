"""The modules of the smaller model: copies of the original's, with smaller tensors."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.common.dispatch import META
from fxprune.common.hooks import has_own_forward, in_mode
from fxprune.common.identity import IdentityMap, memo_of
from fxprune.coupling import Coupling
from fxprune.ops import Context
from fxprune.rewrite.survivors import Survivors
from fxprune.trace import attribute, is_leaf, put_tensors
from fxprune.trace.copying import HOOKS, hooks_of

__all__ = [
    "fill_tensors",
    "hook_all",
    "own_modes",
    "refer_to",
    "set_tensor",
    "skeleton",
    "smaller_tensor",
    "survivors_of",
    "units_of_original",
    "with_module",
]


def smaller_tensor(tensor: Tensor, survivors: Survivors) -> Tensor:
    """A tensor of the size that is left of a parameter or buffer, without data where that has
    none.
    """
    made = (
        torch.empty(survivors.shape(tensor), dtype=tensor.dtype, device=META)
        if tensor.is_meta
        else tensor.clone()
    )
    return nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made


def units_of_original(coupling: Coupling) -> Context:
    """A context in which labels are the units of the original, and nothing carries any yet."""
    context = Context()
    context.units.pinning = False
    context.units.fresh(coupling.context.units.count - 1, -1)
    context.found.summed_groups = coupling.context.found.summed_groups
    return context


def with_module(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The tree with one module in the place of another, wherever that stands."""
    for module in root.modules():
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return new if root is old else root


def refer_to(
    made: IdentityMap[nn.Module, nn.Module],
    final: IdentityMap[nn.Module, nn.Module],
    tensors: IdentityMap[Tensor, Tensor],
) -> None:
    """What Python holds of the meta copy's modules and tensors (in lists, methods, closures) are
    the emitted ones from now on.

    ``made`` leads from the id of a meta copy's module to its skeleton, ``final`` to the module
    that was emitted.
    """
    memo = memo_of([*final.items(), *tensors.items()])
    for key, below in made.items():
        own = vars(final[key])
        for name, value in vars(below).items():
            if name not in (*_SKELETON_STORES, *HOOKS) and own.get(name) is value:
                own[name] = attribute(name, value, memo)


def hook_all(
    users: IdentityMap[nn.Module, nn.Module], final: IdentityMap[nn.Module, nn.Module]
) -> None:
    """The emitted modules have the hooks of the user's: those of the meta copy collected what was
    run for the analysis.
    """
    memo = memo_of((user, final[key]) for key, user in users.items() if key in final)
    for key, user in users.items():
        for store in HOOKS if key in final else ():
            vars(final[key])[store] = hooks_of(vars(user)[store], memo)


_SKELETON_STORES = (
    "_parameters",
    "_buffers",
    "_modules",
    "_non_persistent_buffers_set",
    "training",
)


def skeleton(
    module: nn.Module,
    replaced: IdentityMap[Tensor, Tensor],
    done: IdentityMap[nn.Module, nn.Module],
    whole: bool = False,
    keep_classes: bool = False,
) -> nn.Module:
    """The module tree of the emitted model. Sharing is kept.

    Leaves are copied with all below them, the rest are plain containers, unless there is Python
    that calls their methods, or their forward was replaced: what a user has put on a module stays
    on it.
    """
    if module in done:
        return done[module]
    kind: Any = type(module)
    leaf = whole or is_leaf(module)
    keep_classes = keep_classes or has_own_forward(module)
    own_class = leaf or keep_classes
    new = kind.__new__(kind) if own_class else nn.Module()
    if own_class:
        new.__dict__.update(module.__dict__)
    if isinstance(module, fx.GraphModule) and own_class:
        # each has a class of its own, which gets its forward with the graph
        new.graph = copy.deepcopy(module.graph)
    for store in _SKELETON_STORES[:-1]:
        new.__dict__[store] = module.__dict__[store].copy()
    new.training = module.training
    done[module] = new
    tensors: tuple[dict[str, Any], ...] = (new._parameters, new._buffers)
    for own in tensors:
        for name, tensor in own.items():
            if tensor is not None and tensor in replaced:
                own[name] = replaced[tensor]
    for name, child in module._modules.items():
        if child is not None:
            new._modules[name] = skeleton(child, replaced, done, leaf, keep_classes)
    return new


def own_modes(model: nn.Module) -> dict[bool, dict[str, bool]]:
    """For both modes of the model the modules that have another mode then, as a ``train()`` or an
    ``eval()`` of the user's says.
    """
    before = {module: module.training for module in model.modules()}
    found = {}
    try:
        for mode in (True, False):
            in_mode(model, mode)
            found[mode] = {
                name: module.training
                for name, module in model.named_modules()
                if module.training is not mode
            }
    finally:
        for module, mode in before.items():
            module.training = mode
    return found


def survivors_of(coupling: Coupling, survivors: Survivors) -> IdentityMap[Tensor, Tensor]:
    """The surviving elements of the user's tensors, by the meta copy's tensors."""
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
    """Contiguous, in the memory format of the source. Strides tell it, also where sizes of 1 make
    both formats contiguous.
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
    """Put real tensors in the place of the meta tensors that the graph was checked with."""
    put_tensors(root, IdentityMap((stand_in, real[key]) for key, stand_in in meta.items()))
    for module in root.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, Tensor) and value.is_meta:
                delattr(module, name)  # a hook computes it at each call


def set_tensor(root: nn.Module, target: str, value: Tensor) -> None:
    path, _, name = target.rpartition(".")
    setattr(root.get_submodule(path), name, value)
