"""A disk that refuses, a process that dies, two jobs in a folder: checkpoints are whole or absent at every instant."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe import dist
from nanopoe.checkpoint import clean, digest, folder_of, list_steps, open_checkpoint, run_lock, save_checkpoint
from nanopoe.checkpoint import commit as committing
from nanopoe.checkpoint.store import checkpoints_of
from nanopoe.dist import World
from nanopoe.errors import ConfigError, StorageError
from nanopoe.optim.dist_muon_adamw import StatePart
from tests.checkpoints import ALONE, MODEL, flip, save_steps, target_of
from tests.ranks import run_ranks

# -- a disk that refuses, a process that dies ------------------------------------------------------------------------

class Died(BaseException):
    """The process is gone: nothing after this changes the disk."""


class Disk:
    """Counts what changes the disk. From the `at`-th change on it refuses with `code` (just once, or always), or the
    process is dead."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = 0, code: int | None = None, once: bool = False):
        self.changes, self.at, self.code, self.once = 0, at, code, once
        for name in ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, self.shim(name, getattr(os, name)))

    def shim(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kw: Any) -> Any:
            if (name == "open" and not args[1] & os.O_CREAT) or (self.code and name in ("unlink", "rmdir")):
                return real(*args, **kw)
            self.changes += 1
            if self.at and (self.changes == self.at or (self.changes > self.at and not self.once)):
                if self.code is None:
                    raise Died
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kw)
        return call


def save_over(run_dir: Path, step: int) -> list[str]:
    parts = [StatePart("w", "exp_avg", 0, torch.full((3,), 0.5))]
    target = target_of(run_dir, **{"checkpoint.keep_last": 2})
    return save_checkpoint(target, {"w": torch.full((3,), -float(step))}, parts, {"step": step}).warnings


@pytest.fixture(params=["next", "again", "over a damaged one"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int, list[str]]:
    """A run with checkpoints 2 and 4, a step to save, and the digests there may be of the newest afterwards."""
    base = tmp_path / "base"
    save_steps(base, 2, 4)
    before = [digest(open_checkpoint(base, 4)), digest(open_checkpoint(base, 2))]
    if request.param == "over a damaged one":
        flip(folder_of(base, 4) / MODEL, -1)
    step = 6 if request.param == "next" else 4
    after = tmp_path / "after"
    shutil.copytree(base, after)
    save_over(after, step)
    return base, step, [*before, digest(open_checkpoint(after))]


def whole_folders(run_dir: Path) -> int:
    return sum(committing.is_whole(p) for p in checkpoints_of(run_dir).iterdir()
               if not p.name.startswith((".tmp", ".trash")))


def test_death_at_every_change_leaves_whole_checkpoints(scene: tuple[Path, int, list[str]], tmp_path: Path) -> None:
    base, step, known = scene
    changes, seen = 1, set()
    for at in range(1, 1000):
        run_dir = tmp_path / str(at)
        shutil.copytree(base, run_dir)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at)
            try:
                save_over(run_dir, step)
                break
            except Died:
                changes = disk.changes
        assert whole_folders(run_dir) >= 1
        clean(checkpoints_of(run_dir))                                           # the next life begins
        found = next(s for s in reversed(list_steps(run_dir)) if committing.is_whole(folder_of(run_dir, s)))
        seen.add(known.index(digest(open_checkpoint(run_dir, found))))
        assert not [p for p in checkpoints_of(run_dir).iterdir() if p.name.startswith(".")]
        assert committing.is_whole(folder_of(run_dir, 2)) or found > 4, "the one before goes after a newer has come"
        save_over(run_dir, 8)
        assert committing.is_whole(folder_of(run_dir, 8))
    assert at > 20 and changes >= at - 1, "every change was tried"
    assert 2 in seen and len(seen) == 2, "it died before the commit and after it"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("once", [True, False])
