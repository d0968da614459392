"""F1 to F3, F8, F17: processes are killed, stopped or told to leave, and a second job comes to the folder of one."""

from __future__ import annotations

import math
import random
import re
import shlex
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nanopoe.checkpoint import list_steps
from nanopoe.checkpoint.store import checkpoints_of, folder_of, opens
from nanopoe.train.status import read_status
from tests.faults.harness import Life, Report, Room, Torchrun, digest_of, fault, lines_of, torn
from tests.faults.moments import Spy, last_step, lasting, strike_at
from tests.faults.resume import CYCLE, alike, told

EVERY, STEPS = 2, 40
# A save takes some milliseconds, and a step not many more. Strict, so that 1 and 2 ranks are one run.
OFTEN = {"model.n_layer": 2, "model.poe_every": 1, "model.n_embd": 64, "runtime.numerics": "strict",
         "runtime.timeout_s": 10, "schedule.cycles": [{**CYCLE, "steps": STEPS}], "checkpoint.every": EVERY,
         "checkpoint.keep_last": 2, "evaluation.every": 10, "logging.pool_every": 100}
# Four micro-batches on four lanes, for 2 and 4 ranks; all checkpoints stay.
FOUR = {**OFTEN, "model.n_embd": 32, "batch.device_batch_size": 2, "schedule.cycles": [{**CYCLE, "steps": 26}],
        "checkpoint.every": 4, "checkpoint.keep_last": None, "evaluation.every": 5}
# Checkpoints are rare, so what is saved is saved for a signal; an evaluation takes longer than a step.
RARELY: dict[str, Any] = {**OFTEN, "model.n_embd": 32, "checkpoint.every": 7, "evaluation.every": 4,
                          "evaluation.tokens": 8192}


class Chain:
    """Runs that are started by the same command until they end, one after the other, and must end like `whole`."""

    def __init__(self, room: Room, report: Report, **changes: Any):
        self.room, self.report, self.changes, self.runs = room, report, changes, 1
        self.whole = room.whole("whole", 1, **changes)
        self.end, self.metrics, self.steps = digest_of(self.whole), metrics_of(self.whole), last_step(self.whole)

    @property
    def run_dir(self) -> Path:
        return self.room.folder / f"run{self.runs}"

    def start(self, ranks: int) -> Life:
        return self.room.start(self.room.experiment(self.run_dir.name, **self.changes), ranks)

    def torchrun(self, ranks: int) -> Torchrun:
        return self.room.torchrun(self.room.experiment(self.run_dir.name, **self.changes), ranks)

    def ended(self) -> None:
        """A life ended by itself: compare, and begin another run."""
        name, steps = f"run {self.runs} after {self.report.trials} trials", list_steps(self.run_dir)
        if self.report.check(steps[-1:] == [self.steps], f"{name} ended with checkpoints of {steps}"):
            self.report.check(digest_of(self.run_dir) == self.end, f"{name}: another end than the undisturbed run")
            self.report.check(alike(metrics_of(self.run_dir), self.metrics), f"{name}: other metrics than that")
        shutil.rmtree(self.run_dir)
        self.runs += 1

    def close(self) -> None:
        """Bring the last run to its end too."""
        if self.run_dir.exists():
            codes = self.start(1).wait()
            if self.report.check(codes == [0], f"the last life of run {self.runs} ended with {codes}"):
                self.ended()


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Without the gradient's norm, which owners sum in fp32: some 1e-6 lie between one rank's and two ranks'."""
    return [{key: value for key, value in line.items() if key != "grad_norm"} for line in told(run_dir)]


