"""While a model is traced, some functions and attributes answer through the graph: those that torch.fx would not see."""

from __future__ import annotations

import functools
import inspect
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from fxprune.errors import TraceError
from fxprune.regions import recorded
from fxprune.trace.lines import user_line
from fxprune.trace.proxies import ASKS, symbolic
from fxprune.trace.tracer import Tracer, is_leaf

__all__ = ["FACTORIES", "NUMBER_FIRST", "slow_path", "taken_over"]


@contextmanager
def taken_over(tracer: Tracer, root: nn.Module) -> Iterator[None]:
    """Everything of this file, for one trace of a module."""
    with ExitStack() as stack:
        stack.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
        stack.enter_context(slow_path())
        stack.enter_context(_functions(tracer))
        stack.enter_context(_leaf_functions(tracer))
        stack.enter_context(_applications(tracer, root))
        stack.enter_context(_mode_through_graph(root, tracer))
        stack.enter_context(recorded(tracer.begin_region, tracer.end_region, tracer.is_users))
        stack.enter_context(_states_refused(tracer))
        stack.enter_context(_Parameters(tracer))
        yield


class _Parameters(TorchFunctionMode):
    """``next(self.parameters()).device`` is a node's: of the model as it is then, not of its twin, which lies nowhere."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = _GETTERS.get(func, "")
        proxy = self.tracer.proxy_of(args[0]) if name else None
        return func(*args, **(kwargs or {})) if proxy is None else getattr(proxy, name)


_GETTERS: dict[Any, str] = {
    getattr(value, "__get__") if inspect.isgetsetdescriptor(value) else value: name  # noqa: B009 - mypy knows no descriptor here
    for name in ("device", *ASKS)
    if (value := getattr(torch.Tensor, name, None)) is not None
}
"""What reads these attributes of a tensor -> their names."""


@contextmanager
def slow_path() -> Iterator[None]:
    """Keep torch.nn's fused inference paths out of the graph: they exist for one mode only and hide the widths."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


# Functions without a tensor among their arguments, to which proxies of sizes are passed: torch.fx does not see them otherwise.
FACTORIES = (
    *("arange", "as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"),
    *("broadcast_shapes", "tril_indices", "triu_indices"),
)


# Functions of torch that try a number before a tensor at some argument: a proxy says that it is a tensor, and is then read as one
# in C++, which ends the process. A test finds them by their signatures.
NUMBER_FIRST = {
    torch: (
        *("bitwise_and", "bitwise_left_shift", "bitwise_or", "bitwise_right_shift", "bitwise_xor", "float_power", "isin"),
        *("logspace", "pow", "quantize_per_tensor", "randint_like", "remainder", "result_type", "where", "xlogy"),
    ),
    torch.special: (
        *("hermite_polynomial_h", "hermite_polynomial_he", "laguerre_polynomial_l", "legendre_polynomial_p"),
        *(f"{prefix}chebyshev_polynomial_{kind}" for prefix in ("", "shifted_") for kind in "tuvw"),
        *("xlog1py", "xlogy", "zeta"),
    ),
}


