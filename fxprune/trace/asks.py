"""Questions about a tensor that a graph cannot answer."""

from __future__ import annotations

from typing import Any

from fxprune.trace.user_code import calling_function, user_line

__all__ = ["PARAMETER_ANSWERS", "UNANSWERABLE", "device_question_message", "question_message"]


_DEVICE, _GRADIENT = "on which device a tensor is", "whether a tensor has a gradient"


UNANSWERABLE: dict[str, str] = {
    **dict.fromkeys(
        ("get_device", "is_cpu", "is_cuda", "is_ipu", "is_maia", "is_meta", "is_mps", "is_mtia"),
        _DEVICE,
    ),
    **dict.fromkeys(("is_vulkan", "is_xla", "is_xpu"), _DEVICE),
    **dict.fromkeys(("grad_fn", "is_leaf", "requires_grad"), _GRADIENT),
}
"""Attributes of a tensor whose value is up to the model's caller, with a description of each."""


PARAMETER_ANSWERS: dict[str, Any] = {"grad_fn": None, "is_leaf": True}
"""Attributes that have the same value for every ``nn.Parameter``.

``self.weight = nn.Parameter(w)`` reads them.
"""


def question_message(what: str, how: str) -> str:
    """Return the error message for a question that a graph cannot answer.

    Parameters
    ----------
    what:
        A description of the question, such as "on which device a tensor is".
    how:
        The expression that asks it.
    """
    who = calling_function()
    if who != "forward":
        return (
            f"{who} asks {what} (at {user_line()}), to do something else then, and a graph has "
            "one path for all answers. Keep that line inside a module of its own."
        )
    return (
        f"forward asks {what} ({how}, at {user_line()}), to do something else then. A graph has "
        "one path for all answers: hand x.device and x.dtype on, as in device=x.device, or keep "
        "that line inside a module of its own."
    )


def device_question_message(how: str) -> str:
    """Return the error message for an expression that asks for a tensor's device."""
    return question_message(_DEVICE, how)