class Trimmed:
    """Copies of an undisturbed run without its later checkpoints, each to go on from the second."""

    def __init__(self, room: Room, report: Report, **changes: Any):
        self.room, self.report, self.changes = room, report, changes
        self.whole = room.whole("whole", 1, **changes)
        self.begin, self.end = list_steps(self.whole)[1], digest_of(self.whole)
        report.check(digest_of(self.whole, self.begin) != self.end, "control: no step changed anything")

    def copy(self, name: str) -> dict[str, Any]:
        """The experiment of a new copy."""
        run_dir = self.room.folder / name
        shutil.copytree(self.whole, run_dir)
        for later in [step for step in list_steps(run_dir) if step > self.begin]:
            shutil.rmtree(folder_of(run_dir, later))
        return self.room.experiment(name, **self.changes)

    def goes_on(self, run_dir: Path, name: str, again: Callable[[], list[int | None]]) -> None:
        """The next start, which is `again`, resumes from the newest checkpoint and ends as the undisturbed run did."""
        newest = max(list_steps(run_dir))
        codes = again()
        if not self.report.check(set(codes) == {0}, f"{name}: the next start ended with {codes}"):
            return
        resumed = [line["step"] for line in lines_of(run_dir) if line.get("event") == "resumed"]
        self.report.check(resumed[-1:] == [newest], f"{name}: went on from {resumed[-1:]}, not {newest}")
        self.report.check(digest_of(run_dir) == self.end, f"{name}: another end than the undisturbed run")


def start_again(room: Room, experiment: dict[str, Any], ranks: int) -> list[int | None]:
    return room.start(experiment, ranks).wait()


def follow(run_dir: Path) -> list[int | None]:
    """Give the command of status.json, through the fork server; exit codes by rank."""
    words = shlex.split((read_status(run_dir) or {})["resume"])
    ranks = [int(word.partition("=")[2]) for word in words if word.startswith("--nproc-per-node=")]
    return Life(run_dir, words[words.index("scripts.train") + 1:], (ranks or [1])[0]).wait()


# -- F1 ---------------------------------------------------------------------------------------------------------------

@fault("F1", "kill -9 at random, 1 and 2 ranks: nothing torn or lost, the same end", short=4, full=200)
def kills(room: Room, trials: int) -> Report:
    """40 % of the kills must leave a half-written save, 10 % a half-deleted checkpoint; it goes on until they have.

    A third of the kills hits one rank of two. Control: what those kills left, had it been written in place, is torn.
    """
    report = Report()
    chain, found, worst = Chain(room, report, **OFTEN), Counter[str](), 0
    lasts, wanted = lasting(chain.whole, 10), {"save": math.ceil(0.4 * trials), "rotation": math.ceil(0.1 * trials)}
    for i in range(3 * trials):
        lacking = [aim for aim, number in wanted.items() if found[aim] < number]
        if report.trials >= trials and not lacking:
            break
        aims = ["save"] * 6 + ["rotation"] * 2 + ["any"] * 2 if report.trials < trials else lacking
        spy, life = Spy(chain.run_dir), chain.start(1 + i % 2)
        victim = None if i % 2 == 0 or i % 6 == 3 else room.draw.randrange(2)
        if not strike_at(life, spy, room.draw.choice(aims), room.draw, lasts):
            codes = life.wait()
            if report.check(set(codes) == {0}, f"a life that was not killed ended with {codes}"):
                chain.ended()
            continue
        life.send(signal.SIGKILL, victim)
        report.trials += 1
        survived(report, chain, life, victim)
        worst = max(worst, check_kill(report, spy))
        tally(found, spy, len(life.ranks) == 2 and victim is not None)
    chain.close()
    for aim, number in wanted.items():
        report.check(found[aim] >= number, f"only {found[aim]} of {number} kills inside a {aim}")
    report.check(found["incomplete"] > 0, "control: none of the folders left behind lacked anything")
    report.note = (f"{found['save']} inside a save, {found['rotation']} inside a rotation, {found['one']} of one rank "
                   f"of two; {chain.runs - 1} runs; at most {worst} steps lost")
    return report


def survived(report: Report, chain: Chain, life: Life, victim: int | None) -> None:
    """The killed are dead; a rank that was not killed left with code 6, or 0 if all was done."""
    codes = life.wait(45)
    allowed = (6, 0) if list_steps(chain.run_dir)[-1:] == [chain.steps] else (6,)
    for rank, code in enumerate(codes):
        good = (-signal.SIGKILL, 0) if victim in (None, rank) else allowed
        report.check(code in good, f"trial {report.trials}: rank {rank} ended with {code}")


def check_kill(report: Report, spy: Spy) -> int:
    """What must hold at any instant; returns the steps lost: those since the last save, and one save in flight."""
    newest, bad = max(list_steps(spy.run_dir), default=0), torn(spy.run_dir)
    report.check(not bad, f"trial {report.trials}: torn checkpoints: {'; '.join(bad)}")
    report.check(newest >= spy.newest, f"trial {report.trials}: step {spy.newest} was committed and is gone")
    lost = max(0, last_step(spy.run_dir) - newest)
    report.check(lost <= 2 * EVERY, f"trial {report.trials}: {lost} steps were lost")
    return lost


