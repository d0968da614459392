"""Lanes: the fixed streams of documents that make the data order independent of the number of ranks.

Lane l of V reads positions l, l+V, l+2V, ... of every source, mixes the sources by tokens, and packs rows. Its state
is three small things: a cursor per source, tokens per source, and references to the documents in its buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from nanopoe.data.order import key64, unit
from nanopoe.data.packing import Buffer, Document, fill_row
from nanopoe.data.shards import Source
from nanopoe.errors import DataError

EncodeBatch = Callable[[list[str], int], Sequence[Sequence[int]]]      # (texts, threads) -> ids, no BOS
LOOKAHEAD = 128                 # documents tokenized in one call, over all lanes: enough work for the threads


class Order(Protocol):
    def __len__(self) -> int: ...
    def document(self, epoch: int, position: int) -> int: ...


@dataclass(frozen=True)
class Tokenize:
    """Texts of a source to documents. `max_tokens` (T+1) ids of each are kept; the length is of the whole."""

    encode_batch: EncodeBatch
    bos_id: int
    max_tokens: int
    seed: int
    case_aug_prob: float
    threads: int = 1

    def __call__(self, source: Source, wanted: Sequence[tuple[int, int]]) -> list[Document]:
        """Documents for (epoch, ordinal) pairs, in their order."""
        texts = [""] * len(wanted)
        for i in sorted(range(len(wanted)), key=lambda i: wanted[i][1]):      # by row group: each is decoded once
            texts[i] = self._cased(source, *wanted[i])
        encoded = self.encode_batch(texts, self.threads)
        return [Document(np.array([self.bos_id, *ids[:self.max_tokens - 1]], dtype=np.int32), len(ids) + 1,
                         [source.name, epoch, ordinal])
                for (epoch, ordinal), ids in zip(wanted, encoded, strict=True)]

    def _cased(self, source: Source, epoch: int, ordinal: int) -> str:
        text = source.text(ordinal)
        if self.case_aug_prob == 0 or source.code:
            return text
        return recase(text, unit(key64(self.seed, "case", source.name, epoch), ordinal), self.case_aug_prob)


def recase(text: str, draw: float, prob: float) -> str:
    """Case augmentation (SPEC 8): of a share `prob` of the draws in [0, 1), .6 lower, .2 upper, .2 title case."""
    if draw >= prob:
        return text
    share = draw / prob
    return text.lower() if share < 0.6 else text.upper() if share < 0.8 else text.title()


class Stream:
    """The documents of one source for the lanes of this rank, tokenized in batches.

    What is tokenized ahead is a cache: `cursors` point behind the last document that `take` handed out.
    """

    def __init__(self, source: Source, order: Order, tokenize: Tokenize, n_lanes: int,
                 cursors: dict[int, list[int]], epochs: int | None = None):
        self.source, self.cursors = source, cursors
        self._order, self._tokenize, self._n_lanes, self._epochs = order, tokenize, n_lanes, epochs
        self._ahead: dict[int, list[int]] = {lane: list(cursor) for lane, cursor in cursors.items()}
        self._queues: dict[int, deque[tuple[Document, list[int]]]] = {lane: deque() for lane in cursors}
        self._depth = max(4, LOOKAHEAD // len(cursors))

    def take(self, lane: int) -> Document | None:
        """The next document of `lane`; None at the end of the last epoch."""
        if not self._queues[lane]:
            self._top_up()
            if not self._queues[lane]:
                return None
        document, self.cursors[lane] = self._queues[lane].popleft()
        return document

    def _top_up(self) -> None:
        wanted: list[tuple[int, int]] = []
        owners: list[tuple[int, list[int]]] = []
        for lane, queue in self._queues.items():
            for _ in range(self._depth - len(queue)):
                at = self._next(lane)
                if at is None:
                    break
                wanted.append(at)
                owners.append((lane, list(self._ahead[lane])))
        for (lane, cursor), document in zip(owners, self._tokenize(self.source, wanted), strict=True):
            self._queues[lane].append((document, cursor))

    def _next(self, lane: int) -> tuple[int, int] | None:
        """(epoch, ordinal) of the next document to tokenize for `lane`, moving its look-ahead cursor."""
        epoch, index = self._ahead[lane]
        if lane + index * self._n_lanes >= len(self._order):
            epoch, index = epoch + 1, 0
        if self._epochs is not None and epoch >= self._epochs:
            return None
        self._ahead[lane] = [epoch, index + 1]
        return epoch, self._order.document(epoch, lane + index * self._n_lanes)


@dataclass
class Lane:
    """Packs rows from a mixture of streams. The source of the next document is the one furthest behind its weight.

    `tokens` counts, by source, what went into rows and what the buffer can still give; a cropped tail is taken back,
    so that the shares hold for the tokens trained on, not for the tokens read.
    """

    number: int
    streams: dict[str, Stream]
    buffer_documents: int
    row_len: int
    tokens: dict[str, int]
    buffer: Buffer = field(default_factory=Buffer)
    _position: dict[str, Any] | None = None

    def fill(self, row: np.ndarray) -> list[tuple[Document, int]] | None:
        """Write the next row (row_len,) of this lane; its pieces, or None if the documents ran out."""
        self._position = None
        pieces = fill_row(row, self.buffer, self._refill)
        for document, taken in pieces or ():
            self.tokens[document.source] -= min(document.length, self.row_len) - taken
        return pieces

    def _refill(self) -> None:
        while len(self.buffer) < self.buffer_documents:
            document = self._next_document()
            if document is None:
                return
            self.tokens[document.source] += min(document.length, self.row_len)
            self.buffer.add(document)

    def _next_document(self) -> Document | None:
        by_deficit = sorted(self.streams, key=lambda name: self.tokens[name] / self.streams[name].source.weight)
        for name in by_deficit:                              # the sort is stable: a tie goes to the first in the config
            document = self.streams[name].take(self.number)
            if document is not None:
                return document
        return None

    def position(self) -> dict[str, Any]:
        """The state of this lane as JSON types. It is shared between positions and must not be changed."""
        if self._position is None:
            cursors = {name: stream.cursors[self.number] for name, stream in self.streams.items()}
            self._position = {"cursors": cursors, "tokens": dict(self.tokens),
                              "buffer": [document.ref for document in self.buffer]}
        return self._position


def check_lanes(sources: Iterable[Source], n_lanes: int) -> None:
    """DataError if some lane would have no document of some source."""
    for source in sources:
        if source.n_documents < n_lanes:
            raise DataError(f"{source.n_documents} documents cannot feed {n_lanes} lanes", f"source '{source.name}'",
                            f"add data or set data.lanes to at most {source.n_documents}")
