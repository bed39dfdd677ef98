"""The questions about sizes that a model's Python code asks, and what it does after each answer.

While a model runs, sizes of tensors are :class:`Size` numbers, and so are numbers computed from
them. A *question* is a branch on such a number (``if x.shape[1] > 5``). It is recorded, and can be
given another answer than the true one.
"""

from __future__ import annotations

import builtins
import dis
import math
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.common.contents import leaves_of, tensors_of
from fxprune.common.identity import IdentityMap
from fxprune.ops import Trait, has_trait
from fxprune.trace.tensors import map_leaves
from fxprune.trace.user_code import is_library_file, user_frames, user_line

__all__ = ["PART", "CodePlace", "Questions", "plain_sizes"]

PART = "part:"
"""Prefix of the names of steps that are calls of parts."""

CodePlace = tuple[CodeType, int]
"""The place where a question is asked: code object and offset of the instruction."""


@dataclass
class Asked:
    """The questions that were asked at one place.

    Attributes
    ----------
    line:
        The line of code.
    empties:
        Whether every question was only whether a number is 0.
    margins:
        Differences between the numbers and what they were compared with; 0 for infinite ones.
    answers:
        The answers that were given.
    """

    line: str
    empties: bool = True
    margins: set[float] = field(default_factory=set)
    answers: set[bool] = field(default_factory=set)


