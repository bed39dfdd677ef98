"""Choice of the input values on which a model in parts runs."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn

from fxprune.common.contents import tensors_of
from fxprune.coupling.parts.calls import in_one_thread, intercepted, paths_with_parameters
from fxprune.errors import FxpruneError, InputError, ModelError, TraceError
from fxprune.inputs import Call, copied_to, fill_meta, randomised, storable_values
from fxprune.trace import MetaCopy, set_mode, user_line, without_fast_path
from fxprune.trace.aliasing import UndoWrites
from fxprune.trace.user_code import UNKNOWN, ElsewhereError, higher_order_message

__all__ = ["find_runnable"]


def find_runnable(meta_copy: MetaCopy, example: Call, refused: Exception) -> Call:
    """Return the example with values on which the model runs and calls the most modules.

    The candidates are the values that a plan holds (:func:`fxprune.inputs.storable_values`), the
    example's own, and random ones. A later candidate is tried only if all earlier ones leave out a
    module.

    Parameters
    ----------
    meta_copy:
        The model; copies of it with data run.
    example:
        The example; its tensors may be meta tensors.
    refused:
        Why the model is not one graph.

    Raises
    ------
    InputError, ModelError, TraceError
        If the model fails on the example's own values.
    Exception
        ``refused``, if the model is on the meta device, or fails on all candidates.
    """
    if meta_copy.device.type == "meta":
        raise refused
    every = paths_with_parameters(meta_copy.model)
    best, most = None, -1
    for call, is_example in _example_values(example):
        try:
            called = len(_modules_called(meta_copy, call, every))
        except ElsewhereError:
            raise
        except Exception as error:  # whatever the model raises
            if is_example:
                raise _error_for_user(meta_copy, error, refused) from error
            continue
        if called > most:
            best, most = call, called
        if called == len(every):
            break
    if best is None:
        raise refused
    return best


def _example_values(example: Call) -> Iterator[tuple[Call, bool]]:
    """Yield calls with values to try, and whether the values are the example's own."""
    data = fill_meta(example)
    real = not any(tensor.is_meta for tensor in tensors_of(example))
    stored = storable_values(data)
    same = all(a is b for a, b in zip(tensors_of(stored), tensors_of(data), strict=True))
    yield stored, same and real
    if not same:
        yield data, real
    yield randomised(data), False


def _modules_called(meta_copy: MetaCopy, call: Call, paths: set[str]) -> set[str]:
    """Run the model on a call, and return the paths among ``paths`` whose modules are called."""
    model, found = meta_copy.instance(), set[str]()
    set_mode(model, training=False)

    def note(path: str, call: Callable[[], Any], args: Any, kwargs: Any) -> Any:
        found.add(path)
        return NotImplemented

    args, kwargs = copied_to(call, meta_copy.device)
    undone = UndoWrites(dict(model.named_parameters()))
    with (
        undone.undoing(),
        in_one_thread(),
        torch.no_grad(),
        without_fast_path(),
        intercepted(model, paths, note),
    ):
        model(*args, **kwargs)
    return found


def _error_for_user(meta_copy: MetaCopy, error: Exception, refused: Exception) -> Exception:
    """Return the exception that tells the user why the model fails on the example."""
    if isinstance(error, FxpruneError):
        return error
    if higher_order_message(error):
        return TraceError(higher_order_message(error))
    where = user_line(traceback.extract_tb(error.__traceback__))
    if isinstance(refused, InputError) and where in (refused.line, UNKNOWN):
        # its message says more: forward's arguments, or shapes and the layer's weights
        return refused
    if _is_models_fault(error):
        return ModelError(
            f"forward of this {type(meta_copy.model).__name__} fails on other grounds than its "
            f"inputs: {type(error).__name__}: {error} (at {where}). Mend that line; a model that "
            "runs can be pruned."
        )
    return InputError(
        f"{type(meta_copy.model).__name__} fails on the example inputs: {type(error).__name__}: "
        f"{error} (at {where}). Check that they are what the model is called with: shapes, "
        "dtypes, values and the order of arguments."
    )


def _is_models_fault(error: Exception) -> bool:
    """Tell whether an exception is the model's fault, whatever its inputs.

    It is if a name is missing, or an attribute of a module. A local variable without a value does
    not count, because it may have one for other inputs.
    """
    if isinstance(error, AttributeError):
        return isinstance(error.obj, (nn.Module, ModuleType))
    return isinstance(error, (NameError, ImportError)) and not isinstance(error, UnboundLocalError)
