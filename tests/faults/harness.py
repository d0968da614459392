"""Faults: real runs of scripts.train, hurt on purpose, and what must hold afterwards.

A fault is a function `(room, trials) -> Report` registered under its id. Runs are started by a fork server that has
torch imported (a trial then costs a second, not five) but go through the real command line: argv, environment of
torchrun where there are several ranks, signals, exit codes. `python -m tests.faults` prints a line for each.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nanopoe.checkpoint import digest, list_steps, open_checkpoint
from tests.ranks import experiment_dict, forked, tiny_data

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0            # after which a run that should have ended counts as hung


@dataclass
class Report:
    """What a fault found: how often it was tried, a line for every time something did not hold, and a remark."""

    trials: int = 0
    failures: list[str] = field(default_factory=list)
    note: str = ""

    def check(self, holds: bool, otherwise: str) -> bool:
        if not holds:
            self.failures.append(otherwise)
        return holds


@dataclass(frozen=True)
class Fault:
    """`short` trials in `make test`, `full` in `make faults`."""

    id: str
    what: str
    run: Callable[[Room, int], Report]
    short: int
    full: int


FAULTS: dict[str, Fault] = {}


def fault(id: str, what: str, *, short: int, full: int) -> Callable[[Callable[[Room, int], Report]], Any]:
    def register(run: Callable[[Room, int], Report]) -> Callable[[Room, int], Report]:
        FAULTS[id] = Fault(id, what, run, short, full)
        return run

    return register


class Room:
    """A folder with the tiny data set and tokenizer, where one fault makes its runs; draws from a seed."""

    def __init__(self, folder: Path, seed: int = 0):
        self.folder, self.draw = folder, random.Random(seed)
        self.data = tiny_data(folder / "data")

    def experiment(self, name: str, **changes: Any) -> dict[str, Any]:
        """The tiny experiment in the run folder `name`; `changes` as dotted keys."""
        return experiment_dict(self.data, self.folder / name, **changes)

    def whole(self, name: str, ranks: int = 1, **changes: Any) -> Path:
        """The run folder of a run that nothing happened to."""
        experiment = self.experiment(name, **changes)
        codes = self.start(experiment, ranks).wait(5 * PATIENCE_S)
        assert codes == [0] * ranks, f"the undisturbed run ended with {codes}"
        return Path(experiment["run_dir"])

    def start(self, experiment: dict[str, Any], ranks: int = 1, *overrides: str) -> Life:
        """Start `scripts.train` on the experiment; its console goes to RUN.log beside the run folder."""
        return Life(Path(experiment["run_dir"]), [self._config(experiment), *overrides], ranks)

    def torchrun(self, experiment: dict[str, Any], ranks: int, *overrides: str) -> Torchrun:
        """The same by torchrun itself, which takes seconds."""
        return Torchrun(Path(experiment["run_dir"]), [self._config(experiment), *overrides], ranks)

    def _config(self, experiment: dict[str, Any]) -> str:
        config = Path(experiment["run_dir"]).with_suffix(".yaml")
        config.write_text(json.dumps(experiment))                            # JSON is YAML
        return str(config)


class Life:
    """The processes of one start of a run."""

    def __init__(self, run_dir: Path, arguments: list[str], ranks: int):
        self.run_dir, self.console = run_dir, run_dir.with_suffix(".log")
        context = forked()
        port = free_port() if ranks > 1 else 0
        self.started = time.monotonic()
        self.ranks: list[BaseProcess] = []
        for rank in range(ranks):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks,
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if ranks > 1 else {}
            process = context.Process(target=_train, args=(arguments, environment, str(self.console)))
            process.start()
            self.ranks.append(process)

    @property
    def pids(self) -> list[int]:
        return [p.pid for p in self.ranks if p.pid is not None]

    @property
    def alive(self) -> bool:
        return any(p.is_alive() for p in self.ranks)

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for r, p in enumerate(self.ranks):
            if (rank is None or r == rank) and p.is_alive() and p.pid is not None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(p.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> list[int | None]:
        """Exit codes by rank, None for one that had to be killed after `timeout_s`."""
        end = time.monotonic() + timeout_s
        for p in self.ranks:
            p.join(max(0.0, end - time.monotonic()))
        codes = [p.exitcode for p in self.ranks]
        self.send(signal.SIGKILL)
        for p in self.ranks:
            p.join()
        return codes

    def said(self) -> str:
        return self.console.read_text() if self.console.exists() else ""


class Torchrun:
    """One start of a run by the real torchrun: an agent, and the ranks that it started."""

    def __init__(self, run_dir: Path, arguments: list[str], ranks: int):
        self.run_dir, self.console, self.size = run_dir, run_dir.with_suffix(".log"), ranks
        self._before = len(self.said())
        command = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "scripts.train"]
        with open(self.console, "a") as out:
            self.agent = subprocess.Popen([sys.executable, "-m", *command, *arguments], cwd=ROOT, stdout=out,
                                          stderr=subprocess.STDOUT)

    def workers(self) -> dict[int, int]:
        """Rank -> process id of the ranks that are there."""
        found = {}
        for process in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):
                if int((process / "stat").read_text().rpartition(")")[2].split()[1]) == self.agent.pid:
                    rank = re.search(rb"(?:^|\0)RANK=(\d+)", (process / "environ").read_bytes())
                    if rank:
                        found[int(rank[1])] = int(process.name)
        return found

    @property
    def pids(self) -> list[int]:
        """Of the ranks, in order; empty until all of them are there."""
        found = self.workers()
        return [found[rank] for rank in sorted(found)] if len(found) == self.size else []

    @property
    def alive(self) -> bool:
        return self.agent.poll() is None

    def send(self, number: int, rank: int | None = None) -> None:
        """A signal to one rank, or to all."""
        for r, pid in self.workers().items():
            if rank is None or r == rank:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int | None:
        """torchrun's exit code, None if it and its ranks had to be killed after `timeout_s`."""
        try:
            return self.agent.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
            self.agent.kill()
            self.agent.wait()
            return None

    def codes(self) -> dict[int, int]:
        """Rank -> exit code of the ranks that failed, as torchrun reports them."""
        told = self.said()[self._before:]
        return {int(r): int(c) for r, c in re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", told)}

    def said(self) -> str:
        return self.console.read_text() if self.console.exists() else ""


def _train(arguments: list[str], environment: dict[str, Any], console: str) -> None:
    """In the child: what `python -m scripts.train ARGUMENTS` does, output to a file."""
    out = os.open(console, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", closefd=False, buffering=1)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.update({key: str(value) for key, value in environment.items()})
    sys.argv = ["train", *arguments]
    from scripts.train import main

    main()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def digest_of(run_dir: Path, step: int | None = None) -> str:
    """Of weights, optimizer state and train state, every file verified."""
    checkpoint = open_checkpoint(run_dir, step)
    checkpoint.verify()
    return digest(checkpoint)


def torn(run_dir: Path) -> list[str]:
    """The committed steps that do not verify."""
    bad = []
    for step in list_steps(run_dir):
        try:
            open_checkpoint(run_dir, step).verify()
        except Exception as error:
            bad.append(f"step {step}: {error}")
    return bad


def losses(run_dir: Path) -> dict[int, float]:
    """step -> loss of metrics.jsonl."""
    return {line["step"]: line["loss"] for line in lines_of(run_dir) if line["kind"] == "train"}


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl."""
    written = (run_dir / "metrics.jsonl").read_text()
    whole = written[: written.rfind("\n") + 1]                  # a living run may be in the middle of a line
    return [json.loads(line) for line in whole.splitlines()]


def leftovers(run_dir: Path, prefix: str) -> list[str]:
    """Entries of the checkpoint folder that begin with `prefix`, e.g. ".tmp-" """
    folder = run_dir / "checkpoints"
    return sorted(p.name for p in folder.iterdir() if p.name.startswith(prefix)) if folder.is_dir() else []


@contextlib.contextmanager
def copied(run_dir: Path, to: Path) -> Iterator[Path]:
    """A copy of a run folder, removed afterwards."""
    shutil.copytree(run_dir, to)
    try:
        yield to
    finally:
        shutil.rmtree(to, ignore_errors=True)
