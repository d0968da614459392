"""How a run calls tools: what scripts.evaluate_tools wrote, checked, and its tables. Numerators beside denominators."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nanopoe.checkpoint.evaluation import read_tools
from nanopoe.errors import DataError
from nanopoe.report.cells import Rows, Table
from nanopoe.report.record import Count, Part, Share, first_problem

OVER_STEPS = ("parse", "function", "arguments", "hallucinated", "refusal", "stop")


class Rate(Part):
    n: Count
    of: Count
    rate: Share | None

    def __str__(self) -> str:
        return f"{self.n}/{self.of} " + ("-" if self.rate is None else f"{100 * self.rate:.1f} %")


class Calls(Part):
    """Rates by metric: of each layout of the prompts' JSON, and of all. `too_long` prompts were left out."""

    prompts: Count
    too_long: Count
    layouts: dict[str, dict[str, Rate]]
    all: dict[str, Rate]
    calls: dict[str, Count] | None = None


class Arithmetic(Part):
    prompts: Count
    too_long: Count
    exact: Rate
    stop: Rate


class Asked(Part):
    """How it was asked: the prompts' sources by name, and the first so many of each kind."""

    data: dict[str, str]
    limit: Count | None
    layouts: list[str]
    constrained: bool
    view: str | None = None              # null is the model's own: of a specialist's run the specialist
    tokens: Count

    @property
    def how(self) -> str:
        return (f", {self.view}" if self.view else "") + (", constrained" if self.constrained else "")


class ToolsRecord(Part):
    """One evaluation of a step; `metrics` says of which replies each metric is. Keys: scripts.evaluate_tools."""

    run: str
    step: Count
    request: Asked
    conversations: Count
    metrics: dict[str, str]
    tools: Calls
    arithmetic: Arithmetic

    @property
    def title(self) -> str:
        return f"Step {self.step:,}{self.request.how}"

    @property
    def said(self) -> str:
        """What was asked, and what could not be."""
        limit = "" if self.request.limit is None else f" (the first {self.request.limit:,} at most)"
        return (f"{self.conversations:,} conversations with tools{limit} of {', '.join(self.request.data)}: "
                f"{self.tools.prompts:,} prompts, {self.tools.too_long:,} too long for the model and left out; "
                f"replies of {self.request.tokens:,} tokens at most.")

    @property
    def more(self) -> list[str]:
        """What else was counted, a line each."""
        calls, a = self.tools.calls, self.arithmetic
        lines = [] if calls is None else [f"calls: {', '.join(f'{n:,} {what}' for what, n in calls.items())}"]
        return [*lines, f"arithmetic: exact {a.exact}, stop {a.stop}, {a.too_long:,} too long and left out"]


def tools_record(data: Mapping[str, Any], where: Path | str) -> ToolsRecord:
    """A checked record; DataError names `where` and the first key that is wrong."""
    try:
        return ToolsRecord.model_validate(dict(data))
    except ValidationError as error:
        raise DataError(f"not an evaluation of tool calls ({first_problem(error)})", where,
                        "remove the file, and run scripts.evaluate_tools") from error


def read_tools_records(folder: Path) -> list[ToolsRecord]:
    """Every tools_step_*.jsonl, by step; of a step in the order in which they were made."""
    return [tools_record(record, path) for path in sorted(folder.glob("tools_step_*.jsonl"))
            for record in read_tools(path)]


# -- tables -----------------------------------------------------------------------------------------------------------

def tools_rows(record: ToolsRecord) -> tuple[list[str], Rows]:
    """Head and rows: of each metric the rate by layout."""
    columns = {**record.tools.layouts, "all": record.tools.all}
    return (["", "of", *columns],
            [[metric.replace("_", " "), of, *(str(rates[metric]) if metric in rates else "-"
                                              for rates in columns.values())]
             for metric, of in record.metrics.items()])


def tools_tables(records: Sequence[ToolsRecord]) -> Iterator[Table]:
    """Of the newest step by layout; over all steps where there are several records."""
    newest = [record for record in records if record.step == records[-1].step]
    for record in newest:
        yield Table(record.title, *tools_rows(record), f"{record.said} Also {'; '.join(record.more)}.")
    if len(records) > len(newest):
        yield Table("Over steps, all layouts", ["step", *OVER_STEPS, "arithmetic"], [
            [f"{r.step}{r.request.how}",
             *(str(r.tools.all[metric]) if metric in r.tools.all else "-" for metric in OVER_STEPS),
             str(r.arithmetic.exact)] for r in records])
