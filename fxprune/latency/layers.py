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

    def sample(self, sizes: Mapping[int, int], device: torch.device) -> Tensor:
        """Return a tensor with the shape at ``sizes`` and with this layout.

        It holds random numbers if the dtype is floating-point, and zeros otherwise.
        """
        shape = self.at(sizes)
        in_memory = [shape[d] for d in self.order]
        values = torch.zeros(in_memory, dtype=self.dtype, device=device)
        if self.dtype.is_floating_point:
            values.normal_()
        return values.permute([self.order.index(d) for d in range(len(shape))])

    def text(self, sizes: Mapping[int, int]) -> str:
        """Return the dtype, the shape at ``sizes`` and the layout as text."""
        is_contiguous = self.order == tuple(range(len(self.order)))
        layout = "" if is_contiguous else f"@{','.join(map(str, self.order))}"
        shape = ",".join(map(str, self.at(sizes)))
        return f"{str(self.dtype).removeprefix('torch.')}[{shape}]{layout}"


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
        leaves = _argument_leaves((self.args, dict(self.kwargs)))
        read = [leaf for leaf in leaves if isinstance(leaf, LayerTensor)]
        return [*read, *self.parameters.values(), *self.results]

    def dense_sizes(self) -> dict[int, int]:
        """Return the sizes that the operation depends on.

        The result maps the number of each size to its value in the dense model.
        """
        sizes: dict[int, int] = {}
        for operand in self.operands:
            sizes.update({number: operand.shape[dim] for dim, number in operand.dims.items()})
        return sizes

    def description(self, sizes: Mapping[int, int]) -> str:
        """Return one line that says what the operation is at ``sizes``: a key for its time."""
        texts = [_argument_text(value, sizes) for value in self.args]
        texts += [f"{key}={_argument_text(value, sizes)}" for key, value in self.kwargs.items()]
        texts += [f"{key}={operand.text(sizes)}" for key, operand in self.parameters.items()]
        return f"{_target_text(self.target)} {' '.join(texts)}"

    def prepared(self, sizes: Mapping[int, int], device: torch.device) -> Callable[[], object]:
        """Return a function that runs the operation at ``sizes``, on made-up values.

        The function raises an error if the operation does not run at these sizes. This happens if
        sizes occur among its arguments as plain numbers, which do not change along.
        """
        args, kwargs = _map(
            (self.args, dict(self.kwargs)), lambda operand: operand.sample(sizes, device)
        )
        call = self.target
        if isinstance(call, str):
            return lambda: getattr(args[0], call)(*args[1:], **kwargs)
        if isinstance(call, nn.Module):
            call = self._module_at(sizes, device)
            if isinstance(call, _ConvNd):
                call.groups = self._groups_left(call.groups, args[0])
        elif call in _CONVOLUTION_FUNCTIONS:
            if len(args) > _GROUPS:
                groups = self._groups_left(args[_GROUPS], args[0])
                args = (*args[:_GROUPS], groups, *args[_GROUPS + 1 :])
            elif "groups" in kwargs:
                kwargs["groups"] = self._groups_left(kwargs["groups"], args[0])
        return lambda: call(*args, **kwargs)

    def _module_at(self, sizes: Mapping[int, int], device: torch.device) -> nn.Module:
        """Return a copy of the module with made-up parameters at ``sizes``."""
        module = copy.copy(self.target)
        parameters = dict(self.target._parameters)
        for name, operand in self.parameters.items():
            parameters[name] = nn.Parameter(operand.sample(sizes, device), False)
        module.__dict__["_parameters"] = parameters
        return module

    def _groups_left(self, groups: int, x: Tensor) -> int:
        """Return the number of groups of a convolution whose narrower input is ``x``.

        A group of one channel disappears with its channel. Wider groups become narrower, and their
        number stays.
        """
        channels = self.args[0].shape[1]
        return x.shape[1] if groups == channels else groups


def _target_text(target: Any) -> str:
    """Return the name of an operation, with the settings of a module in brackets."""
    if isinstance(target, str):
        return target
    if not isinstance(target, nn.Module):
        return getattr(target, "__qualname__", repr(target))
    settings = []
    for key, value in vars(target).items():
        is_setting = not key.startswith("_") and key not in _IGNORED_ATTRIBUTES
        if is_setting and isinstance(value, _ARGUMENT_TYPES):
            settings.append(f"{key}={value}")
    return f"{type(target).__name__}({', '.join(settings)})"


_IGNORED_ATTRIBUTES = (
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
    return repr(_map(value, lambda operand: _Unquoted(operand.text(sizes))))


class _Unquoted(str):
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
        values = list(args)
        for node in self.graph.find_nodes(op="placeholder")[len(args) :]:
            default = node.args[0] if node.args else None
            values.append(kwargs.get(str(node.target), default))
        return self.run(*values)

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
        before = None if old is None else old.meta.get("val")
        outputs = tuple(self._operands(results, before, None))
        convolves = isinstance(module, _ConvNd) or node.target in _CONVOLUTION_FUNCTIONS
        channels = outputs[0].dims.get(1 if convolves else len(outputs[0].shape) - 1)
        old_args, old_kwargs = ((), {}) if old is None else (old.args, old.kwargs)
        padded = (*old_args, *[None] * len(node.args))
        args = self._argument(node.args, padded[: len(node.args)], channels)
        kwargs = {}
        for name, value in node.kwargs.items():
            kwargs[name] = self._argument(value, old_kwargs.get(name), channels)
        parameters: dict[str, LayerTensor] = {}
        if module is not None and old is not None:
            parameters = self._parameters(module, str(old.target), channels)
        name = self.trace.prefix + node.name
        target = node.target if module is None else module
        return Layer(name, target, args, kwargs, parameters, outputs)

    def _argument(self, value: Any, before: Any, channels: int | None) -> Any:
        """Return an argument of a node with operands for its tensors.

        ``before`` is the corresponding argument in the trace, or None if there is none.
        """
        if isinstance(value, fx.Node):
            traced = before.meta.get("val") if isinstance(before, fx.Node) else None
            operands = iter(self._operands(tensors_of(self.env[value]), traced, channels))
            return tree_map_only(Tensor, lambda _: next(operands), self.env[value])
        if isinstance(value, (tuple, list)):
            has_partner = isinstance(before, (tuple, list)) and len(before) == len(value)
            partners = before if has_partner else [None] * len(value)
            pairs = zip(value, partners, strict=True)
            return type(value)(self._argument(item, partner, channels) for item, partner in pairs)
        return value

    def _parameters(
        self, module: nn.Module, old_target: str, channels: int | None
    ) -> dict[str, LayerTensor]:
        """Return operands for the parameters of a module; ``old_target`` names it in the trace."""
        meta_copy = self.trace.meta_copy.model.get_submodule(old_target)
        operands: dict[str, LayerTensor] = {}
        for name, parameter in module._parameters.items():
            if parameter is not None:
                before = meta_copy._parameters.get(name)
                (operands[name],) = self._operands([parameter], before, channels)
        return operands

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
        padded = [*tensors_of(before), *[None] * len(tensors)]
        for tensor, traced in zip(tensors, padded, strict=False):
            dims: dict[int, int] = {}
            if traced is not None and traced.dim() == tensor.dim():
                sizes = self.sizes.dims(traced).items()
                dims = {d: n for d, n in sizes if traced.shape[d] == tensor.shape[d]}
            elif traced is None and tensor.dim() == 1 and channels is not None:
                dims = {0: channels}
            out.append(LayerTensor.of(tensor, dims))
        return out
