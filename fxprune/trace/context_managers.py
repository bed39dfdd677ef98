"""Regions of forward that run without gradients or in another precision.

Examples are ``with torch.no_grad():`` and ``with torch.autocast(...):``. Python enters and leaves
them while a model is traced, so a graph of tensor operations alone would lose them. They become
two nodes, around what was recorded in between, and a ``with`` block in the code of an emitted
model.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import fx

from fxprune.common.identity import IdentityMap

__all__ = ["BOUNDS", "blocks", "enter", "leave", "recorded"]

_KINDS = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": torch.autocast,
}


@torch.fx.has_side_effect
def enter(kind: str, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]:
    """Begin ``with torch.<kind>(...)``; :func:`leave` ends it.

    >>> region = enter("no_grad")
    >>> torch.ones(1, requires_grad=True).exp().requires_grad
    False
    >>> leave(region)
    """
    region: AbstractContextManager[Any] = _KINDS[kind](*args, **kwargs)
    region.__enter__()
    return region


@torch.fx.has_side_effect
def leave(region: AbstractContextManager[Any]) -> None:
    """End a region that :func:`enter` began."""
    region.__exit__(None, None, None)


BOUNDS = frozenset({enter, leave})
"""The functions that the two nodes of a region call.

They need not run to look at a graph on tensors without data.
"""


@contextmanager
def recorded(
    begin: Callable[..., Any], end: Callable[[Any], None], follows_file: Callable[[str], bool]
) -> Iterator[None]:
    """Report every region that is entered and left inside this context.

    Parameters
    ----------
    begin:
        Called as ``begin(kind, *args, **kwargs)`` with the arguments of :func:`enter`, before the
        region is entered.
    end:
        Called with the result of ``begin``, before the region is left.
    follows_file:
        Tells of a file name whether ``with`` statements in this file are reported.
    """
    watch = _RegionWatch(begin, end, follows_file)
    kinds: tuple[Any, ...] = (*_KINDS.values(), torch.set_grad_enabled)
    with ExitStack() as stack:
        for kind in kinds:
            on_enter, on_exit = watch.reporting(kind.__enter__, kind.__exit__)
            stack.enter_context(mock.patch.object(kind, "__enter__", on_enter))
            stack.enter_context(mock.patch.object(kind, "__exit__", on_exit))
        yield


@dataclass
class _RegionWatch:
    """The functions that are told of regions (see :func:`recorded`), and the open regions.

    ``open_regions`` holds the result of ``begin`` for each region.
    """

    begin: Callable[..., Any]
    end: Callable[[Any], None]
    follows_file: Callable[[str], bool]
    open_regions: IdentityMap[Any, Any] = field(default_factory=IdentityMap)

    def reporting(self, entering: Any, leaving: Any) -> tuple[Any, Any]:
        """Return versions of a region's ``__enter__`` and ``__exit__`` that report their calls."""

        def on_enter(region: Any) -> Any:
            """Report and enter a region."""
            if self.follows_file(_caller()):
                name, args, kwargs = _arguments_of(region)
                self.open_regions[region] = self.begin(name, *args, **kwargs)
            return entering(region)

        def on_exit(region: Any, *error: Any) -> Any:
            """Report and leave a region."""
            if region in self.open_regions:
                opened = self.open_regions[region]
                self.open_regions.discard(region)
                self.end(opened)
            return leaving(region, *error)

        return on_enter, on_exit


def _caller() -> str:
    """Return the file of the ``with`` statement.

    If a region decorates a function, return the file of that function's caller.
    """
    frame = sys._getframe(2)  # the caller of on_enter
    while frame.f_back is not None and frame.f_code.co_filename in _HELPERS:
        frame = frame.f_back
    return frame.f_code.co_filename


_HELPERS = {contextlib.__file__, torch.utils._contextlib.__file__}
_HELPERS |= {torch.amp.autocast_mode.__file__, torch.autograd.grad_mode.__file__}


def _arguments_of(region: Any) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """Return the kind, arguments and keyword arguments of a region for :func:`enter`."""
    if isinstance(region, torch.autocast):
        kwargs = {
            "dtype": region.fast_dtype,
            "enabled": region._enabled,
            "cache_enabled": region._cache_enabled,
        }
        return "autocast", (region.device,), kwargs
    if isinstance(region, torch.set_grad_enabled):
        return ("enable_grad" if region.mode else "no_grad"), (), {}
    if isinstance(region, torch.inference_mode):
        return "inference_mode", (region.mode,), {}
    return type(region).__name__, (), {}


def blocks(graph: fx.Graph) -> AbstractContextManager[None]:
    """Generate code with ``with`` blocks for the regions of a graph inside this context.

    A ``with`` block is left even if something inside raises.

    Examples
    --------
    >>> graph = fx.Graph()
    >>> x, region = graph.placeholder("x"), graph.call_function(enter, ("no_grad",))
    >>> y = graph.call_function(torch.exp, (x,))
    >>> _ = graph.call_function(leave, (region,)), graph.output(y)
    >>> with blocks(graph):
    ...     print(graph.python_code("self").src.strip())
    def forward(self, x):
        with torch.no_grad():
            exp = torch.exp(x);  x = None
        return exp
    """
    return graph.on_generate_code(
        lambda before: lambda body: _with_blocks(graph, before(body) if before else body)
    )


def _with_blocks(graph: fx.Graph, body: list[str]) -> list[str]:
    """Replace calls of :func:`enter` and :func:`leave` in generated code by ``with`` blocks."""
    entries = {node.name for node in graph.nodes if node.target is enter}
    if not entries:
        return body
    ends = {node.name: node.args[0].name for node in graph.nodes if node.target is leave}
    out: list[str] = []
    inside: list[str] = []
    for line in filter(str.strip, "".join(body).splitlines(keepends=True)):
        name, call = line.partition(" = ")[0], _REGION_CALL.match(line)
        if name in entries and call:
            out.append(f"{_INDENT * len(inside)}with torch.{call[1]}({call[2]}):\n")
            inside.append(name)
        elif name in ends and ends[name] == inside[-1]:
            last = next(before for before in reversed(out) if not before.lstrip().startswith("#"))
            if last.lstrip().startswith("with "):
                out.append(_INDENT * len(inside) + "pass\n")
            inside.pop()
        else:
            out.append(_INDENT * len(inside) + line)
    return out


_INDENT = "    "
_REGION_CALL = re.compile(r"\w+ = \w+\('(\w+)'(?:, )?(.*?)\)(?:;.*)?$")
