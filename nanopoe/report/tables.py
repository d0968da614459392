"""Evaluations as tables, on a terminal (rich) and in Markdown: one of a model, one that compares runs (SPEC 7).

Both media show the same cells: `evaluation_rows` and `comparison_rows` make them, the rest only draws. The rows of a
trajectory are in trajectory.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from nanopoe.report.cells import MODE_NAMES, Rows, gap, number, percent, times
from nanopoe.report.compare import baseline_name
from nanopoe.report.record import Calibration, MeasuredDrafts, Modes, Record

TRAINED = ("full", "full pool", "specialist")               # the views that are of all that was trained
SPECIALIST_NOTE = ("The specialist is what was trained; dual is its pool with the base, of equal weights; base is the "
                   "frozen model below, as it reads the same text with the chat tokens of this run.")

# -- the cells ----------------------------------------------------------------------------------------------------

def evaluation_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Head and rows (view, bits per byte, against full, accuracy) of one evaluation; of a specialist's run what it is
    on top of its base, and against that."""
    record = Record.model_validate(dict(result))
    full = record.bpb.full
    if record.specialists is not None:
        return ["view", "bits per byte", "against base", "accuracy"], [
            [name, number(score.bpb, 6), "" if name == "base" else number(score.bpb - full, 6, "+"),
             percent(score.accuracy)] for name, score in record.views.items()]
    name = "full pool" if record.bpb.stages else "full"
    return ["view", "bits per byte", "against full", "accuracy"], [
        [name, number(full, 6), "", percent(record.accuracy.full)], *stage_rows(record)]


def stage_rows(record: Record) -> Rows:
    """(view, bits per byte, against full, accuracy) of each stage and prefix; of a specialist's run they are the
    base's."""
    rows = []
    for kind, name, first in (("stages", "stage", 0), ("prefixes", "prefix", 1)):
        pairs = zip(getattr(record.bpb, kind) or [], getattr(record.accuracy, kind) or [], strict=True)
        rows += [[f"{name} {k}", number(bpb, 6), number(bpb - record.bpb.full, 6, "+"), percent(hits)]
                 for k, (bpb, hits) in enumerate(pairs, first)]
    return rows


def source_rows(record: Record) -> tuple[list[str], Rows]:
    """Head and rows of each source of conversations alone; of a specialist beside its base. No rows without sources."""
    views = list(record.views) if record.specialists is None else ["specialist", "dual", "base"]
    more = ["against base"] if record.specialists is not None else []
    rows = []
    for name, own in (record.sources or {}).items():
        scores = {"full": own, "specialist": own, "dual": own.dual, "base": own.base}
        found = [scores[view] for view in views]
        rows.append([name, *(number(score.bpb if score else None, 6) for score in found),
                     *(number(own.bpb - own.base.bpb if own.base else None, 6, "+") for _ in more),
                     *(percent(score.accuracy if score else None) for score in found),
                     f"{own.targets:,}", f"{own.bytes:,}", f"{own.truncated:,}"])
    return ["source", *views, *more, *(f"accuracy, {view}" for view in views), "targets", "bytes",
            "lost their front"], rows


def summary_rows(result: Mapping[str, Any]) -> Rows:
    """What else an evaluation says, as (name, value); of a specialist's run nothing of its base."""
    return [*([] if result.get("specialists") else _pool_rows(result)), ["read", _read(result)]]


def _read(result: Mapping[str, Any]) -> str:
    lost = f", {result['truncated']:,} conversations without their front" if result.get("truncated") else ""
    return f"{result['tokens']:,} tokens, {result['bytes']:,} bytes{lost}, {result['seconds']:.1f} s"


def _pool_rows(result: Mapping[str, Any]) -> Rows:
    rows = []
    if result.get("crossover_gap") is not None:
        rows.append(["crossover gap", f"{number(result['crossover_gap'], 6, '+')} bits per byte (full - last stage)"])
    if result.get("diversity") is not None:
        d = result["diversity"]
        rows.append(["diversity of the stages",
                     f"{d['bits_per_byte']:.6f} bits per byte, {d['nats_per_token']:.6f} nats per token"])
    if result["bpb"].get("renormalise_false") is not None:
        rows.append(["without renormalisation", f"{number(result['bpb']['renormalise_false'], 6)} bits per byte"])
    for alpha, value in (result["bpb"].get("alpha") or {}).items():
        rows.append([f"alpha {alpha}", f"{number(value, 6)} bits per byte"])
    if result.get("calibration") is not None:
        rows += _calibration_rows(Calibration.model_validate(result["calibration"]))
    if result.get("modes") is not None:
        rows += _mode_rows(Modes.model_validate(result["modes"]))
    return rows


def _calibration_rows(found: Calibration) -> Rows:
    rows: Rows = []
    for kind, (bounds, wand) in found.kinds.items():
        name = MODE_NAMES[f"wand_{kind}"]
        rows.append([f"{name}, bounds", "  ".join(number(b, 4) for b in bounds)])
        rows.append([name, f"predicted {times(wand.predicted_speedup)}, agreement "
                     f"{percent(wand.agreement)}, exits {' '.join(f'{100 * e:.1f}' for e in wand.exits)} %"])
    r = found.routing
    rows.append(["routing", f"projected {times(r.projected_speedup)}, {percent(r.routed)} routed at {r.mode} "
                            f"{r.cap:g}, agreement {percent(r.agreement)}"])
    return rows


