"""What a module costs: multiply-accumulates and parameters, read off shapes alone.

The forward pass runs on *meta* tensors, which have a shape and a dtype but no memory, so that the cost of any model
at any resolution is had without allocating an activation and without touching a weight. What one operation costs is a
pure function of its arguments' shapes: the formulas are those of :mod:`torch.utils.flop_counter`, which counts a
multiply and an add as two operations. **One MAC is one multiply-accumulate here**, which is half of that.

Only contractions are counted (matrix products, convolutions, attention): additions, activations and normalisations
cost memory traffic, not MACs. What ran without a formula is reported by name in :attr:`Cost.uncounted`, so that
nothing is missed silently.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry

from fxprune import shapes
from fxprune.inputs import as_call

__all__ = ["Cost", "cost_of", "count_parameters", "op_macs"]


@dataclass(frozen=True)
class Cost:
    """What one forward pass costs.

    Attributes:
        macs: multiply-accumulates of the whole batch that was passed in (divide by the batch size for one sample's).
        params: elements of all parameters, a tied parameter counted once. Buffers are not parameters.
        uncounted: operations without a MAC formula and how often they ran, elementwise and view operations left out.
    """

    macs: int
    params: int
    uncounted: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.macs:,} MACs, {self.params:,} parameters"


def count_parameters(module: nn.Module) -> int:
    """Number of elements in all parameters of ``module``, a tied parameter counted once.

    Example:
        >>> from torch import nn
        >>> count_parameters(nn.Linear(4, 8))
        40
    """
    return sum(parameter.numel() for parameter in module.parameters())


def op_macs(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int | None:
    """Multiply-accumulates of one ATen operation, or None where it has no formula.

    Meant for a ``TorchDispatchMode``: ``func``, ``args`` and ``kwargs`` are what ``__torch_dispatch__`` receives,
    ``out`` is what the operation returned. Only shapes are read.

    Example:
        >>> import torch
        >>> a, b = torch.empty(3, 5), torch.empty(5, 7)
        >>> op_macs(torch.ops.aten.mm.default, (a, b), {}, a @ b) == 3 * 5 * 7
        True
        >>> op_macs(torch.ops.aten.relu.default, (a,), {}, a) is None
        True
    """
    packet = getattr(func, "overloadpacket", func)
    if packet in _EXTRA:
        return _EXTRA[packet](args, out)
    formula = flop_registry.get(packet)
    if formula is None:
        return None
    return int(formula(*args, **kwargs, out_val=out)) // 2


def cost_of(module: nn.Module, example_inputs: Any) -> Cost:
    """MACs and parameters of ``module`` on ``example_inputs``, without allocating activations.

    Args:
        module: any module that runs on tensors whose values are not known. It runs in the mode that it is in
            (``train`` or ``eval``), with its forward hooks; its parameters and buffers are read for their shapes and
            never written.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments; tensors may be
            nested inside.

    Returns:
        The cost of one forward pass over the whole batch.

    Raises:
        RuntimeError: (or what the module itself raises) if the control flow depends on values, as a detector's
            non-maximum suppression does.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(8 * 16 * 16, 10))
        >>> found = cost_of(model, torch.randn(1, 3, 16, 16))
        >>> found.macs == 8 * 3 * 3 * 3 * 16 * 16 + 8 * 16 * 16 * 10
        True
        >>> print(found)
        75,776 MACs, 20,706 parameters
    """
    args, kwargs = as_call(example_inputs)
    # One meta tensor per distinct tensor, so that tied weights stay tied. functional_call swaps the module's own
    # tensors out for the call and back, also when the forward pass raises.
    metas: dict[int, Tensor] = {}
    state = {name: metas.setdefault(id(tensor), _to_meta(tensor)) for name, tensor in _state(module)}
    args, kwargs = _meta_tree(args), _meta_tree(kwargs)
    counter = _Counter()
    with _remembering_nothing(module), torch.inference_mode(), counter:
        torch.func.functional_call(module, state, args, kwargs, tie_weights=False)
    return Cost(macs=counter.macs, params=count_parameters(module), uncounted=dict(sorted(counter.uncounted.items())))


@contextlib.contextmanager
def _remembering_nothing(module: nn.Module) -> Iterator[None]:
    """What forward remembers on its modules (a detector its anchors) has no data here: it must not meet the next real call."""
    stores = [store for own in module.modules() for store in (vars(own), own._buffers)]
    before = [dict(store) for store in stores]
    try:
        yield
    finally:
        for store, values in zip(stores, before, strict=True):
            store.clear()
            store.update(values)


class _Counter(TorchDispatchMode):
    """Runs every operation on shapes alone and adds up its MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0
        self.uncounted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        packet = func.overloadpacket
        if packet not in flop_registry and packet not in _EXTRA and not shapes.is_quick(func):
            with self:  # einsum, lstm, ... are made of operations that have a formula
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = shapes.run(func, args, kwargs)
        macs = op_macs(func, args, kwargs, out)
        if macs is not None:
            self.macs += macs
        elif not (func.is_view or torch.Tag.pointwise in func.tags or _makes_tensors(func)):
            self.uncounted[str(packet)] += 1
        return out


def _makes_tensors(func: Any) -> bool:
    """Whether an operation takes no tensor (arange, empty, ...): where a tensor is born nothing is computed."""
    return not any("Tensor" in str(argument.type) for argument in func._schema.arguments)


def _state(module: nn.Module) -> list[tuple[str, Tensor]]:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor) for name, tensor in named if tensor is not None]


