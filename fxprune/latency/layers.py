"""The operations of a model, recorded while it runs, and run again at other widths."""

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
"""Returns the callable to time. It is not called if the time is known already."""

_CONVOLUTION_FUNCTIONS = (
    F.conv1d,
    F.conv2d,
    F.conv3d,
    F.conv_transpose1d,
    F.conv_transpose2d,
    F.conv_transpose3d,
)
_GROUPS = 6  # position of ``groups`` among the arguments of each of these functions


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that an operation reads or returns.

    Attributes
    ----------
    shape:
        Shape in the dense model.
    dims:
        For each dimension that can shrink the number of its size in
        :class:`~fxprune.select.polynomials.Sizes`.
    order:
        All dimensions, from the longest stride to the shortest.
    dtype:
        Type of the elements.
    """

    shape: tuple[int, ...]
    dims: Mapping[int, int]
    order: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, dims: Mapping[int, int]) -> LayerTensor:
        """Return the description of a tensor of the dense model."""
        order = sorted(range(tensor.dim()), key=lambda d: (-tensor.stride()[d], d))
        return cls(tuple(tensor.shape), dims, tuple(order), tensor.dtype)

    def at(self, sizes: Mapping[int, int]) -> tuple[int, ...]:
        """Return the shape at other sizes.

        ``sizes`` maps numbers of sizes to values. A size that is missing keeps its value in the
        dense model.
        """
        return tuple(sizes.get(self.dims.get(d, -1), n) for d, n in enumerate(self.shape))

    def drawn(self, sizes: Mapping[int, int], device: torch.device) -> Tensor:
        """Return a tensor with the shape at ``sizes`` and with this layout.

        It holds random numbers if the dtype is floating-point, and zeros otherwise.
        """
        shape = self.at(sizes)
        laid_out = [shape[d] for d in self.order]
        values = torch.zeros(laid_out, dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            values.normal_()
        return values.permute([self.order.index(d) for d in range(len(shape))])

    def text(self, sizes: Mapping[int, int]) -> str:
        """Return the dtype, the shape at ``sizes`` and the layout as text."""
        order = (
            ""
            if self.order == tuple(range(len(self.order)))
            else f"@{','.join(map(str, self.order))}"
        )
        shape = ",".join(map(str, self.at(sizes)))
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}]{order}"


@dataclass(frozen=True, eq=False)
class Layer:
    """A call of an operation in a deployed graph.

    Attributes
    ----------
    node:
        Name of the node in the analysis.
    target:
        A function, the name of a method, or a module.
    args, kwargs:
        Arguments of the call, with a :class:`LayerTensor` for each tensor.
    parameters:
        Parameters of the module, by name; empty for functions and methods.
    results:
        Tensors that the call returned.
    """

    node: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    parameters: Mapping[str, LayerTensor]
    results: tuple[LayerTensor, ...]

    @property
    def operands(self) -> list[LayerTensor]:
        """All tensors that the operation reads or returns."""
        read = [
            leaf
            for leaf in _argument_leaves((self.args, dict(self.kwargs)))
            if isinstance(leaf, LayerTensor)
        ]
        return [*read, *self.parameters.values(), *self.results]

    def free(self) -> dict[int, int]:
        """Return the sizes that the operation depends on.

        The result maps the number of each size to its value in the dense model.
        """
        return {
            number: own.shape[dim] for own in self.operands for dim, number in own.dims.items()
        }

    def description(self, sizes: Mapping[int, int]) -> str:
        """Return one line that says what the operation is at ``sizes``: a key for its time."""
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
        """Return a function that runs the operation at ``sizes``, on made-up values.

        The function raises an error if the operation does not run at these sizes. This happens if
        sizes occur among its arguments as plain numbers, which do not change along.
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
"""Attributes of modules that follow from the operands or do not matter for the time."""

_ARGUMENT_TYPES = (bool, int, float, str, tuple, type(None))


def _groups_left(groups: int, channels: int, left: int) -> int:
    """Return the number of groups of a convolution that has ``left`` of its ``channels`` left.

    A group of one channel disappears with its channel. Wider groups become narrower, and their
    number stays.
    """
    return left if groups == channels else groups


def _argument_leaves(value: Any) -> list[Any]:
    """Return the leaves of nested arguments, of which a :class:`LayerTensor` is one."""
    return tree_leaves(value, is_leaf=lambda leaf: isinstance(leaf, LayerTensor))


def _map(value: Any, function: Callable[[LayerTensor], Any]) -> Any:
    """Return nested arguments with the result of ``function`` in place of each operand."""
    return tree_map_only(
        LayerTensor, function, value, is_leaf=lambda leaf: isinstance(leaf, LayerTensor)
    )


def _argument_text(value: Any, sizes: Mapping[int, int]) -> str:
    """Return nested arguments as text, with operands at ``sizes``."""
    shown = _map(value, lambda own: _Shown(own.text(sizes)))
    return repr(shown)


class _Shown(str):
    """A string whose ``repr`` has no quotation marks."""

    def __repr__(self) -> str:
        return str(self)


def record(
    model: nn.Module,
    inputs: Any,
    coupling: Coupling,
    sizes: Sizes,
    see: Callable[[Layer, Prepare], None],
) -> None:
    """Run the deployed dense model, and pass each of its operations to a callback.

    Parameters
    ----------
    model:
        Deployed model with all channels of the analysed model.
    inputs:
        Inputs of the call.
    coupling:
        The analysis of the model.
    sizes:
        The sizes of dimensions that can shrink; new ones are added.
    see:
        Called for every node that returns tensors, before the next node runs. It receives the
        operation, and a function that returns a callable to run the operation again.
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
    """An interpreter of a deployed graph that passes each operation to a callback.

    It finds the node of the trace from which a node came by its name.
    """

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
        """Run the graph with the arguments of a call of the module."""
        places = self.graph.find_nodes(op="placeholder")
        rest = [
            kwargs.get(str(node.target), node.args[0] if node.args else None)
            for node in places[len(args) :]
        ]
        return self.run(*args, *rest)

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and pass it to the callback if it is an operation that returns tensors."""
        if n.op not in ("call_function", "call_method", "call_module"):
            return super().run_node(n)
        out = super().run_node(n)
        results = tensors_of(out)
        if results:
            self.see(self._layer(n, results), functools.partial(self._again, n))
        return out

    def _again(self, node: fx.Node) -> Callable[[], object]:
        """Return a function that runs a node again.

        It runs on copies of the arguments, because the operation may write to them.
        """
        args, kwargs = tree_map_only(Tensor, torch.clone, self.fetch_args_kwargs_from_env(node))
        return lambda: execute(self.module, node, args, kwargs)

    def _layer(self, node: fx.Node, results: list[Tensor]) -> Layer:
        """Return the operation of a node.

        Its dimensions follow the sizes that the corresponding node of the trace has.
        """
        old = self.old.get(node.name)
        module = self.module.get_submodule(str(node.target)) if node.op == "call_module" else None
        given = tuple(
            self._operands(results, old.meta.get("val") if old is not None else None, None)
        )
        convolves = isinstance(module, _ConvNd) or node.target in _CONVOLUTION_FUNCTIONS
        channels = given[0].dims.get(1 if convolves else len(given[0].shape) - 1)

        def read(new: Any, before: Any) -> Any:
            """Return an argument with operands for its tensors; ``before`` is from the trace."""
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
        """Return operands for tensors of the deployed model.

        Parameters
        ----------
        tensors:
            The tensors.
        before:
            The corresponding value in the trace. None: there is none.
        channels:
            Number of the size of the channels. A bias that folding added is not in the trace and
            has one element per channel.
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
