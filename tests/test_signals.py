"""A signal on any rank: all save and leave at the same step, going on is bitwise, and status.json says it all."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from nanopoe.checkpoint import digest, list_steps, open_checkpoint
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.train import loop, signals
from nanopoe.train.signals import Signals
from nanopoe.train.status import Status, read_status
from tests.faults.process import follow
from tests.ranks import experiment_dict, forked, run_ranks

ROOT = Path(__file__).parents[1]
ALONE = World(0, 1, torch.device("cpu"))
TIMINGS = ("seconds", "wait_seconds", "tokens_per_s", "mfu", "memory_bytes")


def until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- the flag ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("number", signals.REQUESTS)
def test_a_signal_sets_the_flag(number: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(number)
    with Signals() as asked:
        assert not asked.asked                                                              # control
        for _ in range(3):                                                # again within 2 s: the same request
            os.kill(os.getpid(), number)
        until(lambda: asked.asked)
        assert asked.name == number.name
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
    assert capfd.readouterr().err == f"{number.name}: stops after this step; once more leaves at once\n"


def child(what: str, log: str) -> None:
    """A process that gets signals: "repeats" waits for the second, "settled" ignores all, "stacks" dumps."""
    signals.SAME_S = 0.2
    with Signals() as asked:
        if what == "stacks":
            asked.stacks_to(Path(log))
            os.kill(os.getpid(), signal.SIGUSR2)
            return
        if what == "settled":
            asked.settle()
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
    sys.exit(75)


@pytest.mark.parametrize("what, code", [("repeats", 128 + signal.SIGTERM), ("settled", 75), ("stacks", 0)])
def test_a_later_repeat_leaves_at_once(tmp_path: Path, what: str, code: int) -> None:
    process = forked().Process(target=child, args=(what, str(tmp_path / "log")))
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert (what == "stacks") == (tmp_path / "log").exists()
    if what == "stacks":
        assert "in child" in (tmp_path / "log").read_text()


# -- the loop ---------------------------------------------------------------------------------------------------------

def asked_at(world: World, experiment: dict[str, Any], rank: int, when: str, step: int) -> tuple[int, str | None, bool]:
    """Train; rank `rank` gets a signal before `step` is done, in the evaluation after it, or before all.

    The step reached, the state told, whether signals were ignored at the end.
    """
    asked, status = Signals(), Status(experiment["run_dir"], world.rank, world.size, "the command")
    real_step, real_evaluate, made = loop.train_step, loop.evaluate, []

    def train_step(model: Any, optimizer: Any, rows: Any, now: int, *args: Any, **kw: Any) -> Any:
        made.append(now + 1)
        if when == "step" and made[-1] == step and world.rank == rank:
            asked.name = "SIGTERM"
        return real_step(model, optimizer, rows, now, *args, **kw)

    def evaluate(model: Any, batches: Any, *args: Any, **kw: Any) -> Any:
        def read() -> Any:
            for i, rows in enumerate(batches):
                yield rows
                if when == "evaluation" and made[-1:] == [step] and i == 0 and world.rank == rank:
                    asked.name = "SIGUSR1"

        return real_evaluate(model, read(), *args, **kw)

    if when == "start" and world.rank == rank:
        asked.name = "SIGINT"
    loop.train_step, loop.evaluate = train_step, evaluate
    try:
        reached = loop.train(experiment_from_dict(experiment, "test"), world, asked, status).step
    finally:
        loop.train_step, loop.evaluate = real_step, real_evaluate
    return reached, status.state, signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if line["kind"] != "event"]


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that no signal cut short."""
    folder = tmp_path_factory.mktemp("signals") / "whole"
    experiment = experiment_dict(data, folder, **{"checkpoint.every": None, "evaluation.tokens": 1024})
    assert run_ranks(asked_at, 2, experiment, 9, "never", 0) == [(8, "finished", False)] * 2
    return folder


