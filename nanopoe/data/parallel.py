"""Units read by several processes, in one order that does not depend on how many.

The units are dealt to LANES lanes: lane j reads the units j, j + LANES, ... A chunk (about a MB of text at most) is
taken of each lane in turn. A process reads whole lanes; where it stands is a place in each lane, small enough for a
journal.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nanopoe.data.filters import Document, WriteOptions, prepare
from nanopoe.data.ingest import Origin, Raw, Unit
from nanopoe.errors import DataError, NanopoeError

LANES = 16
CHUNK_CHARS, CHUNK_ROWS = 1 << 20, 4096
Place = tuple[int, int]                      # the number of a unit, and of the next row in it


@dataclass(frozen=True)
class Cursor:
    """Where reading goes on: the lane whose turn it is, and the place of each lane, None when it has ended."""

    turn: int
    places: tuple[Place | None, ...]

    @classmethod
    def start(cls, units: int) -> Cursor:
        return cls(0, tuple((lane, 0) for lane in range(min(LANES, units))))

    @property
    def alive(self) -> list[int]:
        """Lanes that have not ended, in the order of their turns."""
        lanes = [lane for lane, place in enumerate(self.places) if place is not None]
        return sorted(lanes, key=lambda lane: (lane - self.turn) % len(self.places))

    def after(self, chunk: Chunk) -> Cursor:
        places = list(self.places)
        places[chunk.lane] = chunk.place
        return Cursor((chunk.lane + 1) % len(places), tuple(places))


@dataclass(frozen=True)
class Chunk:
    """Some rows of one unit, ready to be written; `place` is where the lane goes on, `consumed` bytes of input."""

    lane: int
    place: Place | None
    consumed: int
    documents: list[Document]


def chunks(origin: Origin, units: Sequence[Unit], options: WriteOptions, cursor: Cursor,
           workers: int) -> Generator[Chunk]:
    """All chunks from `cursor` on, the same for any number of workers. Raises what reading raises, in its turn."""
    workers = min(workers, len(cursor.alive))
    if workers <= 1:
        yield from _read(origin, units, options, cursor, cursor.alive)
    else:
        yield from _from_processes(origin, units, options, cursor, workers)


def _read(origin: Origin, units: Sequence[Unit], options: WriteOptions, cursor: Cursor,
          lanes: Sequence[int]) -> Iterator[Chunk]:
    """Chunks of `lanes` in turn."""
    readers = deque((lane, _read_lane(origin, units, options, cursor, lane)) for lane in lanes)
    while readers:
        lane, reader = readers.popleft()
        chunk = next(reader)
        yield chunk
        if chunk.place is not None:
            readers.append((lane, reader))


def _read_lane(origin: Origin, units: Sequence[Unit], options: WriteOptions, cursor: Cursor,
               lane: int) -> Iterator[Chunk]:
    number, start = cursor.places[lane] or (0, 0)
    limit = min(CHUNK_CHARS, options.shard_bytes // LANES)           # so that a shard has text of every lane
    while number < len(units):
        follows = (number + LANES, 0) if number + LANES < len(units) else None
        row, before, consumed, chars = start, None, 0, 0
        documents: list[Document] = []
        for item, consumed in origin.read(units[number], start):
            if before is None:
                before = consumed if start else 0            # what went before is counted already
            documents.append(prepare(item, options))
            row, chars = row + 1, chars + (len(item.text) if isinstance(item, Raw) else 0)
            if chars >= limit or len(documents) >= CHUNK_ROWS:
                yield Chunk(lane, (number, row), consumed - before, documents)
                documents, before, chars = [], consumed, 0
        yield Chunk(lane, follows, consumed - (before or 0), documents)
        number, start = number + LANES, 0


def _from_processes(origin: Origin, units: Sequence[Unit], options: WriteOptions, cursor: Cursor,
                    workers: int) -> Iterator[Chunk]:
    """Lanes dealt to processes; each is a chunk ahead, and ends when nobody reads from it any more."""
    context = multiprocessing.get_context("spawn")
    owner = {lane: i % workers for i, lane in enumerate(cursor.alive)}
    pipes, processes = [], []
    try:
        for worker in range(workers):
            ours, theirs = context.Pipe(duplex=False)
            lanes = [lane for lane in cursor.alive if owner[lane] == worker]
            process = context.Process(target=_work, args=(theirs, origin, list(units), options, cursor, lanes),
                                      daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        turns = deque(cursor.alive)
        while turns:
            lane = turns.popleft()
            chunk = _receive(pipes[owner[lane]], processes[owner[lane]])
            assert chunk.lane == lane, "a process reads its lanes in another order"
            yield chunk
            if chunk.place is not None:
                turns.append(lane)
    finally:
        for pipe in pipes:
            pipe.close()
        for process in processes:
            process.terminate()
            process.join()


def _work(pipe: Connection, origin: Origin, units: list[Unit], options: WriteOptions, cursor: Cursor,
          lanes: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)             # the one who reads from us is told, and ends us
    with suppress(BrokenPipeError):                          # it is gone
        try:
            for chunk in _read(origin, units, options, cursor, lanes):
                pipe.send(chunk)
        except NanopoeError as error:
            pipe.send((type(error), error.what, error.where, error.do))


def _receive(pipe: Connection, process: Any) -> Chunk:
    try:
        message = pipe.recv()
    except EOFError:
        process.join()
        raise DataError(f"a reading process ended ({process.exitcode})", "ingest",
                        "start again to go on, with fewer --workers if memory was short") from None
    if isinstance(message, Chunk):
        return message
    kind, what, where, do = message
    raise kind(what, where, do)
