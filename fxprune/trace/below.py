"""Operations that reach stand-ins from C++, without a call of a Python function of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxprune.common.dispatch import aten
from fxprune.ops import Trait, has, name_of_op
from fxprune.trace.execution import (
    unseen,
)
from fxprune.trace.guards import Guarded
from fxprune.trace.sequences import TracedPieces
from fxprune.trace.sizes import EVERY, asked_sizes, own_sizes, reads_size, with_traced_sizes
from fxprune.trace.tensors import Traced, TracedTensor, find_traced, map_leaves
from fxprune.trace.user_code import user_line

__all__ = ["BelowPython"]


def _in_gradient() -> bool:
    """Tell whether a transform that differentiates, such as ``grad`` or ``jvp``, is active."""
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(own.key() in kinds for own in torch._C._functorch.get_interpreter_stack() or ())


class BelowPython(Guarded):
    """A recorder of ATen operations that C++ calls, and of scripted functions."""

    def below(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call ``func`` inside a ``torch.func`` transform.

        Tensors are wrapped there, so the dispatcher records what happens to the stand-ins, as
        ATen operations. A size that Python reads there is a plain number, so the graph is guarded
        to it.
        """
        self._differentiates = self._differentiates or _in_gradient()
        if reads_size(func):
            self._hold_sizes(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map_leaves(self.known, args), **map_leaves(self.known, kwargs))

    def on_dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an ATen operation on stand-ins that the dispatcher reports."""
        if self.executing:
            args, kwargs = self._of_examples((args, kwargs))
            return func(*args, **kwargs)
        # a question about shape or layout is answered, not recorded
        if has(name_of_op(func), Trait.ASKS | Trait.ASKS_SIZES):
            return self._tell_layout(func, *args)
        if self._differentiates:
            self._hold_inputs()
        if self._for_shape_alone(func, args, kwargs):
            args, kwargs = self._of_examples((args, kwargs))
            return func(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            kwargs = self._in_place_of_meta(kwargs, find_traced(args))
        before = next(iter(reversed(self.graph.nodes)))
        result = self.record("call_function", func, self._with_sizes(func, args), kwargs)
        if self.in_transform() or any(type(leaf) is int for leaf in tree_leaves((args, kwargs))):
            self.below_lines[before.next] = user_line()
        return list(result.count_parts()) if type(result) is TracedPieces else result

    @unseen
    def _for_shape_alone(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Tell whether a gradient formula computes with a meta tensor that no node produced.

        Gradient formulas do so to find the shape of zeros. The result has no node either, so using
        its values in the graph is refused later.
        """
        leaves = (
            tree_leaves((args, kwargs))
            if self._differentiates and not func._schema.is_mutable
            else ()
        )
        unknown = (
            leaf
            for leaf in leaves
            if isinstance(leaf, Tensor) and not isinstance(leaf, Traced) and leaf.is_meta
        )
        return any(self.known(leaf) is leaf for leaf in unknown)

    @unseen
    def _in_place_of_meta(self, value: Any, beside: Any) -> Any:
        """Replace the meta device in arguments by the device of the stand-in ``beside``.

        Gradient formulas create tensors on the device of another tensor, which is the meta device
        while tracing. The graph reads that tensor's device instead.
        """

        def own(leaf: Any) -> Any:
            is_meta = isinstance(leaf, torch.device) and leaf.type == "meta"
            return (
                self.record("call_function", getattr, (beside, "device"), {}) if is_meta else leaf
            )

        return map_leaves(own, value)

    @unseen
    def _tell_layout(self, func: Any, tensor: Any, *args: Any) -> Any:
        """Answer a question of C++ about a tensor's shape or layout from the example.

        C++ that reads sizes as plain numbers (``size``, not ``sym_size``) may decide by them how
        often a loop runs or which branch it takes, so these sizes are guarded. Inside a transform
        they are not: traces of inputs with other sizes find there what depends on sizes.
        """
        if func.overloadpacket in (aten.size, aten.numel) and not self.in_transform():
            for dim in range(tensor.rank):
                if self._asked is EVERY or not self._asked.isdisjoint((dim, dim - tensor.rank)):
                    self._hold_size(tensor, dim)
        return func(tensor.example, *args)

    def call_script(self, call: Callable[[], Any], graph: Any, inputs: Any) -> Any:
        """Run a scripted function, and guard the sizes that its code decides by.

        Parameters
        ----------
        call:
            Runs the function.
        graph:
            The function's TorchScript graph.
        inputs:
            The arguments, which may be nested.
        """
        asked = asked_sizes(graph)
        # tensors that a transform wraps answer without the tracer
        if asked is None or (asked and self.in_transform()):
            for leaf in tree_leaves(inputs):
                self._hold_sizes(leaf)
        before, self._asked = self._asked, EVERY if asked is None or asked >= EVERY else asked
        try:
            with torch.jit.optimized_execution(False):  # the profiling executor reads all sizes
                return call()
        finally:
            self._asked = before

    @unseen
    def _with_sizes(self, func: Any, args: Any) -> Any:
        """Replace sizes that C++ has read by numbers of the graph, in an operation's arguments."""
        if not args or not isinstance(args[0], TracedTensor):
            return args
        of, hold = (
            functools.partial(function, args[0]) for function in (self.size_of, self._hold_size)
        )
        return with_traced_sizes(func, args, args[0].example.shape, of, hold)

    @unseen
    def _hold_sizes(self, wrapped: Any) -> None:
        """Guard all sizes that a tensor shows inside a transform."""
        for tensor, dim in own_sizes(wrapped):
            self._hold_size(tensor, dim)

    @unseen
    def _hold_size(self, tensor: Any, dim: int) -> None:
        """Guard the size of a tensor's axis."""
        if (tensor.fx_node, dim) not in self._held:
            self._held.add((tensor.fx_node, dim))
            int(self.size_of(tensor, dim))

    def _hold_inputs(self) -> None:
        """Guard all sizes of the inputs.

        Gradient formulas contain sizes as plain numbers of unknown origin, so the graph is valid
        for inputs of these sizes only.
        """
        if not self._sizes_held:
            self._sizes_held = True
            for node in [node for node in self.graph.nodes if node.op == "placeholder"]:
                for tensor in (
                    tree_leaves(self.stand_in(node)) if node not in self.left_out else ()
                ):
                    if isinstance(tensor, TracedTensor):
                        for size in self._size(tensor):
                            int(size)
