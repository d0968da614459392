"""Documents to a dataset folder: train/ and val/ of zstd parquet shards and a manifest, made beside it and renamed.

A document longer than `max_chars` is cut at a definition or paragraph, because packing drops what does not fit a row.
The split of a document is decided by the hash of its group or its text: never by which files there are.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanopoe.data.ingest import Raw
from nanopoe.data.order import key64, permutation
from nanopoe.data.shards import COLUMN
from nanopoe.errors import DataError, StorageError

FORMAT_VERSION = 1
MANIFEST, SPLITS = "manifest.json", ("train", "val")
SCHEMA = pa.schema([pa.field(COLUMN, pa.string(), nullable=False)])
GROUP_ROWS, GROUP_TEXT = 1024, 16 << 20        # a row group ends at whichever comes first
POOL_TEXT = 64 << 20                           # bytes of text shuffled together
# where a document may be cut, best first: before a top-level block, between blocks, between lines, between words
_BREAKS = tuple(re.compile(p) for p in (r"\n[ \t]*\n+(?=\S)", r"\n[ \t]*\n", r"\n", r"\s"))
Progress = Callable[[int, int], None]          # documents and bytes written so far


@dataclass(frozen=True)
class WriteOptions:
    """`max_bytes` of text stops early; `val_share` of the documents go to val/; None of the rest changes the texts."""

    seed: int = 0
    val_share: float = 0.02
    max_chars: int = 8192
    max_bytes: int | None = None
    shard_bytes: int = 16 << 20
    overwrite: bool = False


def write_dataset(documents: Iterable[Raw], out: Path, source: dict[str, Any], options: WriteOptions,
                  progress: Progress = lambda documents, size: None) -> dict[str, Any]:
    """Write `out`/train, `out`/val and the manifest, which is returned. Nothing is left behind when it fails.

    Raises DataError if `out` is not empty (unless overwrite, and it is a dataset) or a split would be empty,
    StorageError if the disk refuses.
    """
    check_out(out, options.overwrite)
    temporary: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{out.name}-", dir=out.parent))
        manifest = _write_splits(documents, temporary, options, progress)
        manifest["source"] = source
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)                               # mkdtemp makes it private
        _swap(temporary, out)
        return manifest
    except OSError as error:
        raise StorageError(f"cannot be written ({error.strerror or error})", out,
                           "free space or choose another --out") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def check_out(out: Path, overwrite: bool) -> None:
    """DataError unless `out` is missing, empty, or a dataset, with nothing beside it, that may be overwritten."""
    if out.exists() and not out.is_dir():
        raise DataError("is not a folder", out, "choose another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not overwrite:
        raise DataError("is not empty", out, "choose another --out or pass --overwrite")
    if not (out / MANIFEST).is_file():
        raise DataError(f"has no {MANIFEST}, so it is no dataset and will not be deleted", out, "choose another --out")
    others = sorted(path.name for path in out.iterdir() if path.name not in (MANIFEST, *SPLITS))
    if others:
        raise DataError(f"also holds {', '.join(others[:5])}, which would be lost", out,
                        "move that elsewhere, or choose another --out")


def cut_document(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters that concatenate to `text`, cut at the best break of each second half."""
    start = 0
    while len(text) - start > limit:
        end = _last_break(text, start + limit // 2, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def in_validation(document: Raw, text: str, share: float) -> bool:
    """Whether this document belongs to val/: a function of its group or its text alone, not of the seed."""
    key = document.group if document.group is not None else text
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _last_break(text: str, low: int, high: int) -> int:
    for pattern in _BREAKS:
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        if ends:
            return ends[-1]
    return high


@dataclass
class ShardWriter:
    """Appends texts to shard_00000.parquet, shard_00001.parquet, ... of a folder."""

    folder: Path
    shard_bytes: int
    names: list[str] = field(default_factory=list)
    documents: int = 0
    text_bytes: int = 0
    _group: list[str] = field(default_factory=list)
    _group_text: int = 0
    _shard_text: int = 0
    _writer: pq.ParquetWriter | None = None

    def add(self, text: str, size: int) -> None:
        self._group.append(text)
        self._group_text += size
        self.documents += 1
        self.text_bytes += size
        if len(self._group) >= GROUP_ROWS or self._group_text >= min(GROUP_TEXT, self.shard_bytes):
            self._flush()
        if self._shard_text >= self.shard_bytes:
            self._end_shard()

    def close(self) -> list[dict[str, Any]]:
        """Finish; for each shard its name, rows, bytes on disk and sha256."""
        self._flush()
        self._end_shard()
        return [_describe(self.folder / name) for name in self.names]

    def _flush(self) -> None:
        if not self._group:
            return
        if self._writer is None:
            self.folder.mkdir(exist_ok=True)
            self.names.append(f"shard_{len(self.names):05d}.parquet")
            self._writer = pq.ParquetWriter(self.folder / self.names[-1], SCHEMA, compression="zstd",
                                            use_dictionary=False, write_page_checksum=True)
        self._writer.write_table(pa.table([pa.array(self._group, pa.string())], SCHEMA))
        self._shard_text += self._group_text
        self._group, self._group_text = [], 0

    def _end_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer, self._shard_text = None, 0


def _describe(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"name": path.name, "rows": pq.read_metadata(path).num_rows, "bytes": path.stat().st_size, "sha256": digest}


def _write_splits(documents: Iterable[Raw], folder: Path, options: WriteOptions, progress: Progress) -> dict[str, Any]:
    splits = {name: ShardWriter(folder / name, options.shard_bytes) for name in SPLITS}
    for pool_number, pool in enumerate(_pools(_pieces(documents, options))):
        for i in permutation(key64(options.seed, "pool", pool_number), len(pool)):
            split, text, size = pool[i]
            splits[split].add(text, size)
        progress(sum(w.documents for w in splits.values()), sum(w.text_bytes for w in splits.values()))
    empty = [name for name, writer in splits.items() if not writer.documents]
    if empty:
        raise DataError(f"no document for {' and '.join(empty)}", "the documents read",
                        "give more documents, or cut them smaller with --max-chars, or change --val-percent")
    return {"format_version": FORMAT_VERSION, "seed": options.seed, "val_share": options.val_share,
            "max_chars": options.max_chars,
            "splits": {name: {"documents": writer.documents, "text_bytes": writer.text_bytes, "shards": writer.close()}
                       for name, writer in splits.items()}}


def _pieces(documents: Iterable[Raw], options: WriteOptions) -> Iterator[tuple[str, str, int]]:
    """(split, text, bytes) of every piece with something in it, up to the byte limit."""
    total = 0
    for document in documents:
        for piece in cut_document(document.text, options.max_chars):
            text = piece.strip("\r\n")
            if not text.strip():
                continue
            try:
                size = len(text.encode())
            except UnicodeEncodeError as error:
                raise DataError("has a lone surrogate, which is no text", document.where, "remove it") from error
            if options.max_bytes is not None and total + size > options.max_bytes:
                return
            total += size
            yield "val" if in_validation(document, text, options.val_share) else "train", text, size


def _pools(pieces: Iterator[tuple[str, str, int]]) -> Iterator[list[tuple[str, str, int]]]:
    pool: list[tuple[str, str, int]] = []
    size = 0
    for piece in pieces:
        pool.append(piece)
        size += piece[2]
        if size >= POOL_TEXT:
            yield pool
            pool, size = [], 0
    if pool:
        yield pool


def _swap(new: Path, out: Path) -> None:
    """Put `new` where `out` is; what was there is removed only after the rename."""
    trash = None
    if out.exists():
        trash = Path(tempfile.mkdtemp(prefix=f".trash-{out.name}-", dir=out.parent))
        out.rename(trash / out.name)
    new.rename(out)
    if trash is not None:
        shutil.rmtree(trash, ignore_errors=True)
