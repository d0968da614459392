"""What is seen of a run from outside, and so when to strike: in a step, a save, a rotation, an evaluation."""

from __future__ import annotations

import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nanopoe.checkpoint import list_steps
from tests.faults.harness import Life, Torchrun, leftovers, lines_of, losses


class Spy:
    """What can be seen from outside of one life of a run; made before that begins."""

    def __init__(self, run_dir: Path):
        self.run_dir, self.metrics, self.status = run_dir, run_dir / "metrics.jsonl", run_dir / "status.json"
        self.there = set(leftovers(run_dir, "."))
        self.newest = max(list_steps(run_dir), default=0)
        self.stale = inode(self.metrics) if last_step(run_dir) > self.newest else None
        self.old_status = self._status_time()
        self.saves: set[str] = set()

    def began(self) -> bool:
        """Whether this life has the folder for itself, and said so in status.json."""
        return self._status_time() != self.old_status

    def new(self, prefix: str) -> list[str]:
        """Folders with this prefix that this life made."""
        return [name for name in leftovers(self.run_dir, prefix) if name not in self.there]

    def saving(self) -> int:
        """While a save writes: how many it is of this life; else 0."""
        now = self.new(".tmp-")
        self.saves.update(now)
        return len(self.saves) if now else 0

    def trained(self) -> int:
        """Steps that this life made so far. It drops the lines of lost ones by replacing the file."""
        return max(0, last_step(self.run_dir) - self.newest) if inode(self.metrics) != self.stale else 0

    def evaluating(self, every: int) -> bool:
        """Whether the last line is of a step after which there is an evaluation."""
        line = lines_of(self.run_dir)[-1] if self.trained() else {}
        return line.get("kind") == "train" and line["step"] % every == 0

    def _status_time(self) -> int:
        return self.status.stat().st_mtime_ns if self.status.exists() else 0


def strike_at(life: Life | Torchrun, spy: Spy, phase: str, draw: random.Random, lasts: dict[str, float]) -> bool:
    """Wait for a moment in a phase of this life, which `lasts` so many seconds; False if the run ends before."""
    count = draw.randint(1, 3)
    begun: Callable[[], Any] = {
        "any": lambda: listens(life), "start": lambda: listens(life), "build": spy.began,
        "training": lambda: spy.trained() >= count, "save": lambda: spy.saving() >= count,
        "rotation": lambda: spy.new(".trash-"), "evaluation": lambda: spy.evaluating(int(lasts["every"]))}[phase]
    while not begun():
        if not life.alive:
            return False
        time.sleep(0.0003)
    time.sleep(draw.uniform(0, lasts[phase]))
    return life.alive


def listens(life: Life | Torchrun) -> bool:
    """Whether all ranks have their signal handlers, of which SIGUSR2's is the last."""
    def caught(pid: int) -> bool:
        try:
            mask = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        except OSError:
            return False
        return mask is not None and bool(int(mask[1], 16) >> (signal.SIGUSR2 - 1) & 1)

    pids = life.pids
    return bool(pids) and all(map(caught, pids))


def lasting(whole: Path, every: int) -> dict[str, float]:
    """Seconds that each phase lasts, from an undisturbed run with an evaluation `every` so many steps."""
    lines = lines_of(whole)
    saves = sorted(line["seconds"] for line in lines if line.get("event") == "checkpoint")
    evaluations = sorted(line["seconds"] for line in lines if line["kind"] == "eval")
    return {"any": 2.0, "start": 0.2, "build": 0.2, "training": 0.2, "save": saves[len(saves) // 2] / 2,
            "rotation": 0.0, "evaluation": evaluations[len(evaluations) // 2], "every": every}


def last_step(run_dir: Path) -> int:
    """Of the train lines in metrics.jsonl, 0 if there is none."""
    return max(losses(run_dir), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def inode(path: Path) -> int:
    """Another one when a file was replaced, once; 0 if there is none."""
    return path.stat().st_ino if path.exists() else 0
