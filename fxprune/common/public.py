"""Guards that make public functions raise only :class:`~fxprune.errors.FxpruneError`.

:func:`public` guards the functions and classes that users call. :func:`calling_user_code` and
:func:`iterate_user_input` run code of the user, so that its errors differ from errors of fxprune.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch

from fxprune.errors import (
    CallbackError,
    FxpruneError,
    InternalError,
    ResourceError,
    SignatureError,
)

__all__ = ["calling_user_code", "guarded", "iterate_user_input", "public", "short_repr"]

T = TypeVar("T")


def public(entry: T, *, inference: bool = False) -> T:
    """Guard a public function, or the constructor of a public class.

    The guard turns unexpected errors into errors of fxprune. It does not change errors of fxprune,
    warnings that the caller turned into errors, and exceptions that are not an ``Exception``
    (``KeyboardInterrupt``).

    Parameters
    ----------
    entry:
        The function or class. A class is changed in place.
    inference:
        Keep ``torch.inference_mode()`` if the caller is in it. This is for functions that only
        call what the caller passes in. Other functions leave inference mode, because tensors that
        are made in it cannot be trained.

    Returns
    -------
    The guarded function, or the class.

    Examples
    --------
    >>> @public
    ... def half(number):
    ...     return number / 2
    >>> half(3)
    1.5
    >>> half(nubmer=3)
    Traceback (most recent call last):
    fxprune.errors.SignatureError: half() got an unexpected keyword argument 'nubmer'. Did ...
    """
    if isinstance(entry, type):
        entry.__init__ = _guarded(entry.__init__, entry.__name__)  # type: ignore[misc]
        return entry
    return _guarded(entry, entry.__qualname__, inference)  # type: ignore[attr-defined]


def _guarded(function: Any, name: str, inference: bool = False) -> Any:
    """Return the guarded function; ``name`` is its name in error messages."""

    @functools.wraps(function)
    def guarded_call(*args: Any, **kwargs: Any) -> Any:
        """Call the function; turn unexpected errors into errors of fxprune."""
        try:
            if inference or not torch.is_inference_mode_enabled():
                return function(*args, **kwargs)
            # tensors that are made here can be trained later
            with torch.inference_mode(False), torch.no_grad():
                return function(*args, **kwargs)
        except (FxpruneError, Warning):
            raise
        except Exception as error:
            misfit = None
            if isinstance(error, TypeError):
                misfit = _signature_error(function, args, kwargs)
            raise misfit or _unexpected_error(error, name) from error

    return guarded_call


@contextmanager
def guarded(name: str) -> Iterator[None]:
    """Guard a block of code as :func:`public` does; ``name`` is its name in error messages."""
    try:
        yield
    except (FxpruneError, Warning):
        raise
    except Exception as error:
        raise _unexpected_error(error, name) from error


def _signature_error(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> FxpruneError | None:
    """Return the error for arguments that do not fit the signature of a function.

    Return None if they fit; then the error was raised inside the function. The message is the same
    in all versions of Python.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        problem, kinds = str(error), {each.kind for each in signature.parameters.values()}
        unknown = [name for name in kwargs if name not in signature.parameters]
        if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
            problem = f"got an unexpected keyword argument {unknown[0]!r}"
        hint = _hint_at_argument(function, kwargs)
        return SignatureError(f"{function.__qualname__}() {problem}.{hint}")
    return None


