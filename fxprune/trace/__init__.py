"""Model and example inputs -> ``torch.fx.GraphModule``, on tensors without data.

Three things make tracing reach models that ``torch.fx.symbolic_trace`` does not:

* a stand-in for a value knows what that is for the example, so Python control flow on shapes runs,
  while the sizes themselves stay
  symbolic in the graph. What was decided is listed, and guarded by an assertion in the graph;
* ``self.training`` is read through the graph, so that dropout and stochastic depth keep both their
  modes;
* functions that libraries mark as leaves are entered, because parameters pass through them.

``meta_copy`` copies the model, ``arguments`` reads the example, ``values`` stand for values,
``tracer`` makes nodes of what is done to them, ``decisions`` names what Python asked them,
``sizes`` and ``resized`` find what C++ asked them, ``takeover`` leads through the tracer what
torch would do without a word to it, and ``lines`` finds the user's line for a message.

The model that runs is a *meta copy*: same structure, parameters on the meta device. The user's
model is never called nor changed.
"""

from __future__ import annotations

from fxprune.trace.arguments import example_of
from fxprune.trace.decisions import formula
from fxprune.trace.execution import execute
from fxprune.trace.meta_copy import (
    MetaCopy,
    attribute,
    copy_of,
    meta_copy_of,
    put_tensors,
    set_mode,
)
from fxprune.trace.patches import plain_attention, slow_path
from fxprune.trace.sequences import SizeTuple
from fxprune.trace.traced import Trace
from fxprune.trace.tracer import is_leaf
from fxprune.trace.user_code import following, user_line
from fxprune.trace.whole import trace

__all__ = [
    "MetaCopy",
    "SizeTuple",
    "Trace",
    "attribute",
    "copy_of",
    "example_of",
    "execute",
    "following",
    "formula",
    "is_leaf",
    "meta_copy_of",
    "plain_attention",
    "put_tensors",
    "set_mode",
    "slow_path",
    "trace",
    "user_line",
]
