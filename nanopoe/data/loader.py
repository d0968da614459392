"""The training loader: global batches that depend on (config, seed, step) and not on who computes them.

Row j of step s comes from lane (s*B + j) mod V (B rows a step, V lanes). Micro-batch g of M holds the rows
j = g (mod M); rank r of W runs the micro-batches g = r (mod W). With W | M and W | V every row of a rank comes from a
lane l = r (mod W), so a rank reads, tokenizes and stores only its own lanes (RELIABILITY 3.5).

With `replay_steps` = P the batch of step s is that of step s mod P: the lanes begin anew at every multiple of P.
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from nanopoe.config.schema import DataConfig, SourceConfig
from nanopoe.data.audit import AuditedRow, AuditWriter
from nanopoe.data.lanes import (
    JOB_DOCUMENTS,
    Counts,
    Lane,
    MakeDocuments,
    Strand,
    Stream,
    Tokenize,
    check_lanes,
    make_all,
)
from nanopoe.data.order import ALL_SOURCES, training_order
from nanopoe.data.packing import PACKINGS, Document
from nanopoe.data.position import (
    LaneState,
    Position,
    check_position,
    check_replay,
    empty_state,
    merge_positions,
    rebase_position,
    sources_of,
    summary,
)
from nanopoe.data.prefetch import Prefetch
from nanopoe.data.render import ChatTokenizer, Render
from nanopoe.data.shards import (
    CACHE_BYTES,
    COLUMN,
    CONVERSATION,
    SHUFFLED_CACHE_BYTES,
    Source,
    open_source,
)
from nanopoe.errors import ConfigError, DataError

__all__ = ["Loader", "Sizes", "merge_positions", "open_sources", "summary", "train_loader"]

PACKER_VERSION = 3              # raise it when the same inputs would give other rows
PREFETCH_TOKENS = 1 << 19       # of a rank, ready in memory: decoding a row group stops nobody;
PREFETCH_STEPS = 2, 256         # so many steps at least, and at most: each has a position


class TokenizerLike(ChatTokenizer, Protocol):
    bos_id: int

    @property
    def digest(self) -> str: ...
    def encode_array(self, text: str) -> np.ndarray: ...


class PlanLike(Protocol):
    @property
    def world_size(self) -> int: ...
    @property
    def rows_per_step(self) -> int: ...
    @property
    def micro_batches(self) -> int: ...
    @property
    def device_batch_size(self) -> int: ...
    @property
    def sequence_len(self) -> int: ...


@dataclass(frozen=True)
class Sizes:
    """Of a run: V lanes, documents to choose from in each, T, and a step's rows in M micro-batches; rank r of W."""

    lanes: int
    buffer_documents: int
    sequence_len: int
    rows_per_step: int
    micro_batches: int
    device_batch_size: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        """ConfigError unless rows = micro_batches * device_batch_size and the ranks share micro-batches and lanes."""
        assert 0 <= self.rank < self.world_size, "a rank outside its world"
        if self.rows_per_step != self.micro_batches * self.device_batch_size:
            raise ConfigError(f"{self.rows_per_step} rows a step are not {self.micro_batches} micro-batches of "
                              f"{self.device_batch_size}", "batch",
                              "make tokens_per_step a multiple of device_batch_size * sequence_len")
        if self.lanes % self.world_size or self.micro_batches % self.world_size:
            valid = [w for w in range(1, min(self.lanes, self.micro_batches) + 1)
                     if self.lanes % w == 0 and self.micro_batches % w == 0]
            raise ConfigError(f"{self.world_size} ranks cannot share {self.lanes} lanes and {self.micro_batches} "
                              "micro-batches", "data", f"use one of these world sizes: {', '.join(map(str, valid))}")

    @property
    def own_lanes(self) -> range:
        return range(self.rank, self.lanes, self.world_size)


class Step(NamedTuple):
    """rows int32 (micro_steps, device_batch, T+1), the position after them, what they are made of (if audited)."""

    rows: torch.Tensor
    position: Position
    pieces: list[AuditedRow] | None