class Questions(TorchFunctionMode):
    """A mode that makes sizes of tensors :class:`Size` numbers and records questions about them.

    Parameters
    ----------
    own:
        Parameters and buffers of the model. Their sizes do not depend on inputs, and stay plain
        numbers.
    turned:
        Place of a question -> answer to give there, whatever is true.

    Attributes
    ----------
    asked:
        The questions, by their places.
    trail:
        Pairs of a step and a step that uses its results. A step is a call of a part, or of a
        function of torch on tensors that depend on parameters, with the lines of the model's code
        from which it is called. The first entry is None for a step that uses no earlier one.
    """

    def __init__(
        self, own: Iterable[Tensor], turned: Mapping[CodePlace, bool] | None = None
    ) -> None:
        super().__init__()
        numbered = ((tensor, i) for i, tensor in enumerate(own))
        self.own: IdentityMap[Tensor, int] = IdentityMap(numbered)
        self.turned = dict(turned or {})
        self.asked: dict[CodePlace, Asked] = {}
        self.trail: set[tuple[Any, Any]] = set()
        # tensor that depends on parameters -> the step that made it
        self._made: Any = WeakTensorKeyDictionary()
        # question in its normal form -> the answer that was given instead of the true one
        self._given: dict[tuple[str, float, float], bool] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
        if func == Tensor.shape.__get__ or name in ("size", "numel", "nelement"):
            return out if args[0] in self.own else self._known(out)
        if name not in _ATTRIBUTES and not has_trait(name, Trait.READS_KIND | Trait.READS_SIZES):
            # if it returns None, it writes into its first argument
            self.step(name, (args, kwargs), out if out is not None else args[:1])
        return out

    def step(self, what: str, given: Any, made: Any) -> None:
        """Record a step, if it is a call of a part or depends on parameters.

        Parameters
        ----------
        what:
            Name of the step.
        given:
            Its arguments.
        made:
            Its results.
        """
        tensors = tensors_of(given)
        own = tuple(self.own[tensor] for tensor in tensors if tensor in self.own)
        before = {self._made[tensor] for tensor in tensors if tensor in self._made}
        if before or own or what.startswith(PART):
            now = what, own, user_frames()
            self.trail |= {(step, now) for step in before or {None}}
            for leaf in leaves_of(made):
                if isinstance(leaf, Tensor):
                    self._made[leaf] = now

    def finish(self, out: Any) -> None:
        """Record the model's output as a last step."""
        self.step("output", out, ())

    def _known(self, sizes: Any) -> Any:
        """Return :class:`Size` numbers for plain ones."""
        if isinstance(sizes, tuple):
            return torch.Size(map(self._known, sizes))
        return Size(sizes, self)

    def answer(
        self, answer: bool, number: float, sign: str, other: float, frame: FrameType
    ) -> bool:
        """Record a question and return the answer to give.

        The same question gets the same answer wherever it is asked.

        Parameters
        ----------
        answer:
            The true answer.
        number, sign, other:
            The comparison: ``sign`` is the operator's name (``"lt"``).
        frame:
            The frame that asks.
        """
        if not self.is_active():
            return answer
        place = frame.f_code, frame.f_lasti
        asked = self.asked.setdefault(place, Asked(user_line()))
        asked.margins.add(number - other if math.isfinite(other) else 0)
        same, negated = _normal_form(sign, number, other)
        asked.empties &= same in (("lt", 0, number), ("lt", number, 1), ("eq", number, 0))
        if self.turned.get(place, answer) is not answer:
            self._given[same] = self.turned[place] is not negated
        answer = self._given[same] is not negated if same in self._given else answer
        asked.answers.add(answer)
        return answer

    def is_active(self) -> bool:
        """Tell whether this mode is on in the current thread."""
        return any(mode is self for mode in _get_current_function_mode_stack())

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Make ``len`` of a tensor return a :class:`Size` in this thread.

        The built-in ``len`` converts the result of ``__len__`` to a plain number, so it is
        replaced.
        """
        count, thread = builtins.len, threading.get_ident()

        def seen(value: Any, /) -> int:
            is_here = threading.get_ident() == thread
            known = isinstance(value, Tensor) and is_here and self.is_active()
            return Size(count(value), self) if known and value not in self.own else count(value)

        builtins.len = seen
        try:
            yield
        finally:
            builtins.len = count


_ATTRIBUTES = frozenset({"__get__", "__len__", "ndimension"})
"""Methods that only ask about tensors, beside operations with such a trait (``READS_KIND``)."""

_BRANCHES = frozenset({"COMPARE_OP", "CONTAINS_OP"})
"""Instructions whose comparisons are questions."""


def _normal_form(sign: str, number: float, other: float) -> tuple[tuple[str, float, float], bool]:
    """Return a comparison expressed by ``lt`` or ``eq``, and whether its answer is negated."""
    if sign in ("gt", "le"):
        sign, number, other = {"gt": "lt", "le": "ge"}[sign], other, number
    return ({"ge": "lt", "ne": "eq"}.get(sign, sign), number, other), sign in ("ge", "ne")


class _FromSizes:
    """Base class of numbers computed from sizes, which ask ``questions`` when Python branches.

    A comparison by C code (``min(n, 3)``, a key of a dict) is no question.
    """

    questions: Questions

    def __new__(cls, number: float, questions: Questions) -> Any:
        made = super().__new__(cls, number)  # type: ignore[call-arg]  # of int or of float
        made.questions = questions
        return made

    def __bool__(self) -> bool:
        number: Any = _plain_number(self)
        frame = sys._getframe(1)
        if is_library_file(frame.f_code.co_filename):
            return bool(number)
        return self.questions.answer(bool(number), number, "ne", 0, frame)

    def __deepcopy__(self, memo: Any) -> Any:
        return _plain_number(self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        number: Any = _plain_number(self)
        return type(number), (number,)


class Size(_FromSizes, int):
    """A size of a tensor, or an integer computed from sizes."""

    __hash__ = int.__hash__


class Fraction(_FromSizes, float):
    """A floating-point number computed from sizes."""

    __hash__ = float.__hash__


def _plain_number(leaf: Any) -> Any:
    """Return a plain number for one computed from sizes, and other values as they are."""
    return int(leaf) if type(leaf) is Size else float(leaf) if type(leaf) is Fraction else leaf


def plain_sizes(value: Any) -> Any:
    """Return a nested value with plain numbers in place of those computed from sizes."""
    return map_leaves(_plain_number, value)


def _known(number: Any, questions: Questions) -> Any:
    """Mark a number, or the numbers of a tuple, as computed from sizes."""
    if type(number) is tuple:
        return tuple(_known(each, questions) for each in number)
    if type(number) is int:
        return Size(number, questions)
    return Fraction(number, questions) if type(number) is float else number


def _number_operator(kind: Any, name: str) -> Callable[..., Any]:
    """Return an arithmetic method of ``kind`` whose result is marked as computed from sizes."""
    plain = getattr(kind, name)

    def method(self: Any, *others: Any) -> Any:
        number, given = _plain_number(self), [*map(_plain_number, others)]
        result = plain(number, *given)
        if result is NotImplemented and any(isinstance(other, float) for other in given):
            result = getattr(float(number), name)(*given)
        return _known(result, self.questions)

    return method


def _comparison(kind: Any, sign: str) -> Callable[..., Any]:
    """Return a comparison method of ``kind`` that asks a question."""
    name = f"__{sign}__"
    plain = getattr(kind, name)

    def method(self: Any, other: Any) -> Any:
        number, given = _plain_number(self), _plain_number(other)
        answer, frame = plain(number, given), sys._getframe(1)
        if answer is NotImplemented and isinstance(given, float):
            answer = getattr(float(number), name)(given)
        if answer is NotImplemented or is_library_file(frame.f_code.co_filename):
            return answer
        if dis.opname[frame.f_code.co_code[frame.f_lasti]] not in _BRANCHES:
            return answer
        return self.questions.answer(answer, number, sign, given, frame)

    return method


def _operators(kind: type) -> list[str]:
    """Return the names of the methods behind the arithmetic operators of a kind of number.

    They are the operators with a reflected form, in both forms, and the unary ones.
    """
    names = dir(kind)
    both = [name for name in names if name.startswith("__r") and f"__{name[3:]}" in names]
    return [*both, *(f"__{name[3:]}" for name in both), "__neg__", "__abs__", "__pos__"]


for _kind, _plain_kind in ((Size, int), (Fraction, float)):
    for _name in _operators(_plain_kind):
        setattr(_kind, _name, _number_operator(_plain_kind, _name))
    for _name in ("__floor__", "__ceil__", "__trunc__", "__round__"):
        setattr(_kind, _name, _number_operator(_plain_kind, _name))
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _comparison(_plain_kind, _name))
