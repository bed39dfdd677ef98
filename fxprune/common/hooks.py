"""Python that a user has put around or into the place of a module's forward: a graph would not run
it.
"""

from __future__ import annotations

from torch import nn

from fxprune.errors import TraceError

__all__ = ["has_own_forward", "in_mode", "is_hooked", "refuse_hooks"]

_HOOK_STORES = ("_forward_pre_hooks", "_forward_hooks")


def has_own_forward(module: nn.Module) -> bool:
    """Whether forward was replaced on this object: ``module.forward = module.forward_fused``."""
    return "forward" in vars(module)


def in_mode(model: nn.Module, training: bool) -> nn.Module:
    """The model, once its own ``train()`` or ``eval()`` has put it into a mode; what these give
    back may be another one.
    """
    model.train() if training else model.eval()
    return model


def refuse_hooks(root: nn.Module, *, below: bool = False) -> None:
    """Refuse to make one graph of modules around which hooks run.

    A hook is Python for every call: it keeps what it sees, counts, or gives something else back.
    torch's own hooks, which compute a weight (``torch.nn.utils.weight_norm``), belong to their
    module. ``below`` leaves out the root's own hooks, for a module that is called from Python,
    where these run before and after its graph.

    Raises
    ------
    TraceError
        If there is a hook, or if the root's forward was replaced. The message names the module.
    """
    if has_own_forward(root):
        raise TraceError(
            f"forward was replaced on this {type(root).__name__} object: the class's own forward "
            "would be traced. Put the new forward into a subclass or a wrapper module."
        )
    for path, module in root.named_modules():
        if is_hooked(module) and not (below and module is root):
            name = repr(path) if path else f"this {type(root).__name__}"
            raise TraceError(
                f"a forward hook is registered on {name}: it is Python that runs at every call, "
                "which a graph has not. Remove the hook before pruning and register it on the "
                "pruned model."
            )


def is_hooked(module: nn.Module) -> bool:
    """Whether hooks of a user run before or after a module's forward."""
    hooks = [hook for store in _HOOK_STORES for hook in vars(module).get(store, {}).values()]
    return any(not type(hook).__module__.startswith("torch.nn.utils.") for hook in hooks)