def _to_meta(tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _meta_tree(tree: Any) -> Any:
    return tree_map_only(Tensor, _to_meta, tree)


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _elements_of(index: int) -> Callable[[tuple[Any, ...], Any], int]:
    """One MAC per element of the argument at ``index``: matrix-vector and vector-vector products."""
    return lambda args, out: prod(_shape(args[index]))


def _per_output(args: tuple[Any, ...], out: Any) -> int:
    """Linear layers and convolutions: each output element is a dot product with one row of the weight."""
    return prod(_shape(out)) * prod(_shape(args[1])[1:])


def _per_input(args: tuple[Any, ...], out: Any) -> int:
    """Transposed convolutions: each input element is spread over one row of the weight."""
    return prod(_shape(args[0])) * prod(_shape(args[1])[1:])


def _attention(args: tuple[Any, ...], out: Any) -> int:
    """softmax(q k^T) v with q (..., L, E), k (..., S, E), v (..., S, V): L x S x (E + V) for each head."""
    (*batch, length, _), keys, values = _shape(out), _shape(args[1]), _shape(args[2])
    return prod(batch) * length * keys[-2] * (keys[-1] + values[-1])


def _einsum(args: tuple[Any, ...], out: Any) -> int:
    """Pair by pair, from the left, as ATen does it.

    What only one of the two has, and nothing later needs, is summed first; if they then share an axis that is summed, the product
    costs one MAC for each value of all axes together, else it is elementwise and none is counted.
    """
    tensors = list(args[1])
    names, result = _einsum_axes(args[0].replace(" ", ""), [tensor.dim() for tensor in tensors])
    sizes: dict[Any, int] = {}
    for own, tensor in zip(names, tensors, strict=True):
        for axis, size in zip(own, tensor.shape, strict=True):
            if sizes.get(axis, 1) == 1:  # a size of 1 broadcasts
                sizes[axis] = size
    total, held = 0, set(names[0])
    for i, own in enumerate(names[1:], start=2):
        needed = {*result, *(axis for later in names[i:] for axis in later)}
        summed = (held & set(own)) - needed
        held = (held | set(own)) & (needed | summed)
        total += prod(sizes[axis] for axis in held) if summed else 0
        held -= summed
    return total


def _einsum_axes(equation: str, ranks: list[int]) -> tuple[list[list[Any]], list[Any]]:
    """The axes of the operands and of the result: letters, and -1, -2, ... for those of an ellipsis, from the last.

    >>> _einsum_axes("b...i,ij->b...j", [4, 2])
    ([['b', -2, -1, 'i'], ['i', 'j']], ['b', -2, -1, 'j'])
    """

    def axes(term: str, more: int) -> list[Any]:
        before, dots, after = term.partition("...")
        return [*before, *(range(-more, 0) if dots else ()), *after]

    terms, arrow, result = equation.partition("->")
    more = [rank - len(term.replace("...", "")) for term, rank in zip(terms.split(","), ranks, strict=True)]
    if not arrow:  # every axis that occurs once
        letters = terms.replace("...", "").replace(",", "")
        result = ("..." if "..." in terms else "") + "".join(sorted(c for c in set(letters) if letters.count(c) == 1))
    return [axes(term, own) for term, own in zip(terms.split(","), more, strict=True)], axes(result, max(more))


def _recurrent(args: tuple[Any, ...], out: Any) -> int:
    """Every step multiplies with every weight matrix of every layer and direction once; args[0] is (..., features)."""
    weights = args[2] if isinstance(args[3], bool) else args[3]  # packed sequences have their batch sizes in front
    return prod(_shape(args[0])[:-1]) * sum(prod(_shape(weight)) for weight in weights if weight.dim() == 2)


def _recurrent_cell(args: tuple[Any, ...], out: Any) -> int:
    """One step: both weight matrices, of the input and of the hidden state."""
    return prod(_shape(args[0])[:-1]) * (prod(_shape(args[2])) + prod(_shape(args[3])))


_aten = torch.ops.aten

# (args, out) -> MACs of contractions that torch.utils.flop_counter knows only in parts or not at all.
_EXTRA: dict[Any, Callable[[tuple[Any, ...], Any], int]] = {
    _aten.einsum: _einsum,
    _aten.linear: _per_output,
    _aten.conv1d: _per_output,
    _aten.conv2d: _per_output,
    _aten.conv3d: _per_output,
    _aten.conv_transpose1d: _per_input,
    _aten.conv_transpose2d: _per_input,
    _aten.conv_transpose3d: _per_input,
    _aten.scaled_dot_product_attention: _attention,
    _aten.lstm: _recurrent,
    _aten.gru: _recurrent,
    _aten.rnn_tanh: _recurrent,
    _aten.rnn_relu: _recurrent,
    _aten.lstm_cell: _recurrent_cell,
    _aten.gru_cell: _recurrent_cell,
    _aten.rnn_tanh_cell: _recurrent_cell,
    _aten.rnn_relu_cell: _recurrent_cell,
    _aten.matmul: lambda args, out: prod(_shape(out)) * _shape(args[0])[-1],
    _aten.mv: _elements_of(0),
    _aten.addmv: _elements_of(1),
    _aten.dot: _elements_of(0),
    _aten.vdot: _elements_of(0),
    # (b, m, k) by (b, k, n), summed over b as well.
    _aten.addbmm: lambda args, out: prod(_shape(args[1])) * _shape(args[2])[-1],
    # nn.Bilinear: for each row and output an in1 x in2 form; the weight is (1, out, in1, in2).
    _aten._trilinear: lambda args, out: prod(_shape(out)) * prod(_shape(args[1])[-2:]),
}
