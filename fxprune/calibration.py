"""Batches of a user's loader, as calls of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxprune.common.contents import tensors_of
from fxprune.common.public import calling, drawn_from
from fxprune.errors import ArgumentError
from fxprune.inputs import Call, as_call

__all__ = [
    "Loader",
    "LoaderBatch",
    "batches_of",
    "called",
    "check_dimensions",
    "check_finite",
    "check_loader",
    "check_read",
    "evaluated",
    "loader_call",
]


Loader = Iterable[Any]


@dataclass(frozen=True)
class LoaderBatch:
    """A loader's batch as the model's arguments and the loss's, on the model's device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]
    size: int


def batches_of(loader: Loader, model: nn.Module, example: Call) -> Iterator[LoaderBatch]:
    """A loader's batches, taken apart and copied to the model's device; ``example`` is the call
    that the model was analysed with.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    def copied(tensor: Tensor) -> Tensor:
        # a model may write into its inputs, and they are the loader's
        return tensor.detach().to(device, copy=True)

    for batch in drawn_from(loader):
        (args, kwargs), targets = loader_call(batch, example)
        leaf = next((leaf for leaf in tensors_of((args, kwargs)) if leaf.dim()), None)
        if leaf is None:
            raise ArgumentError(
                "the loader gave inputs without a tensor of samples "
                f"({type(batch[0]).__name__}): batches must be tuples (inputs, *targets)."
            )
        if not len(leaf):
            raise ArgumentError(
                "a batch of the loader holds no sample, of which nothing can be measured. Leave "
                "such batches out."
            )
        if any(leaf.is_meta for leaf in tensors_of((args, kwargs))):
            raise ArgumentError(
                "a batch of the loader lies on the meta device and has no values: give batches "
                "of data."
            )
        if any(bool(leaf.isnan().any()) for leaf in tensors_of((args, kwargs))):
            raise ArgumentError(
                "a batch of the loader holds NaN, of which nothing can be measured. Look at how "
                "its data is made."
            )
        args, kwargs = tree_map_only(Tensor, copied, (args, kwargs))
        yield LoaderBatch(args, kwargs, tree_map_only(Tensor, there, targets), len(leaf))


def called(model: Callable[..., Any], batch: LoaderBatch, *, apart: bool = False) -> Any:
    """What the model gives for a batch; ``apart``: it takes positional arguments and keywords as
    two.

    Raises
    ------
    CallbackError
        If the batch does not fit the model.
    """
    with calling("the model, given a batch of the loader,"):
        return model(batch.args, batch.kwargs) if apart else model(*batch.args, **batch.kwargs)


def check_loader(loader: Any) -> None:
    """Refuse what gives no batches.

    Raises
    ------
    ArgumentError
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


def check_finite(values: Iterable[Any], what: str) -> None:
    """Refuse what came to NaN or infinity.

    Raises
    ------
    ArgumentError
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
    """A loader's batch ``(inputs, *targets)`` as a call of the model, and the targets.

    Inputs are read as example inputs are (:func:`fxprune.inputs.as_call`), but for a list: a
    ``DataLoader`` makes lists of the tuples that a data set gives, so that it holds positional
    arguments. Where the example is one list of tensors (a detector's images), so are tensors in a
    list or a tuple.

    Raises
    ------
    ArgumentError
        If the batch is something else.

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
        one = images and bool(inputs) and all(isinstance(item, Tensor) for item in inputs)
        inputs = ([*inputs],) if one else tuple(inputs)
    return as_call(inputs), tuple(targets)


def check_dimensions(what: str, given: Tensor, analysed: Any) -> None:
    """Refuse a tensor of a batch that has other dimensions than the example's, whatever their
    sizes.

    Raises
    ------
    ArgumentError
    """
    if isinstance(analysed, Tensor) and given.dim() != analysed.dim():
        raise ArgumentError(
            "a batch of the loader does not fit the example that the model was analysed with: "
            f"{what} has {given.dim()} dimensions, and had {analysed.dim()}. Give batches of "
            "samples like the example's."
        )


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; afterwards every module is in the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def check_read(samples: float) -> None:
    """Refuse a loader that gave nothing; ``samples`` (or batches) is how many it gave."""
    if not samples:
        raise ArgumentError(
            "the loader gave no batch, so nothing can be measured. Pass one that is not empty "
            "and can be read again (a DataLoader, a list), not a generator that was used up "
            "before."
        )
