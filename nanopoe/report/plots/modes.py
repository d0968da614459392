"""Of one run: adaptive depth, routing and speculative decoding, as calibrated and as they ran."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.ticker import FuncFormatter

from nanopoe.report.cells import MODE_NAMES
from nanopoe.report.plots.style import (
    COLOURS,
    GREY,
    POOL,
    Panels,
    agreement_axis,
    draw,
    head,
    known,
    marks,
    over,
    percents,
    stage_colours,
)
from nanopoe.report.record import Calibration, Curves, Measured, MeasuredDepth, Record
from nanopoe.report.runs import RunStory

MODE_LOOKS = {"speculative": ("*", COLOURS[4]), "speculative_auto": ("P", COLOURS[4]), "wand_p99": ("o", COLOURS[0]),
              "wand_max": ("s", COLOURS[0]), "wand_lead_p99": ("o", COLOURS[5]), "wand_lead": ("s", COLOURS[5]),
              "routed": ("^", COLOURS[2])}                          # a colour per family
Found = list[tuple[Record, Calibration]]


def plot_depth(run: RunStory, path: str | Path) -> bool:
    """Bounds over steps, and where tokens leave at the newest step that was calibrated or measured."""
    found = calibrated(run)
    panels: Panels = []
    if len(found) > 1:
        panels.append((3.4, partial(_bounds, run=run, found=found, names=("p99", "max"))))
        leads = [(r, c) for r, c in found if {"lead_p99", "lead"} <= c.kinds.keys()]
        if len(leads) > 1:
            panels.append((3.4, partial(_bounds, run=run, found=leads, names=("lead_p99", "lead"))))
    bars = _exit_bars(run)
    if bars:
        panels.append((1.5 + 0.42 * len(bars), partial(_newest_exits, run=run, bars=bars)))
    return draw(path, run.name, panels)


def plot_exits(run: RunStory, path: str | Path) -> bool:
    """Where tokens leave with each kind of bounds, over the calibrated steps, of which there must be two."""
    found = calibrated(run)
    kinds = found[-1][1].kinds if len(found) > 1 else {}
    return draw(path, run.name, [
        (2.7, partial(_exits_over_steps, found=[(r, c) for r, c in found if name in c.kinds], name=name))
        for name in kinds])


def plot_speed(run: RunStory, path: str | Path) -> bool:
    """Speed-up against agreement at the newest step that has any, and measured speed-ups over steps."""
    panels: Panels = []
    record = next((r for r in reversed(run.records) if r.calibration or measured(r)), None)
    if record is not None:
        panels.append((4.4, partial(_speed_against_agreement, record=record)))
    timed = [r for r in run.records if any(m.measured_speedup is not None for m in measured(r).values())]
    if len(timed) > 1:
        panels.append((3.2, partial(_speed_over_steps, run=run, records=timed)))
    return draw(path, run.name, panels)


def plot_routing(run: RunStory, path: str | Path) -> bool:
    """What a threshold would route and lose at the newest step, and what was routed over steps."""
    found = calibrated(run)
    panels: Panels = []
    curves = [(r, c) for r, c in found if c.curves and len(c.curves.routing) > 1]
    if curves:
        panels.append((3.2, partial(_routed_share, record=curves[-1][0], found=curves[-1][1])))
        panels.append((3.2, partial(_regression, found=curves[-1][1])))
    if len(found) > 1:
        panels.append((3.2, partial(_routing_over_steps, run=run, found=found)))
    return draw(path, run.name, panels)


def calibrated(run: RunStory) -> Found:
    return [(r, r.calibration) for r in run.records if r.calibration is not None]


def measured(record: Record) -> Mapping[str, Measured]:
    """The modes that ran at a step."""
    return record.modes.ran if record.modes else {}


# -- adaptive depth -----------------------------------------------------------------------------------------------

def _bounds(ax: Axes, run: RunStory, found: Found, names: tuple[str, str]) -> None:
    """A line per transition: of 99 % of the positions full, of all dashed."""
    steps = [r.step for r, _ in found]
    over(ax, run, steps)
    looks: list[dict[str, Any]] = [{"linestyle": "-"}, {"linestyle": "--", "markerfacecolor": "white"}]
    for name, look in zip(names, looks, strict=True):
        bounds = [c.kinds[name][0] for _, c in found]
        for k, colour in enumerate(stage_colours(max(map(len, bounds)))):
            ax.plot(*known(steps, [b[k] if k < len(b) else None for b in bounds]), color=colour, linewidth=1.5,
                    label=f"{k} to {k + 1}" if name == names[0] else "_", **{**marks(len(steps)), **look})
    for name, look in zip(names, looks, strict=True):
        ax.plot([], [], color=GREY, linewidth=1.5, label=MODE_NAMES[f"wand_{name}"], **look)
    ax.set_ylim(bottom=0)
    head(ax, "Bounds of the lead" if "lead" in names else "Bounds of adaptive depth, by transition", ylabel="nats")


def _exits_over_steps(ax: Axes, found: Found, name: str) -> None:
    """Stacked bars, one per step, evenly spaced whatever lies between the steps."""
    exits = [c.kinds[name][1].exits for _, c in found]
    below = [0.0] * len(found)
    K = max(map(len, exits))
    for k, colour in enumerate(stage_colours(K)):
        heights = [e[k] if k < len(e) else 0.0 for e in exits]
        ax.bar(range(len(found)), heights, bottom=below, color=colour, width=0.82, label=f"stage {k}", linewidth=0)
        below = [b + h for b, h in zip(below, heights, strict=True)]
    names = [f"{r.step:,}" for r, _ in found]
    shown = _evenly(len(names), room=int(84 / (max(map(len, names)) + 2)))
    ax.set_xticks(shown, [names[i] for i in shown])
    ax.set_xlim(-0.6, len(found) - 0.4)
    ax.set_ylim(0, 1)
    ax.grid(visible=False, axis="x")
    ax.yaxis.set_major_formatter(FuncFormatter(percents))
    head(ax, f"Where tokens are decided, {MODE_NAMES[f'wand_{name}']}", xlabel="step", ylabel="of the positions")


def _evenly(count: int, room: int) -> list[int]:
    """Places of at most `room` labels for `count` bars, the last one among them."""
    stride = max(1, -(-count // max(room, 1)))
    return list(range((count - 1) % stride, count, stride))


def _exit_bars(run: RunStory) -> list[tuple[str, list[float]]]:
    """(label, shares [K]) of the newest step that was calibrated or measured, top to bottom."""
    record = next((r for r in reversed(run.records) if r.calibration or measured(r)), None)
    if record is None:
        return []
    kinds = record.calibration.kinds if record.calibration else {}
    bars = [(f"{MODE_NAMES[f'wand_{name}']},\ncalibration", exits.exits) for name, (_, exits) in kinds.items()]
    for name, mode in measured(record).items():
        total = sum(mode.exits) if isinstance(mode, MeasuredDepth) else 0
        if isinstance(mode, MeasuredDepth) and total:
            bars.append((f"{MODE_NAMES[name]},\nran", [n / total for n in mode.exits]))
    return bars


def _newest_exits(ax: Axes, run: RunStory, bars: list[tuple[str, list[float]]]) -> None:
    """A row per calibration or mode, cut by the stage that decided; shares written where there is room."""
    colours = stage_colours(max(len(shares) for _, shares in bars))
    rows = range(len(bars) - 1, -1, -1)
    for k, colour in enumerate(colours):
        parts = [shares[k] if k < len(shares) else 0.0 for _, shares in bars]
        starts = [sum(shares[:k]) for _, shares in bars]
        ax.barh(list(rows), parts, left=starts, color=colour, height=0.72, label=f"stage {k}", linewidth=0)
        for row, start, part in zip(rows, starts, parts, strict=True):
            if part >= 0.08:
                ax.text(start + part / 2, row, f"{100 * part:.0f} %", ha="center", va="center", fontsize=8.5,
                        color=_ink(colour))
    ax.set_yticks(list(rows), [label for label, _ in bars])
    ax.set_xlim(0, 1)
    ax.grid(visible=False)
    ax.xaxis.set_major_formatter(FuncFormatter(percents))
    record = next(r for r in reversed(run.records) if r.calibration or measured(r))
    head(ax, f"Exits at step {record.step:,}", xlabel="of the tokens")


def _ink(colour: Any) -> str:
    """Black or white, whichever reads better on `colour`."""
    red, green, blue = to_rgb(colour)
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"


# -- speed --------------------------------------------------------------------------------------------------------

def _speed_against_agreement(ax: Axes, record: Record) -> None:
    """Curves and open marks are predicted on calibration text, full marks were measured on the probes."""
    x: list[float] = []
    found = record.calibration
    if found is not None:
        curves = found.curves or Curves()
        lines: list[tuple[str, str, list[tuple[float, float]]]] = [
            ("wand, p99 bounds scaled", COLOURS[0], [(p.agreement, p.predicted_speedup) for p in curves.wand]),
            ("wand, lead bounds scaled", COLOURS[5], [(p.agreement, p.predicted_speedup) for p in curves.lead]),
            ("routing, over thresholds", COLOURS[2], [(p.agreement, p.projected_speedup) for p in curves.routing])]
        for label, colour, points in lines:
            if points:
                ax.plot(*zip(*sorted(points), strict=True), color=colour, linewidth=1.6, marker=".", label=label)
        for name, (_, exits) in found.kinds.items():
            marker, colour = MODE_LOOKS[f"wand_{name}"]
            ax.plot(exits.agreement, exits.predicted_speedup, linestyle="none", marker=marker, markersize=9,
                    markerfacecolor="none", markeredgewidth=1.6, color=colour,
                    label=f"{MODE_NAMES[f'wand_{name}']}, predicted")
            x.append(exits.agreement)
        x += [share for _, _, points in lines for share, _ in points]
    for name, mode in measured(record).items():
        if mode.measured_speedup is not None:
            marker, colour = MODE_LOOKS[name]
            ax.plot(mode.agreement, mode.measured_speedup, linestyle="none", marker=marker, color=colour,
                    markeredgecolor=POOL, markersize=marker_size(marker, 9), label=f"{MODE_NAMES[name]}, ran")
            x.append(mode.agreement)
    ax.axhline(1, color=GREY, linewidth=1)
    agreement_axis(ax, x)
    head(ax, f"Speed-up against agreement, step {record.step:,}", ylabel="speed-up",
         xlabel="tokens that are the full pool's")


def marker_size(marker: str, size: float) -> float:
    """A star looks smaller than it is."""
    return 1.5 * size if marker == "*" else size


def _speed_over_steps(ax: Axes, run: RunStory, records: list[Record]) -> None:
    steps = [r.step for r in records]
    over(ax, run, steps)
    for name, (marker, colour) in MODE_LOOKS.items():
        speeds = [mode.measured_speedup if (mode := measured(r).get(name)) else None for r in records]
        at, values = known(steps, speeds)
        if at:
            ax.plot(at, values, color=colour, linewidth=1.5, marker=marker, label=MODE_NAMES[name],
                    markersize=marker_size(marker, 5 if len(steps) <= 20 else 3))
    ax.axhline(1, color=GREY, linewidth=1)
    head(ax, "Measured speed-up over plain decoding, batch 1", ylabel="speed-up")


# -- routing ------------------------------------------------------------------------------------------------------

def _threshold(ax: Axes, found: Calibration) -> None:
    if found.routing.threshold is not None:
        ax.axvline(found.routing.threshold, color=GREY, linewidth=1.3, linestyle=":",
                   label=f"threshold {found.routing.threshold:.3f}")


def _over_thresholds(ax: Axes, found: Calibration, series: Sequence[tuple[str, str, Callable[[Any], float]]]) -> None:
    points = sorted(found.curves.routing if found.curves else [], key=lambda p: p.threshold)
    for label, colour, value in series:
        ax.plot([p.threshold for p in points], [value(p) for p in points], color=colour, marker=".", linewidth=1.6,
                label=label)
    _threshold(ax, found)


def _routed_share(ax: Axes, record: Record, found: Calibration) -> None:
    _over_thresholds(ax, found, [("answered by stage 0", COLOURS[0], lambda p: p.routed),
                                 ("output is the pool's", COLOURS[2], lambda p: p.agreement)])
    ax.yaxis.set_major_formatter(FuncFormatter(percents))
    ax.set_ylim(-0.03, 1.03)
    head(ax, f"Routing at step {record.step:,}", xlabel="confidence of stage 0 from which it answers",
         ylabel="of the targets")


def _regression(ax: Axes, found: Calibration) -> None:
    """What is lost is a mean over all targets; the cap bounds it at every confidence, so it stays below."""
    routing = found.routing
    _over_thresholds(ax, found, [("lost, per target", COLOURS[4], lambda p: p.regression)])
    if routing.threshold is not None and routing.regression_held_out is not None:
        ax.plot(routing.threshold, routing.regression_held_out, linestyle="none", marker="D", color=POOL, markersize=6,
                label="held out")
    ax.axhline(routing.cap, color=GREY, linewidth=1.3, linestyle="--", label=f"cap {routing.cap:g}")
    head(ax, f"What routing loses ({routing.mode.replace('_', ' ')})", ylabel="regression",
         xlabel="confidence of stage 0 from which it answers")


def _routing_over_steps(ax: Axes, run: RunStory, found: Found) -> None:
    steps = [r.step for r, _ in found]
    over(ax, run, steps)
    for label, colour, value in (("answered by stage 0", COLOURS[0], lambda r: r.routed),
                                 ("stage 0 agrees with the pool", COLOURS[2], lambda r: r.agreement)):
        ax.plot(steps, [value(c.routing) for _, c in found], color=colour, linewidth=1.5, label=label,
                **marks(len(steps)))
    ax.yaxis.set_major_formatter(FuncFormatter(percents))
    head(ax, "Routing over steps", ylabel="of the targets")