@pytest.mark.parametrize("when, step, every", [
    ("step", 3, None), ("evaluation", 8, 4), pytest.param("step", 4, 4, marks=pytest.mark.slow),
    pytest.param("evaluation", 4, None, marks=pytest.mark.slow),
    pytest.param("start", 0, None, marks=pytest.mark.slow)])
def test_one_ranks_signal_stops_all_and_nothing_is_lost(data: Path, whole: Path, tmp_path: Path, when: str, step: int,
                                                        every: int | None) -> None:
    changes, cut = {"checkpoint.every": every, "evaluation.tokens": 1024}, tmp_path / "cut"
    stopped = run_ranks(asked_at, 2, experiment_dict(data, cut, **changes), 1, when, step)
    assert stopped == [(step, "preempted", True)] * 2
    status = read_status(cut)
    assert status is not None and status["state"] == "preempted" and status["exit_code"] == 75
    assert (status["step"], status["checkpoint"], status["total_steps"]) == (step, step or None, 8)
    assert re.fullmatch(r"SIG[A-Z1]+ on rank 1", status["reason"]) and status["resume"] == "the command"
    assert list_steps(cut) == sorted({*range(every or 99, step + 1, every or 99), *([step] if step else [])})
    if when != "start":
        assert not any(m["kind"] == "eval" and m["step"] == step for m in metrics(cut)), "cut short, so dropped"
    assert run_ranks(asked_at, 2, experiment_dict(data, cut, **changes), 9, when, 0) == [(8, "finished", False)] * 2
    assert digest(open_checkpoint(cut, 8)) == digest(open_checkpoint(whole, 8))
    assert metrics(cut) == metrics(whole), "the evaluation was made up for"
    told = read_status(cut)
    assert told is not None and (told["state"], told["exit_code"], told["resume"]) == ("finished", 0, None)


# -- by torchrun ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ended:
    out: str
    codes: dict[int, int]            # as torchrun reports those of failed ranks
    status: dict[str, Any]
    seconds: float                   # from the fault to the end of the last rank


def workers(agent: int) -> dict[int, int]:
    """Rank -> process id of torchrun's children."""
    found = {}
    for process in Path("/proc").iterdir():
        try:
            if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == agent:
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (process / "environ").read_bytes())
                if rank:
                    found[int(rank[1])] = int(process.name)
        except (OSError, ValueError, IndexError):
            continue
    return found


