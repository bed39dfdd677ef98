"""How a latency is measured: device, precision, mode, layout and batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fxprune.common.numbers import check_bool, check_integer
from fxprune.common.public import public, short_repr
from fxprune.errors import ArgumentError

__all__ = ["MODES", "PRECISIONS", "Setting"]


PRECISIONS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""The dtype of each precision.

In tf32, tensors are float32 and a GPU computes products with 10 bits of mantissa.
"""


MODES = ("eager", "compiled", "cudagraph")
"""How a model is called: eager, through ``torch.compile``, or recorded once as a CUDA graph and
replayed.
"""


@public
@dataclass(frozen=True)
class Setting:
    """Where and how a model runs while it is timed.

    Attributes
    ----------
    device:
        ``"cuda"`` or ``"cpu"``, or one with a number, as ``"cuda:1"``. None: the GPU if there is
        one, otherwise the CPU.
    precision:
        A key of :data:`PRECISIONS`: ``"fp32"``, ``"tf32"`` (GPU only), ``"bf16"`` or ``"fp16"``.
    mode:
        One of :data:`MODES`: ``"eager"``, ``"compiled"`` or ``"cudagraph"`` (GPU only).
    channels_last:
        Use the channels-last layout for images, videos and the weights of their convolutions.
    batch:
        Images per call. None: as in the example inputs.

    Raises
    ------
    ArgumentError
        If a value is unknown, or if the setting is not possible on this machine.

    Examples
    --------
    >>> setting = Setting("cpu", precision="bf16", batch=8)
    >>> setting.place, setting.on_gpu
    (device(type='cpu'), False)
    """

    device: str | None = None
    precision: str = "fp32"
    mode: str = "eager"
    channels_last: bool = True
    batch: int | None = None

    def __post_init__(self) -> None:
        are_names = isinstance(self.precision, str) and isinstance(self.mode, str)
        if not are_names or self.precision not in PRECISIONS or self.mode not in MODES:
            known = f"precisions are {', '.join(PRECISIONS)}, modes are {', '.join(MODES)}"
            raise ArgumentError(
                f"precision={short_repr(self.precision)}, mode={short_repr(self.mode)}: {known}."
            )
        if self.batch is not None:
            object.__setattr__(self, "batch", check_integer("batch", self.batch))
        object.__setattr__(self, "channels_last", check_bool("channels_last", self.channels_last))
        if self.device is not None:
            object.__setattr__(self, "device", self._checked_device())
        if not self.on_gpu and (self.mode == "cudagraph" or self.precision == "tf32"):
            option = f"mode {self.mode!r}" if self.mode == "cudagraph" else "precision 'tf32'"
            raise ArgumentError(f"{option} needs a GPU, and device is {self.place}.")

    def _checked_device(self) -> str:
        """Return the name of the device.

        Raises
        ------
        ArgumentError
            If the device is neither a CPU nor a GPU, or if this machine does not have it.
        """
        given: Any = self.device
        is_known = isinstance(given, (str, torch.device)) and _is_device(given)
        device = torch.device(given) if is_known else None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ArgumentError(
                f'device={short_repr(given)}: latency is measured on "cuda" or "cpu", or either '
                'with a number, as "cuda:1".'
            )
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ArgumentError(
                f"device={given!r}: torch sees no GPU here. Leave device out to measure on the "
                "CPU."
            )
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ArgumentError(
                f"device={given!r}: torch sees {torch.cuda.device_count()} GPUs here, numbered "
                "from 0."
            )
        return str(given)

    def __str__(self) -> str:
        """Return a one-line description.

        >>> print(Setting("cpu", batch=8))
        on cpu, fp32, eager, channels-last, batch 8
        """
        layout = ", channels-last" if self.channels_last else ""
        batch = "the example's batch" if self.batch is None else f"batch {self.batch}"
        return f"on {self.place}, {self.precision}, {self.mode}{layout}, {batch}"

    @property
    def place(self) -> torch.device:
        """The device on which models run."""
        return torch.device(self.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @property
    def on_gpu(self) -> bool:
        """Whether models run on a GPU."""
        return self.place.type == "cuda"


def _is_device(name: Any) -> bool:
    """Tell whether torch accepts the name of a device."""
    try:
        torch.device(name)
    except RuntimeError:
        return False
    return True
