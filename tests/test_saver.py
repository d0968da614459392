"""Saving beside training: what is saved is what was there at the call, outcomes are the same on all ranks."""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe import dist
from nanopoe.checkpoint import Checkpoint, Outcome, Saver, Target, digest, list_steps, save_checkpoint
from nanopoe.checkpoint import commit as committing
from nanopoe.dist import World
from nanopoe.errors import PeerError, StorageError
from nanopoe.optim import DistMuonAdamW
from tests.checkpoints import ALONE, filled, position_of, target_of
from tests.ranks import run_ranks
from tests.test_optim import groups, parameters


def state_of(step: int, world: World = ALONE) -> dict[str, Any]:
    return {"step": step, "tokens": 8, "optimizer_steps": step, "position": position_of(world)}


def saver_of(run_dir: Path | str, world: World = ALONE, **changes: Any) -> tuple[Saver, dict[str, Any], DistMuonAdamW]:
    target = target_of(run_dir, world, **changes)
    target = Target(target.experiment, world, target.fingerprints, None, dist.side_group(60))
    params, optimizer = parameters(), filled(world)
    return Saver(target, params, optimizer.state_parts), params, optimizer


class Slow:
    """write_rank of a slow disk: every call waits for `go`."""

    def __init__(self, patch: pytest.MonkeyPatch):
        self.go, self.calls, self._real = threading.Event(), 0, committing.write_rank
        patch.setattr(committing, "write_rank", self)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        assert self.go.wait(30)
        return self._real(*args)


def polled(saver: Saver) -> Outcome:
    deadline = time.monotonic() + 30
    while not saver.finished and time.monotonic() < deadline:
        time.sleep(0.001)
    outcome = saver.poll()
    assert outcome is not None
    return outcome


@pytest.mark.parametrize("beside", [True, False])
def test_what_is_saved_is_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, beside: bool) -> None:
    """Training goes on while the disk is slow; without async_save it waits, and the disk must be fast."""
    wanted = save_checkpoint(target_of(tmp_path / "now"), parameters(), filled(ALONE).state_parts(), state_of(1))
    saver, params, optimizer = saver_of(tmp_path / "run", **{"checkpoint.async_save": beside})
    slow = Slow(monkeypatch)
    if not beside:
        slow.go.set()
    assert saver.save(state_of(1)) is None
    assert saver.finished == (not beside)
    for tensor in [*params.values(), *(part.tensor for part in optimizer.state_parts())]:
        tensor.data.mul_(3).add_(1)                                                        # the next step of training
    slow.go.set()
    outcome = polled(saver)
    assert outcome.error is None and outcome.path is not None
    assert (outcome.held_s < outcome.total_s) == beside
    assert digest(Checkpoint(outcome.path)) == digest(Checkpoint(wanted.path))
    saver.save(state_of(2))
    saver.close()
    changed = polled(saver)
    assert changed.path is not None                                                        # control: training went on
    assert not torch.equal(Checkpoint(changed.path).read("rows"), Checkpoint(wanted.path).read("rows"))


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, params, _ = saver_of(tmp_path)
    slow = Slow(monkeypatch)
    saver.save(state_of(1))
    second = threading.Thread(target=saver.save, args=(state_of(2),))
    second.start()
    second.join(0.2)
    assert second.is_alive() and slow.calls == 1 and list_steps(tmp_path) == []
    slow.go.set()
    second.join(30)
    assert [polled(saver).step, polled(saver).step] == [1, 2] and list_steps(tmp_path) == [1, 2]
    assert saver.poll() is None


def test_a_failure_is_an_outcome_or_with_wait_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(*_: Any) -> None:
        raise ZeroDivisionError("x")

    saver, *_ = saver_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(committing, "write_rank", bug)
        saver.save(state_of(1))
        outcome = polled(saver)
        assert isinstance(outcome.error, ZeroDivisionError) and outcome.path is None
        with pytest.raises(ZeroDivisionError):
            saver.save(state_of(1), wait=True)
        assert saver.poll() is None
    done = saver.save(state_of(1), wait=True)                                              # control
    assert done is not None and done.path is not None and done.held_s == done.total_s and saver.poll() is None


