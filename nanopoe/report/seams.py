"""Where a run changed its way: a further cycle of the schedule, other data, other rates; and what came of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace

from nanopoe.report.cells import Table, number
from nanopoe.report.record import Record
from nanopoe.report.runs import RunStory

SHOWN = 4                       # changed keys in a cell
NOTE = ("After the step a cycle begins, or the run went on with what resume.allow let change. The rates, as "
        "multipliers, are of the last update before and of the first behind it. Bits per byte are of the last "
        "evaluation until there, and of the last one until the next seam; evaluations that read other bytes do not "
        "compare.")


def seams_table(run: RunStory) -> Table | None:
    """A row for each seam that training has passed; null when there is none."""
    edges = [*run.seams, run.train[-1]["step"]] if run.train else []
    scales = {line["step"]: line.get("lr_scale") for line in run.train}
    evaluated = {r.step: r for r in (*run.evals, *run.records)}
    rows = []
    for low, edge, high in zip([0, *edges], edges, edges[1:], strict=False):
        if edge >= high:                                                     # nothing was trained behind it
            continue
        before, after = last_in(evaluated.values(), low, edge), last_in(evaluated.values(), edge, high)
        rows.append([f"{edge:,}", begins(run, edge), scale(scales.get(edge)), scale(scales.get(edge + 1)),
                     scored(before), scored(after, before), changed(run, edge)])
    return Table("Seams", ["after step", "begins", "rate before", "rate behind", "bits per byte before", "at the end",
                           "changed"], rows, NOTE) if rows else None


def in_cycles(run: RunStory, table: Table) -> Table:
    """A table by step, with the cycle that each step was trained in, if there were several."""
    starts = [start for start in run.anchors if run.train and start < run.train[-1]["step"]]
    if len(starts) < 2 or table.head[0] != "step":
        return table
    return replace(table, head=["step", "cycle", *table.head[1:]], rows=[
        [step, str(sum(start < int(step) for start in starts) - 1), *cells] for step, *cells in table.rows])


def begins(run: RunStory, step: int) -> str:
    return f"cycle {run.anchors.index(step)}" if step in run.anchors else "-"


def scale(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"


def last_in(records: Iterable[Record], low: int, high: int) -> Record | None:
    """The last one evaluated after step `low`, and not after step `high`."""
    return max((r for r in records if low < r.step <= high), key=lambda r: r.step, default=None)


def scored(record: Record | None, before: Record | None = None) -> str:
    if record is None:
        return "-"
    other = before is not None and (before.bytes, before.tokens) != (record.bytes, record.tokens)
    return f"{number(record.trained.bpb, 6)} at {record.step:,}{', other bytes' * other}"


def changed(run: RunStory, step: int) -> str:
    """The keys that the lineage names at this step, with the values of single ones."""
    found = [f"{key} {told(then)} to {told(now)}" if short(then) and short(now) else key
             for change in run.lineage if change.step == step for key, (then, now) in change.changed.items()]
    return "; ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "") or "-"


def short(value: object) -> bool:
    return not isinstance(value, dict | list)


def told(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
