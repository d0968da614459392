"""Slow ranks: the rule on made-up records, the stopwatch, and a real rank that is held up, is named, and recovers."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanopoe.dist import heartbeat, pace
from nanopoe.dist.pace import Pace, Stopwatch
from nanopoe.dist.roll import Record
from tests.commands import write_yaml
from tests.faults.harness import _train, free_port, lines_of
from tests.ranks import experiment_dict, forked

HERE = Record(1, 12, "forward/backward", 5, 40, False, "node", "m", 77, "1")


# -- the rule ---------------------------------------------------------------------------------------------------------

def walk(judge: Pace, seconds: float, *parts: float, start: float = 0.0) -> None:
    """Steps of one second for so long; each rank takes so much of it for its own part."""
    for step in range(int(start), int(start + seconds) + 1):
        records = [replace(HERE, host=f"node{r}", parts=step, part_seconds=step * p) for r, p in enumerate(parts)]
        judge.hear(records, 1.0)


@pytest.mark.parametrize("parts, slow", [
    ((0.4, 0.4), []), ((0.4, 0.5), []), ((0.4, 0.59), []), ((0.4, 0.61), [1]), ((0.61, 0.4), [0]),
    ((0.4, 0.4, 0.9, 0.4), [2]), ((0.4, 0.4, 0.9, 0.9), [2, 3]), ((0.9, 0.9, 0.9, 0.4), [])])
def test_slow_is_half_more_than_the_median(parts: tuple[float, ...], slow: list[int]) -> None:
    judge = Pace(len(parts))
    walk(judge, pace.LOOK_S * pace.LOOKS - 1, *parts)
    assert judge.slow == (), "not after a while that is too short"
    walk(judge, pace.LOOK_S + 2, *parts, start=pace.LOOK_S * pace.LOOKS)
    assert [s.rank for s in judge.slow] == slow
    for s in judge.slow:
        assert (s.host, s.seconds) == (f"node{s.rank}", pytest.approx(parts[s.rank]))
        assert s.median_seconds == pytest.approx(0.4)


def test_one_bad_moment_is_not_slow() -> None:
    """Rank 1 stands still for 3 s in every 20: a look now and then, never LOOKS in a row. Control: in every look."""
    def named(every: int) -> bool:
        judge, total, found = Pace(2), 0.0, False
        for step in range(100):
            total += 3.4 if step % every == 0 else 0.4
            judge.hear([replace(HERE, parts=step, part_seconds=0.4 * (step + 1)),
                        replace(HERE, parts=step, part_seconds=total)], 1.0)
            found = found or judge.slow != ()
        return found

    assert not named(20) and named(4)


def test_no_look_without_all_ranks_and_some_steps() -> None:
    judge = Pace(2)
    for step in range(60):
        judge.hear([replace(HERE, parts=step, part_seconds=0.1 * step), None], 1.0)
    for step in range(60):                                        # rank 1 begins to beat, and its steps take a minute
        judge.hear([replace(HERE, parts=step, part_seconds=0.1 * step), replace(HERE, parts=1, part_seconds=60)], 1.0)
    assert judge.slow == () and judge._since is not None


# -- the stopwatch ----------------------------------------------------------------------------------------------------

def test_the_stopwatch_counts_what_is_the_ranks_own(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    pulse = heartbeat.Pulse(watch=Stopwatch())

    def collective(seconds: float, enters: bool = True, waits: bool = True) -> None:
        pulse.entered += enters
        pulse.waiting = waits
        now[0] += seconds
        pulse.waiting = False

    def step(rows: float, compute: float, phase: str = "forward/backward") -> None:
        pulse.watch.mark("data")
        now[0] += rows
        collective(100)                                           # all agree that the rows are good
        pulse.watch.mark(phase)
        now[0] += compute
        collective(0, waits=False)                                # a gradient leaves
        now[0] += compute
        collective(200, enters=False)                             # one lands
        collective(300)                                           # the sums of the step: here all meet
        now[0] += 50                                              # the update
        collective(400, enters=False)

    step(1, 2)
    step(3, 4)
    pulse.watch.mark("evaluate")
    assert (pulse.watch.steps, pulse.watch.seconds) == (2, 1 + 2 * 2 + 3 + 2 * 4)
    now[0] += 1000
    collective(10)
    step(7, 7, phase="build")                                     # the first step of a life
    pulse.watch.mark("data")
    assert pulse.watch.steps == 2


# -- real ranks -------------------------------------------------------------------------------------------------------

def _look_often(arguments: list[str], environment: dict[str, Any], console: str) -> None:
    pace.LOOK_S = 0.6
    _train(arguments, environment, console)


@contextlib.contextmanager
def held_up(pid: int) -> Iterator[None]:
    """The process is stopped for 60 ms, runs for 30, and so on."""
    over = threading.Event()

    def hold() -> None:
        while not over.wait(0.03):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.06)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.slow                                                     # other work on the machine makes a rank slow, too
def test_a_rank_that_is_held_up_is_named_until_it_keeps_up(tmp_path: Path, data: Path) -> None:
    """Control: before that, both ranks are even, and nobody is named."""
    experiment = experiment_dict(data, tmp_path / "run", **{
        "schedule.cycles": [{"steps": 100000, "peak": 1.0, "warmup_steps": 1, "warmdown_ratio": 0.4, "final_frac": 0.1,
                             "momentum_warmup_steps": 2}],
        "model.n_embd": 64, "checkpoint.every": None, "evaluation.every": None, "logging.every": 100})
    arguments = [str(write_yaml(tmp_path / "run.yaml", experiment))]
    environment = {"LOCAL_WORLD_SIZE": 2, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    console = tmp_path / "run.log"
    ranks = [forked().Process(target=_look_often, args=(arguments, {**environment, "RANK": r, "LOCAL_RANK": r},
                                                        str(console))) for r in range(2)]
    for p in ranks:
        p.start()

    def slow() -> list[dict[str, Any]]:
        there = (tmp_path / "run" / "metrics.jsonl").exists()
        return [line for line in lines_of(tmp_path / "run") if line.get("event") == "slow rank"] if there else []

    def until(true: Callable[[], bool]) -> None:
        end = time.monotonic() + 30
        while not true():
            assert time.monotonic() < end and all(p.is_alive() for p in ranks), console.read_text()
            time.sleep(0.05)

    try:
        until(lambda: (tmp_path / "run" / "metrics.jsonl").exists() and len(lines_of(tmp_path / "run")) > 10)
        time.sleep(2.5)
        assert slow() == []
        assert ranks[1].pid is not None
        with held_up(ranks[1].pid):
            until(lambda: len(slow()) == 1)
        until(lambda: len(slow()) == 2)
    finally:
        for p in ranks:
            p.terminate()
        for p in ranks:
            p.join(20)
            p.kill()
    named, over = slow()
    assert named["rank"] == over["rank"] == 1 and named["host"] == os.uname().nodename and over["over"] is True
    assert named["seconds"] > pace.SLOW * named["median_seconds"]
    told = console.read_text()
    assert f"slow rank 1 on {os.uname().nodename}: its part of a step takes " in told
    assert "slow rank 1 keeps up again" in told
