"""F1 to F3, F8, F17: processes are killed, stopped or told to leave, and a second job comes to the folder of one."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanopoe.checkpoint import list_steps
from nanopoe.checkpoint.store import checkpoints_of, folder_of, opens
from nanopoe.train.status import read_status
from tests.faults.harness import Life, Report, Room, Torchrun, digest_of, fault, losses, torn
from tests.faults.moments import Spy, last_step, lasting, strike_at
from tests.faults.resume import CYCLE, alike, told

EVERY, STEPS = 2, 40
# Wide and flat: a save takes some milliseconds, a step not many more. Strict, so that 1 and 2 ranks are one run.
WIDE = {"model.n_layer": 2, "model.poe_every": 1, "model.n_embd": 64, "runtime.numerics": "strict",
        "runtime.timeout_s": 20, "schedule.cycles": [{**CYCLE, "steps": STEPS}], "checkpoint.every": EVERY,
        "checkpoint.keep_last": 2, "evaluation.every": 10, "logging.pool_every": 100}
# Four micro-batches on four lanes, for 2 and 4 ranks; all checkpoints stay.
FOUR = {**WIDE, "model.n_embd": 32, "batch.device_batch_size": 2, "schedule.cycles": [{**CYCLE, "steps": 26}],
        "checkpoint.every": 4, "checkpoint.keep_last": None, "evaluation.every": 5}


# -- runs with many lives ---------------------------------------------------------------------------------------------

class Chain:
    """Runs that are started by the same command until they end, one after the other, and must end like `whole`."""

    def __init__(self, room: Room, report: Report, **changes: Any):
        self.room, self.report, self.changes, self.runs = room, report, changes, 1
        self.whole = room.whole("whole", 1, **changes)
        self.end, self.metrics = digest_of(self.whole), metrics_of(self.whole)
        self.steps = max(losses(self.whole))

    @property
    def run_dir(self) -> Path:
        return self.room.folder / f"run{self.runs}"

    def start(self, ranks: int) -> Life:
        return self.room.start(self.room.experiment(self.run_dir.name, **self.changes), ranks)

    def torchrun(self, ranks: int) -> Torchrun:
        return self.room.torchrun(self.room.experiment(self.run_dir.name, **self.changes), ranks)

    def ended(self) -> None:
        """A life ended by itself: compare, and begin another run."""
        name = f"run {self.runs} after {self.report.trials} trials"
        steps = list_steps(self.run_dir)
        if self.report.check(steps[-1:] == [self.steps], f"{name} ended with checkpoints of {steps}"):
            self.report.check(digest_of(self.run_dir) == self.end, f"{name}: another end than the undisturbed run")
            self.report.check(alike(metrics_of(self.run_dir), self.metrics), f"{name}: other metrics than the undisturbed run")
        shutil.rmtree(self.run_dir)
        self.runs += 1

    def close(self) -> None:
        """Bring the last run to its end too."""
        if self.run_dir.exists():
            codes = self.start(1).wait()
            self.report.check(codes == [0], f"the last life of run {self.runs} ended with {codes}")
            self.ended()


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """Without the gradient's norm, which owners sum in fp32 and so differs by some 1e-6 between one rank and two."""
    return [{key: value for key, value in line.items() if key != "grad_norm"} for line in told(run_dir)]


# -- F1 ---------------------------------------------------------------------------------------------------------------

@fault("F1", "kill -9 at random, 1 and 2 ranks: nothing torn or lost, the same end", short=4, full=200)
def kills(room: Room, trials: int) -> Report:
    """40 % of the kills must leave a half-written save, 10 % a half-deleted checkpoint; it goes on until they have.

    A third of the kills hits one rank of two. Control: what those kills left, had it been written in place, is torn.
    """
    report = Report()
    chain, found, worst = Chain(room, report, **WIDE), Counter[str](), 0
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
        worst = max(worst, check_kill(report, chain.run_dir, spy.newest))
        tally(found, chain.run_dir, spy, len(life.ranks) == 2 and victim is not None)
    chain.close()
    for aim, number in wanted.items():
        report.check(found[aim] >= number, f"only {found[aim]} of {number} kills inside a {aim}")
    report.check(found["incomplete"] > 0, "control: none of the folders left behind lacked anything")
    report.note = (f"{found['save']} inside a save, {found['rotation']} inside a rotation, {found['one']} of one rank of "
                   f"two; {chain.runs - 1} runs; at most {worst} steps lost")
    return report


def survived(report: Report, chain: Chain, life: Life, victim: int | None) -> None:
    """All killed are dead; a rank that was not killed left with code 6, or 0 if it had just ended."""
    codes = life.wait(30)
    allowed = (6, 0) if list_steps(chain.run_dir)[-1:] == [chain.steps] else (6,)
    for rank, code in enumerate(codes):
        good = (-signal.SIGKILL, 0) if victim in (None, rank) else allowed
        report.check(code in good, f"trial {report.trials}: rank {rank} ended with {code}")


