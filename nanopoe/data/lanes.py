"""Lanes: the fixed streams of documents that make the data order independent of the number of ranks.

Lane l of V reads positions l, l+V, l+2V, ... of every stream, mixes the streams by tokens, and packs rows. Its state
is small: a cursor per stream, counts, references to the documents in its buffer, and how far one of them is placed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nanopoe.data.order import Part, StreamOrder, key64, unit
from nanopoe.data.packing import Buffer, Document, Packing, Piece
from nanopoe.data.shards import Source
from nanopoe.errors import DataError

Encode = Callable[[str], np.ndarray]                # a text to its ids (n,), no BOS; called from several threads
MakeDocuments = Callable[[Source, Sequence[tuple[int, int]]], list[Document]]     # of (epoch, ordinal) pairs, in order
JOB_DOCUMENTS = 8               # tokenized by a thread at a time: few, so that none waits long for the first of them
JOBS_AHEAD = 4                  # for each thread, of each stream
MOST_AHEAD = 4096               # documents of a stream, over all lanes of a rank
FIRST_DOCUMENTS = 8             # a buffer begins with so many and grows by one a row: the first row is soon there


@dataclass(frozen=True)
class Tokenize:
    """Texts of a source to documents. `max_tokens` ids of each are kept, None for all; the length is of the whole."""

    encode: Encode
    bos_id: int
    max_tokens: int | None
    seed: int
    case_aug_prob: float

    def __call__(self, source: Source, wanted: Sequence[tuple[int, int]]) -> list[Document]:
        """Documents for (epoch, ordinal) pairs, in their order."""
        documents: dict[int, Document] = {}
        for i in sorted(range(len(wanted)), key=lambda i: wanted[i][1]):      # by row group: each is decoded once
            documents[i] = self._document(source, *wanted[i])
        return [documents[i] for i in range(len(wanted))]

    def _document(self, source: Source, epoch: int, ordinal: int) -> Document:
        text = source.text(ordinal)
        if self.case_aug_prob and not source.code:
            text = recase(text, unit(key64(self.seed, "case", source.name, epoch), ordinal), self.case_aug_prob)
        encoded = self.encode(text)
        length = len(encoded) + 1
        ids = np.empty(min(length, self.max_tokens or length), dtype=np.int32)
        ids[0] = self.bos_id
        ids[1:] = encoded[:len(ids) - 1]
        return Document(ids, length, (source.name, epoch, ordinal))


def recase(text: str, draw: float, prob: float) -> str:
    """Case augmentation (SPEC 8): of a share `prob` of the draws in [0, 1), .6 lower, .2 upper, .2 title case."""
    if draw >= prob:
        return text
    share = draw / prob
    return text.lower() if share < 0.6 else text.upper() if share < 0.8 else text.title()


@dataclass(frozen=True)
class Strand:
    """Sources that are read as one stream, and its weight in the mixture."""

    name: str
    weight: float
    sources: tuple[Source, ...]

    @property
    def parts(self) -> list[Part]:
        return [Part(source.name, source.group_rows, source.repeat) for source in self.sources]

    def __len__(self) -> int:
        return sum(source.n_documents * source.repeat for source in self.sources)


class Stream:
    """The documents of a strand for the lanes of this rank, made ahead by the threads of `pool`, a few in a job.

    What is made ahead is a cache: `cursors` (epoch, index) by lane point behind the last document that `take` handed
    out.
    """

    def __init__(self, strand: Strand, order: StreamOrder, make: MakeDocuments, pool: Executor, threads: int,
                 n_lanes: int, cursors: dict[int, tuple[int, int]], epochs: int | None = None):
        self.weight, self.cursors = strand.weight, cursors
        self._sources = {source.name: source for source in strand.sources}
        self._order, self._make, self._pool, self._n_lanes, self._epochs = order, make, pool, n_lanes, epochs
        self._ahead = dict(cursors)
        self._queues: dict[int, deque[tuple[Future, int, tuple[int, int]]]] = {lane: deque() for lane in cursors}
        self._depth = max(2, -(-JOB_DOCUMENTS * JOBS_AHEAD * threads // len(cursors)))
        self._hungry: list[int] = list(cursors) * self._depth        # lanes, once for every document to be made
        self._order_jobs(1)

    def take(self, lane: int) -> Document | None:
        """The next document of `lane`; None at the end of the last epoch. Raises what making it raised."""
        queue = self._queues[lane]
        if not queue:
            self._deepen()
            self._order_jobs(1)
            if not queue:
                return None
        job, at, self.cursors[lane] = queue.popleft()
        self._hungry.append(lane)
        if len(self._hungry) >= JOB_DOCUMENTS:
            self._order_jobs(JOB_DOCUMENTS)
        return job.result()[at]

    def _deepen(self) -> None:
        """A lane takes more in a row than there was ahead: look further, for all of them."""
        if self._depth * len(self._queues) < MOST_AHEAD:
            self._hungry += list(self._queues) * self._depth
            self._depth *= 2

    def _order_jobs(self, at_least: int) -> None:
        """Start jobs for the hungry lanes, while there are `at_least` so many."""
        while len(self._hungry) >= at_least:
            lanes, self._hungry = self._hungry[:JOB_DOCUMENTS], self._hungry[JOB_DOCUMENTS:]
            wanted: list[tuple[Source, int, int]] = []
            owners: list[tuple[int, tuple[int, int]]] = []
            for lane in lanes:
                found = self._next(lane)
                if found is not None:
                    wanted.append(found)
                    owners.append((lane, self._ahead[lane]))
            if wanted:
                job = self._pool.submit(make_all, self._make, wanted)
                for at, (lane, cursor) in enumerate(owners):
                    self._queues[lane].append((job, at, cursor))

    def _next(self, lane: int) -> tuple[Source, int, int] | None:
        """(source, epoch, ordinal) of the next document to make for `lane`, moving its look-ahead cursor."""
        epoch, index = self._ahead[lane]
        if lane + index * self._n_lanes >= len(self._order):
            epoch, index = epoch + 1, 0
        if self._epochs is not None and epoch >= self._epochs:
            return None
        self._ahead[lane] = (epoch, index + 1)
        name, source_epoch, ordinal = self._order.find(epoch, lane + index * self._n_lanes)
        return self._sources[name], source_epoch, ordinal


def make_all(make: MakeDocuments, wanted: Sequence[tuple[Source, int, int]]) -> list[Document]:
    """Documents of several sources for (source, epoch, ordinal) triples, in their order."""
    documents: dict[int, Document] = {}
    for source in dict.fromkeys(source for source, _, _ in wanted):
        at = [i for i, (s, _, _) in enumerate(wanted) if s is source]
        documents.update(zip(at, make(source, [wanted[i][1:] for i in at]), strict=True))
    return [documents[i] for i in range(len(wanted))]


@dataclass
class Counts:
    """What a lane has done. `read` tokens of documents, `placed` ones in rows, `cropped` ones lost, `padded` places;
    `truncated` documents, which had lost their front before they came into a buffer, those tokens cropped too."""

    rows: int = 0
    documents: int = 0
    pieces: int = 0
    read: int = 0
    placed: int = 0
    cropped: int = 0
    padded: int = 0
    truncated: int = 0


@dataclass
class Lane:
    """Packs rows from a mixture of streams. The stream of the next document is the one furthest behind its weight.

    `tokens` counts, by stream, what went into rows and what the buffer can still give; what is cropped is taken back,
    so that the shares hold for the tokens trained on, not for the tokens read. `placed` counts, by source, what went
    into rows.
    """

    number: int
    streams: dict[str, Stream]
    stream_of: dict[str, str]                      # by source
    packing: Packing
    buffer_documents: int
    bos_id: int
    tokens: dict[str, int]
    placed: dict[str, int]
    counts: Counts = field(default_factory=Counts)
    buffer: Buffer = field(default_factory=Buffer)
    _row_len: int = 0
    _target: int = 0                               # documents that the buffer should hold for this row
    _position: dict[str, Any] | None = None

    def fill(self, row: np.ndarray) -> list[Piece] | None:
        """Write the next row (T+1,) of this lane; its pieces, or None if the documents ran out."""
        self._position, self._row_len = None, len(row)
        self._target = (min(self.buffer_documents, FIRST_DOCUMENTS + self.counts.rows) if self.packing.chooses else 1)
        pieces = self.packing.fill(row, self.buffer, self._refill, self.bos_id)
        if pieces is not None:
            self._count(pieces)
        return pieces

    def _count(self, pieces: list[Piece]) -> None:
        counts, total = self.counts, 0
        for document, offset, taken in pieces:
            total += taken
            self.placed[document.source] += taken
            if not offset:
                counts.documents += 1
        counts.rows += 1
        counts.pieces += len(pieces)
        counts.placed += total
        if not self.packing.keeps_rest:            # else the places left are those of a second BOS
            counts.padded += self._row_len - total
            for document, _, taken in pieces:
                counts.cropped += document.whole - taken
                counts.truncated += document.dropped > 0
                self.tokens[self.stream_of[document.source]] -= self._worth(document) - taken

    def _refill(self) -> None:
        while len(self.buffer) < self._target:
            document = self._next_document()
            if document is None:
                return
            self.counts.read += document.whole
            self.tokens[self.stream_of[document.source]] += self._worth(document)
            self.buffer.add(document)

    def _worth(self, document: Document) -> int:
        """Tokens of a document that can come into rows."""
        return document.length if self.packing.keeps_rest else min(document.length, self._row_len)

    def _next_document(self) -> Document | None:
        streams, tokens = self.streams, self.tokens
        first = min(streams, key=lambda name: tokens[name] / streams[name].weight)     # a tie: the first in the config
        document = streams[first].take(self.number)
        if document is None:                                                           # an end: of validation only
            for name in sorted(streams, key=lambda name: tokens[name] / streams[name].weight)[1:]:
                document = document or streams[name].take(self.number)
        return document

    def position(self) -> dict[str, Any]:
        """The state of this lane as JSON types. It is shared between positions and must not be changed."""
        if self._position is None:
            rest = self.buffer.rest
            self._position = {
                "cursors": {name: stream.cursors[self.number] for name, stream in self.streams.items()},
                "tokens": self.tokens.copy(), "placed": self.placed.copy(), "counts": vars(self.counts).copy(),
                "rest": rest and [*rest[0].ref, rest[1]], "buffer": self.buffer.refs()}
        return self._position


def check_lanes(strands: Iterable[Strand], n_lanes: int) -> None:
    """DataError if some lane would have no document of some stream."""
    for strand in strands:
        if len(strand) < n_lanes:
            raise DataError(f"{len(strand)} documents cannot feed {n_lanes} lanes", f"source '{strand.name}'",
                            f"add data or set data.lanes to at most {len(strand)}")
