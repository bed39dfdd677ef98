"""A random network as a line of text: input, blocks, result, and how it is pruned.

``image:3 layer:17 residual:4(norm:8 activation:1) classify:9 channels:2`` names blocks. The number
after each is the seed for the block's own choices, so that the other blocks stay the same when one
is dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class Item:
    """A block: its kind, the seed of its choices, and the blocks inside it."""

    kind: str
    seed: int
    children: tuple[Item, ...] = ()

    def __str__(self) -> str:
        inside = f"({' '.join(map(str, self.children))})" if self.children else ""
        return f"{self.kind}:{self.seed}{inside}"


@dataclass(frozen=True)
class Spec:
    """The input of a network, its blocks in order, its result, and how it is pruned.

    Examples
    --------
    >>> spec = Spec.parse("image:3 layer:17 residual:4(norm:8 activation:1) classify:9 channels:2")
    >>> spec.blocks[1].children
    (Item(kind='norm', seed=8, children=()), Item(kind='activation', seed=1, children=()))
    >>> str(spec)
    'image:3 layer:17 residual:4(norm:8 activation:1) classify:9 channels:2'
    """

    source: Item
    blocks: tuple[Item, ...]
    result: Item
    options: Item

    def __str__(self) -> str:
        return " ".join(map(str, (self.source, *self.blocks, self.result, self.options)))

    @classmethod
    def parse(cls, text: str) -> Spec:
        """Return the spec that prints as ``text``.

        Raises
        ------
        ValueError
            If the text is not a spec.
        """
        words = re.findall(r"[a-z_]+:\d+|[()]|\S+", text)
        items = _items(words)
        if (
            words
            or len(items) < 3
            or str(spec := cls(items[0], items[1:-2], items[-2], items[-1]))
            != " ".join(text.split())
        ):
            raise ValueError(
                f"{text!r} is no spec; one reads 'image:3 layer:17 classify:9 channels:2'"
            )
        return spec

    def without_one(self) -> Iterator[Spec]:
        """Yield all specs with one block less.

        The larger cuts come first: a block is dropped with its children before it is replaced by
        them.
        """
        for blocks in _without_one(self.blocks):
            yield Spec(self.source, blocks, self.result, self.options)


def _items(words: list[str]) -> tuple[Item, ...]:
    found: list[Item] = []
    while words and words[0] != ")":
        kind, _, seed = words.pop(0).partition(":")
        if not seed.isdigit():
            break
        children: tuple[Item, ...] = ()
        if words and words[0] == "(":
            words.pop(0)
            children = _items(words)
            words[:1] = []  # the closing parenthesis
        found.append(Item(kind, int(seed), children))
    return tuple(found)


def _without_one(items: tuple[Item, ...]) -> Iterator[tuple[Item, ...]]:
    for n in reversed(range(len(items))):
        yield (*items[:n], *items[n + 1 :])
    for n, item in enumerate(items):
        if item.children:
            yield (*items[:n], *item.children, *items[n + 1 :])
        for children in _without_one(item.children):
            yield (*items[:n], Item(item.kind, item.seed, children), *items[n + 1 :])


def draw(seed: int) -> Spec:
    """Return the network of this seed."""
    from .blocks import BLOCKS, OPTIONS, RESULTS, SOURCES

    rng = Random(seed)

    def item(kind: str, *children: Item) -> Item:
        return Item(kind, rng.randrange(1000), children)

    def pick(table: dict[str, object], kind: str, keeps: bool) -> str:
        fits = [b for b in table.values() if kind in b.takes and (b.keeps or not keeps)]  # type: ignore[attr-defined]
        return rng.choices(fits, [b.weight for b in fits])[0].name  # type: ignore[attr-defined]

    def run(kind: str, count: int, depth: int, keeps: bool) -> tuple[tuple[Item, ...], str]:
        items: list[Item] = []
        for _ in range(count):
            name = pick(BLOCKS, kind, keeps)
            while BLOCKS[name].holds and depth == 0:
                name = pick(BLOCKS, kind, keeps)
            inside = run(kind, rng.randint(1, 2), depth - 1, True)[0] if BLOCKS[name].holds else ()
            items.append(item(name, *inside))
            kind = BLOCKS[name].gives or kind
        return tuple(items), kind

    source = rng.choices(list(SOURCES), [SOURCES[name].weight for name in SOURCES])[0]
    kind = SOURCES[source].gives
    blocks, kind = run(kind, rng.randint(1, 6), 2, False)
    # something to prune, whatever the later blocks pin
    first = (item("layer"), item("layer"))
    return Spec(
        item(source),
        (*first, *blocks),
        item(pick(RESULTS, kind, False)),
        item(rng.choice(list(OPTIONS))),
    )
