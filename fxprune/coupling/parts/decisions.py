"""The ways that a model's Python code can take for other values of its inputs.

A *question* is a condition on values of tensors (``if mask.all()``). If the answer is another one,
the model may call its parts in another order, which ties other channels. So the model runs again
for each question, with the opposite answer.

Python code may also take numbers out of tensors (lengths, counts, ids). What it does with them is
unknown, unless it has no branch that could depend on them. If it has one, no channel between parts
is removed.
"""

from __future__ import annotations

import dis
import functools
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.common.contents import tensors_of
from fxprune.coupling.parts.calls import in_one_thread
from fxprune.inputs import Call, copied_to
from fxprune.ops import Trait, has_trait
from fxprune.trace import following, user_line
from fxprune.trace.aliasing import UndoWrites
from fxprune.trace.user_code import is_library_file

__all__ = [
    "WHOLE",
    "Answers",
    "Decisions",
    "Ways",
    "followed",
    "inside_a_part",
    "is_raised",
    "ways_of",
]

Answers = tuple[bool, ...]
"""Answers to the first questions of a run, in order."""

WHOLE = frozenset({"__array__", "__dlpack__", "numpy", "tolist"})
"""Functions that give Python all values of a tensor."""

_NUMBER_METHODS = frozenset({"__int__", "__float__", "__complex__", "__index__"})
_READ = WHOLE | _NUMBER_METHODS | {"__bool__", "__contains__"}
"""Functions that give Python values of a tensor.

For other values, Python may then do something else. Operations with ``Trait.READS_VALUES`` do the
same.
"""

_MOST_WAYS = 16  # upper limit on the number of ways that are followed
# How often one question counts as new: the second pass of a loop shows what ties channels from one
# pass to the next, and the third one is like all later ones.
_TURNS = 3


class Decisions(TorchFunctionMode):
    """A mode that records which values Python reads while a model runs, and answers questions.

    It counts only values that depend on weights, inputs or random numbers.

    Parameters
    ----------
    weights:
        Tensors of the model. Only floating-point and complex ones are followed.
    inputs:
        Tensors of the caller.
    answers:
        Answers to the first questions, in order. Later questions get the true answer.

    Attributes
    ----------
    asked:
        The line of each question and its answer.
    between:
        The same for questions that are not asked inside a part.
    inside:
        Whether a part is running.
    taken_out:
        The first line that takes numbers out of tensors; empty if there is none.
    """

    def __init__(
        self, weights: Iterable[Tensor], inputs: Iterable[Tensor], answers: Answers = ()
    ) -> None:
        super().__init__()
        self._of_inputs: Any = WeakTensorKeyDictionary((tensor, None) for tensor in inputs)
        followed_weights = [t for t in weights if t.is_floating_point() or t.is_complex()]
        self._of_weights: Any = WeakTensorKeyDictionary((t, None) for t in followed_weights)
        self.answers = answers
        self.asked: list[tuple[str, bool]] = []
        self.between: list[tuple[str, bool]] = []
        self.inside = False
        self.taken_out = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        out = func(*args, **kwargs)
        if name in _READ or has_trait(name, Trait.READS_VALUES):
            return self._read(name, tensors_of((args, kwargs)), out)
        if type(out) is torch.Size or not isinstance(out, (Tensor, tuple, list, type(None))):
            return out  # a fact about a tensor, no new tensor
        given = tensors_of((args, kwargs))
        for known in (self._of_weights, self._of_inputs):
            if any(tensor in known for tensor in given) or (
                known is self._of_weights and _draws_numbers(name)
            ):
                # If it returns None, it writes into its first tensor.
                for leaf in tree_leaves(out) if out is not None else given[:1]:
                    if isinstance(leaf, Tensor):
                        known[leaf] = None
        return out

    def _read(self, name: str, given: list[Tensor], value: Any) -> Any:
        """Record that Python reads a value of the given tensors; return the value it gets."""
        of_weights = any(tensor in self._of_weights for tensor in given)
        if not of_weights and not any(tensor in self._of_inputs for tensor in given):
            return value
        if isinstance(value, bool):
            index = len(self.asked)
            value = self.answers[index] if index < len(self.answers) else bool(value)
            self.asked.append((user_line(), value))
            if not self.inside:
                self.between.append(self.asked[-1])
        else:
            self.taken_out = self.taken_out or user_line()
        return value


@contextmanager
def inside_a_part() -> Iterator[None]:
    """Mark the questions asked inside this context as questions of a part."""
    asked = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, Decisions)]
    for mode in asked:
        mode.inside = True
    try:
        yield
    finally:
        for mode in asked:
            mode.inside = False


