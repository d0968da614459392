"""Ranks: the only place that opens a process group, and thin wrappers of the collectives (no-ops on one rank).

Rule: every rank calls the same collectives in the same order, never under `if rank == 0`. A rank never fails alone:
`agree` turns one rank's error into the same error on all.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanopoe.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NanopoeError,
    NumericsError,
    PeerError,
    StorageError,
    everywhere,
    report,
)


@dataclass(frozen=True)
class World:
    """This process among all: global rank, size, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(name: str, local_rank: int) -> torch.device:
    """"auto" | "cpu" | "cuda" -> the device of this rank; ConfigError if it is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("no CUDA device is visible", "runtime.device", "use 'cpu' or 'auto'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"rank {local_rank} of this host has no GPU: {torch.cuda.device_count()} visible",
                          "torchrun --nproc_per_node", "start at most one rank per GPU")
    return torch.device("cuda", local_rank)


def environment_world() -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun's environment; (0, 0, 1) where there is none."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 0, 1
    missing = [v for v in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise ConfigError(f"the environment names a world but lacks {', '.join(missing)}", "environment",
                          "start with torchrun, or unset RANK and WORLD_SIZE")
    numbers = {v: os.environ[v] for v in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = [f"{v}={text!r}" for v, text in numbers.items() if not (text.isascii() and text.isdecimal())]
    if wrong or not int(numbers["RANK"]) < int(numbers["WORLD_SIZE"]):
        shown = wrong or [f"{v}={numbers[v]}" for v in ("RANK", "WORLD_SIZE")]
        raise ConfigError(f"the environment names no rank of a world: {', '.join(shown)}", "environment",
                          "start with torchrun, or unset RANK and WORLD_SIZE")
    return int(numbers["RANK"]), int(numbers["LOCAL_RANK"]), int(numbers["WORLD_SIZE"])


@contextmanager
def world(device: str = "auto", timeout_s: int = 600, rank: int | None = None, size: int | None = None,
          init_method: str | None = None) -> Iterator[World]:
    """Join the process group (gloo on CPU, NCCL on CUDA) and leave it at the end.

    Rank and size come from torchrun's environment unless given (tests pass them, with a file as init_method).
    PeerError when the group does not come together in time or has another size than the environment says.
    """
    if rank is None or size is None:
        rank, local_rank, size = environment_world()
    else:
        local_rank = rank
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", init_method=init_method,
                                    rank=rank, world_size=size, timeout=datetime.timedelta(seconds=timeout_s))
        except (RuntimeError, ValueError) as error:
            raise PeerError(f"the {size} ranks did not meet: {str(error).splitlines()[0]}", f"rank {rank}",
                            "check MASTER_ADDR, MASTER_PORT and that every rank was started") from error
        if dist.get_world_size() != size:
            raise PeerError(f"the group has {dist.get_world_size()} ranks, the environment says {size}", f"rank {rank}")
    try:
        yield World(rank, size, chosen)
    except Exception as error:
        if size > 1:
            report(error)           # before the others see this rank gone: torchrun ends all when the first one exits
        raise
    finally:
        if size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def size() -> int:
    """Ranks in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _peers() -> Iterator[None]:
    """A collective that fails is another rank's end. Told at once: torchrun ends this rank within a moment."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[[^]]*\] *", "", str(error).splitlines()[0])        # gloo's, without its line of source
        reason = reason.split(". ")[0]
        lost = PeerError(f"another rank is gone or hangs: {reason}", f"rank {dist.get_rank()}",
                         "its own message and log say why; start again to go on from the last checkpoint")
        lost.__cause__ = error
        report(lost)
        raise lost from error


class Pending:
    """A collective on its way. Hold its tensors until wait() has returned."""

    def __init__(self, work: dist.Work):
        self._work = work

    def wait(self) -> None:
        with _peers():
            self._work.wait()


def all_reduce_sum_(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if size() > 1:
        with _peers():
            dist.all_reduce(tensor)
    return tensor


def broadcast_(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrite with the tensor of rank `source`."""
    if size() > 1:
        with _peers():
            dist.broadcast(tensor, source)
    return tensor


# torch 2.13 renames the single-tensor collectives and warns at the old names, which are all that 2.11 has.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def reduce_scatter(output: Tensor, everything: Tensor) -> Pending:
    """Start summing `everything` (W * n, ...) over ranks, this rank's n rows into `output`.

    Hold both tensors and wait() for the Work; gloo has no future to attach to it.
    """
    with _peers():
        return Pending(_reduce_scatter(output, everything, async_op=True))


def all_gather(everything: Tensor, mine: Tensor) -> Pending:
    """Start collecting `mine` (n, ...) of every rank into `everything` (W * n, ...). Hold both, and wait()."""
    with _peers():
        return Pending(_all_gather(everything, mine, async_op=True))


def barrier() -> None:
    if size() > 1:
        with _peers():
            dist.barrier()


def gather_json(value: Any, device: torch.device | str = "cpu") -> list[Any]:
    """JSON-able `value` of every rank, on every rank, in rank order. As bytes, since object collectives pickle."""
    if size() == 1:
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = torch.zeros(size(), dtype=torch.int64, device=device)
    all_gather(lengths, torch.tensor([data.numel()], device=device)).wait()
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    everyone = torch.zeros(size() * longest, dtype=torch.uint8, device=device)
    all_gather(everyone, padded).wait()
    parts = everyone.view(size(), longest).cpu()
    return [json.loads(parts[r, : int(lengths[r])].numpy().tobytes()) for r in range(size())]


KINDS = {e.kind: e for e in (NanopoeError, ConfigError, DataError, CheckpointError, NumericsError, PeerError,
                             StorageError)}


@contextmanager
def agree(device: torch.device | str = "cpu") -> Iterator[None]:
    """What fails in this block on one rank fails on all, with the same typed error naming the rank.

    The traceback of a rank's own failure is the cause of what it raises, and so gets into that rank's log.

    The block must hold no collective of its own; the exchange of outcomes comes after it, on every rank.
    """
    failure: NanopoeError | None = None
    try:
        yield
    except NanopoeError as error:
        failure = error
    except OSError as error:
        failure = StorageError(error.strerror or str(error), error.filename, "free some space or check the rights")
        failure.__cause__ = error
    except Exception as error:
        if size() == 1:
            raise
        failure = NanopoeError(f"{type(error).__name__}: {error}", do="a bug; that rank's log has the traceback")
        failure.__cause__ = error
    if size() == 1:
        if failure is not None:
            raise failure
        return
    try:
        failures = int(all_reduce_sum_(torch.tensor([int(failure is not None)], device=device)))
    except PeerError:
        if failure is not None:                 # our own trouble is the better news
            raise failure from failure.__cause__
        raise
    if not failures:
        return
    mine = None if failure is None else [failure.kind, failure.what, failure.where, failure.do,
                                         getattr(failure, "problems", [])]
    outcomes = gather_json(mine, device)
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            kind, what, where, do, problems = outcome
            located = f"rank {rank}: {where}" if where else f"rank {rank}"
            agreed = ConfigError(what, located, do, problems) if kind == "config" else KINDS[kind](what, located, do)
            raise everywhere(agreed) from failure
