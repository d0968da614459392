"""One job in a run folder: RUN/.lock, held by rank 0 with flock as long as the run lives.

Whoever takes it writes who holds it: so the text tells lives of a run apart, also where there are no locks, or where
those of a lost host last for a while.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nanopoe import dist
from nanopoe.checkpoint.files import write_all
from nanopoe.dist import World
from nanopoe.errors import ConfigError

WITHOUT_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def run_lock(run_dir: str | Path, world: World) -> Iterator[list[str]]:
    """Hold the run folder in this block; gives warnings. Collective.

    ConfigError on all ranks if another job holds it. A dead job holds nothing: the system lets go of its lock. Where
    the file system has no locks, a warning says so.
    """
    handles: list[int] = []
    warnings: list[str] = []
    try:
        with dist.agree(world.device):
            if world.is_main:
                path = Path(run_dir) / ".lock"
                os.makedirs(run_dir, exist_ok=True)
                handles.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
                warnings = take(handles[0], path)
        yield warnings
    finally:
        for handle in handles:
            os.close(handle)


def take(handle: int, path: Path) -> list[str]:
    """Lock an open file and write into it who holds it."""
    warnings = []
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
        if not held and error.errno not in WITHOUT_FLOCK:
            raise
        if held:
            raise ConfigError(f"another job trains in this folder: {read_holder(handle)}", path,
                              "wait for it, stop it, or use another run_dir") from error
        warnings = [f"{path.parent} is on a file system without locks: see that no other job trains in it"]
    holder = json.dumps({"host": socket.gethostname(), "pid": os.getpid(),
                         "since": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())})
    try:
        os.ftruncate(handle, 0)
        write_all(handle, holder.encode() + b"\n")
        os.fsync(handle)                                 # other hosts read it
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error              # os.write knows no name
    return warnings


def life_of(run_dir: str | Path) -> str:
    """The text of RUN/.lock, which names the last life of the run; empty if it cannot be read."""
    try:
        return (Path(run_dir) / ".lock").read_bytes()[:4096].decode(errors="replace")
    except OSError:
        return ""


def read_holder(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        host, since = (ascii(holder[key])[1:-1][:80] for key in ("host", "since"))
        return f"pid {int(holder['pid'])} on {host} since {since}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has just begun"
