"""The validation rows: file order, no shuffle, no augmentation, packed as in training, the same for every run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from nanopoe.config import Experiment
from nanopoe.data.lanes import Lane, MakeDocuments, Strand, Stream
from nanopoe.data.loader import TokenizerLike, maker, open_sources
from nanopoe.data.order import FileOrder, StreamOrder
from nanopoe.data.packing import PACKINGS
from nanopoe.data.shards import Source
from nanopoe.dist import World
from nanopoe.errors import DataError


@dataclass(frozen=True)
class EvalBatches:
    """Batches of one rank, int32 (b, T+1) with b <= device_batch_size; iterates over them.

    `rows`, `rows_wanted` and `truncated` count over all ranks; fewer rows than wanted means that the split is too
    small; `truncated` conversations in them had lost their front, being longer than a row.
    """

    batches: list[torch.Tensor]
    rows: int
    rows_wanted: int
    truncated: int = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.batches)

    @property
    def complete(self) -> bool:
        return self.rows == self.rows_wanted


def eval_batches(sources: Sequence[Source], make: MakeDocuments, bos_id: int, *, packing: str, tokens: int,
                 sequence_len: int, device_batch_size: int, buffer_documents: int, rank: int = 0, world_size: int = 1,
                 threads: int = 1) -> EvalBatches:
    """The first ceil(tokens / T) rows of the validation split, packed as in training; row i belongs to rank i mod W.

    Neither the world size nor the device batch size changes which rows there are. Several sources are mixed by weight
    while all last. DataError if the split does not fill a single row.
    """
    rows_wanted = -(-tokens // sequence_len)
    rows: list[np.ndarray] = []
    pool = ThreadPoolExecutor(threads, "documents")
    try:
        lane = _file_lane(sources, make, bos_id, packing, buffer_documents, pool, threads)
        while len(rows) < rows_wanted:
            row = np.empty(sequence_len + 1, dtype=np.int32)
            if lane.fill(row) is None:
                break
            rows.append(row)
    finally:
        pool.shutdown(cancel_futures=True)
    if not rows:
        raise DataError(f"the validation split does not fill one row of {sequence_len + 1} tokens",
                        ", ".join(source.name for source in sources), "add validation data")
    own = torch.from_numpy(np.stack(rows))[rank::world_size]
    return EvalBatches(list(own.split(device_batch_size)) if len(own) else [], len(rows), rows_wanted,
                       lane.counts.truncated)


def validation_by_source(experiment: Experiment, tokenizer: TokenizerLike, world: World,
                         tokens: int | None = None) -> dict[str, EvalBatches]:
    """This rank's rows of each source of the validation split alone, by its name: the first `tokens`
    (evaluation.tokens by default) of each. DataError if one does not fill a single row."""
    data, sequence_len = experiment.data, experiment.model.sequence_len
    make = maker(data, tokenizer, sequence_len)
    return {source.name: eval_batches(
        [source], make, tokenizer.bos_id, packing=data.packing, tokens=tokens or experiment.evaluation.tokens,
        sequence_len=sequence_len, device_batch_size=experiment.batch.device_batch_size,
        buffer_documents=data.buffer_documents, rank=world.rank, world_size=world.size,
        threads=torch.get_num_threads()) for source in open_sources(data.val, data.kind)}


def _file_lane(sources: Sequence[Source], make: MakeDocuments, bos_id: int, packing: str, buffer_documents: int,
               pool: Executor, threads: int) -> Lane:
    """One lane that reads every source once, as it stands in the files."""
    streams = {}
    for source in sources:
        strand = Strand(source.name, source.weight, (source,))
        order = StreamOrder(strand.parts, FileOrder(source.n_documents))
        streams[source.name] = Stream(strand, order, make, pool, threads, 1, {0: (0, 0)}, epochs=1)
    zero = dict.fromkeys(streams, 0)
    return Lane(0, streams, {name: name for name in streams}, PACKINGS[packing], buffer_documents, bos_id, zero.copy(),
                zero.copy())