def _unexpected_error(error: Exception, name: str) -> FxpruneError:
    """Return the error of fxprune that reports an unexpected error."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return ResourceError(
            f"{name}: memory ran out ({_error_text(error)}). Give smaller example inputs, or "
            "another device."
        )
    return InternalError(
        f"{name} failed where it should not: {type(error).__name__}: {_error_text(error)} (at "
        f"{_place_of_error(error.__traceback__)}). This is a bug in fxprune: please report it, "
        "with this traceback. Until it is mended, modules in keep= are left as they are."
    )


def _hint_at_argument(function: Any, kwargs: dict[str, Any]) -> str:
    """Return a hint at a known argument that resembles an unknown one; empty if none does."""
    known = list(inspect.signature(function).parameters)
    near = [difflib.get_close_matches(name, known, n=1) for name in kwargs if name not in known]
    return f" Did you mean {near[0][0]}=?" if near and near[0] else ""


@contextmanager
def calling_user_code(source: str) -> Iterator[None]:
    """Run code of the user; its errors become a :class:`CallbackError`.

    ``source`` is the name of that code in the error message.

    >>> with calling_user_code("the loss"):
    ...     1 / 0
    Traceback (most recent call last):
    fxprune.errors.CallbackError: the loss raised ZeroDivisionError: division by zero (at ...). ...
    """
    try:
        yield
    except (FxpruneError, Warning):
        raise
    except Exception as error:
        text = (
            f"{source} raised {type(error).__name__}: "
            f"{_error_text(error)}{_line_of_caller(error.__traceback__)}."
        )
        raise CallbackError(f"{text} It was handed to fxprune, which only calls it.") from error


def iterate_user_input(loader: Iterable[T], source: str = "the loader") -> Iterator[T]:
    """Yield the items of an iterable of the user.

    Parameters
    ----------
    loader:
        The iterable.
    source:
        The name of the iterable in the error message.

    Raises
    ------
    CallbackError
        If the iterable raises an error, or if it is not iterable.
    """
    with calling_user_code(source):
        items = iter(loader)
    end = object()
    while True:
        with calling_user_code(source):
            item = next(items, end)
        if item is end:
            return
        yield item  # type: ignore[misc]


def short_repr(value: Any, most: int = 60) -> str:
    """Return a value as text for a message, at most ``most`` characters of its ``repr``.

    If its ``repr`` raises an error, the text names the type of the value.

    >>> short_repr("a" * 100, 10), short_repr(0.5)
    ("'aaaaaaaaa", '0.5')
    """
    try:
        return repr(value)[:most]
    except Exception:  # raised by a __repr__ of the user
        return f"a {type(value).__name__}"


def _error_text(error: BaseException) -> str:
    """Return the text of an error as one line, without a full stop."""
    try:
        text = str(error)
    except Exception:  # raised by a __str__ of the user
        text = ""
    return " ".join(text.split())[:300].rstrip(".") or "no message"


_PACKAGE = f"{Path(__file__).parents[1]}/"
_LIBRARY_KEYS = ("stdlib", "platstdlib", "purelib", "platlib")
_LIBRARIES = tuple(f"{sysconfig.get_paths()[key]}/" for key in _LIBRARY_KEYS)


def _place_of_error(trace: TracebackType | None) -> str:
    """Return the innermost line of fxprune in a traceback.

    If the traceback passes through code of the user after it entered fxprune, the innermost line
    of that code is appended.
    """
    frames = traceback.extract_tb(trace)
    inside = [index for index, frame in enumerate(frames) if _is_fxprune(frame.filename)]
    if not inside:
        return "an unknown line"
    last, since_entry = frames[inside[-1]], frames[inside[0] :]
    of_user = [_frame_line(frame) for frame in since_entry if not _is_library(frame.filename)]
    place = f"fxprune/{last.filename.removeprefix(_PACKAGE)}:{last.lineno}"
    return f"{place}, reached from {of_user[-1]}" if of_user else place


def _line_of_caller(trace: TracebackType | None) -> str:
    """Return the innermost line of the user's code, in brackets; empty if there is none."""
    of_user = [frame for frame in traceback.extract_tb(trace) if not _is_library(frame.filename)]
    return f" (at {_frame_line(of_user[-1])})" if of_user else ""


def _frame_line(frame: traceback.FrameSummary) -> str:
    """Return the file and the line of a frame as ``file.py:12``."""
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _is_fxprune(filename: str) -> bool:
    """Tell whether a file belongs to fxprune."""
    return filename.startswith(_PACKAGE)


def _is_library(filename: str) -> bool:
    """Tell whether a file belongs to fxprune, to Python or to an installed package."""
    return _is_fxprune(filename) or filename.startswith((*_LIBRARIES, "<frozen"))
