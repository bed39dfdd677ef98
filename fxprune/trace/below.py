"""Operations that reach stand-ins from C++, without a call of a Python function of torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxprune.common.dispatch import aten
from fxprune.ops import Trait, has_trait, name_of_op
from fxprune.trace.execution import (
    untraced,
)
from fxprune.trace.guards import Guarded
from fxprune.trace.sequences import TracedPieces
from fxprune.trace.sizes import (
    ALL_DIMS,
    decisive_dims,
    reads_size,
    with_traced_sizes,
    wrapped_dims,
)
from fxprune.trace.tensors import Traced, TracedTensor, find_traced, map_leaves
from fxprune.trace.user_code import user_line

__all__ = ["BelowPython"]


def _in_gradient() -> bool:
    """Tell whether a transform that differentiates, such as ``grad`` or ``jvp``, is active."""
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    interpreters = torch._C._functorch.get_interpreter_stack() or ()
    return any(interpreter.key() in kinds for interpreter in interpreters)


class BelowPython(Guarded):
    """A recorder of ATen operations that C++ calls, and of scripted functions."""

    def call_in_transform(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call ``func`` inside a ``torch.func`` transform.

        Tensors are wrapped there, so the dispatcher records what happens to the stand-ins, as
        ATen operations. A size that Python reads there is a plain number, so the graph is guarded
        to it.
        """
        self._differentiates = self._differentiates or _in_gradient()
        if reads_size(func):
            self._guard_shown_sizes(args[0])
        with torch._C.DisableTorchFunctionSubclass():
            return func(
                *map_leaves(self.stand_in_if_known, args),
                **map_leaves(self.stand_in_if_known, kwargs),
            )

    def on_dispatch(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an ATen operation on stand-ins that the dispatcher reports."""
        if self.executing:
            args, kwargs = self._with_examples((args, kwargs))
            return func(*args, **kwargs)
        # a question about shape or layout is answered, not recorded
        if has_trait(name_of_op(func), Trait.READS_KIND | Trait.READS_SIZES):
            return self._answer_layout(func, *args)
        if self._differentiates:
            self._guard_all_inputs()
        if self._is_for_shape_only(func, args, kwargs):
            args, kwargs = self._with_examples((args, kwargs))
            return func(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            kwargs = self._replace_meta_device(kwargs, find_traced(args))
        last_node = next(iter(reversed(self.graph.nodes)))
        result = self.record("call_function", func, self._with_sizes(func, args), kwargs)
        if self.in_transform() or any(type(leaf) is int for leaf in tree_leaves((args, kwargs))):
            self.cpp_lines[last_node.next] = user_line()
        return list(result.guard_count()) if type(result) is TracedPieces else result

    @untraced
    def _is_for_shape_only(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Tell whether a gradient formula computes with a meta tensor that no node produced.

        Gradient formulas do so to find the shape of zeros. The result has no node either, so using
        its values in the graph is refused later.
        """
        if not self._differentiates or func._schema.is_mutable:
            return False
        for leaf in tree_leaves((args, kwargs)):
            is_plain = isinstance(leaf, Tensor) and not isinstance(leaf, Traced)
            if is_plain and leaf.is_meta and self.stand_in_if_known(leaf) is leaf:
                return True
        return False

    @untraced
    def _replace_meta_device(self, value: Any, beside: Any) -> Any:
        """Replace the meta device in arguments by the device of the stand-in ``beside``.

        Gradient formulas create tensors on the device of another tensor, which is the meta device
        while tracing. The graph reads that tensor's device instead.
        """

        def replace(leaf: Any) -> Any:
            if isinstance(leaf, torch.device) and leaf.type == "meta":
                return self.record("call_function", getattr, (beside, "device"), {})
            return leaf

        return map_leaves(replace, value)

    @untraced
    def _answer_layout(self, func: Any, tensor: Any, *args: Any) -> Any:
        """Answer a question of C++ about a tensor's shape or layout from the example.

        C++ that reads sizes as plain numbers (``size``, not ``sym_size``) may decide by them how
        often a loop runs or which branch it takes, so these sizes are guarded. Inside a transform
        they are not: traces of inputs with other sizes find there what depends on sizes.
        """
        if func.overloadpacket in (aten.size, aten.numel) and not self.in_transform():
            decisive = self._decisive_dims
            for dim in range(tensor.rank):
                if decisive is ALL_DIMS or not decisive.isdisjoint((dim, dim - tensor.rank)):
                    self._guard_size(tensor, dim)
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
        dims = decisive_dims(graph)
        # tensors that a transform wraps answer without the tracer
        if dims is None or (dims and self.in_transform()):
            for leaf in tree_leaves(inputs):
                self._guard_shown_sizes(leaf)
        before = self._decisive_dims
        self._decisive_dims = ALL_DIMS if dims is None or dims >= ALL_DIMS else dims
        try:
            with torch.jit.optimized_execution(False):  # the profiling executor reads all sizes
                return call()
        finally:
            self._decisive_dims = before

    @untraced
    def _with_sizes(self, func: Any, args: Any) -> Any:
        """Replace sizes that C++ has read by numbers of the graph, in an operation's arguments."""
        if not args or not isinstance(args[0], TracedTensor):
            return args
        size = functools.partial(self.size_of, args[0])
        guard = functools.partial(self._guard_size, args[0])
        return with_traced_sizes(func, args, args[0].example.shape, size, guard)

    @untraced
    def _guard_shown_sizes(self, wrapped: Any) -> None:
        """Guard all sizes that a tensor shows inside a transform."""
        for tensor, dim in wrapped_dims(wrapped):
            self._guard_size(tensor, dim)

    @untraced
    def _guard_size(self, tensor: Any, dim: int) -> None:
        """Guard the size of a tensor's axis."""
        if (tensor.fx_node, dim) not in self._guarded_sizes:
            self._guarded_sizes.add((tensor.fx_node, dim))
            int(self.size_of(tensor, dim))

    def _guard_all_inputs(self) -> None:
        """Guard all sizes of the inputs.

        Gradient formulas contain sizes as plain numbers of unknown origin, so the graph is valid
        for inputs of these sizes only.
        """
        if self._inputs_guarded:
            return
        self._inputs_guarded = True
        for node in [node for node in self.graph.nodes if node.op == "placeholder"]:
            if node not in self.omitted:
                self._guard_leaves(self.stand_in(node))

    def _guard_leaves(self, value: Any) -> None:
        """Guard all sizes of the traced tensors in nested containers."""
        for leaf in tree_leaves(value):
            if isinstance(leaf, TracedTensor):
                for size in self._size(leaf):
                    int(size)