def torchrun(folder: Path, experiment: dict[str, Any], fault: Callable[[int, dict[int, int]], None] | None,
             *overrides: str) -> Ended:
    """Two ranks; `fault(agent, workers)` after the second checkpoint of this life. Written to a file, as a pipe may
    fill up."""
    file, run = folder / "tiny.yaml", Path(experiment["run_dir"])
    file.write_text(yaml.safe_dump(experiment, sort_keys=False))
    before = len(list_steps(run))
    with open(folder / "out.txt", "w") as out:
        process = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                    "--nproc-per-node=2", "-m", "scripts.train", str(file), *overrides],
                                   cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)
        try:
            start = time.monotonic()
            if fault is not None:
                until(lambda: len(list_steps(run)) >= before + 2 or process.poll() is not None)
                ranks = workers(process.pid)
                start = time.monotonic()
                fault(process.pid, ranks)
            process.wait(90)
        finally:
            for pid in [*workers(process.pid).values(), *([process.pid] if process.poll() is None else [])]:
                os.kill(pid, signal.SIGKILL)
    text = (folder / "out.txt").read_text()
    codes = {int(r): int(c) for r, c in re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", text)}
    return Ended(text, codes, read_status(run) or {}, time.monotonic() - start)


def endless(data: Path, run: Path, **changes: Any) -> dict[str, Any]:
    return experiment_dict(data, run, **{"schedule.cycles.0.steps": 100_000, "checkpoint.every": 20,
                                         "evaluation.every": None, "checkpoint.keep_last": None, **changes})


def lines_of(ended: Ended, start: str) -> list[str]:
    return [line for line in ended.out.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank(data: Path, tmp_path: Path, victim: int) -> None:
    ended = torchrun(tmp_path, endless(data, tmp_path / "run"), lambda _, ranks: os.kill(ranks[victim], signal.SIGKILL))
    assert ended.codes == {victim: -9, 1 - victim: 6} and ended.seconds < 10, ended
    (line,) = lines_of(ended, "error[")
    assert re.match(rf"error\[peer\] rank {1 - victim}: rank {victim} is gone, last seen in step \d+ \(", line)
    assert (ended.status["state"], ended.status["exit_code"], ended.status["reason"]) == ("failed", 6, line)
    command = f"torchrun --standalone --nproc-per-node=2 -m scripts.train {tmp_path}/tiny.yaml"
    assert ended.status["resume"] == command
    assert lines_of(ended, "to go on") == [f"to go on: {command}"]
    assert "[W" not in ended.out, "torch's own warnings are off"


def test_a_signal_to_one_worker_and_the_command_that_goes_on(data: Path, tmp_path: Path) -> None:
    """SIGUSR1 to one rank: both save and exit 75; the command of status.json ends where an uninterrupted run does."""
    steps = {"schedule.cycles.0.steps": 37, "checkpoint.every": 4}
    experiment = endless(data, tmp_path / "run", **steps)
    ended = torchrun(tmp_path, experiment, lambda _, ranks: os.kill(ranks[1], signal.SIGUSR1), "logging.every=100")
    assert ended.codes == {0: 75, 1: 75} and ended.seconds < 10, ended
    status = ended.status
    assert (status["state"], status["exit_code"], status["reason"]) == ("preempted", 75, "SIGUSR1 on rank 1")
    assert status["step"] == status["checkpoint"] == list_steps(tmp_path / "run")[-1] < 40
    assert lines_of(ended, "to go on: ") == [f"to go on: {status['resume']}"] and "Traceback" not in \
        ended.out.partition("to go on")[0]
    command = shlex.split(status["resume"])
    assert command[0] == "torchrun" and command[-1] == "logging.every=100"
    assert follow(tmp_path / "run") == [0, 0]                           # that command, by the fork server
    assert "finished step=40" in (tmp_path / "run.log").read_text()
    run_ranks(asked_at, 2, {**experiment, "run_dir": str(tmp_path / "whole")}, 9, "never", 0)
    assert digest(open_checkpoint(tmp_path / "run", 40)) == digest(open_checkpoint(tmp_path / "whole", 40))
    assert (read_status(tmp_path / "run") or {})["state"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun(data: Path, tmp_path: Path, number: signal.Signals) -> None:
    def everyone(agent: int, ranks: dict[int, int]) -> None:
        os.kill(agent, number)
        if number == signal.SIGINT:                                # a terminal sends it to all of its processes
            for pid in ranks.values():
                os.kill(pid, number)

    ended = torchrun(tmp_path, endless(data, tmp_path / "run"), everyone)
    assert ended.seconds < 10, ended
    assert (ended.status["state"], ended.status["exit_code"]) == ("preempted", 75)
    assert ended.status["reason"] == f"{number.name} on rank 0, {number.name} on rank 1"
    assert ended.status["step"] == ended.status["checkpoint"]


@pytest.mark.slow
def test_a_stopped_rank(data: Path, tmp_path: Path) -> None:
    ended = torchrun(tmp_path, endless(data, tmp_path / "run", **{"runtime.timeout_s": 5}),
                     lambda _, ranks: os.kill(ranks[1], signal.SIGSTOP))
    assert ended.codes[0] == 6 and ended.seconds < 15, ended
    line = lines_of(ended, "error[")[0]
    assert re.match(r"error\[peer\] rank 0: rank 1 is stopped \(State: T\), last seen in step \d+ \(", line)
    assert (ended.status["state"], ended.status["exit_code"], ended.status["reason"]) == ("failed", 6, line)
    for rank in (0, 1):
        assert "in train_step" in (tmp_path / "run" / "logs" / f"rank_{rank}.log").read_text(), "its stacks"
