"""Code of a graph that looks up each container of modules once per call.

``self.features.denseblock1.denselayer1.norm1`` looks up four attributes of modules. Each look-up
runs Python code, which takes about as long as a small activation. The classes that a graph was
traced from need one look-up per call of a module. To be as fast as they are, the code of a graph
stores a container in a variable before its first use: ``in_features = self.features``, then
``in_features.norm0(x)``.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

from torch import fx

__all__ = ["containers_named"]


def containers_named(graph: fx.Graph) -> AbstractContextManager[None]:
    """Make the graph generate code that looks up each container once, within this context.

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
    """Return the lines of a graph's code with containers stored in variables.

    Each node has at least one line, in the order of the graph. A line that does not have the form
    in which torch writes it stays as it is.
    """
    taken = {name for node in graph.nodes for name in (node.name, str(node.target))}
    names = {"": "self"}  # path of a container -> its variable
    pending = [node for node in graph.nodes if node.op in ("call_module", "get_attr")][::-1]
    out = []
    for line in body:
        if pending and line.startswith(pending[-1].name):
            path, is_call = str(pending[-1].target), pending[-1].op == "call_module"
            start, found, rest = line.partition(f" = {_member('self', path)}" + "(" * is_call)
            if found and (is_call or not rest):
                pending.pop()
                container, _, member = path.rpartition(".")
                out += _storing_lines(container, names, taken)
                line = f"{start} = {_member(names[container], member)}" + "(" * is_call + rest
        out.append(line)
    return out


def _storing_lines(container: str, names: dict[str, str], taken: set[str]) -> list[str]:
    """Return the lines that store a container, and those around it, if not stored yet.

    Adds to ``names``, the variable of each stored container, and to ``taken``, the names in use.
    """
    if container in names:
        return []
    outer, _, member = container.rpartition(".")
    lines = _storing_lines(outer, names, taken)
    name = "in_" + re.sub(r"\W", "_", container)
    while name in taken:
        name += "_"
    taken.add(name)
    names[container] = name
    return [*lines, f"{name} = {_member(names[outer], member)}\n"]


def _member(base: str, path: str) -> str:
    """Return the expression for a member of ``base``, as torch.fx writes it."""
    for part in path.split("."):
        base = f"{base}.{part}" if part.isidentifier() else f'getattr({base}, "{part}")'
    return base
