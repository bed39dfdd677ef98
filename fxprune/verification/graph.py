"""A run of the traced graph, node by node, if the original's own code cannot be followed.

It proves less than a run of the original's code, because a mistake of the trace is in it, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from fxprune.common.hooks import put_in_mode
from fxprune.common.identity import IdentityMap
from fxprune.coupling import Coupling
from fxprune.errors import VerificationError
from fxprune.ops import Event
from fxprune.rewrite import Survivors
from fxprune.trace import Trace, execute
from fxprune.verification.modes import Draw, NotFollowedError, RecordingMode, clone, events_of
from fxprune.verification.values import dtype_of

__all__ = ["GraphRun"]


class GraphRun:
    """A runner of the traced graphs on the masked original's tensors.

    Parameters
    ----------
    coupling:
        The analysis, which holds the graphs.
    survivors:
        The elements that the plan keeps.
    values:
        The masked original's tensors by name.
    training:
        Whether the graphs of training mode run.
    constant:
        Whether one number replaces all random ones.

    Attributes
    ----------
    draws:
        The random numbers that the graphs drew.
    dropped:
        The rate of each dropout, in order. Dropout itself is off.
    """

    def __init__(
        self,
        coupling: Coupling,
        survivors: Survivors,
        values: Mapping[str, Tensor],
        *,
        training: bool,
        constant: bool,
    ) -> None:
        self.coupling, self.survivors = coupling, survivors
        self.training, self.constant = training, constant
        tensors = coupling.parameters.items()
        self.values = IdentityMap((tensor, values[name].clone()) for name, tensor in tensors)
        self.dtype = dtype_of(values.values())
        self.events: dict[str, list[Event]] = {}  # by the node that executes the op
        for events in events_of(coupling).values():
            for event in events:
                self.events.setdefault(event.node, []).append(event)
        self.draws: list[Draw] = []
        self.dropped: list[float] = []

    def trace_of(self, path: str) -> Trace:
        """Return the trace of the module at a path, in the mode of the run if there is one."""
        traces = [trace for trace in self.coupling.traces if trace.path == path]
        return next((trace for trace in traces if trace.training is self.training), traces[0])

    def run(self, path: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Run the graph of the module at a path, and return its output.

        Parameters
        ----------
        path:
            The module's path.
        args, kwargs:
            The inputs, in the order of the graph's placeholders.

        Raises
        ------
        NotFollowedError
            If the elements that a statistic goes over cannot be determined.
        """
        trace = self.trace_of(path)
        meta_copy = trace.meta_copy.model
        modes = {module: module.training for module in meta_copy.modules()}
        inputs, env = iter([*args, *kwargs.values()]), {}
        try:
            put_in_mode(meta_copy, self.training)
            with trace.meta_copy.with_tensors(self.values), torch.no_grad():
                for node in trace.graph.nodes:
                    if node.op == "placeholder":
                        env[node] = clone(next(inputs))
                    elif node.op == "output":
                        return fx.node.map_arg(node.args[0], env.__getitem__)
                    elif node.op == "get_attr" and node.target in trace.constants:
                        value = trace.constants[node.target].detach().cpu()
                        env[node] = value.to(self.dtype) if value.is_floating_point() else value
                    else:
                        env[node] = self._run_node(node, trace, env)
        finally:
            for module, mode in modes.items():
                module.training = mode
        raise VerificationError("the traced graph has no output")

    def _run_node(self, node: fx.Node, trace: Trace, env: Mapping[fx.Node, Any]) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        events = self.events.get(trace.prefix + node.name, [])
        mode = RecordingMode({"": events}, self.survivors, False, self.constant)
        try:
            with torch.inference_mode(), mode.expecting(""), mode:
                value = execute(trace.meta_copy.model, node, args, kwargs)
        except NotFollowedError as error:
            raise NotFollowedError(f"node {node.name!r} cannot be followed: {error}") from error
        self.draws += mode.draws
        self.dropped += mode.dropped
        self._clear_nan(node, value)
        return value

    def _clear_nan(self, node: fx.Node, value: Any) -> None:
        """Set NaN to zero at removed elements.

        A removed filter divided by its norm is 0/0, for example, which means nothing.
        """
        for old, new in zip(tree_leaves(node.meta["val"]), tree_leaves(value), strict=True):
            if (
                isinstance(old, Tensor)
                and isinstance(new, Tensor)
                and new.is_floating_point()
                and bool(torch.isnan(new).any())
            ):
                for labels in self.coupling.labels(old):
                    removed = torch.from_numpy(~self.survivors.alive[labels])
                    with torch.inference_mode():
                        new.masked_fill_(removed & torch.isnan(new), 0.0)
