"""Runs beside each other: where both were evaluated after as many tokens, and how far apart they were there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nanopoe.report.cells import Table, gap, number
from nanopoe.report.record import Record
from nanopoe.report.runs import RunStory


@dataclass(frozen=True)
class Meeting:
    """Two runs after the same tokens, or, where a run does not say its tokens, after the same steps."""

    baseline: Record
    other: Record
    tokens: int | None

    @property
    def gap(self) -> float:
        """How much more bits per byte the other needs, as a fraction."""
        return self.other.trained.bpb / self.baseline.trained.bpb - 1


def baseline_name(newest: Mapping[str, Record]) -> str | None:
    """What others are measured against: the first run trained end to end (BP).

    Beside specialists it is rather a run whose weights were all trained, evaluated on the same bytes: BP if there is
    one, else any.
    """
    whole = {name: record for name, record in newest.items() if record.specialists is None}
    bytes_read = {record.bytes for record in newest.values() if record.specialists is not None}
    same = {name: record for name, record in whole.items() if record.bytes in bytes_read}
    bp = [name for few in (same, whole) for name, record in few.items() if record.poe_mode == "none"]
    first = [name for name in bp if name in same] or list(same) or bp
    return first[0] if first else None


def baseline_of(runs: Sequence[RunStory]) -> RunStory | None:
    """That of baseline_name, else the first one; of those that were evaluated."""
    evaluated = [run for run in runs if run.records]
    name = baseline_name({run.name: run.records[-1] for run in evaluated})
    return next((run for run in evaluated if run.name == name), evaluated[0] if evaluated else None)


def meetings(baseline: RunStory, other: RunStory) -> list[Meeting]:
    """All of them, by step, on the same bytes of held-out text.

    Tokens are targets, and how many of them a batch of conversations holds depends on the order: with batches of one
    size, runs on conversations meet at the same step.
    """
    found, by_step = [], _same_batches(baseline, other)
    for record in baseline.records:
        tokens = baseline.tokens.get(record.step)
        for candidate in other.records:
            theirs = other.tokens.get(candidate.step)
            meet = candidate.step == record.step if by_step or None in (tokens, theirs) else tokens == theirs
            if meet and candidate.bytes == record.bytes and record.trained.bpb > 0:
                tokens = tokens if tokens is not None else theirs
                found.append(Meeting(record, candidate, None if by_step else tokens))
                break
    return found


def _same_batches(a: RunStory, b: RunStory) -> bool:
    """Both on conversations, with batches of one size."""
    if a.experiment is None or b.experiment is None:
        return False
    return a.experiment.data.kind == b.experiment.data.kind == "conversations" and \
        a.experiment.batch.tokens_per_step == b.experiment.batch.tokens_per_step


def meeting_table(runs: Sequence[RunStory]) -> Table | None:
    """A row per step of the baseline at which another run was evaluated too; null when there is none."""
    baseline = baseline_of(runs)
    others = [run for run in runs if run is not baseline]
    if baseline is None:
        return None
    by_run = {run.name: {m.baseline.step: m for m in meetings(baseline, run)} for run in others}
    rows = []
    for record in baseline.records:
        met = [by_run[run.name].get(record.step) for run in others]
        if any(met):
            tokens = baseline.tokens.get(record.step)
            rows.append([str(record.step), "-" if tokens is None else f"{tokens:,}", number(record.trained.bpb, 6),
                         *(cell for m in met for cell in (
                             ("-", "-") if m is None else
                             (number(m.other.trained.bpb, 6), gap(m.other.trained.bpb, record.trained.bpb))))])
    if not rows:
        return None
    return Table("At the same point of training",
                 ["step", "tokens", baseline.name, *(cell for run in others for cell in (run.name, "gap"))], rows,
                 f"Bits per byte of the full pool, or of the specialist that was trained, less is better; the gap is "
                 f"to {baseline.name}. The step is that of {baseline.name}; a run meets it after the same tokens (on "
                 "conversations, the same step with as large batches), on the same held-out bytes.")