def _mode_rows(modes: Modes) -> Rows:
    rows: Rows = []
    for name, mode in modes.ran.items():
        accepted = f"{percent(mode.acceptance)} of drafts accepted, " if isinstance(mode, MeasuredDrafts) else ""
        rows.append([f"{MODE_NAMES[name]}, ran", f"measured {times(mode.measured_speedup)}, predicted "
                     f"{times(mode.predicted_speedup)}, {accepted}{mode.equal} of {mode.prompts} texts equal"])
    return rows


def comparison_rows(results: Mapping[str, Record]) -> tuple[list[str], Rows]:
    """Head and rows of several evaluations by run name: full, gap to the baseline in percent, every stage and prefix.

    The baseline is that of compare.baseline_name. Without one there is no gap to tell, nor is there between runs
    evaluated on different bytes. Of a specialist full is what was trained; it has no stages, but a dual and a base.
    """
    name = baseline_name(results)
    baseline = None if name is None else results[name]
    special = any(r.specialists for r in results.values())
    stages = max((len(r.bpb.stages or []) for r in results.values() if not r.specialists), default=0)
    prefixes = list(range(2, stages))                      # prefix 1 is stage 0, the longest is full
    beside = ["dual", "base"] if special else []
    head = ["run", "full", *beside, f"gap to {name}" if special and name else "gap to BP",
            *(f"stage {k}" for k in range(stages)), *(f"prefix {n}" for n in prefixes), "accuracy", "diversity"]
    rows = []
    for run, record in results.items():
        bpb, trained, views = record.bpb, record.trained, record.views
        own, own_prefixes = ([], []) if record.specialists else (bpb.stages or [], bpb.prefixes or [])
        rows.append([
            run, number(trained.bpb, 6),
            *(number(views[view].bpb if view in views else None, 6) for view in beside), _gap(record, baseline),
            *(number(own[k], 6) if k < len(own) else "-" for k in range(stages)),
            *(number(own_prefixes[n - 1], 6) if n < len(own_prefixes) else "-" for n in prefixes),
            percent(trained.accuracy),
            number(record.diversity.bits_per_byte if record.diversity and not record.specialists else None, 6),
        ])
    return head, rows


def _gap(record: Record, baseline: Record | None) -> str:
    if baseline is None:
        return "-"
    if record is baseline:
        return "baseline"
    if record.bytes != baseline.bytes:
        return "other data"
    return gap(record.trained.bpb, baseline.trained.bpb)


# -- on a terminal ------------------------------------------------------------------------------------------------

def evaluation_table(result: Mapping[str, Any], title: str = "Evaluation") -> RenderableType:
    """One evaluation, with its probes if it has any, for `rich.Console.print`."""
    parts: list[RenderableType] = [_rich(*evaluation_rows(result), title=title)]
    summary = Table(box=None, show_header=False, pad_edge=False)
    for name, value in summary_rows(result):
        summary.add_row(Text(name, style="dim"), value)
    parts += [Text(), summary]
    sources = source_rows(Record.model_validate(dict(result)))
    if sources[1]:
        parts += [Text(), _rich(*sources, title="By source")]
    for probe in result.get("probes") or []:
        parts += [Text(), Text(probe["prompt"], style="bold")]
        for view, answer in probe["answers"].items():
            parts.append(Text.assemble((f"  {view:<10}", "cyan"), " ".join(answer.split())))
    return Group(*parts)


def comparison_table(results: Mapping[str, Record]) -> RenderableType:
    """Several evaluations for `rich.Console.print`."""
    return _rich(*comparison_rows(results), title="Bits per byte")


def _rich(head: Sequence[str], rows: Rows, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row), style="bold" if row[0] in TRAINED else None)
    return table


# -- in Markdown --------------------------------------------------------------------------------------------------

def evaluation_markdown(result: Mapping[str, Any], title: str = "Evaluation") -> str:
    """One evaluation, with its probes if it has any, as a Markdown section."""
    parts = [f"# {title}", *([SPECIALIST_NOTE] if result.get("specialists") else []),
             markdown_table(*evaluation_rows(result)), markdown_table(["", ""], summary_rows(result))]
    sources = source_rows(Record.model_validate(dict(result)))
    if sources[1]:
        parts += ["## By source", markdown_table(*sources)]
    if result.get("probes"):
        rows = [[probe["prompt"], view, answer] for probe in result["probes"]
                for view, answer in probe["answers"].items()]
        parts += ["## Probes (greedy)", markdown_table(["prompt", "view", "continuation"], rows, numbers=False)]
    return "\n\n".join(parts) + "\n"


def markdown_table(head: Sequence[str], rows: Rows, numbers: bool = True) -> str:
    """A Markdown table; the columns after the first are right-aligned if `numbers`."""
    align = ["---"] + ["---:" if numbers else "---"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(escaped(c) for c in row) + " |" for row in [list(head), align, *rows])


MARKUP = str.maketrans({**{mark: f"\\{mark}" for mark in "\\|`*_[]~$"}, "<": "&lt;", ">": "&gt;", "&": "&amp;"})


def escaped(text: str) -> str:
    """Any text, also a model's, in a table: one line, nothing that ends a cell or is read as markup."""
    return " ".join(text.split()).translate(MARKUP)
