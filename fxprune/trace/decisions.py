"""Scalars of a graph: what they depend on, and how to print them."""

from __future__ import annotations

from torch import Tensor, fx

__all__ = ["depends_on_mode", "depends_on_ranks_only", "formula", "omitted_number_message"]


def omitted_number_message(node: fx.Node) -> str:
    """Return the error message for a model that reads a number that the example leaves out."""
    return (
        f"what the model does depends on its argument {str(node.target)!r}, a number: a graph is "
        "for one number only."
    )


def depends_on_mode(node: fx.Node) -> bool:
    """Tell whether a scalar depends on ``self.training``."""
    if node.meta.get("mode"):
        return True
    if isinstance(node.meta.get("val"), Tensor):
        return False
    scalars = [n for n in node.all_input_nodes if not isinstance(n.meta.get("val"), Tensor)]
    return any(map(depends_on_mode, scalars))


def depends_on_ranks_only(node: fx.Node) -> bool:
    """Tell whether a scalar depends on ranks only, such as ``x.dim() == 4``.

    Inputs of the same kind have the same ranks.
    """
    inputs = node.all_input_nodes
    if any(isinstance(n.meta.get("val"), Tensor) for n in inputs):
        is_ndim = node.target is getattr and str(node.args[1]) == "ndim"
        return is_ndim or node.target in ("dim", "ndimension")
    return bool(inputs) and all(map(depends_on_ranks_only, inputs))


def formula(node: fx.Node) -> str:
    """Return a readable expression for a scalar node, such as ``mod(x.size(2), 7)``."""
    if node.op in ("placeholder", "get_attr"):
        return str(node.target)
    if isinstance(node.meta.get("val"), Tensor):
        return node.name
    parts = [formula(a) if isinstance(a, fx.Node) else repr(a) for a in node.args]
    name = (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )
    if node.op == "call_method":
        return f"{parts[0]}.{name}({', '.join(parts[1:])})"
    return f"{name}({', '.join(parts)})"
