"""Plots show every curve asked for, with the numbers of the records, and no text lies on another."""

from __future__ import annotations

import struct
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from nanopoe.config.schema import CycleConfig, ScheduleConfig
from nanopoe.report.plots import style
from nanopoe.report.plots.comparison import plot_comparison, plot_modes_comparison
from nanopoe.report.plots.curves import plot_curves, smoothed
from nanopoe.report.plots.modes import plot_depth, plot_exits, plot_routing, plot_speed
from nanopoe.report.plots.trajectory import plot_alpha, plot_trajectory
from nanopoe.report.runs import RunStory, load_run, phases_of
from nanopoe.report.write import OF_A_RUN
from tests.reports import record, write_run

SCHEDULE = ScheduleConfig(cycles=(
    CycleConfig(steps=100, warmup_steps=10, warmdown_ratio=0.65, peak=1.0, final_frac=0.05, momentum_warmup_steps=0),
    CycleConfig(steps=40, warmup_steps=0, warmdown_ratio=1.0, peak=0.5, final_frac=0.0, momentum_warmup_steps=0)))
STEPS = (60, 100, 140)


def story(folder: Path, stages: int, steps: tuple[int, ...] = STEPS, phases: bool = True, **changes: Any) -> RunStory:
    records = [record(s, stages, poe=stages > 1, **changes) for s in steps]
    run = load_run(write_run(folder, stages, evals=records, records=records))
    return RunStory(run.name, run.train, run.evals, run.records, phases_of(SCHEDULE) if phases else [])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures made while the test runs, laid out; they are not written, which takes the time."""
    figures: list[Figure] = []

    def keep(figure: Figure, _: object) -> None:
        figure.draw_without_rendering()
        figures.append(figure)

    monkeypatch.setattr(style, "save", keep)
    return figures


def legend(ax: Any) -> list[str]:
    return [t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else []


def curve(ax: Any, label: str) -> tuple[list[float], list[float]]:
    line = next(line for line in ax.lines if line.get_label() == label)
    return list(line.get_xdata()), list(line.get_ydata())


# -- no text on another -------------------------------------------------------------------------------------------

@matplotlib.rc_context(style.STYLE)                                 # ticks depend on it
def overlaps(figure: Figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that lie on each other, and texts that stick out of it."""
    texts = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    for ax in figure.axes:                                          # ticks out of view are not drawn
        for axis, (low, high) in ((ax.xaxis, sorted(ax.get_xlim())), (ax.yaxis, sorted(ax.get_ylim()))):
            hidden = {id(tick.label1) for tick in [*axis.get_major_ticks(), *axis.get_minor_ticks()]
                      if not low - 1e-9 <= tick.get_loc() <= high + 1e-9}
            texts = [t for t in texts if id(t) not in hidden]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts]
    found = [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)]
    width, height = figure.bbox.size
    return found + [(text, "the edge") for text, box in boxes
                    if box.x0 < 0 or box.y0 < 0 or box.x1 > width or box.y1 > height]


@pytest.mark.parametrize(("stages", "steps"), [(1, STEPS), (2, (140,)), (12, (100, 140)),
                                               (3, tuple(range(100_000, 100_150, 3)))])
def test_no_text_lies_on_another(tmp_path: Path, drawn: list[Figure], stages: int, steps: tuple[int, ...]) -> None:
    run = story(tmp_path / ("a_run_with_a_long_name_" * 4), stages, steps)
    made = [plot for plot in OF_A_RUN.values() if plot(run, tmp_path / "x.png")]
    assert len(drawn) == len(made) >= (2 if stages == 1 else 5)
    assert {plot.__name__: overlaps(figure) for plot, figure in zip(made, drawn, strict=True)} == {
        plot.__name__: [] for plot in made}


def test_no_text_lies_on_another_in_comparisons(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [story(tmp_path / f"a_rather_long_name_of_a_run_{k}", k) for k in (1, 2, 3, 4)]
    assert plot_comparison(runs, tmp_path / "x.png") and plot_modes_comparison(runs, tmp_path / "y.png")
    assert [overlaps(figure) for figure in drawn] == [[], []]


def test_the_overlap_check_sees_an_overlap(tmp_path: Path) -> None:
    figure = Figure(figsize=(4, 3))
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], label="curve")
    ax.text(0.5, 0.5, "one text")
    figure.draw_without_rendering()
    assert overlaps(figure) == []
    ax.text(0.5, 0.52, "another text")
    figure.draw_without_rendering()
    assert overlaps(figure) == [("one text", "another text")]
    ax.text(0.95, 0.1, "a text that leaves the picture")
    figure.draw_without_rendering()
    assert ("a text that leaves the picture", "the edge") in overlaps(figure)


# -- what they show -----------------------------------------------------------------------------------------------

