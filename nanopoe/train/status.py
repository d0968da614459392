"""RUN/status.json: what became of a run, and the command that goes on with it. Replaced atomically at each change.

Keys: state (running | finished | preempted | failed), step, total_steps, checkpoint (the newest step saved), reason
(the one line of the error, or the signal), exit_code, world_size, host, pid, time, resume. Rank 0 writes it; another
one only to say that rank 0 is lost. "running" with no such process on `host` means that all ranks were killed.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.files import replace_file
from nanopoe.checkpoint.store import list_steps
from nanopoe.errors import PREEMPTED, NanopoeError, PeerError, StorageError

STATUS = "status.json"


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
        self._life = ""                            # what only the files of this life have: host and pid of rank 0

    def begin(self, step: int, total_steps: int, life: str) -> None:
        """The run is built and stands at `step`. `life` is `whoami()` of rank 0."""
        self.total_steps, self._life = total_steps, life
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
        self.state, self.exit_code = "failed", getattr(error, "exit_code", 1)
        if not (self._speaks_for_rank_0(error) if self.rank != 0 else self._speaks_first(error)):
            return False
        text = error.render() if isinstance(error, NanopoeError) else f"error[internal] {type(error).__name__}: {error}"
        self._write(text)
        return True

    def _speaks_first(self, error: BaseException) -> bool:
        """Rank 0 was stopped, and is awake to hear that the others are gone: they left for it, and have said so."""
        told = read_status(self.path.parent) or {}
        return not (isinstance(error, PeerError) and told.get("state") == "failed")

    def _speaks_for_rank_0(self, error: BaseException) -> bool:
        """Whether rank 0 is lost, with no better reason told by itself, and this is the first rank that is not."""
        if not isinstance(error, PeerError) or 0 not in error.ranks:
            return False
        told = read_status(self.path.parent)
        own = told is not None and f"{told.get('host')} {told.get('pid')}" == self._life
        if told is not None and own and told.get("state") == "failed":
            return False
        return self.rank == min(set(range(self.size)) - set(error.ranks), default=self.rank)

    def _write(self, reason: str | None) -> None:
        host, _, pid = whoami().rpartition(" ")
        value = {"state": self.state, "step": self.step, "total_steps": self.total_steps,
                 "checkpoint": max(self._saved(), default=None), "reason": reason, "exit_code": self.exit_code,
                 "world_size": self.size, "host": host, "pid": int(pid),
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


def whoami() -> str:
    """Host and process id of this process."""
    return f"{socket.gethostname()} {os.getpid()}"


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
