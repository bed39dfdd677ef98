"""Checks for user code around the forward of a module: hooks, and a replaced forward.

A graph made from the module would not run this code.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from fxprune.errors import TraceError

__all__ = [
    "has_replaced_forward",
    "in_mode",
    "is_hooked",
    "put_in_mode",
    "refuse_hooks",
    "replaced_forward_message",
]

_HOOK_STORES = ("_forward_pre_hooks", "_forward_hooks")


def has_replaced_forward(module: nn.Module) -> bool:
    """Tell whether forward was replaced on this object.

    An example is ``module.forward = module.forward_fused``.
    """
    return "forward" in vars(module)


def replaced_forward_message(module: nn.Module) -> str:
    """Return the text of an error for a module whose forward was replaced."""
    return (
        f"forward was replaced on this {type(module).__name__} object: the class's own forward "
        "would be traced. Put the new forward into a subclass or a wrapper module."
    )


def put_in_mode(model: nn.Module, training: bool) -> nn.Module:
    """Put a model into training or eval mode, and return the model.

    The return values of ``train()`` and ``eval()`` are ignored, because a model may override these
    methods and return another object.
    """
    model.train() if training else model.eval()
    return model


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode inside the context.

    Afterwards every module has its former mode.
    """
    before = {module: module.training for module in model.modules()}
    put_in_mode(model, training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def refuse_hooks(root: nn.Module, *, below: bool = False) -> None:
    """Refuse a module that cannot become one graph because of hooks or a replaced forward.

    A hook is Python code that runs at every call: it may store what it sees, count, or return
    something else. Torch's own hooks that compute a weight (``torch.nn.utils.weight_norm``) are
    allowed, because they belong to their module.

    Parameters
    ----------
    root:
        The module that is to become one graph.
    below:
        Allow hooks on ``root`` itself. They run before and after its graph if the module is called
        from Python.

    Raises
    ------
    TraceError
        If there is a hook, or if the forward of ``root`` was replaced. The message names the
        module.
    """
    if has_replaced_forward(root):
        raise TraceError(replaced_forward_message(root))
    for path, module in root.named_modules():
        if is_hooked(module) and not (below and module is root):
            name = repr(path) if path else f"this {type(root).__name__}"
            raise TraceError(
                f"a forward hook is registered on {name}: it is Python that runs at every call, "
                "which a graph has not. Remove the hook before pruning and register it on the "
                "pruned model."
            )


def is_hooked(module: nn.Module) -> bool:
    """Tell whether hooks of the user run before or after the forward of a module."""
    hooks = [hook for store in _HOOK_STORES for hook in vars(module).get(store, {}).values()]
    return any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)
