"""Of one run: what its evaluated steps say about pool, stages and prefixes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nanopoe.report.plots.specialists import source_names, source_scores, view_accuracy, view_scores
from nanopoe.report.plots.style import POOL, Panels, draw, head, known, marks, over, percents, stage_colours
from nanopoe.report.record import Record
from nanopoe.report.runs import RunStory

SWEEPS = 8                                     # lines of an alpha sweep, as many as can be told apart


def plot_trajectory(run: RunStory, path: str | Path) -> bool:
    """Bits per byte and accuracy of pool, stages and prefixes over the evaluated steps, and of the newest by depth; of
    a specialist against its base; of conversations by source."""
    fills: list[tuple[float, Callable[[Axes, RunStory], None]]] = []
    if run.is_specialist:
        fills += [(3.4, view_scores), (3.2, view_accuracy)]
    else:
        against = [_against_pool] if any(r.bpb.stages for r in run.records) else []
        fills += [(3.4, _scores), *((3.4, fill) for fill in against), (3.2, _accuracy)]
    if len(source_names(run)) > 1:
        fills.append((3.2, source_scores))
    panels: Panels = [(inches, over_steps(run, fill)) for inches, fill in fills] if len(run.records) > 1 else []
    if not run.is_specialist and run.newest is not None and run.newest.bpb.stages and run.newest.n_stages > 1:
        panels.append((3.4, partial(_by_depth, record=run.newest)))
    return draw(path, run.name, panels)


def plot_alpha(run: RunStory, path: str | Path) -> bool:
    """Bits per byte over alpha, of some steps between the first and the newest."""
    swept = [r for r in run.records if len(r.bpb.alpha or {}) > 1]
    return draw(path, run.name, [(3.6, partial(_alpha, records=swept))] if swept else [])


def over_steps(run: RunStory, fill: Callable[[Axes, RunStory], None]) -> Callable[[Axes], None]:
    """A panel over the evaluated steps, with the phases of the schedule behind it."""
    def panel(ax: Axes) -> None:
        over(ax, run, [record.step for record in run.records])
        fill(ax, run)
    return panel


# -- over steps ---------------------------------------------------------------------------------------------------

def _curves(ax: Axes, run: RunStory, value: Callable[[Record], list[float] | None],
            full: Callable[[Record], float]) -> None:
    """A curve per stage, the pool on top."""
    steps = [r.step for r in run.records]
    mark = marks(len(steps))
    for k, colour in enumerate(stage_colours(_stages(run))):
        ax.plot(*known(steps, [_at(value(r), k) for r in run.records]), color=colour, linewidth=1.5,
                label=f"stage {k}", **mark)
    ax.plot(steps, [full(r) for r in run.records], color=POOL, linewidth=2, label="full", **{**mark, "marker": "D"})


def _scores(ax: Axes, run: RunStory) -> None:
    _curves(ax, run, lambda r: r.bpb.stages, lambda r: r.bpb.full)
    head(ax, "Bits per byte", ylabel="bits per byte")


def _accuracy(ax: Axes, run: RunStory) -> None:
    _curves(ax, run, lambda r: r.accuracy.stages, lambda r: r.accuracy.full)
    ax.yaxis.set_major_formatter(FuncFormatter(percents))
    head(ax, "Accuracy", ylabel="top-1 of targets")


def _against_pool(ax: Axes, run: RunStory) -> None:
    """What a stage alone, or the first few, cost against the pool; below zero the pool is beaten."""
    steps, K = [r.step for r in run.records], _stages(run)
    colours, mark = stage_colours(K), marks(len(run.records))
    for k in range(K):
        ax.plot(*known(steps, [_above(r, r.bpb.stages, k) for r in run.records]), color=colours[k], linewidth=1.5,
                label=f"stage {k}", **mark)
    for n in range(2, K):
        ax.plot(*known(steps, [_above(r, r.bpb.prefixes, n - 1) for r in run.records]), color=colours[n - 1],
                linewidth=1.3, linestyle="--", label=f"prefix {n}",
                **{**mark, "marker": "s", "markerfacecolor": "white"})
    ax.axhline(0, color=POOL, linewidth=1.6)
    head(ax, "Stages and prefixes against the full pool", ylabel="bits per byte more")


# -- of one step --------------------------------------------------------------------------------------------------

def _by_depth(ax: Axes, record: Record) -> None:
    """Prefixes as a line, single stages beside it, over the stages run."""
    depth = range(1, record.n_stages + 1)
    if record.bpb.prefixes:
        ax.plot(depth, record.bpb.prefixes, color="#0072B2", marker="o", markersize=6, linewidth=1.8, label="prefix")
    ax.plot(depth, record.bpb.stages or [], color="#E69F00", marker="s", markersize=6, markerfacecolor="white",
            linewidth=1.0, linestyle=":", label="that stage alone")
    ax.axhline(record.bpb.full, color=POOL, linewidth=1.2, label=f"full pool, {record.bpb.full:.4f}")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    head(ax, f"How much the first stages know, step {record.step:,}", xlabel="stages run", ylabel="bits per byte")


def _alpha(ax: Axes, records: list[Record]) -> None:
    """One line per step, from light to dark; the newest is black."""
    chosen = [records[i] for i in np.unique(np.linspace(0, len(records) - 1, min(len(records), SWEEPS)).round()
                                           .astype(int))]
    shades = colormaps["viridis"]
    for i, record in enumerate(chosen):
        pairs = sorted((float(a), value) for a, value in (record.bpb.alpha or {}).items())
        newest = i == len(chosen) - 1
        colour: Any = POOL if newest else shades(0.9 - 0.8 * i / len(chosen))
        ax.plot([a for a, _ in pairs], [v for _, v in pairs], color=colour, linewidth=2 if newest else 1.3,
                marker="D" if newest else "o", markersize=4.5, label=f"step {record.step:,}")
    head(ax, "Alpha sweep", xlabel="alpha (0 = geometric mean, 1 = product)", ylabel="bits per byte")


# -- small things -------------------------------------------------------------------------------------------------

def _stages(run: RunStory) -> int:
    return max((r.n_stages for r in run.records if r.bpb.stages), default=0)


def _at(values: list[float] | None, k: int) -> float | None:
    return values[k] if values and k < len(values) else None


def _above(record: Record, values: list[float] | None, k: int) -> float | None:
    value = _at(values, k)
    return None if value is None else value - record.bpb.full