def test_curves_show_every_stage_the_pool_and_the_phases(tmp_path: Path, drawn: list[Figure]) -> None:
    assert plot_curves(story(tmp_path / "poe", 4), tmp_path / "curves.png")
    assert plot_curves(story(tmp_path / "bp", 1, phases=False), tmp_path / "bp.png")
    poe, bp = drawn
    assert [ax.get_title(loc="left") for ax in poe.axes] == [
        "Training loss", "Stages and pool against the stages' mean", "Validation, full 0.8250 at step 140",
        "Learning rate (ramps shaded, seams dashed)"]
    stages = ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert [legend(ax) for ax in poe.axes] == [stages, [*stages, "pool"], [*stages, "full"], []]
    assert len(curve(poe.axes[0], "stage 0")[0]) == 139
    assert 7 not in curve(poe.axes[0], "stage 0")[0]                # its loss was not finite
    assert curve(poe.axes[1], "pool")[0] == list(range(1, 140, 10))     # joined over the steps without it
    assert [curve(poe.axes[1], name)[1][-1] for name in stages] == pytest.approx([0.15, 0.05, -0.05, -0.15])
    assert len(poe.axes[-1].patches) == 4
    assert [ax.get_xlabel() for ax in poe.axes] == ["", "", "", "step"]
    assert legend(bp.axes[0]) == ["loss"]
    assert len(bp.axes) == 3
    assert len(bp.axes[-1].patches) == 0
    for ax in poe.axes[:3]:                           # a legend inside would cover a curve somewhere
        assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1 - 1    # type: ignore[union-attr]


def test_the_trajectory_shows_every_view_of_every_step(tmp_path: Path, drawn: list[Figure]) -> None:
    run = story(tmp_path / "poe", 4)
    assert plot_trajectory(run, tmp_path / "x.png")
    scores, against, accuracy, depth = drawn[0].axes
    for k in range(4):
        assert curve(scores, f"stage {k}") == (list(STEPS), [r.bpb.stages[k] for r in run.records])  # type: ignore[index]
        assert curve(accuracy, f"stage {k}")[1] == [r.accuracy.stages[k] for r in run.records]       # type: ignore[index]
    assert curve(scores, "full")[1] == [r.bpb.full for r in run.records]
    assert curve(against, "prefix 3")[1] == [r.bpb.prefixes[2] - r.bpb.full for r in run.records]    # type: ignore[index]
    assert curve(depth, "prefix")[1] == run.records[-1].bpb.prefixes
    assert len(scores.patches) == 4                                 # the phases
    plot_trajectory(story(tmp_path / "one", 4, (100,)), tmp_path / "x.png")
    assert [ax.get_title(loc="left") for ax in drawn[1].axes] == ["How much the first stages know, step 100"]
    assert not plot_trajectory(story(tmp_path / "bp", 1, (100,)), tmp_path / "x.png")      # a number is no picture


def test_depth_shows_bounds_and_exits(tmp_path: Path, drawn: list[Figure]) -> None:
    run = story(tmp_path / "poe", 4)
    assert plot_depth(run, tmp_path / "x.png") and plot_exits(run, tmp_path / "y.png")
    bounds, leads, newest = drawn[0].axes
    found = [r.calibration for r in run.records if r.calibration]
    assert curve(bounds, "1 to 2") == (list(STEPS), [c.p99[1] for c in found])
    assert curve(leads, "1 to 2") == (list(STEPS), [(c.lead_p99 or [])[1] for c in found])
    dashed = [list(line.get_ydata()) for line in bounds.lines if line.get_linestyle() == "--"]
    assert [c.max[1] for c in found] in dashed
    for ax, name in zip(drawn[1].axes, ("p99", "max", "lead_p99", "lead"), strict=True):
        heights = [patch.get_height() for patch in ax.patches]      # type: ignore[attr-defined]
        assert heights == pytest.approx([getattr(c.wand, name).exits[k] for k in range(4) for c in found])
    kinds = ["wand p99", "wand max", "wand lead p99", "wand lead"]
    assert [t.get_text().replace("\n", " ") for t in newest.get_yticklabels()] == [
        *(f"{kind}, calibration" for kind in kinds), *(f"{kind}, ran" for kind in kinds), "routed, ran"]
    widths = [patch.get_width() for patch in newest.patches]        # type: ignore[attr-defined]
    routed = run.records[-1].modes.routed.exits                     # type: ignore[union-attr]
    assert widths[8::9] == pytest.approx([n / 420 for n in routed])
    bare = story(tmp_path / "bare", 4, calibrated=False, modes=False)
    assert not plot_depth(bare, tmp_path / "x.png") and not plot_exits(bare, tmp_path / "x.png")
    assert not plot_exits(story(tmp_path / "one", 4, (100,)), tmp_path / "x.png")


