"""From a document to the texts that are written: filters, the cut of long ones, and the split, all functions of it.

A document longer than `max_chars` is cut at a definition or paragraph. The split is decided by the hash of its group or
of its text: never by which other documents there are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from nanopoe.data.ingest import DOCUMENT_BYTES, Bad, Raw

# where a document may be cut, best first: before a top-level block, between blocks, between lines, between words
_BREAKS = tuple(re.compile(p) for p in (r"\n[ \t]*\n+(?=\S)", r"\n[ \t]*\n", r"\n", r"\s"))


@dataclass(frozen=True)
class WriteOptions:
    """What decides the texts, but for `skip_bad` and `overwrite`.

    max_chars: longer documents are cut, None: never. min_chars, skip_over_chars: shorter and longer documents are
    skipped. dedup: of documents with one text the first is kept, in about 100 bytes of memory each. max_bytes of text
    stop early. shard_bytes: text that is read, shuffled and written together, as one shard of each split.
    """

    seed: int = 0
    val_share: float = 0.02
    max_chars: int | None = 8192
    min_chars: int = 0
    skip_over_chars: int | None = None
    dedup: bool = False
    max_bytes: int | None = None
    shard_bytes: int = 64 << 20
    column: str = "text"
    greeting_copies: bool = False
    skip_bad: int = 0
    overwrite: bool = False


class Piece(NamedTuple):
    split: str
    text: str
    size: int                    # bytes of UTF-8


class Document(NamedTuple):
    """One row. `bad` or `skipped` (the reason) or pieces; `digest` is of the whole text, b"" without dedup."""

    where: str
    bad: Bad | None
    skipped: str | None
    digest: bytes
    pieces: list[Piece]
    blank: int                   # pieces with nothing in them, left out


def prepare(row: Raw | Bad, options: WriteOptions) -> Document:
    """Filter, cut and split one row."""
    if isinstance(row, Bad):
        return Document(row.where, row, None, b"", [], 0)
    text, where = row.text, row.where
    if not text.strip():
        return Document(where, Bad("empty text", where), None, b"", [], 0)
    try:
        encoded = text.encode()
    except UnicodeEncodeError as error:
        bad = Bad("has a lone surrogate, which is no text", where, f" (character {error.start})")
        return Document(where, bad, None, b"", [], 0)
    if len(encoded) > DOCUMENT_BYTES:
        bad = Bad(f"longer than {DOCUMENT_BYTES >> 20} MB", where, f" ({len(encoded) / 1e6:.0f} MB)", "cut it")
        return Document(where, bad, None, b"", [], 0)
    if len(text) < options.min_chars:
        return Document(where, None, f"shorter than {options.min_chars} characters", b"", [], 0)
    if options.skip_over_chars is not None and len(text) > options.skip_over_chars:
        return Document(where, None, f"longer than {options.skip_over_chars} characters", b"", [], 0)
    digest = hashlib.blake2b(encoded, digest_size=16).digest() if options.dedup else b""
    pieces, blank = [], 0
    for part in _texts(row, options):
        if part.strip():
            pieces.append(Piece("val" if in_validation(row, part, options.val_share) else "train", part,
                                len(part.encode())))
        else:
            blank += 1
    if options.greeting_copies:
        pieces = list(_with_greetings(row, pieces, options.seed))
    return Document(where, None, None, digest, pieces, blank)


def _texts(document: Raw, options: WriteOptions) -> Iterator[str]:
    if options.max_chars is None:
        yield document.text
        return
    for piece in cut_document(document.text, options.max_chars):
        yield piece.strip("\r\n")


def _with_greetings(document: Raw, pieces: list[Piece], seed: int) -> Iterator[Piece]:
    """The pieces, those of train with a copy whose greeting is in another case."""
    from nanopoe.data.greetings import with_other_greeting

    for piece in pieces:
        yield piece
        copy = with_other_greeting(piece.text, document.where, seed) if piece.split == "train" else None
        if copy is not None:
            yield Piece("train", copy, len(copy.encode()))


def cut_document(text: str, limit: int) -> Iterator[str]:
    """Pieces of at most `limit` characters that concatenate to `text`, cut at the best break of each second half."""
    start = 0
    while len(text) - start > limit:
        end = _last_break(text, start + limit // 2, start + limit)
        yield text[start:end]
        start = end
    yield text[start:]


def _last_break(text: str, low: int, high: int) -> int:
    for pattern in _BREAKS:
        ends = [match.end() for match in pattern.finditer(text, low, high)]
        if ends:
            return ends[-1]
    return high


def in_validation(document: Raw, text: str, share: float) -> bool:
    """Whether this document belongs to val/: a function of its group or its text alone, not of the seed."""
    key = document.group if document.group is not None else text
    digest = hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64
