"""What is in a dataset folder: is it whole, how long are its documents, what do they look like."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from nanopoe.data.conversations import parse_conversation
from nanopoe.data.manifest import datasets_in, hash_error, listing_errors, read_manifest, rows_error
from nanopoe.data.order import key64, unit
from nanopoe.data.render import ChatTokenizer, encode_pieces, pieces
from nanopoe.data.shards import CONVERSATION, Shard, open_shard, open_source, read_group
from nanopoe.errors import DataError

PERCENTILES = (5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class Checked:
    """A shard that was verified; `error` is the first thing wrong with it."""

    path: Path
    rows: int
    error: DataError | None


def verify(folder: Path) -> Iterator[Checked]:
    """Every shard below `folder` against its manifest: there, size, SHA-256, rows; then every page and every text.

    DataError if a manifest is missing or damaged; what is wrong with a shard is in its `Checked`.
    """
    for dataset in datasets_in(folder):
        manifest = read_manifest(dataset)
        for split, listed in manifest["splits"].items():
            wrong = {str(error.where): error for error in listing_errors(dataset / split, listed["shards"])}
            for shard in listed["shards"]:
                path = dataset / split / shard["name"]
                error = wrong.pop(str(path), None) or _shard_error(path, shard, manifest["column"])
                yield Checked(path, shard["rows"], error)
            yield from (Checked(Path(where), 0, error) for where, error in wrong.items())


def _shard_error(path: Path, listed: dict[str, Any], column: str) -> DataError | None:
    try:
        error = hash_error(path, listed["sha256"]) or rows_error(path, listed["rows"])
        size = sum(_sizes(open_shard(path, column), column)) if error is None else 0
    except DataError as found:
        return found
    if error is None and size != listed["text_bytes"]:
        return DataError(f"holds {size:,} bytes of text, the manifest says {listed['text_bytes']:,}", path,
                         "write the folder again with scripts.prepare_data")
    return error


def _sizes(shard: Shard, column: str) -> Iterator[int]:
    """Bytes of text of every batch of a shard, each decoded and checked."""
    for group in range(len(shard.group_rows)):
        for batch in read_group(shard, group, column):
            yield pc.sum(pc.binary_length(batch)).as_py()


def splits_of(folder: Path) -> list[tuple[Path, str]]:
    """Folders of shards below `folder`, with their column; `folder` itself if it holds shards."""
    if any(folder.glob("*.parquet")):
        above = read_manifest(folder.parent) if (folder.parent / "manifest.json").is_file() else None
        return [(folder, above["column"] if above and folder.name in above["splits"] else "text")]
    found = [(dataset / split, manifest["column"]) for dataset in datasets_in(folder)
             for manifest in [read_manifest(dataset)] for split in manifest["splits"]]
    return [(path, column) for path, column in found if path.is_dir()]


def stats(folder: Path, tokenizer: ChatTokenizer | None = None,
          sequence_len: int | None = None) -> dict[str, dict[str, Any]]:
    """By folder of shards: documents, bytes of text, and mean and percentiles of lengths in characters (and tokens).

    The tokens of a conversation are those it is rendered to. With `sequence_len`, which needs the tokenizer: how many
    documents are longer than a row of training.
    """
    return {path.relative_to(folder).as_posix(): _stats(path, column, tokenizer, sequence_len)
            for path, column in splits_of(folder)}


def _stats(path: Path, column: str, tokenizer: ChatTokenizer | None, sequence_len: int | None) -> dict[str, Any]:
    characters: list[np.ndarray] = []
    tokens: list[int] = []
    size = 0
    source = open_source(path.name, path, column=column)
    for shard in source.shards:
        for group in range(len(shard.group_rows)):
            for batch in read_group(shard, group, column):
                size += pc.sum(pc.binary_length(batch)).as_py()
                characters.append(pc.utf8_length(batch).to_numpy(zero_copy_only=False))
                if tokenizer is not None:
                    tokens += [_tokens(text, column, tokenizer, str(shard.path)) for text in batch.to_pylist()]
    found = {"documents": source.n_documents, "shards": len(source.shards), "text_bytes": size,
             "characters": _lengths(np.concatenate(characters))}
    if tokenizer is not None:
        counted = np.array(tokens)
        found |= {"tokens": {"sum": int(counted.sum()), **_lengths(counted)},
                  "bytes_per_token": size / max(1, int(counted.sum()))}
    if sequence_len is not None:
        row = sequence_len + (column == CONVERSATION)        # rows hold one more; a text has a BOS that is not counted
        found["longer_than_a_row"] = sum(n > row for n in tokens)
    return found


def _tokens(text: str, column: str, tokenizer: ChatTokenizer, where: str) -> int:
    if column != CONVERSATION:
        return len(tokenizer.encode(text))
    return len(encode_pieces(tokenizer, pieces(parse_conversation(text, where), where)))


def _lengths(values: np.ndarray) -> dict[str, float]:
    ranks = np.percentile(values, PERCENTILES)
    return {"mean": float(values.mean()), "min": int(values.min()),
            **{"median" if p == 50 else f"p{p}": float(v) for p, v in zip(PERCENTILES, ranks, strict=True)},
            "max": int(values.max())}


def sample(folder: Path, n: int, seed: int) -> list[tuple[str, str]]:
    """`n` different documents (all, if there are fewer) as (where, text): the same for the same seed and files."""
    sources = [open_source(str(path), path, column=column) for path, column in splits_of(folder)]
    total = sum(source.n_documents for source in sources)
    key, chosen = key64(seed, "sample"), dict[int, None]()
    counter = 0
    while len(chosen) < min(n, total):
        chosen[int(unit(key, counter) * total)] = None
        counter += 1
    found = []
    for ordinal in sorted(chosen):
        index = 0
        while ordinal >= sources[index].n_documents:
            ordinal -= sources[index].n_documents
            index += 1
        found.append((f"{sources[index].name} document {ordinal}", sources[index].text(ordinal)))
    return found
