"""Batches of a user's loader, as calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.public import calling_user_code, iterate_user_input
from fxprune.errors import ArgumentError
from fxprune.inputs import Call, as_call

__all__ = [
    "Loader",
    "LoaderBatch",
    "batches_of",
    "call_model",
    "check_dimensions",
    "check_finite",
    "check_loader",
    "check_read",
    "check_repeatable",
    "device_of",
    "loader_call",
]


Loader = Iterable[Any]


@dataclass(frozen=True)
class LoaderBatch:
    """A batch of a loader: the arguments of the model and of the loss, on the model's device.

    Attributes
    ----------
    args, kwargs:
        The arguments of the model.
    targets:
        The further arguments of the loss.
    size:
        Number of samples: the length of the first tensor.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]
    size: int


def batches_of(loader: Loader, model: nn.Module, example: Call) -> Iterator[LoaderBatch]:
    """Yield a loader's batches as calls, copied to the model's device.

    Parameters
    ----------
    loader:
        Batches ``(inputs, *targets)``.
    model:
        The model that they are for.
    example:
        The call that the model was analysed with.

    Raises
    ------
    ArgumentError
        If a batch is no such tuple, or has no tensor with samples, or holds no samples, meta
        tensors or NaN.
    CallbackError
        If the loader raises an error.
    """
    device = device_of(model)

    def moved(tensor: Tensor) -> Tensor:
        """Move a tensor to the model's device."""
        return tensor.to(device)

    def copied(tensor: Tensor) -> Tensor:
        """Copy a tensor to the model's device."""
        # a model may write into its inputs, which belong to the loader
        return tensor.detach().to(device, copy=True)

    for batch in iterate_user_input(loader):
        call, targets = loader_call(batch, example)
        size = _checked_size(call, batch)
        args, kwargs = tree_map_only(Tensor, copied, (call.args, call.kwargs))
        yield LoaderBatch(args, kwargs, tree_map_only(Tensor, moved, targets), size)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _checked_size(call: Call, batch: Any) -> int:
    """Return the number of samples in a batch: the length of its first tensor.

    Raises
    ------
    ArgumentError
        If nothing can be measured on the batch.
    """
    tensors = tensors_of((call.args, call.kwargs))
    first = next((tensor for tensor in tensors if tensor.dim()), None)
    if first is None:
        raise ArgumentError(
            "the loader gave inputs without a tensor of samples "
            f"({type(batch[0]).__name__}): batches must be tuples (inputs, *targets)."
        )
    if not len(first):
        raise ArgumentError(
            "a batch of the loader holds no sample, of which nothing can be measured. Leave "
            "such batches out."
        )
    if any(tensor.is_meta for tensor in tensors):
        raise ArgumentError(
            "a batch of the loader lies on the meta device and has no values: give batches "
            "of data."
        )
    if any(bool(tensor.isnan().any()) for tensor in tensors):
        raise ArgumentError(
            "a batch of the loader holds NaN, of which nothing can be measured. Look at how "
            "its data is made."
        )
    return len(first)


def call_model(model: Callable[..., Any], batch: LoaderBatch, *, packed: bool = False) -> Any:
    """Return what the model gives for a batch.

    Parameters
    ----------
    model:
        The model, or a function.
    batch:
        The batch.
    packed:
        Whether the model takes its positional and keyword arguments as a tuple and a dict.

    Raises
    ------
    CallbackError
        If the model raises an error, because the batch does not fit.
    """
    with calling_user_code("the model, given a batch of the loader,"):
        return model(batch.args, batch.kwargs) if packed else model(*batch.args, **batch.kwargs)


def check_loader(loader: Any) -> None:
    """Refuse a value that gives no batches.

    Raises
    ------
    ArgumentError
        If it is a class, a tensor, a string or a mapping, or is not iterable.
    """
    listed = isinstance(loader, Iterable) or hasattr(type(loader), "__getitem__")
    if isinstance(loader, (str, bytes, Mapping, Tensor, type)) or not listed:
        what = (
            f"the class {loader.__name__}"
            if isinstance(loader, type)
            else f"a {type(loader).__name__}"
        )
        raise ArgumentError(
            f"the loader is {what}, which holds no batches: give a DataLoader, or a list of "
            "batches (inputs, *targets)."
        )


