"""What the front doors are given, checked before anything is done with it."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.budget import Budget
from fxprune.errors import ArgumentError, ModelError
from fxprune.latency import Setting

__all__ = ["budget_of", "check_model", "kept_parameters", "of_whole_heads", "setting_of"]


def kept_parameters(model: nn.Module, keep: Any) -> tuple[str, ...]:
    """Names of all parameters and buffers below the modules that ``keep`` names."""
    entries = [keep] if isinstance(keep, (str, nn.Module)) else list(keep)
    return _tensors_below(model, {name for entry in entries for name in _matches(model, entry, "keep")})


def of_whole_heads(model: nn.Module, units: str | Mapping[str, str]) -> tuple[str, ...]:
    """Names of all parameters and buffers whose heads are units."""
    chosen = units if isinstance(units, Mapping) else {"*": units}
    whole: set[str] = set()
    for glob, unit in chosen.items():
        if unit not in ("dims", "heads"):
            raise ArgumentError(f'units: {unit!r} is neither "dims" (of heads, balanced over them) nor "heads" (whole ones).')
        found = set(_matches(model, glob, "units"))
        below = {name for name, _ in model.named_modules(remove_duplicate=False) if any(_is_below(name, top) for top in found)}
        whole = whole | below if unit == "heads" else whole - below
    return _tensors_below(model, whole, recurse=False)


def _is_below(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")


def _matches(model: nn.Module, entry: Any, option: str) -> list[str]:
    """Names of the modules that an entry of an option names: by a name, a glob, or as an object."""
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(entry, nn.Module):
        found = [name for name, module in modules.items() if module is entry]
    elif isinstance(entry, str):
        found = [name for name in modules if fnmatch.fnmatchcase(name, entry)] if entry else []
    else:
        raise ArgumentError(f"{option} holds a {type(entry).__name__}: give module names, globs or module objects.")
    if not found:
        what = repr(entry) if isinstance(entry, str) else f"the given {type(entry).__name__}"
        some = ", ".join([n for n in modules if n][:8])
        raise ArgumentError(f"{option}: {what} matches no module of this {type(model).__name__}. Its modules are: {some}, ...")
    return found


def _tensors_below(model: nn.Module, modules: Collection[str], *, recurse: bool = True) -> tuple[str, ...]:
    """Names of the floating-point parameters and buffers of these modules, and of the modules below them."""
    if not modules:
        return ()
    own = [model.get_submodule(name) for name in modules]
    tensors = {id(t) for module in own for t in (*module.parameters(recurse), *module.buffers(recurse))}
    every = [*model.named_parameters(), *model.named_buffers()]
    return tuple(name for name, tensor in every if id(tensor) in tensors and tensor.is_floating_point())


def budget_of(
    channels: float | None,
    macs: float | None,
    params: float | None,
    latency: float | None,
    scope: str,
    layers: Mapping[str, float] | None,
    round_to: int,
    min_channels: int,
) -> Budget:
    layers = dict(layers or {})
    shares = (
        ("channels", channels, "channels"),
        ("macs", macs, "MACs"),
        ("params", params, "parameters"),
        ("latency", latency, "the time"),
    )
    if all(value is None for _, value, _ in shares) and not layers:
        raise ArgumentError("nothing says how much to prune: give channels=, macs=, params=, latency= or layers=, e.g. macs=0.5.")
    for name, value, what in shares:
        if value is not None:
            _check_number(name, value, f"the share of {what} to keep", above=0, most=1)
    for glob, share in layers.items():
        _check_number(f"layers[{glob!r}]", share, "the share of channels that these layers keep", above=0, most=1)
    if scope not in ("group", "global"):
        raise ArgumentError(f'scope={scope!r} is neither "group" (every group keeps the share) nor "global" (all groups together).')
    _check_integer("round_to", round_to)
    _check_integer("min_channels", min_channels)
    return Budget(channels, macs, params, latency, scope, layers, round_to, min_channels)


def setting_of(device: torch.device | str | Setting | None, budget: Budget, example_inputs: Any) -> Setting | None:
    """Where a latency budget counts; None if there is none."""
    if budget.latency is None:
        if device is not None:
            raise ArgumentError("device= says where latency counts: give latency= too. The model is pruned on the device it is on.")
        return None
    if any(leaf.is_meta for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)):
        raise ArgumentError("latency= is measured, on example inputs with data: these are meta tensors.")
    return device if isinstance(device, Setting) else Setting(None if device is None else str(device))


def _check_number(name: str, value: Any, meaning: str, *, above: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or not above < value <= most:
        raise ArgumentError(f"{name}={value!r} is outside ({above}, {most}]: it is {meaning}, e.g. {name}=0.5.")


def _check_integer(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{name}={value!r} must be a whole number of at least 1.")


def check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module has no Python code to trace: prune the nn.Module it was made from.")
    if "forward" in vars(model):
        raise ModelError(
            f"forward was replaced on this {type(model).__name__} object: the class's own forward would be traced. "
            "Put the new forward into a subclass or a wrapper module."
        )
    parameters = list(model.named_parameters())
    tensors: list[tuple[str, Tensor]] = [*parameters, *model.named_buffers()]
    lazy = [name for name, t in tensors if nn.parameter.is_lazy(t)]
    if lazy:
        raise ModelError(f"{lazy[0]!r} is uninitialised (a lazy module): run the model once on an input, then prune it.")
    devices = {t.device: name for name, t in reversed(tensors)}
    if len(devices) > 1:
        where = ", ".join(sorted(f"{name} on {device}" for device, name in devices.items()))
        raise ModelError(f"the model lies on {len(devices)} devices ({where}): move it to one with model.to(device) first.")
    for name, module in model.named_modules():
        kind = type(module)
        quantised = "quantized" in kind.__module__ and any(p in kind.__module__ for p in ("nn.quantized", "nn.intrinsic.quantized"))
        if quantised and "Functional" not in kind.__name__.removeprefix("Q"):
            raise _quantised(name or "the model", kind.__name__)
    for name, tensor in tensors:
        if tensor.is_quantized or type(tensor.data) not in (Tensor, nn.Parameter):
            raise _quantised(name, type(tensor.data).__name__ if not tensor.is_quantized else str(tensor.dtype))
    readable = {name: tensor.detach() for name, tensor in parameters if tensor.is_floating_point() and not tensor.is_meta}
    norms = [torch.linalg.vector_norm(tensor).double() for tensor in readable.values()]
    if norms and bool(torch.stack(norms).isnan().any()):
        name = next(name for name, norm in zip(readable, norms, strict=True) if bool(norm.isnan()))
        raise ModelError(f"parameter {name!r} contains NaN, so nothing can be ranked: load or initialise the weights first.")


def _quantised(name: str, kind: str) -> ModelError:
    return ModelError(f"{name!r} is already quantised ({kind}): prune the float model first, then quantise the result.")
