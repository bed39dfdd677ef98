"""What the front doors are given, checked before anything is done with it."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxprune.budget import Budget
from fxprune.doors import read
from fxprune.errors import ArgumentError, ModelError
from fxprune.latency import Setting
from fxprune.plan import Plan, check_groups
from fxprune.values import share, whole

__all__ = [
    "budget_of",
    "check_model",
    "check_plan",
    "check_pruned",
    "kept_modules",
    "kept_parameters",
    "of_whole_heads",
    "setting_of",
]


def kept_parameters(model: nn.Module, keep: Any) -> tuple[str, ...]:
    """Names of all parameters and buffers below the modules that ``keep`` names."""
    return _tensors_below(model, kept_modules(model, keep))


def kept_modules(model: nn.Module, keep: Any) -> tuple[str, ...]:
    """Names of the modules that ``keep`` names, in the order in which it does.

    Raises
    ------
    ArgumentError
        If one of its entries names none.
    """
    if isinstance(keep, (str, nn.Module)):
        entries = [keep]
    elif isinstance(keep, Iterable) and not isinstance(keep, (Tensor, Mapping, type, bytes)):
        entries = list(read(keep, "keep"))
    else:
        raise ArgumentError(
            f"keep is {_kind_of(keep)}: give a module name, a glob, a module object, or a list of these; () keeps none."
        )
    return tuple(dict.fromkeys(name for entry in entries for name in _matches(model, entry, "keep")))


def of_whole_heads(model: nn.Module, units: str | Mapping[str, str]) -> tuple[str, ...]:
    """Names of all parameters and buffers whose heads are units."""
    if not isinstance(units, (str, Mapping)):
        raise ArgumentError(f'units is {_kind_of(units)}: give "dims" or "heads", or a dict from globs of module names to either.')
    chosen = units if isinstance(units, Mapping) else {"*": units}
    heads: set[str] = set()
    for glob, unit in chosen.items():
        if not isinstance(unit, str) or unit not in ("dims", "heads"):
            raise ArgumentError(f'units: {unit!r:.60} is neither "dims" (of heads, balanced over them) nor "heads" (whole ones).')
        found = set(_matches(model, glob, "units"))
        below = {name for name, _ in model.named_modules(remove_duplicate=False) if any(_is_below(name, top) for top in found)}
        heads = heads | below if unit == "heads" else heads - below
    return _tensors_below(model, heads, recurse=False)


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
        raise ArgumentError(f"{option} holds {_kind_of(entry)}: give module names, globs or module objects.")
    if not found:
        what = repr(entry) if isinstance(entry, str) else f"the given {type(entry).__name__}"
        raise ArgumentError(
            f"{option}: {what} matches no module of this {type(model).__name__}. {_named_like(entry, list(modules))}"
        )
    return found


def _named_like(entry: Any, names: Sequence[str]) -> str:
    """A hint at the names that an entry which names nothing may have meant."""
    names = [name for name in names if name]
    near = difflib.get_close_matches(entry, names, n=3) if isinstance(entry, str) else []
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return (
        f"Its modules are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}." if names else "It has no modules below it."
    )


def _kind_of(value: Any) -> str:
    """What a value is, for a message: its type, and that it is a class, if it is one."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


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
    """The budget that the arguments of :func:`fxprune.prune` describe.

    Raises
    ------
    ArgumentError
        If one of them is outside what it may be.
    """
    if layers is not None and not isinstance(layers, Mapping):
        raise ArgumentError(
            f'layers is {_kind_of(layers)}: give a dict from globs of module names to shares, as {{"layer4.*": 0.3}}.'
        )
    layers = dict(layers or {})
    asked = {"channels": channels, "macs": macs, "params": params, "latency": latency}
    if all(value is None for value in asked.values()) and not layers:
        raise ArgumentError("nothing says how much to prune: give channels=, macs=, params=, latency= or layers=, e.g. macs=0.5.")
    shares: dict[str, Any] = {
        name: None if value is None else share(name, value, f"the share of {_SHARED[name]} to keep")
        for name, value in asked.items()
    }
    for glob, value in layers.items():
        if not isinstance(glob, str):
            raise ArgumentError(f"layers: {_kind_of(glob)} is no name: its keys are globs of module names, as {{'layer4.*': 0.3}}.")
        layers[glob] = share(f"layers[{glob!r}]", value, "the share of channels that these layers keep")
    if not isinstance(scope, str) or scope not in ("group", "global"):
        raise ArgumentError(
            f'scope={scope!r:.60} is neither "group" (every group keeps the share) nor "global" (all groups together).'
        )
    least = {name: whole(name, value) for name, value in (("round_to", round_to), ("min_channels", min_channels))}
    return Budget(**shares, scope=scope, layers=layers, **least)


_SHARED = {"channels": "channels", "macs": "MACs", "params": "parameters", "latency": "the time"}


def setting_of(device: torch.device | str | Setting | None, budget: Budget, example_inputs: Any) -> Setting | None:
    """Where a latency budget counts; None if there is none."""
    if budget.latency is None:
        if device is not None:
            raise ArgumentError("device= says where latency counts: give latency= too. The model is pruned on the device it is on.")
        return None
    if any(leaf.is_meta for leaf in tree_leaves(example_inputs) if isinstance(leaf, Tensor)):
        raise ArgumentError("latency= is measured, on example inputs with data: these are meta tensors.")
    return device if isinstance(device, Setting) else Setting(None if device is None else str(device))