def check_repeatable(loader: Any) -> None:
    """Refuse a loader that can be read only once.

    Raises
    ------
    ArgumentError
        If it is an iterator, or gives no batches.
    """
    check_loader(loader)
    if isinstance(loader, Iterator):
        raise ArgumentError(
            f"the loader is a {type(loader).__name__}, which can be read only once. Pass one that "
            "can be read again: a DataLoader, or list(...) of it."
        )


def check_finite(values: Iterable[Any], what: str) -> None:
    """Refuse tensors that hold NaN or infinity.

    Parameters
    ----------
    values:
        The values; those that are not floating-point tensors are skipped.
    what:
        What they are, for the message.

    Raises
    ------
    ArgumentError
        If a tensor holds NaN or infinity.
    """
    for value in values:
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and not bool(value.isfinite().all())
        ):
            raise ArgumentError(
                f"{what} is NaN or infinite, so nothing can be measured. Look at what the loader "
                "gives, and its scale."
            )


def loader_call(batch: Any, example: Call | None = None) -> tuple[Call, tuple[Any, ...]]:
    """Return a batch ``(inputs, *targets)`` of a loader as a call of the model, and the targets.

    Inputs are read like example inputs (:func:`fxprune.inputs.as_call`), except a list. A
    ``DataLoader`` turns the tuples of a data set into lists, so a list holds positional arguments.
    If the example is a single list of tensors (images for a detector), then a list or tuple of
    tensors is one argument too.

    Parameters
    ----------
    batch:
        The batch.
    example:
        The call that the model was analysed with.

    Raises
    ------
    ArgumentError
        If the batch is not a non-empty tuple or list.

    Examples
    --------
    >>> loader_call(({"ids": 1}, 3))
    (Call(args=(), kwargs={'ids': 1}), (3,))
    >>> loader_call([[4, 5], 6])
    (Call(args=(4, 5), kwargs={}), (6,))
    """
    if not isinstance(batch, (tuple, list)) or not batch:
        what = (
            "an empty batch" if isinstance(batch, (tuple, list)) else f"a {type(batch).__name__}"
        )
        raise ArgumentError(
            f"the loader gave {what}: batches must be tuples (inputs, *targets), as a DataLoader "
            "gives them."
        )
    inputs, *targets = batch
    if isinstance(inputs, (tuple, list)):
        images = example is not None and [*map(type, example.args)] == [list]
        is_single = images and bool(inputs) and all(isinstance(item, Tensor) for item in inputs)
        inputs = ([*inputs],) if is_single else tuple(inputs)
    return as_call(inputs), tuple(targets)


def check_dimensions(what: str, given: Tensor, analysed: Any) -> None:
    """Refuse a tensor that has another number of dimensions than the example's; sizes may differ.

    Parameters
    ----------
    what:
        What the tensor is, for the message.
    given:
        The tensor of a batch.
    analysed:
        The tensor of the example; any other value is not checked.

    Raises
    ------
    ArgumentError
        If the numbers of dimensions differ.
    """
    if isinstance(analysed, Tensor) and given.dim() != analysed.dim():
        raise ArgumentError(
            "a batch of the loader does not fit the example that the model was analysed with: "
            f"{what} has {given.dim()} dimensions, and had {analysed.dim()}. Give batches of "
            "samples like the example's."
        )


def check_read(samples: float) -> None:
    """Refuse a loader that gave nothing.

    Parameters
    ----------
    samples:
        How many samples or batches it gave.

    Raises
    ------
    ArgumentError
        If it gave none.
    """
    if not samples:
        raise ArgumentError(
            "the loader gave no batch, so nothing can be measured. Pass one that is not empty "
            "and can be read again (a DataLoader, a list), not a generator that was used up "
            "before."
        )
