"""The proof: the emitted model equals the original with every removed parameter element set to zero."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from fxprune.coupling import Coupling
from fxprune.eager import intercepted
from fxprune.errors import RewriteError, VerificationError
from fxprune.inputs import as_call
from fxprune.plan import Plan, unpack_inputs
from fxprune.propagation import seen_whole
from fxprune.rewrite import Survivors, emit
from fxprune.rules import bind
from fxprune.trace import Trace, copy_of, execute, put_tensors

__all__ = ["Verification", "check"]


@dataclass(frozen=True)
class Verification:
    """What was measured.

    ``error`` is the relative error ``||out - reference|| / ||reference||``, the largest over the outputs; NaN if only the structure
    was checked. ``outputs`` is the number of output tensors compared.
    """

    error: float
    outputs: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"relative error {self.error:.1e} over {self.outputs} outputs in {str(self.dtype).removeprefix('torch.')}"


def check(
    model: nn.Module,
    pruned: nn.Module,
    plan: Plan,
    coupling: Coupling,
    kept: dict[str, tuple[int, ...]],
    *,
    example_inputs: Any = None,
    dtype: torch.dtype = torch.float64,
    randomize: bool = True,
    seed: int = 0,
    numeric: bool = True,
) -> Verification:
    """Both checks; see :func:`fxprune.verify`."""
    survivors = Survivors(coupling, kept)
    _same_structure(pruned, coupling, survivors)
    if not numeric:
        return Verification(float("nan"), 0, dtype)
    generator = torch.Generator().manual_seed(seed)
    original = _values(model, dtype, generator if randomize else None)
    args, kwargs = _inputs(model, plan, example_inputs, dtype, generator if randomize else None)
    reference = _reference(coupling, survivors, original, args, kwargs, dtype)
    smaller = _smaller(pruned, coupling, survivors, original if randomize else None, dtype)
    result: list[Any] = []

    def part(path: str, call: Any, args: Any, kwargs: Any) -> Any:
        result.append(out := call())
        return tree_map(_copy, out)  # what Python may write into

    with torch.no_grad(), _InDtype(dtype), intercepted(smaller, coupling.parts, part):
        result.append(smaller(*tree_map(_copy, args), **tree_map(_copy, kwargs)))
    error, count = 0.0, 0
    pairs = list(zip(tree_leaves(result), tree_leaves(reference), strict=True))
    for out, ref in pairs:
        if not isinstance(ref, Tensor):
            continue
        if out.shape != ref.shape:
            raise VerificationError(f"output {count} has shape {tuple(out.shape)}, the masked original gives {tuple(ref.shape)}.")
        if not (torch.isfinite(out).all() and torch.isfinite(ref).all()):
            raise VerificationError(f"output {count} is not finite: the check needs weights and inputs that give finite outputs.")
        norm = float(torch.linalg.vector_norm(ref.double()))
        error = max(error, float(torch.linalg.vector_norm(out.double() - ref.double())) / (norm or 1.0))
        count += 1
    return Verification(error, count, dtype)


def _same_structure(pruned: nn.Module, coupling: Coupling, survivors: Survivors) -> None:
    """Emit again, label by label, and compare the graph that comes out with the one at hand."""
    try:
        again = emit(coupling, survivors, thorough=True)
    except RewriteError as error:
        raise VerificationError(f"the labels of the emitted model do not match: {error}") from error
    shapes = {name: tuple(t.shape) for name, t in again.state_dict().items()}
    for name, tensor in pruned.state_dict().items():
        if shapes.get(name) != tuple(tensor.shape):
            raise VerificationError(f"{name!r} has shape {tuple(tensor.shape)}, the plan leaves {shapes.get(name)}.")
    for path in coupling.parts or ("",):
        code, wanted = (getattr(model.get_submodule(path), "code", "") for model in (pruned, again))
        if code.strip() != wanted.strip():
            raise VerificationError("the model's graph is not the one that the plan emits; it was changed after pruning.")


def _values(model: nn.Module, dtype: torch.dtype, generator: torch.Generator | None) -> dict[str, Tensor]:
    """The original's tensors on the CPU, in ``dtype``; random ones keep activations of order one and variances positive."""
    values: dict[str, Tensor] = {}
    shared: dict[int, Tensor] = {}
    parameters = {id(p) for p in model.parameters()}
    for name, tensor in [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]:
        if id(tensor) not in shared:
            if not tensor.is_floating_point():
                shared[id(tensor)] = tensor.detach().cpu().clone()
            elif generator is None:
                shared[id(tensor)] = tensor.detach().to("cpu", dtype, copy=True)
            elif id(tensor) in parameters and tensor.dim() > 1:
                fan_in = max(tensor[0].numel(), 1)
                drawn = torch.empty(tensor.shape, dtype=dtype).uniform_(-1, 1, generator=generator)
                shared[id(tensor)] = drawn * (4.5 / fan_in) ** 0.5
            else:
                shared[id(tensor)] = torch.rand(tensor.shape, generator=generator, dtype=dtype) + 0.5
        values[name] = shared[id(tensor)]
    return values