def check_kill(report: Report, run_dir: Path, newest_before: int) -> int:
    """What must hold at any instant; returns the steps lost, at most an interval and one whose save was in flight."""
    newest = max(list_steps(run_dir), default=0)
    report.check(not torn(run_dir), f"trial {report.trials}: torn checkpoints: {'; '.join(torn(run_dir))}")
    report.check(newest >= newest_before, f"trial {report.trials}: step {newest_before} was committed and is gone")
    lost = max(0, last_step(run_dir) - newest)
    report.check(lost <= 2 * EVERY, f"trial {report.trials}: {lost} steps were lost")
    return lost


def tally(found: Counter[str], run_dir: Path, spy: Spy, one_of_two: bool) -> None:
    """Count where the kill hit, by what it left behind."""
    saves = spy.new(".tmp-")
    found["save"] += bool(saves)
    found["rotation"] += bool(spy.new(".trash-"))
    found["one"] += one_of_two
    found["incomplete"] += any(not opens(checkpoints_of(run_dir) / name) for name in saves)


# -- F2, F3 -----------------------------------------------------------------------------------------------------------

class Trimmed:
    """Copies of an undisturbed run, without its last checkpoints: each is to go on from there."""

    def __init__(self, room: Room, report: Report, **changes: Any):
        self.room, self.report, self.changes = room, report, changes
        self.whole = room.whole("whole", 1, **changes)
        self.end = digest_of(self.whole)
        self.start = list_steps(self.whole)[1]
        report.check(digest_of(self.whole, self.start) != self.end, "control: no step changed anything")

    def copy(self, name: str) -> dict[str, Any]:
        """The experiment of a new copy."""
        run_dir = self.room.folder / name
        shutil.copytree(self.whole, run_dir)
        for later in [step for step in list_steps(run_dir) if step > self.start]:
            shutil.rmtree(folder_of(run_dir, later))
        return self.room.experiment(name, **self.changes)

    def goes_on(self, run_dir: Path, name: str, again: Callable[[], list[int | None]]) -> None:
        """The next start, which is `again`, resumes from the newest checkpoint and ends as the undisturbed run did."""
        newest = max(list_steps(run_dir))
        codes = again()
        if not self.report.check(set(codes) == {0}, f"{name}: the next start ended with {codes}"):
            return
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        resumed = [line["step"] for line in lines if line.get("event") == "resumed"]
        self.report.check(resumed[-1:] == [newest], f"{name}: went on from {resumed[-1:]}, not {newest}")
        self.report.check(digest_of(run_dir) == self.end, f"{name}: another end than the undisturbed run")


def follow(run_dir: Path) -> list[int | None]:
    """Give the command of status.json, through the fork server; exit codes by rank."""
    words = shlex.split((read_status(run_dir) or {})["resume"])
    ranks = [int(word.partition("=")[2]) for word in words if word.startswith("--nproc-per-node=")]
    return Life(run_dir, words[words.index("scripts.train") + 1:], (ranks or [1])[0]).wait()


def check_failed(report: Report, run_dir: Path, name: str, line: str, said: str) -> None:
    """A survivor said `line` (a pattern), and status.json repeats it."""
    status = read_status(run_dir) or {}
    told_so = (status.get("state"), status.get("exit_code"))
    report.check(told_so == ("failed", 6), f"{name}: status.json says {told_so}")
    report.check(re.search(line, said, re.MULTILINE) is not None, f"{name}: no survivor said {line!r}")
    report.check(re.search(line, str(status.get("reason"))) is not None, f"{name}: the reason is {status.get('reason')}")
    report.check("scripts.train" in str(status.get("resume")), f"{name}: no command to go on")


