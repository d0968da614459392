"""Tables say what the evaluations say; plots are PNG files that show every curve asked for."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nanopoe.config.schema import CycleConfig, ScheduleConfig
from nanopoe.errors import DataError
from nanopoe.report import plots
from nanopoe.report.plots import plot_comparison, plot_curves, smoothed
from nanopoe.report.runs import Phase, RunStory, load_run, phases_of
from nanopoe.report.tables import (
    comparison_markdown,
    comparison_rows,
    comparison_table,
    evaluation_markdown,
    evaluation_rows,
    evaluation_table,
)

# SPEC 7, row 83923 of the published trajectory
PUBLISHED: dict[str, Any] = {
    "poe_mode": "flat", "n_stages": 4,
    "bpb": {"full": .724738, "stages": [.727740, .725798, .725063, .724273],
            "prefixes": [.727740, .726103, .725363, .724738],
            "alpha": {"0": .724738, "0.25": .791984, "1": 1.778352}, "renormalise_false": .725719},
    "accuracy": {"full": .4860, "stages": [.4844, .4856, .4859, .4862], "prefixes": [.4844, .4850, .4855, .4860]},
    "crossover_gap": .000465, "diversity": {"bits_per_byte": .000981, "nats_per_token": .0031},
    "tokens": 1048576, "targets": 1048000, "bytes": 4900000, "seconds": 12.5}
BP: dict[str, Any] = {
    "poe_mode": "none", "n_stages": 1, "bpb": {"full": .676788, "stages": None, "prefixes": None, "alpha": None,
                                               "renormalise_false": None},
    "accuracy": {"full": .5, "stages": None, "prefixes": None}, "crossover_gap": None, "diversity": None,
    "tokens": 100, "targets": 90, "bytes": 400, "seconds": 1.0}
SCHEDULE = ScheduleConfig(cycles=(
    CycleConfig(steps=100, warmup_steps=10, warmdown_ratio=0.65, peak=1.0, final_frac=0.05, momentum_warmup_steps=0),
    CycleConfig(steps=40, warmup_steps=0, warmdown_ratio=1.0, peak=0.5, final_frac=0.0, momentum_warmup_steps=0)))


def write_run(folder: Path, stages: int, steps: int = 140, evaluation: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    with open(folder / "metrics.jsonl", "w") as file:
        for s in range(1, steps + 1):
            losses = [2 + 8 / s + 0.1 * (stages - k) for k in range(stages)]
            line = {"kind": "train", "step": s, "tokens": 512 * s, "loss": sum(losses) / stages, "stage_loss": losses,
                    "pool_loss": losses[-1] if stages > 1 and s % 10 == 1 else None, "lr_scale": min(1, s / 10)}
            if s == 7:                                              # a step whose loss was not finite
                line.update(loss=None, stage_loss=[None] * stages, pool_loss=None, nonfinite=["loss"])
            file.write(json.dumps(line) + "\n")
            if s % 50 == 0:
                file.write(json.dumps({"kind": "eval", "step": s, **(evaluation or BP)}) + "\n")
    return folder


def size_of_png(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:24])


def text_of(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()                                  # type: ignore[attr-defined]


def test_evaluation_shows_every_view() -> None:
    _, rows = evaluation_rows(PUBLISHED)
    stages, prefixes = [f"stage {k}" for k in range(4)], [f"prefix {n}" for n in range(1, 5)]
    assert [row[0] for row in rows] == ["full pool", *stages, *prefixes]
    assert rows[1] == ["stage 0", "0.727740", "+0.003002", "48.44 %"]
    assert rows[4][2] == "-0.000465"
    assert rows[6] == ["prefix 2", "0.726103", "+0.001365", "48.50 %"]
    assert [row[0] for row in evaluation_rows(BP)[1]] == ["full"]


def test_both_media_show_the_same_cells() -> None:
    probes = [{"prompt": "The x is", "answers": {"full": "a | <b>\n*c*", "stage:0": "[bold]d"}}]
    result = {**PUBLISHED, "probes": probes}
    on_screen, markdown = text_of(evaluation_table(result)), evaluation_markdown(result)
    for cell in ("0.724738", "48.62 %", "+0.000465", "0.000981", "alpha 0.25", "1.778352", "1,048,576 tokens",
                 "stage:0"):
        assert cell in on_screen, cell
        assert cell in markdown, cell
    assert "[bold]d" in on_screen                                   # a model's text is not read as markup
    row = next(line for line in markdown.splitlines() if line.startswith("| The x"))
    assert row == "| The x is | full | a \\| &lt;b&gt; \\*c\\* |"   # stays one row of three cells
    assert "Probes" not in evaluation_markdown(PUBLISHED)


def test_comparison_tells_the_gap_to_bp() -> None:
    poe = {**PUBLISHED, "bytes": BP["bytes"], "bpb": {**PUBLISHED["bpb"], "full": .720935}}
    head, rows = comparison_rows({"bp": BP, "poe": poe})
    cells = dict(zip(head, rows[1], strict=True))
    assert cells["gap to BP"] == "+6.52 %"
    assert cells["stage 3"] == "0.724273"
    assert cells["prefix 3"] == "0.725363"
    assert rows[0][head.index("gap to BP")] == "baseline"
    assert rows[0][head.index("stage 0")] == "-"
    assert comparison_rows({"poe": poe})[1][0][2] == "-"            # no BP, no gap
    assert comparison_rows({"bp": BP, "poe": {**poe, "bytes": 401}})[1][1][2] == "other data"
    two = {**PUBLISHED, "n_stages": 2, "bpb": {**PUBLISHED["bpb"], "stages": [.73, .72], "prefixes": [.73, .71]}}
    head, rows = comparison_rows({"poe": poe, "two": two})
    assert len({len(row) for row in [head, *rows]}) == 1
    assert rows[1][head.index("stage 2")] == "-"
    for cell in ("+6.52 %", "0.720935", "baseline"):
        assert cell in comparison_markdown({"bp": BP, "poe": poe})
        assert cell in text_of(comparison_table({"bp": BP, "poe": poe}))


def test_phases_follow_the_schedule() -> None:
    assert phases_of(SCHEDULE) == [Phase(0, "warm-up", 0, 10), Phase(0, "hold", 10, 35), Phase(0, "warm-down", 35, 100),
                                   Phase(1, "warm-down", 100, 140)]


def test_load_run_reads_what_is_there(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", 4, evaluation=PUBLISHED))
    assert (run.name, len(run.train), len(run.evals), run.n_stages) == ("run", 140, 2, 4)
    assert run.evaluation is not None
    assert run.evaluation["step"] == 100
    (tmp_path / "run" / "evaluation").mkdir()
    (tmp_path / "run" / "evaluation" / "step_00000140.json").write_text(json.dumps({**PUBLISHED, "step": 140}))
    assert load_run(tmp_path / "run").evaluation["step"] == 140     # type: ignore[index]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')                         # a run that is still writing
    assert len(load_run(tmp_path / "run").train) == 140


def test_bad_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither"):
        load_run(tmp_path)
    folder = write_run(tmp_path / "run", 1)
    whole = (folder / "metrics.jsonl").read_text()
    for line in ("broken", "3", "[]"):
        (folder / "metrics.jsonl").write_text(f"{whole}{line}\n")
        with pytest.raises(DataError, match="line 143 is not a JSON object"):
            load_run(folder)
    other = write_run(tmp_path / "other", 1)
    (other / "evaluation").mkdir()
    for broken in ({}, {"bpb": {"full": 1.0}}, []):
        (other / "evaluation" / "step_00000001.json").write_text(json.dumps(broken))
        with pytest.raises(DataError, match="not an evaluation"):
            load_run(other)


def story(folder: Path, stages: int, evaluation: dict[str, Any], phases: bool = True) -> RunStory:
    run = load_run(write_run(folder, stages, evaluation=evaluation))
    return RunStory(run.name, run.path, run.train, run.evals, run.evaluation, phases_of(SCHEDULE) if phases else [])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures saved while the test runs."""
    figures: list[Any] = []
    save = plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_curves_show_every_stage_the_pool_and_the_phases(tmp_path: Path, drawn: list[Any]) -> None:
    plot_curves(story(tmp_path / "poe", 4, PUBLISHED), tmp_path / "out" / "curves.png")
    plot_curves(story(tmp_path / "bp", 1, BP, phases=False), tmp_path / "out" / "bp.png")
    assert all(side > 800 for side in size_of_png(tmp_path / "out" / "curves.png"))
    poe, bp = drawn
    assert [ax.get_title(loc="left") for ax in poe.axes][1:3] == [
        "Stages and pool against the stages' mean", "Validation"]
    stages = ["stage 0", "stage 1", "stage 2", "stage 3"]
    assert [t.get_text() for t in poe.axes[0].get_legend().get_texts()] == stages
    assert [t.get_text() for t in poe.axes[1].get_legend().get_texts()] == [*stages, "pool"]
    stage, pool = poe.axes[0].lines[1].get_xdata(), poe.axes[1].lines[5].get_xdata()      # line 0: edge of the cycle
    assert len(stage) == 139
    assert 7 not in stage
    assert list(pool) == list(range(1, 140, 10))                    # and the pool joined over steps without it
    level = [float(poe.axes[1].lines[i].get_ydata()[-1]) for i in (1, 2, 3, 4)]
    assert level == pytest.approx([0.15, 0.05, -0.05, -0.15])
    assert len(poe.axes[-1].patches) == 4
    assert poe.axes[0].get_xlabel() == ""
    assert poe.axes[-1].get_xlabel() == "step"
    assert [t.get_text() for t in bp.axes[0].get_legend().get_texts()] == ["loss"]
    for ax in poe.axes[:3]:                           # a legend inside would cover a curve somewhere
        assert ax.get_legend().get_window_extent().y0 >= ax.get_window_extent().y1
    assert len(bp.axes) == 3
    assert len(bp.axes[-1].patches) == 0


