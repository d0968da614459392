"""RUN/status.json: what became of a run, and the command that goes on with it. Replaced atomically at each change.

Keys: state (running | finished | preempted | failed), step, total_steps, checkpoint (the newest step saved), reason
(the one line of the error, or the signal), exit_code, world_size, host, pid, time, resume. Rank 0 writes it; another
one only to say that rank 0 is lost, or the store of the rendezvous, which is likely to be on rank 0's host. "running"
with no such process on `host` means that all ranks were killed.

A survivor may notice long after the loss, when the run has been started again. So it writes only while RUN/.lock names
the life it was in, which it reads and does not take: a start that finds it taken is refused. And only while nobody of
this life has told its end: survivors take turns, by a lock on status.json itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import shlex
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.files import replace_file
from nanopoe.checkpoint.lock import life_of
from nanopoe.checkpoint.store import list_steps
from nanopoe.errors import PREEMPTED, PeerError, StorageError, typed

STATUS = "status.json"
TURN_S = 2.0                 # to wait for another rank that writes; a disk may hang


class Status:
    """The status of one run in this life of it, as this rank tells it. Writing never fails a run.

    `resume` is the command to go on, null if it was not started by one. Nothing is written before `begin`: a start that
    is refused leaves the run as it was, and may not speak for another job in the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], rank: int, size: int, resume: str | None = None):
        self.path, self.rank, self.size, self.resume = Path(folder) / STATUS, rank, size, resume
        self.state: str | None = None
        self.step, self.total_steps = 0, 0
        self.exit_code: int | None = None
        self._life = ""
        self._before: dict[str, Any] | None = None # what was told when this life began, most likely by the one before

    def begin(self, step: int, total_steps: int, life: str) -> None:
        """The run is built and stands at `step`. `life` is `life_of` the run folder, as rank 0 reads it."""
        self.total_steps, self._life = total_steps, life
        self._before = read_status(self.path.parent)
        self.tell("running", step)

    def tell(self, state: str, step: int, reason: str | None = None) -> None:
        """A change of state, on every rank; rank 0 writes it."""
        self.state, self.step = state, step
        self.exit_code = {"finished": 0, "preempted": PREEMPTED}.get(state)
        if self.rank == 0:
            self._write(reason)

    def fail(self, error: BaseException) -> bool:
        """`error` ends the run on this rank. Whether this rank is the one to tell it."""
        if self.state is None or self.state in ("finished", "failed"):
            return False
        ours = typed(error)
        self.state, self.exit_code = "failed", 1 if ours is None else ours.exit_code
        lost = error if isinstance(error, PeerError) else None
        if self.rank != 0 and (lost is None or not (0 in lost.ranks or lost.cut_off)):
            return False
        text = f"error[internal] {type(error).__name__}: {error}" if ours is None else ours.render()
        with self._turn():
            speaks = lost is None or self._untold()
            if speaks:
                self._write(text)
        return speaks

    def _untold(self) -> bool:
        """Whether this is still the last life of the run, and nobody has told its end: neither rank 0 with a better
        reason nor another survivor. (Rank 0 may have been stopped, and wake to hear that the others left for it.)"""
        if life_of(self.path.parent) != self._life:
            return False
        told = read_status(self.path.parent)
        return told is None or told == self._before or told.get("state") == "running"

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """While no other rank that fails writes, if it can be had in TURN_S."""
        try:
            handle = os.open(self.path, os.O_RDWR)
        except OSError:                                          # nothing was told yet, or nothing can be
            yield
            return
        try:
            end = time.monotonic() + TURN_S
            while not _locked(handle) and time.monotonic() < end:
                time.sleep(0.02)
            yield
        finally:
            os.close(handle)

    def _write(self, reason: str | None) -> None:
        value = {"state": self.state, "step": self.step, "total_steps": self.total_steps,
                 "checkpoint": max(self._saved(), default=None), "reason": reason, "exit_code": self.exit_code,
                 "world_size": self.size, "host": socket.gethostname(), "pid": os.getpid(),
                 "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                 "resume": None if self.state == "finished" else self.resume}
        with suppress(StorageError):
            replace_file(self.path, json.dumps(value, indent=2).encode() + b"\n")

    def _saved(self) -> list[int]:
        try:
            return list_steps(self.path.parent)
        except OSError:
            return []


def fail(status: Status, error: BaseException) -> None:
    """Write that `error` ended the run, and name on the console the command that goes on."""
    if status.fail(error) and status.resume is not None:
        print(f"to go on: {status.resume}", flush=True)


def _locked(handle: int) -> bool:
    """Whether this process holds the file now, or its disk has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def read_status(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """RUN/status.json of a run folder; null if there is none that can be read."""
    try:
        value = json.loads((Path(folder) / STATUS).read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def resume_command(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> str:
    """The shell command that goes on with a run that was started as `python -m module arguments`, by torchrun or not.

    An override of resume.step is left out: the run has gone on from there. On several nodes the command is to be given
    on each, with NODE_RANK set.
    """
    kept = [a for a in arguments if a.partition("=")[0].strip() != "resume.step"]
    if "TORCHELASTIC_RUN_ID" not in environment:
        return shlex.join(["python", "-m", module, *kept])
    nodes, ranks = environment.get("GROUP_WORLD_SIZE", "1"), environment.get("LOCAL_WORLD_SIZE", "1")
    where = "--standalone"
    if nodes != "1":
        host, port = (shlex.quote(environment.get(key, "")) for key in ("MASTER_ADDR", "MASTER_PORT"))
        where = f"--nnodes={nodes} --node-rank=$NODE_RANK --master-addr={host} --master-port={port}"
    return f"torchrun {where} --nproc-per-node={ranks} {shlex.join(['-m', module, *kept])}"
