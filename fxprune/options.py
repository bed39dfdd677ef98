"""Checks of the arguments of public functions, made before anything else happens."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from fxprune.calibration import check_repeatable
from fxprune.common.contents import named_tensors, tensors_of
from fxprune.common.identity import IdentitySet
from fxprune.common.numbers import check_integer, check_share
from fxprune.common.public import calling_user_code, iterate_user_input, short_repr
from fxprune.coupling import Terms
from fxprune.errors import ArgumentError
from fxprune.evaluation import Search
from fxprune.latency import Setting
from fxprune.result.plan import Plan, check_groups
from fxprune.select.budget import Budget
from fxprune.select.scopes import ISOMORPHIC
from fxprune.training.methods import DEFAULT, read_methods

__all__ = [
    "Kept",
    "analysis_terms",
    "build_model",
    "check_plan",
    "check_pruned",
    "check_search",
    "kept_modules",
    "kept_parameters",
    "latency_setting",
    "read_budget",
    "read_compensation",
    "whole_head_tensors",
]

Kept: TypeAlias = str | nn.Module | Iterable[str | nn.Module]
"""What ``keep`` accepts: a module name, a glob, a module object, or several of these."""


def analysis_terms(model: nn.Module, keep: Kept, units: str | Mapping[str, str]) -> Terms:
    """Return what the analysis of a model must leave alone."""
    return Terms(keep=kept_parameters(model, keep), heads=whole_head_tensors(model, units))


def kept_parameters(model: nn.Module, keep: Any) -> tuple[str, ...]:
    """Return the names of the floating-point tensors in and below the modules that ``keep`` names.

    These are parameters and buffers.
    """
    return _tensors_below(model, kept_modules(model, keep))


def kept_modules(model: nn.Module, keep: Any) -> tuple[str, ...]:
    """Return the names of the modules that ``keep`` names, in the same order.

    Raises
    ------
    ArgumentError
        If an entry matches no module.
    """
    if isinstance(keep, (str, nn.Module)):
        entries = [keep]
    elif isinstance(keep, Iterable) and not isinstance(keep, (Tensor, Mapping, type, bytes)):
        entries = list(iterate_user_input(keep, "keep"))
    else:
        raise ArgumentError(
            f"keep is {_kind_of(keep)}: give a module name, a glob, a module object, or a list "
            "of these; () keeps none."
        )
    names = [name for entry in entries for name in _matching_modules(model, entry, "keep")]
    return tuple(dict.fromkeys(names))


def whole_head_tensors(model: nn.Module, units: str | Mapping[str, str]) -> tuple[str, ...]:
    """Return the names of the parameters and buffers whose attention heads are pruned as a whole.

    Parameters
    ----------
    units:
        ``"dims"`` or ``"heads"``, or a mapping from globs of module names to either. A glob also
        covers the modules below; the last one that matches counts.
    """
    if not isinstance(units, (str, Mapping)):
        raise ArgumentError(
            f'units is {_kind_of(units)}: give "dims" or "heads", or a dict from globs of module '
            "names to either."
        )
    chosen = units if isinstance(units, Mapping) else {"*": units}
    heads: set[str] = set()
    for glob, unit in chosen.items():
        if not isinstance(unit, str) or unit not in ("dims", "heads"):
            raise ArgumentError(
                f'units: {short_repr(unit)} is neither "dims" (of heads, balanced over them) nor '
                '"heads" (whole ones).'
            )
        covered = _modules_below(model, _matching_modules(model, glob, "units"))
        heads = heads | covered if unit == "heads" else heads - covered
    return _tensors_below(model, heads, recurse=False)


def _modules_below(model: nn.Module, tops: Collection[str]) -> set[str]:
    """Return the names of these modules and of all modules below them."""
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    return {name for name in names if any(_is_below(name, top) for top in tops)}


def _is_below(name: str, top: str) -> bool:
    """Tell whether a module name is ``top`` or lies below it; everything lies below ""."""
    return not top or name == top or name.startswith(f"{top}.")


def _matching_modules(model: nn.Module, entry: Any, option: str) -> list[str]:
    """Return the names of the modules that one entry of an option matches.

    The entry is a module name, a glob or a module object. ``option`` is the option's name, for
    error messages.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if isinstance(entry, nn.Module):
        found = [name for name, module in modules.items() if module is entry]
    elif isinstance(entry, str):
        found = [name for name in modules if fnmatch.fnmatchcase(name, entry)] if entry else []
    else:
        raise ArgumentError(
            f"{option} holds {_kind_of(entry)}: give module names, globs or module objects."
        )
    if not found:
        given = repr(entry) if isinstance(entry, str) else f"the given {type(entry).__name__}"
        raise ArgumentError(
            f"{option}: {given} matches no module of this {type(model).__name__}. "
            f"{_suggest_names(entry, list(modules))}"
        )
    return found