def _inputs(model: nn.Module, plan: Plan, example: Any, dtype: torch.dtype, generator: torch.Generator | None) -> Any:
    args, kwargs = unpack_inputs(plan.inputs) if example is None else as_call(example)
    # Indices into a table must stay inside it, whatever the table: the smallest first axis of a parameter is safe.
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    top = min([*tables, 2])

    def value(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            if not tensor.is_meta:
                return tensor.detach().cpu()
            return torch.randint(0, top, tensor.shape, generator=generator).to(tensor.dtype)
        if generator is None and not tensor.is_meta:
            return tensor.detach().to("cpu", dtype)
        return torch.randn(tensor.shape, generator=generator, dtype=dtype)

    return tree_map_only(Tensor, value, (args, kwargs))


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _smaller(
    pruned: nn.Module, coupling: Coupling, survivors: Survivors, values: dict[str, Tensor] | None, dtype: torch.dtype
) -> nn.Module:
    """A copy of the pruned model that holds the surviving elements of ``values`` (None: its own) in ``dtype``."""
    memo = {id(t): t for t in [*pruned.parameters(), *pruned.buffers()]}
    model = copy_of(pruned, dict(memo))
    by_old: dict[int, Tensor] = {}
    for name, old in [*pruned.named_parameters(), *pruned.named_buffers()]:
        if values is None or name not in coupling.parameters:
            by_old[id(old)] = old.detach().to("cpu", dtype if old.is_floating_point() else None)
        elif coupling.parameters[name].is_meta:
            by_old[id(old)] = survivors.take(coupling.parameters[name], values[name])
        else:
            by_old[id(old)] = values[name]
    put_tensors(model, by_old)
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                vars(module)[name] = value.to("cpu", dtype) if value.is_floating_point() else value.cpu()
    return model.eval()


def _reference(
    coupling: Coupling, survivors: Survivors, values: dict[str, Tensor], args: Any, kwargs: Any, dtype: torch.dtype
) -> list[Any]:
    """Run the original with removed parameter elements at zero and statistics over the survivors.

    What its parts give, if it was not traced whole, in the order of their calls, and what it returns.
    """
    masked = {}
    for name, tensor in coupling.parameters.items():
        value = values[name].clone()
        for labels in coupling.parameter_labels(name):
            value = value * torch.from_numpy(survivors.alive[labels]).to(value.dtype)
        masked[id(tensor)] = value
    traces = {trace.path: trace for trace in reversed(coupling.traces)}
    found: list[Any] = []

    def part(path: str, call: Any, args: Any, kwargs: Any) -> Any:
        out = _of_graph(traces[path], coupling, survivors, masked, args, kwargs)
        pairs = zip(tree_leaves(out), tree_leaves(traces[path].outputs), strict=True)
        found.append([leaf if coupling.wide_dims(old) else survivors.take(old, leaf) for leaf, old in pairs])
        return tree_map(_copy, out)  # what Python may write into

    with torch.no_grad(), _InDtype(dtype):
        if not coupling.parts:
            return [_of_graph(traces[""], coupling, survivors, masked, args, kwargs)]
        real = coupling.twin.instance(masked).eval()
        with intercepted(real, coupling.parts, part):
            out = real(*tree_map(_copy, args), **tree_map(_copy, kwargs))
        return [*found, out]


class _InDtype(TorchFunctionMode):
    """Python that says float32 means the model's dtype here, or it could not be run in another."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].to(self.dtype)
        args, kwargs = tree_map(lambda value: self.dtype if value is torch.float32 else value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _of_graph(trace: Trace, coupling: Coupling, survivors: Survivors, masked: dict[int, Tensor], args: Any, kwargs: Any) -> Any:
    twin = trace.twin.model.eval()
    inputs = iter([*args, *kwargs.values()])
    env: dict[fx.Node, Any] = {}
    with trace.twin.holding(masked), torch.no_grad():
        for node in trace.graph.nodes:
            if node.op == "placeholder":
                env[node] = tree_map(_copy, next(inputs))
            elif node.op == "output":
                return fx.node.map_arg(node.args[0], env.__getitem__)
            elif node.op == "get_attr" and node.target in trace.constants:
                value = trace.constants[node.target].detach().cpu()
                env[node] = value.to(next(iter(masked.values())).dtype) if value.is_floating_point() else value
            else:
                env[node] = _run(node, trace, env, twin, coupling, survivors)
    raise VerificationError("the traced graph has no output")


def _run(node: fx.Node, trace: Trace, env: dict[fx.Node, Any], twin: nn.Module, coupling: Coupling, survivors: Survivors) -> Any:
    call_args, call_kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
    with torch.inference_mode(), _MaskedStatistics(trace.prefix + node.name, coupling, survivors):
        value = execute(twin, node, call_args, call_kwargs)
    # 0/0 at an element that is not there any more (a weight norm of a zero filter) says nothing.
    for old, new in zip(tree_leaves(node.meta["val"]), tree_leaves(value), strict=True):
        if isinstance(old, Tensor) and isinstance(new, Tensor) and new.is_floating_point() and bool(torch.isnan(new).any()):
            for labels in coupling.labels(old):
                gone = torch.from_numpy(~survivors.alive[labels])
                with torch.inference_mode():
                    new.masked_fill_(gone & torch.isnan(new), 0.0)
    return value


class _MaskedStatistics(TorchDispatchMode):
    """Lets the normalisations that the analysis recorded take their statistics over surviving elements only."""

    def __init__(self, node: str, coupling: Coupling, survivors: Survivors) -> None:
        super().__init__()
        self.node, self.coupling, self.survivors, self.index = node, coupling, survivors, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in _STATISTICS:
            arrays = self.coupling.context.statistics.get((self.node, self.index), [])
            self.index += 1
            mask = self.survivors.mask(arrays)
            if not mask.all():
                return _STATISTICS[name](bind(func, args, kwargs), torch.from_numpy(mask))
        elif not seen_whole(func):
            with self:  # a composite without a rule: the analysis has seen its parts
                return func.decompose(*args, **kwargs)
        return func(*args, **kwargs)


def _moments(x: Tensor, mask: Tensor, dims: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count over ``dims`` of the elements under the mask, dimensions kept."""
    weight = mask.to(x.dtype).expand(x.shape)
    count = weight.sum(dims, keepdim=True)
    mean = (x * weight).sum(dims, keepdim=True) / count
    variance = ((x - mean).square() * weight).sum(dims, keepdim=True) / count
    return mean, variance, count


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, form: list[int]) -> Tensor:
    x = x if weight is None else x * weight.reshape(form)
    return x if bias is None else x + bias.reshape(form)


