"""Criteria that read data: a loader of batches, a loss, and the gradients or activations they
give.

The model is not touched: it runs in evaluation mode on copies of its parameters and buffers
(:class:`Taylor`, :class:`Fisher`), or as the graph that the analysis traced (:class:`Activation`),
so its modes, gradients and statistics stay as they are. Batches are taken to the model's device.
In a process group (``torchrun``) every process reads its own batches and the sums are reduced over
all of them, so the scores are those of one process that reads everything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from fxprune.arrays import Floats
from fxprune.contents import tensors_of
from fxprune.coupling import Coupling, check_coupling
from fxprune.criteria.views import Views, in_single_at_least
from fxprune.dispatch import holds_tensors
from fxprune.doors import calling, door, drawn_from
from fxprune.eager import intercepted
from fxprune.errors import ArgumentError, FxpruneError
from fxprune.labels import Array
from fxprune.memory import Undone
from fxprune.trace import Trace, execute

if torch.distributed.is_available():
    # Its functions take the process group of the moment in which they are imported as their
    # default, and keep it for ever. PyTorch imports it at its first tracing: in a process group,
    # that group would outlive destroy_process_group, its threads the interpreter, and now and then
    # a process would be aborted at its end. So it is imported before any group is there.
    import torch.distributed.nn

__all__ = [
    "Activation",
    "Fisher",
    "LoaderBatch",
    "Taylor",
    "batches_of",
    "called",
    "check_dimensions",
    "check_finite",
    "check_loader",
    "check_read",
    "evaluated",
]

Loader = Iterable[Any]
Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class _Reader:
    """Has a loader that can be read again: scores are taken anew when a model is analysed anew,
    and at every pruning step.
    """

    loader: Loader

    def __post_init__(self) -> None:
        check_loader(self.loader)
        if isinstance(self.loader, Iterator):
            raise ArgumentError(
                f"the loader is a {type(self.loader).__name__}, which can be read only once. "
                "Pass one that can be read again: a DataLoader, or list(...) of it."
            )


@dataclass(frozen=True)
class _LossReader(_Reader):
    """Has a loss as well."""

    loss: Loss

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.loss, type) or not callable(self.loss):
            what = (
                f"the class {self.loss.__name__}"
                if isinstance(self.loss, type)
                else f"a {type(self.loss).__name__}"
            )
            raise ArgumentError(
                f"the loss is {what}: give a function loss(output, *targets), as "
                "torch.nn.functional.cross_entropy."
            )


@door
@dataclass(frozen=True)
class Taylor(_LossReader):
    r""":math:`\left| \sum w \cdot \partial L / \partial w \right|` over a unit's elements: the
    first-order change of the loss.

    L is the mean loss over all samples; how they are split into batches makes no difference.
    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019: the root of
    their criterion for a channel's gate, over the coupled elements.

    Parameters
    ----------
    loader:
        Batches ``(inputs, *targets)``; ``inputs`` a tensor, a tuple or list of the model's
        arguments, or a dict of them by name. The first tensor's first dimension counts the
        samples. Anything that can be read again: a DataLoader, a list.
    loss:
        ``loss(output, *targets)``, a mean over the batch.

    Raises
    ------
    ArgumentError
        If the loader is an iterator; when scoring, if it gives no batch, or something else than
        such batches, or the loss is no number with a gradient.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., 3.]])
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = Taylor([(torch.tensor([[1.], [5.]]),)],
    ...     lambda output: output.mean()).scores(coupling, net)
    >>> # the mean output is 3 (1 * 1 + 2 * 3); either factor of a product counts
    >>> scores[coupling.groups[0].units].tolist()
    [6.0, 36.0]
    """

    @door
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,)."""
        check_coupling(coupling, model)
        summed, samples = _Sum(), 0

        def visit(gradients: dict[str, Tensor], size: int) -> None:
            nonlocal samples
            summed.add(gradients, size)
            samples += size

        _each_gradient(model, self.loader, self.loss, visit)
        return np.abs(_mean(_products(coupling, model, summed.tensors), samples))


