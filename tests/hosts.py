"""Two hosts on one machine: network namespaces with addresses of their own joined by a link, with process tables and
names of their own, where the machine allows them; else two groups of processes on loopback."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.faults.harness import ROOT, free_port

PORT = 29533


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@functools.cache
def namespaces() -> bool:
    """Whether this machine lets us make hosts: the right to, and the commands ip, unshare and nsenter."""
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        return False
    try:
        with network(f"np{os.getpid()}t"):
            words = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "hostname", "x"]
            return subprocess.run(words, capture_output=True).returncode == 0
    except (OSError, subprocess.CalledProcessError):
        return False


@contextlib.contextmanager
def network(name: str) -> Iterator[list[str]]:
    """Two network namespaces, NAMEa and NAMEb, with 10.77.0.1 and 10.77.0.2 at the ends of a link."""
    spaces = [name + end for end in "ab"]
    try:
        for space in spaces:
            ip("netns", "add", space)
        ip("link", "add", "eth0", "netns", spaces[0], "type", "veth", "peer", "name", "eth0", "netns", spaces[1])
        for i, space in enumerate(spaces):
            ip("-n", space, "addr", "add", f"10.77.0.{i + 1}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", space, "link", "set", device, "up")
        yield spaces
    finally:
        for space in spaces:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)


class Host:
    """One of them. `name` is what its processes call it: the other's is the same on loopback."""

    def __init__(self, number: int, space: str | None = None, names: Path | None = None):
        self.number, self.space, self._names = number, space, names
        self.name = os.uname().nodename if space is None else f"host{number}"
        self.console: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], console: Path) -> None:
        """Run a command here, from the root of the project; what it says is appended to `console`."""
        self.console = console
        if self.space is not None:
            inside = ["unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c",
                      'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"', self.name, str(self._names)]
            command = ["ip", "netns", "exec", self.space, *inside, *command]
        with open(console, "a") as out:
            self._process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT,
                                             start_new_session=True)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """The host is gone: everything on it is killed, with no time for a word. With a process table of its own, the
        kernel kills what is in it when its first process is; else torchrun's ranks, which lead groups of their own,
        are looked for."""
        if self._process is None:
            return
        for pid in [*self._ranks(), self._process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _ranks(self) -> list[int]:
        """Processes of the sessions below ours, where there is no process table of their own."""
        assert self._process is not None
        found = []
        for entry in Path("/proc").iterdir() if self.space is None else ():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == self._process.pid:
                    found.append(int(entry.name))
        return found

    def cut(self) -> None:
        """Its cable is pulled: nothing comes through, and nobody is told."""
        assert self.space is not None, "there is no cable on loopback"
        ip("-n", self.space, "link", "set", "eth0", "down")

    def mend(self) -> None:
        assert self.space is not None
        ip("-n", self.space, "link", "set", "eth0", "up")

    def wait(self, seconds: float) -> int | None:
        """The exit code of its command; null if it had to be killed."""
        assert self._process is not None
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            return None

    def said(self) -> str:
        """Without torchrun's own report of what failed."""
        return "" if self.console is None else re.sub(r"(?m)^[EWI]\d{4} .*\n", "", self.console.read_text())


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    with contextlib.ExitStack() as stack:
        hosts = [Host(number) for number in range(2)]
        if namespaces():
            names = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "hosts"
            names.write_text("127.0.0.1 localhost\n10.77.0.1 host0\n10.77.0.2 host1\n")
            spaces = stack.enter_context(network(f"np{os.getpid()}"))
            hosts = [Host(number, space, names) for number, space in enumerate(spaces)]
        try:
            yield hosts
        finally:
            for host in hosts:
                host.kill()


def torchrun(hosts: list[Host], ranks: int, arguments: list[str], console: Path, life: int) -> None:
    """scripts.train by an agent per host, `ranks` on each, which meet at the first by c10d."""
    apart = hosts[0].space is not None
    meet = f"host0:{PORT + life}" if apart else f"127.0.0.1:{free_port()}"
    for host in hosts:
        host.start([sys.executable, "-m", "torch.distributed.run",
                    f"--nnodes={len(hosts)}", f"--nproc-per-node={ranks}", f"--rdzv-id=life{life}",
                    "--rdzv-backend=c10d", f"--rdzv-endpoint={meet}", "-m", "scripts.train", *arguments],
                   console.with_name(f"{console.stem}.{host.number}.log"))


def until(true: Callable[[], bool], hosts: list[Host], seconds: float = 60) -> None:
    """Wait for `true()`, while all hosts live."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it takes too long"
        assert all(host.alive for host in hosts), "\n".join(host.said() for host in hosts)
        time.sleep(0.02)
