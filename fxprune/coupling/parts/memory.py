"""Memory of the tensors between parts.

Some tensors are made, or get other memory, without an operation that torch's dispatcher sees. They
are recognized by their place in memory.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.common.identity import IdentityMap
from fxprune.ops import Context

__all__ = ["LabelledMemory", "place_of"]


class LabelledMemory:
    """A record of where labelled tensors lie in memory, to label other names of the same memory.

    ``nn.Parameter(h)``, ``h.as_subclass(...)`` and ``h.data`` have the memory of ``h``, and so has
    ``y`` after ``y.data = h``. They get the labels of ``h``.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        # tensors that operations with a rule returned -> their places
        self._places: Any = WeakTensorKeyDictionary()
        # address of memory -> labelled tensors in it
        self._labelled: dict[int, IdentityMap[Tensor, None]] = {}

    def note(self, tensors: Collection[Tensor], follows: bool) -> None:
        """Record tensors that an operation has returned or written into.

        Parameters
        ----------
        tensors:
            The tensors.
        follows:
            Whether the operation has a rule, and one of its operands has labels or follows from
            labelled tensors.
        """
        for tensor in tensors:
            place = place_of(tensor)
            if tensor in self.context.records and place is not None:
                self._labelled.setdefault(place[0], IdentityMap())[tensor] = None
            if place is not None and (follows or tensor in self.context.records):
                self._places[tensor] = place
            else:
                self._places.pop(tensor, None)

    def is_followed(self, tensor: Tensor) -> bool:
        """Tell whether a tensor was followed from labelled ones, even if it has no labels."""
        return self._places.get(tensor) is not None

    def find_labels(self, tensors: Collection[Tensor]) -> None:
        """Label tensors that are new, or that lie in other memory than before.

        A tensor gets the labels of one with the same memory and layout. If only the memory is the
        same, the labelled tensors in it keep their full width.
        """
        for tensor in tensors:
            place = place_of(tensor)
            if place is None or self._places.get(tensor) == place:
                continue
            if tensor in self._places:  # it has got other memory since
                self.context.records.discard(tensor)
            elif self._is_parameter(tensor):
                continue
            labelled = self._labelled.get(place[0], ())
            others = [t for t in labelled if t is not tensor and self.context.fields(t)]
            same = next((other for other in reversed(others) if place_of(other) == place), None)
            if same is not None:
                self.context.put(tensor, self.context.fields(same), base=same)
                self.note([tensor], True)
            else:
                self.keep_wide(others)

    def explain(self, given: Collection[Tensor], out: Collection[Tensor]) -> None:
        """Keep the operands of a function at full width if its results cannot be explained.

        A result is explained if it has labels or comes from followed operations.

        Parameters
        ----------
        given:
            Tensors among the function's arguments.
        out:
            Tensors that it returned.
        """
        given, out = (list(map(_unwrapped, tensors)) for tensors in (given, out))
        self.find_labels([*given, *out])
        if not all(self.is_followed(tensor) or tensor in self.context.records for tensor in out):
            self.keep_wide(given)

    def keep_wide(self, tensors: Collection[Tensor]) -> None:
        """Note that Python code has to see these tensors at full width."""
        for tensor in tensors:
            self.context.found.full_width += [f.labels for f in self.context.fields(tensor)]

    def _is_parameter(self, tensor: Tensor) -> bool:
        """Tell whether a tensor is a parameter or buffer of the model.

        Its labels are known without its memory, until ``w.data = h`` gives it another one.
        """
        record = self.context.records.get(tensor)
        return record is not None and bool(record.name)


def _unwrapped(tensor: Tensor) -> Tensor:
    """Return the tensor inside the wrappers of ``torch.func`` transforms."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def place_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return a tensor's place in memory.

    Returns
    -------
    tuple or None
        Address, type, offset, shape and strides. None if the tensor has no memory of its own: it
        is sparse or nested, wraps other tensors, or has no data.
    """
    with torch._C.DisableTorchFunction():
        wraps = torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python)
        if wraps or tensor.is_nested or tensor.layout is not torch.strided:
            return None
        try:
            memory = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):
            return None
        return (
            (memory, tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride())
            if memory
            else None
        )
