"""Features: outputs of modules in the pruned model, and what survives of the dense model's."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import tensors_of
from fxprune.coupling import Coupling
from fxprune.emission import emit_pruned, terms_of
from fxprune.errors import ArgumentError
from fxprune.result.plan import Plan
from fxprune.rewrite import Survivors
from fxprune.stages import replay, stages_of

__all__ = ["Capture", "Features", "Outputs"]

Outputs = dict[str, list[list[Tensor]]]
"""Name of a module -> the tensors of its output, for each call of the module."""


@dataclass(frozen=True)
class _Stage:
    """One plan of a chain: what survives of the outputs of the modules before it."""

    survivors: Survivors
    labelled: Outputs

    def take(self, name: str, call: int, index: int, values: Tensor) -> Tensor:
        """Return the surviving elements of one tensor of an output."""
        calls = self.labelled[name]
        # a part that runs repeatedly was labelled once
        return self.survivors.take(calls[call % len(calls)][index], values)


class Features:
    """The modules whose outputs are compared, and what survives of each output.

    Parameters
    ----------
    teacher:
        The dense model.
    plan:
        The plan of the pruned model, with the plans before it.
    names:
        Names of modules that the graphs of both models call.

    Raises
    ------
    ArgumentError
        If a name does not survive. The message names similar ones.
    PlanError
        If the plan was made for another architecture.
    """

    def __init__(self, teacher: nn.Module, plan: Plan, names: Iterable[str]) -> None:
        self.names = tuple(dict.fromkeys(names))
        self._stages: list[_Stage] = []
        stages, model = stages_of(plan, teacher), teacher
        for stage in stages:
            coupling, kept, clock = replay(stage, model)
            labelled = _labelled_outputs(coupling)
            for name in self.names:
                _check_survives(name, labelled)
            chosen = {name: labelled[name] for name in self.names}
            self._stages.append(_Stage(Survivors(coupling, kept), chosen))
            if stage is not stages[-1]:
                model = emit_pruned(model, coupling, kept, terms_of(stage), clock).model

    def survivors(self, outputs: Outputs) -> Outputs:
        """Return what survives of the outputs of the dense model's modules."""
        found: Outputs = {}
        for name, calls in outputs.items():
            found[name] = [
                [self._taken(name, call, index, value) for index, value in enumerate(tensors)]
                for call, tensors in enumerate(calls)
            ]
        return found

    def _taken(self, name: str, call: int, index: int, values: Tensor) -> Tensor:
        """Return the elements of one tensor that survive all stages."""
        for stage in self._stages:
            values = stage.take(name, call, index, values)
        return values

    def distance(self, student: Outputs, teacher: Outputs) -> Tensor:
        r"""Return the mean of :math:`\lVert s - t \rVert^2 / \lVert t \rVert^2` over all outputs.

        Parameters
        ----------
        student:
            The outputs of the pruned model's modules.
        teacher:
            Those of the dense model's modules, of which the survivors are compared.

        Raises
        ------
        ArgumentError
            If the outputs differ in number or shape, or there are none.
        """
        expected, distances = self.survivors(teacher), []
        for name in self.names:
            pairs = _pairs(name, student[name], expected[name])
            distances += [_relative_distance(s, t) for s, t in pairs]
        return torch.stack(distances).mean()


def _labelled_outputs(coupling: Coupling) -> Outputs:
    """Return the outputs of the modules that the graph for evaluation calls, in labelled form."""
    found: Outputs = {}
    for trace in coupling.traces:
        for node in trace.graph.nodes if not trace.training else ():
            if node.op == "call_module":
                name = f"{trace.path}.{node.target}".lstrip(".")
                found.setdefault(name, []).append(tensors_of(node.meta.get("val")))
    return {name: calls for name, calls in found.items() if any(calls)}


def _check_survives(name: str, labelled: Mapping[str, object]) -> None:
    """Raise an error if the graph does not call a module of this name."""
    if name in labelled:
        return
    below = [other for other in labelled if other.startswith(f"{name}.")]
    near = [*below[-1:], *difflib.get_close_matches(name, labelled, n=3)]
    shown = ", ".join(map(repr, dict.fromkeys(near or list(labelled)[-3:])))
    raise ArgumentError(
        f"features: {name!r} is no module that the graph of the pruned model calls: it calls "
        f"{shown or 'none'}. A module that is made of others has dissolved into them; name the "
        "one that gives its output."
    )


def _pairs(
    name: str, student: Sequence[list[Tensor]], teacher: Sequence[list[Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the floating-point tensors of a module's outputs in both models.

    Raises
    ------
    ArgumentError
        If there are none, or they differ in number or shape.
    """
    given, expected = (
        [tensor for call in calls for tensor in call if tensor.is_floating_point()]
        for calls in (student, teacher)
    )
    shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (given, expected)]
    if not given or shapes[0] != shapes[1]:
        raise ArgumentError(
            f"features: {name!r} gives {_listed(shapes[0])} in the pruned model, and "
            f"{_listed(shapes[1])} survives of what it gives in the dense one. Call the pruned "
            "model inside the context, on the inputs that the loss gets; if one model does not "
            "call the module at all, name another."
        )
    return zip(given, expected, strict=True)


def _listed(shapes: Sequence[tuple[int, ...]]) -> str:
    """Return shapes as text."""
    return ", ".join(map(str, shapes)) or "nothing"


def _relative_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of two tensors, as a share of the second's squared norm."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(dtype), teacher.to(dtype)
    norm = teacher.square().sum().clamp_min(torch.finfo(dtype).tiny)
    return (student - teacher).square().sum() / norm


class Capture:
    """Collects the outputs of modules in the latest call of a model.

    Parameters
    ----------
    model:
        The model.
    names:
        Names of modules below it.

    Attributes
    ----------
    calls:
        Number of calls with gradients since the outputs were taken.
    with_gradients:
        Whether the latest call had gradients.
    """

    def __init__(self, model: nn.Module, names: Iterable[str]) -> None:
        self.model = model
        self._outputs: Outputs = {name: [] for name in names}
        self.calls, self.with_gradients = 0, False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Collect inside the context. Afterwards the model has the hooks that it had before."""
        handles = [self.model.register_forward_pre_hook(self._begin)]
        try:
            for name, calls in self._outputs.items():
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_hook(_collector(calls)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.take()

    def _begin(self, *given: Any) -> None:
        """Forget the outputs of earlier calls: the hook before each call of the model."""
        self._forget()
        self.with_gradients = torch.is_grad_enabled()
        self.calls += self.with_gradients

    def _forget(self) -> None:
        """Drop all outputs."""
        for calls in self._outputs.values():
            calls.clear()

    def take(self) -> Outputs:
        """Return the outputs of the latest call, and begin anew."""
        taken = {name: list(calls) for name, calls in self._outputs.items()}
        self._forget()
        self.calls = 0
        return taken


def _collector(calls: list[list[Tensor]]) -> Any:
    """Return a forward hook that appends the tensors of each output to a list."""

    def collect(module: nn.Module, given: Any, output: Any) -> None:
        """Append copies, because later operations may write into the output itself."""
        calls.append([tensor.clone() for tensor in tensors_of(output)])

    return collect
