"""What Python decides by values and sizes, and what holds the graph to it."""

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
from fxprune.trace.aliasing import written
from fxprune.trace.context_managers import enter, leave
from fxprune.trace.decisions import formula, from_mode, number_decides, of_rank
from fxprune.trace.execution import (
    ModeReadError,
    sources,
    unseen,
)
from fxprune.trace.lookups import Lookup, at
from fxprune.trace.numbers import Number
from fxprune.trace.recorder import Recorder
from fxprune.trace.sequences import SizeTuple
from fxprune.trace.user_code import is_ours, user_line

__all__ = ["Guarded"]


class Guarded(Recorder):
    """Answers what Python asks, and holds the graph to the answer."""

    @unseen
    def _size(self, tensor: Any, dim: Any = None) -> Any:
        if dim is not None:
            return self.record("call_method", "size", (tensor, dim), {})
        return SizeTuple(self.size_of(tensor, i) for i in range(tensor.example.dim()))

    def size_of(self, tensor: Any, dim: int) -> Any:
        """The size of a tensor along a dimension, as a number of the graph."""
        return self.record("call_method", "size", (tensor, dim), {})

    @unseen
    def hold_input(self, node: fx.Node, dim: int, where: str) -> None:
        """Hold the finished graph to the size of an input, by which C++ went for the sake of a
        line of the user's.
        """
        self._closed = False
        with torch.no_grad(), self.graph.inserting_before(node.next):
            number = self.size_of(self.stand_in(node), dim)
        self._hold_finished(number, where)

    @unseen
    def hold_rank(self, node: fx.Node) -> None:
        """Hold the finished graph to the number of axes of what a node gives."""
        self._closed = False
        with torch.no_grad(), self.graph.inserting_before(node.next):
            rank = self.record("call_method", "dim", (self.stand_in(node),), {})
            self._hold(rank, rank.example, f"inputs with {formula(rank.fx_node)}")
        self._closed = True

    def _hold_finished(self, number: Any, where: str) -> None:
        self._closed, node = False, number.fx_node
        text = f"{where}: {formula(node)} was taken as {number.example!r}"
        with torch.no_grad(), self.graph.inserting_before(node.next):
            if text not in self.decisions and not of_rank(node):
                self.decisions.append(text)
            self._hold(
                number, number.example, f"inputs with {formula(node)}", f" (decided at {where})"
            )
        self._closed = True

    def is_users(self, filename: str) -> bool:
        """Whether code of this file is followed: not while a node runs, not inside of torch, and
        not in another thread.
        """
        return not self.executing and self.is_mine() and not is_ours(filename)

    def begin_region(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.create_node(
            "call_function", enter, self.create_arg((kind, *args)), self.create_arg(kwargs)
        )
        node.meta["val"] = None
        return node

    @unseen
    def end_region(self, entry: fx.Node) -> None:
        following = itertools.dropwhile(lambda node: node is not entry, self.graph.nodes)
        if any(holds_tensors(node.meta["val"]) for node in following):
            self.create_node("call_function", leave, (entry,), {}).meta["val"] = None
        else:
            self.graph.erase_node(entry)

    @unseen
    def decide(self, value: Any, kind: type) -> Any:
        """A Python decision needs a value now: take the example's, list it, and guard it in the
        graph.
        """
        node, example = value.fx_node, value.example
        if node in self.left_out:
            raise TraceError(number_decides(node))
        if isinstance(example, Tensor):
            if example.is_meta:
                kind_of_error = ChanceError if self._by_chance(node) else TraceError
                raise kind_of_error(
                    f"the model branches on the values of a tensor (at {user_line()}). A graph "
                    "has one path for all values: use torch.where or masks, or keep that part in "
                    "a module that is not pruned."
                )
            self._read_values.append((node, user_line()))
            self._refuse_values_that_change()
            return kind(example)
        if from_mode(node):
            if self._inside_leaf_function:
                raise ModeReadError
            self.asked_mode = True
            return kind(example)
        taken = kind(example)
        where = user_line()
        text = f"{where}: {formula(node)} was taken as {taken!r}"
        if text not in self.decisions and not of_rank(node):
            self.decisions.append(text)
        held = example if kind is int else taken  # int(n / 3): the graph holds n / 3
        self._hold(value, held, f"inputs with {formula(node)}", f" (decided at {where})")
        return taken

    def is_looked_up(self, number: Number) -> None:
        """Code of the model looks something up by a number, or puts something there; libraries do
        so in what they remember.
        """
        frame = sys._getframe(2)
        if (
            self._closed
            or not self.is_users(frame.f_code.co_filename)
            or self._reached.trusts(frame.f_globals.get("__name__", ""))
        ):
            return
        number.fx_node.meta["looked_up"] = True
        self.lookups.append(Lookup(number.fx_node, at(frame), user_line(), self._reached.made))

    def is_compared(self) -> None:
        """A number is compared; by a table, if one was looked up in the same place."""
        if self.lookups and self.lookups[-1].place == at(sys._getframe(2)):
            for own in itertools.takewhile(
                lambda own: own.place == self.lookups[-1].place, reversed(self.lookups)
            ):
                own.answered = True

    @unseen
    def hold_looked_up(self, lookup: Lookup) -> None:
        """Hold the finished graph to a number by which something was looked up, and was not
        there.
        """
        if from_mode(lookup.node):
            self.asked_mode = True
            return
        self._hold_finished(self.stand_in(lookup.node), lookup.line)

    @unseen
    def text(self, number: Number, write: Callable[[Any], str]) -> str:
        """The text of a number, which the graph is held to: Python may do anything with a text."""
        if self.executing or self._closed or not self.is_mine():
            return write(number.example)
        last, decided = next(iter(reversed(self.graph.nodes))), len(self.decisions)
        text = write(self.decide(number, type(number.example)))
        made = [*itertools.takewhile(lambda node: node is not last, reversed(self.graph.nodes))]
        self._texts.append((text, made, self.decisions[decided:]))
        return text

    def _refuse_values_that_change(self) -> None:
        """A value that Python has read off a buffer which the graph writes, before or after that,
        is another one at each call.
        """
        for value, where in self._read_values:
            if any(
                own.op == "get_attr" and any(own in written(user)[:1] for user in own.users)
                for own in sources(value)
            ):
                raise TraceError(
                    f"forward reads the value of a buffer that it writes (at {where}): it is "
                    "another one at each call, and a graph would hold this one. Compute with the "
                    "buffer as a tensor."
                )

    def _hold(self, value: Any, taken: Any, what: str, why: str = "") -> None:
        """Let the graph say so where a value is another one than it was traced for."""
        # Not operator.not_, which asks for the truth of a stand-in when the emitted graph is
        # traced in its turn.
        same = operator.is_ if taken is None else operator.eq
        held = value if taken is True else self.record("call_function", same, (value, taken), {})
        message = f"this graph was traced for {what} == {taken!r}{why}"
        node = self.create_node(
            "call_function", torch._assert, (self.create_arg(held), message), {}
        )
        node.meta.update(val=None, guard=True)
