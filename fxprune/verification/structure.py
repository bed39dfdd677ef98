"""The structural half of the proof: the given graph is the one that the plan emits.

The labels of every node must match, too.
"""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.coupling import Coupling
from fxprune.errors import RewriteError, VerificationError
from fxprune.rewrite import PrunedModule, Survivors, emit

__all__ = ["check_emission", "is_guard"]


def check_emission(pruned: nn.Module, coupling: Coupling, survivors: Survivors) -> None:
    """Emit the graph again, check all of its labels, and compare it with the given model's graph.

    Parameters
    ----------
    pruned:
        The model to check.
    coupling:
        The analysis of the original.
    survivors:
        The elements that the plan keeps.

    Raises
    ------
    VerificationError
        If labels do not match, or if the graph or a shape differs from what the plan emits.
    """
    try:
        emitted = emit(coupling, survivors, thorough=True)
    except RewriteError as error:
        raise VerificationError(
            f"the labels of the emitted model do not match: {error}"
        ) from error
    found, wanted = _shapes(pruned), _shapes(emitted)
    for name in wanted | found:
        if found.get(name) != wanted.get(name):
            raise VerificationError(
                f"{name!r} has shape {found.get(name)}, the plan leaves {wanted.get(name)}."
            )
    for path in coupling.parts or ("",):
        for one, other in zip(_graphs(pruned, path), _graphs(emitted, path), strict=True):
            if [*_described_nodes(one)] != [*_described_nodes(other)]:
                raise VerificationError(
                    "the model's graph is not the one that the plan emits; it was changed after "
                    "pruning."
                )


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    state = model.state_dict().items()
    return {name: tuple(value.shape) for name, value in state if isinstance(value, Tensor)}


def is_guard(error: BaseException, model: nn.Module, coupling: Coupling) -> bool:
    """Tell whether a guard in a graph of the pruned model raised an error.

    A guard refuses inputs that the graph was not traced for. The user's own assertions do not
    count: where the original passes them, the pruned model must pass them as well.

    Parameters
    ----------
    error:
        An error that a run of the model raised, with its traceback.
    model:
        The pruned model.
    coupling:
        The analysis of the original, which knows the user's assertions.
    """
    frames = [*traceback.walk_tb(error.__traceback__)]
    if not frames or frames[-1][0].f_code is not torch._assert.__code__:
        return False
    # Function modes may have frames between the failed assertion and the graph's code.
    for frame, line in reversed(frames):
        called = frame.f_locals.get("self")
        if isinstance(called, PrunedModule):
            path = next((path for path, module in model.named_modules() if module is called), None)
            statement = linecache.getline(frame.f_code.co_filename, line)
            return statement.partition(" =")[0].strip() in _guards(called, path, coupling)
    return False


def _guards(module: PrunedModule, path: str | None, coupling: Coupling) -> set[str]:
    """Return the names of the guards in the graph that runs in the module's current mode.

    These are all assertions of the graph except those of the user's code.
    """
    trained = module.training_graph if module.training else None
    graph, training = trained or module.graph, trained is not None
    of_user: set[str] = set()
    for trace in coupling.traces:
        if trace.path == path and trace.training is training:
            asserted = _assertions(trace.graph)
            of_user |= {node.name for node in asserted if not node.meta.get("guard")}
    return {node.name for node in _assertions(graph)} - of_user


def _assertions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is torch._assert]


def _graphs(model: nn.Module, path: str) -> list[fx.Graph | None]:
    """Return the module's graphs for evaluation and for training; None where there is none."""
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return [None, None]
    return [getattr(module, "graph", None), getattr(module, "training_graph", None)]


def _described_nodes(graph: fx.Graph | None) -> Iterator[tuple[Any, ...]]:
    """Yield a description of each node, to compare two graphs by.

    It leaves out the text of an assertion, because that changes nothing in what is computed.
    """
    for node in graph.nodes if graph is not None else ():
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _reference_to)
        if node.target is torch._assert:
            args = args[:1]
        yield node.op, node.name, _qualified_name(node.target), repr(args), repr(kwargs)


def _qualified_name(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', None) or target}"


def _reference_to(node: fx.Node) -> Any:
    return f"%{node.name}"
