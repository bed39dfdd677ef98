"""The operations of a model as it runs, and each of them again at other widths."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves, tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.coupling import Coupling
from fxprune.inputs import as_call
from fxprune.select.polynomials import Sizes
from fxprune.trace import Trace, execute

__all__ = ["Layer", "LayerTensor", "Prepare", "record"]

Prepare = Callable[[], Callable[[], object]]
"""Makes what is timed; not called where its time is known."""

_CONVOLUTION_FUNCTIONS = (
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_GROUPS = 6  # the position of ``groups`` among the arguments of all of them


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that an operation reads or gives: its shape in the dense model, and which of its
    dimensions follow which size.
    """

    shape: tuple[int, ...]
    # dimension -> the number of its size (see :class:`~fxprune.select.kinds.Sizes`)
    dims: Mapping[int, int]
    # dimensions, from the one of the longest stride to that of the shortest
    order: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, dims: Mapping[int, int]) -> LayerTensor:
        order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride()[d], d))
        return cls(tuple(tensor.shape), dims, tuple(order), tensor.dtype)

    def at(self, sizes: Mapping[int, int]) -> tuple[int, ...]:
        """The shape at these sizes; where one is not given it is the dense model's."""
        return tuple(sizes.get(self.dims.get(d, -1), n) for d, n in enumerate(self.shape))

    def drawn(self, sizes: Mapping[int, int], device: torch.device) -> Tensor:
        """A tensor of this shape and layout: random numbers, or zeros where it holds whole
        ones.
        """
        shape = self.at(sizes)
        laid_out = [shape[d] for d in self.order]
        values = torch.zeros(laid_out, dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            values.normal_()
        return values.permute([self.order.index(d) for d in range(len(shape))])

    def text(self, sizes: Mapping[int, int]) -> str:
        """What the time of an operation depends on."""
        order = (
            ""
            if self.order == tuple(range(len(self.order)))
            else f"@{','.join(map(str, self.order))}"
        )
        shape = ",".join(map(str, self.at(sizes)))
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}]{order}"


@dataclass(frozen=True, eq=False)
class Layer:
    """A call in a deployed graph.

    Attributes
    ----------
    node:
        Its name in the analysis.
    target:
        A function, the name of a method, or a module.
    args, kwargs:
        What it was called with, tensors being operands.
    parameters:
        The operands of a module.
    results:
        The tensors that it gave.
    """

    node: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parameters: Mapping[str, LayerTensor]
    results: tuple[LayerTensor, ...]

    @property
    def operands(self) -> list[LayerTensor]:
        """All tensors, read and given."""
        read = [
            leaf
            for leaf in _argument_leaves((self.args, dict(self.kwargs)))
            if isinstance(leaf, LayerTensor)
        ]
        return [*read, *self.parameters.values(), *self.results]

    def free(self) -> dict[int, int]:
        """The sizes that it depends on, by their numbers, in the dense model."""
        return {
            number: own.shape[dim] for own in self.operands for dim, number in own.dims.items()
        }

    def description(self, sizes: Mapping[int, int]) -> str:
        """What it is, at these sizes, in a line."""
        target = self.target
        if isinstance(target, nn.Module):
            own = {
                key: value
                for key, value in vars(target).items()
                if key not in _FORGOTTEN and isinstance(value, _ARGUMENT_TYPES)
            }
            told = ", ".join(
                f"{key}={value}" for key, value in own.items() if not key.startswith("_")
            )
            name = f"{type(target).__name__}({told})"
        else:
            name = (
                target
                if isinstance(target, str)
                else getattr(target, "__qualname__", repr(target))
            )
        shown = [_argument_text(value, sizes) for value in self.args]
        shown += [f"{key}={_argument_text(value, sizes)}" for key, value in self.kwargs.items()]
        shown += [f"{key}={own.text(sizes)}" for key, own in self.parameters.items()]
        return f"{name} {' '.join(shown)}"

    def prepared(self, sizes: Mapping[int, int], device: torch.device) -> Callable[[], object]:
        """What calls it at these sizes, on made-up values.

        It may raise what the operation raises, where sizes stand in it as numbers that do not
        follow.
        """
        args, kwargs = _map((self.args, dict(self.kwargs)), lambda own: own.drawn(sizes, device))
        call = self.target
        if isinstance(call, nn.Module):
            call = copy.copy(call)
            made = {
                name: nn.Parameter(own.drawn(sizes, device), False)
                for name, own in self.parameters.items()
            }
            call.__dict__["_parameters"] = {**self.target._parameters, **made}
            if isinstance(call, _ConvNd):
                call.groups = _groups_left(call.groups, self.args[0].shape[1], args[0].shape[1])
        elif call in _CONVOLUTION_FUNCTIONS:
            if len(args) > _GROUPS:
                groups = _groups_left(args[_GROUPS], self.args[0].shape[1], args[0].shape[1])
                args = (*args[:_GROUPS], groups, *args[_GROUPS + 1 :])
            elif "groups" in kwargs:
                kwargs["groups"] = _groups_left(
                    kwargs["groups"], self.args[0].shape[1], args[0].shape[1]
                )
        elif isinstance(call, str):
            return lambda: getattr(args[0], call)(*args[1:], **kwargs)
        return lambda: call(*args, **kwargs)


_FORGOTTEN = (
    "training",
    "groups",
    "in_channels",
    "out_channels",
    "in_features",
    "out_features",
    "num_features",
)
"""Attributes of modules that operands tell, or that do not matter."""

_ARGUMENT_TYPES = (bool, int, float, str, tuple, type(None))


