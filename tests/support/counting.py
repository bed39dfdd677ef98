"""A second count of multiply-accumulates, kernel by kernel.

Each figure is compared with torch's own formula, where this version of torch has one.
"""

from typing import Any

from torch.utils.flop_counter import flop_registry

from fxprune.cost import MacCounter


class CheckedCounter(MacCounter):
    """A counter that fails at once if torch's formula gives another number."""

    def macs_of(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> int | None:
        macs = super().macs_of(func, args, kwargs, out)
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            flops = formula(*args, **kwargs, out_val=out)
            assert flops % 2 == 0
            assert macs == flops // 2, f"{func}: {macs} MACs by fxprune, {flops // 2} by torch"
        return macs
