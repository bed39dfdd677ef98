"""The comparison of the outputs of two runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten

from fxprune.common.contents import has_tensors_as_keys, leaves
from fxprune.errors import VerificationError

__all__ = [
    "NotFiniteError",
    "count_tensors",
    "dense",
    "difference",
    "form",
    "gaps",
    "kinds",
    "leaves",
    "relative_error",
]


class NotFiniteError(VerificationError):
    """The outputs on these values contain no finite number to compare."""


def kinds(value: Any) -> list[str]:
    """Return the dtype and shape of each tensor in a value, for messages.

    >>> kinds([torch.zeros(2, 3)])
    ['float32[2, 3]']
    """
    return [_kind(tensor) for tensor in _tensors(value)]


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def form(value: Any) -> tuple[TreeSpec, list[str]]:
    """Return the containers of an output, and the class name of each leaf.

    Numbers and tensors all have the empty name, because they are compared by value elsewhere.

    >>> form([1, 2]) == form([3, 4]), form([1, 2]) == form((1, 2))
    (True, False)
    """
    found, containers = tree_flatten(value, is_leaf=has_tensors_as_keys)
    return containers, [_class_name(leaf) for leaf in found]


def _class_name(leaf: Any) -> str:
    return "" if isinstance(leaf, (Tensor, int, float)) else type(leaf).__qualname__


def difference(
    got: Any, wanted: Any, rounding: float | Sequence[float] = 0.0
) -> tuple[float, int]:
    """Return the largest relative error over the tensors of two outputs, and their number.

    Parameters
    ----------
    got:
        The output of the pruned model, in any containers.
    wanted:
        The output of the masked original.
    rounding:
        The absolute gap that is no error: one number for all tensors, or one for each.

    Raises
    ------
    NotFiniteError
        If no tensor of ``wanted`` holds a finite number.
    VerificationError
        If the outputs differ in number, shape or dtype, or in a value that is no tensor; or if
        they hold no tensor to compare.
    """
    found, references = list(leaves(got)), list(leaves(wanted))
    _check_count(found, references)
    error, number = 0.0, 0
    for leaf, reference in zip(found, references, strict=True):
        if isinstance(leaf, Tensor) != isinstance(reference, Tensor):
            raise _other_outputs(found, references)
        if isinstance(reference, Tensor):
            gap = rounding if isinstance(rounding, float) else rounding[number]
            error = max(error, _error_of(leaf, reference, number, gap))
            number += 1
        elif not _are_equal(leaf, reference):
            raise VerificationError(
                f"the pruned model gives the number {leaf!r}, the masked original {reference!r}."
            )
    if not any(_has_numbers(tensor) for tensor in _tensors(references)):
        raise NotFiniteError(
            "the outputs are not finite, or empty: the check needs weights and inputs that give "
            "finite outputs."
        )
    return error, number


def _check_count(found: list[Any], references: list[Any]) -> None:
    """Raise an error if the numbers of leaves or tensors differ, or if there is no tensor."""
    count = count_tensors(references)
    if count_tensors(found) != count or len(found) != len(references):
        raise _other_outputs(found, references)
    if not count:
        raise VerificationError("the model gives no tensor, so that there is nothing to compare.")


def _other_outputs(found: list[Any], references: list[Any]) -> VerificationError:
    return VerificationError(
        f"the pruned model gives {_list_outputs(found)}; the masked original gives "
        f"{_list_outputs(references)}."
    )


def gaps(got: Any, wanted: Any) -> list[float]:
    """Return the largest absolute difference of each pair of tensors of two outputs.

    Tensors of different shapes have a difference of 0, and so have NaNs.

    >>> gaps([torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 2.5])])
    [0.5]
    """
    pairs = zip(_tensors(got), _tensors(wanted), strict=True)
    return [_largest_gap(one, other) for one, other in pairs]


def _largest_gap(one: Tensor, other: Tensor) -> float:
    if not one.numel() or one.shape != other.shape:
        return 0.0
    return float((_double(one) - _double(other)).abs().nan_to_num(nan=0.0).max())


def count_tensors(value: Any) -> int:
    """Return the number of tensors in an output."""
    return len(_tensors(value))


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def _error_of(got: Tensor, wanted: Tensor, number: int, rounding: float) -> float:
    """Return the relative error of one output tensor, whose shape and dtype must be the same."""
    if got.shape != wanted.shape:
        raise VerificationError(
            f"output {number} has shape {tuple(got.shape)}, the masked original gives "
            f"{tuple(wanted.shape)}."
        )
    if got.dtype != wanted.dtype:
        raise VerificationError(
            f"output {number} has dtype {got.dtype}, the masked original gives {wanted.dtype}."
        )
    return relative_error(got, wanted, rounding)


def relative_error(got: Tensor, wanted: Tensor, rounding: float = 0.0) -> float:
    """Return ``||got - wanted|| / ||wanted||``.

    Infinities and NaNs at the same positions count as equal, and so do elements whose absolute gap
    is at most ``rounding``. A difference that is not finite gives infinity.
    """
    got, wanted = (_double(tensor) for tensor in (got, wanted))
    gap = (got - wanted).abs()
    same = (got == wanted) | (got.isnan() & wanted.isnan()) | (gap <= rounding)
    gap = torch.where(same, 0.0, gap)
    if not bool(gap.isfinite().all()):
        return math.inf
    norm = float(torch.linalg.vector_norm(torch.where(wanted.isfinite(), wanted, 0.0)))
    return float(torch.linalg.vector_norm(gap)) / (norm or 1.0)


def dense(tensor: Tensor) -> Tensor:
    """Return a strided, unquantized copy of a tensor, without its gradient history."""
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        return tensor.to_dense()
    return tensor.dequantize() if tensor.is_quantized else tensor.clone()


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _has_numbers(tensor: Tensor) -> bool:
    return bool(_double(tensor).isfinite().any())


def _are_equal(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    return (
        bool(one == other)
        or abs(one - other) <= 1e-6 * abs(other)
        or (one != one and other != other)
    )


def _list_outputs(outputs: list[Any]) -> str:
    return f"{len(outputs)} outputs ({', '.join(kinds(outputs)) or 'no tensor'})"
