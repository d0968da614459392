"""Which document comes when: a pure function of (seed, source, epoch, position), the same on any machine.

No generator object and no library RNG, whose streams may change between versions: a key is a BLAKE2b hash of what it
is for, and the i-th number under a key is SplitMix64(key + i) (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

ALL_SOURCES = "all sources"     # the name of the one stream of conversations; no source can have it
_MASK = (1 << 64) - 1


def key64(seed: int, purpose: str, *parts: int | str) -> int:
    """A 64-bit key for `purpose`; any difference in any part gives an unrelated key."""
    text = "\0".join(str(part) for part in (seed, purpose, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def splitmix64(x: np.ndarray) -> np.ndarray:
    """Elementwise hash of uint64 values, uint64 (wrap-around arithmetic)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def unit(key: int, counter: int) -> float:
    """The number of this counter under this key, uniform in [0, 1) with 53 bits."""
    x = (key + counter + 0x9E3779B97F4A7C15) & _MASK        # splitmix64 of one number, ten times as fast as of an array
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((x ^ (x >> 31)) >> 11) / (1 << 53)


def hashed_order(key: int, n: int) -> np.ndarray:
    """(n,) 0..n-1 in the order of their hashes under `key`."""
    hashes = splitmix64(np.arange(n, dtype=np.uint64) + np.uint64(key))
    return np.argsort(hashes, kind="stable")


def permutation(key: int, n: int) -> list[int]:
    """`hashed_order` as a list."""
    return hashed_order(key, n).tolist()


class ShuffledOrder:
    """Each epoch a permutation of the row groups, then of the documents in each row group.

    Positions near each other are in the same row group, so that the lanes together read a shard about once an epoch.
    """

    def __init__(self, seed: int, source: str, group_rows: list[int]):
        self._seed, self._source, self._rows = seed, source, group_rows
        self._starts = [0, *accumulate(group_rows)]
        self._groups = lru_cache(maxsize=4)(self._groups_of)
        self._inside = lru_cache(maxsize=64)(self._inside_of)

    def __len__(self) -> int:
        return self._starts[-1]

    def document(self, epoch: int, position: int) -> int:
        """Ordinal of the document at `position` (0..n-1) of `epoch`."""
        groups, ends = self._groups(epoch)
        at = bisect_right(ends, position)
        group = groups[at]
        start = ends[at] - self._rows[group]
        return self._starts[group] + self._inside(epoch, group)[position - start]

    def _groups_of(self, epoch: int) -> tuple[list[int], list[int]]:
        groups = permutation(key64(self._seed, "row groups", self._source, epoch), len(self._rows))
        return groups, list(accumulate(self._rows[g] for g in groups))

    def _inside_of(self, epoch: int, group: int) -> list[int]:
        return permutation(key64(self._seed, "documents", self._source, epoch, group), self._rows[group])


class FullOrder:
    """Each epoch a permutation of all documents, whatever row group they are in."""

    def __init__(self, seed: int, name: str, n_documents: int):
        self._seed, self._name, self._n = seed, name, n_documents
        self._epoch = lru_cache(maxsize=2)(self._epoch_of)

    def __len__(self) -> int:
        return self._n

    def document(self, epoch: int, position: int) -> int:
        return int(self._epoch(epoch)[position])

    def _epoch_of(self, epoch: int) -> np.ndarray:
        return hashed_order(key64(self._seed, "all documents", self._name, epoch), self._n)


class FileOrder:
    """Documents as they stand in the files: the order of validation."""

    def __init__(self, n_documents: int):
        self._n = n_documents

    def __len__(self) -> int:
        return self._n

    def document(self, epoch: int, position: int) -> int:
        return position


class Order(Protocol):
    def __len__(self) -> int: ...
    def document(self, epoch: int, position: int) -> int: ...


class Part(NamedTuple):
    """A source in a stream: documents of its row groups, and how often each comes in an epoch of the stream."""

    source: str
    group_rows: list[int]
    repeat: int = 1


class StreamOrder:
    """Which document of which source comes when in a stream: the documents of its parts, each as often as `repeat`
    says, are numbered one after the other and put in an order.

    The copies of one document in epoch e of the stream belong to epochs e * repeat, e * repeat + 1, ... of its source.
    """

    def __init__(self, parts: Sequence[Part], order: Order):
        self._order = order
        self._parts = [(part.source, sum(part.group_rows), part.repeat) for part in parts]
        self._starts = [0, *accumulate(n * repeat for _, n, repeat in self._parts)]
        assert self._starts[-1] == len(order), "an order of something else"

    def __len__(self) -> int:
        return self._starts[-1]

    def find(self, epoch: int, position: int) -> tuple[str, int, int]:
        """(source, epoch of the source, ordinal) at `position` (0..n-1) of `epoch` of the stream."""
        number = self._order.document(epoch, position)
        at = bisect_right(self._starts, number) - 1
        source, n, repeat = self._parts[at]
        copy, ordinal = divmod(number - self._starts[at], n)
        return source, epoch * repeat + copy, ordinal


def training_order(seed: int, name: str, parts: Sequence[Part]) -> StreamOrder:
    """The order of a training stream: of one source by row groups, of ALL_SOURCES over single documents."""
    if name == ALL_SOURCES:
        return StreamOrder(parts, FullOrder(seed, name, sum(sum(part.group_rows) * part.repeat for part in parts)))
    (part,) = parts
    return StreamOrder(parts, ShuffledOrder(seed, name, part.group_rows))