@contextmanager
def _put(places: Sequence[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Something else under these names, and under no other: whatever is set beside them meanwhile stays."""
    before = [(space, name, space[name]) for space, name, _ in places]
    for space, name, value in places:
        space[name] = value
    try:
        yield
    finally:
        for space, name, value in before:
            space[name] = value


def _functions(tracer: Tracer) -> AbstractContextManager[None]:
    """Make nodes of the calls of functions that torch.fx would not see, or would not survive."""
    create = functools.partial(tracer.create_proxy, "call_function")
    places = [*_named(_is_number_first), *((vars(torch), name) for name in FACTORIES)]
    return _put([(space, name, _if_symbolic(space[name], create)) for space, name in places])


@contextmanager
def _states_refused(tracer: Tracer) -> Iterator[None]:
    """What a caller of the model decides (whether gradients are wanted, in which precision) is not known to a graph."""
    with ExitStack() as stack:
        for name in ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"):
            stack.enter_context(mock.patch.object(torch, name, _unless_users(getattr(torch, name), tracer)))
        yield


def _unless_users(function: Callable[..., Any], tracer: Tracer) -> Callable[..., Any]:
    @functools.wraps(function)
    def ask(*args: Any, **kwargs: Any) -> Any:
        if tracer.is_users(sys._getframe(1).f_code.co_filename):
            raise TraceError(
                f"forward asks torch.{function.__name__}() (at {user_line()}), which a graph cannot: it has one path for all "
                "answers. Do the same for all, or keep that line inside a module of its own."
            )
        return function(*args, **kwargs)

    return ask


_scanned: dict[str, int] = {}
_found: dict[tuple[int, str], dict[str, Any]] = {}  # by the id of a space, which is held here, and the name


def _named(wanted: Callable[[Any], bool]) -> list[tuple[dict[str, Any], str]]:
    """Wherever such functions have a name: in torch's own two spaces, and in the modules that imported them from there."""
    for name, module in list(sys.modules.items()):
        space = getattr(module, "__dict__", {})
        if _scanned.get(name) == len(space) and name != "__main__":
            continue
        _scanned[name] = len(space)
        if name in ("torch", "torch.special") or name.partition(".")[0] != "torch":
            names = [key for key, value in list(space.items()) if _is_number_first(value) or _is_bound(value)]
            _found.update({(id(space), key): space for key in names})
    return [(space, key) for (_, key), space in _found.items() if key in space and wanted(space[key])]


def _is_number_first(value: Any) -> bool:
    return id(value) in _NUMBER_FIRST_IDS


_NUMBER_FIRST_IDS = frozenset(id(getattr(space, name)) for space, names in NUMBER_FIRST.items() for name in names)


def _is_bound(value: Any) -> bool:
    """``Function.apply``, or what recomputes a part of forward in the backward pass."""
    if value is _CHECKPOINT[0]:
        return True
    kind = getattr(value, "__self__", None) if type(value) in (types.BuiltinMethodType, types.MethodType) else None
    return isinstance(kind, type) and issubclass(kind, torch.autograd.Function) and value.__name__ == "apply"


@contextmanager
def _applications(tracer: Tracer, root: nn.Module) -> Iterator[None]:
    """An ``autograd.Function`` is called by a node; a checkpoint is what it computes.

    Both are read in C++, which takes a proxy for the tensor that it says it is, and ends the process.
    """
    original = next(vars(base)["apply"] for base in torch.autograd.Function.__mro__ if "apply" in vars(base))

    def apply(kind: type, *args: Any, **kwargs: Any) -> Any:
        if symbolic((args, kwargs)):
            return tracer.create_proxy("call_function", _application(kind), args, kwargs)
        return original.__get__(None, kind)(*args, **kwargs)

    def taken(value: Any) -> Any:
        return _unchecked if value is _CHECKPOINT[0] else functools.partial(apply, value.__self__)

    spaces = [*_named(_is_bound), (vars(checkpoint), "checkpoint")]
    spaces += [(vars(module), name) for module in root.modules() for name, value in vars(module).items() if _is_bound(value)]
    places = [(space, name, taken(space[name])) for space, name in spaces]
    with _put(places), mock.patch.object(torch.autograd.Function, "apply", classmethod(apply)):
        yield


@functools.cache
def _application(kind: Any) -> Callable[..., Any]:
    """What a node calls to apply a function with gradients of its own; a bound method has no name that code could say."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return kind.apply(*args, **kwargs)

    apply.__name__ = apply.__qualname__ = f"{kind.__name__}_apply"
    apply.__module__ = kind.__module__
    vars(apply)["made_by"] = _application, (kind,)  # for what keeps graphs in files
    return apply


_CHECKPOINT = (checkpoint.checkpoint,)  # no name of this file that would be found, and taken over
_OF_CHECKPOINTS = frozenset(inspect.signature(checkpoint.checkpoint).parameters) - {"function", "args", "kwargs"}


def _unchecked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A checkpoint's function, called: what is kept for the backward pass is not a graph's business."""
    return function(*args, **{name: value for name, value in kwargs.items() if name not in _OF_CHECKPOINTS})


@contextmanager
def _leaf_functions(tracer: Tracer) -> Iterator[None]:
    """Take over from torch.fx the functions that were registered with ``torch.fx.wrap``."""
    registered = fx._symbolic_trace._wrapped_fns_to_patch
    named = [(space, name) for (_, name), space in registered.items() if callable(space.get(name))]
    places = [(space, name, _if_symbolic(space[name], tracer.call_leaf_function)) for space, name in named]
    with _put(places), mock.patch.dict(registered, clear=True):
        yield


def _if_symbolic(original: Callable[..., Any], create: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but for calls with a proxy among their arguments."""

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        return create(original, args, kwargs) if symbolic((args, kwargs)) else original(*args, **kwargs)

    return call


def _read_mode(module: nn.Module) -> Any:
    tracer = module.__dict__.get(_TRACER)
    return module.__dict__[_TRAINING] if tracer is None else tracer.read_mode(module)


def _write_mode(module: nn.Module, value: bool) -> None:
    """A module that forward makes, a slice of a ModuleList say, has a mode of its own; the others keep theirs."""
    if _TRACER in module.__dict__:
        raise TraceError(f"forward changes the mode of a {type(module).__name__} (at {user_line()}), which a graph cannot do.")
    module.__dict__[_TRAINING] = value


_TRAINING = "training"
_TRACER = "_fxprune_tracer"
_mode_classes: weakref.WeakKeyDictionary[type, type] = weakref.WeakKeyDictionary()


@contextmanager
def _mode_through_graph(root: nn.Module, tracer: Tracer) -> Iterator[None]:
    """While tracing, reading ``module.training`` in any module that is traced into gives a node of the graph."""
    changed: list[tuple[nn.Module, type]] = []
    try:
        for name, module in root.named_modules():
            if name and is_leaf(module):
                continue
            kind = type(module)
            if kind not in _mode_classes:
                mode = property(_read_mode, _write_mode)
                _mode_classes[kind] = type(kind.__name__, (kind,), {_TRAINING: mode, "__module__": kind.__module__})
            changed.append((module, kind))
            module.__dict__[_TRACER] = tracer
            module.__class__ = _mode_classes[kind]
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind
            del module.__dict__[_TRACER]
