"""Folding of scales and shifts of channels into the weights of a contraction.

A contraction (convolution, transposed convolution, linear layer) is linear in its weight and bias,
so :math:`s (W x + b) + t` is the same contraction with weights :math:`s W` and bias :math:`s b +
t`, computed in float64.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import operator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from fxprune.inference.constants import new_buffer
from fxprune.trace.aliasing import AUGMENTED, first_argument, name_of

__all__ = ["fold"]

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED, F.linear)
_TRANSPOSED_MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_MODULES, nn.Linear)
_OPERANDS = ("input", "other")  # torch's names for the operands of arithmetic


def _arithmetic_of(node: fx.Node) -> str:
    """Return the name of an arithmetic operation of torch, however it is written.

    It is ``div`` for ``x /= y``, and ``""`` for a call that is none.
    """
    name = name_of(node)
    functions = (getattr(operator, name, None), getattr(torch, name, None))
    if node.op != "call_method" and node.target not in functions:
        return ""
    plain = name[1:] if name in AUGMENTED else name.removesuffix("_")
    return "div" if plain == "truediv" else plain


class _Affine(NamedTuple):
    """``source * scale + shift`` along dimension ``dim``.

    ``scale`` and ``shift`` have shape (channels,) and are float64.
    """

    source: fx.Node
    scale: Tensor
    shift: Tensor
    dim: int


class _Contraction(NamedTuple):
    """A convolution or linear layer; its output has its channels along dimension ``dim``."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool
    groups: int
    dim: int

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    def scaled(self, affine: _Affine) -> tuple[Tensor, Tensor]:
        """Return the weight and bias of the contraction followed by an affine map."""
        weight, scale = self.weight.detach().double(), affine.scale
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.detach().double()
        # shape (in, out / groups, ...): the channels of a group are along the second dimension
        if self.transposed:
            by_group = scale.reshape(self.groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = (weight.unflatten(0, (self.groups, -1)) * by_group).flatten(0, 1)
        else:
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.to(self.weight.dtype), (bias * scale + affine.shift).to(self.weight.dtype)


def fold(root: fx.GraphModule, constants: dict[fx.Node, Any]) -> bool:
    """Fold the operation that directly follows each contraction into it.

    Parameters
    ----------
    root:
        The graph and its module, changed in place.
    constants:
        The constant nodes and their values; new buffers are added.

    Returns
    -------
    Whether something was folded.
    """
    folder, found = _Folder(root, constants), False
    for node in list(root.graph.nodes):
        affine = folder.affine(node)
        if affine is not None and len(affine.source.users) == 1 and folder.fold(affine, node):
            node.replace_all_uses_with(affine.source)
            root.graph.erase_node(node)
            found = True
    return found


class _Folder:
    """Recognises affine maps and contractions in one graph, and folds them."""

    def __init__(self, root: fx.GraphModule, constants: dict[fx.Node, Any]) -> None:
        self.root, self.constants = root, constants
        # (contraction, folded operation) -> the module that does both
        self.made: dict[tuple[str, str], str] = {}

    # -- what a node does to the channels of the node before it

    def affine(self, node: fx.Node) -> _Affine | None:
        """Return the affine map that a node applies to channels of another node, or None."""
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            source = first_argument(node)
            is_norm = isinstance(module, _BatchNorm) and _is_plain_module(module)
            if not is_norm or not isinstance(source, fx.Node):
                return None
            mean, var = module.running_mean, module.running_var
            return _normalisation(source, mean, var, module.weight, module.bias, module.eps)
        if node.target is F.batch_norm:
            return self._functional_norm(node)
        return self._arithmetic(node, _arithmetic_of(node))

    def _functional_norm(self, node: fx.Node) -> _Affine | None:
        """Return the affine map of a call of ``F.batch_norm`` with stored statistics, or None."""
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        values = given.arguments
        names = ("running_mean", "running_var", "weight", "bias")
        tensors = [values[name] for name in names]
        if values["training"] is not False or not all(map(self._is_constant_or_none, tensors)):
            return None
        mean, var, weight, bias = map(self.constants.get, tensors)
        return _normalisation(values["input"], mean, var, weight, bias, values["eps"])

    def _arithmetic(self, node: fx.Node, kind: str) -> _Affine | None:
        """Return the affine map of arithmetic with a constant after a contraction, or None."""
        given = {**dict(zip(_OPERANDS, node.args, strict=False)), **node.kwargs}
        if kind not in ("mul", "div", "add", "sub"):
            return None
        if len(node.args) > 2 or set(given) != set(_OPERANDS):
            return None
        first, second = map(given.__getitem__, _OPERANDS)
        source, factor = (first, second) if self._varies(first) else (second, first)
        if (
            not isinstance(source, fx.Node)
            or self._varies(factor)
            or (kind in ("div", "sub") and source is not first)
        ):
            return None
        layer, rank = self._contraction(source), source.meta.get("rank")
        if layer is None or rank is None:
            return None
        along = self._along_channels(factor, layer, rank)
        if along is None:
            return None
        zero, one = torch.zeros_like(along), torch.ones_like(along)
        if kind in ("mul", "div"):
            scale, shift = (along if kind == "mul" else one / along), zero
        else:
            scale, shift = one, (along if kind == "add" else -along)
        return _Affine(source, scale, shift, layer.dim % rank)

    def _varies(self, value: Any) -> bool:
        """Tell whether a value is a node that is no constant."""
        return isinstance(value, fx.Node) and value not in self.constants

    def _along_channels(self, factor: Any, layer: _Contraction, rank: int) -> Tensor | None:
        """Return a constant as one number per channel.

        None if it varies along other dimensions, or would change the dtype.
        """
        factor = self.constants.get(factor) if isinstance(factor, fx.Node) else factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float, Tensor)):
            return None
        if torch.result_type(layer.weight, factor) != layer.weight.dtype:
            return None
        values = torch.as_tensor(factor, dtype=torch.float64, device=layer.weight.device)
        shape = [1] * (rank - values.dim()) + list(values.shape)
        wanted = [1] * rank
        wanted[layer.dim] = layer.channels
        return (
            values.reshape(-1).expand(layer.channels)
            if values.numel() == 1 or shape == wanted
            else None
        )

    # -- into what

    def _is_constant_or_none(self, value: Any) -> bool:
        """Tell whether an argument is a constant node or None."""
        return value is None or value in self.constants

    def _contraction(self, node: fx.Node) -> _Contraction | None:
        """Return the contraction that a node computes, or None."""
        if node.op == "call_module":
            return _module_contraction(self.root.get_submodule(str(node.target)))
        if node.target not in _FUNCTIONS:
            return None
        is_linear = node.target is F.linear
        weight, bias = _argument_of(node, 1, "weight"), _argument_of(node, 2, "bias")
        groups = 1 if is_linear else _argument_of(node, 6, "groups", 1)
        are_constant = weight in self.constants and self._is_constant_or_none(bias)
        if not are_constant or not isinstance(groups, int):
            return None
        tensors = self.constants[weight], self.constants.get(bias)
        return _Contraction(*tensors, node.target in _TRANSPOSED, groups, -1 if is_linear else 1)

    def fold(self, affine: _Affine, node: fx.Node) -> bool:
        """Fold an affine map into the contraction before it.

        Returns
        -------
        False if the map does not act on the channels of the contraction.
        """
        source = affine.source
        layer, rank = self._contraction(source), source.meta.get("rank")
        if layer is None or rank is None or affine.dim != layer.dim % rank:
            return False
        if len(affine.scale) != layer.channels:
            return False
        if layer.dim == 1 and rank != layer.weight.dim():
            return False  # one image without a batch: its channels are another dimension
        weight, bias = layer.scaled(affine)
        if source.op == "call_module":
            folded = str(node.target) if node.op == "call_module" else node.name
            source.target = self._module(source, folded, weight, bias)
            return True
        for position, name, value in ((1, "weight", weight), (2, "bias", bias)):
            buffer = new_buffer(self.root, self.constants, f"{source.name}_{name}", value)
            _set_argument(source, position, name, buffer)
        return True

    def _module(self, source: fx.Node, folded: str, weight: Tensor, bias: Tensor) -> str:
        """Return the name of a contraction module with new weights.

        It keeps its own name, or gets a new one if other calls use the old weights. A head that
        several scales share is called once for each; calls that are followed by the same operation
        share a new module.
        """
        name = str(source.target)
        if (name, folded) in self.made:
            return self.made[name, folded]
        old = self.root.get_submodule(name)
        module = copy.copy(old)
        module.__dict__["_parameters"] = {
            **old._parameters,
            "weight": nn.Parameter(weight),
            "bias": nn.Parameter(bias),
        }
        calls = [node for node in self.root.graph.nodes if node.op == "call_module"]
        called = [self.root.get_submodule(str(node.target)) for node in calls]
        new = name
        if sum(module is old for module in called) > 1:
            candidates = (f"{name}_{i}" for i in itertools.count(1))
            new = next(path for path in candidates if not _has_submodule(self.root, path))
        parent, _, child = new.rpartition(".")
        self.root.get_submodule(parent)._modules[child] = module
        self.made[name, folded] = new
        return new


