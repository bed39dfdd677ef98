"""Consumers: the layers that read channels which are removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxprune.coupling import Coupling
from fxprune.errors import ArgumentError
from fxprune.rewrite import Survivors

__all__ = ["channel_dim", "check_fits", "consumers_of", "follower_of"]


def consumers_of(coupling: Coupling, survivors: Survivors) -> dict[str, fx.Node]:
    """Return the linear layers and convolutions that read a tensor which loses channels.

    Only modules that are called once count. They are in the order in which they run.
    """
    out = {}
    for trace in coupling.traces:
        calls: dict[str, list[fx.Node]] = {}
        for node in trace.graph.nodes if not trace.training else ():
            if node.op == "call_module" and node.args and isinstance(node.args[0], fx.Node):
                calls.setdefault(str(node.target), []).append(node)
        for name, nodes in calls.items():
            module, x = trace.meta_copy.model.get_submodule(name), nodes[0].args[0].meta["val"]
            kind = type(module)
            weight: Any = getattr(module, "weight", None)
            fits = kind is nn.Linear or (
                kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and x.dim() == weight.dim()
            )
            if len(nodes) == 1 and fits and survivors.rows(x, channel_dim(module, x)) is not None:
                out[f"{trace.path}.{name}" if trace.path else name] = nodes[0]
    return out


def check_fits(
    coupling: Coupling, survivors: Survivors, pruned: nn.Module, consumers: Iterable[str]
) -> None:
    """Refuse a pruned model that is not the one of the plan.

    Raises
    ------
    ArgumentError
        If a consumer's weight is missing or has another shape.
    """
    present = dict(pruned.named_parameters())
    for weight in (f"{name}.weight" for name in consumers):
        analysed = coupling.parameters.get(weight)
        if analysed is not None and (
            weight not in present or list(present[weight].shape) != list(survivors.shape(analysed))
        ):
            raise ArgumentError(
                f"pruned.model has no {weight!r} as its plan left it: give what prune gave, with "
                "its own model."
            )


def channel_dim(module: nn.Module, x: Tensor) -> int:
    """Return the dimension of a module's input that holds the channels."""
    return x.dim() - 1 if isinstance(module, nn.Linear) else 1


def follower_of(consumer: str, node: fx.Node, coupling: Coupling) -> str | None:
    """Return the name of the batch normalisation that alone reads a consumer's output.

    The result is None if there is none, or if it keeps no statistics or is called several times.
    """
    users = list(node.users)
    if len(users) != 1 or users[0].op != "call_module":
        return None
    target = str(users[0].target)
    name = consumer.removesuffix(str(node.target)) + target
    module = coupling.meta_copy.model.get_submodule(name)
    if not isinstance(module, _BatchNorm) or f"{name}.running_mean" not in coupling.parameters:
        return None
    called = [str(other.target) for other in node.graph.nodes if other.op == "call_module"]
    return name if called.count(target) == 1 else None
