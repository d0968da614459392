"""How a run looks on a terminal: a live display of the loss of every stage, and the plain lines used elsewhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Header:
    """What stands above the numbers of a run; all of it is known before the first step."""

    name: str
    parameters: int
    device: str                  # as a person calls it: "cuda:0 NVIDIA H200", "cpu"
    dtype: str                   # of the computation
    dtype_reason: str            # why this device and dtype: "auto: the GPU computes in bfloat16"
    world_size: int
    config_hash: str
    n_stages: int
    total_steps: int
    poe_mode: str
    new_layers: int = 0          # of the specialist that is trained, if one is
    grid: str = ""               # which ranks run which stages, if not all run all

    def lines(self) -> list[str]:
        """The header as two plain lines: the experiment, the machine."""
        mode = "BP" if self.poe_mode == "none" else f"PoE {self.poe_mode}, {self.n_stages} stages"
        if self.new_layers:
            mode = f"specialist of {self.new_layers} layers on {mode}"
        ranks = "1 rank" if self.world_size == 1 else f"{self.world_size} ranks"
        ranks += f" = {self.grid}" if self.grid else ""
        size = f"{self.parameters:,} parameters, {self.total_steps:,} steps"
        return [f"{self.name}: {mode}, {size}, config {self.config_hash[:12]}",
                f"{self.device}, {ranks}, {self.dtype} ({self.dtype_reason})"]


NOTABLE_WAIT = 0.01          # of a step's time


class Display:
    """The live display. `train` and `eval` update it; what is printed meanwhile scrolls above it."""

    def __init__(self, header: Header, console: Console, start_step: int):
        self.header = header
        self.line: dict[str, Any] = {}
        self.smooth: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}
        self.progress = Progress(
            TextColumn("[bold]step"), MofNCompleteColumn(), BarColumn(bar_width=None), TaskProgressColumn(),
            TextColumn("{task.fields[left]}"), console=console, expand=True)
        self.task = self.progress.add_task("", total=header.total_steps, completed=start_step, left="")
        self.live = Live(self.render(), console=console, refresh_per_second=4)
        self.live.start()

    def train(self, line: dict[str, Any], smooth: dict[str, Any]) -> None:
        if line.get("pool_loss") is None:                            # not computed at every step: keep the last
            line = {**line, "pool_loss": self.line.get("pool_loss")}
        self.line, self.smooth = line, smooth
        left = time_left(line["step"], self.header.total_steps, smooth["seconds"])
        self.progress.update(self.task, completed=line["step"], left=f"{left} left" if left else "")
        self.live.update(self.render())

    def eval(self, line: dict[str, Any]) -> None:
        self.evaluation = line
        self.live.update(self.render())

    def close(self) -> None:
        self.live.stop()

    def render(self) -> Panel:
        experiment, machine = self.header.lines()
        body = Group(Text(machine, style="dim"), self.progress, self._losses(), Text(rates(self.line), style="cyan"))
        return Panel(body, title=Text(experiment, style="bold"), border_style="blue", title_align="left")

    def _losses(self) -> Table:
        """Rows: every stage and the pool (BP: the one loss). Columns: loss now, smoothed, and the last evaluation."""
        bpb, accuracy = self.evaluation.get("bpb") or {}, self.evaluation.get("accuracy") or {}
        at = f" @ {self.evaluation['step']}" if self.evaluation else ""
        table = Table(box=None, pad_edge=False, expand=True, header_style="dim")
        for name in ("", "loss", "smoothed", f"bpb{at}", "prefix bpb", "accuracy"):
            table.add_column(name, justify="left" if not name else "right")

        def row(name: str, now: Any, mean: Any, result: Any, prefix: Any, right: Any, style: str = "") -> None:
            table.add_row(name, figure(now), figure(mean), figure(result), figure(prefix), figure(right), style=style)

        if self.header.new_layers:
            found = self.evaluation.get("specialists") or {"bpb": {}, "accuracy": {}}
            row("specialist", self.line.get("loss"), self.smooth.get("loss"), _at(found["bpb"].get("specialist"), -1),
                None, _at(found["accuracy"].get("specialist"), -1), "bold")
            row("dual", None, None, _at(found["bpb"].get("dual"), -1), None, _at(found["accuracy"].get("dual"), -1))
            row("base, frozen", None, None, bpb.get("full"), None, accuracy.get("full"))
            return table
        if self.header.poe_mode == "none":
            row("loss", self.line.get("loss"), self.smooth.get("loss"), bpb.get("full"), None, accuracy.get("full"),
                "bold")
            return table
        for k in range(self.header.n_stages):
            row(f"stage {k}", _at(self.line.get("stage_loss"), k), _at(self.smooth.get("stage_loss"), k),
                _at(bpb.get("stages"), k), _at(bpb.get("prefixes"), k), _at(accuracy.get("stages"), k))
        row("pool", self.line.get("pool_loss"), self.smooth.get("pool_loss"), bpb.get("full"), None,
            accuracy.get("full"), "bold")
        return table


def train_line(line: dict[str, Any], total_steps: int, seconds_per_step: float | None) -> str:
    """A train line as plain text: step, losses, rates, time left."""
    parts = [f"step {line['step']}/{total_steps}", f"loss {figure(line.get('loss'))}"]
    stages = line.get("stage_loss") or []
    if len(stages) > 1:
        parts.append("stages " + " ".join(figure(v) for v in stages))
    if line.get("pool_loss") is not None:
        parts.append(f"pool {figure(line['pool_loss'])}")
    left = time_left(line["step"], total_steps, seconds_per_step)
    bad = line.get("nonfinite")
    parts += [rates(line), f"{left} left" if left else "", f"not finite: {', '.join(bad)}" if bad else ""]
    return " | ".join(part for part in parts if part)


def eval_line(line: dict[str, Any]) -> str:
    """An eval line as plain text."""
    bpb = line["bpb"]
    parts = [f"eval @ {line['step']}: bpb {figure(bpb['full'])}"]
    if line.get("specialists"):
        found = line["specialists"]["bpb"]
        views = (f"{view} {figure(found[view][-1])}" for view in ("specialist", "dual"))
        return f"eval @ {line['step']}: bpb {' '.join(views)} base {figure(bpb['full'])}"
    for name in ("stages", "prefixes"):
        if bpb.get(name):
            parts.append(f"{name} " + " ".join(figure(v) for v in bpb[name]))
    return " | ".join(parts)


def rates(line: dict[str, Any]) -> str:
    """Learning-rate multiplier, momentum, gradient norm, tokens/s, MFU, memory, as far as they are known; and the
    share of the time that went by waiting for rows, if it is worth a word."""
    formats = (("lr_scale", "lr x{:.3f}"), ("momentum", "momentum {:.3f}"), ("grad_norm", "grad {:.3g}"))
    parts = [form.format(line[key]) for key, form in formats if line.get(key) is not None]
    if line.get("tokens_per_s") is not None:
        parts.append(f"{quantity(line['tokens_per_s'])} tok/s")
    if line.get("mfu") is not None:
        parts.append(f"MFU {100 * line['mfu']:.1f} %")
    if line.get("memory_bytes") is not None:
        parts.append(f"{line['memory_bytes'] / 2**30:.2f} GiB")
    if line.get("idle"):
        low, high = min(line["idle"]), max(line["idle"])
        parts.append(f"ranks idle {100 * low:.0f}-{100 * high:.0f} %")
    if line.get("wait_seconds") and line["wait_seconds"] > NOTABLE_WAIT * line["seconds"]:
        parts.append(f"waits for rows {100 * line['wait_seconds'] / line['seconds']:.0f} %")
    return "  ".join(parts)


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def quantity(value: float) -> str:
    """12345 -> "12.3k"."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.1f}{unit}"
    return f"{value:.0f}"


def time_left(step: int, total_steps: int, seconds_per_step: float | None) -> str:
    """Time to the last step as "2h 05m", "3m 20s" or "12s"; empty when unknown or done."""
    if seconds_per_step is None or step >= total_steps:
        return ""
    seconds = round((total_steps - step) * seconds_per_step)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if seconds < 48 * 3600:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"


def _at(values: list[float | None] | None, k: int) -> float | None:
    return values[k] if values and k < len(values) else None