def tally(found: Counter[str], spy: Spy, one_of_two: bool) -> None:
    """Count where the kill hit, by what it left behind."""
    saves = spy.new(".tmp-")
    found["save"] += bool(saves)
    found["rotation"] += bool(spy.new(".trash-"))
    found["one"] += one_of_two
    found["incomplete"] += any(not opens(checkpoints_of(spy.run_dir) / name) for name in saves)


# -- F2, F3 -----------------------------------------------------------------------------------------------------------

@fault("F2", "kill -9 one rank of 2 and 4 by torchrun: all leave in seconds and name it, and go on", short=1, full=20)
def one_rank(room: Room, trials: int) -> Report:
    """In five phases; "start" is before the run has its folder, so imports and the rendezvous."""
    report, slowest = Report(trials), Counter[str]()
    runs = Trimmed(room, report, **{**FOUR, "runtime.timeout_s": 10})
    lasts = {**lasting(runs.whole, 5), "start": 2.0}
    for i in range(trials):
        phase, ranks = ("training", "save", "evaluation", "start", "build")[i % 5], (2, 4)[i // 5 % 2]
        experiment, name = runs.copy(f"run{i}"), f"trial {i}, {phase} on {ranks} ranks"
        spy, life = Spy(Path(experiment["run_dir"])), room.torchrun(experiment, ranks)
        hit, victim = strike_at(life, spy, phase, room.draw, lasts), room.draw.randrange(ranks)
        killed = time.monotonic()
        life.send(signal.SIGKILL, victim)
        code, seconds = life.wait(), time.monotonic() - killed
        if not report.check(hit, f"{name}: it ended before, with {code}"):
            continue
        slowest[phase] = max(slowest[phase], math.ceil(seconds))
        limit = 60 if phase == "start" else 10
        report.check(code not in (0, None) and seconds <= limit, f"{name}: {code} after {seconds:.1f} s")
        if spy.began():
            check_failed(report, spy.run_dir, name, rf"rank {victim} is gone, last seen in step \d+", life.said())
            runs.goes_on(spy.run_dir, name, partial(follow, spy.run_dir))
        else:
            named = re.search(rf"^error\[peer\] .*rank {victim} (did not come|is gone)", life.said(), re.MULTILINE)
            report.check(named is not None, f"{name}: no survivor named rank {victim}")
            runs.goes_on(spy.run_dir, name, partial(start_again, room, experiment, ranks))
    report.note = "gone within seconds: " + ", ".join(f"{phase} {seconds}" for phase, seconds in slowest.items())
    return report


def check_failed(report: Report, run_dir: Path, name: str, words: str, said: str) -> None:
    """A rank said these words (a pattern) on one line as an error of a peer, and status.json repeats them."""
    line, status = rf"^error\[peer\] rank \d+: {words}", read_status(run_dir) or {}
    told_so = (status.get("state"), status.get("exit_code"))
    report.check(told_so == ("failed", 6), f"{name}: status.json says {told_so}")
    report.check(re.search(line, said, re.MULTILINE) is not None, f"{name}: no survivor said {words!r}")
    report.check(re.search(line, str(status.get("reason"))) is not None, f"{name}: the reason: {status.get('reason')}")
    report.check("scripts.train" in str(status.get("resume")), f"{name}: no command to go on")


@fault("F3", "SIGSTOP of one rank of two: the other leaves with code 6 and says so, stacks, goes on", short=1, full=6)
def stopped(room: Room, trials: int) -> Report:
    """Every second trial by torchrun. Control: a rank that is stopped for less than the timeout is waited for."""
    report, slowest = Report(trials), 0.0
    runs = Trimmed(room, report, **{**FOUR, "runtime.timeout_s": 5})
    lasts = lasting(runs.whole, 5)
    for i in range(trials + 1):
        control, victim, phase = i == trials, 1 - i // 2 % 2, ("training", "save", "evaluation")[i % 3]
        experiment, name = runs.copy(f"run{i}"), "control" if control else f"trial {i}, rank {victim} in {phase}"
        spy = Spy(Path(experiment["run_dir"]))
        life = room.torchrun(experiment, 2) if i % 2 and not control else room.start(experiment, 2)
        if not report.check(strike_at(life, spy, phase, room.draw, lasts), f"{name}: it ended before"):
            continue
        life.send(signal.SIGSTOP, victim)
        if control:
            time.sleep(2.5)
            life.send(signal.SIGCONT, victim)
            codes = life.wait()
            report.check(codes == [0, 0] and digest_of(spy.run_dir) == runs.end, f"control: ended with {codes}")
            break
        seconds, code = hung(life, 1 - victim)
        slowest = max(slowest, seconds)
        report.check(code == 6 and seconds <= 15, f"{name}: the other rank left with {code} after {seconds:.1f} s")
        check_failed(report, spy.run_dir, name, rf"rank {victim} is stopped \(State: T\), last seen in", life.said())
        for rank in (0, 1):
            log = (spy.run_dir / "logs" / f"rank_{rank}.log").read_text()
            report.check("most recent call first" in log, f"{name}: no stacks in the log of rank {rank}")
        runs.goes_on(spy.run_dir, name, partial(follow, spy.run_dir))
    report.note = f"at most {slowest:.1f} s"
    return report


def hung(life: Life | Torchrun, other: int) -> tuple[float, int | None]:
    """Seconds until the other rank has left (torchrun's: all of it), and with which code; then all are killed."""
    begun = time.monotonic()
    if isinstance(life, Torchrun):
        life.wait(40)
        return time.monotonic() - begun, life.codes().get(other)
    life.ranks[other].join(40)
    seconds, code = time.monotonic() - begun, life.ranks[other].exitcode
    time.sleep(1.0)                                        # it woke the stopped one, which may say where it was
    life.send(signal.SIGKILL)
    life.wait()
    return seconds, code


# -- F8 ---------------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Request:
    """One signal: in which phase, to whom (a rank, torchrun's agent, or null: all), of how many ranks, how often."""

    number: signal.Signals
    phase: str
    ranks: int
    by_torchrun: bool
    to: int | str | None
    times: int

    @classmethod
    def draw(cls, i: int, draw: random.Random) -> Request:
        """The i-th. Of ten, one is to an agent, and of twenty one to one of its workers; others are to one process,
        one of two, and both. An agent is not asked by SIGUSR1: it has no handler for that."""
        agent, one = i % 10 == 9, i % 20 == 4
        return cls(number=(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)[i // 10 % 2 if agent else i % 3],
                   phase=("any", "evaluation", "start", "save", "build", "any", "training", "evaluation")[i % 8],
                   ranks=2 if agent or one else 1 + (i % 3 > 0), by_torchrun=agent or one,
                   to="agent" if agent else draw.randrange(2) if i % 3 == 1 else None, times=1 + (i // 3 % 3 == 1))

    def send(self, life: Life | Torchrun, draw: random.Random) -> None:
        """Twice in quick succession if twice."""
        for sent in range(self.times):
            time.sleep(draw.uniform(0.01, 0.5) if sent else 0)
            if isinstance(self.to, str) and isinstance(life, Torchrun):
                life.agent.send_signal(self.number)                            # nothing if it has ended
            else:
                life.send(self.number, self.to if isinstance(self.to, int) else None)


@fault("F8", "SIGTERM, SIGINT, SIGUSR1 at random, to a rank, all, torchrun: saved, 75, no step lost", short=3, full=60)
def requests(room: Room, trials: int) -> Report:
    """A signal that comes after the end of a run is no trial. Control: most steps saved were not due to be."""
    report, found, slowest = Report(), Counter[str](), [0.0, 0.0]
    longer = shutil.copytree(room.data / "train", room.data / "long")
    chain = Chain(room, report, **RARELY, **{"data.val.0.path": str(longer)})
    lasts = lasting(chain.whole, 4)
    for _ in range(3 * trials):
        if report.trials == trials:
            break
        request, spy = Request.draw(report.trials, room.draw), Spy(chain.run_dir)
        life = chain.torchrun(request.ranks) if request.by_torchrun else chain.start(request.ranks)
        hit, sent, name = strike_at(life, spy, request.phase, room.draw, lasts), time.time(), f"trial {report.trials}"
        request.send(life, room.draw)
        code = life.wait(30)
        if (read_status(chain.run_dir) or {}).get("state") == "finished":
            report.check(code in (0, [0], [0, 0]), f"{name}: finished, and ended with {code}")
            chain.ended()
            continue
        report.trials += 1
        if report.check(hit, f"{name}: the run ended before, with {code}"):
            expected = 1 if request.by_torchrun else [75] * request.ranks
            report.check(code == expected, f"{name}, {request}: ended with {code}")
            idle, seconds = not spy.trained(), spy.status.stat().st_mtime - sent
            slowest[idle] = max(slowest[idle], seconds)
            report.check(seconds <= (20 if idle else 5), f"{name}, {request}: saved after {seconds:.1f} s")
            check_left(report, chain.run_dir, f"{name}, {request}")
            notice(found, chain.run_dir)
    chain.close()
    report.check(report.trials == trials, f"only {report.trials} of {trials} signals came before the end of a run")
    report.check(found["extra"] > 0, "control: every step saved would have been saved anyway")
    report.note = (f"{found['extra']} saved for the signal alone, {found['cut']} in an evaluation, {found['early']} "
                   f"before the first step of a life; {chain.runs - 1} runs; saved in {slowest[0]:.1f} s at most, gone "
                   f"before a first step in {slowest[1]:.1f} s")
    return report


def check_left(report: Report, run_dir: Path, name: str) -> None:
    """It left in order and nothing is lost."""
    status, bad = read_status(run_dir) or {}, torn(run_dir)
    told_so = (status.get("state"), status.get("exit_code"))
    report.check(told_so == ("preempted", 75), f"{name}: status.json says {told_so}")
    steps = (status.get("step"), status.get("checkpoint") or 0, max(list_steps(run_dir), default=0), last_step(run_dir))
    report.check(len(set(steps)) == 1, f"{name}: step, checkpoint, newest, last line are {steps}")
    report.check(not bad, f"{name}: torn: {bad}")


def notice(found: Counter[str], run_dir: Path) -> None:
    """Count where the signal hit."""
    lines, step = lines_of(run_dir), last_step(run_dir)
    found["extra"] += step % RARELY["checkpoint.every"] != 0 and step != STEPS
    found["cut"] += step > 0 and step % RARELY["evaluation.every"] == 0 and not any(
        line["kind"] == "eval" and line["step"] == step for line in lines)
    found["early"] += [line.get("event") for line in lines[-2:]] == ["resumed", "preempted"]


# -- F17 --------------------------------------------------------------------------------------------------------------

@fault("F17", "a second job in a folder is refused and names the first, which goes on; when that is killed, it is not",
       short=1, full=4)
def two_jobs(room: Room, trials: int) -> Report:
    report = Report(trials)
    runs = Trimmed(room, report, **{**FOUR, "schedule.cycles": [{**CYCLE, "steps": 60}]})
    lasts = lasting(runs.whole, 5)
    for i in range(trials):
        experiment, ranks, name = runs.copy(f"run{i}"), 1 + i % 2, f"trial {i}"
        spy, first = Spy(Path(experiment["run_dir"])), room.start(experiment, ranks)
        report.check(strike_at(first, spy, "training", room.draw, lasts), f"{name}: it ended before")
        before, pid = spy.trained(), first.pids[0]
        codes = room.start(experiment, 1 + i // 2 % 2).wait()
        report.check(set(codes) == {2}, f"{name}: the second job ended with {codes}")
        refusal = rf"error\[config\] .*another job trains in this folder: pid {pid} on {socket.gethostname()} since"
        report.check(re.search(refusal, first.said()) is not None, f"{name}: the refusal does not name the first job")
        status = read_status(spy.run_dir) or {}
        report.check((status.get("state"), status.get("pid")) == ("running", pid), f"{name}: status.json says {status}")
        while first.alive and spy.trained() <= before:
            time.sleep(0.01)
        first.send(signal.SIGKILL)
        ended = first.wait()
        report.check(set(ended) == {-signal.SIGKILL}, f"{name}: the first job ended with {ended}, not by the kill")
        runs.goes_on(spy.run_dir, name, partial(start_again, room, experiment, ranks))
    return report
