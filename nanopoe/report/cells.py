"""A table as text, and how its numbers are written; every medium shows the same cells."""

from __future__ import annotations

from dataclasses import dataclass

Rows = list[list[str]]

# By the keys of a record, as the commands call them.
MODE_NAMES = {"speculative": "speculative", "speculative_auto": "speculative, auto", "wand_p99": "wand p99",
              "wand_max": "wand max", "wand_lead_p99": "wand lead p99", "wand_lead": "wand lead", "routed": "routed"}


@dataclass(frozen=True)
class Table:
    """`numbers`: the columns after the first are right-aligned; `folded`: shown on request where that is possible."""

    title: str
    head: list[str]
    rows: Rows
    note: str = ""
    numbers: bool = True
    folded: bool = False


def number(value: float | None, digits: int, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def gap(value: float, baseline: float) -> str:
    """How much more `value` is than the baseline, in percent."""
    return f"{100 * (value / baseline - 1):+.2f} %" if baseline else "-"


def times(value: float | None) -> str:
    """A speed-up."""
    return "-" if value is None else f"{value:.2f}x"
