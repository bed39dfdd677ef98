"""Checks of models that do not depend on example inputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.common.contents import named_tensors
from fxprune.common.hooks import has_replaced_forward, replaced_forward_message
from fxprune.errors import ModelError

__all__ = ["check_model", "check_structure"]


def check_model(model: Any) -> None:
    """Refuse a model that cannot be pruned, whatever the example inputs are.

    Raises
    ------
    ModelError
        If the model has a defect that :func:`check_structure` finds, a replaced forward, quantised
        or unusual tensors, tensors on several devices, or NaN among its parameters. The message
        names the module or the tensor and says what to do.
    """
    check_structure(model)
    if has_replaced_forward(model):
        raise ModelError(replaced_forward_message(model))
    _check_quantised(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        _check_kind(name, tensor)
    _check_one_device(model)
    _check_no_nan(model)


def _check_one_device(model: nn.Module) -> None:
    """Refuse a model whose parameters and buffers are on several devices."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices = {tensor.device: name for name, tensor in reversed(tensors)}
    if len(devices) > 1:
        where = ", ".join(sorted(f"{name} on {device}" for device, name in devices.items()))
        raise ModelError(
            f"the model lies on {len(devices)} devices ({where}): move it to one with "
            "model.to(device) first."
        )


def _check_no_nan(model: nn.Module) -> None:
    """Refuse a model with NaN among its parameters."""
    norms: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.is_meta:
            norms[name] = torch.linalg.vector_norm(parameter.detach()).double()
    # one test for all parameters: on a GPU each test waits
    if norms and bool(torch.stack(list(norms.values())).isnan().any()):
        name = next(name for name, norm in norms.items() if bool(norm.isnan()))
        raise ModelError(
            f"parameter {name!r} contains NaN, so nothing can be ranked: load or initialise the "
            "weights first."
        )


def check_structure(model: Any) -> None:
    """Refuse a model that cannot be run on meta tensors.

    Raises
    ------
    ModelError
        If the object is not a complete ``torch.nn.Module``, has no Python code or no forward,
        contains itself, or has uninitialised parameters. The message says what to do.
    """
    if not isinstance(model, nn.Module):
        kind = (
            f"the class {model.__name__}"
            if isinstance(model, type)
            else f"a {type(model).__name__}"
        )
        inner = " Give its .model." if isinstance(getattr(model, "model", None), nn.Module) else ""
        raise ModelError(f"expected a torch.nn.Module as model, got {kind}.{inner}")
    _check_tree(model)
    if type(model).forward is nn.Module.forward:
        raise ModelError(
            f"a {type(model).__name__} has no forward, so it cannot be called: give the module "
            "that calls it."
        )
    lazy = next(
        (name for name, t in named_tensors(model).items() if nn.parameter.is_lazy(t)), None
    )
    if lazy is not None:
        raise ModelError(
            f"{lazy!r} is uninitialised (a lazy module): run the model once on an input first."
        )


def _check_quantised(model: nn.Module) -> None:
    """Refuse a model with quantised modules."""
    for name, module in model.named_modules():
        if _is_quantised(type(module)):
            raise _quantised(name or "the model", type(module).__name__)


def _is_quantised(kind: type) -> bool:
    """Tell whether a class of modules computes with quantised weights."""
    packages = ("nn.quantized", "nn.intrinsic.quantized")
    is_in_package = any(package in kind.__module__ for package in packages)
    return is_in_package and "Functional" not in kind.__name__.removeprefix("Q")


_STORE_TYPES: Mapping[str, type] = {
    "_parameters": Tensor,
    "_buffers": Tensor,
    "_modules": nn.Module,
}


def _check_module(name: str, module: nn.Module) -> None:
    """Refuse a module without Python code, or whose registers are missing or hold wrong types.

    The registers are missing if ``nn.Module.__init__`` was not called.
    """
    if isinstance(module, torch.jit.ScriptModule):
        raise ModelError(
            f"{repr(name) if name else 'the model'} is a TorchScript module, which has no Python "
            "code to trace: take the nn.Module that it was made from."
        )
    title = repr(name) if name else f"this {type(module).__name__}"
    for store, kind in _STORE_TYPES.items():
        entries = vars(module).get(store)
        if not isinstance(entries, Mapping) or not hasattr(module, "training"):
            missing = "training" if isinstance(entries, Mapping) else store
            raise ModelError(
                f"{title} has no {missing}, as every torch.nn.Module has: call super().__init__() "
                "first in its __init__."
            )
        for key, value in entries.items():
            if value is not None and not isinstance(value, kind):
                raise ModelError(
                    f"{store}[{key!r}] of {title} is a {type(value).__name__}, no "
                    f"{kind.__name__}: take it out there."
                )


def _check_tree(model: nn.Module) -> None:
    """Check each module of a model, and refuse a module that contains itself.

    A walk through the modules of such a model would never end.
    """
    done: set[nn.Module] = set()

    def visit(module: nn.Module, above: Mapping[nn.Module, str], prefix: str) -> None:
        """Check a module and all below it; ``above`` names the modules that contain it."""
        _check_module(prefix.removesuffix("."), module)
        for name, child in module._modules.items():
            if child is not None and child in above:
                raise ModelError(
                    f"{prefix}{name} is {above[child]}, so this {type(model).__name__} contains "
                    "itself. Hold the module above where torch does not register it: in a list, "
                    "or with object.__setattr__."
                )
            if child is not None and child not in done:
                done.add(child)
                visit(child, {**above, child: repr(f"{prefix}{name}")}, f"{prefix}{name}.")

    visit(model, {model: "the model itself"}, "")


def _check_kind(name: str, tensor: Tensor) -> None:
    """Refuse a tensor whose elements cannot be selected or computed with directly."""
    if tensor.is_quantized:
        raise _quantised(name, str(tensor.dtype))
    if type(tensor.data) not in (Tensor, nn.Parameter):
        raise ModelError(
            f"{name!r} is a {type(tensor.data).__name__}, a tensor of a kind of its own, as "
            "quantised and distributed weights are: prune the model with plain tensors first, "
            "then quantise or distribute the result."
        )
    if isinstance(tensor, nn.Parameter) and tensor.layout is not torch.strided:
        raise ModelError(f"{name!r} is sparse ({tensor.layout}): give it as tensor.to_dense().")
    if any(getattr(tensor, "names", ())):  # newer versions of torch have no named dimensions
        raise ModelError(
            f"{name!r} has named dimensions, which few operations take: take them off with "
            "rename(None)."
        )
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        raise ModelError(
            f"{name!r} is stored as {tensor.dtype}, in which nothing can be added: prune the "
            "model in bfloat16 or float32, and bring the result to 8 bits."
        )


def _quantised(name: str, kind: str) -> ModelError:
    """Return the error for a quantised tensor or module."""
    return ModelError(
        f"{name!r} is already quantised ({kind}): prune the float model first, then quantise the "
        "result."
    )
