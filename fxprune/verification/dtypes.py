"""A mode in which tensors that forward makes get the dtype of the proof."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fxprune.common.dispatch import tensors_in

__all__ = ["DtypeMode"]


_LOW = frozenset({torch.float16, torch.bfloat16, torch.float32})


class DtypeMode(TorchFunctionMode):
    """A mode in which code that asks for a lower precision gets the model's float64.

    Without it, a model whose code says float32 could not run in float64. With another dtype than
    float64 the mode changes nothing. Under any function mode, ``torch.nn`` does not use its fused
    inference paths.

    Parameters
    ----------
    dtype:
        The dtype of the run.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.dtype is not torch.float64:
            return func(*args, **kwargs)
        if func in _CASTS:
            return args[0].to(self.dtype)
        dtypes = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.dtype))
        if not _LOW.isdisjoint(dtypes):
            args = tuple(self._model_dtype(value) for value in args)
            kwargs = {name: self._model_dtype(value) for name, value in kwargs.items()}
        out = func(*args, **kwargs)
        if (
            isinstance(out, Tensor)
            and _dtype(out) in _LOW
            and not any(_dtype(t) in _LOW for t in tensors_in(args, kwargs))
        ):
            return out.to(self.dtype)  # created without a dtype, or from Python data
        return out

    def _model_dtype(self, value: Any) -> Any:
        return self.dtype if isinstance(value, torch.dtype) and value in _LOW else value


_CASTS = (Tensor.float, Tensor.half, Tensor.bfloat16)


_dtype = torch.Tensor.dtype.__get__
