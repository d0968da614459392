"""Failing together: what fails on one rank fails on all, with the same typed error naming the rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nanopoe.dist.collectives import Group, all_reduce_sum_, gather_json, size
from nanopoe.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NanopoeError,
    NumericsError,
    PeerError,
    StorageError,
    everywhere,
    typed,
)

KINDS = {e.kind: e for e in (NanopoeError, ConfigError, DataError, CheckpointError, NumericsError, PeerError,
                             StorageError)}


@contextmanager
def agree(device: torch.device | str = "cpu", group: Group | None = None) -> Iterator[None]:
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
        failure = typed(error)
        assert failure is not None
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
        failures = int(all_reduce_sum_(torch.tensor([int(failure is not None)], device=device), group))
    except PeerError:
        if failure is not None:                 # our own trouble is the better news
            raise failure from failure.__cause__
        raise
    if not failures:
        return
    mine = None if failure is None else [failure.kind, failure.what, failure.where, failure.do,
                                         getattr(failure, "problems", [])]
    outcomes = gather_json(mine, device, group)
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            kind, what, where, do, problems = outcome
            located = f"rank {rank}: {where}" if where else f"rank {rank}"
            agreed = ConfigError(what, located, do, problems) if kind == "config" else KINDS[kind](what, located, do)
            raise everywhere(agreed) from failure
