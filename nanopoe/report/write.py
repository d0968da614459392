"""The files of a report: pictures, report.md, and report.html, which holds everything. Same input, same bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from nanopoe.report.document import Chapter, comparison_chapter, markdown, run_chapter
from nanopoe.report.page import html
from nanopoe.report.plots.comparison import plot_comparison, plot_modes_comparison
from nanopoe.report.plots.curves import plot_curves
from nanopoe.report.plots.modes import plot_depth, plot_exits, plot_routing, plot_speed
from nanopoe.report.plots.trajectory import plot_alpha, plot_trajectory
from nanopoe.report.runs import RunStory

OF_A_RUN: dict[str, Callable[[RunStory, Path], bool]] = {
    "trajectory": plot_trajectory, "curves": plot_curves, "depth": plot_depth, "exits": plot_exits, "speed": plot_speed,
    "routing": plot_routing, "alpha": plot_alpha}
OF_RUNS: dict[str, Callable[[Sequence[RunStory], Path], bool]] = {
    "comparison": plot_comparison, "comparison_modes": plot_modes_comparison}


def plots_of(run: RunStory) -> dict[str, Callable[[RunStory, Path], bool]]:
    """Those of OF_A_RUN that are of what was trained: of a specialist's run the modes and stages are the base's."""
    return {kind: plot for kind, plot in OF_A_RUN.items() if not run.is_specialist or kind in ("trajectory", "curves")}


def write_report(runs: Sequence[RunStory], out: Path) -> list[str]:
    """Write the report of one run, or of several with their comparison first, into `out`; the names of its files."""
    out.mkdir(parents=True, exist_ok=True)
    pictures: list[str] = []
    chapters: list[Chapter] = []
    if len(runs) > 1:
        pictures = [f"{kind}.png" for kind, plot in OF_RUNS.items() if plot(runs, out / f"{kind}.png")]
        chapters.append(comparison_chapter(runs, list(pictures)))
    for run in runs:
        files = {kind: f"{kind}.png" if len(runs) == 1 else f"{kind}_{run.name}.png" for kind in OF_A_RUN}
        drawn = {kind: files[kind] for kind, plot in plots_of(run).items() if plot(run, out / files[kind])}
        chapters.append(run_chapter(run, drawn))
        pictures += drawn.values()
    images = {name: (out / name).read_bytes() for name in pictures}
    for name, text in (("report.md", markdown(chapters)), ("report.html", html(chapters, images))):
        (out / name).write_bytes(text.encode("utf-8", "replace"))          # a lone surrogate in a text becomes "?"
    return ["report.html", "report.md", *pictures]
