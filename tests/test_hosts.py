"""Two hosts: an agent of torchrun on each, c10d rendezvous; one is lost, and the run ends as if it had not been."""

from __future__ import annotations

import errno
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nanopoe.checkpoint import list_steps
from nanopoe.data.audit import check_audit
from nanopoe.train.status import read_status
from tests import hosts as machines
from tests.commands import write_yaml
from tests.faults.harness import Room, digest_of, lines_of, torn
from tests.faults.moments import last_step
from tests.faults.resume import CYCLE
from tests.hosts import Host

STEPS, EVERY = 40, 4
# Four micro-batches on four lanes, so that 1, 2 and 4 ranks are one run, bit for bit.
CHANGES: dict[str, Any] = {
    "batch.device_batch_size": 2, "runtime.numerics": "strict", "runtime.timeout_s": 8, "logging.audit": True,
    "schedule.cycles": [{**CYCLE, "steps": STEPS}], "checkpoint.every": EVERY, "checkpoint.keep_last": None,
    "evaluation.every": 10, "logging.pool_every": 100}


@dataclass
class Scene:
    """Two hosts and a run of which is known how it ends when nothing happens."""

    room: Room
    hosts: list[Host]
    end: str

    @property
    def run_dir(self) -> Path:
        return self.room.folder / "run"

    def start(self, hosts: list[Host], ranks: int, life: int) -> None:
        config = write_yaml(self.room.folder / "run.yaml", self.room.experiment("run", **CHANGES))
        machines.torchrun(hosts, ranks, [str(config)], self.room.folder / "run.log", life)

    def trained(self) -> int:
        """The last step that is told."""
        return last_step(self.run_dir)

    def ended(self) -> None:
        """As it would have ended, and every document read once."""
        assert list_steps(self.run_dir)[-1] == STEPS and torn(self.run_dir) == []
        assert digest_of(self.run_dir) == self.end
        audit = check_audit(self.run_dir)
        assert audit.problems == [] and audit.steps == STEPS, audit


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    room = Room(tmp_path)
    whole = room.whole("whole", 1, **CHANGES)
    assert digest_of(whole) != digest_of(whole, STEPS - EVERY), "control: steps change something"
    with machines.two_hosts() as hosts:
        yield Scene(room, hosts, digest_of(whole))


def lose(scene: Scene, lost: Host, how: str) -> Host:
    """A host is lost in the midst of training; the other one, when it has left and said why."""
    machines.until(lambda: scene.trained() >= EVERY + 2, scene.hosts)
    assert (read_status(scene.run_dir) or {})["state"] == "running"                                  # control
    begun, other = time.monotonic(), scene.hosts[1 - lost.number]
    if how == "kill":
        lost.kill()
        assert other.wait(60) not in (0, None), other.said()
        assert "error[peer]" in other.said()
    else:                                    # the agent that has lost the store hangs for minutes; its ranks do not
        lost.cut()
        while not all("error[peer]" in host.said() for host in scene.hosts):
            assert time.monotonic() - begun < 40, "ranks on either side wait for ever"
            time.sleep(0.1)
        for host in scene.hosts:
            host.kill()
        lost.mend()
    assert time.monotonic() - begun < 40
    reached = scene.trained()
    assert EVERY < reached < STEPS, "it was in the midst of training"
    return other


def check_told(scene: Scene, lost: Host, other: Host) -> None:
    """The survivors say in one line who is lost, on which host, and so does status.json. With host 0 the store is
    lost, by which they heard of each other."""
    words = rf"error\[peer\] rank \d+: .*rank \d+ (no longer beats|is gone).*in step \d+ .* on {re.escape(lost.name)}"
    if lost.number == 0 and machines.namespaces():
        words = (rf"error\[peer\] rank \d+: the store of the rendezvous on {lost.name} is gone \(.*\): that host is "
                 rf"lost, or the network to it; rank 0 was last seen in step \d+ .* on {lost.name}")
    assert re.search(words, other.said()), other.said()
    status = read_status(scene.run_dir) or {}
    assert (status["state"], status["exit_code"]) == ("failed", 6) and "error[peer]" in status["reason"], status
    assert list_steps(scene.run_dir)[-1] < STEPS


