"""Example inputs: the arguments with which a model is called.

They are a tensor, a tuple of positional arguments, or a dict of keyword arguments. Tensors and
constants may be nested inside. A graph is traced from the shapes alone. Where Python code of a
model runs for real, it also reads values; :func:`storable_values` chooses values that a plan can
store, so that a replay reads the same ones.
"""

from __future__ import annotations

import base64
import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.public import calling_user_code, short_repr
from fxprune.errors import InputError

__all__ = [
    "Call",
    "ExampleInputs",
    "as_call",
    "batch_size",
    "copied_to",
    "decode_tensor",
    "encode_tensor",
    "fill_meta",
    "is_plain",
    "random_in_range",
    "random_like",
    "randomised",
    "read",
    "shapes_of",
    "storable_values",
    "value_range",
    "with_larger_batch",
    "without_floats",
]


ExampleInputs: TypeAlias = Tensor | Sequence[object] | Mapping[str, object]
"""The ways to say how a model is called.

A tensor or a list is one argument, a tuple holds positional arguments, and a mapping holds keyword
arguments.
"""


class Call(NamedTuple):
    """The positional and keyword arguments of a model, as :func:`as_call` reads them."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def values(self) -> tuple[Any, ...]:
        """All arguments, positional ones first."""
        return (*self.args, *self.kwargs.values())


def as_call(example_inputs: Any) -> Call:
    """Return example inputs as positional and keyword arguments.

    A tuple holds positional arguments and a mapping keyword arguments. Anything else, even a list,
    is one argument.

    >>> as_call((1, 2)).args, as_call([1, 2]).args, as_call({"x": 1}).kwargs
    ((1, 2), ([1, 2],), {'x': 1})
    """
    if isinstance(example_inputs, Call):
        return example_inputs
    if isinstance(example_inputs, Mapping):
        return Call((), dict(example_inputs))
    if isinstance(example_inputs, tuple):
        return Call(example_inputs, {})
    return Call((example_inputs,), {})


def read(example_inputs: Any) -> Call:
    """Check example inputs and return them as a call.

    At least one of them must be a tensor. Everything else is a constant of the call.

    Raises
    ------
    InputError
        If they hold no tensor, a NumPy array, or a nested or quantised tensor.

    Examples
    --------
    >>> read({"x": torch.zeros(1), "mask": None, "scale": 2}).kwargs
    {'x': tensor([0.]), 'mask': None, 'scale': 2}
    """
    with calling_user_code("example_inputs, read as the arguments of a call,"):
        call = as_call(example_inputs)
    _check_leaves(_leaves_of(call))
    if any(tensor.is_nested for tensor in tensors_of(call)):
        raise InputError(
            "example_inputs holds a nested tensor, which has no shape that could be traced: pad "
            "it to a plain one."
        )
    if any(tensor.is_quantized for tensor in tensors_of(call)):
        raise InputError(
            "example_inputs holds a quantised tensor: give what the float model is called with, "
            "tensor.dequantize()."
        )
    return call


def _leaves_of(call: Call) -> list[Any]:
    """Return the tensors and constants of a call; raise an InputError if there are none."""
    try:
        leaves = tree_leaves(call)
    except RecursionError as error:
        raise InputError(
            "example_inputs holds itself, or is nested too deep: give the arguments that forward "
            "takes."
        ) from error
    if not leaves:
        raise InputError(
            "example_inputs is empty: pass the tensor (or tuple, or dict of tensors) that the "
            "model is called with."
        )
    return leaves


def _check_leaves(leaves: Sequence[Any]) -> None:
    """Raise an InputError if the leaves hold a NumPy array, or no tensor."""
    wrong = next((leaf for leaf in leaves if isinstance(leaf, np.ndarray)), None)
    if wrong is None and not any(isinstance(leaf, Tensor) for leaf in leaves):
        wrong = leaves[0]
    if wrong is not None:
        raise InputError(
            f"example_inputs must hold tensors, got {type(wrong).__name__}: "
            f"{short_repr(wrong)}. Pass a tensor, a tuple of positional arguments or a dict of "
            "keyword arguments; numbers, flags, text and None may stand beside the tensors."
        )


def shapes_of(call: Call) -> Call:
    """Return the call with every tensor replaced by a meta tensor of its shape and dtype."""
    return _map_tensors(lambda t: torch.empty(tuple(t.shape), dtype=t.dtype, device="meta"), call)


def without_floats(call: Call) -> Call:
    """Return the call with floating-point tensors on the meta device, and others as they are."""
    return _map_tensors(lambda t: t.detach().to("meta") if t.is_floating_point() else t, call)


def with_larger_batch(call: Call, batch: int = 2) -> Call:
    """Return the call with a larger batch, if every tensor has exactly one row.

    Rows are repeated. Any other call is returned as it is. A batch of 1 is ambiguous, because an
    axis of size 1 broadcasts.
    """
    ranked = [tensor for tensor in tensors_of(call) if tensor.dim()]
    if not ranked or any(tensor.shape[0] != 1 for tensor in ranked):
        return call
    return _map_tensors(lambda t: _repeat_row(t, batch) if t.dim() else t, call)


def _repeat_row(row: Tensor, batch: int) -> Tensor:
    """Return a tensor with one row as a tensor with ``batch`` equal rows."""
    if row.is_meta:  # no data to copy
        return torch.empty((batch, *row.shape[1:]), dtype=row.dtype, device="meta")
    return row.expand(batch, *row.shape[1:]).clone()


def copied_to(call: Call, device: torch.device) -> Call:
    """Return a copy of a call for one run, with its tensors detached and on ``device``.

    Other objects are copied too, because forward may change them. An object that cannot be copied
    is passed as it is.
    """
    return Call(*tree_map(lambda leaf: _copied(leaf, device), call))


def _copied(leaf: Any, device: torch.device) -> Any:
    """Return a copy of a tensor or an object; if it cannot be copied, the object itself."""
    if isinstance(leaf, Tensor):
        return leaf.detach().to(device, copy=True)
    if leaf is None or isinstance(leaf, (bool, int, float, complex, str, bytes)):
        return leaf
    try:
        return copy.deepcopy(leaf)
    except Exception:  # a copy can fail in any way
        return leaf


def fill_meta(call: Call) -> Call:
    """Return the call with values for its meta tensors, the same ones each time.

    Floating-point values lie between 0 and 1, all others are zero.
    """
    generator = torch.Generator().manual_seed(0)
    return _map_tensors(lambda t: _random(t, generator) if t.is_meta else t, call)


def randomised(call: Call) -> Call:
    """Return the call with its floating-point values drawn anew between 0 and 1.

    They are the same ones each time.
    """
    generator = torch.Generator().manual_seed(0)
    return _map_tensors(lambda t: _random(t, generator) if t.is_floating_point() else t, call)


def _random(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        return torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
    return torch.zeros(tensor.shape, dtype=tensor.dtype)


def _map_tensors(function: Callable[[Tensor], Tensor], call: Call) -> Call:
    return Call(*tree_map_only(Tensor, function, call))


# ---- values that a plan stores ------------------------------------------------------------------

_MOST_VALUES = 1 << 16  # upper limit on the characters of one tensor's data in a plan


def storable_values(call: Call) -> Call:
    """Return the call with the values that a plan can store.

    Small tensors stay as they are. Large ones are replaced by random values within their range.
    The result does not change when this function is applied again, so a replay reads the values
    that the first analysis read.

    >>> (ids, image), _ = storable_values(((torch.tensor([5, 3]), torch.rand(3, 400, 400)), {}))
    >>> ids, image.shape, bool(image.max() < 1)
    (tensor([5, 3]), torch.Size([3, 400, 400]), True)
    """
    return _map_tensors(_storable, call)


def _storable(tensor: Tensor) -> Tensor:
    """Return a small tensor as it is, and random values within the range of a large one."""
    if not is_plain(tensor) or encode_tensor(tensor):
        return tensor
    return random_in_range(tuple(tensor.shape), tensor.dtype, *value_range(tensor))


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor stores its elements one by one in ordinary memory.

    Meta, sparse and quantised tensors do not, and neither do tensor subclasses.
    """
    if type(tensor) not in (Tensor, Parameter) or tensor.is_meta:
        return False
    return tensor.layout is torch.strided and not tensor.is_quantized


