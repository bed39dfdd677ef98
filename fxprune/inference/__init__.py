"""Pruned models in a form for inference only, as fast as networks written by hand at their widths.

``constants`` computes once what depends on parameters alone. ``identities`` removes what does
nothing outside training. ``folding`` moves scales and shifts of channels into the weights of
convolutions and linear layers. ``layout`` stores weights in channels-last order.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn

from fxprune.common.hooks import put_in_mode
from fxprune.common.identity import memo_of
from fxprune.common.numbers import check_bool
from fxprune.common.public import public
from fxprune.errors import ModelError
from fxprune.inference.constants import compute_constants
from fxprune.inference.folding import fold
from fxprune.inference.identities import drop_identities
from fxprune.inference.layout import LAYOUTS, lay_out, take_any_layout
from fxprune.rewrite import PrunedModule
from fxprune.trace import copy_module
from fxprune.trace.aliasing import Memory, writes

__all__ = ["LAYOUTS", "deploy", "lay_out"]


@public
def deploy(model: nn.Module, *, channels_last: bool = True) -> nn.Module:
    """Copy a pruned model for inference.

    Batch normalisations are folded, constants are computed, and training code is removed. Whatever
    scales and shifts the channels of a convolution or a linear layer goes into its weights: layer
    scales, and batch normalisation, frozen or not, written as a module, a function or arithmetic.

    Parameters
    ----------
    model:
        The result of :func:`fxprune.prune`, :func:`fxprune.apply` or :func:`fxprune.load`, on any
        device; it is left as it is. For a dense model, use ``fxprune.prune(model, example,
        channels=1.0).model``.
    channels_last:
        Store weights of convolutions over images and volumes in channels-last order, in which GPUs
        compute. Give inputs as ``x.to(memory_format=torch.channels_last)``, so that no copies are
        needed. False: keep the order. It is also kept if Python code remains beside the graphs, as
        in detectors, because ``view`` and writes in place there depend on it.

    Returns
    -------
    A module in ``eval`` mode whose parameters need no gradient. Its outputs differ by rounding
    only. Its state dict has other names than the model's: to train or prune further, keep the
    model, or what :meth:`~fxprune.Pruned.save` wrote.

    Raises
    ------
    ModelError
        If there is no graph in the model, or if the model writes through a view that would be a
        copy in channels-last order.

    Examples
    --------
    >>> import fxprune
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
    ...     nn.Conv2d(8, 4, 3))
    >>> x = torch.randn(2, 3, 8, 8)
    >>> pruned = fxprune.prune(net, x, channels=0.5).model.eval()
    >>> fast = deploy(pruned)
    >>> [name for name, _ in fast.named_children()], bool((fast(x) - pruned(x)).abs().max() < 1e-5)
    (['0', '2', '4'], True)
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    if not any(isinstance(module, fx.GraphModule) for module in modules):
        raise ModelError(
            f"deploy() takes the model that prune() gave; this {type(model).__name__} holds no "
            "graph. Of a dense model make one with prune(model, example_inputs, "
            "channels=1.0).model."
        )
    channels_last = check_bool("channels_last", channels_last)
    root = put_in_mode(_copy_of(model), False)
    # Python code beside graphs would see the layout
    channels_last = channels_last and isinstance(root, fx.GraphModule)
    for name, module in list(root.named_modules()):
        if isinstance(module, fx.GraphModule):
            with torch.no_grad():
                _deploy_graph(module, channels_last)
            if not name:
                # keeps the modules that the graph calls, and no others
                called = fx.GraphModule(module, module.graph)
                root = PrunedModule(called, called.graph, type(model).__name__)
    if channels_last:
        lay_out(root)
    return put_in_mode(root, False).requires_grad_(False)


def _copy_of(model: nn.Module) -> nn.Module:
    """Copy a model deeply, with hooks of its own.

    Tensors that hooks compute (``weight_norm``) are copied, too; ``copy.deepcopy`` refuses them.
    """
    computed: list[Tensor] = []
    for module in model.modules():
        tensors = [value for value in vars(module).values() if isinstance(value, Tensor)]
        computed += [tensor for tensor in tensors if not tensor.is_leaf]
    memo = memo_of((tensor, tensor.detach().clone()) for tensor in computed)
    for tensor in (*model.parameters(), *model.buffers()):
        copy.deepcopy(tensor, memo)
    return copy_module(model, memo)


def _deploy_graph(root: fx.GraphModule, channels_last: bool) -> None:
    """Optimise one graph and what it calls, in place."""
    graph = root.graph
    if isinstance(root, PrunedModule):
        root.__dict__["training_graph"] = None

    def has_effect(node: fx.Node) -> bool:
        """Tell whether a node must stay even if nobody reads it."""
        return node.is_impure() or writes(node, root)

    memory = Memory(root.graph, root)
    take_any_layout(root, memory, channels_last)
    constants = compute_constants(root, memory.changing())
    drop_identities(root)
    graph.eliminate_dead_code(has_effect)
    while fold(root, constants):
        graph.eliminate_dead_code(has_effect)
    graph.lint()
    root.recompile()
