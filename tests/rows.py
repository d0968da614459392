"""What the tests of data share: folders of small shards, a readable encoder, loaders run as if on several ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from nanopoe.data.lanes import Tokenize
from nanopoe.data.loader import Loader, Sizes, merge_positions
from nanopoe.data.packing import PACKINGS, Document
from nanopoe.data.shards import COLUMN, CONVERSATION, Source, open_source

BOS = 0
TEXT = ("bestfit_crop", "bestfit_split", "concat")


def encode_bytes(text: str) -> np.ndarray:
    """A byte-level encoder: ids 1..256, so that a row can be read back."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.uint32) + 1


def converse(source: Source, wanted: Sequence[tuple[int, int]], row_len: int = 16) -> list[Document]:
    """Texts as conversations: BOS and the first three tokens are masked; of long ones the end is kept, behind BOS."""
    documents = []
    for epoch, ordinal in wanted:
        ids = np.concatenate([[BOS], encode_bytes(source.text(ordinal))]).astype(np.int32)
        ids[:4] = ~ids[:4]
        kept = np.concatenate([ids[:1], ids[1:][-(row_len - 1):]])
        documents.append(Document(kept, len(kept), [source.name, epoch, ordinal], len(ids) - len(kept)))
    return documents


def write(folder: Path, shards: list[list[list[Any]]], column: str = COLUMN) -> Path:
    """Shards of row groups of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, groups in enumerate(shards):
        with pq.ParquetWriter(folder / f"s{i}.parquet", pa.schema([(column, pa.string())]), compression="zstd",
                              write_page_checksum=True) as writer:
            for group in groups:
                writer.write_table(pa.table({column: pa.array(group, pa.string())}))
    return folder


def numbered(folder: Path, shape: list[list[int]], length: Callable[[int], int] = lambda n: 3) -> Path:
    """Documents "000", "001", ... padded with their last digit to `length(n)` characters."""
    number = iter(range(10**6))

    def text() -> str:
        n = next(number)
        return f"{n:03d}".ljust(length(n), f"{n % 10}")
    return write(folder, [[[text() for _ in range(rows)] for rows in groups] for groups in shape])


def pieces_in(row: np.ndarray) -> list[str]:
    """The pieces of a row as text, those of BOS alone and padding left out; the first may lack its BOS."""
    ids = np.where(row < 0, ~row, row)
    parts = np.split(ids, np.flatnonzero(ids[1:] == BOS) + 1)
    texts = [bytes((part[part != BOS] - 1).astype(np.uint8)).decode() for part in parts]
    return [text for text in texts if text]


def loader(sources: Sequence[Source], *, packing: str = "bestfit_crop", world_size: int = 1, rank: int = 0,
           lanes: int = 12, buffer_documents: int = 4, sequence_len: int = 15, micro_batches: int = 12,
           device_batch_size: int = 1, seed: int = 1, case_aug_prob: float = 0.0, **more: Any) -> Loader:
    sizes = Sizes(lanes, buffer_documents, sequence_len, micro_batches * device_batch_size, micro_batches,
                  device_batch_size, rank, world_size)
    chats = packing == "bestfit_pad"
    for source in sources:
        source.repeat = source.repeat if chats else 1            # text has none
    most = None if PACKINGS[packing].keeps_rest else sequence_len + 1
    make = ((lambda source, wanted: converse(source, wanted, sequence_len + 1)) if chats else
            Tokenize(encode_bytes, BOS, most, seed, case_aug_prob))
    return Loader(sources, make, BOS, sizes, packing=packing, seed=seed, union=chats, **more)


def global_steps(make_sources: Callable[[], Sequence[Source]], steps: int, *, world_size: int = 1,
                 **options: Any) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """[(rows (B, T+1) in global order, merged position)] of `steps` steps on `world_size` loaders."""
    ranks = [loader(make_sources(), world_size=world_size, rank=rank, **options) for rank in range(world_size)]
    out = []
    try:
        for _ in range(steps):
            parts, positions = zip(*(next(r) for r in ranks), strict=True)
            rows = torch.stack(parts, dim=1)                     # (micro_step, rank, slot, T+1): g = micro*W + rank
            rows = rows.flatten(0, 1).transpose(0, 1).flatten(0, 1)       # (slot, g) -> j = slot*M + g
            out.append((rows.numpy().copy(), json.loads(json.dumps(merge_positions(positions)))))
    finally:
        for r in ranks:
            r.close()
    return out


def same(a: Sequence[tuple[np.ndarray, Any]], b: Sequence[tuple[np.ndarray, Any]]) -> bool:
    return len(a) == len(b) and all(np.array_equal(x[0], y[0]) and x[1] == y[1] for x, y in zip(a, b, strict=True))


def two_sources(folder: Path) -> Callable[[], list[Source]]:
    """Two sources of documents of all lengths, one of them code."""
    prose = numbered(folder / "prose", [[20, 9], [14]], lambda n: 3 + n * 7 % 29)
    code = numbered(folder / "code", [[6, 6, 3]], lambda n: 3 + n * 5 % 17)
    return lambda: [open_source("prose", prose, weight=2.0, repeat=2),
                    open_source("code", code, weight=1.0, code=True)]


def chat_shards(folder: Path, train: int = 60, val: int = 20) -> Path:
    """folder/{train,val}: short conversations, all different."""
    def lines(first: int, count: int) -> list[str]:
        return [json.dumps({"messages": [{"role": "user", "content": f"say {n} {'a' * (n % 7)}"},
                                         {"role": "assistant", "content": f"{n} is said, {'b' * (n % 5)} {n + 1}"}]},
                           separators=(",", ":")) for n in range(first, first + count)]

    write(folder / "train", [[lines(0, train)]], CONVERSATION)
    write(folder / "val", [[lines(1000, val)]], CONVERSATION)
    return folder
