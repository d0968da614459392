"""The training loader: global batches that depend on (config, seed, step) and not on who computes them.

Row j of step s comes from lane (s*B + j) mod V (B rows a step, V lanes). Micro-batch g of M holds the rows
j = g (mod M); rank r of W runs the micro-batches g = r (mod W). With W | M and W | V every row of a rank comes from a
lane l = r (mod W), so a rank reads, tokenizes and stores only its own lanes (RELIABILITY 3.5).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
import torch

from nanopoe.config.schema import DataConfig, SourceConfig
from nanopoe.data.lanes import EncodeBatch, Lane, Stream, Tokenize, check_lanes
from nanopoe.data.order import ShuffledOrder
from nanopoe.data.prefetch import Prefetch
from nanopoe.data.shards import Source, open_source
from nanopoe.errors import ConfigError, DataError

PACKER_VERSION = 1              # raise it when the same inputs would give other rows
PREFETCH_STEPS = 2
Position = dict[str, Any]


class TokenizerLike(Protocol):
    bos_id: int

    @property
    def digest(self) -> str: ...
    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]: ...


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


class Loader:
    """Endless iterator of `(rows, position)`, one optimizer step of one rank each.

    rows: int32 (micro_batches / world_size, device_batch_size, T + 1). position: JSON types; the state of this rank's
    lanes after that step, to be given back as `position` (the union of all ranks: `merge_positions`) with
    `start_step` = the steps completed; any world size W that divides lanes and micro_batches then continues exactly.

    encode_batch(texts, threads) returns ids without BOS; `tokenizer_digest` goes into the fingerprint of positions.
    `may_change` and `recount`: see `rebase_position`.
    Work is done in a background thread; its errors are raised by `next`. Close it, or use it in a `with`.
    Raises ConfigError for sizes that do not divide, DataError for data or a position that does not fit.
    """

    def __init__(self, sources: Sequence[Source], encode_batch: EncodeBatch, bos_id: int, *, seed: int, lanes: int,
                 buffer_documents: int, sequence_len: int, rows_per_step: int, micro_batches: int,
                 device_batch_size: int, rank: int, world_size: int, case_aug_prob: float, start_step: int = 0,
                 position: Position | None = None, threads: int = 1, tokenizer_digest: str | None = None,
                 may_change: Collection[str] = (), recount: bool = False):
        check_sizes(lanes, rows_per_step, micro_batches, device_batch_size, world_size)
        assert 0 <= rank < world_size, "a rank outside its world"
        check_lanes(sources, lanes)
        self.fingerprint = {"packer": PACKER_VERSION, "seed": seed, "lanes": lanes, "sequence_len": sequence_len,
                            "tokenizer": tokenizer_digest, "bos_id": bos_id,
                            "sources": {source.name: source.digest for source in sources}}
        tokenize = Tokenize(encode_batch, bos_id, sequence_len + 1, seed, case_aug_prob, threads)
        own = range(rank, lanes, world_size)
        if position is None:
            if start_step:
                raise DataError(f"no data position for step {start_step}", "loader", "resume from a checkpoint")
            states = {lane: _empty_state(sources) for lane in own}
        else:
            position = rebase_position(position, self.fingerprint, may_change, recount)
            states = _check_position(position, self.fingerprint, start_step, own, sources)
        self._lanes = _build_lanes(sources, states, tokenize, seed, lanes, buffer_documents, sequence_len + 1)
        self._rank, self._world, self._n_lanes = rank, world_size, lanes
        self._rows_per_step, self._micro_batches, self._device_batch = rows_per_step, micro_batches, device_batch_size
        self._row_len = sequence_len + 1
        self._steps = Prefetch(self._produce(start_step), PREFETCH_STEPS)

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[torch.Tensor, Position]:
        rows, position = next(self._steps)
        return torch.from_numpy(rows), position

    def close(self) -> None:
        """Stop the background thread; `next` raises StopIteration from then on."""
        self._steps.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _produce(self, step: int) -> Iterator[tuple[np.ndarray, Position]]:
        while True:
            rows = self._step_rows(step)
            step += 1
            lanes = {str(number): lane.position() for number, lane in self._lanes.items()}
            yield rows, {"fingerprint": self.fingerprint, "step": step, "lanes": lanes}

    def _step_rows(self, step: int) -> np.ndarray:
        """(micro_steps, device_batch, T+1) int32; rows are taken in increasing global order."""
        micro_steps = self._micro_batches // self._world
        rows = np.empty((micro_steps, self._device_batch, self._row_len), dtype=np.int32)
        for j in range(self._rank, self._rows_per_step, self._world):
            g, slot = j % self._micro_batches, j // self._micro_batches
            lane = self._lanes[(step * self._rows_per_step + j) % self._n_lanes]
            pieces = lane.fill(rows[(g - self._rank) // self._world, slot])
            assert pieces is not None, "a training stream never ends"
        return rows


def train_loader(data: DataConfig, tokenizer: TokenizerLike, plan: PlanLike, *, seed: int, rank: int,
                 start_step: int = 0, position: Position | None = None, threads: int = 1,
                 may_change: Collection[str] = (), recount: bool = False) -> Loader:
    """The Loader of an experiment: opens data.train and takes the sizes from the plan."""
    return Loader(open_sources(data.train), tokenizer.encode_batch, tokenizer.bos_id, seed=seed, lanes=data.lanes,
                  buffer_documents=data.buffer_documents, sequence_len=plan.sequence_len,
                  rows_per_step=plan.rows_per_step, micro_batches=plan.micro_batches,
                  device_batch_size=plan.device_batch_size, rank=rank, world_size=plan.world_size,
                  case_aug_prob=data.case_aug_prob, start_step=start_step, position=position, threads=threads,
                  tokenizer_digest=tokenizer.digest, may_change=may_change, recount=recount)


def open_sources(configs: Sequence[SourceConfig]) -> list[Source]:
    """Open every source of a split; DataError if two have one name (the name is the key of the data position)."""
    names = [config.name for config in configs]
    if len(set(names)) < len(names):
        raise DataError(f"sources with the same name: {', '.join(names)}", "data", "give each source its own name")
    return [open_source(config.name, Path(config.path), config.files, weight=config.weight, code=config.code)
            for config in configs]


def merge_positions(positions: Sequence[Position]) -> Position:
    """The union over ranks of the positions of one step: free of the world size."""
    first = positions[0]
    lanes: dict[str, Any] = {}
    for position in positions:
        assert position["step"] == first["step"] and position["fingerprint"] == first["fingerprint"], "not one step"
        assert not lanes.keys() & position["lanes"].keys(), "a lane on two ranks"
        lanes.update(position["lanes"])
    return {**first, "lanes": {key: lanes[key] for key in sorted(lanes, key=int)}}


def rebase_position(position: Position, fingerprint: dict[str, Any], may_change: Collection[str],
                    recount: bool) -> Position:
    """The position for data that was changed on purpose; `may_change` of the fingerprint: "sources", "seed".

    Sources that are as they were go on where they stopped, new ones begin at their start, documents of others leave
    the buffers. Then, and with `recount` (other weights), the shares of the mixture are counted anew, else a source
    that is now due more would be all that is read until it had caught up. Another seed permutes the documents anew,
    so some of this epoch come again and some not at all.
    """
    try:
        then = position["fingerprint"]
        changed = {key for key in may_change if then.get(key) != fingerprint[key]}
        if not changed and not recount:
            return position
        names, recount = fingerprint["sources"], recount or "sources" in changed
        kept = {name for name in names if then["sources"].get(name) == names[name]}
        lanes = {number: {"cursors": {name: lane["cursors"][name] if name in kept else [0, 0] for name in names},
                          "tokens": dict.fromkeys(names, 0) if recount else lane["tokens"],
                          "buffer": [ref for ref in lane["buffer"] if ref[0] in kept]}
                 for number, lane in position["lanes"].items()}
        return {**position, "fingerprint": {**then, **{key: fingerprint[key] for key in changed}}, "lanes": lanes}
    except (KeyError, TypeError, AttributeError, IndexError):
        return position                                          # malformed: refused by name with the others


def check_sizes(lanes: int, rows_per_step: int, micro_batches: int, device_batch_size: int, world_size: int) -> None:
    """ConfigError unless rows = micro_batches * device_batch_size and the ranks share micro-batches and lanes."""
    if rows_per_step != micro_batches * device_batch_size:
        raise ConfigError(f"{rows_per_step} rows a step are not {micro_batches} micro-batches of {device_batch_size}",
                          "batch", "make tokens_per_step a multiple of device_batch_size * sequence_len")
    if lanes % world_size or micro_batches % world_size:
        valid = [w for w in range(1, min(lanes, micro_batches) + 1) if lanes % w == 0 and micro_batches % w == 0]
        raise ConfigError(f"{world_size} ranks cannot share {lanes} lanes and {micro_batches} micro-batches", "data",
                          f"use one of these world sizes: {', '.join(map(str, valid))}")


def _empty_state(sources: Sequence[Source]) -> dict[str, Any]:
    return {"cursors": {s.name: [0, 0] for s in sources}, "tokens": {s.name: 0 for s in sources}, "buffer": []}


def _build_lanes(sources: Sequence[Source], states: dict[int, dict[str, Any]], tokenize: Tokenize, seed: int,
                 n_lanes: int, buffer_documents: int, row_len: int) -> dict[int, Lane]:
    """Lanes in the given states; documents in their buffers are read and tokenized again."""
    streams = {source.name: Stream(source, ShuffledOrder(seed, source.name, source.group_rows), tokenize, n_lanes,
                                   {lane: list(state["cursors"][source.name]) for lane, state in states.items()})
               for source in sources}
    lanes = {number: Lane(number, streams, buffer_documents, row_len, dict(state["tokens"]))
             for number, state in states.items()}
    buffered = {}
    for source in sources:
        wanted = sorted({(epoch, ordinal) for state in states.values()
                         for name, epoch, ordinal in state["buffer"] if name == source.name})
        for document in tokenize(source, wanted):
            buffered[tuple(document.ref)] = document
    for number, state in states.items():
        for ref in state["buffer"]:                          # in order of arrival, which breaks ties
            lanes[number].buffer.add(buffered[tuple(ref)])
    return lanes


def _check_position(position: Position, fingerprint: dict[str, Any], start_step: int, own: range,
                    sources: Sequence[Source]) -> dict[int, dict[str, Any]]:
    """The states of the lanes `own`; a DataError that names the field if the position is of other data."""
    def refuse(what: str, do: str) -> NoReturn:
        raise DataError(what, "data position", do)

    try:
        for key, now in fingerprint.items():
            then = position["fingerprint"].get(key)
            if then != now:
                asked = {"sources": "data.train", "seed": "seed"}.get(key)
                refuse(f"'{key}' was {_short(then)}, now it is {_short(now)}", "resume with the data it was saved with"
                       + (f", or resume.allow=[{asked}] if it is meant" if asked else ""))
        if position["step"] != start_step:
            refuse(f"is of step {position['step']}, not {start_step}", "resume with the position of that step")
        states = {lane: position["lanes"][str(lane)] for lane in own}
        sizes = {source.name: source.n_documents for source in sources}
        for state in states.values():
            if set(state["cursors"]) != set(sizes) or set(state["tokens"]) != set(sizes):
                refuse("is of other sources", "resume with the data it was saved with")
            numbers = [n for pair in state["cursors"].values() for n in (*pair, len(pair) - 2)]
            numbers += list(state["tokens"].values())
            for name, epoch, ordinal in state["buffer"]:
                numbers += [epoch, ordinal, sizes[name] - 1 - ordinal]
            if not all(type(n) is int and n >= 0 for n in numbers):
                refuse("has a number that is no count", "the checkpoint is damaged")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"not in the form a loader writes ({type(error).__name__}: {error})", "data position",
                        "resume from a checkpoint of this program") from error
    return states


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."