def _groups_left(groups: int, channels: int, left: int) -> int:
    """Groups of one channel go with it; groups of several keep their number and get narrower."""
    return left if groups == channels else groups


def _argument_leaves(value: Any) -> list[Any]:
    return tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, LayerTensor))


def _map(value: Any, function: Callable[[LayerTensor], Any]) -> Any:
    return tree_map_only(
        LayerTensor, function, value, is_leaf=lambda leaf: isinstance(leaf, LayerTensor)
    )


def _argument_text(value: Any, sizes: Mapping[int, int]) -> str:
    shown = _map(value, lambda own: _Shown(own.text(sizes)))
    return repr(shown)


class _Shown(str):
    """Text without quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def record(
    model: nn.Module,
    inputs: Any,
    coupling: Coupling,
    sizes: Sizes,
    see: Callable[[Layer, Prepare], None],
) -> None:
    """Run the deployed dense model, and hand over each of its operations, with what makes a
    callable that runs it again.

    Parameters
    ----------
    model:
        Deployed, with all channels of the analysed model.
    coupling, sizes:
        The analysis; they tell which dimensions follow which size.
    see:
        Called for every node that gives tensors, before the next one runs.
    """
    traces = {trace.path: trace for trace in coupling.traces if not trace.training}
    replaced = []
    for path, module in list(model.named_modules()):
        if isinstance(module, fx.GraphModule) and path in traces:
            module.__dict__["forward"] = _Recorder(module, traces[path], sizes, see).forward
            replaced.append(module)
    try:
        args, kwargs = as_call(inputs)
        model(*args, **kwargs)
    finally:
        for module in replaced:
            del module.__dict__["forward"]


class _Recorder(fx.Interpreter):
    """Runs a deployed graph and looks each node up in the trace that it came from."""

    def __init__(
        self,
        module: fx.GraphModule,
        trace: Trace,
        sizes: Sizes,
        see: Callable[[Layer, Prepare], None],
    ) -> None:
        super().__init__(module)
        self.trace, self.sizes, self.see = trace, sizes, see
        self.old = {node.name: node for node in trace.graph.nodes}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        places = self.graph.find_nodes(op="placeholder")
        rest = [
            kwargs.get(str(node.target), node.args[0] if node.args else None)
            for node in places[len(args) :]
        ]
        return self.run(*args, *rest)

    def run_node(self, n: fx.Node) -> Any:
        if n.op not in ("call_function", "call_method", "call_module"):
            return super().run_node(n)
        out = super().run_node(n)
        results = tensors_of(out)
        if results:
            self.see(self._layer(n, results), functools.partial(self._again, n))
        return out

    def _again(self, node: fx.Node) -> Callable[[], object]:
        """What calls a node once more, on copies: it may write into its arguments."""
        args, kwargs = tree_map_only(Tensor, torch.clone, self.fetch_args_kwargs_from_env(node))
        return lambda: execute(self.module, node, args, kwargs)

    def _layer(self, node: fx.Node, results: list[Tensor]) -> Layer:
        """The call, with which of its dimensions follow which size: as in the node of the trace
        that it stands for.
        """
        old = self.old.get(node.name)
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        given = tuple(
            self._operands(results, old.meta.get("val") if old is not None else None, None)
        )
        convolves = isinstance(module, _ConvNd) or node.target in _CONVOLUTION_FUNCTIONS
        channels = given[0].dims.get(1 if convolves else len(given[0].shape) - 1)

        def read(new: Any, before: Any) -> Any:
            if isinstance(new, fx.Node):
                was = before.meta.get("val") if isinstance(before, fx.Node) else None
                made = iter(self._operands(tensors_of(self.env[new]), was, channels))
                return tree_map_only(Tensor, lambda _: next(made), self.env[new])
            if isinstance(new, (tuple, list)):
                alike = isinstance(before, (tuple, list)) and len(before) == len(new)
                return type(new)(
                    read(a, b)
                    for a, b in zip(new, before if alike else [None] * len(new), strict=True)
                )
            return new

        before_args, before_kwargs = (old.args, old.kwargs) if old is not None else ((), {})
        padded = [*before_args, *[None] * len(node.args)]
        args = tuple(read(new, before) for new, before in zip(node.args, padded, strict=False))
        kwargs = {name: read(new, before_kwargs.get(name)) for name, new in node.kwargs.items()}
        parameters: dict[str, LayerTensor] = {}
        if module is not None and old is not None:
            meta_copy = self.trace.meta_copy.model.get_submodule(str(old.target))
            own = {
                name: parameter
                for name, parameter in module._parameters.items()
                if parameter is not None
            }
            for name, parameter in own.items():
                (parameters[name],) = self._operands(
                    [parameter], meta_copy._parameters.get(name), channels
                )
        return Layer(
            self.trace.prefix + node.name,
            node.target if module is None else module,
            args,
            kwargs,
            parameters,
            given,
        )

    def _operands(
        self, tensors: list[Tensor], before: Any, channels: int | None
    ) -> list[LayerTensor]:
        """Operands for tensors that stand for those in ``before``. A bias that folding added has
        one number per channel.
        """
        out = []
        for tensor, was in zip(
            tensors, [*tensors_of(before), *[None] * len(tensors)], strict=False
        ):
            dims: dict[int, int] = {}
            if was is not None and was.dim() == tensor.dim():
                dims = {
                    d: n
                    for d, n in self.sizes.dims(was).items()
                    if was.shape[d] == tensor.shape[d]
                }
            elif was is None and tensor.dim() == 1 and channels is not None:
                dims = {0: channels}
            out.append(LayerTensor.of(tensor, dims))
        return out