def _suggest_names(entry: Any, names: Sequence[str]) -> str:
    """Return a hint for an entry that matches no module: similar names, or the names there are."""
    names = [name for name in names if name]
    near = difflib.get_close_matches(entry, names, n=3) if isinstance(entry, str) else []
    if near:
        return f"Did you mean {' or '.join(map(repr, near))}?"
    return (
        f"Its modules are: {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
        if names
        else "It has no modules below it."
    )


def _kind_of(value: Any) -> str:
    """Describe a value's type for a message, for example "a list" or "the class Linear"."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return "None" if value is None else f"a {type(value).__name__}"


def _tensors_below(
    model: nn.Module, modules: Collection[str], *, recurse: bool = True
) -> tuple[str, ...]:
    """Return the names of the floating-point parameters and buffers of these modules.

    With ``recurse`` those of the modules below are included.
    """
    if not modules:
        return ()
    tensors: IdentitySet[Tensor] = IdentitySet()
    for path in modules:
        module = model.get_submodule(path)
        for tensor in (*module.parameters(recurse), *module.buffers(recurse)):
            tensors.add(tensor)
    named = named_tensors(model).items()
    floats = [(name, tensor) for name, tensor in named if tensor.is_floating_point()]
    return tuple(name for name, tensor in floats if tensor in tensors)


def read_budget(
    channels: float | None,
    macs: float | None,
    params: float | None,
    latency: float | None,
    scope: str,
    layers: Mapping[str, float] | None,
    round_to: int,
    min_channels: int,
    max_ratio: float | Mapping[str, float],
    scopes: str | Mapping[str, str | Iterable[str]] | None,
) -> Budget:
    """Return the budget that the arguments of :func:`fxprune.prune` describe.

    Raises
    ------
    ArgumentError
        If nothing says how much to prune, or an argument has a value that is not allowed.
    """
    layers = _read_mapping("layers", layers)
    shares = {"channels": channels, "macs": macs, "params": params, "latency": latency}
    if all(value is None for value in shares.values()) and not layers:
        raise ArgumentError(
            "nothing says how much to prune: give channels=, macs=, params=, latency= or "
            "layers=, e.g. macs=0.5."
        )
    checked: dict[str, Any] = {name: _read_share(name, value) for name, value in shares.items()}
    budget = Budget(
        **checked,
        layers=_read_shares("layers", layers, "the share of channels that these layers keep"),
        scope=_read_scope(scope),
        round_to=check_integer("round_to", round_to),
        min_channels=check_integer("min_channels", min_channels),
        max_ratio=_read_max_ratio(max_ratio),
        scopes=_read_scopes(scopes),
    )
    if budget.scopes is not None and not budget.limits_the_whole_model:
        raise ArgumentError(
            "scopes= says which units of the whole network are ranked against each other: give "
            'macs=, params=, latency=, or channels= with scope="global".'
        )
    return budget


def _read_mapping(option: str, value: Any) -> dict[Any, Any]:
    """Return a copy of the argument of an option that is a dict from globs to shares."""
    if value is not None and not isinstance(value, Mapping):
        raise ArgumentError(
            f"{option} is {_kind_of(value)}: give a dict from globs of module names to "
            f'shares, as {{"layer4.*": 0.3}}.'
        )
    return dict(value or {})


def _read_max_ratio(value: Any) -> float | dict[str, float]:
    """Return the argument ``max_ratio``, a share or a dict from globs to shares."""
    meaning = "the largest share of its units that a group may lose"
    if isinstance(value, Mapping):
        return _read_shares("max_ratio", value, meaning)
    return check_share("max_ratio", value, meaning)


def _read_scopes(value: Any) -> str | dict[str, tuple[str, ...]] | None:
    """Return the argument ``scopes`` with its globs as tuples.

    Raises
    ------
    ArgumentError
        If it is neither ``"isomorphic"`` nor a dict from names to globs of module names.
    """
    if value is None or (isinstance(value, str) and value == ISOMORPHIC):
        return value
    if not isinstance(value, Mapping):
        raise ArgumentError(
            f'scopes is {short_repr(value)}: give "{ISOMORPHIC}", or a dict from names of scopes '
            f'to globs of module names, as {{"stages": ["layer*"]}}.'
        )
    scopes = {}
    for name, globs in value.items():
        listed = [globs] if isinstance(globs, str) else globs
        if isinstance(listed, Iterable) and not isinstance(listed, (Tensor, type, bytes)):
            listed = tuple(iterate_user_input(listed, "scopes"))
        if not isinstance(listed, tuple) or not all(isinstance(g, str) for g in (name, *listed)):
            raise ArgumentError(
                f"scopes: {short_repr(name)} has {short_repr(globs)}: give the name of a scope "
                "with a glob of module names, or a list of globs."
            )
        scopes[name] = listed
    return scopes


def _read_share(name: str, value: Any) -> float | None:
    """Return the share that an argument of this name gives, or None if it is None."""
    if value is None:
        return None
    return check_share(name, value, f"the share of {_COUNTED[name]} to keep")


def _read_shares(option: str, given: Mapping[Any, Any], meaning: str) -> dict[str, float]:
    """Return a dict from globs to shares, checked.

    Parameters
    ----------
    option:
        The name of the option, for messages.
    given:
        The argument.
    meaning:
        What a share means, for messages.

    Raises
    ------
    ArgumentError
        If a key is no string, or a value is not in (0, 1].
    """
    shares: dict[str, float] = {}
    for glob, value in given.items():
        if not isinstance(glob, str):
            raise ArgumentError(
                f"{option}: {_kind_of(glob)} is no name: its keys are globs of module names, "
                f"as {{'layer4.*': 0.3}}."
            )
        shares[glob] = check_share(f"{option}[{glob!r}]", value, meaning)
    return shares


def _read_scope(scope: Any) -> str:
    """Return the argument ``scope``, "group" or "global"."""
    if not isinstance(scope, str) or scope not in ("group", "global"):
        raise ArgumentError(
            f'scope={short_repr(scope)} is neither "group" (every group keeps the share) nor '
            '"global" '
            "(all groups together)."
        )
    return scope


_COUNTED = {"channels": "channels", "macs": "MACs", "params": "parameters", "latency": "the time"}


def latency_setting(
    device: torch.device | str | Setting | None, budget: Budget, example_inputs: Any
) -> Setting | None:
    """Return where a latency budget is measured, or None if there is no such budget.

    Raises
    ------
    ArgumentError
        If ``device`` is given without a latency budget, or the example inputs have no data.
    """
    if budget.latency is None:
        if device is not None:
            raise ArgumentError(
                "device= says where latency counts: give latency= too. The model is pruned on "
                "the device it is on."
            )
        return None
    if any(leaf.is_meta for leaf in tensors_of(example_inputs)):
        raise ArgumentError(
            "latency= is measured, on example inputs with data: these are meta tensors."
        )
    return (
        device if isinstance(device, Setting) else Setting(None if device is None else str(device))
    )


def read_compensation(data: Any, method: Any) -> tuple[str, ...]:
    """Return the methods that compensate for removed channels; empty if none does.

    Parameters
    ----------
    data:
        The loader that the caller gave, or None.
    method:
        The method that the caller named, or several, or ``"none"``, or None.

    Raises
    ------
    ArgumentError
        If the method is unknown, or needs data that is not there, or the loader gives no batches
        or can be read only once.
    """
    if data is not None:
        check_repeatable(data)
    if isinstance(method, str) and method == "none":
        return ()
    if method is None:
        return () if data is None else DEFAULT
    methods = read_methods("compensate", method, others=["none"])
    if data is None:
        raise ArgumentError(f"compensate={method!r} needs data=, a loader of the model's inputs.")
    return methods


def check_pruned(pruned: Any, function: str) -> None:
    """Raise an ArgumentError if ``pruned`` is not a result of :func:`fxprune.prune`.

    ``function`` is the name of the public function, for the message.
    """
    if not isinstance(getattr(pruned, "plan", None), Plan) or not isinstance(
        getattr(pruned, "model", None), nn.Module
    ):
        raise ArgumentError(
            f"{function}(model, pruned, ...) takes what fxprune.prune, apply or load gave as "
            f"pruned, and got {_kind_of(pruned)}."
        )


def check_plan(plan: Any, function: str) -> None:
    """Check the argument ``plan`` of a public function, and the groups of a plan.

    Raises
    ------
    ArgumentError
        If it is not a plan.
    PlanError
        If one of its groups keeps units that do not exist.
    """
    if not isinstance(plan, Plan):
        ways = {
            str: "Plan.from_json(text) reads one",
            Path: "fxprune.load(folder, factory) reads a folder",
        }
        way = next(
            (way for kind, way in ways.items() if isinstance(plan, kind)), "prune(...).plan is one"
        )
        raise ArgumentError(
            f"{function}(plan, model) takes a Plan, and got {_kind_of(plan)}: {way}."
        )
    check_groups(plan)


def check_search(search: Any, budget: Budget) -> None:
    """Raise an ArgumentError if ``search`` is not a search that can choose something."""
    if search is None:
        return
    if not isinstance(search, Search):
        raise ArgumentError(
            f"search is {_kind_of(search)}: give fxprune.Search(score, evaluations=50), where "
            "score takes a model and returns a number."
        )
    if not budget.limits_the_whole_model:
        raise ArgumentError(
            "search= chooses how wide each group is, but these budgets fix every width: give "
            'macs=, params=, latency=, or channels= with scope="global".'
        )


def build_model(model_factory: Any) -> Any:
    """Return the model that a factory builds, or the argument itself if it is not a factory."""
    if isinstance(model_factory, nn.Module) or not callable(model_factory):
        return model_factory
    with calling_user_code("the model_factory"):
        return model_factory()
