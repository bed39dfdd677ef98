"""Which tensors between parts lie where: some are made, or get other memory, without an operation
that torch's dispatcher sees.
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
    """Knows the memory of labelled tensors, by which what is the same tensor under another name
    gets their labels.

    ``nn.Parameter(h)``, ``h.as_subclass(...)`` and ``h.data`` are such; so is what gets its memory
    by ``y.data = h``.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self._places: Any = WeakTensorKeyDictionary()  # of what operations gave that are followed
        self._labelled: dict[int, IdentityMap[Tensor, None]] = {}  # by the address of the memory

    def note(self, tensors: Collection[Tensor], follows: bool) -> None:
        """An operation gave these, or wrote into them.

        ``follows``: it has a rule, and labels went in, or what follows from such.
        """
        for tensor in tensors:
            place = place_of(tensor)
            if tensor in self.context.records and place is not None:
                self._labelled.setdefault(place[0], IdentityMap())[tensor] = None
            if place is not None and (follows or tensor in self.context.records):
                self._places[tensor] = place
            else:
                self._places.pop(tensor, None)

    def follows(self, tensor: Tensor) -> bool:
        """Whether all is known of a tensor, also where it has no labels."""
        return self._places.get(tensor) is not None

    def meet(self, tensors: Collection[Tensor]) -> None:
        """Find labels of those that are new, or lie elsewhere by now; those laid out in a way of
        their own see the full width.
        """
        for tensor in tensors:
            place = place_of(tensor)
            if (
                place is None
                or self._places.get(tensor) == place
                or (tensor not in self._places and self._is_models(tensor))
            ):
                continue
            if tensor in self._places:  # it was exchanged for another
                self.context.records.discard(tensor)
            others = [
                other
                for other in self._labelled.get(place[0], ())
                if other is not tensor and self.context.fields(other)
            ]
            same = next((other for other in reversed(others) if place_of(other) == place), None)
            if same is not None:
                self.context.put(tensor, self.context.fields(same), base=same)
                self.note([tensor], True)
            else:
                self.see_whole(others)

    def explain(self, given: Collection[Tensor], out: Collection[Tensor]) -> None:
        """See at full width what went into a function that gave something which no followed
        operation has made.
        """
        given, out = (list(map(_unwrapped, tensors)) for tensors in (given, out))
        self.meet([*given, *out])
        if not all(self.follows(tensor) or tensor in self.context.records for tensor in out):
            self.see_whole(given)

    def see_whole(self, tensors: Collection[Tensor]) -> None:
        self.context.found.wide += [
            f.labels for tensor in tensors for f in self.context.fields(tensor)
        ]

    def _is_models(self, tensor: Tensor) -> bool:
        """A parameter or buffer is known by itself, also where its memory is, until ``w.data = h``
        gives it another.
        """
        record = self.context.records.get(tensor)
        return record is not None and bool(record.name)


def _unwrapped(tensor: Tensor) -> Tensor:
    """What the transforms of ``torch.func`` have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def place_of(tensor: Tensor) -> tuple[Any, ...] | None:
    """Where a tensor lies, and how; None where it has no memory of its own: it is sparse, nested,
    or wraps others.
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
