"""A source: a folder of parquet shards with a string column, read by document ordinal from any thread.

Nothing a file claims about itself is trusted with memory: a row group is decoded in batches so small that even a
column of equal huge strings behind one dictionary entry stays within the budget. Every defect is a DataError that
names the shard, the row group and the row.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanopoe.data.manifest import check_manifest
from nanopoe.errors import DataError

COLUMN, CONVERSATION = "text", "conversation"
GROUP_BYTES = 256 << 20        # most decoded text of one row group
CACHE_BYTES = 512 << 20        # decoded row groups a source keeps
SHUFFLED_CACHE_BYTES = 2 << 30  # the same where documents come in any order: conversations, all of which should fit
GROUP_ROWS = 1 << 22           # most documents of one row group
BATCH_ROWS = 1024
FOOTER_BYTES = 64 << 20        # most of a footer: what its sizes and statistics take is multiplied when it is parsed
_REWRITE = "write the folder again with scripts.prepare_data"
_BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, MemoryError, OverflowError)    # of a damaged file


@dataclass(frozen=True)
class Shard:
    """One parquet file: bytes on disk, documents of each row group, SHA-256 (hex) of the footer.

    The footer holds offsets, sizes and statistics of everything, so another file hardly ever has the same.
    """

    path: Path
    size: int
    group_rows: tuple[int, ...]
    footer: str

    @property
    def rows(self) -> int:
        return sum(self.group_rows)


class Source:
    """Documents 0..n-1: rows of the shards in name order. `repeat`, of conversations: how often each is in an epoch."""

    def __init__(self, name: str, shards: list[Shard], weight: float = 1.0, code: bool = False,
                 column: str = COLUMN, group_bytes: int = GROUP_BYTES, cache_bytes: int = CACHE_BYTES,
                 repeat: int = 1):
        self.name, self.shards, self.weight, self.code, self.column = name, shards, weight, code, column
        self.repeat = repeat
        self._group_bytes, self._cache_bytes = group_bytes, cache_bytes
        self._groups = [(shard, g) for shard in shards for g in range(len(shard.group_rows))]
        self.group_rows = [shard.group_rows[g] for shard, g in self._groups]
        self.group_starts = [0, *accumulate(self.group_rows)]
        self._cache: OrderedDict[int, pa.Array] = OrderedDict()
        self._reading = threading.Lock()

    @property
    def n_documents(self) -> int:
        return self.group_starts[-1]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of names, rows, sizes and footers of the shards: quick, and changes when a file does."""
        listing = [[shard.path.name, shard.group_rows, shard.size, shard.footer] for shard in self.shards]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def text(self, document: int) -> str:
        """The document with this ordinal. Near in memory if its row group was read lately."""
        if not 0 <= document < self.n_documents:
            raise DataError(f"no document {document}, there are {self.n_documents}", self.name)
        group = bisect_right(self.group_starts, document) - 1
        with self._reading:
            decoded = self._decoded(group)
        return decoded[document - self.group_starts[group]].as_py()

    def texts(self) -> Iterator[str]:
        """All documents in file order, a bounded batch at a time."""
        for shard, group in self._groups:
            for batch in read_group(shard, group, self.column):
                yield from batch.to_pylist()

    def _decoded(self, group: int) -> pa.Array:
        if group in self._cache:
            self._cache.move_to_end(group)
            return self._cache[group]
        shard, index = self._groups[group]
        batches, size = [], 0
        for batch in read_group(shard, index, self.column, self._group_bytes):
            size += batch.nbytes
            if size > self._group_bytes:
                raise DataError(f"decodes to more than {self._group_bytes >> 20} MB of text",
                                f"{shard.path} row group {index}", _REWRITE)
            batches.append(batch)
        decoded = pa.concat_arrays(batches)
        while self._cache and sum(a.nbytes for a in self._cache.values()) + decoded.nbytes > self._cache_bytes:
            self._cache.popitem(last=False)
        self._cache[group] = decoded
        return decoded


def open_source(name: str, folder: Path | str, files: str | None = None, *, weight: float = 1.0, code: bool = False,
                column: str = COLUMN, repeat: int = 1, cache_bytes: int = CACHE_BYTES) -> Source:
    """List and check the shards of `folder` (footers only, no text is read), also against its manifest if it has one.

    Raises DataError for a missing or empty folder, a damaged footer, a missing or non-string column, no rows, shards
    that are not those of the manifest.
    """
    folder, pattern = Path(folder), files or "*.parquet"
    if not folder.is_dir():
        raise DataError("no such folder", folder, "make it with scripts.prepare_data or correct the path")
    try:
        paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    except (ValueError, NotImplementedError) as error:       # '**x', an absolute path
        raise DataError(f"{pattern!r} is no pattern of file names", folder, "use one like shard_*.parquet") from error
    if not paths:
        raise DataError(f"no file matches {pattern}", folder, "make shards with scripts.prepare_data")
    check_manifest(folder)
    return Source(name, [open_shard(path, column) for path in paths], weight, code, column,
                  cache_bytes=cache_bytes, repeat=repeat)


