"""Shims in the place of os.open, os.write and the like: what a run does to its disk, seen, refused, delayed.

nanopoe/checkpoint/files.py promises that all changes go through these attributes of os, so a shim sees all of them.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopoe.checkpoint import folder_of, list_steps
from nanopoe.checkpoint.store import opens
from tests.faults.harness import Life, Room, _train
from tests.ranks import forked

CHANGES = ("open", "write", "fsync", "mkdir", "rename", "replace")
DELETES = ("unlink", "rmdir")
Hook = Callable[[str, str], None]           # (name of the call, path of what it is made on)


def start(room: Room, experiment: dict[str, Any], before: Callable[[], None]) -> Life:
    """Room.start on one rank, in a process that calls `before` first."""
    life = room.start(experiment, 0)
    config = life.run_dir.with_suffix(".yaml")
    process = forked().Process(
        target=_hurt, args=(before, [str(config)], str(life.console)))
    process.start()
    life.ranks.append(process)
    return life


def _hurt(before: Callable[[], None], arguments: list[str], console: str) -> None:
    before()
    _train(arguments, {}, console)


def watch_calls(folder: str | Path, names: tuple[str, ...], before: Hook | None = None,
                after: Hook | None = None) -> None:
    """From now on, in this process, around every call of os.<name> that changes something in `folder`."""
    inside = f"{folder}/"

    def shim(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            path = path_of(args[0], kwargs.get("dir_fd"))
            if not path.startswith(inside) or (name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR)):
                return real(*args, **kwargs)
            if before is not None:
                before(name, path)
            result = real(*args, **kwargs)
            if after is not None:
                after(name, path)
            return result

        return call

    for name in names:
        setattr(os, name, shim(name, getattr(os, name)))


def path_of(target: Any, dir_fd: int | None) -> str:
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    path = os.fsdecode(target)
    return path if dir_fd is None else os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)


@dataclass(frozen=True)
class Record:
    """Where a process in a shim tells its test what happened: a JSON line each."""

    path: str

    def add(self, **what: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(what) + "\n")

    def read(self) -> list[dict[str, Any]]:
        path = Path(self.path)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# -- a disk that refuses ---------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Refusing:
    """A disk that refuses the `at`-th change with errno `code` (0: none, but all are recorded), and after it

      once  nothing more
      save  all of the save under way, tried again or not
      ever  everything

    but folders, which a full or broken disk often still takes: the others (EROFS, EDQUOT) refuse these too.
    """

    folder: str
    record: Record
    at: int = 0
    code: int = 0
    form: str = "once"

    def __call__(self) -> None:
        calls, training, save = itertools.count(1), False, ""

        def before(name: str, path: str) -> None:
            nonlocal training, save
            n = next(calls)
            if self.at == 0:
                self.record.add(call=name, path=path)
            if n == self.at:
                self.record.add(call=name, path=path, training=training)
                save = save_of(path)
            later = self.form == "ever" or (self.form == "save" and save != "" and save in path)
            takes = name == "mkdir" and self.code in (errno.ENOSPC, errno.EIO)
            if n == self.at or (n > self.at > 0 and later and not takes):
                raise OSError(self.code, os.strerror(self.code), None if name in ("write", "fsync") else path)
            training = training or (name == "open" and path.endswith("metrics.jsonl"))

        watch_calls(self.folder, CHANGES, before)


def save_of(path: str) -> str:
    """The part of a path that all files of one save have and no other has, as .tmp-step_00000002; "" of no save."""
    return next((part[:18] for part in Path(path).parts if part.startswith(".tmp-step_")), "")


@dataclass(frozen=True)
class Undeletable:
    """A disk on which no file of a checkpoint in the trash can be deleted."""

    folder: str
    record: Record

    def __call__(self) -> None:
        def before(name: str, path: str) -> None:
            if "/.trash-" in path:
                self.record.add(refused=path)
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), path)

        watch_calls(self.folder, DELETES, before)
        Guarded(self.folder, self.record)()


# -- a disk that is slow, and a thread that breaks -------------------------------------------------------------------

@dataclass(frozen=True)
class Slow:
    """A disk that takes `seconds` for every file of a checkpoint."""

    folder: str
    record: Record
    seconds: float = 1.0

    def __call__(self) -> None:
        def before(name: str, path: str) -> None:
            if save_of(path):
                self.record.add(call=name, save=save_of(path), time=time.monotonic())
            if save_of(path) and name == "open":
                time.sleep(self.seconds)

        def after(name: str, path: str) -> None:
            if save_of(path) and name == "rename":
                self.record.add(call="renamed", save=save_of(path), time=time.monotonic())

        watch_calls(self.folder, CHANGES, before, after)


@dataclass(frozen=True)
class Breaking:
    """A bug in the saving thread: the `at`-th write of the save of `step` raises what no disk raises."""

    folder: str
    record: Record
    step: int
    at: int

    def __call__(self) -> None:
        calls = itertools.count(1)

        def before(name: str, path: str) -> None:
            if name == "write" and save_of(path).endswith(f"{self.step:08d}") and next(calls) == self.at:
                lines = (Path(self.folder) / "metrics.jsonl").read_text().splitlines()
                self.record.add(trained=sum('"kind": "train"' in line for line in lines))
                raise ZeroDivisionError("broken on purpose")

        watch_calls(self.folder, CHANGES, before)


# -- what is kept ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Guarded:
    """After every rename and deletion: does a checkpoint open, once there is one? What does not hold is recorded.

    The process is killed after the `kill`-th deletion in the trash (0: never).
    """

    folder: str
    record: Record
    kill: int = 0

    def __call__(self) -> None:
        seen, deleted = False, itertools.count(1)

        def after(name: str, path: str) -> None:
            nonlocal seen
            there = any(opens(folder_of(self.folder, step)) for step in reversed(list_steps(self.folder)))
            if seen or there:
                self.record.add(call=name, path=path, holds=there)
            seen = seen or there
            if name in DELETES and "/.trash-" in path and next(deleted) == self.kill:
                os.kill(os.getpid(), signal.SIGKILL)

        watch_calls(self.folder, ("rename", *DELETES), after=after)


@dataclass(frozen=True)
class Stopped:
    """The process is killed when `step` is committed."""

    folder: str
    step: int

    def __call__(self) -> None:
        def after(name: str, path: str) -> None:
            if save_of(path).endswith(f"{self.step:08d}"):
                os.kill(os.getpid(), signal.SIGKILL)

        watch_calls(self.folder, ("rename",), after=after)
