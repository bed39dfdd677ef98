"""Record calls of scripted functions and of custom autograd functions while a model is traced."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import checkpoint

from fxprune.errors import TraceError
from fxprune.trace.tensors import find_traced
from fxprune.trace.tracer import Tracer
from fxprune.trace.user_code import user_line

__all__ = ["record_autograd_functions", "record_scripts"]


@contextmanager
def record_autograd_functions(tracer: Tracer) -> Iterator[None]:
    """Record applications of ``torch.autograd.Function`` classes as nodes, inside this context.

    The classes' ``forward`` is replaced, because every ``apply`` reads it, also from C++.
    """
    replaced: list[tuple[type, Any]] = []  # the classes and their own forward, to be restored
    metaclass: Any = torch.autograd.function.FunctionMeta
    original_init = metaclass.__init__

    def init(kind: Any, *args: Any) -> None:
        original_init(kind, *args)
        if "forward" in kind.__dict__ and tracer.is_tracing_thread():
            replaced.append((kind, kind.__dict__["forward"]))
            kind.forward = staticmethod(_refusing_forward(kind, kind.forward, tracer))

    _tracing.append(tracer)
    try:
        _replace_forwards(replaced)
        metaclass.__init__ = init
        yield
    finally:
        metaclass.__init__ = original_init
        for kind, forward in replaced:
            kind.forward = forward  # type: ignore[attr-defined]
            _originals.pop(kind, None)
        _tracing.pop()


def _replace_forwards(replaced: list[tuple[type, Any]]) -> None:
    """Replace the ``forward`` of all classes, and add each class and its own one to a list."""
    for kind in _function_classes():
        forward = kind.__dict__.get("forward")
        # inside another trace it is replaced already
        if forward is None or isinstance(forward, _RecordingForward):
            continue
        replaced.append((kind, forward))
        _originals[kind] = kind.forward
        if kind not in _replacements:
            _replacements[kind] = _RecordingForward(_recording_forward(kind))
        kind.forward = _replacements[kind]


def _refusing_forward(
    kind: type, forward: Callable[..., Any], tracer: Tracer
) -> Callable[..., Any]:
    """Return a ``forward`` that refuses calls, for a class that is created while a model runs.

    Such a class is another one at each call, so a graph cannot call it, and recording what it does
    would lose its gradients.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_tracing_thread() and find_traced((args, kwargs)) is not None:
            raise TraceError(
                f"forward applies {kind.__name__} (at {user_line()}), a function with gradients "
                "of its own that is made while forward runs, as torch.vmap makes them: a graph "
                "would lose its gradients. Make it before, or keep that line inside a module of "
                "its own."
            )
        return forward(*args, **kwargs)

    return call


def _function_classes() -> Iterable[Any]:
    """Return the subclasses of ``torch.autograd.Function``, without torch's internal ones."""
    found: dict[Any, None] = {}  # in order
    waiting = list(torch.autograd.Function.__subclasses__())
    while waiting:
        kind = waiting.pop()
        is_internal = kind.__module__.startswith(("torch._dynamo", "torch._functorch"))
        if kind not in found and not is_internal:
            found[kind] = None
            waiting += kind.__subclasses__()
    return found


_tracing: list[Tracer] = []
"""The running traces, the innermost last."""


class _RecordingForward(staticmethod):
    """The replacement of a class's ``forward`` while a model is traced."""


_replacements: weakref.WeakKeyDictionary[type, _RecordingForward] = weakref.WeakKeyDictionary()
"""The replacements by class, made once: a process has hundreds of classes and traces often."""


_originals: dict[type, Callable[..., Any]] = {}
"""The classes' own ``forward``, while it is replaced."""


def _recording_forward(kind: type) -> Callable[..., Any]:
    """Return a ``forward`` that records the application of a class as a node."""
    refer = weakref.ref(kind)  # the replacement must not keep the class alive

    def call(*args: Any, **kwargs: Any) -> Any:
        kind: Any = refer()
        # another thread may call just after the trace has ended
        forward = _originals.get(kind) or kind.forward
        innermost = _tracing[-1:]
        if (
            not innermost
            or not innermost[0].is_tracing_thread()
            or find_traced((args, kwargs)) is None
        ):
            return forward(*args, **kwargs)
        # a checkpoint only changes what is kept for the backward pass
        if kind.__module__ == checkpoint.__name__:
            if kind is not checkpoint.CheckpointFunction:
                return forward(*args, **kwargs)
            _, function, _, *inputs = args
            return function(*inputs)
        # without a setup_context of its own, forward gets ctx as its first argument
        if kind.setup_context is torch.autograd.Function.setup_context:
            args = args[1:]
        return innermost[0].record("call_function", _application(kind), args, kwargs)

    return call


@functools.cache
def _application(kind: Any) -> Callable[..., Any]:
    """Return a function that applies an autograd function, to be called by a node.

    ``kind.apply`` itself will not do: it is a bound method, without a name that code can refer to.
    """

    def apply(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = f"{kind.__name__}_apply"
    apply.__module__ = kind.__module__
    vars(apply)["made_by"] = _application, (kind,)  # read when a graph is saved to a file
    return apply


@contextmanager
def record_scripts(tracer: Tracer) -> Iterator[None]:
    """Send calls of scripted functions and methods to the tracer, inside this context.

    The tracer reads their code.
    """
    kinds = (torch.jit.ScriptFunction, torch._C.ScriptMethod)
    originals = [(kind, kind.__call__) for kind in kinds]
    try:
        for kind, call in originals:
            kind.__call__ = _scripted_call(call, tracer)
        yield
    finally:
        for kind, call in originals:
            kind.__call__ = call


def _scripted_call(original: Callable[..., Any], tracer: Tracer) -> Callable[..., Any]:
    """Return a ``__call__`` of scripted functions that asks the tracer to run them."""

    def call(script: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(original, script, *args, **kwargs)
        if not tracer.is_tracing_thread() or tracer.executing:
            return run()
        return tracer.call_script(run, script.inlined_graph, (args, kwargs))

    return call