def check_pruned(pruned: Any, function: str) -> None:
    """Refuse what is no result of :func:`fxprune.prune`, for a function that takes one."""
    if not isinstance(getattr(pruned, "plan", None), Plan) or not isinstance(getattr(pruned, "model", None), nn.Module):
        raise ArgumentError(
            f"{function}(model, pruned, ...) takes what fxprune.prune, apply or load gave as pruned, and got {_kind_of(pruned)}."
        )


def check_plan(plan: Any, function: str) -> None:
    """Refuse what is no plan, for a function that takes one; a plan that someone put together is checked.

    Raises
    ------
    ArgumentError, PlanError
    """
    if not isinstance(plan, Plan):
        ways = {str: "Plan.from_json(text) reads one", Path: "fxprune.load(folder, factory) reads a folder"}
        way = next((way for kind, way in ways.items() if isinstance(plan, kind)), "prune(...).plan is one")
        raise ArgumentError(f"{function}(plan, model) takes a Plan, and got {_kind_of(plan)}: {way}.")
    check_groups(plan)


def check_model(model: Any) -> None:
    """Refuse what cannot be pruned, whatever the example.

    Raises
    ------
    ModelError
        It names the module or the tensor, and the way out.
    """
    if not isinstance(model, nn.Module):
        inner = " Give its .model." if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ModelError(f"expected a torch.nn.Module as model, got {_kind_of(model)}.{inner}")
    _check_modules(model)
    parameters = list(model.named_parameters())
    tensors: list[tuple[str, Tensor]] = [*parameters, *model.named_buffers()]
    lazy = [name for name, t in tensors if nn.parameter.is_lazy(t)]
    if lazy:
        raise ModelError(f"{lazy[0]!r} is uninitialised (a lazy module): run the model once on an input, then prune it.")
    for name, tensor in tensors:
        _check_kind(name, tensor)
    devices = {t.device: name for name, t in reversed(tensors)}
    if len(devices) > 1:
        where = ", ".join(sorted(f"{name} on {device}" for device, name in devices.items()))
        raise ModelError(f"the model lies on {len(devices)} devices ({where}): move it to one with model.to(device) first.")
    readable = {name: tensor.detach() for name, tensor in parameters if tensor.is_floating_point() and not tensor.is_meta}
    norms = [torch.linalg.vector_norm(tensor).double() for tensor in readable.values()]
    if norms and bool(torch.stack(norms).isnan().any()):
        name = next(name for name, norm in zip(readable, norms, strict=True) if bool(norm.isnan()))
        raise ModelError(f"parameter {name!r} contains NaN, so nothing can be ranked: load or initialise the weights first.")


def _check_modules(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError("a TorchScript module has no Python code to trace: prune the nn.Module it was made from.")
    if "forward" in vars(model):
        raise ModelError(
            f"forward was replaced on this {type(model).__name__} object: the class's own forward would be traced. "
            "Put the new forward into a subclass or a wrapper module."
        )
    _check_acyclic(model)
    for name, module in model.named_modules():
        kind = type(module)
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"{name!r} is a TorchScript module, which has no Python code to trace: put the nn.Module it was made from in "
                "its place."
            )
        quantised = "quantized" in kind.__module__ and any(p in kind.__module__ for p in ("nn.quantized", "nn.intrinsic.quantized"))
        if quantised and "Functional" not in kind.__name__.removeprefix("Q"):
            raise _quantised(name or "the model", kind.__name__)


def _check_acyclic(model: nn.Module) -> None:
    """Refuse a module that is below itself: nothing that goes through its modules would come to an end."""
    done: set[nn.Module] = set()

    def visit(module: nn.Module, above: Mapping[nn.Module, str], prefix: str) -> None:
        for name, child in module._modules.items():
            if child is not None and child in above:
                raise ModelError(
                    f"{prefix}{name} is {above[child]}, so this {type(model).__name__} contains itself. Hold the module above "
                    "where torch does not register it: in a list, or with object.__setattr__."
                )
            if child is not None and child not in done:
                done.add(child)
                visit(child, {**above, child: repr(f"{prefix}{name}")}, f"{prefix}{name}.")

    visit(model, {model: "the model itself"}, "")


def _check_kind(name: str, tensor: Tensor) -> None:
    """Refuse tensors whose elements cannot be taken out or computed with as they are."""
    if tensor.is_quantized:
        raise _quantised(name, str(tensor.dtype))
    if type(tensor.data) not in (Tensor, nn.Parameter):
        raise ModelError(
            f"{name!r} is a {type(tensor.data).__name__}, a tensor of a kind of its own, as quantised and distributed weights are: "
            "prune the model with plain tensors first, then quantise or distribute the result."
        )
    if tensor.layout is not torch.strided:
        raise ModelError(f"{name!r} is sparse ({tensor.layout}): give it as tensor.to_dense().")
    if any(getattr(tensor, "names", ())):  # newer versions of torch know none
        raise ModelError(f"{name!r} has named dimensions, which few operations take: take them off with rename(None).")
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        raise ModelError(
            f"{name!r} is stored as {tensor.dtype}, in which nothing can be added: prune the model in bfloat16 or float32, and "
            "bring the result to 8 bits."
        )


def _quantised(name: str, kind: str) -> ModelError:
    return ModelError(f"{name!r} is already quantised ({kind}): prune the float model first, then quantise the result.")
