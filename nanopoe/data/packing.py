"""Best-fit packing of documents into full rows of token ids, no padding. Pure: a buffer in, a row out.

A row is filled with the largest buffered document that fits whole in what is left; when none fits, the shortest one is
cropped to fill the row exactly and its rest is dropped (the rule of nanochat). Every piece therefore is a prefix of a
document, and every document starts with BOS.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenized document. `ids` int32, BOS first, may stop at the row length: more can never be used."""

    ids: np.ndarray
    length: int                # tokens of the whole document, BOS included
    ref: list                  # [source, epoch, ordinal]: enough to read and tokenize it again

    @property
    def source(self) -> str:
        return self.ref[0]


class Buffer:
    """Documents to choose from. Iterates in order of arrival; equals in length leave in that order."""

    def __init__(self) -> None:
        self._by_length: list[tuple[int, int]] = []          # (length, arrival), sorted
        self._by_arrival: dict[int, Document] = {}
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._by_length)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._by_arrival.values())

    def add(self, document: Document) -> None:
        insort(self._by_length, (document.length, self._arrivals))
        self._by_arrival[self._arrivals] = document
        self._arrivals += 1

    def take(self, space: int) -> Document:
        """Remove and return what best fills `space` tokens: the largest that fits, else the shortest."""
        at = bisect_right(self._by_length, (space, self._arrivals))
        if at > 0:                                           # the oldest of the largest that fit
            at = bisect_left(self._by_length, (self._by_length[at - 1][0], -1))
        _, arrival = self._by_length.pop(at)
        return self._by_arrival.pop(arrival)


def fill_row(row: np.ndarray, buffer: Buffer, refill: Callable[[], None]) -> list[tuple[Document, int]] | None:
    """Fill `row` (T+1,) in place from `buffer`; `refill` is called before each choice and may add documents.

    Returns the pieces in order, (document, tokens taken); None if the documents ran out before the row was full.
    """
    pieces: list[tuple[Document, int]] = []
    at = 0
    while at < len(row):
        refill()
        if not len(buffer):
            return None
        document = buffer.take(len(row) - at)
        taken = min(document.length, len(row) - at)
        row[at:at + taken] = document.ids[:taken]
        pieces.append((document, taken))
        at += taken
    return pieces
