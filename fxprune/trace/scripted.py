"""Scripted functions and classes of functions while a model is traced."""

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

__all__ = ["applications_followed", "scripts_followed"]


@contextmanager
def applications_followed(tracer: Tracer) -> Iterator[None]:
    """A function with gradients of its own is called by a node, whoever calls ``apply``: C++ asks
    the class for ``forward``.
    """
    given: list[tuple[type, Any]] = []  # what is put back
    maker: Any = torch.autograd.function.FunctionMeta
    make = maker.__init__

    def made(kind: Any, *args: Any) -> None:
        make(kind, *args)
        if "forward" in kind.__dict__ and tracer.is_mine():
            given.append((kind, kind.__dict__["forward"]))
            kind.forward = staticmethod(_refusing(kind, kind.forward, tracer))

    _tracing.append(tracer)
    try:
        for kind in _function_classes():
            forward = kind.__dict__.get("forward")
            # it is one already inside of another trace
            if forward is not None and not isinstance(forward, _ThroughGraph):
                given.append((kind, forward))
                _originals[kind] = kind.forward
                kind.forward = _in_place_of.get(kind) or _in_place_of.setdefault(
                    kind, _ThroughGraph(_recording(kind))
                )
        maker.__init__ = made
        yield
    finally:
        maker.__init__ = make
        for kind, forward in given:
            kind.forward = forward  # type: ignore[attr-defined]
            _originals.pop(kind, None)
        _tracing.pop()


def _refusing(kind: type, forward: Callable[..., Any], tracer: Tracer) -> Callable[..., Any]:
    """The forward of a class that is another one at each call: a graph cannot call it, and what it
    does has other gradients.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_mine() and find_traced((args, kwargs)) is not None:
            raise TraceError(
                f"forward applies {kind.__name__} (at {user_line()}), a function with gradients "
                "of its own that is made while forward runs, as torch.vmap makes them: a graph "
                "would lose its gradients. Make it before, or keep that line inside a module of "
                "its own."
            )
        return forward(*args, **kwargs)

    return call


def _function_classes() -> Iterable[Any]:
    found: dict[Any, None] = {}  # in order
    waiting = list(torch.autograd.Function.__subclasses__())
    while waiting:
        kind = waiting.pop()
        if kind not in found and not kind.__module__.startswith(
            ("torch._dynamo", "torch._functorch")
        ):
            found[kind] = None
            waiting += kind.__subclasses__()
    return found


_tracing: list[Tracer] = []
"""The traces under way, the innermost last."""


class _ThroughGraph(staticmethod):
    """What stands for a class's ``forward`` while a model is traced."""


_in_place_of: weakref.WeakKeyDictionary[type, _ThroughGraph] = weakref.WeakKeyDictionary()
"""Made once for every class: a process knows hundreds of them, and traces often."""


_originals: dict[type, Callable[..., Any]] = {}
"""What the classes have for their ``forward``, while something else stands for it."""


def _recording(kind: type) -> Callable[..., Any]:
    refer = weakref.ref(kind)  # a class must not live for being known here

    def call(*args: Any, **kwargs: Any) -> Any:
        kind: Any = refer()
        # another thread may call when the trace has just ended
        forward = _originals.get(kind) or kind.forward
        innermost = _tracing[-1:]
        if not innermost or not innermost[0].is_mine() or find_traced((args, kwargs)) is None:
            return forward(*args, **kwargs)
        # what is kept for the backward pass is not a graph's business
        if kind.__module__ == checkpoint.__name__:
            if kind is not checkpoint.CheckpointFunction:
                return forward(*args, **kwargs)
            _, function, _, *inputs = args
            return function(*inputs)
        with_context = kind.setup_context is torch.autograd.Function.setup_context
        return innermost[0].record(
            "call_function", _application(kind), args[1:] if with_context else args, kwargs
        )

    return call


@functools.cache
def _application(kind: Any) -> Callable[..., Any]:
    """What a node calls to apply a function with gradients of its own; a bound method has no name
    that code could say.
    """

    def apply(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = f"{kind.__name__}_apply"
    apply.__module__ = kind.__module__
    vars(apply)["made_by"] = _application, (kind,)  # for what keeps graphs in files
    return apply


@contextmanager
def scripts_followed(tracer: Tracer) -> Iterator[None]:
    """Calls of scripted functions and of methods of scripted modules go through the tracer, which
    reads their code.
    """
    found = [(kind, kind.__call__) for kind in (torch.jit.ScriptFunction, torch._C.ScriptMethod)]
    try:
        for kind, call in found:
            kind.__call__ = _scripted(call, tracer)
        yield
    finally:
        for kind, call in found:
            kind.__call__ = call


def _scripted(original: Callable[..., Any], tracer: Tracer) -> Callable[..., Any]:
    def call(script: Any, *args: Any, **kwargs: Any) -> Any:
        run = functools.partial(original, script, *args, **kwargs)
        if not tracer.is_mine() or tracer.executing:
            return run()
        return tracer.call_script(run, script.inlined_graph, (args, kwargs))

    return call