def open_shard(path: Path, column: str = COLUMN) -> Shard:
    """Read and check the footer of one file."""
    with _naming(path):
        size, footer = path.stat().st_size, _footer(path)
    with _naming(path), _parquet(path) as file:
        fields = {field.name: field.type for field in file.schema_arrow}
        if column not in fields:
            raise DataError(f"no column '{column}', there are: {', '.join(fields) or 'none'}", path, _REWRITE)
        if not (pa.types.is_string(fields[column]) or pa.types.is_large_string(fields[column])):
            raise DataError(f"column '{column}' is {fields[column]}, not string", path, _REWRITE)
        meta = file.metadata
        rows = tuple(meta.row_group(g).num_rows for g in range(meta.num_row_groups))
    if not sum(rows):
        raise DataError("no documents: the file has no rows", path, "remove the file")
    if min(rows) < 0 or max(rows) > GROUP_ROWS:
        raise DataError(f"a row group with {max(rows):,} documents, at most {GROUP_ROWS:,}", path, _REWRITE)
    return Shard(path, size, rows, footer)


def read_group(shard: Shard, group: int, column: str = COLUMN, budget: int = GROUP_BYTES) -> Iterator[pa.Array]:
    """Checked string arrays of one row group, each at most about `budget` bytes.

    A value cannot be longer than the uncompressed row group it comes from, so budget / size rows fit.
    """
    where = f"{shard.path} row group {group}"
    with _naming(where), _parquet(shard.path) as file:
        if shard.path.stat().st_size != shard.size or _footer(shard.path) != shard.footer:
            raise DataError("changed since it was opened", where, "keep shards as they are while a run reads them")
        # of all columns: asking for one of them ends the process where its statistics are damaged (arrow 26)
        size = file.metadata.row_group(group).total_byte_size
        if not 0 <= size <= budget:
            raise DataError(f"{size:,} bytes uncompressed, at most {budget:,} in a row group", where, _REWRITE)
        batch_rows = max(1, min(BATCH_ROWS, budget // max(size, 1)))
        done = 0
        for batch in file.iter_batches(batch_rows, row_groups=[group], columns=[column], use_threads=False):
            yield _checked(batch.column(0), where, done)
            done += len(batch)
        if done != shard.group_rows[group]:
            raise DataError(f"{done} rows, the footer says {shard.group_rows[group]}", where, _REWRITE)


def _checked(texts: pa.Array, where: str, first: int) -> pa.Array:
    """`texts` if every entry is a non-empty string; a DataError naming the row otherwise."""
    if texts.null_count:
        row = pc.index(texts.is_null(), True).as_py()
        raise DataError("null document", f"{where} row {first + row}", _REWRITE)
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid as error:
        for row in range(len(texts)):
            try:
                texts[row].as_py()
            except UnicodeDecodeError as bad:
                raise DataError(f"not UTF-8 (byte {bad.start})", f"{where} row {first + row}", _REWRITE) from error
        raise DataError(f"damaged ({error})", where, _REWRITE) from error
    shortest = pc.min(pc.binary_length(texts)).as_py()
    if shortest == 0:
        row = pc.index(pc.binary_length(texts), 0).as_py()
        raise DataError("empty document", f"{where} row {first + row}", _REWRITE)
    return texts


def _footer(path: Path) -> str:
    """SHA-256 (hex) of the footer. ValueError if it has none, or one larger than FOOTER_BYTES."""
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little")
        if tail[4:] != b"PAR1" or length > min(FOOTER_BYTES, end - 8):
            raise ValueError("no footer, or too large a one")
        file.seek(end - 8 - length)
        return hashlib.sha256(file.read(length)).hexdigest()


@contextmanager
def _parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """An open file that verifies page checksums where the writer made them."""
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        yield file


@contextmanager
def _naming(where: Path | str) -> Iterator[None]:
    """What a damaged file makes the parquet reader raise, as a DataError naming the file."""
    try:
        yield
    except _BROKEN as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"cannot be read as parquet ({reason[:200]})", where,
                        "the file is damaged: copy or write it again") from error