def _layer_norm(a: dict[str, Any], mask: Tensor) -> Tensor:
    x, shape = a["input"], list(a["normalized_shape"])
    mean, variance, _ = _moments(x, mask, list(range(x.dim() - len(shape), x.dim())))
    return _affine((x - mean) * (variance + a["eps"]).rsqrt(), a["weight"], a["bias"], shape)


def _rms_norm(a: dict[str, Any], mask: Tensor) -> Tensor:
    x, shape = a["input"], list(a["normalized_shape"])
    dims = list(range(x.dim() - len(shape), x.dim()))
    weight = mask.to(x.dtype).expand(x.shape)
    square = (x.square() * weight).sum(dims, keepdim=True) / weight.sum(dims, keepdim=True)
    eps = torch.finfo(x.dtype).eps if a["eps"] is None else a["eps"]
    return _affine(x * (square + eps).rsqrt(), a["weight"], None, shape)


def _group_norm(a: dict[str, Any], mask: Tensor) -> Tensor:
    x, groups = a["input"], a["num_groups"]
    split = [x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]]
    y = x.reshape(split)
    own = mask.expand(1, x.shape[1], *[1] * (x.dim() - 2)).reshape([1, *split[1:3], *[1] * (x.dim() - 2)])
    mean, variance, _ = _moments(y, own, list(range(2, y.dim())))
    y = ((y - mean) * (variance + a["eps"]).rsqrt()).reshape(x.shape)
    return _affine(y, a["weight"], a["bias"], [1, -1, *[1] * (x.dim() - 2)])


def _batch_norm(a: dict[str, Any], mask: Tensor) -> Tensor:
    x = a["input"]
    mean, variance, _ = _moments(x, mask, [0, *range(2, x.dim())])
    return _affine((x - mean) * (variance + a["eps"]).rsqrt(), a["weight"], a["bias"], [1, -1, *[1] * (x.dim() - 2)])


_STATISTICS = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
}
