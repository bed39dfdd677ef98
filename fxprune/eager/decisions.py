"""Which ways a model's Python can go for other inputs, and whether it goes by what the weights give.

Python reads masks, lengths and flags of its caller freely: that is no reason to prune less. But where a question about inputs
(``if mask.all()``) is answered otherwise, the parts may be called in another order, and channels are tied there as well. So each
such question is put once more, answered the other way, and what the model does then is followed, too. Where Python decides by
values that depend on weights the answers cannot be known: nothing is removed between parts.
"""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from fxprune.trace import following, user_line
from fxprune.trace.lines import is_ours

__all__ = ["READ", "Answers", "Decisions", "Ways", "followed", "ways_of"]

Answers = tuple[bool, ...]

_ASKS = frozenset({"__bool__", "__contains__", "allclose", "equal", "is_nonzero"})
READ = _ASKS | {"__int__", "__float__", "__complex__", "__index__", "__array__", "item", "tolist", "numpy"}
"""What gives the values of a tensor to Python, which may then do something else for other values."""

_MOST = 8  # ways that are followed


class Decisions(TorchFunctionMode):
    """Sees which values Python reads while a model runs, and answers its questions about inputs as it is told.

    Parameters
    ----------
    weights, inputs:
        Tensors of the model, and of its caller; what is computed of either is known as such.
    answers:
        To the first questions about inputs, in order; later ones get the true answer.

    Attributes
    ----------
    asked:
        The line of each question about inputs, and its answer.
    decided:
        The first line that reads what depends on weights; empty if there is none.
    """

    def __init__(self, weights: Iterable[Tensor], inputs: Iterable[Tensor], answers: Answers = ()) -> None:
        super().__init__()
        self._of_inputs: Any = WeakTensorKeyDictionary((tensor, None) for tensor in inputs)
        self._of_weights: Any = WeakTensorKeyDictionary((t, None) for t in weights if t.is_floating_point() or t.is_complex())
        self.answers = answers
        self.asked: list[tuple[str, bool]] = []
        self.decided = ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        out = func(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in READ:
            return self._read(name, given, out)
        for known in (self._of_weights, self._of_inputs):
            if any(tensor in known for tensor in given):
                for leaf in tree_leaves(out) if out is not None else given[:1]:  # None: what is written into
                    if isinstance(leaf, Tensor):
                        known[leaf] = None
        return out

    def _read(self, name: str, given: list[Tensor], value: Any) -> Any:
        if any(tensor in self._of_weights for tensor in given):
            self.decided = self.decided or user_line()
        elif name in _ASKS and any(tensor in self._of_inputs for tensor in given):
            place = len(self.asked)
            value = self.answers[place] if place < len(self.answers) else bool(value)
            self.asked.append((user_line(), value))
        return value


def followed(
    model: nn.Module, args: Any, kwargs: Any, answers: Answers, *inside: AbstractContextManager[Any]
) -> tuple[Any, Decisions]:
    """What a model returns for a copy of a call, with these answers to its first questions; run under these contexts."""
    args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
    weights = [*model.parameters(), *model.buffers()]
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    decisions = Decisions(weights, inputs, answers)
    with torch.inference_mode(), following(), decisions, ExitStack() as stack:
        for context in inside:
            stack.enter_context(context)
        return model(*args, **kwargs), decisions


class Ways:
    """The ways that a model can go.

    Attributes
    ----------
    answers:
        For each way the answers that lead to it; the first are those of the example, none.
    decided:
        The line by which it cannot be known where Python goes; empty if it can.
    """

    def __init__(self, answers: list[Answers], decided: str = "") -> None:
        self.answers, self.decided = answers, decided


def ways_of(run: Callable[[Answers], Decisions]) -> Ways:
    """Follow the model for the example, and then each question of it answered the other way.

    A way that ends in an exception which the model raises itself (an example that it would refuse) leads nowhere.

    Parameters
    ----------
    run:
        Runs the model with these answers to its first questions.
    """
    first = run(())
    if first.decided:
        return Ways([()], first.decided)
    found: list[Answers] = [()]
    seen = set(first.asked)
    waiting = _others(first)
    while waiting:
        answers, line = waiting.pop(0)
        if (line, answers[-1]) in seen:
            continue
        seen.add((line, answers[-1]))
        try:
            way = run(answers)
        except Exception as error:
            if _is_raised(error.__traceback__):
                continue
            return Ways([()], line)
        if way.decided or len(found) == _MOST:
            return Ways([()], way.decided or line)
        found.append(answers)
        seen.update(way.asked)
        waiting += _others(way)
    return Ways(found)


def _others(way: Decisions) -> list[tuple[Answers, str]]:
    given = [answer for _, answer in way.asked]
    return [((*given[:i], not answer), line) for i, (line, answer) in enumerate(way.asked)]


def _is_raised(trace: TracebackType | None) -> bool:
    """Whether an exception comes from a ``raise`` or an ``assert`` of the model, and not from something that failed."""
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    code, place = trace.tb_frame.f_code, trace.tb_lasti
    return not is_ours(code.co_filename) and any(
        at.offset == place and at.opname == "RAISE_VARARGS" for at in dis.get_instructions(code)
    )
