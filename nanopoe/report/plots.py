"""Curves of a run and pictures of several, as PNG files (matplotlib, no display needed).

Colours are Okabe and Ito's, which colour-blind readers tell apart; the pool is always black and thick.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nanopoe.report.runs import Phase, RunStory

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#A6761D")
POOL = "#000000"
PHASE_SHADES = {"warm-up": "#F6E3B8", "hold": "#FFFFFF", "warm-down": "#D6E6F2"}
STYLE: dict[Any, Any] = {
    "font.size": 10.5, "axes.grid": True, "grid.color": "#D9D9D9", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.titlesize": 12,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": True, "legend.framealpha": 0.9,
    "legend.edgecolor": "#D9D9D9", "lines.solid_capstyle": "round", "figure.facecolor": "white",
}


def plot_curves(run: RunStory, path: str | Path) -> None:
    """Of one run: loss of every stage and the pool, bits per byte of its evaluations, learning rate; over steps."""
    panels: list[tuple[float, Callable[[Axes, RunStory], None]]] = [(3.0, _losses)]
    if run.n_stages > 1:
        panels.append((1.8, _against_mean))
    if run.evals:
        panels.append((2.2, _evaluations))
    panels.append((1.0, _rates))
    heights = [height for height, _ in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.25 * sum(heights) + 1.5), dpi=140, layout="constrained")
        axes = figure.subplots(len(panels), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
        for ax, (_, draw) in zip(axes, panels, strict=True):
            _shade(ax, run.phases)
            draw(ax, run)
        axes[-1].set_xlabel("step")
        axes[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        _save(figure, path)


def plot_comparison(runs: Sequence[RunStory], path: str | Path) -> None:
    """Of several runs: bits per byte over tokens, and where the stages and prefixes of each one end up."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 4.8), dpi=140, layout="constrained")
        over_time, at_end = figure.subplots(1, 2, width_ratios=[1.0, 1.2])
        for i, run in enumerate(runs):
            colour = COLOURS[i % len(COLOURS)]
            _trajectory(over_time, run, colour, ("-", "--", ":", "-.")[i // len(COLOURS) % 4])
            if run.evaluation is not None:
                _depths(at_end, run, colour)
        over_time.set(title="Validation over training", xlabel="training tokens", ylabel="bits per byte (full)")
        over_time.xaxis.set_major_formatter(FuncFormatter(_short))
        over_time.xaxis.set_major_locator(MaxNLocator(6))
        at_end.set(title="Stages and prefixes", xlabel="stages run (depth of the prefix)", ylabel="bits per byte")
        at_end.xaxis.set_major_locator(MaxNLocator(integer=True))
        for ax in (over_time, at_end):
            if ax.get_legend_handles_labels()[0]:
                ax.legend(fontsize=9)
        _save(figure, path)


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Mean over each value and at most `reach` before and as many after.

    The window is symmetric and shrinks at the ends, so a falling curve is not lagged behind.
    """
    x = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(x)])
    i = np.arange(x.size)
    near = np.minimum(reach, np.minimum(i, x.size - 1 - i))
    return [float(v) for v in (sums[i + near + 1] - sums[i - near]) / (2 * near + 1)]


# -- panels -------------------------------------------------------------------------------------------------------

def _losses(ax: Axes, run: RunStory) -> None:
    """Every step thin, the smoothed curve on it; one colour per stage."""
    steps = [line["step"] for line in run.train]
    if run.n_stages > 1:
        curves: list[tuple[str, str, list[float | None]]] = [
            (f"stage {k}", COLOURS[k % len(COLOURS)], [_at(line.get("stage_loss"), k) for line in run.train])
            for k in range(run.n_stages)]
    else:
        curves = [("loss", POOL, [line.get("loss") for line in run.train])]
    shown: list[float] = []
    for name, colour, values in curves:
        at, known = _known(steps, values)
        smooth = smoothed(known, _reach(run, len(known)))
        ax.plot(at, known, color=colour, alpha=0.22, linewidth=0.8)
        ax.plot(at, smooth, color=colour, label=name, linewidth=2.2 if colour == POOL else 1.6)
        shown += smooth
    ax.set(title=f"{run.name}: training loss", ylabel="nats per token")
    _fit(ax, shown)
    if steps:
        _legend_above(ax)


def _against_mean(ax: Axes, run: RunStory) -> None:
    """Loss of every stage, and of the pool where it was looked at, minus the stages' mean in the same step, smoothed.

    What tells the experts apart; the pool lies below the mean by their diversity.
    """
    lines = [line for line in run.train if None not in (line.get("stage_loss") or [None])]
    means = [sum(line["stage_loss"]) / len(line["stage_loss"]) for line in lines]
    curves = [(f"stage {k}", COLOURS[k % len(COLOURS)], [line["stage_loss"][k] for line in lines])
              for k in range(run.n_stages)]
    curves.append(("pool", POOL, [line.get("pool_loss") for line in lines]))
    late: list[float] = []
    for name, colour, losses in curves:
        excess = [None if v is None else v - mean for v, mean in zip(losses, means, strict=True)]
        at, known = _known([line["step"] for line in lines], excess)
        smooth = smoothed(known, _reach(run, len(known)))
        ax.plot(at, smooth, color=colour, linewidth=2.2 if name == "pool" else 1.6, label=name)
        late += smooth[len(smooth) // 20:]
    ax.axhline(0, color="#666666", linewidth=1)
    ax.set(title="Stages and pool against the stages' mean", ylabel="nats above the mean")
    _fit(ax, [0.0, *late])
    if lines:
        _legend_above(ax)


def _evaluations(ax: Axes, run: RunStory) -> None:
    """Bits per byte of every stage and of the full pool at each evaluation."""
    evals = [line for line in run.evals if line["bpb"].get("full") is not None]
    steps = [line["step"] for line in evals]
    for k in range(max((len(line["bpb"].get("stages") or []) for line in evals), default=0)):
        ax.plot(*_known(steps, [_at(line["bpb"].get("stages"), k) for line in evals]), marker="o", markersize=4,
                color=COLOURS[k % len(COLOURS)], linewidth=1.4, label=f"stage {k}")
    values = [line["bpb"]["full"] for line in evals]
    if values:
        ax.plot(steps, values, marker="D", markersize=4.5, color=POOL, linewidth=2,
                label=f"full, {values[-1]:.4f} at the end")
        _legend_above(ax)
    ax.set(title="Validation", ylabel="bits per byte")


def _rates(ax: Axes, run: RunStory) -> None:
    """Learning-rate multiplier, with the phases named above it."""
    scales = [line.get("lr_scale") for line in run.train]
    ax.plot(*_known([line["step"] for line in run.train], scales), color=POOL, linewidth=1.6)
    ax.set(title="Learning rate" + (" (shaded: warm-up, warm-down)" if run.phases else ""), ylabel="multiplier")
    ax.margins(y=0.15)
    ax.set_ylim(bottom=0)
    total = max((phase.end for phase in run.phases), default=1)
    for phase in run.phases:
        if phase.end - phase.start > 0.08 * total:                   # a narrower one has no room for its name
            ax.text((phase.start + phase.end) / 2, 0.08, phase.kind, transform=ax.get_xaxis_transform(), ha="center",
                    fontsize=8.5, color="#555555")


def _shade(ax: Axes, phases: Sequence[Phase]) -> None:
    """Colour the phases and draw a line where a new cycle begins."""
    for phase in phases:
        ax.axvspan(phase.start, phase.end, color=PHASE_SHADES[phase.kind], alpha=0.55, linewidth=0, zorder=0)
    for cycle in sorted({phase.cycle for phase in phases} - {0}):
        edge = min(phase.start for phase in phases if phase.cycle == cycle)
        ax.axvline(edge, color="#888888", linestyle="--", linewidth=1)
    if phases:
        end = max(phase.end for phase in phases)
        ax.set_xlim(0, 1.01 * end)                                   # room for the mark of the last step


def _trajectory(ax: Axes, run: RunStory, colour: str, style: str) -> None:
    """Full bits per byte of every evaluation, over the tokens trained on."""
    tokens: dict[int, int] = {line["step"]: line["tokens"] for line in run.train if line.get("tokens") is not None}
    at, values = _known([tokens.get(e["step"], 0) for e in run.evals],
                        [e["bpb"]["full"] if tokens.get(e["step"]) is not None else None for e in run.evals])
    if at:
        ax.plot(at, values, color=colour, linestyle=style, marker="o", markersize=4,
                linewidth=1.8, label=run.name)


def _depths(ax: Axes, run: RunStory, colour: str) -> None:
    """Prefixes as a line, single stages as open marks beside it; BP as a level."""
    assert run.evaluation is not None
    bpb = run.evaluation["bpb"]
    if not bpb.get("stages"):
        ax.axhline(bpb["full"], color=colour, linewidth=2, linestyle="--", label=f"{run.name} (BP)")
        return
    depth = range(1, len(bpb["stages"]) + 1)
    ax.plot(depth, bpb["prefixes"], color=colour, marker="o", markersize=6, linewidth=1.8, label=f"{run.name}, prefix")
    ax.plot(depth, bpb["stages"], color=colour, marker="s", markersize=6, markerfacecolor="white", linewidth=1.0,
            linestyle=":", label=f"{run.name}, stage alone")


# -- small things -------------------------------------------------------------------------------------------------

def _reach(run: RunStory, count: int) -> int:
    """Half-width of the smoothing window in values, for `count` of them: the same number of steps for every curve."""
    return round(max(2, len(run.train) // 60) * count / max(len(run.train), 1))


def _legend_above(ax: Axes) -> None:
    """Beside the title, where it covers no curve."""
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2, ncols=5, fontsize=9, frameon=False)


def _fit(ax: Axes, values: Sequence[float]) -> None:
    """Show the curve, not the outliers: the y range spans the smoothed values."""
    if values and max(values) > min(values):
        room = 0.06 * (max(values) - min(values))
        ax.set_ylim(min(values) - room, max(values) + room)


def _known(steps: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """The steps that have a value, and the values: some are not computed at every step, some were not finite."""
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def _at(values: Sequence[float | None] | None, k: int) -> float | None:
    return values[k] if values and k < len(values) else None


def _short(value: float, _: object = None) -> str:
    """1500000 -> "1.5M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
