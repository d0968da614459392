"""The story a run left in its folder: metrics.jsonl, the evaluated steps, and the phases of its schedule. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from nanopoe.checkpoint.evaluation import read_evaluation
from nanopoe.config.schema import Experiment, ScheduleConfig
from nanopoe.errors import ConfigError, DataError
from nanopoe.report.record import Part, Record, first_problem, record_of
from nanopoe.report.tools import ToolsRecord, read_tools_records


@dataclass(frozen=True)
class Phase:
    """Steps start..end (both counted from 0, end exclusive) of a cycle; `kind` is warm-up, hold or warm-down."""

    cycle: int
    kind: str
    start: int
    end: int


class Change(Part):
    """What the lineage has of one step: by key, [then, now]."""

    step: Annotated[int, Field(ge=0)]
    changed: dict[str, tuple[Any, Any]]


class Source(Part):
    """How a source of the mixture came out: its share of the tokens, and how often it was gone through."""

    share: float
    epochs: float


@dataclass(frozen=True)
class RunStory:
    """What can be read of a run, named as its folder.

    `train` are lines of metrics.jsonl, `evals` the evaluations in it, `records` the trajectory, by step, `sources` the
    last word on the mixture, `tools` how tools were called, by step, `lineage` what was changed on the way. Without
    `experiment`, `unknown` says why, and there are no phases.
    """

    name: str
    train: list[dict[str, Any]]
    evals: list[Record]
    records: list[Record]
    phases: list[Phase]
    experiment: Experiment | None = None
    unknown: str | None = None
    sources: dict[str, Source] = field(default_factory=dict)
    tools: list[ToolsRecord] = field(default_factory=list)
    lineage: list[Change] = field(default_factory=list)

    @property
    def anchors(self) -> list[int]:
        """The step at which each cycle of the schedule begins."""
        cycles = sorted({phase.cycle for phase in self.phases})
        return [min(phase.start for phase in self.phases if phase.cycle == cycle) for cycle in cycles]

    @property
    def seams(self) -> list[int]:
        """Steps after which a further cycle begins, or something else was changed; they may lie ahead."""
        return sorted({*self.anchors[1:], *(change.step for change in self.lineage if change.step)})

    @property
    def is_specialist(self) -> bool:
        """Trained on a frozen base: the stages in its records are not its own."""
        if self.experiment is not None:
            return self.experiment.task == "specialist"
        return any(record.specialists for record in (*self.evals, *self.records))

    @property
    def n_stages(self) -> int:
        """Stages with a loss of their own; 1 for BP and for a specialist."""
        if self.is_specialist:
            return 1
        return max([1, *(len(line.get("stage_loss") or []) for line in self.train),
                    *(record.n_stages for record in self.records)])

    @property
    def newest(self) -> Record | None:
        return self.records[-1] if self.records else None

    @cached_property
    def tokens(self) -> dict[int, int]:
        """Step -> tokens trained on until then, of the steps that say it."""
        return {line["step"]: line["tokens"] for line in self.train if line.get("tokens") is not None}


def load_run(path: str | Path, experiment: Experiment | None = None, unknown: str | None = None,
             lineage: Sequence[Any] = ()) -> RunStory:
    """Read RUN/metrics.jsonl, RUN/evaluation/step_*.json and tools_step_*.jsonl; `experiment` gives the phases, and
    `lineage` is that of its newest checkpoint.

    DataError when the folder holds neither, or a file is not what it should be. A torn last line of the metrics,
    as a run that is still writing leaves it, is not read.
    """
    path = Path(path)
    lines = read_metrics(path / "metrics.jsonl")
    evals = [Record.model_validate(line) for line in lines if line.get("kind") == "eval"]
    records, tools = read_records(path / "evaluation"), read_tools_records(path / "evaluation")
    if not lines and not records and not tools:
        raise DataError("neither metrics.jsonl nor evaluation/step_*.json here", path, "give the folder of a run")
    try:
        changes = [Change.model_validate(entry, strict=False) for entry in lineage]
    except ValidationError as error:
        raise DataError(f"the lineage of its newest checkpoint: {first_problem(error)}", path,
                        "use scripts.checkpoint verify") from error
    return RunStory(
        name=path.resolve().name,
        train=[line for line in lines if line.get("kind") == "train"],
        evals=evals,
        records=trajectory(records, evals),
        phases=phases_of(experiment.schedule) if experiment else [],
        experiment=experiment,
        unknown=unknown,
        sources=next((_Data.model_validate(line).sources for line in reversed(lines)
                      if line.get("kind") == "event" and line.get("event") == "data"), {}),
        tools=tools,
        lineage=changes,
    )


def trajectory(records: Sequence[Record], evals: Sequence[Record]) -> list[Record]:
    """All evaluated steps, ascending. A record goes before the evaluation that training made at the same step; those
    of training join only where they read the bytes that the newest record read, for others do not compare."""
    last = records[-1] if records else None
    known = {e.step: e for e in evals if last is None or (e.bytes, e.tokens) == (last.bytes, last.tokens)}
    known |= {r.step: r for r in records}
    return [known[step] for step in sorted(known)]


# -- a choice of steps --------------------------------------------------------------------------------------------

def choose(runs: Sequence[RunStory], wanted: Sequence[range]) -> list[RunStory]:
    """The runs with only the wanted evaluated steps. ConfigError for a wish that no run fulfils."""
    there = sorted({r.step for run in runs for r in run.records} | {t.step for run in runs for t in run.tools})
    for steps in wanted:
        if not any(step in steps for step in there):
            name = f"step {steps[0]} was" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]} were"
            some = ", ".join(map(str, there[-12:]))
            raise ConfigError(f"{name} not evaluated", "--steps",
                              f"evaluated: {'.. ' if len(there) > 12 else ''}{some}" if some else
                              "run scripts.evaluate first")
    return [replace(run, records=[r for r in run.records if any(r.step in steps for steps in wanted)],
                    tools=[t for t in run.tools if any(t.step in steps for steps in wanted)]) for run in runs]


# -- files --------------------------------------------------------------------------------------------------------

def read_records(folder: Path) -> list[Record]:
    """Every step_*.json, by step. DataError for one that is damaged or of another step than its name says."""
    records = []
    for path in sorted(folder.glob("step_*.json")):
        record = record_of(read_evaluation(path), path)
        if path.stem != f"step_{record.step:08d}":
            raise DataError(f"is of step {record.step}", path, "it was renamed; remove it")
        records.append(record)
    return sorted(records, key=lambda record: record.step)


class _Train(Part):
    """What is drawn of a train line."""

    step: int
    tokens: int | None = None
    loss: float | None = None
    stage_loss: list[float | None] | None = None
    pool_loss: float | None = None
    lr_scale: float | None = None


class _Data(Part):
    """What is told of a data event."""

    sources: dict[str, Source] = Field(default_factory=dict)


FORMS: dict[tuple[Any, Any], type[Part]] = {("train", None): _Train, ("eval", None): Record, ("event", "data"): _Data}


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
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise DataError(f"line {number} is not a JSON object", path, "restore or delete that line")
        form = FORMS.get((line.get("kind"), line.get("event")))
        if form is not None:
            try:
                form.model_validate(line)
            except ValidationError as error:
                raise DataError(f"line {number}: {first_problem(error)}", path,
                                "restore or delete that line") from error
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