def _module_contraction(module: Any) -> _Contraction | None:
    """Return the contraction that a module computes, or None."""
    if not _is_plain_module(module) or not isinstance(module, _MODULES):
        return None
    is_transposed = isinstance(module, _TRANSPOSED_MODULES)
    groups = getattr(module, "groups", 1)
    dim = -1 if isinstance(module, nn.Linear) else 1
    return _Contraction(module.weight, module.bias, is_transposed, groups, dim)


def _normalisation(
    source: Any,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> _Affine | None:
    """Return the affine map of batch normalisation with stored statistics.

    None if there are no statistics, because those of the batch are used then.
    """
    if mean is None or var is None:
        return None
    scale = (var.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.detach().double()
    shift = -mean.double() * scale
    return _Affine(source, scale, shift if bias is None else shift + bias.detach().double(), 1)


def _is_plain_module(module: nn.Module) -> bool:
    """Tell whether a module is torch's own and has plain weights.

    Subclasses, hooks and parametrisations may compute something else.
    """
    changed = (
        parametrize.is_parametrized(module) or module._forward_pre_hooks or module._forward_hooks
    )
    return type(module).__module__.startswith("torch.nn") and not changed


def _argument_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument of a call, given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _set_argument(node: fx.Node, position: int, name: str, value: fx.Node) -> None:
    """Replace an argument of a call, by position or by name as it was given."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _has_submodule(root: nn.Module, path: str) -> bool:
    """Tell whether there is a submodule at a path."""
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True
