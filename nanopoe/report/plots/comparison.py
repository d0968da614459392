"""Of several runs: how far they came on as many tokens, what their stages know, and what their modes give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nanopoe.report.cells import MODE_NAMES
from nanopoe.report.compare import baseline_of, meetings
from nanopoe.report.plots.modes import MODE_LOOKS, marker_size, measured
from nanopoe.report.plots.style import COLOURS, GREY, Panels, agreement_axis, draw, head, marks, percents, short, shown
from nanopoe.report.runs import RunStory

LINES = ("-", "--", ":", "-.")


def plot_comparison(runs: Sequence[RunStory], path: str | Path) -> bool:
    """Bits per byte over tokens (steps, where a run does not say its tokens), the gap to the baseline, and the newest
    of each by depth."""
    evaluated = [run for run in runs if run.records]
    if not evaluated:
        return False
    panels: Panels = [(4.0, partial(_over_training, runs=runs))]
    baseline = baseline_of(runs)
    if baseline is not None and any(meetings(baseline, run) for run in runs if run is not baseline):
        panels.append((3.2, partial(_gaps, runs=runs, baseline=baseline)))
    if any(run.records[-1].bpb.stages and not run.is_specialist for run in evaluated):
        panels.append((4.0, partial(_depths, runs=runs)))
    return draw(path, "Comparison", panels)


def plot_modes_comparison(runs: Sequence[RunStory], path: str | Path) -> bool:
    """Measured speed-ups against agreement, of the newest measured step of each run."""
    timed = [(run, record) for run in runs if (record := _timed(run)) is not None]
    return draw(path, "Comparison", [(4.4, partial(_speeds, runs=runs))] if len(timed) > 1 else [])


def _look(runs: Sequence[RunStory], run: RunStory) -> tuple[str, str]:
    """Colour and line of a run, the same in every panel."""
    i = list(runs).index(run)
    return COLOURS[i % len(COLOURS)], LINES[i // len(COLOURS) % len(LINES)]


def _over_training(ax: Axes, runs: Sequence[RunStory]) -> None:
    """Over tokens if every evaluated step of every run has them, else over steps. A specialist's base is dotted."""
    by_tokens = all(r.step in run.tokens for run in runs for r in run.records)
    for run in runs:
        colour, line = _look(runs, run)
        if run.records:
            x = [run.tokens[r.step] if by_tokens else r.step for r in run.records]
            ax.plot(x, [r.trained.bpb for r in run.records], color=colour, linestyle=line, linewidth=1.8,
                    label=shown(run.name), **marks(len(run.records)))
            if run.is_specialist:
                ax.plot(x, [r.bpb.full for r in run.records], color=colour, linestyle=":", linewidth=1.8,
                        label=f"{shown(run.name)}, its base", **{**marks(len(x)), "markerfacecolor": "white"})
    _training_axis(ax, by_tokens)
    special = any(run.is_specialist for run in runs)
    head(ax, "Validation over training", ylabel=f"bits per byte ({'what was trained' if special else 'full'})")


def _training_axis(ax: Axes, by_tokens: bool) -> None:
    ax.set_xlabel("training tokens" if by_tokens else "step")
    ax.xaxis.set_major_locator(MaxNLocator(7))
    ax.xaxis.set_major_formatter(FuncFormatter(short))


def _gaps(ax: Axes, runs: Sequence[RunStory], baseline: RunStory) -> None:
    met = {run.name: meetings(baseline, run) for run in runs if run is not baseline}
    by_tokens = all(m.tokens is not None for found in met.values() for m in found)
    for run in runs:
        found = met.get(run.name)
        if found:
            colour, line = _look(runs, run)
            ax.plot([(m.tokens if by_tokens else None) or m.baseline.step for m in found],
                    [m.gap for m in found], color=colour, linestyle=line, linewidth=1.8, label=shown(run.name),
                    **marks(len(found)))
    ax.axhline(0, color=_look(runs, baseline)[0], linewidth=1.6)
    _training_axis(ax, by_tokens)
    ax.yaxis.set_major_formatter(FuncFormatter(percents))
    head(ax, f"Gap to {baseline.name} {'after as many tokens' if by_tokens else 'at the same step'}",
         ylabel="more bits per byte")


def _depths(ax: Axes, runs: Sequence[RunStory]) -> None:
    """Prefixes as a line, single stages as open marks beside it; a run without stages, or a specialist, as a level."""
    for run in runs:
        if run.newest is None:
            continue
        colour, bpb = _look(runs, run)[0], run.newest.bpb
        name = shown(run.name)
        if not bpb.stages or run.is_specialist:
            ax.axhline(run.newest.trained.bpb, color=colour, linewidth=2, linestyle="--",
                       label=f"{name} ({'specialist' if run.is_specialist else 'BP'})")
            continue
        depth = range(1, len(bpb.stages) + 1)
        if bpb.prefixes:
            ax.plot(depth, bpb.prefixes, color=colour, marker="o", markersize=6, linewidth=1.8, label=f"{name}, prefix")
        ax.plot(depth, bpb.stages, color=colour, marker="s", markersize=6, markerfacecolor="white", linewidth=1.0,
                linestyle=":", label=f"{name}, stage alone")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    head(ax, "Stages and prefixes of the newest", xlabel="stages run (depth of the prefix)", ylabel="bits per byte")


def _timed(run: RunStory) -> dict[str, tuple[float, float]] | None:
    """Mode -> (agreement, measured speed-up) of the newest step that was timed."""
    for record in reversed(run.records):
        points = {name: (m.agreement, m.measured_speedup) for name, m in measured(record).items()
                  if m.measured_speedup is not None}
        if points:
            return points
    return None


def _speeds(ax: Axes, runs: Sequence[RunStory]) -> None:
    """A colour per run, a mark per mode; open where the bounds are those of the lead."""
    x: list[float] = []
    modes: set[str] = set()
    for run in runs:
        points = _timed(run) or {}
        colour = _look(runs, run)[0]
        for name, (agreement, speed) in points.items():
            marker = MODE_LOOKS[name][0]
            ax.plot(agreement, speed, linestyle="none", marker=marker, color=colour, markersize=marker_size(marker, 8),
                    markerfacecolor="none" if "lead" in name else colour)
            x.append(agreement)
        if points:
            ax.plot([], [], color=colour, linewidth=4, label=shown(run.name))
        modes |= points.keys()
    for name in (name for name in MODE_NAMES if name in modes):
        marker = MODE_LOOKS[name][0]
        ax.plot([], [], linestyle="none", marker=marker, color=GREY, markersize=marker_size(marker, 8),
                markerfacecolor="none" if "lead" in name else GREY, label=MODE_NAMES[name])
    ax.axhline(1, color=GREY, linewidth=1)
    agreement_axis(ax, x)
    head(ax, "Measured speed-up against agreement", xlabel="tokens that are the full pool's", ylabel="speed-up")
