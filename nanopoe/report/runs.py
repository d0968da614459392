"""The story a run left in its folder: metrics.jsonl, the evaluations, and the phases of its schedule. No torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.evaluation import read_evaluation
from nanopoe.config.schema import Experiment, ScheduleConfig
from nanopoe.errors import DataError


@dataclass(frozen=True)
class Phase:
    """Steps start..end (both counted from 0, end exclusive) of a cycle; `kind` is warm-up, hold or warm-down."""

    cycle: int
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class RunStory:
    """What can be read of a run, named as its folder.

    `evaluation` is the newest full one, else that of the last eval line, else null.
    """

    name: str
    path: Path
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    evaluation: dict[str, Any] | None
    phases: list[Phase]

    @property
    def n_stages(self) -> int:
        """Stages with a loss of their own; 1 for BP."""
        return max((len(line.get("stage_loss") or [0]) for line in self.train), default=1)


def load_run(path: str | Path, experiment: Experiment | None = None) -> RunStory:
    """Read RUN/metrics.jsonl and RUN/evaluation/step_*.json; `experiment` gives the phases.

    DataError when the folder holds neither, or a file is not what it should be. A torn last line of the metrics,
    as a run that is still writing leaves it, is not read.
    """
    path = Path(path)
    lines = read_metrics(path / "metrics.jsonl")
    evals = [line for line in lines if line.get("kind") == "eval"]
    files = sorted((path / "evaluation").glob("step_*.json"))
    if not lines and not files:
        raise DataError("neither metrics.jsonl nor evaluation/step_*.json here", path, "give the folder of a run")
    return RunStory(
        name=path.resolve().name,
        path=path,
        train=[line for line in lines if line.get("kind") == "train"],
        evals=evals,
        evaluation=read_evaluation(files[-1]) if files else (evals[-1] if evals else None),
        phases=phases_of(experiment.schedule) if experiment else [],
    )


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl as dicts, none if there is no file."""
    if not path.exists():
        return []
    lines = []
    for number, text in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not text.endswith(b"\n"):
            continue
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if not isinstance(line, dict):
            raise DataError(f"line {number} is not a JSON object", path, "restore or delete that line")
        lines.append(line)
    return lines


def phases_of(schedule: ScheduleConfig) -> list[Phase]:
    """Warm-up, hold and warm-down of every cycle, empty ones left out (SPEC 9: warm-down lasts round(ratio * N))."""
    phases, start = [], 0
    for c, cycle in enumerate(schedule.cycles):
        edges = (0, cycle.warmup_steps, cycle.steps - round(cycle.warmdown_ratio * cycle.steps), cycle.steps)
        for kind, a, b in zip(("warm-up", "hold", "warm-down"), edges[:-1], edges[1:], strict=True):
            if b > a:
                phases.append(Phase(c, kind, start + a, start + b))
        start += cycle.steps
    return phases
