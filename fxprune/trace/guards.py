"""Decisions that Python makes by values and sizes, and the assertions that guard them."""

from __future__ import annotations

import itertools
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from fxprune.common.dispatch import holds_tensors
from fxprune.errors import ChanceError, TraceError
from fxprune.trace.aliasing import written_arguments
from fxprune.trace.context_managers import enter, leave
from fxprune.trace.decisions import (
    depends_on_mode,
    depends_on_ranks_only,
    formula,
    omitted_number_message,
)
from fxprune.trace.execution import (
    ModeReadError,
    sources,
    untraced,
)
from fxprune.trace.lookups import Lookup, instruction_of
from fxprune.trace.numbers import Number
from fxprune.trace.recorder import Recorder
from fxprune.trace.sequences import SizeTuple
from fxprune.trace.user_code import is_library_file, user_line

__all__ = ["Guarded"]


class Guarded(Recorder):
    """A recorder that answers Python's questions and guards the answers in the graph.

    A guard is a ``torch._assert`` node: the graph fails where a value differs from the one it was
    traced for.
    """

    @untraced
    def _size(self, tensor: Any, dim: Any = None) -> Any:
        """Record ``tensor.size(dim)``, or the sizes of all axes without ``dim``."""
        if dim is not None:
            return self.record("call_method", "size", (tensor, dim), {})
        return SizeTuple(self.size_of(tensor, i) for i in range(tensor.example.dim()))

    def size_of(self, tensor: Any, dim: int) -> Any:
        """Record the size of one axis of a tensor and return its stand-in."""
        return self.record("call_method", "size", (tensor, dim), {})

    @untraced
    def guard_input(self, node: fx.Node, dim: int, where: str) -> None:
        """Guard the size of an input's axis in the finished graph.

        Parameters
        ----------
        node:
            The input, or a node that takes an entry out of it.
        dim:
            The axis.
        where:
            The user's line for which C++ decided by the size.
        """
        self._closed = False
        with torch.no_grad(), self.graph.inserting_before(node.next):
            number = self.size_of(self.stand_in(node), dim)
        self._guard_in_finished_graph(number, where)

    @untraced
    def guard_rank(self, node: fx.Node) -> None:
        """Guard the number of axes of a node's value in the finished graph."""
        self._closed = False
        with torch.no_grad(), self.graph.inserting_before(node.next):
            rank = self.record("call_method", "dim", (self.stand_in(node),), {})
            self._guard(rank, rank.example, f"inputs with {formula(rank.fx_node)}")
        self._closed = True

    def _guard_in_finished_graph(self, number: Any, where: str) -> None:
        """Guard a number in the finished graph and list the decision made at ``where``."""
        self._closed, node = False, number.fx_node
        text = f"{where}: {formula(node)} was taken as {number.example!r}"
        with torch.no_grad(), self.graph.inserting_before(node.next):
            if text not in self.decisions and not depends_on_ranks_only(node):
                self.decisions.append(text)
            what, why = f"inputs with {formula(node)}", f" (decided at {where})"
            self._guard(number, number.example, what, why)
        self._closed = True

    def follows_file(self, filename: str) -> bool:
        """Tell whether the tracer follows code of this file.

        It does not while a node runs, in other threads, or in files of torch or fxprune.
        """
        return not self.executing and self.is_tracing_thread() and not is_library_file(filename)

    def begin_region(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Record the start of ``with torch.<kind>(...)`` and return its node."""
        node = self.create_node(
            "call_function", enter, self.create_arg((kind, *args)), self.create_arg(kwargs)
        )
        node.meta["val"] = None
        return node

    @untraced
    def end_region(self, entry: fx.Node) -> None:
        """Record the end of a region; erase its start if no tensor was computed inside."""
        following = itertools.dropwhile(lambda node: node is not entry, self.graph.nodes)
        if any(holds_tensors(node.meta["val"]) for node in following):
            self.create_node("call_function", leave, (entry,), {}).meta["val"] = None
        else:
            self.graph.erase_node(entry)

    @untraced
    def decide(self, value: Any, kind: type) -> Any:
        """Return the example's value for a decision in Python; list and guard the decision.

        Parameters
        ----------
        value:
            The stand-in that Python asks.
        kind:
            The type that Python wants: ``bool``, ``int``, ``float`` or ``complex``.

        Raises
        ------
        TraceError, ChanceError
            If the decision depends on data, or on an argument that the example leaves out.
        ModeReadError
            If a leaf function branches on ``training``.
        """
        node, example = value.fx_node, value.example
        if node in self.omitted:
            raise TraceError(omitted_number_message(node))
        if isinstance(example, Tensor):
            self._note_value_read(node, example)
            return kind(example)
        if depends_on_mode(node):
            if self._inside_leaf_function:
                raise ModeReadError
            self.asked_mode = True
            return kind(example)
        taken = kind(example)
        where = user_line()
        text = f"{where}: {formula(node)} was taken as {taken!r}"
        if text not in self.decisions and not depends_on_ranks_only(node):
            self.decisions.append(text)
        guarded = example if kind is int else taken  # for int(n / 3), guard n / 3
        self._guard(value, guarded, f"inputs with {formula(node)}", f" (decided at {where})")
        return taken

    def _note_value_read(self, node: fx.Node, example: Tensor) -> None:
        """Note that Python reads a tensor's values; refuse it unless they are constant."""
        if example.is_meta:
            error_class = ChanceError if self._is_random(node) else TraceError
            raise error_class(
                f"the model branches on the values of a tensor (at {user_line()}). A graph "
                "has one path for all values: use torch.where or masks, or keep that part in "
                "a module that is not pruned."
            )
        self._read_values.append((node, user_line()))
        self._refuse_values_that_change()

    def note_lookup(self, number: Number) -> None:
        """Note that the model's code uses a number as a key.

        Lookups by libraries in their own caches do not count.
        """
        frame = sys._getframe(2)  # the caller of the number's __hash__
        if self._closed or not self.follows_file(frame.f_code.co_filename):
            return
        if self._reached.trusts(frame.f_globals.get("__name__", "")):
            return
        node = number.fx_node
        node.meta["looked_up"] = True
        self.lookups.append(
            Lookup(node, instruction_of(frame), user_line(), self._reached.cache_misses)
        )

    def note_comparison(self) -> None:
        """Note that a number is compared.

        If the last lookup happened at the same instruction, a table compares its keys there: it
        has found a key with the same hash.
        """
        place = instruction_of(sys._getframe(2))  # of the caller of the number's __eq__
        for lookup in itertools.takewhile(lambda it: it.place == place, reversed(self.lookups)):
            lookup.was_compared = True

    @untraced
    def guard_lookup(self, lookup: Lookup) -> None:
        """Guard, in the finished graph, a number that was looked up and not found."""
        if depends_on_mode(lookup.node):
            self.asked_mode = True
            return
        self._guard_in_finished_graph(self.stand_in(lookup.node), lookup.line)

    @untraced
    def text(self, number: Number, write: Callable[[Any], str]) -> str:
        """Return the text of a number, and guard the number.

        Python may do anything with a text, so the graph is only valid for this number.

        Parameters
        ----------
        write:
            Formats the example's value.
        """
        if self.executing or self._closed or not self.is_tracing_thread():
            return write(number.example)
        last_node, count = next(iter(reversed(self.graph.nodes))), len(self.decisions)
        text = write(self.decide(number, type(number.example)))
        backwards = reversed(self.graph.nodes)
        guards = [*itertools.takewhile(lambda node: node is not last_node, backwards)]
        self._texts.append((text, guards, self.decisions[count:]))
        return text

    def _refuse_values_that_change(self) -> None:
        """Refuse a value that Python has read from a buffer that the graph writes.

        Such a value is another one at each call, whether it is read before or after the write.
        """
        for value, where in self._read_values:
            if any(map(_is_written_attribute, sources(value))):
                raise TraceError(
                    f"forward reads the value of a buffer that it writes (at {where}): it is "
                    "another one at each call, and a graph would hold this one. Compute with the "
                    "buffer as a tensor."
                )

    def _guard(self, value: Any, taken: Any, what: str, why: str = "") -> None:
        """Add an assertion that fails where ``value`` differs from ``taken``.

        Parameters
        ----------
        value:
            The stand-in to guard.
        taken:
            The value that the graph was traced for.
        what:
            A description of the value, for the message.
        why:
            The end of the message.
        """
        # not operator.not_: it would ask a stand-in for its truth when the emitted graph is
        # traced again
        same = operator.is_ if taken is None else operator.eq
        holds = value if taken is True else self.record("call_function", same, (value, taken), {})
        message = f"this graph was traced for {what} == {taken!r}{why}"
        args = (self.create_arg(holds), message)
        node = self.create_node("call_function", torch._assert, args, {})
        node.meta.update(val=None, guard=True)


def _is_written_attribute(node: fx.Node) -> bool:
    """Tell whether a node reads an attribute of the model that another node writes."""
    return node.op == "get_attr" and any(
        node in written_arguments(user)[:1] for user in node.users
    )
