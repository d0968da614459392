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
from nanopoe.report.record import Calibration, MeasuredDrafts, Modes

# -- the cells ----------------------------------------------------------------------------------------------------

def evaluation_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Head and rows (view, bits per byte, against full, accuracy) of one evaluation."""
    bpb, accuracy = result["bpb"], result["accuracy"]
    rows = [["full pool" if bpb.get("stages") else "full", number(bpb["full"], 6), "", percent(accuracy["full"])]]
    for kind, name in (("stages", "stage"), ("prefixes", "prefix")):
        for k, value in enumerate(bpb.get(kind) or []):
            label = f"{name} {k if name == 'stage' else k + 1}"
            rows.append([label, number(value, 6), number(value - bpb["full"], 6, "+"), percent(accuracy[kind][k])])
    return ["view", "bits per byte", "against full", "accuracy"], rows


def summary_rows(result: Mapping[str, Any]) -> Rows:
    """What else an evaluation says, as (name, value)."""
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
    rows.append(["read", f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['seconds']:.1f} s"])
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


def comparison_rows(results: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], Rows]:
    """Head and rows of several evaluations by run name: full, gap to BP in percent, every stage, every prefix.

    The baseline is the first run trained without stage losses. Without one there is no gap to tell, nor is there
    between runs evaluated on different bytes.
    """
    baseline = next((r for r in results.values() if r.get("poe_mode") == "none"), None)
    stages = max((len(r["bpb"].get("stages") or []) for r in results.values()), default=0)
    prefixes = list(range(2, stages))                      # prefix 1 is stage 0, the longest is full
    head = ["run", "full", "gap to BP", *(f"stage {k}" for k in range(stages)), *(f"prefix {n}" for n in prefixes),
            "accuracy", "diversity"]
    rows = []
    for name, result in results.items():
        bpb = result["bpb"]
        own, own_prefixes = bpb.get("stages") or [], bpb.get("prefixes") or []
        rows.append([
            name, number(bpb["full"], 6), _gap(result, baseline),
            *(number(own[k], 6) if k < len(own) else "-" for k in range(stages)),
            *(number(own_prefixes[n - 1], 6) if n < len(own_prefixes) else "-" for n in prefixes),
            percent(result["accuracy"]["full"]),
            f"{result['diversity']['bits_per_byte']:.6f}" if result.get("diversity") else "-",
        ])
    return head, rows


def _gap(result: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    if baseline is None:
        return "-"
    if result is baseline:
        return "baseline"
    if result["bytes"] != baseline["bytes"]:
        return "other data"
    return gap(result["bpb"]["full"], baseline["bpb"]["full"])


# -- on a terminal ------------------------------------------------------------------------------------------------

def evaluation_table(result: Mapping[str, Any], title: str = "Evaluation") -> RenderableType:
    """One evaluation, with its probes if it has any, for `rich.Console.print`."""
    parts: list[RenderableType] = [_rich(*evaluation_rows(result), title=title)]
    summary = Table(box=None, show_header=False, pad_edge=False)
    for name, value in summary_rows(result):
        summary.add_row(Text(name, style="dim"), value)
    parts += [Text(), summary]
    for probe in result.get("probes") or []:
        parts += [Text(), Text(probe["prompt"], style="bold")]
        for view, answer in probe["answers"].items():
            parts.append(Text.assemble((f"  {view:<9}", "cyan"), " ".join(answer.split())))
    return Group(*parts)


def comparison_table(results: Mapping[str, Mapping[str, Any]]) -> RenderableType:
    """Several evaluations for `rich.Console.print`."""
    return _rich(*comparison_rows(results), title="Bits per byte")


def _rich(head: Sequence[str], rows: Rows, title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="dim")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row), style="bold" if row[0].startswith("full") else None)
    return table


# -- in Markdown --------------------------------------------------------------------------------------------------

def evaluation_markdown(result: Mapping[str, Any], title: str = "Evaluation") -> str:
    """One evaluation, with its probes if it has any, as a Markdown section."""
    parts = [f"# {title}", markdown_table(*evaluation_rows(result)), markdown_table(["", ""], summary_rows(result))]
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
