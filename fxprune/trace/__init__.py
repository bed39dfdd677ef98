"""Trace a model to a ``torch.fx`` graph, using tensors without data.

Tracing calls the model with *stand-ins*: objects that represent the values of graph nodes. It
follows models that ``torch.fx.symbolic_trace`` cannot follow, for three reasons:

* A stand-in knows its value for the example, so Python control flow on shapes runs. The sizes stay
  symbolic in the graph. Each decision that Python makes is listed, and an assertion in the graph
  guards it.
* ``self.training`` is read through the graph, so dropout and stochastic depth keep both modes.
* Functions that libraries register as leaves are entered, because parameters pass through them.

The model that runs is a *meta copy*: it has the same structure, with parameters on the meta
device. The user's model is never called or changed.

The modules of this package:

* ``meta_copy`` copies the model, and ``arguments`` reads the example inputs.
* ``values`` makes the stand-ins, and ``tracer`` records the operations on them as nodes.
* ``guards`` answers Python's questions about values, and ``decisions`` describes them.
* ``below``, ``sizes`` and ``resized`` find the sizes that C++ reads.
* ``patches`` and ``scripted`` make torch call the tracer where it would not do so by itself.
* ``user_code`` finds the user's line for a message.
"""

from __future__ import annotations

from fxprune.trace.arguments import example_of
from fxprune.trace.decisions import formula
from fxprune.trace.execution import execute
from fxprune.trace.meta_copy import (
    MetaCopy,
    copy_attribute,
    copy_module,
    meta_copy_of,
    put_tensors,
    set_mode,
)
from fxprune.trace.patches import plain_attention, without_fast_path
from fxprune.trace.sequences import SizeTuple
from fxprune.trace.traced import Trace
from fxprune.trace.tracer import is_leaf
from fxprune.trace.user_code import following, user_line
from fxprune.trace.whole import trace

__all__ = [
    "MetaCopy",
    "SizeTuple",
    "Trace",
    "copy_attribute",
    "copy_module",
    "example_of",
    "execute",
    "following",
    "formula",
    "is_leaf",
    "meta_copy_of",
    "plain_attention",
    "put_tensors",
    "set_mode",
    "trace",
    "user_line",
    "without_fast_path",
]
