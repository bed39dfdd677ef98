"""What C++ does with stand-ins: operations that no function of torch has announced."""

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
    """Whether ``grad``, ``vjp``, ``jvp`` or another transform that differentiates is at work."""
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(own.key() in kinds for own in torch._C._functorch.get_interpreter_stack() or ())


class BelowPython(Guarded):
    """Records what arrives as ATen operations, and what scripted functions compute."""

    def below(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Inside of ``torch.func``'s transforms tensors are wrapped: what they do to stand-ins is
        seen as ATen operations.

        A size that Python reads there is a plain number, so the graph is held to it.
        """
        self._differentiates = self._differentiates or _in_gradient()
        if reads_size(func):
            self._hold_sizes(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*map_leaves(self.known, args), **map_leaves(self.known, kwargs))

    def on_dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An ATen operation on stand-ins that no function of torch's Python interface has
        announced.
        """
        if self.executing:
            args, kwargs = self._of_examples((args, kwargs))
            return func(*args, **kwargs)
        # C++ asks for its layout without a word of Python's
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
        """Whether formulas of gradients compute with what no node has made: so they find the shape
        of zeros that nobody computes.

        What comes out has no node either: a graph that wants its values is refused.
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
        """Formulas of gradients put a tensor where another one is: the graph asks one of the call
        for its device.
        """

        def own(leaf: Any) -> Any:
            is_meta = isinstance(leaf, torch.device) and leaf.type == "meta"
            return (
                self.record("call_function", getattr, (beside, "device"), {}) if is_meta else leaf
            )

        return map_leaves(own, value)

    @unseen
    def _tell_layout(self, func: Any, tensor: Any, *args: Any) -> Any:
        """C++ asks how a tensor lies in memory, which is answered by the example.

        Where it takes sizes as plain numbers (not ``sym_size``) it may go by them: how often a
        loop turns, which branch is taken. What torch does for a transform is another matter: that
        is found by traces of other inputs.
        """
        if func.overloadpacket in (aten.size, aten.numel) and not self.in_transform():
            for dim in range(tensor.rank):
                if self._asked is EVERY or not self._asked.isdisjoint((dim, dim - tensor.rank)):
                    self._hold_size(tensor, dim)
        return func(tensor.example, *args)

    def call_script(self, call: Callable[[], Any], graph: Any, inputs: Any) -> Any:
        """A scripted function, which holds the graph to the sizes by which it goes, as its code
        says.
        """
        asked = asked_sizes(graph)
        # tensors that a transform wraps are asked without a word
        if asked is None or (asked and self.in_transform()):
            for leaf in tree_leaves(inputs):
                self._hold_sizes(leaf)
        before, self._asked = self._asked, EVERY if asked is None or asked >= EVERY else asked
        try:
            with torch.jit.optimized_execution(False):  # which asks for sizes to note them
                return call()
        finally:
            self._asked = before

    @unseen
    def _with_sizes(self, func: Any, args: Any) -> Any:
        """Numbers of the graph in the place of sizes that C++ has read."""
        if not args or not isinstance(args[0], TracedTensor):
            return args
        of, hold = (
            functools.partial(function, args[0]) for function in (self.size_of, self._hold_size)
        )
        return with_traced_sizes(func, args, args[0].example.shape, of, hold)

    @unseen
    def _hold_sizes(self, wrapped: Any) -> None:
        for tensor, dim in own_sizes(wrapped):
            self._hold_size(tensor, dim)

    @unseen
    def _hold_size(self, tensor: Any, dim: int) -> None:
        """Hold the graph to the example's size of a dimension."""
        if (tensor.fx_node, dim) not in self._held:
            self._held.add((tensor.fx_node, dim))
            int(self.size_of(tensor, dim))

    def _hold_inputs(self) -> None:
        """Formulas of gradients have sizes as plain numbers, of unknown origin: the graph is for
        inputs of these sizes alone.
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
