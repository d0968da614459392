"""How checkpoints are shown: tables on a terminal, plain aligned lines in a pipe."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nanopoe.checkpoint.compare import Comparison, Difference
from nanopoe.checkpoint.inspect import Listed, Verified

SHOWN = 20                          # differences of a kind, before the rest is only counted


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """`right` are the columns of numbers."""
    if on_terminal():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(*header)
        for i in right:
            table.columns[i].justify = "right"
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        Console().print(table)
        return
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        print("  ".join(cells).rstrip())


def on_terminal() -> bool:
    return sys.stdout.isatty()


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, allow_nan=False))


def comparison_json(result: Comparison) -> dict[str, Any]:
    """As JSON-able data; a difference that is no finite number as a string."""
    def plain(d: Difference) -> dict[str, Any]:
        finite = d.max_abs is None or math.isfinite(d.max_abs)
        return {**asdict(d), "max_abs": d.max_abs if finite else str(d.max_abs)}

    return {"differences": [plain(d) for d in result.differences], "notes": [plain(d) for d in result.notes]}


def print_list(found: Sequence[Listed]) -> None:
    rows = [[item.name, size_of(item.bytes), age_of(item.age_s), "?" if item.ranks is None else str(item.ranks),
             "pinned" if item.pinned else "", "ok" if item.problem is None else f"damaged: {item.problem}"]
            for item in found]
    print_table(["checkpoint", "size", "age", "ranks", "kept", "state"], rows, right=(1, 2, 3))
    print(f"{len(found)} checkpoints, {size_of(sum(item.bytes for item in found))}")


def print_verified(done: Verified) -> None:
    if done.error is not None:
        print(f"{done.path.name}: damaged: {done.error.where}: {done.error.what}", flush=True)
    else:
        print(f"{done.path.name}: ok, {done.files} files, {size_of(done.bytes)}, {done.seconds:.1f} s", flush=True)


def print_comparison(result: Comparison) -> None:
    if not result.differences:
        print("logically equal")
    for kind in ("config", "fingerprint", "state", "tensor"):
        found = [d for d in result.differences if d.kind == kind]
        if not found:
            continue
        print(f"{kind}: {len(found)} different")
        print_table(["name", "a", "b", *(["max abs difference", "elements"] if kind == "tensor" else [])],
                    [difference_row(d) for d in found[:SHOWN]])
        if len(found) > SHOWN:
            print(f"and {len(found) - SHOWN} more")
    if result.notes:
        print(f"config keys that change no weights also differ: {', '.join(d.name for d in result.notes)}")


def difference_row(d: Difference) -> list[str]:
    if d.kind != "tensor":
        return [d.name, d.a, d.b]
    return [d.name, d.a, d.b, "" if d.max_abs is None else f"{d.max_abs:.6g}",
            "" if d.elements is None else f"{d.elements:,} of {d.of:,}"]


def print_description(value: dict[str, Any], tensors: Sequence[dict[str, Any]]) -> None:
    rows = []
    for key, item in value.items():
        if key == "bytes":
            item = size_of(item)
        elif key == "lineage":
            item = "; ".join(compact(entry) for entry in item) if isinstance(item, list) else item
        elif isinstance(item, dict):
            rows += [[f"{key}.{name}", compact(inner)] for name, inner in item.items()]
            continue
        rows.append([key, compact(item)])
    print_table(["what", "is"], rows)
    if tensors:
        print_table(["tensor", "dtype", "shape", "parts"],
                    [[t["name"], t["dtype"], str(t["shape"]), str(len(t["parts"]))] for t in tensors], right=(3,))


def compact(value: Any) -> str:
    if isinstance(value, str) and value:
        return value if value.isprintable() else ascii(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "-" if value in (None, "", [], {}) else json.dumps(value)


def size_of(count: int) -> str:
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"


def age_of(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
