"""Of a specialist's run: what was trained against the base it stands on; and of conversations each source alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from nanopoe.report.plots.style import COLOURS, GREY, POOL, head, known, marks, percents, shown, stage_colours
from nanopoe.report.record import Record, Score
from nanopoe.report.runs import RunStory

LOOKS: dict[str, dict[str, Any]] = {
    "specialist": {"color": POOL, "linewidth": 2, "marker": "D"}, "dual": {"color": COLOURS[0], "linewidth": 1.6},
    "base": {"color": GREY, "linewidth": 1.6, "linestyle": "--", "marker": ""}}


def view_curves(ax: Axes, records: Sequence[Record], value: Callable[[Score], float]) -> None:
    """Specialist and dual over the steps, and the base, which stays where it is as long as the same text is read."""
    steps = [r.step for r in records]
    for name in dict.fromkeys(name for r in records for name in r.views if r.specialists):
        values = [value(r.views[name]) if name in r.views else None for r in records]
        ax.plot(*known(steps, values), label=name, **{**marks(len(steps)), "color": COLOURS[3], **LOOKS.get(name, {})})


def view_scores(ax: Axes, run: RunStory) -> None:
    view_curves(ax, run.records, lambda score: score.bpb)
    head(ax, "Bits per byte", ylabel="bits per byte")


def view_accuracy(ax: Axes, run: RunStory) -> None:
    view_curves(ax, run.records, lambda score: score.accuracy)
    ax.yaxis.set_major_formatter(FuncFormatter(percents))
    head(ax, "Accuracy", ylabel="top-1 of targets")


def source_names(run: RunStory) -> list[str]:
    return list(dict.fromkeys(name for r in run.records for name in r.sources or {}))


def source_scores(ax: Axes, run: RunStory) -> None:
    """A colour per source: what was trained, and dashed the base of a specialist."""
    told = [(r.step, r.sources) for r in run.records if r.sources]
    steps, names = [step for step, _ in told], source_names(run)
    for name, colour in zip(names, stage_colours(len(names)), strict=True):
        found = [sources.get(name) for _, sources in told]
        own = known(steps, [one.bpb if one else None for one in found])
        ax.plot(*own, color=colour, linewidth=1.6, label=shown(name), **marks(len(steps)))
        base = known(steps, [one.base.bpb if one and one.base else None for one in found])
        if base[0]:
            ax.plot(*base, color=colour, linewidth=1.3, linestyle="--")
    if any(one.base for _, sources in told for one in sources.values()):
        ax.plot([], [], color=GREY, linewidth=1.3, linestyle="--", label="its base")
    head(ax, "By source", ylabel="bits per byte")
