"""While a model is traced, what torch would do without a word to the tracer goes through it.

Modules of the meta copy answer through the tracer: they belong to nobody else. What belongs to
torch (functions that libraries registered as leaves, functions with gradients of their own,
regions without gradients) is exchanged for the time of the trace, answers the thread that traces
alone, and is put back in every case.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import checkpoint

from fxprune.common.process_lock import TURN
from fxprune.errors import TraceError
from fxprune.trace.context_managers import recorded
from fxprune.trace.scripted import applications_followed, scripts_followed
from fxprune.trace.tensors import find_traced
from fxprune.trace.tracer import Tracer, is_leaf
from fxprune.trace.user_code import user_line

__all__ = ["plain_attention", "slow_path", "taken_over"]


@contextmanager
def taken_over(tracer: Tracer, root: nn.Module) -> Iterator[None]:
    """Everything of this file, for one trace of a module."""
    with TURN, ExitStack() as stack:
        stack.enter_context(plain_attention())
        stack.enter_context(slow_path())
        stack.enter_context(_leaf_functions(tracer))
        stack.enter_context(applications_followed(tracer))
        stack.enter_context(scripts_followed(tracer))
        stack.enter_context(_modules(root, tracer))
        stack.enter_context(recorded(tracer.begin_region, tracer.end_region, tracer.is_users))
        stack.enter_context(_states_refused(tracer))
        stack.enter_context(_gradients_refused(tracer))
        stack.enter_context(_broadcast_shapes(tracer))
        stack.enter_context(_checkpoints(tracer))
        yield


@contextmanager
def slow_path() -> Iterator[None]:
    """Keep torch.nn's fused inference paths out of the graph: they exist for one mode only and
    hide the widths.
    """
    # the setting is the process's: two threads that exchange it would leave the wrong one
    with TURN:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let attention arrive as the products that it consists of."""
    with TURN, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@contextmanager
