r"""What scales and shifts the channels of a contraction goes into its weights.

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
from fxprune.trace.aliasing import AUGMENTED, first_of, name_of

__all__ = ["fold"]

_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_FUNCTIONS = (F.conv1d, F.conv2d, F.conv3d, *_TRANSPOSED, F.linear)
_TRANSPOSED_MODULES = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_MODULES = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED_MODULES, nn.Linear)
_OPERANDS = ("input", "other")  # as torch names those of arithmetic


def _arithmetic_of(node: fx.Node) -> str:
    """The name of the operation that an operator, a function or a method of torch is, however it
    is spelled: ``div`` for ``x /= y``.
    """
    name = name_of(node)
    own = (getattr(operator, name, None), getattr(torch, name, None))
    if node.op != "call_method" and node.target not in own:
        return ""
    plain = name[1:] if name in AUGMENTED else name.removesuffix("_")
    return "div" if plain == "truediv" else plain


class _Affine(NamedTuple):
    """``source * scale + shift``, both of shape (channels,), float64, along dimension ``dim``."""

    source: fx.Node
    scale: Tensor
    shift: Tensor
    dim: int


class _Contraction(NamedTuple):
    """A convolution or linear layer; ``dim`` is that of its channels in what it gives."""

    weight: Tensor
    bias: Tensor | None
    transposed: bool
    groups: int
    dim: int

    @property
    def channels(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]

    def scaled(self, affine: _Affine) -> tuple[Tensor, Tensor]:
        """The weight and bias of what gives the affine map of the result."""
        weight, scale = self.weight.detach().double(), affine.scale
        bias = torch.zeros_like(scale) if self.bias is None else self.bias.detach().double()
        # (in, out / groups, ...): the channels of a group lie along the second dimension
        if self.transposed:
            by_group = scale.reshape(self.groups, 1, -1, *[1] * (weight.dim() - 2))
            weight = (weight.unflatten(0, (self.groups, -1)) * by_group).flatten(0, 1)
        else:
            weight = weight * scale.reshape(-1, *[1] * (weight.dim() - 1))
        return weight.to(self.weight.dtype), (bias * scale + affine.shift).to(self.weight.dtype)


def fold(root: fx.GraphModule, constants: dict[fx.Node, Any]) -> bool:
    """Fold what directly follows each contraction; returns whether there was anything."""
    folder, found = _Folder(root, constants), False
    for node in list(root.graph.nodes):
        affine = folder.affine(node)
        if affine is not None and len(affine.source.users) == 1 and folder.fold(affine, node):
            node.replace_all_uses_with(affine.source)
            root.graph.erase_node(node)
            found = True
    return found


class _Folder:
    def __init__(self, root: fx.GraphModule, constants: dict[fx.Node, Any]) -> None:
        self.root, self.constants = root, constants
        # (contraction, what was folded into it) -> the module that does both
        self.made: dict[tuple[str, str], str] = {}

    # -- what a node does to the channels of the node before it

    def affine(self, node: fx.Node) -> _Affine | None:
        if node.op == "call_module":
            module = self.root.get_submodule(str(node.target))
            source = first_of(node)
            if (
                not isinstance(module, _BatchNorm)
                or not _is_plain_module(module)
                or not isinstance(source, fx.Node)
            ):
                return None
            return _normalisation(
                source,
                module.running_mean,
                module.running_var,
                module.weight,
                module.bias,
                module.eps,
            )
        if node.target is F.batch_norm:
            return self._functional_norm(node)
        return self._arithmetic(node, _arithmetic_of(node))

    def _functional_norm(self, node: fx.Node) -> _Affine | None:
        given = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        given.apply_defaults()
        values = given.arguments
        tensors = [values[name] for name in ("running_mean", "running_var", "weight", "bias")]
        if values["training"] is not False or any(
            tensor is not None and tensor not in self.constants for tensor in tensors
        ):
            return None
        mean, var, weight, bias = (
            None if tensor is None else self.constants[tensor] for tensor in tensors
        )
        return _normalisation(values["input"], mean, var, weight, bias, values["eps"])

    def _arithmetic(self, node: fx.Node, kind: str) -> _Affine | None:
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
        return isinstance(value, fx.Node) and value not in self.constants

    def _along_channels(self, factor: Any, layer: _Contraction, rank: int) -> Tensor | None:
        """A constant as one number per channel, if it does not vary along other dimensions nor
        changes the dtype.
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

    def _contraction(self, node: fx.Node) -> _Contraction | None:
        if node.op == "call_module":
            module: Any = self.root.get_submodule(str(node.target))
            if not _is_plain_module(module) or not isinstance(module, _MODULES):
                return None
            linear = isinstance(module, nn.Linear)
            transposed = isinstance(module, _TRANSPOSED_MODULES)
            return _Contraction(
                module.weight,
                module.bias,
                transposed,
                getattr(module, "groups", 1),
                -1 if linear else 1,
            )
        if node.target not in _FUNCTIONS:
            return None
        linear = node.target is F.linear
        weight, bias = _argument_of(node, 1, "weight"), _argument_of(node, 2, "bias")
        groups = 1 if linear else _argument_of(node, 6, "groups", 1)
        if (
            weight not in self.constants
            or (bias is not None and bias not in self.constants)
            or not isinstance(groups, int)
        ):
            return None
        tensors = self.constants[weight], None if bias is None else self.constants[bias]
        return _Contraction(*tensors, node.target in _TRANSPOSED, groups, -1 if linear else 1)

    def fold(self, affine: _Affine, node: fx.Node) -> bool:
        """Put an affine map of its result into a contraction; False where it does not lie along
        its channels.
        """
        source = affine.source
        layer, rank = self._contraction(source), source.meta.get("rank")
        if (
            layer is None
            or rank is None
            or affine.dim != layer.dim % rank
            or len(affine.scale) != layer.channels
        ):
            return False
        if layer.dim == 1 and rank != layer.weight.dim():
            return False  # one image without a batch: its channels lie elsewhere
        weight, bias = layer.scaled(affine)
        if source.op == "call_module":
            source.target = self._module(
                source, str(node.target) if node.op == "call_module" else node.name, weight, bias
            )
            return True
        for position, name, value in ((1, "weight", weight), (2, "bias", bias)):
            _give(
                source,
                position,
                name,
                new_buffer(self.root, self.constants, f"{source.name}_{name}", value),
            )
        return True

    def _module(self, source: fx.Node, folded: str, weight: Tensor, bias: Tensor) -> str:
        """The name of a contraction with these weights: its own, or a new one where others use
        what it was.

        Heads that several scales share are called once for each; those that are followed by the
        same are one module again.
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
        new = name
        if sum(self.root.get_submodule(str(node.target)) is old for node in calls) > 1:
            new = next(
                free for i in itertools.count(1) if not _has(self.root, free := f"{name}_{i}")
            )
        parent, _, own = new.rpartition(".")
        self.root.get_submodule(parent)._modules[own] = module
        self.made[name, folded] = new
        return new


def _normalisation(
    source: Any,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> _Affine | None:
    """What batch normalisation does with stored statistics; None where there are none, and the
    batch's are taken.
    """
    if mean is None or var is None:
        return None
    scale = (var.double() + eps).rsqrt()
    scale = scale if weight is None else scale * weight.detach().double()
    shift = -mean.double() * scale
    return _Affine(source, scale, shift if bias is None else shift + bias.detach().double(), 1)


def _is_plain_module(module: nn.Module) -> bool:
    """Whether a module is torch's own, with weights as they stand: subclasses, hooks,
    parametrisations may do something else.
    """
    changed = (
        parametrize.is_parametrized(module) or module._forward_pre_hooks or module._forward_hooks
    )
    return type(module).__module__.startswith("torch.nn") and not changed


def _argument_of(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _give(node: fx.Node, position: int, name: str, value: fx.Node) -> None:
    """Let a call have another argument, spelt as it is."""
    if len(node.args) > position:
        node.update_arg(position, value)
    else:
        node.update_kwarg(name, value)


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True
