"""Scalars of a graph: what they depend on, and how to print them."""

from __future__ import annotations

from torch import Tensor, fx

__all__ = ["formula", "from_mode", "number_decides", "of_rank"]


def number_decides(node: fx.Node) -> str:
    """Return the error message for a model that reads a number that the example leaves out."""
    return (
        f"what the model does depends on its argument {str(node.target)!r}, a number: a graph is "
        "for one number only."
    )


def from_mode(node: fx.Node) -> bool:
    """Tell whether a scalar depends on ``self.training``."""
    if node.meta.get("mode"):
        return True
    return not isinstance(node.meta.get("val"), Tensor) and any(
        from_mode(n) for n in node.all_input_nodes if not isinstance(n.meta.get("val"), Tensor)
    )


def of_rank(node: fx.Node) -> bool:
    """Tell whether a scalar depends on ranks only, such as ``x.dim() == 4``.

    Inputs of the same kind have the same ranks.
    """
    tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if tensors:
        return node.target in ("dim", "ndimension") or (
            node.target is getattr and str(node.args[1]) == "ndim"
        )
    return bool(node.all_input_nodes) and all(of_rank(n) for n in node.all_input_nodes)


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