def test_comparison_plot_shows_every_run(tmp_path: Path, drawn: list[Any]) -> None:
    runs = [story(tmp_path / "bp", 1, BP), story(tmp_path / "poe", 4, PUBLISHED)]
    plot_comparison(runs, tmp_path / "comparison.png")
    over_time, at_end = drawn[0].axes
    assert [t.get_text() for t in over_time.get_legend().get_texts()] == ["bp", "poe"]
    assert [t.get_text() for t in at_end.get_legend().get_texts()] == ["bp (BP)", "poe, prefix", "poe, stage alone"]
    assert list(over_time.lines[1].get_xdata()) == [512 * 50, 512 * 100]
    assert list(at_end.lines[1].get_ydata()) == PUBLISHED["bpb"]["prefixes"]


def test_a_run_without_metrics_can_be_plotted(tmp_path: Path, drawn: list[Any]) -> None:
    empty = RunStory("empty", tmp_path, [], [], None, [])
    plot_curves(empty, tmp_path / "curves.png")
    plot_comparison([empty], tmp_path / "comparison.png")
    assert size_of_png(tmp_path / "curves.png")[0] > 800
    assert len(drawn) == 2


def test_smoothing_is_symmetric() -> None:
    line = [float(v) for v in range(20)]
    assert smoothed(line, 4) == pytest.approx(line)                 # no lag on a straight line
    assert smoothed([0.0, 3.0, 0.0, 6.0], 1) == [0.0, 1.0, 3.0, 6.0]
    assert smoothed([], 3) == []
