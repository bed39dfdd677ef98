"""Replacements that let the tracer see what torch does without telling it.

Modules of the meta copy answer through the tracer, because nobody else uses them. What belongs to
torch is replaced during a trace: functions that libraries registered as leaves, functions with
gradients of their own, regions without gradients. The replacements act in the tracing thread only,
and are undone in every case.
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
from torch.overrides import is_tensor_method_or_property
from torch.utils import checkpoint

from fxprune.common.process_lock import PROCESS_LOCK
from fxprune.errors import TraceError
from fxprune.trace.context_managers import recorded
from fxprune.trace.scripted import record_autograd_functions, record_scripts
from fxprune.trace.tensors import find_traced
from fxprune.trace.tracer import Tracer, is_leaf
from fxprune.trace.user_code import user_line

__all__ = ["plain_attention", "torch_patched", "without_fast_path"]


@contextmanager
def torch_patched(tracer: Tracer, root: nn.Module) -> Iterator[None]:
    """Install all replacements of this module for one trace.

    Parameters
    ----------
    tracer:
        The tracer that records.
    root:
        The module that is traced.
    """
    with PROCESS_LOCK, ExitStack() as stack:
        # PyTorch lists its functions at the first question and keeps the list: asked later, the
        # list would hold the replacements, and with them the tracer and the model, for ever.
        is_tensor_method_or_property(torch.Tensor.add)
        stack.enter_context(plain_attention())
        stack.enter_context(without_fast_path())
        stack.enter_context(_followed_leaf_functions(tracer))
        stack.enter_context(record_autograd_functions(tracer))
        stack.enter_context(record_scripts(tracer))
        stack.enter_context(_answering_modules(root, tracer))
        stack.enter_context(recorded(tracer.begin_region, tracer.end_region, tracer.follows_file))
        stack.enter_context(_refuse_states(tracer))
        stack.enter_context(_refuse_gradients(tracer))
        stack.enter_context(_recorded_broadcast_shapes(tracer))
        stack.enter_context(_followed_checkpoints(tracer))
        yield


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Keep torch.nn's fused inference paths out of the graph.

    They exist for one mode only and hide widths.
    """
    # The setting belongs to the process: two threads that change it would restore the wrong one.
    with PROCESS_LOCK:
        before = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def plain_attention() -> Iterator[None]:
    """Let attention be computed by the matrix products that it consists of."""
    with PROCESS_LOCK, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        yield