@door
@dataclass(frozen=True)
class Fisher(_LossReader):
    r""":math:`\frac{1}{N} \sum_b \left( n_b \sum w \cdot \partial L_b / \partial w \right)^2`: the
    diagonal Fisher information of a unit's mask.

    :math:`L_b` is the mean loss over batch b of :math:`n_b` samples, N samples in all. With
    batches of one sample this is the empirical Fisher information, as in Theis et al., "Faster
    gaze prediction with dense networks and Fisher pruning", 2018, and over coupled elements in Liu
    et al., "Group Fisher Pruning for Practical Network Compression", ICML 2021. Larger batches
    estimate it: the gradients of their samples are taken for uncorrelated.

    Parameters
    ----------
    loader, loss:
        As for :class:`Taylor`.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    >>> weights = torch.tensor([[1.], [2.]]), torch.tensor([[1., 3.]])
    >>> net.load_state_dict({"0.weight": weights[0], "1.weight": weights[1]})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = Fisher([(torch.tensor([[1.]]),), (torch.tensor([[2.]]),)],
    ...     lambda output: output.mean()).scores(coupling, net)
    >>> # (2 ** 2 + 4 ** 2) / 2 and (12 ** 2 + 24 ** 2) / 2
    >>> scores[coupling.groups[0].units].tolist()
    [10.0, 360.0]
    """

    @door
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,)."""
        check_coupling(coupling, model)
        total, samples = np.zeros(coupling.context.units.count), 0

        def visit(gradients: dict[str, Tensor], size: int) -> None:
            nonlocal total, samples
            total += (size * _products(coupling, model, gradients)) ** 2
            samples += size

        _each_gradient(model, self.loader, self.loss, visit)
        return _mean(total, samples)


@door
@dataclass(frozen=True)
class Activation(_Reader):
    r"""Mean :math:`|a|` of a unit's activations where a next layer reads them, over samples and
    positions.

    Polyak and Wolf, "Channel-level acceleration of deep face representations", IEEE Access 2015
    (inbound pruning). What reads is a contraction (convolution, depthwise too, matrix product,
    attention), or whatever else sums channels up. A unit that several read has the mean over them,
    one that nothing reads has 0.

    Parameters
    ----------
    loader:
        Batches ``(inputs, ...)``, as for :class:`Taylor`, with the arguments and the sizes of the
        analysis' example, but any number of samples; targets are not read.

    Raises
    ------
    ArgumentError
        If the loader is an iterator; when scoring, if it gives no batch, or something else than
        such batches.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1))
    >>> net[0].load_state_dict({"weight": torch.tensor([[1.], [-4.]])})
    <All keys matched successfully>
    >>> coupling = fxprune.analyze(net, torch.zeros(1, 1))
    >>> scores = Activation([(torch.tensor([[1.], [2.], [-1.]]),)]).scores(coupling, net)
    >>> scores[coupling.groups[0].units].round(4).tolist()  # (1 + 2 + 0) / 3 and (0 + 0 + 4) / 3
    [1.0, 1.3333]
    """

    @door
    def scores(self, coupling: Coupling, model: nn.Module) -> Floats:
        """Shape (labels,)."""
        check_coupling(coupling, model)
        meter = _Meter(coupling)
        # Buffers are copied, should a module write to its own.
        real = {
            key: t if isinstance(t, nn.Parameter) else t.clone()
            for key, t in coupling.meta_copy.real.items()
        }
        undone = Undone(dict(model.named_parameters()))
        with (
            undone.afterwards(),
            torch.no_grad(),
            coupling.meta_copy.holding(real) as meta_copy,
            evaluated(meta_copy),
        ):
            for batch in batches_of(self.loader, model):
                if coupling.parts:
                    _watch_parts(meter, coupling, meta_copy, batch)
                else:
                    meter.watch(
                        "", meta_copy, _placeholder_values(coupling.traces[0], batch), batch.size
                    )
                meter.samples += batch.size
        units = coupling.context.units.count
        both = _summed_over_processes(np.concatenate([meter.total, meter.times, [meter.samples]]))
        check_read(both[-1])
        return both[:units] / np.maximum(both[units:-1], 1)


def _watch_parts(meter: _Meter, coupling: Coupling, model: nn.Module, batch: LoaderBatch) -> None:
    """Run a model that was not traced whole, every part of it under the meter."""

    def part(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        names = [
            str(node.target) for node in meter.traces[path].graph.nodes if node.op == "placeholder"
        ]
        inputs = tree_map_only(Tensor, Tensor.clone, [*args, *kwargs.values()])
        meter.watch(
            path, model.get_submodule(path), dict(zip(names, inputs, strict=True)), batch.size
        )
        return call()

    with intercepted(model, coupling.parts, part):
        called(model, batch)


class _Sum:
    """Sums of gradients, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def add(self, gradients: Mapping[str, Tensor], weight: float) -> None:
        for name, gradient in gradients.items():
            if name in self.tensors:
                self.tensors[name].add_(gradient, alpha=weight)
            else:
                self.tensors[name] = gradient * weight


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def _products(coupling: Coupling, model: nn.Module, gradients: Mapping[str, Tensor]) -> Floats:
    """For each unit the sum of weight times gradient over its elements: the derivative by a mask
    on all of them.
    """
    weights = dict(model.named_parameters())
    products = {name: weights[name].detach() * gradient for name, gradient in gradients.items()}
    return Views(coupling, products).totals(_unchanged)


