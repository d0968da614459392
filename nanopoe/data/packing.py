"""Packing: documents into rows of exactly T+1 tokens. Pure: a buffer in, a row out.

bestfit_crop   the largest buffered document that fits whole; when none fits, the shortest is cropped (nanochat's rule)
bestfit_split  the oldest begins the row, then the largest that fits; when none fits, the oldest is cut and goes on in
               the next row behind a BOS of its own: no token is lost
concat         documents in the order they are read, one endless stream cut into rows; BOS where a document begins
bestfit_pad    for conversations: the oldest, then the largest that fit; what is left of the row is masked
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

# Who fits leaves early, so long documents would pile up among the candidates. bestfit_split therefore looks at the
# oldest 1/8 of the buffer only: the other 7/8 are as they come.
CANDIDATES = 8


@dataclass(frozen=True, slots=True)
class Document:
    """A tokenized document. `ids` int32, BOS first, ~id for a token that is no target; the first T+1 are enough for a
    packing that keeps no rest."""

    ids: np.ndarray
    length: int                # tokens that can be placed, BOS included
    ref: Sequence[Any]         # source, epoch, ordinal: enough to read and tokenize it again
    dropped: int = 0           # tokens left out when it was made: the front of a conversation that is too long

    @property
    def whole(self) -> int:
        """Tokens of the document as it was found."""
        return self.length + self.dropped

    @property
    def source(self) -> str:
        return self.ref[0]


class Piece(NamedTuple):
    """Tokens [offset, offset + taken) of a document in a row. A BOS put in front of a rest is not among them."""

    document: Document
    offset: int
    taken: int


class Buffer:
    """Documents to choose from, in order of arrival, and the rest of the one that the last row has cut."""

    def __init__(self) -> None:
        self.rest: tuple[Document, int] | None = None        # a document and how much of it is placed
        self._by_length: list[tuple[int, int]] = []          # (length, arrival), sorted
        self._by_arrival: dict[int, Document] = {}
        self._lengths: dict[int, int] = {}                   # by arrival
        self._arrivals = 0
        self._refs: dict[int, Sequence[Any]] = {}            # by arrival

    def __len__(self) -> int:
        return len(self._by_length)

    def __iter__(self) -> Iterator[Document]:
        return iter(self._by_arrival.values())

    def add(self, document: Document) -> None:
        arrival = self._arrivals
        self._arrivals += 1
        insort(self._by_length, (document.length, arrival))
        self._by_arrival[arrival] = document
        self._lengths[arrival] = document.length
        self._refs[arrival] = document.ref

    def take_oldest(self) -> Document:
        return self._take(next(iter(self._lengths)))

    def take_shortest(self) -> Document:
        """The oldest of the shortest."""
        return self._take(self._by_length[0][1])

    def take_largest(self, space: int) -> Document | None:
        """The oldest of the largest that fit `space` tokens; None if none fits."""
        at = bisect_right(self._by_length, (space, self._arrivals))
        if at == 0:
            return None
        at = bisect_left(self._by_length, (self._by_length[at - 1][0], -1))
        return self._take(self._by_length[at][1])

    def take_largest_of_old(self, space: int) -> Document | None:
        """As `take_largest`, of the oldest 1/CANDIDATES."""
        if self._by_length and self._by_length[0][0] > space:
            return None
        best, longest = -1, 0
        for arrival, length in islice(self._lengths.items(), max(1, len(self._lengths) // CANDIDATES)):
            if longest < length <= space:
                best, longest = arrival, length
        return self._take(best) if best >= 0 else None

    def refs(self) -> list[Sequence[Any]]:
        """References to the documents in order of arrival."""
        return list(self._refs.values())

    def _take(self, arrival: int) -> Document:
        document = self._by_arrival.pop(arrival)
        del self._lengths[arrival], self._refs[arrival]
        del self._by_length[bisect_left(self._by_length, (document.length, arrival))]
        return document


# A packing fills `row` (T+1,) in place and returns its pieces in order; None if the documents ran out before it was
# full. `refill` is called before each choice and may add documents.
Fill = Callable[[np.ndarray, Buffer, Callable[[], None], int], list[Piece] | None]


def bestfit_crop(row: np.ndarray, buffer: Buffer, refill: Callable[[], None], bos_id: int) -> list[Piece] | None:
    """Every piece is a prefix of its document; only the last of a row is cropped."""
    pieces: list[Piece] = []
    at = 0
    while at < len(row):
        refill()
        if not len(buffer):
            return None
        document = buffer.take_largest(len(row) - at) or buffer.take_shortest()
        at = _put(row, at, document, 0, pieces)
    return pieces


def bestfit_split(row: np.ndarray, buffer: Buffer, refill: Callable[[], None], bos_id: int) -> list[Piece] | None:
    """Every token of every document once; a rest comes next, behind BOS."""
    pieces: list[Piece] = []
    at = 0
    if buffer.rest is not None:
        row[0] = bos_id
        at = _go_on(row, 1, buffer, pieces)
    while at < len(row):
        refill()
        if not len(buffer):
            return None
        document = (buffer.take_largest_of_old(len(row) - at) if at else None) or buffer.take_oldest()
        at = _put(row, at, document, 0, pieces)
    _keep_rest(buffer, pieces[-1])
    return pieces


def concat(row: np.ndarray, buffer: Buffer, refill: Callable[[], None], bos_id: int) -> list[Piece] | None:
    """Every token of every document once and in order; a row begins where the one before ended."""
    pieces: list[Piece] = []
    at = 0
    if buffer.rest is not None:
        at = _go_on(row, 0, buffer, pieces)
    while at < len(row):
        refill()
        if not len(buffer):
            return None
        at = _put(row, at, buffer.take_oldest(), 0, pieces)
    _keep_rest(buffer, pieces[-1])
    return pieces


def bestfit_pad(row: np.ndarray, buffer: Buffer, refill: Callable[[], None], bos_id: int) -> list[Piece] | None:
    """Whole documents, padded with ~bos_id to the end of the row; one longer than the row, which Render makes none of,
    is cut to it."""
    pieces: list[Piece] = []
    at = 0
    while at < len(row):
        refill()
        if at == 0 and not len(buffer):
            return None
        document = buffer.take_largest(len(row) - at) if at else buffer.take_oldest()
        if document is None:
            break
        at = _put(row, at, document, 0, pieces)
    row[at:] = ~bos_id
    return pieces


@dataclass(frozen=True)
class Packing:
    """How rows are filled. `keeps_rest`: what a row cuts comes in the next one, else it is lost. `chooses`: among
    buffered documents, else they come as they are read."""

    fill: Fill
    keeps_rest: bool
    chooses: bool


PACKINGS = {
    "bestfit_crop": Packing(bestfit_crop, keeps_rest=False, chooses=True),
    "bestfit_split": Packing(bestfit_split, keeps_rest=True, chooses=True),
    "concat": Packing(concat, keeps_rest=True, chooses=False),
    "bestfit_pad": Packing(bestfit_pad, keeps_rest=False, chooses=True),
}


def document_ids(inputs: torch.Tensor, bos_id: int) -> torch.Tensor:
    """(B, T) token ids -> (B, T) int64: 0, 1, ... counts the pieces of each row, which begin with BOS.

    Tokens see each other only where these are equal. With concat the first piece of a row may lack its BOS.
    """
    starts = (inputs == bos_id).to(torch.int64)
    return starts.cumsum(dim=1) - starts[:, :1]


def _put(row: np.ndarray, at: int, document: Document, offset: int, pieces: list[Piece]) -> int:
    """Place what fits of `document` from `offset` on; returns where the row goes on."""
    taken = min(document.length - offset, len(row) - at)
    row[at:at + taken] = document.ids[offset:offset + taken]
    pieces.append(Piece(document, offset, taken))
    return at + taken


def _go_on(row: np.ndarray, at: int, buffer: Buffer, pieces: list[Piece]) -> int:
    """Place what fits of the rest; returns where the row goes on."""
    assert buffer.rest is not None
    document, offset = buffer.rest
    buffer.rest = None
    return _put(row, at, document, offset, pieces)


def _keep_rest(buffer: Buffer, last: Piece) -> None:
    end = last.offset + last.taken
    if end < last.document.length:
        buffer.rest = (last.document, end)
