"""Which ways a model's Python can go for other values.

Where a question about values (``if mask.all()``) is answered otherwise, the parts may be called in
another order, and channels are tied there as well. So each question is put once more, answered the
other way, and what the model does then is followed, too.

What Python does with numbers that it takes out of tensors (lengths, counts, ids) cannot be known,
unless its code has no branch that could go by them: where it has one, nothing is removed between
parts.
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
from fxprune.inputs import Call, placed
from fxprune.ops import Trait, has
from fxprune.trace import following, user_line
from fxprune.trace.aliasing import Undone
from fxprune.trace.user_code import is_ours

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

WHOLE = frozenset({"__array__", "__dlpack__", "numpy", "tolist"})
"""What hands all values of a tensor to Python."""

_NUMBER_METHODS = frozenset({"__int__", "__float__", "__complex__", "__index__"})
_READ = WHOLE | _NUMBER_METHODS | {"__bool__", "__contains__"}
"""What hands any of them to Python, which may then do something else for other values, beside
operations that do.
"""

_MOST_WAYS = 16  # ways that are followed
# of a loop: what ties channels from one turn to the next is seen in the second, and the third is
# as all later ones
_TURNS = 3


class Decisions(TorchFunctionMode):
    """Sees which values Python reads while a model runs, and answers its questions about them as
    it is told.

    Parameters
    ----------
    weights, inputs:
        Tensors of the model, and of its caller; what is computed of either is known as such.
    answers:
        To the first questions, in order; later ones get the true answer.

    Attributes
    ----------
    asked:
        The line of each question about values that depend on weights, inputs or chance, and its
        answer.
    between:
        Those of them that are not asked inside a part.
    taken_out:
        The first line that takes numbers out which depend on weights, inputs or chance; empty if
        there is none.
    """

    def __init__(
        self, weights: Iterable[Tensor], inputs: Iterable[Tensor], answers: Answers = ()
    ) -> None:
        super().__init__()
        self._of_inputs: Any = WeakTensorKeyDictionary((tensor, None) for tensor in inputs)
        self._of_weights: Any = WeakTensorKeyDictionary(
            (t, None) for t in weights if t.is_floating_point() or t.is_complex()
        )
        self.answers = answers
        self.asked: list[tuple[str, bool]] = []
        self.between: list[tuple[str, bool]] = []
        self.inside = False  # a part
        self.taken_out = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        out = func(*args, **kwargs)
        if name in _READ or has(name, Trait.READS_VALUES):
            return self._read(name, tensors_of((args, kwargs)), out)
        if type(out) is torch.Size or not isinstance(out, (Tensor, tuple, list, type(None))):
            return out  # it says something of a tensor, and makes none
        given = tensors_of((args, kwargs))
        for known in (self._of_weights, self._of_inputs):
            if any(tensor in known for tensor in given) or (
                known is self._of_weights and _draws_numbers(name)
            ):
                # None: what is written into
                for leaf in tree_leaves(out) if out is not None else given[:1]:
                    if isinstance(leaf, Tensor):
                        known[leaf] = None
        return out

    def _read(self, name: str, given: list[Tensor], value: Any) -> Any:
        of_weights = any(tensor in self._of_weights for tensor in given)
        if not of_weights and not any(tensor in self._of_inputs for tensor in given):
            return value
        if isinstance(value, bool):
            place = len(self.asked)
            value = self.answers[place] if place < len(self.answers) else bool(value)
            self.asked.append((user_line(), value))
            if not self.inside:
                self.between.append(self.asked[-1])
        else:
            self.taken_out = self.taken_out or user_line()
        return value


@contextmanager
def inside_a_part() -> Iterator[None]:
    """What is asked inside is asked by a part."""
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
    """Whether torch's operation of this name draws random numbers."""
    operation = (
        getattr(torch.ops.aten, name, None)
        if name.isidentifier() and not name.startswith("__")
        else None
    )
    overloads = (
        [getattr(operation, each) for each in operation.overloads()]
        if operation is not None
        else []
    )
    return any(torch.Tag.nondeterministic_seeded in overload.tags for overload in overloads)


def followed(
    model: nn.Module,
    args: Any,
    kwargs: Any,
    answers: Answers,
    *inside: AbstractContextManager[Any],
) -> tuple[Any, Decisions]:
    """What a model returns for a copy of a call, with these answers to its first questions; run
    under these contexts.

    What it writes into its parameters, which are the user's, is undone.
    """
    given = tensors_of((args, kwargs))
    args, kwargs = placed(Call(args, kwargs), given[0].device if given else torch.device("cpu"))
    weights = [*model.parameters(), *model.buffers()]
    inputs = tensors_of((args, kwargs))
    decisions = Decisions(weights, inputs, answers)
    undone = Undone(dict(model.named_parameters()))
    with (
        undone.afterwards(),
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
    """The ways that a model can go.

    Attributes
    ----------
    answers:
        For each way all the answers that it gives, so that one decided by chance can be gone
        again; the first is the example's.
    decided:
        The line by which it cannot be known where Python goes; empty if it can.
    taken_out:
        The line that takes out numbers, where no question is put: unless there is a way to turn by
        them, it is known where Python goes.
    """

    def __init__(self, answers: list[Answers], decided: str = "", taken_out: str = "") -> None:
        self.answers, self.decided, self.taken_out = answers, decided, taken_out


def ways_of(run: Callable[[Answers], Decisions]) -> Ways:
    """Follow the model for the example, and then each question of it answered the other way.

    A way that ends in an exception which the model raises itself (an example that it would refuse)
    leads nowhere.

    Parameters
    ----------
    run:
        Runs the model with these answers to its first questions.
    """
    first = run(())
    if first.taken_out:
        return (
            Ways([()], first.taken_out) if first.asked else Ways([()], taken_out=first.taken_out)
        )
    found = [_answers_given(first)]
    seen, waiting = set(_steps(first)), _others(first)
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
        waiting += _others(way)
    return Ways(found)


Step = tuple[str, int, bool]
"""A question's line, how often it was put before, and the answer."""


def _steps(way: Decisions) -> list[Step]:
    before: dict[str, int] = {}
    out = []
    for line, answer in way.asked:
        out.append((line, min(before.get(line, 0), _TURNS - 1), answer))
        before[line] = before.get(line, 0) + 1
    return out


def _answers_given(way: Decisions) -> Answers:
    return tuple(answer for _, answer in way.asked)


def _others(way: Decisions) -> list[tuple[Answers, Step]]:
    """For each question of a way the answers that lead to the other one."""
    given = _answers_given(way)
    steps = enumerate(_steps(way))
    return [
        ((*given[:i], not answer), (line, turn, not answer)) for i, (line, turn, answer) in steps
    ]


def is_raised(trace: TracebackType | None, line: str) -> bool:
    """Whether an exception comes from a ``raise`` or an ``assert`` of the model, or of torch where
    the question itself was put.

    What failed otherwise may well be done for other inputs.
    """
    frames = traceback.extract_tb(trace)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, place = trace.tb_frame.f_code, trace.tb_lasti
    raised = any(
        at.offset == place and at.opname == "RAISE_VARARGS" for at in dis.get_instructions(code)
    )
    return raised and (not is_ours(code.co_filename) or user_line(frames) == line)