def _each_gradient(
    model: nn.Module, loader: Loader, loss: Loss, visit: Callable[[dict[str, Tensor], int], None]
) -> None:
    """Call ``visit(gradients by parameter's name, number of samples)`` batch by batch; gradients
    are in float32 at least.
    """
    with evaluated(model), torch.inference_mode(False), torch.enable_grad():
        held = {
            name: p.detach().clone().requires_grad_()
            for name, p in model.named_parameters()
            if p.is_floating_point()
        }
        buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
        for batch in batches_of(loader, model):
            output = called(
                functools.partial(torch.func.functional_call, model, {**held, **buffers}),
                batch,
                apart=True,
            )
            with calling(f"the loss, given the model's output and {len(batch.targets)} targets,"):
                value = loss(output, *batch.targets)
            if (
                not isinstance(value, Tensor)
                or value.numel() != 1
                or not value.requires_grad
                or value.is_complex()
            ):
                tensor = isinstance(value, Tensor)
                given = (
                    f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
                    if tensor
                    else f"a {type(value).__name__}"
                )
                raise ArgumentError(
                    f"the loss gave {given}: it must give the mean loss over the batch, one "
                    "number that depends on the output through differentiable operations."
                )
            check_finite([value], "the loss of a batch")
            with calling("the gradient of the loss"):
                found = torch.autograd.grad(value, list(held.values()), allow_unused=True)
            if all(gradient is None for gradient in found):
                raise ArgumentError(
                    "the loss depends on no parameter of the model: compute it from the output "
                    "that it is given."
                )
            visit(
                {
                    name: in_single_at_least(g)
                    for name, g in zip(held, found, strict=True)
                    if g is not None
                },
                batch.size,
            )


class _Meter:
    """Adds up what the layers of traced graphs read, unit by unit."""

    def __init__(self, coupling: Coupling) -> None:
        self.traces = {trace.path: trace for trace in coupling.traces if not trace.training}
        self.reads = {path: _reads(coupling, trace) for path, trace in self.traces.items()}
        self.total = np.zeros(coupling.context.units.count)
        self.times = np.zeros(coupling.context.units.count)
        self.samples = 0
        self._last: dict[fx.Node, list[fx.Node]] = {}
        for trace in self.traces.values():
            for node in trace.graph.nodes:
                if node.users:
                    self._last.setdefault(max(node.users), []).append(node)

    def watch(self, path: str, root: nn.Module, arguments: Mapping[str, Any], size: int) -> None:
        """Run a graph on a batch of ``size`` samples."""
        values: dict[fx.Node, Any] = {}
        for node in self.traces[path].graph.nodes:
            if node.op == "output":
                break
            # Now, not when the operand was made: it may have been changed in place since.
            for operand, labels in self.reads[path].get(node, ()):
                self._add(values[operand], labels, size)
            values[node] = _node_value(self.traces[path], root, node, arguments, values)
            for done in self._last.get(node, ()):
                del values[done]

    def _add(self, value: Tensor, labels: Array, size: int) -> None:
        alike = [d for d, extent in enumerate(labels.shape) if extent == 1]
        means = (
            in_single_at_least(value).abs().mean(alike, keepdim=True)
            if alike
            else in_single_at_least(value).abs()
        )
        units, place = np.unique(labels.ravel(), return_inverse=True)
        summed = np.bincount(place, means.expand(labels.shape).cpu().numpy().ravel())
        here = units > 0
        self.total[units[here]] += size * (summed / np.bincount(place))[here]
        self.times[units[here]] += size


def _reads(coupling: Coupling, trace: Trace) -> dict[fx.Node, list[tuple[fx.Node, Array]]]:
    """For each node that reads units: the operands, with their labels."""
    contracting = {ran.node for ran in coupling.contractions}
    learned: set[fx.Node] = set()
    out: dict[fx.Node, list[tuple[fx.Node, Array]]] = {}
    for node in trace.graph.nodes:
        name = trace.prefix + node.name
        operands = [
            operand for operand in node.all_input_nodes if isinstance(operand.meta["val"], Tensor)
        ]
        if node.op == "get_attr" or (operands and learned.issuperset(operands)):
            learned.add(node)  # a weight, or made of weights alone: no activation
        results = tensors_of(node.meta.get("val"))
        if not results:
            continue
        left = np.concatenate(
            [
                np.zeros(1, np.int64),
                *(labels.ravel() for leaf in results for labels in coupling.labels(leaf)),
            ]
        )
        for operand in operands:
            for labels in coupling.labels(operand.meta["val"]) if operand not in learned else ():
                summed_up = (
                    not np.isin(labels[labels > 0], left).any()
                    and name not in coupling.context.positional
                )
                if name in contracting or summed_up:
                    out.setdefault(node, []).append((operand, labels))
    return out