@fault("F2", "kill -9 one rank of 2 and 4 under torchrun: all leave in seconds, naming it, and go on", short=1, full=20)
def one_rank(room: Room, trials: int) -> Report:
    report = Report(trials)
    runs, slowest = Trimmed(room, report, **{**FOUR, "runtime.timeout_s": 10}), Counter[str]()
    lasts = {**lasting(runs.whole, 5), "build": 2.0}
    for i in range(trials):
        phase, ranks = ("training", "save", "evaluation", "started", "build")[i % 5], (2, 4)[i // 5 % 2]
        victim, name = room.draw.randrange(ranks), f"{phase} {i} on {ranks} ranks"
        experiment = runs.copy(f"run{i}")
        run_dir = Path(experiment["run_dir"])
        spy, life = Spy(run_dir), room.torchrun(experiment, ranks)
        if phase == "started":                                     # it is this life's: the folder's lock is held
            while life.alive and (read_status(run_dir) or {})["state"] != "running":
                time.sleep(0.005)
        hit = phase == "started" or strike_at(life, spy, phase, room.draw, lasts)
        killed = time.monotonic()
        life.send(signal.SIGKILL, victim)
        code, seconds = life.wait(), time.monotonic() - killed
        if not report.check(hit, f"{name}: it ended before with {code}"):
            continue
        limit = 60 if phase == "build" else 10
        slowest[phase] = max(slowest[phase], math.ceil(seconds))
        report.check(code not in (0, None) and seconds <= limit, f"{name}: {code} after {seconds:.1f} s")
        again: Callable[[], list[int | None]] = lambda d=run_dir: follow(d)  # type: ignore[misc]
        if phase == "build" and (read_status(run_dir) or {})["state"] == "finished":   # of the run that was copied
            absent = rf"^error\[peer\] .*rank {victim} (did not come|is gone)"
            report.check(re.search(absent, life.said(), re.MULTILINE) is not None, f"{name}: no survivor named it")
            again = lambda e=experiment, n=ranks: room.start(e, n).wait()  # type: ignore[misc]  # noqa: E731
        else:
            check_failed(report, run_dir, name, rf"^error\[peer\] rank \d+: rank {victim} is gone, last seen in step \d+",
                         life.said())
        runs.goes_on(run_dir, name, again)
    report.note = "at most " + ", ".join(f"{seconds} s in {phase}" for phase, seconds in slowest.items())
    return report


@fault("F3", "one rank of two stopped (SIGSTOP): the other leaves with code 6 and says so, with stacks", short=1, full=6)
def stopped(room: Room, trials: int) -> Report:
    """Control: one that is stopped for less than the timeout is waited for."""
    report = Report(trials)
    runs = Trimmed(room, report, **{**FOUR, "runtime.timeout_s": 5})
    lasts, slowest = lasting(runs.whole, 5), 0.0
    for i in range(trials + 1):
        control, name = i == trials, f"trial {i}" if i < trials else "control"
        experiment = runs.copy(f"run{i}")
        run_dir, victim = Path(experiment["run_dir"]), 1 - i // 2 % 2
        spy, life = Spy(run_dir), (room.torchrun if i % 2 and not control else room.start)(experiment, 2)
        if not report.check(strike_at(life, spy, ("training", "save", "evaluation")[i % 3], room.draw, lasts),
                            f"{name}: it ended before"):
            continue
        life.send(signal.SIGSTOP, victim)
        if control:
            time.sleep(2.5)
            life.send(signal.SIGCONT, victim)
            codes = life.wait()
            report.check(codes == [0, 0] and digest_of(run_dir) == runs.end, f"control: ended with {codes}")
            break
        seconds, code = hung(life, 1 - victim)
        slowest = max(slowest, seconds)
        report.check(code == 6 and seconds <= 15, f"{name}: the other rank left with {code} after {seconds:.1f} s")
        check_failed(report, run_dir, name, rf"^error\[peer\] rank {1 - victim}: rank {victim} (is stopped|no longer)",
                     life.said())
        for rank in (0, 1):
            log = (run_dir / "logs" / f"rank_{rank}.log").read_text()
            report.check("most recent call first" in log, f"{name}: no stacks in the log of rank {rank}")
        runs.goes_on(run_dir, name, lambda d=run_dir: follow(d))  # type: ignore[misc]
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

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PHASES = ("any", "evaluation", "build", "save", "any", "evaluation", "training", "save")


@fault("F8", "SIGTERM, SIGINT, SIGUSR1 at random, to one rank, all or torchrun: saved, 75, no step lost", short=3, full=60)
def requests(room: Room, trials: int) -> Report:
    """Checkpoints are rare here, so what is saved is saved for the signal. Every third signal comes twice."""
    report, found = Report(), Counter[str]()
    changes = {**WIDE, "model.n_embd": 32, "checkpoint.every": 7, "evaluation.every": 4, "evaluation.tokens": 8192,
               "data.val.0.path": str(shutil.copytree(room.data / "train", room.data / "long"))}
    chain, slowest = Chain(room, report, **changes), [0.0, 0.0]
    lasts = lasting(chain.whole, 4)
    for _ in range(3 * trials):
        i = report.trials
        if i == trials:
            break
        agent = i % 10 == 9
        number = REQUESTS[i // 10 % 2 if agent else i % 3]          # torchrun leaves at once for SIGUSR1, unasked
        to = None if i % 3 == 2 else room.draw.randrange(2)
        spy = Spy(chain.run_dir)
        life: Life | Torchrun = chain.torchrun(2) if agent or i % 20 == 4 else chain.start(1 if i % 3 == 0 else 2)
        hit = strike_at(life, spy, PHASES[i % 8], room.draw, lasts)
        sent = time.time()
        for _ in range(2 if i // 3 % 3 == 1 else 1):
            ask(life, number, None if isinstance(life, Life) and len(life.ranks) == 1 else to, agent)
            time.sleep(room.draw.uniform(0.01, 0.5) if i // 3 % 3 == 1 else 0)
        code = life.wait(30)
        if (read_status(chain.run_dir) or {}).get("state") == "finished":    # it came too late, or not at all
            report.check(code in (0, [0], [0, 0]), f"trial {i}: finished, and ended with {code}")
            chain.ended()
            continue
        report.trials += 1
        if report.check(hit, f"trial {i}: the run ended before, with {code}"):
            seconds = check_left(report, chain.run_dir, life, code, sent, f"{number.name}, trial {i}")
            began = not spy.trained()
            report.check(seconds <= (20 if began else 5), f"{number.name}, trial {i}: saved after {seconds:.1f} s")
            slowest[began] = max(slowest[began], seconds)
            notice(found, chain.run_dir)
    chain.close()
    report.check(report.trials == trials, f"only {report.trials} of {trials} signals came before the end of a run")
    report.check(found["extra"] > 0, "control: every step saved would have been saved anyway")
    report.note = (f"{found['extra']} saved for the signal alone, {found['cut']} in an evaluation, {found['early']} "
                   f"before the first step of a life; {chain.runs - 1} runs; saved in {slowest[0]:.1f} s at most, gone before "
                   f"the first step in {slowest[1]:.1f} s")
    return report


def ask(life: Life | Torchrun, number: int, rank: int | None, agent: bool) -> None:
    if agent and isinstance(life, Torchrun):
        if life.alive:
            life.agent.send_signal(number)
    else:
        life.send(number, rank)


def check_left(report: Report, run_dir: Path, life: Life | Torchrun, code: Any, sent: float, name: str) -> float:
    """Left in order: code 75, nothing lost. Returns the seconds until all was saved."""
    status = read_status(run_dir) or {}
    expected = 1 if isinstance(life, Torchrun) else [75] * len(life.ranks)
    report.check(code == expected, f"{name}: ended with {code}")
    told_so = (status.get("state"), status.get("exit_code"))
    report.check(told_so == ("preempted", 75), f"{name}: status.json says {told_so}")
    steps = (status.get("step"), status.get("checkpoint") or 0, max(list_steps(run_dir), default=0), last_step(run_dir))
    report.check(len(set(steps)) == 1, f"{name}: step, checkpoint, newest, last line are {steps}")
    report.check(not torn(run_dir), f"{name}: torn: {torn(run_dir)}")
    return (run_dir / "status.json").stat().st_mtime - sent


def notice(found: Counter[str], run_dir: Path) -> None:
    """Count where the signal hit."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    step = last_step(run_dir)
    found["extra"] += step % 7 != 0 and step != STEPS
    found["cut"] += step % 4 == 0 and step > 0 and not any(m["kind"] == "eval" and m["step"] == step for m in lines)
    found["early"] += [m.get("event") for m in lines[-2:]] == ["resumed", "preempted"]


# -- F17 --------------------------------------------------------------------------------------------------------------

@fault("F17", "a second job in the folder is refused, naming the first, which goes on; a killed one's is taken over",
       short=1, full=4)
def two_jobs(room: Room, trials: int) -> Report:
    """Control: the same start is not refused once the first job is killed."""
    report = Report(trials)
    runs = Trimmed(room, report, **FOUR)
    lasts = lasting(runs.whole, 5)
    for i in range(trials):
        experiment, ranks, name = runs.copy(f"run{i}"), 1 + i % 2, f"trial {i}"
        run_dir = Path(experiment["run_dir"])
        spy, first = Spy(run_dir), room.start(experiment, ranks)
        report.check(strike_at(first, spy, "training", room.draw, lasts), f"{name}: it ended before")
        before, status = spy.trained(), read_status(run_dir)
        codes = room.start(experiment, 1 + i // 2 % 2).wait()
        report.check(set(codes) == {2}, f"{name}: the second job ended with {codes}")
        refusal = rf"error\[config\] .*another job trains in this folder: pid {first.pids[0]} on {socket.gethostname()} "
        report.check(re.search(refusal, first.said()) is not None, f"{name}: the refusal does not name the first job")
        told_now = read_status(run_dir)
        report.check(told_now is not None and status is not None and told_now["pid"] == status["pid"] == first.pids[0],
                     f"{name}: status.json is no longer the first job's")
        while first.alive and spy.trained() <= before:
            time.sleep(0.01)
        first.send(signal.SIGKILL)
        ended = first.wait()
        report.check(set(ended) == {-signal.SIGKILL}, f"{name}: the first job ended with {ended}, not by the kill")
        runs.goes_on(run_dir, name, lambda e=experiment, n=ranks: room.start(e, n).wait())  # type: ignore[misc]
    return report
