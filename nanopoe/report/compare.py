"""Runs beside each other: where both were evaluated after as many tokens, and how far apart they were there."""

from __future__ import annotations

from collections.abc import Sequence
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
        return self.other.bpb.full / self.baseline.bpb.full - 1


def baseline_of(runs: Sequence[RunStory]) -> RunStory | None:
    """The first run trained end to end (BP), else the first one; of those that were evaluated."""
    evaluated = [run for run in runs if run.records]
    return next((run for run in evaluated if run.records[-1].poe_mode == "none"), evaluated[0] if evaluated else None)


def meetings(baseline: RunStory, other: RunStory) -> list[Meeting]:
    """All of them, by step, on the same bytes of held-out text."""
    found = []
    for record in baseline.records:
        tokens = baseline.tokens.get(record.step)
        for candidate in other.records:
            theirs = other.tokens.get(candidate.step)
            meet = candidate.step == record.step if None in (tokens, theirs) else tokens == theirs
            if meet and candidate.bytes == record.bytes and record.bpb.full > 0:
                found.append(Meeting(record, candidate, tokens if tokens is not None else theirs))
                break
    return found


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
            rows.append([str(record.step), "-" if tokens is None else f"{tokens:,}", number(record.bpb.full, 6),
                         *(cell for m in met for cell in (
                             ("-", "-") if m is None else
                             (number(m.other.bpb.full, 6), gap(m.other.bpb.full, record.bpb.full))))])
    if not rows:
        return None
    return Table("At the same point of training",
                 ["step", "tokens", baseline.name, *(cell for run in others for cell in (run.name, "gap"))], rows,
                 f"Bits per byte of the full pool, less is better; the gap is to {baseline.name}. The step is that of "
                 f"{baseline.name}; a run meets it after the same tokens, on the same held-out bytes.")
