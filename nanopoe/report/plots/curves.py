"""Of one run: what training looked like, over its steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from nanopoe.report.plots.specialists import view_curves
from nanopoe.report.plots.style import GREY, POOL, draw, head, known, marks, shade, stage_colours, steps_axis
from nanopoe.report.record import Record
from nanopoe.report.runs import RunStory


def plot_curves(run: RunStory, path: str | Path) -> bool:
    """Loss of every stage and the pool, bits per byte of its evaluations, learning rate; the LR cycles shaded, and
    a line where a further one begins or the run went on with something changed.

    Nothing is written, and False returned, for a run without metrics.
    """
    if not run.train and not run.evals:
        return False
    fills: list[tuple[float, Callable[[Axes, RunStory], None]]] = [(4.2, _losses)]
    if run.n_stages > 1:
        fills.append((2.8, _against_mean))
    if run.evals:
        fills.append((3.2, _evaluations))
    fills.append((1.9, _rates))
    end = max([1, *(phase.end for phase in run.phases), *(line["step"] for line in run.train[-1:])])

    def panel(fill: Callable[[Axes, RunStory], None], last: bool) -> Callable[[Axes], None]:
        def fill_panel(ax: Axes) -> None:
            shade(ax, run, 0, 1.01 * end)                     # room for the mark of the last step
            fill(ax, run)
            if last:
                steps_axis(ax)
        return fill_panel

    return draw(path, run.name, [(height, panel(fill, fill is _rates)) for height, fill in fills], sharex=True)


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
        curves: list[tuple[str, Any, list[float | None]]] = [
            (f"stage {k}", colour, [_at(line.get("stage_loss"), k) for line in run.train])
            for k, colour in enumerate(stage_colours(run.n_stages))]
    else:
        curves = [("loss", POOL, [line.get("loss") for line in run.train])]
    shown: list[float] = []
    for name, colour, values in curves:
        at, found = known(steps, values)
        smooth = smoothed(found, _reach(run, len(found)))
        ax.plot(at, found, color=colour, alpha=0.22, linewidth=0.8)
        ax.plot(at, smooth, color=colour, label=name, linewidth=2.2 if colour == POOL else 1.6)
        shown += smooth
    _fit(ax, shown)
    head(ax, "Training loss", ylabel="nats per token")


def _against_mean(ax: Axes, run: RunStory) -> None:
    """Loss of every stage, and of the pool where it was looked at, minus the stages' mean in the same step, smoothed.

    What tells the experts apart; the pool lies below the mean by their diversity.
    """
    K = run.n_stages
    lines = [line for line in run.train if len(found := line.get("stage_loss") or []) == K and None not in found]
    means = [sum(line["stage_loss"]) / K for line in lines]
    curves = [(f"stage {k}", colour, [line["stage_loss"][k] for line in lines])
              for k, colour in enumerate(stage_colours(K))]
    curves.append(("pool", POOL, [line.get("pool_loss") for line in lines]))
    late: list[float] = []
    for name, colour, losses in curves:
        excess = [None if v is None else v - mean for v, mean in zip(losses, means, strict=True)]
        at, found = known([line["step"] for line in lines], excess)
        smooth = smoothed(found, _reach(run, len(found)))
        ax.plot(at, smooth, color=colour, linewidth=2.2 if name == "pool" else 1.6, label=name)
        late += smooth[len(smooth) // 20:]
    ax.axhline(0, color=GREY, linewidth=1)
    _fit(ax, [0.0, *late])
    head(ax, "Stages and pool against the stages' mean", ylabel="nats above the mean")


def _evaluations(ax: Axes, run: RunStory) -> None:
    """Bits per byte of every stage and of the full pool, or of a specialist and its base, at each evaluation during
    training."""
    evals = run.evals
    steps = [e.step for e in evals]
    if run.is_specialist:
        view_curves(ax, evals, lambda score: score.bpb)
        head(ax, f"Validation, specialist {evals[-1].trained.bpb:.4f}, base {evals[-1].bpb.full:.4f} at step "
                 f"{steps[-1]:,}", ylabel="bits per byte")
        return
    stages = max((e.n_stages for e in evals if e.bpb.stages), default=0)
    for k, colour in enumerate(stage_colours(stages)):
        ax.plot(*_apart(evals, [_at(e.bpb.stages, k) for e in evals]), color=colour, linewidth=1.4, label=f"stage {k}",
                **marks(len(evals)))
    ax.plot(*_apart(evals, [e.bpb.full for e in evals]), color=POOL, linewidth=2, label="full",
            **{**marks(len(evals)), "marker": "D"})
    head(ax, f"Validation, full {evals[-1].bpb.full:.4f} at step {steps[-1]:,}", ylabel="bits per byte")


def _rates(ax: Axes, run: RunStory) -> None:
    """Learning-rate multiplier, with the phases named above it."""
    scales = [line.get("lr_scale") for line in run.train]
    ax.plot(*known([line["step"] for line in run.train], scales), color=POOL, linewidth=1.6)
    told = [*(["ramps shaded"] if run.phases else []), *(["seams dashed"] if run.seams else [])]
    head(ax, "Learning rate" + (f" ({', '.join(told)})" if told else ""), ylabel="multiplier")
    ax.margins(y=0.15)
    ax.set_ylim(bottom=0)
    total = max((phase.end for phase in run.phases), default=1)
    for phase in run.phases:
        if phase.end - phase.start > 0.12 * total:                   # a narrower one has no room for its name
            ax.text((phase.start + phase.end) / 2, 0.08, phase.kind, transform=ax.get_xaxis_transform(), ha="center",
                    fontsize=8.5, color="#555555")


# -- small things -------------------------------------------------------------------------------------------------

def _apart(evals: Sequence[Record], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """Steps and values, with a gap in the curve where an evaluation read other bytes than the one before it."""
    gapped = [((e.step, math.nan) if e.bytes != before.bytes else None, (e.step, value))
              for before, e, value in zip([evals[0], *evals], evals, values, strict=False)]
    points = [point for pair in gapped for point in pair if point is not None]
    return known([step for step, _ in points], [value for _, value in points])


def _reach(run: RunStory, count: int) -> int:
    """Half-width of the smoothing window in values, for `count` of them: the same number of steps for every curve."""
    return round(max(2, len(run.train) // 60) * count / max(len(run.train), 1))


def _fit(ax: Axes, values: Sequence[float]) -> None:
    """Show the curve, not the outliers: the y range spans the smoothed values."""
    if values and max(values) > min(values):
        room = 0.06 * (max(values) - min(values))
        ax.set_ylim(min(values) - room, max(values) + room)


def _at(values: Sequence[float | None] | None, k: int) -> float | None:
    return values[k] if values and k < len(values) else None