@contextmanager
def _replaced(places: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Replace entries of dictionaries inside this context.

    Other entries that are set meanwhile stay. ``places`` holds a dictionary, a name and a value
    for each entry.
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
    original: Callable[..., Any], tracer: Tracer, replacement: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a function that calls ``replacement`` if an argument holds a traced value.

    Calls in other threads, and calls without traced values, go to the original.
    """

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        """Call the replacement or the original."""
        if tracer.is_tracing_thread() and find_traced((args, kwargs)) is not None:
            return replacement(original, args, kwargs)
        return original(*args, **kwargs)

    return call


@contextmanager
def _followed_leaf_functions(tracer: Tracer) -> Iterator[None]:
    """Let the tracer follow functions that were registered with ``torch.fx.wrap``."""
    registered = fx._symbolic_trace._wrapped_fns_to_patch
    places = []
    for (_, name), space in registered.items():
        if callable(space.get(name)):
            follow = _if_traced(space[name], tracer, tracer.call_leaf_function)
            places.append((space, name, follow))
    with _replaced(places):
        yield


@contextmanager
def _recorded_broadcast_shapes(tracer: Tracer) -> Iterator[None]:
    """Record ``torch.broadcast_shapes`` as a node.

    It is Python on numbers and asks whether a size is 1. A node leaves that open.
    """

    def record(function: Any, args: Any, kwargs: Any) -> Any:
        """Record the call."""
        return tracer.record("call_function", function, args, kwargs)

    name, spaces = "broadcast_shapes", (vars(torch), vars(torch.functional))
    places = [(space, name, _if_traced(space[name], tracer, record)) for space in spaces]
    with _replaced(places):
        yield


@contextmanager
def _followed_checkpoints(tracer: Tracer) -> Iterator[None]:
    """Note where ``checkpoint`` is called, and answer its question for a device.

    It asks for the device of tensors, to keep the state of the generator there. A graph computes
    once and needs no such state.
    """

    def begin(*_: Any) -> str:
        """Note the line, and name a device."""
        tracer.checkpoints.append(user_line())
        return "cpu"

    space, name, places = vars(checkpoint), "_infer_device_type", []
    if name in space:
        places.append((space, name, _if_traced(space[name], tracer, begin)))
    with _replaced(places):
        yield


@contextmanager
def _refuse_states(tracer: Tracer) -> Iterator[None]:
    """Raise an error if forward asks whether gradients are wanted, or in which precision it runs.

    The caller of the model decides this, and a graph does not know it.
    """
    names = ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled")
    why = (
        "it has one path for all answers. Do the same for all, or keep that line inside a module "
        "of its own."
    )
    places = []
    for name in names:
        text = f"forward asks torch.{name}() (at {{}}), which a graph cannot: {why}"
        places.append((vars(torch), name, _refused_to_user(getattr(torch, name), tracer, text)))
    with _replaced(places):
        yield


@contextmanager
def _refuse_gradients(tracer: Tracer) -> Iterator[None]:
    """Raise an error if forward takes gradients, except by the transforms of ``torch.func``.

    Operations that a graph records have no gradients while it is traced.
    """
    space, forwards = vars(torch.autograd), vars(torch.autograd.forward_ad)
    text = (
        "forward takes gradients (at {}), which a graph cannot. Take them with torch.func.grad "
        "or jvp, or outside of forward."
    )
    run, dual = space["_engine_run_backward"], forwards["make_dual"]

    @functools.wraps(run)
    def backward(*args: Any, **kwargs: Any) -> Any:
        """Run the backward pass, or refuse it while the tracer executes an operation."""
        if tracer.executing and tracer.is_tracing_thread():
            raise TraceError(text.format(user_line()))
        return run(*args, **kwargs)

    make_dual = _refused_to_user(dual, tracer, text)
    places = [(space, "_engine_run_backward", backward), (forwards, "make_dual", make_dual)]
    with _replaced(places):
        yield


def _refused_to_user(
    function: Callable[..., Any], tracer: Tracer, text: str
) -> Callable[..., Any]:
    """Return a function that raises an error if the model's own code calls it.

    ``text`` is the message, with a place for the line.
    """

    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        """Call the function, or raise the error."""
        if tracer.follows_file(sys._getframe(1).f_code.co_filename):
            raise TraceError(text.format(user_line()))
        return function(*args, **kwargs)

    return ask


def _read_mode(module: nn.Module) -> Any:
    """Return a module's ``training``; during a trace, the traced value for it."""
    tracer = module.__dict__.get(_TRACER)
    return module.__dict__[_TRAINING] if tracer is None else tracer.read_mode(module)


def _write_mode(module: nn.Module, value: bool) -> None:
    """Set a module's ``training``, but refuse it for the modules that are traced.

    A module that forward creates, a slice of a ModuleList for example, may set its mode.
    """
    if _TRACER in module.__dict__:
        raise TraceError(
            f"forward changes the mode of a {type(module).__name__} (at {user_line()}), which a "
            "graph cannot do."
        )
    module.__dict__[_TRAINING] = value


_TRAINING = "training"


_TRACER = "_fxprune_tracer"


# the attribute of a module in which torch.nn looks for another way to call it
_CALL = "_compiled_call_impl"


# by reference: a subclass keeps its base alive, which would then never leave the table
_traced_classes: weakref.WeakKeyDictionary[type, weakref.ref[type]] = weakref.WeakKeyDictionary()


def _class_while_traced(kind: type) -> type:
    """Return a subclass whose instances read mode, parameters and buffers through the tracer."""
    known = _traced_classes.get(kind)
    traced = None if known is None else known()
    if traced is None:
        traced = _make_traced_class(kind)
        _traced_classes[kind] = weakref.ref(traced)
    return traced


def _make_traced_class(kind: type) -> type:
    def read(module: Any, name: str) -> Any:
        """Return a parameter, buffer or submodule; a tensor as the tracer knows it."""
        value = kind.__getattr__(module, name)  # type: ignore[attr-defined]
        tracer = module.__dict__.get(_TRACER)
        if not isinstance(value, Tensor) or tracer is None or tracer.executing:
            return value
        return tracer.stand_in_if_known(value)

    members = {
        _TRAINING: property(_read_mode, _write_mode),
        "__getattr__": read,
        "__module__": kind.__module__,
    }
    return type(kind.__name__, (kind,), members)


def _call_module(tracer: Tracer, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call a module of the meta copy: record a leaf as a node, and follow the code of others.

    The code of a leaf is followed, too, if a node would not describe it, because forward has given
    it other parameters, for example.
    """
    if tracer.executing or not is_leaf(module):
        return module._call_impl(*args, **kwargs)
    if tracer.is_unchanged_leaf(module):
        return tracer.call_module(module, args, kwargs)
    with _answering(module, tracer):
        return module._call_impl(*args, **kwargs)


@contextmanager
def _answering(module: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Let a module read its mode, its parameters and its buffers through the tracer."""
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
def _answering_modules(root: nn.Module, tracer: Tracer) -> Iterator[None]:
    """Let all modules of the meta copy answer through the tracer."""
    below = [module for name, module in root.named_modules() if name]
    try:
        for module in below:
            module.__dict__[_CALL] = functools.partial(_call_module, tracer, module)
        with ExitStack() as stack:
            for module in (root, *below):
                if module is root or not is_leaf(module):
                    stack.enter_context(_answering(module, tracer))
            yield
    finally:
        for module in below:
            module.__dict__.pop(_CALL, None)
