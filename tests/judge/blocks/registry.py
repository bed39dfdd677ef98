"""The tables of blocks: what may stand in a network, what it reads, what it returns, how it is pruned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..source import Signal

ANY = ("image", "tokens", "vector")


@dataclass(frozen=True)
class Block:
    """``write(w, x)`` writes the lines and returns what comes out; one that ``holds`` others takes ``inside`` as third argument."""

    name: str
    write: Callable[..., Any]
    takes: tuple[str, ...] = ANY
    gives: str = ""  # another kind of signal
    keeps: bool = True  # kind and size stay, the width may change
    holds: bool = False
    weight: float = 1.0
    fits: Callable[[Signal], bool] | None = None


BLOCKS: dict[str, Block] = {}
SOURCES: dict[str, Block] = {}
RESULTS: dict[str, Block] = {}
OPTIONS: dict[str, Callable[..., dict[str, Any]]] = {}


def block(*takes: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function into the table of blocks under its own name."""
    return _enter(BLOCKS, takes, settings)


def source(**settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return _enter(SOURCES, (), settings)


def result(*takes: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return _enter(RESULTS, takes, settings)


def options(write: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    OPTIONS[write.__name__] = write
    return write


def _enter(
    table: dict[str, Block], takes: tuple[str, ...], settings: dict[str, Any]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(write: Callable[..., Any]) -> Callable[..., Any]:
        name = write.__name__.strip("_")
        table[name] = Block(name, write, takes or ANY, **settings)
        return write

    return register
