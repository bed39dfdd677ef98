"""The cost of a module: multiply-accumulates and parameters, computed from shapes alone.

The forward pass runs on *meta* tensors, which have a shape and a dtype but no memory. So the cost
of any model at any resolution is found without allocating activations or reading weights. The cost
of one operation depends only on the shapes of its arguments (:mod:`fxprune.ops.macs`). An
operation without a formula is listed in :attr:`Cost.uncounted`, so that nothing is missed
silently.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxprune.common.compiled import uncompiled
from fxprune.common.dispatch import DispatchMode, tensors_in
from fxprune.common.identity import IdentityMap
from fxprune.common.models import check_structure
from fxprune.common.public import calling_user_code, public
from fxprune.inputs import ExampleInputs, read
from fxprune.ops.macs import has_formula, op_macs
from fxprune.ops.running import has_shape, run

__all__ = ["Cost", "MacCounter", "cost_of", "count_parameters"]


@public
@dataclass(frozen=True)
class Cost:
    """The cost of one forward pass.

    Attributes
    ----------
    macs:
        Multiply-accumulates of the whole batch; divide by the batch size for those of one sample.
    params:
        The number of elements of all parameters, tied parameters counted once. Buffers are not
        parameters.
    uncounted:
        Operations without a MAC formula and how often they ran. Elementwise and view operations,
        and those that only make tensors, are left out.
    """

    macs: int
    params: int
    uncounted: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.macs:,} MACs, {self.params:,} parameters"


@public
def count_parameters(module: nn.Module) -> int:
    """Return the number of elements of all parameters, tied parameters counted once.

    Examples
    --------
    >>> from torch import nn
    >>> count_parameters(nn.Linear(4, 8))
    40
    """
    check_structure(module)
    return sum(parameter.numel() for parameter in module.parameters())


@public
def cost_of(module: nn.Module, example_inputs: ExampleInputs) -> Cost:
    """Return the MACs and parameters of a module without allocating activations.

    Parameters
    ----------
    module:
        A module that can run on tensors without values. It runs in its current mode (``train`` or
        ``eval``), with its forward hooks. Only the shapes of its parameters and buffers are read,
        and nothing is changed.
    example_inputs:
        A tensor, a tuple of positional arguments, or a dict of keyword arguments. Tensors may be
        nested inside.

    Returns
    -------
    Cost
        The cost of one forward pass over the whole batch.

    Raises
    ------
    ModelError
        If it is not a module that can be called.
    InputError
        If the example inputs hold no tensor.
    CallbackError
        If the module raises an error, for example because its control flow depends on values (as
        the non-maximum suppression of a detector does).

    Examples
    --------
    >>> import torch
    >>> from torch import nn
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(),
    ...     nn.Linear(8 * 16 * 16, 10))
    >>> found = cost_of(model, torch.randn(1, 3, 16, 16))
    >>> found.macs == 8 * 3 * 3 * 3 * 16 * 16 + 8 * 16 * 16 * 10
    True
    >>> print(found)
    75,776 MACs, 20,706 parameters
    """
    module = uncompiled(module)
    check_structure(module)
    args, kwargs = read(example_inputs)
    args, kwargs, state = _meta_tree(args), _meta_tree(kwargs), _meta_state(module)
    counter = _ShapeCounter()
    running = calling_user_code(f"the {type(module).__name__}, run on tensors without data,")
    # functional_call puts the module's own tensors back, even if forward raises an error
    with running, _attributes_restored(module), torch.inference_mode(), counter:
        torch.func.functional_call(module, state, args, kwargs, tie_weights=False)
    return Cost(
        macs=counter.macs,
        params=count_parameters(module),
        uncounted=dict(sorted(counter.uncounted.items())),
    )


@contextlib.contextmanager
def _attributes_restored(module: nn.Module) -> Iterator[None]:
    """Restore the attributes and buffers of all modules afterwards.

    Forward may store tensors on its modules (a detector stores its anchors). Here they have no
    data, and the next real call must not find them.
    """
    stores = [store for below in module.modules() for store in (vars(below), below._buffers)]
    before = [dict(store) for store in stores]
    try:
        yield
    finally:
        for store, values in zip(stores, before, strict=True):
            store.clear()
            store.update(values)


class MacCounter(DispatchMode):
    """A mode that counts the multiply-accumulates of everything that runs inside it.

    Under ``torch.inference_mode()`` it sees the operations that the code calls. Otherwise it sees
    the kernels that torch chose for them. Both are counted. Operations without a formula are
    listed in ``uncounted``.

    Examples
    --------
    >>> import torch
    >>> q = torch.randn(2, 4, 6, 8)  # 4 heads, 6 tokens
    >>> with MacCounter() as counter:
    ...     out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    >>> counter.macs == 2 * 4 * 6 * 6 * (8 + 8)
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not has_formula(func) and not self.runs_whole(func):
            with self:  # einsum, lstm and others consist of operations that have a formula
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = self.run(func, args, kwargs)
        macs = self.macs_of(func, args, kwargs, out)
        if macs is not None:
            self.macs += macs
        elif not (func.is_view or torch.Tag.pointwise in func.tags or _makes_tensors(func)):
            self.uncounted[str(func.overloadpacket)] += 1
        return out

    def runs_whole(self, func: Any) -> bool:
        """Tell whether an operation without a formula runs as a whole, not decomposed."""
        return False

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and return its result."""
        return func(*args, **kwargs)

    def macs_of(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> int | None:
        # a nested tensor has no plain shape, which formulas need
        """Return the multiply-accumulates of one operation, or None if they are not known."""
        ragged = any(tensor.is_nested for tensor in tensors_in(args, kwargs))
        return None if ragged else op_macs(func, args, kwargs, out)


class _ShapeCounter(MacCounter):
    """A counter that runs every operation on shapes alone."""

    def runs_whole(self, func: Any) -> bool:
        """Tell whether the shape of the operation's result is known without decomposing it."""
        return has_shape(func)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation on meta tensors."""
        return run(func, args, kwargs)


def _makes_tensors(func: Any) -> bool:
    """Tell whether an operation takes no tensor, as ``arange`` and ``empty`` do.

    Such an operation only makes tensors, which is not a computation.
    """
    return not any("Tensor" in str(argument.type) for argument in func._schema.arguments)


def _meta_state(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module as meta tensors, by name.

    Each distinct tensor gets one meta tensor, so that tied weights stay tied.
    """
    named = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    metas: IdentityMap[Tensor, Tensor] = IdentityMap()
    state: dict[str, Tensor] = {}
    for name, tensor in named:
        if tensor is not None:
            state[name] = metas.setdefault(tensor, _to_meta(tensor))
    return state


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _meta_tree(tree: Any) -> Any:
    return tree_map_only(Tensor, _to_meta, tree)
