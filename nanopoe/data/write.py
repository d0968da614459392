"""An origin to a dataset folder: train/ and val/ of zstd parquet shards and a manifest.

Documents are read in a fixed order. `shard_bytes` of their text at a time are shuffled and become one shard of each
split, which is committed together with the place where reading goes on: so an ingest that was killed continues, and
its result is that of one which was not, byte for byte, with any number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from nanopoe.data.filters import Document, Piece, WriteOptions
from nanopoe.data.ingest import Origin, Unit
from nanopoe.data.manifest import FORMAT_VERSION, MANIFEST, SPLITS, read_manifest
from nanopoe.data.order import key64, permutation
from nanopoe.data.parallel import Cursor, chunks
from nanopoe.data.partial import HEADER, Partial, Record, partial_of
from nanopoe.errors import DataError, StorageError

GROUP_ROWS, GROUP_TEXT = 1024, 16 << 20        # a row group ends at whichever comes first
EXAMPLES = 20                                  # rows that were left out and are named in the manifest
Progress = Callable[[int, int, int], None]     # documents and bytes of text so far, bytes of input read


def write_dataset(origin: Origin, out: Path, options: WriteOptions, *, units: list[Unit] | None = None,
                  workers: int = 1, progress: Progress = lambda documents, size, read: None) -> Record:
    """Write `out`/train, `out`/val and the manifest, which is returned; go on where an ingest was stopped.

    `units`: those of the origin, if they are listed already. If `out` is what this ingest has written before, nothing
    is done. Raises DataError if `out` is anything else (unless overwrite, and it is a dataset), for a bad row (after
    `skip_bad` of them) or an empty split; ConfigError if it was begun with other options; StorageError if the disk
    refuses.
    """
    units = origin.units() if units is None else units
    header = header_of(origin, units, options)
    if (ready := already_there(out, header, options.overwrite)) is not None:
        return ready
    check_out(out, options.overwrite)
    try:
        with Partial(out, header) as partial:
            if not partial.done:
                _ingest(origin, units, options, workers, partial, progress)
            manifest = read_manifest(partial.folder) if partial.done else _manifest(header, partial, options)
            partial.finish(manifest)
            return manifest
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror or error})", error.filename or out,
                           "free space or choose another --out; start again to go on") from error


def header_of(origin: Origin, units: list[Unit], options: WriteOptions) -> Record:
    """What decides the result: the source, the options, and names and sizes of all inputs."""
    listing = json.dumps([[unit.name, unit.size] for unit in units]).encode()
    decides = {key: value for key, value in asdict(options).items() if key not in ("skip_bad", "overwrite")}
    sizes = [unit.size for unit in units]
    return {"format_version": FORMAT_VERSION, "source": origin.source, "options": decides,
            "inputs": {"units": len(units), "bytes": None if None in sizes else sum(s or 0 for s in sizes),
                       "digest": hashlib.sha256(listing).hexdigest()}}


def already_there(out: Path, header: Record, overwrite: bool) -> Record | None:
    """The manifest of `out` if it is what `header` describes and need not be written again."""
    if overwrite or not (out / MANIFEST).is_file() or partial_of(out).exists():
        return None
    try:
        manifest = read_manifest(out)
    except DataError:
        return None
    return manifest if all(manifest.get(key) == header[key] for key in HEADER) else None


def check_out(out: Path, overwrite: bool) -> None:
    """DataError unless `out` is missing, empty, or a dataset, with nothing beside it, that may be overwritten."""
    if out.exists() and not out.is_dir():
        raise DataError("is not a folder", out, "choose another --out")
    try:
        if not out.exists() or not any(out.iterdir()):
            return
    except OSError as error:
        raise StorageError(f"cannot be read ({error.strerror})", out, "choose another --out") from error
    if not overwrite:
        raise DataError("is not empty", out, "choose another --out or pass --overwrite")
    if not (out / MANIFEST).is_file():
        raise DataError(f"has no {MANIFEST}, so it is no dataset and will not be deleted", out, "choose another --out")
    others = sorted(path.name for path in out.iterdir() if path.name not in (MANIFEST, *SPLITS))
    if others:
        raise DataError(f"also holds {', '.join(others[:5])}, which would be lost", out,
                        "move that elsewhere, or choose another --out")


@dataclass
class _Tally:
    """What has been counted since the ingest began; part of every journal record, so it survives a kill."""

    rows: int = 0
    documents: int = 0
    blank_pieces: int = 0
    text_bytes: int = 0
    pieces: int = 0
    input_bytes: int = 0
    hashes: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bad: dict[str, int] = field(default_factory=dict)
    left_out: list[dict[str, str]] = field(default_factory=list)

    def leave_out(self, document: Document, reason: str, counts: dict[str, int], detail: str = "") -> None:
        counts[reason] = counts.get(reason, 0) + 1
        if len(self.left_out) < EXAMPLES:
            self.left_out.append({"where": document.where, "reason": reason + detail})


def _ingest(origin: Origin, units: list[Unit], options: WriteOptions, workers: int, partial: Partial,
            progress: Progress) -> None:
    """Read to the end or the byte limit, a commit after each segment."""
    last = partial.records[-1] if partial.records else None
    tally, cursor = _Tally(), Cursor.start(len(units))
    if last is not None:
        if last["cursor"] is None:
            return
        tally = _Tally(**last["tally"])
        cursor = Cursor(last["cursor"][0], tuple(p and (p[0], p[1]) for p in last["cursor"][1]))
    keep = _Keep(options, origin.label, tally, partial.hashes() if options.dedup else set())
    segment: list[Piece] = []
    size = 0
    with closing(chunks(origin, units, options, cursor, workers)) as stream:
        for chunk in stream:
            cursor = cursor.after(chunk)
            tally.input_bytes += chunk.consumed
            for piece in keep.pieces(chunk.documents):
                segment.append(piece)
                size += piece.size
            progress(tally.pieces, tally.text_bytes, tally.input_bytes)
            if keep.full:
                break
            if size >= options.shard_bytes and cursor.alive:
                _commit(segment, options, tally, keep, partial, cursor)
                segment, size = [], 0
    _commit(segment, options, tally, keep, partial, None)


class _Keep:
    """What only one who sees all documents in order can decide: duplicates, the byte limit, too many bad rows."""

    def __init__(self, options: WriteOptions, label: str, tally: _Tally, hashes: set[bytes]):
        self.options, self.label, self.tally, self.hashes = options, label, tally, hashes
        self.new_hashes = bytearray()
        self.full = False

    def pieces(self, documents: list[Document]) -> Iterator[Piece]:
        tally, limit = self.tally, self.options.max_bytes
        for document in documents:
            tally.rows += 1
            if self._left_out(document):
                continue
            tally.documents += 1
            tally.blank_pieces += document.blank
            for piece in document.pieces:
                if limit is not None and tally.text_bytes + piece.size > limit:
                    self.full = True
                    return
                tally.text_bytes += piece.size
                tally.pieces += 1
                yield piece

    def _left_out(self, document: Document) -> bool:
        """Whether it is left out, and counted as such; DataError if it is bad and no more may be."""
        tally = self.tally
        if document.bad is not None:
            allowed = self.options.skip_bad
            if sum(tally.bad.values()) >= allowed:
                raise document.bad.error(self.label, f"; --skip-bad {allowed} is used up" if allowed else
                                         ", or leave out at most N such rows with --skip-bad N")
            tally.leave_out(document, document.bad.reason, tally.bad, document.bad.detail)
            return True
        reason = document.skipped
        if reason is None and self.options.dedup and document.digest in self.hashes:
            reason = "duplicate"
        if reason is not None:
            tally.leave_out(document, reason, tally.skipped)
            return True
        if self.options.dedup:
            self.hashes.add(document.digest)
            self.new_hashes += document.digest
            tally.hashes += 1
        return False


def _commit(segment: list[Piece], options: WriteOptions, tally: _Tally, keep: _Keep, partial: Partial,
            cursor: Cursor | None) -> None:
    """Shuffle a segment and make it a shard of each split; `cursor` None: nothing more is read."""
    number = len(partial.records)
    order = permutation(key64(options.seed, "pool", number), len(segment))
    shards = {}
    for split in SPLITS:
        pieces = [segment[i] for i in order if segment[i].split == split]
        if pieces:
            content = shard_bytes(pieces, options.column)
            shards[split] = ({"name": f"shard_{number:05d}.parquet", "rows": len(pieces),
                              "text_bytes": sum(piece.size for piece in pieces), "bytes": len(content),
                              "sha256": hashlib.sha256(content).hexdigest()}, content)
    record = {"cursor": None if cursor is None else [cursor.turn, cursor.places], "hashes": tally.hashes,
              "tally": asdict(tally)}
    partial.commit(shards, bytes(keep.new_hashes), record)
    keep.new_hashes.clear()


def shard_bytes(pieces: list[Piece], column: str) -> bytes:
    """A parquet file of these texts: zstd, page checksums, row groups that a reader can hold."""
    schema = pa.schema([pa.field(column, pa.string(), nullable=False)])
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=False, write_page_checksum=True) as writer:
        for group in _groups(pieces):
            writer.write_table(pa.table([pa.array(group, pa.string())], schema))
    return sink.getvalue().to_pybytes()


def _groups(pieces: list[Piece]) -> Iterator[list[str]]:
    group: list[str] = []
    size = 0
    for piece in pieces:
        group.append(piece.text)
        size += piece.size
        if len(group) >= GROUP_ROWS or size >= GROUP_TEXT:
            yield group
            group, size = [], 0
    if group:
        yield group


def _manifest(header: Record, partial: Partial, options: WriteOptions) -> Record:
    """Nothing in it depends on when, where, or in how many goes it was written."""
    records, tally = partial.records, partial.records[-1]["tally"]
    splits = {}
    for split in SPLITS:
        shards = [record["shards"][split] for record in records if split in record["shards"]]
        splits[split] = {"documents": sum(shard["rows"] for shard in shards),
                         **{key: sum(shard[key] for shard in shards) for key in ("text_bytes", "bytes")},
                         "shards": shards}
    empty = [name for name, split in splits.items() if not split["documents"]]
    if empty:
        partial.records.clear()                              # of no use with these options, so it is not kept
        raise DataError(f"no document for {' and '.join(empty)}", "the documents read",
                        "give more documents, or cut them smaller with --max-chars, or change --val-percent")
    counts = {key: tally[key] for key in ("rows", "documents", "blank_pieces", "skipped", "bad", "left_out")}
    return {**header, "column": options.column, "counts": counts, "splits": splits}