@functools.cache
def _draws_numbers(name: str) -> bool:
    """Tell whether the ATen operation of this name draws random numbers."""
    if not name.isidentifier() or name.startswith("__"):
        return False
    operation = getattr(torch.ops.aten, name, None)
    if operation is None:
        return False
    overloads = [getattr(operation, each) for each in operation.overloads()]
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def followed(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    answers: Answers,
    *inside: AbstractContextManager[Any],
) -> tuple[Any, Decisions]:
    """Run a model on a copy of a call, with given answers to its first questions.

    Its parameters are the user's, so whatever the model writes into them is undone.

    Parameters
    ----------
    model:
        The model.
    args, kwargs:
        The arguments of the call.
    answers:
        Answers to the first questions of the run.
    inside:
        Contexts in which the model runs.

    Returns
    -------
    tuple
        What the model returns, and the questions that it asked.
    """
    given = tensors_of((args, kwargs))
    args, kwargs = copied_to(Call(args, kwargs), given[0].device if given else torch.device("cpu"))
    weights = [*model.parameters(), *model.buffers()]
    inputs = tensors_of((args, kwargs))
    decisions = Decisions(weights, inputs, answers)
    undone = UndoWrites(dict(model.named_parameters()))
    with (
        undone.undoing(),
        in_one_thread(),
        torch.inference_mode(),
        following(),
        decisions,
        ExitStack() as stack,
    ):
        for context in inside:
            stack.enter_context(context)
        return model(*args, **kwargs), decisions


class Ways:
    """The ways that a model can take.

    Attributes
    ----------
    answers:
        For each way, the answers to all its questions. They repeat the way even if it was decided
        by random numbers. The first way is the example's.
    decided:
        The line that makes it impossible to know where Python code goes; empty if all ways are
        known.
    taken_out:
        The line that takes numbers out of tensors, if the model asks no question. All ways are
        then known only if the code has no branch that depends on such numbers.
    """

    def __init__(self, answers: list[Answers], decided: str = "", taken_out: str = "") -> None:
        self.answers, self.decided, self.taken_out = answers, decided, taken_out


def ways_of(run: Callable[[Answers], Decisions]) -> Ways:
    """Find the ways that a model can take, by answering each question both ways.

    A way on which the model itself raises an exception, because it refuses such inputs, is
    dropped.

    Parameters
    ----------
    run:
        Runs the model with given answers to its first questions.
    """
    first = run(())
    if first.taken_out and first.asked:
        return Ways([()], first.taken_out)
    if first.taken_out:
        return Ways([()], taken_out=first.taken_out)
    found = [_answers_given(first)]
    seen, waiting = set(_steps(first)), _opposite_answers(first)
    while waiting:
        answers, step = waiting.pop(0)
        if step in seen:
            continue
        seen.add(step)
        try:
            way = run(answers)
        except Exception as error:
            if is_raised(error.__traceback__, step[0]):
                continue
            return Ways([()], step[0])
        if way.taken_out or len(found) == _MOST_WAYS:
            return Ways([()], way.taken_out or step[0])
        found.append(_answers_given(way))
        seen.update(_steps(way))
        waiting += _opposite_answers(way)
    return Ways(found)


Step = tuple[str, int, bool]
"""A question's line, how often it was asked before on the same way, and the answer."""


def _steps(way: Decisions) -> list[Step]:
    """Return the questions of a way; counts of earlier ones stop at ``_TURNS - 1``."""
    before: dict[str, int] = {}
    steps = []
    for line, answer in way.asked:
        steps.append((line, min(before.get(line, 0), _TURNS - 1), answer))
        before[line] = before.get(line, 0) + 1
    return steps


def _answers_given(way: Decisions) -> Answers:
    """Return the answers to all questions of a way."""
    return tuple(answer for _, answer in way.asked)


def _opposite_answers(way: Decisions) -> list[tuple[Answers, Step]]:
    """Return, for each question of a way, answers with the opposite one, and the new step."""
    given = _answers_given(way)
    others = []
    for i, (line, turn, answer) in enumerate(_steps(way)):
        others.append(((*given[:i], not answer), (line, turn, not answer)))
    return others


def is_raised(trace: TracebackType | None, line: str) -> bool:
    """Tell whether the model itself raised an exception, because it refuses such inputs.

    That is so if a ``raise`` or an ``assert`` raised it: one of the model's code, or one of torch
    at the line that asked the question. Code that failed in another way may work on other inputs.

    Parameters
    ----------
    trace:
        The exception's traceback.
    line:
        The line of the question.
    """
    frames = traceback.extract_tb(trace)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code = trace.tb_frame.f_code
    failed = [each for each in dis.get_instructions(code) if each.offset == trace.tb_lasti]
    is_raise = any(each.opname == "RAISE_VARARGS" for each in failed)
    return is_raise and (not is_library_file(code.co_filename) or user_line(frames) == line)
