"""Evaluations as tables, on a terminal (rich) and in Markdown: one of a model, one that compares runs (SPEC 7).

Both media show the same cells: `evaluation_rows` and `comparison_rows` make them, the rest only draws.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

Rows = list[list[str]]


# -- the cells ----------------------------------------------------------------------------------------------------

def evaluation_rows(result: Mapping[str, Any]) -> tuple[list[str], Rows]:
    """Head and rows (view, bits per byte, against full, accuracy) of one evaluation."""
    bpb, accuracy = result["bpb"], result["accuracy"]
    rows = [["full pool" if bpb.get("stages") else "full", _bpb(bpb["full"]), "", _percent(accuracy["full"])]]
    for kind, name in (("stages", "stage"), ("prefixes", "prefix")):
        for k, value in enumerate(bpb.get(kind) or []):
            label = f"{name} {k if name == 'stage' else k + 1}"
            rows.append([label, _bpb(value), _signed(value - bpb["full"]), _percent(accuracy[kind][k])])
    return ["view", "bits per byte", "against full", "accuracy"], rows


def summary_rows(result: Mapping[str, Any]) -> Rows:
    """What else an evaluation says, as (name, value)."""
    rows = []
    if result.get("crossover_gap") is not None:
        rows.append(["crossover gap", f"{_signed(result['crossover_gap'])} bits per byte (full - last stage)"])
    if result.get("diversity") is not None:
        d = result["diversity"]
        rows.append(["diversity of the stages",
                     f"{d['bits_per_byte']:.6f} bits per byte, {d['nats_per_token']:.6f} nats per token"])
    if result["bpb"].get("renormalise_false") is not None:
        rows.append(["without renormalisation", f"{_bpb(result['bpb']['renormalise_false'])} bits per byte"])
    for alpha, value in (result["bpb"].get("alpha") or {}).items():
        rows.append([f"alpha {alpha}", f"{_bpb(value)} bits per byte"])
    rows.append(["read", f"{result['tokens']:,} tokens, {result['bytes']:,} bytes, {result['seconds']:.1f} s"])
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
            name, _bpb(bpb["full"]), _gap(result, baseline),
            *(_bpb(own[k]) if k < len(own) else "-" for k in range(stages)),
            *(_bpb(own_prefixes[n - 1]) if n < len(own_prefixes) else "-" for n in prefixes),
            _percent(result["accuracy"]["full"]),
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
    return f"{100 * (result['bpb']['full'] / baseline['bpb']['full'] - 1):+.2f} %"


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


def comparison_markdown(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Several evaluations as a Markdown section."""
    note = "Bits per byte, less is better. The gap is that of the full pool to the run trained end to end (BP)."
    return f"# Comparison\n\n{note}\n\n{markdown_table(*comparison_rows(results))}\n"


def markdown_table(head: Sequence[str], rows: Rows, numbers: bool = True) -> str:
    """A Markdown table; the columns after the first are right-aligned if `numbers`."""
    align = ["---"] + ["---:" if numbers else "---"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(_cell(c) for c in row) + " |" for row in [list(head), align, *rows])


MARKUP = str.maketrans({**{mark: f"\\{mark}" for mark in "\\|`*_[]"}, "<": "&lt;", ">": "&gt;"})


def _cell(text: str) -> str:
    """Any text, also a model's, in a table: one line, nothing that ends a cell or is read as markup."""
    return " ".join(text.split()).translate(MARKUP)


def _bpb(value: float) -> str:
    return f"{value:.6f}"


def _signed(value: float) -> str:
    return f"{value:+.6f}"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"