def test_speed_shows_predictions_and_measurements(tmp_path: Path, drawn: list[Figure]) -> None:
    run = story(tmp_path / "poe", 4)
    newest = run.records[-1]
    assert newest.calibration and newest.modes and newest.calibration.curves
    assert plot_speed(run, tmp_path / "x.png")
    against, over = drawn[0].axes
    points = sorted((p.agreement, p.predicted_speedup) for p in newest.calibration.curves.wand)
    assert list(zip(*curve(against, "wand, p99 bounds scaled"), strict=True)) == points
    assert len(curve(against, "wand, lead bounds scaled")[0]) == 11
    lead = newest.calibration.kinds["lead"][1]
    assert curve(against, "wand lead, predicted") == ([lead.agreement], [lead.predicted_speedup])
    for name, mode in (("speculative", newest.modes.speculative), ("routed", newest.modes.routed)):
        assert mode is not None
        assert curve(against, f"{name}, ran") == ([mode.agreement], [mode.measured_speedup])
    assert curve(over, "routed")[1] == [r.modes.routed.measured_speedup for r in run.records]    # type: ignore[union-attr]
    assert max(tick for tick in against.get_xticks()) <= 1 + 1e-9                                # none over 100 %
    untimed = story(tmp_path / "untimed", 4, modes=False)
    assert plot_speed(untimed, tmp_path / "x.png")
    assert not any(name.endswith(", ran") for name in legend(drawn[1].axes[0]))


def test_routing_and_alpha(tmp_path: Path, drawn: list[Figure]) -> None:
    run = story(tmp_path / "poe", 4)
    newest = run.records[-1]
    assert newest.calibration and newest.calibration.curves and newest.bpb.alpha
    assert plot_routing(run, tmp_path / "x.png") and plot_alpha(run, tmp_path / "y.png")
    share, lost, over = drawn[0].axes
    points = sorted(newest.calibration.curves.routing, key=lambda p: p.threshold)
    assert curve(share, "answered by stage 0") == ([p.threshold for p in points], [p.routed for p in points])
    assert curve(lost, "cap 0.02")[1] == [0.02, 0.02]
    assert curve(lost, "held out") == ([0.35], [0.0066])
    assert curve(over, "answered by stage 0") == (list(STEPS), [0.71] * 3)
    sweep = drawn[1].axes[0]
    assert curve(sweep, "step 140") == ([0, .25, .5, .75, 1], list(newest.bpb.alpha.values()))
    assert legend(sweep) == ["step 60", "step 100", "step 140"]


def test_comparisons_show_every_run(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [story(tmp_path / "bp", 1, level=0.9), story(tmp_path / "poe", 4), story(tmp_path / "two", 2, (100,))]
    assert plot_comparison(runs, tmp_path / "x.png")
    over, gaps, depths = drawn[0].axes
    assert legend(over) == ["bp", "poe", "two"]
    assert curve(over, "poe")[0] == [512 * s for s in STEPS]
    assert curve(gaps, "poe")[1] == pytest.approx([1 / 0.9 - 1] * 3)
    assert curve(gaps, "two")[0] == [51200]
    assert sorted(legend(depths)) == sorted(["bp (BP)", "poe, prefix", "poe, stage alone", "two, prefix",
                                             "two, stage alone"])
    assert curve(depths, "poe, prefix")[1] == runs[1].records[-1].bpb.prefixes
    assert not plot_modes_comparison(runs[:2], tmp_path / "y.png")             # one of them has modes
    assert plot_modes_comparison(runs, tmp_path / "y.png")
    bare = load_run(write_run(tmp_path / "bare", 2, 0, records=[record(60, 2)]))          # no tokens known: by steps
    assert plot_comparison([*runs, bare], tmp_path / "x.png")
    assert curve(drawn[-1].axes[0], "poe")[0] == list(STEPS)
    assert not plot_comparison([load_run(write_run(tmp_path / "young", 2))], tmp_path / "z.png")


def test_pictures_are_files_and_hold_no_formulas(tmp_path: Path) -> None:
    """A name that matplotlib would read as a formula, or as a hidden label."""
    runs = [story(tmp_path / name, 2, (100,)) for name in ("_$\\frac{$", "$x$")]
    assert plot_comparison(runs, tmp_path / "x.png")
    head = (tmp_path / "x.png").read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", head[16:24])[0] == 1260
    assert b"matplotlib" not in (tmp_path / "x.png").read_bytes().lower()      # nothing that differs by version or day
    assert style.shown("$x$") == r"\$x\$" and style.shown("_a") == " _a"


def test_many_stages_have_colours_of_their_own() -> None:
    for stages in (1, 7, 8, 12, 33):
        assert len({str(c) for c in style.stage_colours(stages)}) == stages


def test_a_long_legend_takes_nothing_from_a_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    def panel(count: int) -> style.Panels:
        def fill(ax: Any) -> None:
            for i in range(count):
                ax.plot([0, 1], [i, i], label=f"a line with a long name, {i}")
            style.head(ax, "Lines")
        return [(3.0, fill)]

    for count in (2, 24):
        style.draw(tmp_path / "x.png", "x", panel(count))
    few, many = (figure.axes[0].get_window_extent().height for figure in drawn)
    assert many > 0.95 * few
    assert drawn[1].get_size_inches()[1] > drawn[0].get_size_inches()[1] + 1


def test_smoothing_is_symmetric() -> None:
    line = [float(v) for v in range(20)]
    assert smoothed(line, 4) == pytest.approx(line)                 # no lag on a straight line
    assert smoothed([0.0, 3.0, 0.0, 6.0], 1) == [0.0, 1.0, 3.0, 6.0]
    assert smoothed([], 3) == []