def went_on(scene: Scene) -> list[int]:
    """The steps that it was resumed from."""
    return [line["step"] for line in lines_of(scene.run_dir) if line.get("event") == "resumed"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_host_is_lost_and_the_other_goes_on_alone(scene: Scene, number: int) -> None:
    """Host 0 holds the rendezvous, and with it the store, and rank 0."""
    scene.start(scene.hosts, 1, 1)
    lost = scene.hosts[number]
    other = lose(scene, lost, "kill")
    check_told(scene, lost, other)
    newest = list_steps(scene.run_dir)[-1]
    assert scene.room.start(scene.room.experiment("run", **CHANGES), 1).wait() == [0]
    assert went_on(scene) == [newest]
    scene.ended()


@pytest.mark.slow
@pytest.mark.parametrize("how, number, ranks, then", [
    ("kill", 1, 2, (2, 2)), ("kill", 0, 2, (1, 2)), ("kill", 0, 2, (2, 1)), ("cut", 1, 1, (2, 1)),
    ("cut", 0, 2, (1, 2))])
def test_a_host_is_lost_and_comes_back(scene: Scene, how: str, number: int, ranks: int, then: tuple[int, int]) -> None:
    """`then`: how many hosts the next life has, and ranks on each: as many as before, or half, on one host or two."""
    if how == "cut" and not machines.namespaces():
        pytest.skip("needs network namespaces: root, ip, unshare")
    scene.start(scene.hosts, ranks, 1)
    lost = scene.hosts[number]
    other = lose(scene, lost, how)
    check_told(scene, lost, other)
    newest, again = list_steps(scene.run_dir)[-1], scene.hosts[:then[0]]
    scene.start(again, then[1], 2)
    assert [host.wait(120) for host in again] == [0] * len(again), "\n".join(host.said() for host in again)
    assert went_on(scene) == [newest]
    scene.ended()


@pytest.mark.slow
def test_an_undisturbed_run_on_two_hosts_ends_the_same(scene: Scene) -> None:
    """Control: without a loss, on 4 ranks of two hosts."""
    scene.start(scene.hosts, 2, 1)
    assert [host.wait(120) for host in scene.hosts] == [0, 0], scene.hosts[0].said()
    scene.ended()


def test_hosts_are_apart(tmp_path: Path) -> None:
    """What is tested above are two hosts: other names and process tables, and the link is the only way."""
    if not machines.namespaces():
        pytest.skip("needs network namespaces: root, ip, unshare")
    with machines.two_hosts() as hosts:
        def say(script: str, *hosts: Host) -> list[list[str]]:
            """What they say, all at the same time: a name of what is gone may be given again."""
            consoles = [tmp_path / f"{host.number}.said" for host in hosts]
            for host, console in zip(hosts, consoles, strict=True):
                console.write_text("")
                host.start(["sh", "-c", f"{script}; sleep 1"], console)
            assert None not in [host.wait(20) for host in hosts]
            return [console.read_text().split() for console in consoles]

        look = "hostname; ls -d /proc/[0-9]* | wc -l; readlink /proc/self/ns/pid /proc/self/ns/net"
        first, second = say(look, *hosts)
        assert first[0] == "host0" and second[0] == "host1" and int(first[1]) < 10
        assert len({*first[2:], *second[2:]}) == 4
        reach = ("import socket; s = socket.socket(); s.settimeout(1); print(s.connect_ex(('10.77.0.1', 9)))")
        assert say(f'{sys.executable} -c "{reach}"', hosts[1]) == [[str(errno.ECONNREFUSED)]], "it is there"
        hosts[0].cut()
        assert say(f'{sys.executable} -c "{reach}"', hosts[1]) != [[str(errno.ECONNREFUSED)]]