def _put(places: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Something else under these names, and under no other: whatever is set beside them meanwhile
    stays.
    """
    before = [(space, name, space[name]) for space, name, _ in places]
    for space, name, value in places:
        space[name] = value
    try:
        yield
    finally:
        for space, name, value in before:
            space[name] = value


def _if_traced(
    original: Callable[..., Any], tracer: Tracer, instead: Callable[..., Any]
) -> Callable[..., Any]:
    """The function, but for calls with a stand-in among their arguments, in the thread that
    traces.
    """

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_mine() and find_traced((args, kwargs)) is not None:
            return instead(original, args, kwargs)
        return original(*args, **kwargs)

    return call


@contextmanager
def _leaf_functions(tracer: Tracer) -> Iterator[None]:
    """Follow the functions that were registered with ``torch.fx.wrap``."""
    registered = fx._symbolic_trace._wrapped_fns_to_patch
    named = [(space, name) for (_, name), space in registered.items() if callable(space.get(name))]
    with _put(
        [
            (space, name, _if_traced(space[name], tracer, tracer.call_leaf_function))
            for space, name in named
        ]
    ):
        yield


@contextmanager
def _broadcast_shapes(tracer: Tracer) -> Iterator[None]:
    """``torch.broadcast_shapes`` is Python on numbers, which asks whether a size is 1: as a node
    it leaves that open.
    """

    def record(function: Any, args: Any, kwargs: Any) -> Any:
        return tracer.record("call_function", function, args, kwargs)

    places = [(space, "broadcast_shapes") for space in (vars(torch), vars(torch.functional))]
    with _put([(space, name, _if_traced(space[name], tracer, record)) for space, name in places]):
        yield


@contextmanager
def _checkpoints(tracer: Tracer) -> Iterator[None]:
    """``checkpoint`` asks on which device tensors lie, to keep the state of its generator: a graph
    computes once and needs none.
    """

    def begin(*_: Any) -> str:
        tracer.checkpoints.append(user_line())
        return "cpu"

    names = [name for name in ("_infer_device_type",) if name in vars(checkpoint)]
    with _put(
        [
            (vars(checkpoint), name, _if_traced(vars(checkpoint)[name], tracer, begin))
            for name in names
        ]
    ):
        yield


@contextmanager
def _states_refused(tracer: Tracer) -> Iterator[None]:
    """What a caller of the model decides (whether gradients are wanted, in which precision) is not
    known to a graph.
    """
    names = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")
    why = (
        "it has one path for all answers. Do the same for all, or keep that line inside a module "
        "of its own."
    )
    asks = {
        name: f"forward asks torch.{name}() (at {{}}), which a graph cannot: {why}"
        for name in names
    }
    with _put(
        [
            (vars(torch), name, _unless_users(getattr(torch, name), tracer, text))
            for name, text in asks.items()
        ]
    ):
        yield


@contextmanager
def _gradients_refused(tracer: Tracer) -> Iterator[None]:
    """Operations that a graph records have no gradients while it is traced; ``torch.func`` takes
    them in transforms.
    """
    space, forwards = vars(torch.autograd), vars(torch.autograd.forward_ad)
    text = (
        "forward takes gradients (at {}), which a graph cannot. Take them with torch.func.grad "
        "or jvp, or outside of forward."
    )
    run, dual = space["_engine_run_backward"], forwards["make_dual"]

    @functools.wraps(run)
    def backward(*args: Any, **kwargs: Any) -> Any:
        if tracer.executing and tracer.is_mine():
            raise TraceError(text.format(user_line()))
        return run(*args, **kwargs)

    with _put(
        [
            (space, "_engine_run_backward", backward),
            (forwards, "make_dual", _unless_users(dual, tracer, text)),
        ]
    ):
        yield


def _unless_users(function: Callable[..., Any], tracer: Tracer, text: str) -> Callable[..., Any]:
    """The function, but for the model's own code, which is told so with its line."""

    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_users(sys._getframe(1).f_code.co_filename):
            raise TraceError(text.format(user_line()))
        return function(*args, **kwargs)

    return ask


def _read_mode(module: nn.Module) -> Any:
    tracer = module.__dict__.get(_TRACER)
    return module.__dict__[_TRAINING] if tracer is None else tracer.read_mode(module)


def _write_mode(module: nn.Module, value: bool) -> None:
    """A module that forward makes, a slice of a ModuleList say, has a mode of its own; the others
    keep theirs.
    """
    if _TRACER in module.__dict__:
        raise TraceError(
            f"forward changes the mode of a {type(module).__name__} (at {user_line()}), which a "
            "graph cannot do."
        )
    module.__dict__[_TRAINING] = value


_TRAINING = "training"


_TRACER = "_fxprune_tracer"


# where torch.nn looks, on the module itself, for another way to call it
_CALL = "_compiled_call_impl"


_traced_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


def _class_while_traced(kind: type) -> type:
    """A subclass whose instances read their mode, their parameters and their buffers through the
    tracer.
    """
    if kind not in _traced_classes:

        def read(module: Any, name: str) -> Any:
            value = kind.__getattr__(module, name)  # type: ignore[attr-defined]
            tracer = module.__dict__.get(_TRACER)
            return (
                tracer.known(value)
                if isinstance(value, Tensor) and tracer is not None and not tracer.executing
                else value
            )

        members = {
            _TRAINING: property(_read_mode, _write_mode),
            "__getattr__": read,
            "__module__": kind.__module__,
        }
        _traced_classes[kind] = type(kind.__name__, (kind,), members)
    return _traced_classes[kind]


def _call(tracer: Tracer, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """What a module of the meta copy does when it is called: a leaf becomes a node, of others the
    code is followed.

    So is that of a leaf whose node would say something else: where forward has put other
    parameters into it, say.
    """
    if tracer.executing or not is_leaf(module):
        return module._call_impl(*args, **kwargs)
    if tracer.is_as_given(module):
        return tracer.call_module(module, args, kwargs)
    with _answering(module, tracer):
        return module._call_impl(*args, **kwargs)


@contextmanager
def _answering(module: nn.Module, tracer: Tracer) -> Iterator[None]:
    """A module reads its mode, its parameters and its buffers through the tracer."""
    if _TRACER in module.__dict__:
        yield
        return
    kind = type(module)
    module.__dict__[_TRACER] = tracer
    module.__class__ = _class_while_traced(kind)
    try:
        yield
    finally:
        module.__class__ = kind
        del module.__dict__[_TRACER]


@contextmanager
def _modules(root: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Modules of the meta copy answer through the tracer."""
    below = [module for name, module in root.named_modules() if name]
    try:
        for module in below:
            module.__dict__[_CALL] = functools.partial(_call, tracer, module)
        with ExitStack() as stack:
            for module in (root, *below):
                if module is root or not is_leaf(module):
                    stack.enter_context(_answering(module, tracer))
            yield
    finally:
        for module in below:
            module.__dict__.pop(_CALL, None)
