"""A second device, written in Python.

It computes on the CPU, but its tensors cannot be combined with tensors of other devices. Where
there is no GPU it shows what would go wrong on one: tensors made on the CPU and used with those of
the model, or data read without being copied to the CPU. Use it in a process of its own, because
torch can register one such device and never removes it.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import fxprune.common.models
import fxprune.inputs

NAME = "elsewhere"
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
"""Operations that also take indices from the CPU, on every device of torch."""


class Elsewhere(Tensor):
    """A tensor on this device; ``inner`` has its data."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        with torch.inference_mode(False):
            made: Elsewhere = Tensor._make_wrapper_subclass(
                cls,
                inner.size(),
                strides=inner.stride(),
                storage_offset=inner.storage_offset(),
                dtype=inner.dtype,
                device=torch.device(NAME, 0),
            )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            new = Elsewhere(self.inner.detach().clone())
            is_parameter = isinstance(self, nn.Parameter)
            memo[id(self)] = (
                nn.Parameter(new, self.requires_grad)
                if is_parameter
                else new.requires_grad_(self.requires_grad)
            )
        copied: Tensor = memo[id(self)]
        return copied

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Elsewhere) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.inner = value.inner

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


def compute(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """Run an ATen operation on the CPU, after checking that its tensors lie on one device."""
    name = func._schema.name
    tensors = [leaf for leaf in tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)]
    own = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    others = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.dim()]
    moves = name in ("aten::copy_", "aten::_to_copy") or (
        name in _INDEXING and isinstance(args[0], Elsewhere)
    )
    if own and others and not moves:
        raise RuntimeError(
            f"Expected all tensors to be on the same device: {name} got {NAME} and "
            f"{others[0].device}"
        )
    device = kwargs.get("device")
    here = bool(own) if device is None else torch.device(device).type == NAME
    if name == "aten::copy_":
        here = isinstance(args[0], Elsewhere)
    inner_kwargs = (
        {**kwargs, "device": torch.device("cpu")} if device is not None and here else kwargs
    )
    out = func(*tree_map(_inner, args), **tree_map(_inner, dict(inner_kwargs)))
    known = {id(tensor.inner): tensor for tensor in own}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(value, Elsewhere) or not here:
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(wrapped, out)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Elsewhere) else value


def _kind(value: Any) -> type:
    return Tensor if isinstance(value, Elsewhere) else builtins.type(value)


_library = torch.library.Library("_", "IMPL")


def register() -> None:
    """Register ``torch.device("elsewhere")`` with torch."""
    _setup_privateuseone_for_python_backend(NAME)
    _library.fallback(lambda op, *args, **kwargs: compute(op, args, kwargs), "PrivateUse1")
    # Its tensors are of a subclass, which the checks would take for quantised tensors.
    fxprune.common.models.type = fxprune.inputs.type = _kind  # type: ignore[attr-defined]
