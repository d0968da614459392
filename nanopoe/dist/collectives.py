"""Thin wrappers of the collectives, no-ops on one rank. A failing one is a PeerError.

Rule: every rank of a group calls the same collectives in the same order, never under `if rank == 0`. `group` is None
for all ranks in the training thread; a thread brings one of its own (group.side_group). reduce_to, broadcast, send and
receive are the training thread's alone, among all ranks or a column of them (group.column_group).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanopoe.dist import heartbeat
from nanopoe.errors import report

Group = dist.ProcessGroup


def size() -> int:
    """Ranks in the group, 1 without one."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def _peers(group: Group | None, *, enters: bool = True, waits: bool = True) -> Iterator[None]:
    """A collective that fails is another rank's end. Told at once: torchrun ends this rank within a moment.

    Those of the training thread are what the heartbeat sees of this rank: that it waits in one, and how many it entered
    of those that all ranks enter.
    """
    pulse = heartbeat.pulse if group is None else heartbeat.Pulse()
    pulse.entered += enters
    pulse.moves += 1
    pulse.waiting = waits
    try:
        yield
    except torch.OutOfMemoryError:                  # ours, not a peer's
        raise
    except RuntimeError as error:
        lost = heartbeat.blame(heartbeat.first_line(error))
        lost.__cause__ = error
        report(lost)
        raise lost from error
    finally:
        pulse.waiting = False
    pulse.moves += 1


class Pending:
    """A collective on its way; it holds its tensors until wait() has returned."""

    def __init__(self, work: dist.Work, group: Group | None, *tensors: Tensor):
        self._work, self._group, self._tensors = work, group, tensors

    @property
    def done(self) -> bool:
        """Whether wait() would not have to wait."""
        return bool(self._work.is_completed())

    def wait(self) -> None:
        with _peers(self._group, enters=False):
            self._work.wait()
        self._tensors = ()


def all_reduce_sum_(tensor: Tensor, group: Group | None = None) -> Tensor:
    """Sum over ranks, in place."""
    if size() > 1:
        with _peers(group):
            dist.all_reduce(tensor, group=group)
    return tensor


def sum_integers(values: Sequence[int], device: torch.device | str = "cpu", group: Group | None = None) -> list[int]:
    """Each of a few integers summed over ranks, in one collective."""
    if size() == 1:
        return [int(v) for v in values]
    return [int(v) for v in all_reduce_sum_(torch.tensor(values, dtype=torch.int64, device=device), group).tolist()]


def reduce_to(tensor: Tensor, owner: int, column: Group | None = None) -> Pending:
    """Start summing `tensor` over ranks into rank `owner`'s, in place; elsewhere it is left as scrap."""
    with _peers(None, enters=column is None, waits=False):
        return Pending(dist.reduce(tensor, owner, group=column, async_op=True), None, tensor)


def gather_to(tensor: Tensor, everyone: list[Tensor] | None, owner: int) -> Pending:
    """Start collecting `tensor` of every rank, in rank order, into `everyone` of rank `owner` (None elsewhere)."""
    with _peers(None, waits=False):
        return Pending(dist.gather(tensor, everyone, owner, async_op=True), None, tensor, *(everyone or ()))


def broadcast(tensor: Tensor, source: int, column: Group | None = None) -> Pending:
    """Start overwriting `tensor` with that of rank `source`."""
    with _peers(None, enters=column is None, waits=False):
        return Pending(dist.broadcast(tensor, source, group=column, async_op=True), None, tensor)


def send(tensor: Tensor, rank: int) -> Pending:
    """Start giving `tensor` to a rank that receives."""
    with _peers(None, enters=False, waits=False):
        work = dist.isend(tensor, rank)
        assert work is not None
        return Pending(work, None, tensor)


def receive(tensor: Tensor, rank: int) -> Pending:
    """Start filling `tensor` with what a rank sends, in the order it does."""
    with _peers(None, enters=False, waits=False):
        work = dist.irecv(tensor, rank)
        assert work is not None
        return Pending(work, None, tensor)


# torch 2.13 renames the single-tensor collectives and warns at the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def all_gather(everything: Tensor, mine: Tensor, group: Group | None = None) -> Pending:
    """Start collecting `mine` (n, ...) of every rank into `everything` (W * n, ...)."""
    with _peers(group, waits=False):
        return Pending(_all_gather(everything, mine, group=group, async_op=True), group, everything, mine)


def barrier(group: Group | None = None) -> None:
    if size() > 1:
        with _peers(group):
            dist.barrier(group)


def gather_json(value: Any, device: torch.device | str = "cpu", group: Group | None = None) -> list[Any]:
    """JSON-able `value` of every rank, on every rank, in rank order. As bytes, since object collectives pickle."""
    if size() == 1:
        return [json.loads(json.dumps(value))]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = torch.zeros(size(), dtype=torch.int64, device=device)
    all_gather(lengths, torch.tensor([data.numel()], device=device), group).wait()
    longest = int(lengths.max())
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: data.numel()] = data
    everyone = torch.zeros(size() * longest, dtype=torch.uint8, device=device)
    all_gather(everyone, padded, group).wait()
    parts = everyone.view(size(), longest).cpu()
    return [json.loads(parts[r, : int(lengths[r])].numpy().tobytes()) for r in range(size())]