class Loader:
    """Endless iterator of `(rows, position)`, one optimizer step of one rank each.

    rows: int32 (micro_batches / world_size, device_batch_size, T + 1), one block of memory; ~id where an entry is no
    target. position: JSON types; the state of this rank's lanes after that step, to be given back as `position` (the
    union of all ranks: `merge_positions`) with `start_step` = the steps completed; any world size W that divides lanes
    and micro_batches then continues exactly.

    `make` turns texts into documents (Tokenize or Render; called by `threads` threads). With `union`, as for
    conversations, all documents of all sources are shuffled together, each as often as its source's `repeat`; else the
    sources are mixed by weight. `tokenizer_digest` goes into the fingerprint of positions. `may_change` and `recount`:
    see `rebase_position`. `audit`: a folder to write to what every row was made of. `pinned`: rows lie in memory that a
    GPU copies from without waiting. `replay_steps`: the lanes begin anew every so many steps; a position is then that
    within the pass, at its end that of the end.

    Work is done in background threads; their errors are raised by `next`. Close it, or use it in a `with`.
    Raises DataError for data or a position that does not fit.
    """

    def __init__(self, sources: Sequence[Source], make: MakeDocuments, bos_id: int, sizes: Sizes, *, packing: str,
                 seed: int, union: bool = False, start_step: int = 0, position: Position | None = None,
                 threads: int = 1, tokenizer_digest: str | None = None, may_change: Collection[str] = (),
                 recount: bool = False, audit: Path | None = None, pinned: bool = False,
                 replay_steps: int | None = None):
        strands = ([Strand(ALL_SOURCES, 1.0, tuple(sources))] if union else
                   [Strand(source.name, source.weight, (source,)) for source in sources])
        check_lanes(strands, sizes.lanes)
        self.fingerprint = {"packer": PACKER_VERSION, "seed": seed, "lanes": sizes.lanes,
                            "sequence_len": sizes.sequence_len, "packing": packing, "tokenizer": tokenizer_digest,
                            "bos_id": bos_id, "replay_steps": replay_steps,
                            "sources": {s.name: s.digest + f" x{s.repeat}" * union for s in sources}}
        if position is None:
            if start_step:
                raise DataError(f"no data position for step {start_step}", "loader", "resume from a checkpoint")
            states = {lane: empty_state(strands) for lane in sizes.own_lanes}
        else:
            saved, position = position, rebase_position(position, self.fingerprint, strands, may_change, recount)
            states = check_position(position, self.fingerprint, start_step, sizes.own_lanes, strands)
            check_replay(saved, position, start_step, sizes.rows_per_step)
        packer = Packer(strands, states, make, bos_id, sizes, packing, seed, threads, self.fingerprint,
                        audit is not None, pinned, replay_steps)
        self._audit = None if audit is None else AuditWriter(audit, sizes.rank, sizes.world_size, packer.header(
            start_step))
        rank_rows = sizes.rows_per_step // sizes.world_size
        fewest, most = PREFETCH_STEPS
        self.ahead = max(fewest, min(most, PREFETCH_TOKENS // (rank_rows * sizes.sequence_len)))   # steps kept ready
        self._steps = Prefetch(packer.steps(start_step), self.ahead)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[torch.Tensor, Position]:
        rows, position, pieces = next(self._steps)
        if self._audit is not None and pieces is not None:
            self._audit.write(position, pieces)
        return rows, position

    @property
    def ready(self) -> int:
        """Steps that `next` would give at once."""
        return self._steps.ready

    @property
    def thread(self) -> int | None:
        """Identity of the thread that packs."""
        return self._steps.thread.ident

    def close(self) -> None:
        """Stop the background threads; `next` raises StopIteration from then on."""
        self._steps.close()
        if self._audit is not None:
            self._audit.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Packer:
    """Makes the steps of one rank. It must not know its Loader, or an abandoned one would never be collected."""

    strands: Sequence[Strand]
    states: dict[int, LaneState]
    make: MakeDocuments
    bos_id: int
    sizes: Sizes
    packing: str
    seed: int
    threads: int
    fingerprint: dict[str, Any]
    audited: bool
    pinned: bool
    replay_steps: int | None

    def steps(self, step: int) -> Generator[Step, None, None]:
        """Steps `step`, `step` + 1, ... without end."""
        if self.replay_steps is None:
            yield from self._steps(count(step), self.states)
            return
        states = self.states
        while True:
            end = (step // self.replay_steps + 1) * self.replay_steps
            if step % self.replay_steps == 0:
                states = {number: empty_state(self.strands) for number in self.states}
            yield from self._steps(range(step, end), states)
            step = end

    def _steps(self, steps: Iterable[int], states: dict[int, LaneState]) -> Generator[Step, None, None]:
        """Those steps, the lanes in these states before the first."""
        pool = ThreadPoolExecutor(self.threads, "documents")
        try:
            lanes = self._lanes(pool, states)
            sources = sources_of(self.strands)
            positions = {str(number): lane.position() for number, lane in lanes.items()}
            for step in steps:
                rows, pieces, used = self._step(step, lanes)
                positions = {**positions, **{str(number): lanes[number].position() for number in used}}
                position = {"fingerprint": self.fingerprint, "step": step + 1, "sources": sources, "lanes": positions}
                block = torch.from_numpy(rows)
                yield Step(block.pin_memory() if self.pinned else block, position, pieces)
        finally:
            pool.shutdown(cancel_futures=True)

    def _step(self, step: int, lanes: dict[int, Lane]) -> tuple[np.ndarray, list[AuditedRow] | None, set[int]]:
        """Rows, their pieces, the lanes they come from; rows are taken in increasing global order."""
        s = self.sizes
        rows = np.empty((s.micro_batches // s.world_size, s.device_batch_size, s.sequence_len + 1), dtype=np.int32)
        audited, used = [], set()
        if self.replay_steps is not None:
            step %= self.replay_steps
        for j in range(s.rank, s.rows_per_step, s.world_size):
            g, slot = j % s.micro_batches, j // s.micro_batches
            number = (step * s.rows_per_step + j) % s.lanes
            pieces = lanes[number].fill(rows[(g - s.rank) // s.world_size, slot])
            assert pieces is not None, "a training stream never ends"
            used.add(number)
            if self.audited:
                audited.append((j, [(*d.ref, offset, taken, d.whole) for d, offset, taken in pieces]))
        return rows, audited if self.audited else None, used

    def _lanes(self, pool: Executor, states: dict[int, LaneState]) -> dict[int, Lane]:
        """Lanes in these states; documents in their buffers are read and made again."""
        documents = self._buffered(pool, states)
        streams = {strand.name: Stream(strand, training_order(self.seed, strand.name, strand.parts), self.make, pool,
                                       self.threads, self.sizes.lanes, {lane: tuple(state["cursors"][strand.name])
                                                                        for lane, state in states.items()})
                   for strand in self.strands}
        stream_of = {source.name: strand.name for strand in self.strands for source in strand.sources}
        lanes = {}
        for number, state in states.items():
            lane = Lane(number, streams, stream_of, PACKINGS[self.packing], self.sizes.buffer_documents, self.bos_id,
                        dict(state["tokens"]), dict(state["placed"]), Counts(**state["counts"]))
            for ref in state["buffer"]:                          # in order of arrival, which breaks ties
                lane.buffer.add(documents[tuple(ref)])
            if state["rest"] is not None:
                *ref, placed = state["rest"]
                lane.buffer.rest = documents[tuple(ref)], placed
                if placed >= documents[tuple(ref)].length:
                    raise DataError("has a rest that is longer than its document", "data position",
                                    "the checkpoint is damaged")
            lanes[number] = lane
        return lanes

    def _buffered(self, pool: Executor, states: dict[int, LaneState]) -> dict[tuple[str, int, int], Document]:
        """The documents in the buffers, by (source, epoch, ordinal)."""
        refs = {tuple(ref) for state in states.values() for ref in state["buffer"]}
        refs |= {tuple(state["rest"][:3]) for state in states.values() if state["rest"] is not None}
        sources = {source.name: source for strand in self.strands for source in strand.sources}
        wanted = [(sources[name], epoch, ordinal) for name, epoch, ordinal in sorted(refs, key=lambda r: (r[0], r[2]))]
        jobs = [pool.submit(make_all, self.make, wanted[i:i + JOB_DOCUMENTS])
                for i in range(0, len(wanted), JOB_DOCUMENTS)]
        return {tuple(document.ref): document for job in jobs for document in job.result()}

    def header(self, start_step: int) -> dict[str, Any]:
        """What an audit must know beside the pieces; at the begin of a pass the lanes are those of the one before."""
        return {"begin": start_step, "rows_per_step": self.sizes.rows_per_step, "fingerprint": self.fingerprint,
                "groups": {source.name: source.group_rows for strand in self.strands for source in strand.sources},
                "sources": sources_of(self.strands), "lanes": {str(k): state for k, state in self.states.items()}}


def train_loader(data: DataConfig, tokenizer: TokenizerLike, plan: PlanLike, *, seed: int, rank: int,
                 start_step: int = 0, position: Position | None = None, threads: int = 1,
                 may_change: Collection[str] = (), recount: bool = False, audit: Path | None = None,
                 pinned: bool = False) -> Loader:
    """The Loader of an experiment: opens data.train and takes the sizes from the plan."""
    sizes = Sizes(data.lanes, data.buffer_documents, plan.sequence_len, plan.rows_per_step, plan.micro_batches,
                  plan.device_batch_size, rank, plan.world_size)
    return Loader(open_sources(data.train, data.kind),
                  maker(data, tokenizer, plan.sequence_len, seed, data.case_aug_prob, data.json_layout_prob or 0.0),
                  tokenizer.bos_id, sizes, packing=data.packing, seed=seed, union=data.kind == "conversations",
                  start_step=start_step, position=position, threads=threads, tokenizer_digest=tokenizer.digest,
                  may_change=may_change, recount=recount, audit=audit, pinned=pinned, replay_steps=data.replay_steps)


def maker(data: DataConfig, tokenizer: TokenizerLike, sequence_len: int, seed: int = 0, case_aug_prob: float = 0.0,
          json_layout_prob: float = 0.0) -> MakeDocuments:
    """From a string of a source to a document; not augmented unless asked for."""
    if data.kind == "conversations":
        return Render(tokenizer, sequence_len + 1, seed, json_layout_prob)
    most = None if PACKINGS[data.packing].keeps_rest else sequence_len + 1
    return Tokenize(tokenizer.encode_array, tokenizer.bos_id, most, seed, case_aug_prob)


def open_sources(configs: Sequence[SourceConfig], kind: str = "text") -> list[Source]:
    """Open every source of a split; DataError if two have one name (the name is the key of the data position)."""
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise DataError(f"sources with the same name: {', '.join(names)}", "data", "give each source its own name")
    chats = kind == "conversations"
    return [open_source(config.name, Path(config.path), config.files, weight=config.weight, code=config.code,
                        column=CONVERSATION if chats else COLUMN, repeat=config.repeat,
                        cache_bytes=SHUFFLED_CACHE_BYTES if chats else CACHE_BYTES) for config in configs]