def test_a_full_disk_is_an_outcome_after_one_more_try(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver, *_ = saver_of(tmp_path, **{"checkpoint.keep_last": 3})
    for step in (1, 2, 3):
        saver.save(state_of(step), wait=True)
    tries: list[list[int]] = []

    def full(*_: Any) -> None:
        tries.append(list_steps(tmp_path))
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(committing, "write_rank", full)
        saver.save(state_of(4))
        outcome = polled(saver)
    assert isinstance(outcome.error, StorageError) and "No space left" in str(outcome.error)
    assert tries == [[1, 2, 3], [2, 3]] and list_steps(tmp_path) == [2, 3]
    saver.save(state_of(5))
    assert polled(saver).error is None and list_steps(tmp_path) == [2, 3, 5]


def test_leaving_by_an_error_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanopoe.checkpoint import saver as saving

    monkeypatch.setattr(saving, "PATIENCE_S", 0.2)
    slow = Slow(monkeypatch)
    start = time.monotonic()
    saver, *_ = saver_of(tmp_path)
    saver.save(state_of(1))
    with pytest.raises(KeyboardInterrupt), saver:
        raise KeyboardInterrupt
    assert 0.2 <= time.monotonic() - start < 10 and list_steps(tmp_path) == []
    slow.go.set()
    with saver:                                                                            # control: leaving in peace
        saver.save(state_of(2))
    assert list_steps(tmp_path) == [1, 2]


def test_only_what_this_rank_writes_is_copied() -> None:
    params = parameters()
    everything = sum(p.nbytes for p in params.values())
    total = 0
    for rank in range(4):
        world = World(rank, 4, torch.device("cpu"))
        optimizer = DistMuonAdamW(params, groups(), rank, 4)
        saver = Saver(target_of("x", world), params, optimizer.state_parts)
        assert saver._copies is not None
        state = sum(part.tensor.nbytes for part in optimizer.state_parts())
        weights = sum(copy.nbytes for copy in saver._copies) - state
        assert 0 < weights < everything / 2
        total += weights
    assert total == everything


# -- several ranks ---------------------------------------------------------------------------------------------------

def saved_beside(world: World, run_dir: str, bad_rank: int) -> list[str]:
    """Save two steps beside collectives of the training group; the first is refused on one rank."""
    saver, params, _ = saver_of(run_dir, world, **{"checkpoint.keep_last": 1})
    real, refused = committing.write_rank, []

    def full(*args: Any) -> Any:
        if world.rank == bad_rank and len(refused) < 2:
            refused.append(1)
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        time.sleep(0.05 * world.rank)
        return real(*args)

    committing.write_rank = full
    found = []
    for step in (1, 2):
        saver.save(state_of(step, world))
        for p in params.values():
            p.data.add_(1)
        while True:                                                  # as the loop does it: all or none take the outcome
            ready = dist.all_reduce_sum_(torch.tensor([int(saver.finished)]))
            if int(ready) == world.size:
                break
        outcome = saver.poll()
        assert outcome is not None
        found.append(f"{outcome.step} {outcome.path and outcome.path.name} {outcome.error} {outcome.warnings}")
    saver.close()
    return found


@pytest.mark.parametrize("bad_rank", [0, 1])
def test_all_ranks_see_the_same_outcome(tmp_path: Path, bad_rank: int) -> None:
    answers = run_ranks(saved_beside, 2, str(tmp_path), bad_rank)
    assert answers[0] == answers[1]
    first, second = answers[0]
    assert first.startswith("1 None error[storage]") and f"rank {bad_rank}: x: No space left" in first
    assert second == "2 step_00000002 None []" and list_steps(tmp_path) == [2]
    rows = Checkpoint(tmp_path / "checkpoints" / "step_00000002").read("rows")
    assert torch.equal(rows, parameters()["rows"] + 1)


def saved_with_one_missing(world: World, run_dir: str) -> str:
    """Rank 1 never saves: what rank 0 is told, and how long that took."""
    target = target_of(run_dir, world)
    target = Target(target.experiment, world, target.fingerprints, None, dist.side_group(2))
    saver = Saver(target, parameters(), filled(world).state_parts)
    if world.rank == 1:
        time.sleep(4)
        return "away"
    start = time.monotonic()
    try:
        saver.save(state_of(1, world), wait=True)
    except PeerError as error:
        return f"{error.kind} {time.monotonic() - start < 4}"
    return "saved"


def test_a_missing_rank_is_an_error_in_time(tmp_path: Path) -> None:
    assert run_ranks(saved_with_one_missing, 2, str(tmp_path)) == ["peer True", "away"]


# -- how long training is held ---------------------------------------------------------------------------------------
