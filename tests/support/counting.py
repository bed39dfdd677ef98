"""torch's own counter of floating-point operations, with the one operation that it does not know on a CPU."""

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def flop_counter() -> FlopCounterMode:
    """Counts what runs below it; an LSTM in float32 is one operation of oneDNN there."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mkldnn_rnn_layer: _recurrent})


def _recurrent(x: Any, of_input: Any, of_hidden: Any, *_: Any, **__: Any) -> int:
    """Of one layer and direction: (steps, batch, features), (gates, features), (gates, hidden)."""
    return 2 * prod(x[:-1]) * (prod(of_input) + prod(of_hidden))
