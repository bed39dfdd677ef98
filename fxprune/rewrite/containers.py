"""Each container of modules is looked up once per call.

``self.features.denseblock1.denselayer1.norm1`` asks four modules for a member, in Python, each
time about as long as a small activation takes; nested classes ask one. So that an emitted graph is
no slower than what it was traced from, its code names a container where it is first needed:
``in_features = self.features``, then ``in_features.norm0(x)``.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

from torch import fx

__all__ = ["containers_named"]


def containers_named(graph: fx.Graph) -> AbstractContextManager[None]:
    """While this context lasts, the code that the graph generates asks for each container once.

    Examples
    --------
    >>> from torch import nn
    >>> model = fx.symbolic_trace(nn.Sequential(nn.Sequential(nn.ReLU(), nn.Tanh())))
    >>> with containers_named(model.graph):
    ...     code = model.recompile().src
    >>> code.count('in_0 = getattr(self, "0")'), code.count("getattr(in_0, ")
    (1, 2)
    """
    return graph.on_generate_code(
        lambda before: lambda body: _named_lines(graph, before(body) if before else body)
    )


def _named_lines(graph: fx.Graph, body: list[str]) -> list[str]:
    """Lines of code, one at least for each node in order; a line that does not look as torch
    writes it stays as it is.
    """
    taken = {name for node in graph.nodes for name in (node.name, str(node.target))}
    names = {"": "self"}  # container -> what the code calls it
    asking = [node for node in graph.nodes if node.op in ("call_module", "get_attr")][::-1]
    out = []
    for line in body:
        if asking and line.startswith(asking[-1].name):
            path, calls = str(asking[-1].target), asking[-1].op == "call_module"
            start, found, rest = line.partition(f" = {_member('self', path)}" + "(" * calls)
            if found and (calls or not rest):
                asking.pop()
                container, _, own = path.rpartition(".")
                out += _found(container, names, taken)
                line = f"{start} = {_member(names[container], own)}" + "(" * calls + rest
        out.append(line)
    return out


def _found(container: str, names: dict[str, str], taken: set[str]) -> list[str]:
    """What gives a container a name, and those that hold it, where they have none yet."""
    if container in names:
        return []
    outer, _, own = container.rpartition(".")
    lines = _found(outer, names, taken)
    name = "in_" + re.sub(r"\W", "_", container)
    while name in taken:
        name += "_"
    taken.add(name)
    names[container] = name
    return [*lines, f"{name} = {_member(names[outer], own)}\n"]


def _member(base: str, path: str) -> str:
    """The expression for a member, as torch.fx writes it."""
    for part in path.split("."):
        base = f"{base}.{part}" if part.isidentifier() else f'getattr({base}, "{part}")'
    return base