def _node_value(
    trace: Trace,
    root: nn.Module,
    node: fx.Node,
    arguments: Mapping[str, Any],
    values: Mapping[fx.Node, Any],
) -> Any:
    if node.op == "placeholder":
        return arguments[str(node.target)]
    if node.op == "get_attr" and node.target in trace.constants:
        return trace.constants[str(node.target)]
    try:
        return execute(root, node, *fx.node.map_arg((node.args, node.kwargs), values.__getitem__))
    except (FxpruneError, Warning):
        raise
    except Exception as error:
        raise ArgumentError(
            "a batch of the loader does not fit the example that the model was analysed with: "
            f"{error}. Give batches of the example's sizes; only the number of samples may be "
            "another."
        ) from error


@dataclass(frozen=True)
class LoaderBatch:
    """A loader's batch as the model's arguments and the loss's, on the model's device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: tuple[Any, ...]
    size: int


def batches_of(loader: Loader, model: nn.Module) -> Iterator[LoaderBatch]:
    """A loader's batches, taken apart and copied to the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def there(tensor: Tensor) -> Tensor:
        return tensor.to(device)

    def copied(tensor: Tensor) -> Tensor:
        # a model may write into its inputs, and they are the loader's
        return tensor.detach().to(device, copy=True)

    for batch in drawn_from(loader):
        args, kwargs, targets = loader_call(batch)
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


def loader_call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], tuple[Any, ...]]:
    """A loader's batch ``(inputs, *targets)`` as the model's positional and keyword arguments, and
    the targets.

    Raises
    ------
    ArgumentError
        If the batch is something else.

    Examples
    --------
    >>> loader_call(({"ids": 1, "mask": 2}, 3)), loader_call([[4, 5], 6])
    (((), {'ids': 1, 'mask': 2}, (3,)), ((4, 5), {}, (6,)))
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
    if isinstance(inputs, Mapping):
        return (), dict(inputs), tuple(targets)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}, tuple(targets)


def _placeholder_values(trace: Trace, batch: LoaderBatch) -> dict[str, Any]:
    """A batch's inputs by the names of the graph's placeholders, in whatever way the loader passes
    them.

    Constants of the example (numbers, flags, None) that the loader leaves out are the example's.
    """
    # As the tracer reads it: the signature of the function itself, not of one that it wraps.
    signature = inspect.signature(type(trace.meta_copy.model).forward, follow_wrapped=False)
    names = [str(node.target) for node in trace.graph.nodes if node.op == "placeholder"]
    given = {*list(signature.parameters)[1 : 1 + len(batch.args)], *batch.kwargs}
    example = zip(names, trace.placeholders, strict=False)
    constants = {
        name: value for name, value in example if name not in given and not holds_tensors(value)
    }
    try:
        bound = signature.bind(
            trace.meta_copy.model, *batch.args, **batch.kwargs, **constants
        ).arguments
    except TypeError as error:
        raise ArgumentError(
            f"the loader's inputs do not fit the model's forward: {error}."
        ) from error
    out: dict[str, Any] = {}
    for name, value in list(bound.items())[1:]:
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            out.update({f"args_{i}": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            out.update(value)
        else:
            out[name] = value
    if set(out) != set(names):
        raise ArgumentError(
            f"the loader gave the inputs {', '.join(sorted(out))}, the model was analysed with "
            f"{', '.join(sorted(names))}: give the same ones."
        )
    for node in trace.graph.nodes:
        if node.op == "placeholder" and isinstance(out[str(node.target)], Tensor):
            check_dimensions(f"the input {node.target!r}", out[str(node.target)], node.meta["val"])
    return out


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


def _mean(total: Floats, samples: int) -> Floats:
    """The sums of all processes, by sample."""
    both = _summed_over_processes(np.append(total, samples))
    check_read(both[-1])
    return both[:-1] / both[-1]


def check_read(samples: float) -> None:
    """Refuse a loader that gave nothing; ``samples`` (or batches) is how many it gave."""
    if not samples:
        raise ArgumentError(
            "the loader gave no batch, so nothing can be measured. Pass one that is not empty "
            "and can be read again (a DataLoader, a list), not a generator that was used up "
            "before."
        )


def _summed_over_processes(values: Floats) -> Floats:
    """The sum over all processes of the process group, if there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    tensor = torch.from_numpy(values.copy()).to(device)
    torch.distributed.all_reduce(tensor)
    return tensor.cpu().numpy()
