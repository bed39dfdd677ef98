"""Scores on disk, so that an interrupted measurement goes on where it stopped."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from fxprune.common.description import describe, digest_of
from fxprune.errors import ArgumentError
from fxprune.evaluation.scoring import Score

__all__ = ["ScoreCache"]

_SCHEMA = 1
_DENSE = "dense"  # the key of the score of the model with all its units
_CLOSE = 1e-3  # two scores of the dense model are the same score if they differ by less, relative


class ScoreCache:
    """Scores of one model's pruned versions, by key.

    The file is written after each score, completely or not at all. It belongs to one model, with
    its weights, and to one score function. What a function does is not known: it is recognised by
    its name, and by the score that it gives the dense model.

    Parameters
    ----------
    path:
        The JSON file; None keeps the scores in memory alone.
    model:
        The dense model.
    score:
        The function that scores.

    Raises
    ------
    ArgumentError
        If the file cannot be read, is damaged, or belongs to another model or score.
    """

    def __init__(self, path: Path | None, model: nn.Module, score: Score) -> None:
        self._path = path
        self._about = {
            "schema": _SCHEMA,
            "model": f"{type(model).__name__} {digest_of(model)}",
            "score": describe(score),
        }
        self._scores = {} if path is None else self._read(path)

    def score(self, key: str, compute: Callable[[], float]) -> float:
        """Return the score of this key, computed and written down if it is not known."""
        if key not in self._scores:
            self._scores[key] = compute()
            self._write()
        return self._scores[key]

    def dense_score(self, compute: Callable[[], float]) -> float:
        """Return the score of the dense model.

        It is always computed, to see that it is still what the file says.

        Raises
        ------
        ArgumentError
            If it is not: then all scores in the file may be others by now.
        """
        found = compute()
        known = self.score(_DENSE, lambda: found)
        if not math.isclose(found, known, rel_tol=_CLOSE):
            raise ArgumentError(
                f"{self._path} says that the score of the model with all its units is {known}, "
                f"and now it is {found}: the score or its data have changed, or it is random. "
                "Give another cache=."
            )
        return known

    def _read(self, path: Path) -> dict[str, float]:
        """Return the scores in the file; none if it is missing."""
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            about = {name: data[name] for name in self._about}
            scores = {str(key): float(score) for key, score in data["scores"].items()}
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise _disk_error(path, error) from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArgumentError(
                f"cache={path} holds no scores ({type(error).__name__}: {error}): give another "
                "file, or delete it."
            ) from error
        self._check(path, about)
        return scores

    def _check(self, path: Path, about: Mapping[str, Any]) -> None:
        """Refuse a file of another model, another score or another version."""
        other = [name for name, value in self._about.items() if about[name] != value]
        if other:
            name = other[0]
            raise ArgumentError(
                f"cache={path} belongs to another {name}: {about[name]}, and this is "
                f"{self._about[name]}. Give another file for each model, weights and score."
            )

    def _write(self) -> None:
        """Write the file, completely or not at all."""
        if self._path is None:
            return
        text = json.dumps({**self._about, "scores": self._scores}, indent=1) + "\n"
        new = self._path.with_name(f".{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with new.open("w", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self._path)
        except OSError as error:
            raise _disk_error(self._path, error) from error


def _disk_error(path: Path, error: OSError) -> ArgumentError:
    """Return the error for a file that cannot be read or written."""
    return ArgumentError(
        f"cache={path}: {error.strerror or error}. Name a file that can be read and written."
    )