def encode_tensor(tensor: Tensor, most: float = _MOST_VALUES) -> str:
    """Return a tensor's data as compressed text, or "" if that is longer than ``most``."""
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    text = base64.b64encode(zlib.compress(raw)).decode()
    return text if len(text) <= most else ""


def decode_tensor(text: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return the tensor whose data :func:`encode_tensor` wrote as ``text``.

    Raises
    ------
    ValueError
        If the text is damaged, or its data has another size.
    """
    size = torch.empty(shape, dtype=dtype, device="meta").nbytes
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), size + 1)
    except zlib.error as error:
        raise ValueError(f"the data of a tensor is damaged: {error}") from error
    if len(raw) != size:
        raise ValueError(f"the data of a tensor has {len(raw)} bytes, {size} are wanted")
    return (
        torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)
        if size
        else torch.empty(shape, dtype=dtype)
    )


def value_range(tensor: Tensor) -> tuple[float, float]:
    """Return the smallest and the largest finite value of a tensor as Python numbers.

    Real and imaginary parts of complex values count one by one. Without a finite value both are 0.
    """
    values = (torch.view_as_real(tensor) if tensor.is_complex() else tensor).detach().flatten()
    values = values[values.isfinite()]
    return (values.min().item(), values.max().item()) if values.numel() else (0.0, 0.0)


def random_in_range(shape: tuple[int, ...], dtype: torch.dtype, low: float, high: float) -> Tensor:
    """Return a tensor with uniform random values in a range, the same ones each time.

    The first and the last element are set to ``low`` and ``high``, so that :func:`value_range`
    finds the range again.
    """
    if dtype.is_complex:
        return torch.view_as_complex(random_in_range((*shape, 2), dtype.to_real(), low, high))
    generator = torch.Generator().manual_seed(0)
    share = torch.rand(shape, generator=generator, dtype=torch.float64)
    spread = (
        share * (high - low) + low
        if dtype.is_floating_point
        else (share * (high - low + 1)).floor() + low
    )
    out = spread.clamp(low, high).to(dtype)
    if out.numel():
        out.view(-1)[0], out.view(-1)[-1] = low, high
    return out


# ---- batches ------------------------------------------------------------------------------------


def batch_size(example_inputs: Any) -> int:
    """Return the number of examples in a batch.

    This is the length of the first list of tensors (the images of a detector) or the number of
    rows of the first tensor, whichever comes first; 1 if there is neither.

    >>> images = [torch.zeros(3, 8, 8)] * 2
    >>> batch_size((torch.tensor(3.0), torch.zeros(4, 2))), batch_size((images,)), batch_size(None)
    (4, 2, 1)
    """
    for value in as_call(example_inputs).values:
        if _is_list(value):
            return len(value)
        for leaf in tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.dim():
                return leaf.shape[0]
    return 1


def random_like(example_inputs: Any, *, batch: int | None = None, seed: int = 0) -> Any:
    """Return inputs like the example's, with new floating-point values from a normal distribution.

    Other values are kept.

    Parameters
    ----------
    batch:
        The number of examples in the result; by default as many as in the example. It changes
        every tensor that has one row per example and every list of that many tensors. Rows are
        repeated.
    seed:
        The seed for the random values.

    Examples
    --------
    >>> x, index = random_like((torch.zeros(2, 3), torch.tensor([5, 7])), batch=3)
    >>> x.shape, index
    (torch.Size([3, 3]), tensor([5, 7, 5]))
    """
    rows = batch_size(example_inputs)
    generator = torch.Generator().manual_seed(seed)
    redraw = _Redraw(rows, rows if batch is None else batch, generator)
    if isinstance(example_inputs, Mapping):
        return {name: redraw.argument(value) for name, value in example_inputs.items()}
    if isinstance(example_inputs, tuple):
        return tuple(redraw.argument(value) for value in example_inputs)
    return redraw.argument(example_inputs)


@dataclass(frozen=True)
class _Redraw:
    """New inputs for ``batch`` examples, made from inputs for ``rows`` examples."""

    rows: int
    batch: int
    generator: torch.Generator

    def argument(self, value: Any) -> Any:
        """Return one argument with new values; a list of ``rows`` tensors gets a new length."""
        if _is_list(value) and len(value) == self.rows:
            return [self.values(value[i % self.rows]) for i in range(self.batch)]
        return tree_map_only(Tensor, self.tensor, value)

    def tensor(self, tensor: Tensor) -> Tensor:
        """Return a tensor with new values and, if it has one row per example, new rows."""
        if tensor.dim() and tensor.shape[0] == self.rows and self.batch != self.rows:
            tensor = tensor[torch.arange(self.batch, device=tensor.device) % self.rows]
        return self.values(tensor)

    def values(self, tensor: Tensor) -> Tensor:
        """Return a tensor with new floating-point values; other values are kept."""
        tensor = tensor.detach()
        if not tensor.is_floating_point():
            return tensor
        new = torch.randn(tensor.shape, generator=self.generator)
        return new.to(tensor.device, tensor.dtype)


def _is_list(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(item, Tensor) for item in value)
    )