def test_a_disk_that_refuses_at_every_change(scene: tuple[Path, int, list[str]], tmp_path: Path, code: int,
                                             once: bool) -> None:
    """Once: the save is tried again and succeeds. Always: a typed error, and what was there is there."""
    base, step, known = scene
    failed = unsure = 0
    for at in range(1, 1000):
        run_dir = tmp_path / str(at)
        shutil.copytree(base, run_dir)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, code, once)
            try:
                save_over(run_dir, step)
                ended = True
            except StorageError as error:
                ended, message = False, str(error)
        if not ended:
            failed += 1
            assert os.strerror(code) in message and not once
        left = [p.name for p in checkpoints_of(run_dir).iterdir() if p.name.startswith(".tmp")]
        assert left == [], "a full disk must not stay full"
        clean(checkpoints_of(run_dir))
        newest = next(s for s in reversed(list_steps(run_dir)) if committing.is_whole(folder_of(run_dir, s)))
        found = known.index(digest(open_checkpoint(run_dir, newest)))
        assert found == 2 or not ended
        unsure += found == 2 and not ended
        if disk.changes < at:
            break
    assert at > 20 and (failed > 10) == (not once)
    assert unsure <= 1, "it is there, but its folder's fsync was refused, and so was to take it back"


def test_a_storage_failure_keeps_one_fewer_and_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2, 3, **{"checkpoint.keep_last": 3})
    tries, write_rank = [], committing.write_rank

    def full(*args: Any) -> Any:
        tries.append(list_steps(tmp_path))
        if len(tries) == 1:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return write_rank(*args)

    monkeypatch.setattr(committing, "write_rank", full)
    warnings = save_steps(tmp_path, 4, **{"checkpoint.keep_last": 3})
    assert tries == [[1, 2, 3], [2, 3]] and list_steps(tmp_path) == [2, 3, 4]
    assert warnings == ["the checkpoint of step 4 was refused (Disk quota exceeded), and tried again"]


def test_other_errors_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def bug(*_: Any) -> None:
        tries.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(committing, "write_rank", bug)
    with pytest.raises(ZeroDivisionError):
        save_steps(tmp_path, 1)
    assert tries == [1] and list(checkpoints_of(tmp_path).iterdir()) == []


def refused_on_one_rank(world: World, run_dir: str, bad_rank: int) -> str:
    real = committing.write_rank

    def full(*args: Any) -> Any:
        if world.rank == bad_rank:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        return real(*args)

    committing.write_rank = full
    try:
        save_checkpoint(target_of(run_dir, world), {"w": torch.ones(3), "v": torch.ones(2)}, [], {"step": 1})
    except StorageError as error:
        return str(error)
    return "saved"


def test_all_ranks_abandon_together(tmp_path: Path) -> None:
    for bad_rank in (0, 1):
        answers = run_ranks(refused_on_one_rank, 2, str(tmp_path), bad_rank)
        assert answers[0] == answers[1] and f"rank {bad_rank}: x: No space left" in answers[0]
        assert list(checkpoints_of(tmp_path).iterdir()) == []
    assert run_ranks(refused_on_one_rank, 2, str(tmp_path), -1) == ["saved", "saved"]                # control


# -- two jobs --------------------------------------------------------------------------------------------------------

def test_a_second_job_is_refused(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run", ALONE) as warnings:
        assert warnings == []
        held = rf"another job trains in this folder: pid {os.getpid()} on .* since 20"
        with pytest.raises(ConfigError, match=held), run_lock(tmp_path / "run", ALONE):
            pass
    with run_lock(tmp_path / "run", ALONE):                                          # control: it is let go of
        pass
    (tmp_path / "run" / ".lock").write_text('{"host": "gone", "pid": 1, "since": "then"}')
    with run_lock(tmp_path / "run", ALONE) as warnings:                              # of a dead job: without a word
        assert warnings == [] and "gone" not in (tmp_path / "run" / ".lock").read_text()


def locked(world: World, run_dir: str) -> str:
    try:
        with run_lock(run_dir, world):
            dist.barrier()
            return "held"
    except ConfigError as error:
        return str(error)


def test_the_lock_is_for_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(locked, 2, str(tmp_path)) == ["held", "held"]
    with run_lock(tmp_path, ALONE):
        answers = run_ranks(locked, 2, str(tmp_path))
    assert answers[0] == answers[1] and "another job trains in this folder" in answers[0]


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanopoe.checkpoint import lock

    def refuse(code: int) -> Callable[..., None]:
        def flock(*_: Any) -> None:
            raise OSError(code, os.strerror(code))
        return flock

    monkeypatch.setattr(lock.fcntl, "flock", refuse(errno.ENOLCK))
    with run_lock(tmp_path, ALONE) as warnings:
        assert "without locks" in warnings[0]
    monkeypatch.setattr(lock.fcntl, "flock", refuse(errno.EIO))                                      # control
    with pytest.raises(StorageError), run_lock(tmp_path, ALONE):
        pass
