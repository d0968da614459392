"""How every picture looks: colours, shaded phases, and legends that cover neither a curve nor another text.

Colours are Okabe and Ito's, which colour-blind readers tell apart; the pool is always black and thick. With more stages
than that palette has, they run through viridis, whose order readers see in grey too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nanopoe.report.runs import RunStory

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#A6761D")
POOL = "#000000"
GREY = "#666666"
PHASE_SHADES = {"warm-up": "#F6E3B8", "hold": "#FFFFFF", "warm-down": "#D6E6F2"}
WIDTH = 9.0                                   # inches at 140 dpi: 1,260 pixels, shown at about 850 in a README
LEGEND_ROW = 13.6                             # points
STYLE: dict[Any, Any] = {
    "font.size": 10.5, "axes.grid": True, "grid.color": "#D9D9D9", "grid.linewidth": 0.6, "axes.axisbelow": True,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#666666", "axes.titlesize": 12,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 9,
    "lines.solid_capstyle": "round", "figure.facecolor": "white", "axes.titley": 1.0,
}


Panels = list[tuple[float, Callable[[Axes], None]]]                           # (inches, what draws it)


def draw(path: str | Path, title: str, panels: Panels, *, sharex: bool = False) -> bool:
    """Write the panels below each other; nothing, and False is returned, without any. Same input, same bytes."""
    if not panels:
        return False
    heights = [height for height, _ in panels]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.35 + sum(heights)), dpi=140, layout="constrained")
        figure.get_layout_engine().set(h_pad=0.08)                            # type: ignore[union-attr, call-arg]
        figure.suptitle(shown(title), x=0.008, ha="left", fontsize=13, fontweight="bold", color="#444444")
        axes = figure.subplots(len(heights), 1, sharex=sharex, height_ratios=heights, squeeze=False)[:, 0]
        for ax, (_, fill) in zip(axes, panels, strict=True):
            fill(ax)
        rows = sum(_shape(_names(ax))[1] - 1 for ax in axes if _names(ax))        # legends take from no panel
        figure.set_size_inches(WIDTH, 0.35 + sum(heights) + rows * LEGEND_ROW / 72)
        save(figure, path)
    return True


def save(figure: Figure, path: str | Path) -> None:
    figure.savefig(path, format="png", metadata={"Software": None})


def stage_colours(n_stages: int) -> list[Any]:
    """A colour per stage."""
    if n_stages <= len(COLOURS):
        return list(COLOURS[:n_stages])
    shades = matplotlib.colormaps["viridis"]
    return [shades(0.95 * k / (n_stages - 1)) for k in range(n_stages)]


def head(ax: Axes, title: str, **labels: str) -> None:
    """Title, under it the legend in as many rows as it needs, and the labels of the axes."""
    handles, names = ax.get_legend_handles_labels()
    rows = 0
    if names:
        columns, rows = _shape(names)
        order = [i for column in range(columns) for i in range(column, len(names), columns)]     # to be read by rows
        ax.legend([handles[i] for i in order], [names[i] for i in order], loc="lower left", bbox_to_anchor=(0, 1),
                  ncols=columns, borderaxespad=0, handlelength=1.8, columnspacing=1.4, handletextpad=0.6,
                  borderpad=0.3, labelspacing=0.35)
    ax.set_title(shown(title), pad=8 + LEGEND_ROW * rows)
    ax.set(**labels)


def _names(ax: Axes) -> list[str]:
    return list(ax.get_legend_handles_labels()[1])


def _shape(names: Sequence[str]) -> tuple[int, int]:
    """Columns and rows of a legend of these names."""
    room = 0.86 * WIDTH * 72                                                  # points from axis to edge
    columns = max(1, min(len(names), int(room / (5.6 * max(map(len, names)) + 38))))
    return columns, math.ceil(len(names) / columns)


def shown(text: str) -> str:
    """A name as matplotlib draws it literally: no formula, and never a hidden label."""
    text = " ".join(text.split()).replace("$", r"\$")
    text = text if len(text) <= 48 else f"{text[:47]}…"
    return f" {text}" if text.startswith("_") else text


def shade(ax: Axes, run: RunStory, first: float, last: float) -> None:
    """Colour the phases of the schedule from step `first` to `last`, show these only, and draw a line at each seam."""
    for phase in run.phases:
        ax.axvspan(phase.start, phase.end, color=PHASE_SHADES[phase.kind], alpha=0.55, linewidth=0, zorder=0)
    for step in run.seams:
        ax.axvline(step, color="#555555", linestyle="--", linewidth=1.2)
    ax.set_xlim(first, last)


def over(ax: Axes, run: RunStory, steps: Sequence[int]) -> None:
    """An axis of evaluated steps, with a little room beside them, and the phases of the schedule behind it."""
    room = 0.03 * (steps[-1] - steps[0])
    shade(ax, run, steps[0] - room, steps[-1] + room)
    steps_axis(ax)


def steps_axis(ax: Axes) -> None:
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def agreement_axis(ax: Axes, shares: Sequence[float]) -> None:
    """Up to 100 %, and no tick beyond it."""
    low = min(shares, default=1.0)
    room = max(0.06 * (1 - low), 0.0005)
    ax.set_xticks([tick for tick in MaxNLocator(6).tick_values(low - room, 1) if low - room <= tick < 1 + 1e-9])
    ax.set_xlim(low - room, 1 + 0.05 * (1 - low + room))
    ax.xaxis.set_major_formatter(FuncFormatter(percents))


def percents(value: float, _: object = None) -> str:
    return f"{100 * value:.6g} %"


def short(value: float, _: object = None) -> str:
    """1500000 -> "1.5M"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def known(steps: Sequence[int], values: Sequence[float | None]) -> tuple[list[int], list[float]]:
    """The steps that have a value, and the values: some are not computed at every step, some were not finite."""
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return [step for step, _ in pairs], [value for _, value in pairs]


def marks(count: int) -> dict[str, Any]:
    """Marks for `count` points: smaller ones where they are many."""
    return {"marker": "o", "markersize": 4.5 if count <= 20 else 2.5}
