"""A random network as data, and the torch module that is built from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .nodes import Again, Attention, Chunk, Node, Signal, SpecError, Split, TokenMix


class Network:
    """A network in single-assignment form.

    Value 0 is the input, and value ``i`` is the output of ``nodes[i - 1]``.

    Parameters
    ----------
    input
        Shape of one sample: (C, H, W) is an image, (T, C) tokens, (C,) a vector.
    nodes
        The operations. Each one reads only values of lower index.
    outputs
        Indices of the values that the network returns: one tensor, or a tuple of several.

    Raises
    ------
    SpecError
        If a node cannot take its inputs. The message names the node.

    Examples
    --------
    >>> from tests.specs import Conv, GlobalPool, Linear, Pool
    >>> net = Network(input=(3, 8, 8), nodes=(Conv(0, out=8), Pool(1), GlobalPool(2), Linear(3,
    ...     out=5)), outputs=(4,))
    >>> build(net)(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([2, 5])
    """

    def __init__(
        self, *, input: tuple[int, ...], nodes: tuple[Node, ...], outputs: tuple[int, ...]
    ) -> None:
        self.input = tuple(input)
        self.nodes = tuple(nodes)
        self.outputs = tuple(outputs)
        signals = [Signal.of_input(self.input)]
        for index, node in enumerate(self.nodes, start=1):
            if not all(0 <= i < index for i in node.inputs):
                raise SpecError(f"value {index}, {node!r}: reads a value that does not exist yet")
            signals.append(infer(node, self.nodes, signals))
        if not self.outputs or not all(0 <= i < len(signals) for i in self.outputs):
            raise SpecError(f"outputs={self.outputs}: there are {len(signals)} values")
        self.signals = tuple(signals)

    def owner(self, index: int) -> int:
        """Return the value whose layer computes value ``index``.

        That is ``index`` itself, unless its layer is shared.
        """
        return owner(self.nodes, index)

    def with_live_nodes(self) -> Network:
        """Return the same network without the nodes that no output depends on."""
        live, todo = set(), list(self.outputs)
        while todo:
            index = todo.pop()
            if index not in live:
                live.add(index)
                todo.extend(self.nodes[index - 1].inputs if index else ())
        mapping = {old: new for new, old in enumerate(sorted(live | {0}))}
        nodes = tuple(
            node.renumbered(mapping) for i, node in enumerate(self.nodes, start=1) if i in live
        )
        return Network(
            input=self.input, nodes=nodes, outputs=tuple(mapping[i] for i in self.outputs)
        )

    def has(self, *kinds: type[Node]) -> bool:
        return any(isinstance(node, kinds) for node in self.nodes)

    @property
    def bit_exact(self) -> bool:
        """Whether pruning with ``channels=1.0`` must give the same bits.

        It must, unless there is an ``nn.MultiheadAttention``, which the tracer replaces by its
        single operations.
        """
        return not any(
            isinstance(node, Attention) and node.style == "module" for node in self.nodes
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Network) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        lines = ["Network(", f"    input={self.input},", "    nodes=("]
        for index, node in enumerate(self.nodes, start=1):
            lines.append(f"        {node!r},  # {index}: {self.signals[index]}")
        lines += ["    ),", f"    outputs={self.outputs},", ")"]
        return "\n".join(lines)

    def _repr_pretty_(self, printer: object, cycle: bool) -> None:
        """Print the network for Hypothesis, which calls this for a failing example.

        Each line break goes through the printer, so that a nested network keeps its indentation.
        """
        lines = repr(self).split("\n")
        for position, line in enumerate(lines):
            if position:
                printer.break_()  # type: ignore[attr-defined]
            printer.text(line)  # type: ignore[attr-defined]


def owner(nodes: tuple[Node, ...] | list[Node], index: int) -> int:
    """Return the value whose layer computes value ``index``, following chains of sharing."""
    while isinstance(node := nodes[index - 1], Again):
        index = node.of
    return index


def infer(node: Node, nodes: tuple[Node, ...] | list[Node], signals: list[Signal]) -> Signal:
    """Return the output signal of ``node``, given the nodes and signals before it."""
    if not isinstance(node, Again):
        return node.infer(*(signals[i] for i in node.inputs))
    first = nodes[owner(nodes, node.of) - 1] if node.of else None
    if first is None or len(first.inputs) != 1:
        raise SpecError(f"{node!r}: value {node.of} has no layer to share")
    before, now = signals[first.inputs[0]], signals[node.x]
    alike = (
        before == now
        if isinstance(first, TokenMix)
        else before.with_channels(1).layout == now.layout
    )
    if not alike or before.channels != now.channels:
        raise SpecError(f"{node!r}: the layer was made for {before}, not {now}")
    return first.infer(now)


class SpecModule(nn.Module):
    """The module of a network.

    It has one submodule for each node with parameters, named after the node's kind and value.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network
        for index, node in enumerate(network.nodes, start=1):
            module = (
                node.module(*(network.signals[i] for i in node.inputs))
                if not isinstance(node, Again)
                else None
            )
            if module is not None:
                self.add_module(self._name(index), module)

    def _name(self, index: int) -> str:
        return f"{type(self.network.nodes[index - 1]).__name__.lower()}{index}"

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        values = [x]
        cuts: dict[tuple[object, ...], tuple[Tensor, ...]] = {}
        for index, node in enumerate(self.network.nodes, start=1):
            if isinstance(node, Split | Chunk):
                if node.call not in cuts:
                    cuts[node.call] = node.cut(self.network.signals[node.x], values[node.x])
                values.append(cuts[node.call][node.part])
                continue
            source = self.network.owner(index)
            layer = getattr(self, self._name(source), None)
            read = (node.x,) if isinstance(node, Again) else node.inputs
            signals = tuple(self.network.signals[i] for i in read)
            values.append(
                self.network.nodes[source - 1].forward(layer, signals, *(values[i] for i in read))
            )
        found = tuple(values[i] for i in self.network.outputs)
        return found[0] if len(found) == 1 else found


def build(network: Network, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return the network's module in eval mode, with random parameters and buffers.

    Weights are scaled by fan-in, so that values neither vanish nor explode through thirty layers.
    Norm scales are close to one, and running variances are between 0.5 and 1.5. Torch's global
    generator is not changed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = SpecModule(network).to(dtype)
        with torch.no_grad():
            for name, tensor in module.state_dict().items():
                if not tensor.is_floating_point():
                    continue
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 1.5)
                elif (
                    tensor.dim() > 1
                    and min(tensor.shape) > 0
                    and "gamma" not in name
                    and "token." not in name
                ):
                    tensor.normal_().div_(max(1, tensor[0].numel()) ** 0.5)
                elif name.endswith(("bias", "running_mean", "token")):
                    tensor.normal_(std=0.3)
                else:
                    tensor.normal_(1.0, 0.2)
    return module.eval()


def example(
    network: Network, *, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return a random batch of inputs, shape (batch, *network.input)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, *network.input), generator=generator, dtype=torch.float64).to(dtype)
