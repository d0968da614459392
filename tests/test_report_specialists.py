"""Reports of specialists: what was trained beside its base, never the base as if it were the trained model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from nanopoe.checkpoint.cascade import open_cascade, save_delta
from nanopoe.checkpoint.evaluation import read_tools, save_tools, tools_path
from nanopoe.config import Experiment, experiment_from_dict
from nanopoe.errors import DataError
from nanopoe.model import GPT
from nanopoe.report.compare import baseline_of, meeting_table
from nanopoe.report.document import Chapter, comparison_chapter, markdown, run_chapter
from nanopoe.report.page import html
from nanopoe.report.plots.comparison import plot_comparison
from nanopoe.report.plots.curves import plot_curves
from nanopoe.report.plots.trajectory import plot_trajectory
from nanopoe.report.record import record_of
from nanopoe.report.runs import RunStory, load_run
from nanopoe.report.tables import evaluation_markdown, evaluation_rows, source_rows
from nanopoe.report.tools import tools_record as checked_tools
from nanopoe.report.write import plots_of, write_report
from tests.commands import Done
from tests.ranks import experiment_dict
from tests.reports import record, specialist_record, tools_record, write_run
from tests.rows import chat_shards, write
from tests.test_report_plots import curve, drawn, legend, overlaps  # noqa: F401
from tests.test_specialist import ALONE, specialist_dict, stage, train
from tests.test_tools import LEARNED

STEPS = (60, 100, 140)
CHAT = {"data.kind": "conversations", "data.packing": "bestfit_pad", "data.case_aug_prob": 0.0,
        "data.json_layout_prob": 0.0}


def specialist(*stages: dict[str, Any], **changes: Any) -> Experiment:
    return experiment_from_dict(specialist_dict(Path("d"), Path("out/stage"), Path("out/base"), *stages,
                                                **{**CHAT, **changes}), "test")


def sft(**changes: Any) -> Experiment:
    return experiment_from_dict(experiment_dict(Path("d"), Path("out/sft"), **{
        **CHAT, "task": "sft", "init_from": {"path": "some/where/base", "step": 400}, **changes}), "test")


def story(folder: Path, *records: dict[str, Any], stages: int = 1, experiment: Experiment | None = None,
          **changes: Any) -> RunStory:
    return load_run(write_run(folder, stages, evals=records, records=records, **changes), experiment)


def of_steps(**changes: Any) -> list[dict[str, Any]]:
    return [specialist_record(step, **changes) for step in STEPS]


def section(chapter: Chapter, title: str) -> Any:
    return next(s for s in chapter.sections if s.title == title)


# -- one evaluation ---------------------------------------------------------------------------------------------------

def test_an_evaluation_shows_the_specialist_against_its_base() -> None:
    result = specialist_record(100, 3, below=1, sources=("a", "b"))
    base, own = result["bpb"]["full"], result["specialists"]["bpb"]
    head, rows = evaluation_rows(result)
    assert head[2] == "against base"
    assert [row[0] for row in rows] == ["specialist", "dual", "base", "specialist 0"]
    assert [row[1] for row in rows] == [f"{v:.6f}" for v in (own["specialist"][1], own["dual"][1], base,
                                                             own["specialist"][0])]
    assert rows[0][2] == f"{own['specialist'][1] - base:+.6f}" and rows[2][2] == ""
    text = evaluation_markdown(result)
    assert "crossover" not in text and "alpha" not in text and "stage 0" not in text and "| b |" in text
    assert "3 conversations without their front" in text
    plain = evaluation_markdown(record(100, 3))
    assert "crossover" in plain and "alpha" in plain and "stage 0" in plain and "front" not in plain      # control


def test_sources_have_what_was_trained_and_its_base() -> None:
    head, rows = source_rows(record_of(specialist_record(100, sources=("a", "b")), Path("x")))
    cells = dict(zip(head, rows[1], strict=True))
    found = specialist_record(100, sources=("a", "b"))["sources"]["b"]
    assert cells["source"] == "b" and cells["lost their front"] == "1"
    for view, score in (("specialist", found), ("dual", found["dual"]), ("base", found["base"])):
        assert cells[view] == f"{score['bpb']:.6f}" and cells[f"accuracy, {view}"] == f"{100 * score['accuracy']:.2f} %"
    assert cells["against base"] == f"{found['bpb'] - found['base']['bpb']:+.6f}"
    plain = {"bpb": 0.5, "accuracy": 0.4, "targets": 1, "bytes": 4, "tokens": 9, "truncated": 0, "base": None,
             "dual": None}
    head, rows = source_rows(record_of({**record(100), "sources": {"a": plain}}, Path("x")))
    assert head[:3] == ["source", "full", "accuracy, full"] and rows == [["a", "0.500000", "40.00 %", "1", "4", "0"]]
    assert source_rows(record_of(record(100), Path("x")))[1] == []


def test_lists_of_specialists_have_one_length() -> None:
    result = specialist_record(100, below=1)
    result["specialists"]["bpb"]["dual"] = [0.5]
    with pytest.raises(DataError, match=r"specialists\.bpb\.dual holds 1 values, 2 are needed"):
        record_of(result, Path("x"))


# -- a run ------------------------------------------------------------------------------------------------------------

def test_a_chapter_says_what_was_trained(tmp_path: Path) -> None:
    """The header names task, base and sizes; the base's own stages stand apart, and nothing offers their modes."""
    one = experiment_dict(Path("d"), Path("r"))["schedule"]["cycles"][:1]          # of several, tables have a column
    experiment = specialist(**{"schedule.cycles": one})
    run = story(tmp_path / "stage", *of_steps(sources=("a", "b")), experiment=experiment)
    model = GPT(experiment.model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    chapter = run_chapter(run, {})
    assert chapter.text.startswith(f"Specialist of 2 new layers on base: {trained:,} of {whole:,} parameters are "
                                   "trained, the base is frozen. Of the base: Product of Experts, stages of 2, 2")
    assert trained < whole and "out/" not in chapter.text
    assert [s.title for s in chapter.sections] == ["Trajectory", "Training", "Probes", "Data", "Schedule",
                                                   "Configuration"]
    bpb, accuracy, base, source, by_source = section(chapter, "Trajectory").tables
    assert bpb.head == ["step", "specialist", "dual", "base", "against base"] and accuracy.head == bpb.head[:4]
    for row, r in zip(bpb.rows, run.records, strict=True):
        assert row[:2] == [str(r.step), f"{r.views['specialist'].bpb:.6f}"] and row[3] == f"{r.bpb.full:.6f}"
    assert len({row[3] for row in bpb.rows}) == 1 < len({row[1] for row in bpb.rows})
    assert base.title == "The frozen base alone" and base.folded and base.rows[0][0] == "stage 0"
    assert source.title == "By source, step 140" and [row[0] for row in source.rows] == ["a", "b"]
    assert by_source.head == ["step", "a", "b"] and len(by_source.rows) == 3
    assert not any("stage" in " ".join(t.head) for t in (bpb, accuracy, source))
    own = run.records[-1].trained
    assert chapter.figures[0][:2] == ("bits per byte", f"{own.bpb:.4f}")
    assert chapter.figures[2][:2] == ("against its base", f"{own.bpb - run.records[-1].bpb.full:+.4f}")
    probes, *over = section(chapter, "Probes").tables
    assert probes.head == ["prompt", "specialist", "dual", "base"] and "a user's turn" in probes.note
    assert over[0].head[1] == "the specialist goes on" and len(over[0].rows) == 3
    last = section(chapter, "Schedule").tables[0].rows[0][-1]
    assert last == "-"                                              # 60 is beyond the tiny schedule


CHAIN = specialist(stage(), stage(1, 0), **{"specialist.warm_start": False})


@pytest.mark.parametrize(("experiment", "words"), [
    (CHAIN, "Specialist of 1 new layer on base: "), (CHAIN, "the base and the specialist on it are frozen"),
    (sft(), "Full fine-tuning (SFT) of base, step 400: all is trained. Product of Experts, stages of 2, 2 layers"),
    (None, "A specialist on a frozen base. Newest evaluated step: 140.")])
def test_headers_of_every_task(tmp_path: Path, experiment: Experiment | None, words: str) -> None:
    records = of_steps() if experiment is None or experiment.specialist else [record(s, 2) for s in STEPS]
    text = run_chapter(story(tmp_path / "run", *records, experiment=experiment), {}).text
    assert words in text
    plain = run_chapter(story(tmp_path / "plain", record(100, 2)), {}).text
    assert "pecialist" not in plain and "SFT" not in plain                                       # control


def test_curves_show_the_specialist_against_a_constant_base(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    run = story(tmp_path / "stage", *of_steps(sources=("a", "b")), experiment=specialist())
    assert plot_trajectory(run, tmp_path / "x.png") and plot_curves(run, tmp_path / "y.png")
    scores, accuracy, source = drawn[0].axes
    evals = drawn[1].axes[1]
    assert [ax.get_title(loc="left") for ax in drawn[0].axes] == ["Bits per byte", "Accuracy", "By source"]
    for ax in (scores, evals):
        assert legend(ax) == ["specialist", "dual", "base"]
        assert curve(ax, "specialist") == (list(STEPS), [r.trained.bpb for r in run.records])
        assert curve(ax, "dual")[1] == [r.views["dual"].bpb for r in run.records]
        assert curve(ax, "base")[1] == [run.records[0].bpb.full] * 3
    assert curve(accuracy, "specialist")[1] == [r.trained.accuracy for r in run.records]
    assert legend(drawn[1].axes[0]) == ["loss"] and len(drawn[1].axes) == 3                      # no curves of stages
    assert legend(source) == ["a", "b", "its base"]
    assert curve(source, "b")[1] == [r.sources["b"].bpb for r in run.records]                    # type: ignore[index]
    plot_trajectory(story(tmp_path / "poe", *[record(s, 2) for s in STEPS]), tmp_path / "x.png")
    assert "stage 0" in legend(drawn[2].axes[0]) and "specialist" not in legend(drawn[2].axes[0])     # control


def test_no_text_lies_on_another(tmp_path: Path, drawn: list[Figure]) -> None:  # noqa: F811
    sources = tuple(f"a_source_with_a_long_name_{i}" for i in range(5))
    run = story(tmp_path / "a_run_with_a_rather_long_name", *of_steps(sources=sources, below=2), stages=1)
    made = [kind for kind, plot in plots_of(run).items() if plot(run, tmp_path / "x.png")]
    assert made == ["trajectory", "curves"]
    other = story(tmp_path / "another_run_with_a_rather_long_name", *[record(s, 2) for s in STEPS], stages=2)
    assert plot_comparison([run, other], tmp_path / "y.png")
    assert [overlaps(figure) for figure in drawn] == [[], [], []]


# -- several ----------------------------------------------------------------------------------------------------------

def test_specialists_are_compared_with_full_fine_tuning_and_their_base(tmp_path: Path,
                                                                      drawn: list[Figure]) -> None:  # noqa: F811
    """The baseline is what was trained whole on the same text, also beside a BP model that was evaluated on other text;
    a specialist on a BP base is none. Steps of conversations meet though their targets differ."""
    text = story(tmp_path / "text", *[record(s, poe=False, bytes=9) for s in STEPS])
    whole = story(tmp_path / "sft", *[record(s, 2, level=1.5) for s in STEPS], stages=2, experiment=sft(),
                  tokens_per_step=500)
    tool = story(tmp_path / "tool", *of_steps(poe=False), experiment=specialist(), tokens_per_step=511)
    runs = [text, tool, whole]
    assert baseline_of(runs) is whole and baseline_of([text, whole]) is text                     # control
    chapter = comparison_chapter(runs, [])
    newest, met = chapter.sections[0].tables
    cells = {row[0]: dict(zip(newest.head, row, strict=True)) for row in newest.rows}
    own, base = tool.records[-1].trained.bpb, tool.records[-1].bpb.full
    ours = whole.records[-1].bpb.full
    assert (cells["tool"]["full"], cells["tool"]["base"]) == (f"{own:.6f}", f"{base:.6f}")
    assert cells["tool"]["gap to sft"] == f"{100 * (own / ours - 1):+.2f} %"
    assert (cells["sft"]["gap to sft"], cells["text"]["gap to sft"]) == ("baseline", "other data")
    assert (cells["tool"]["stage 0"], cells["tool"]["diversity"], cells["sft"]["base"]) == ("-", "-", "-")
    assert cells["sft"]["stage 0"] != "-" and "The gap is to sft." in newest.note
    assert [row[0] for row in met.rows] == ["60", "100", "140"] and met.rows[2][-2] == f"{own:.6f}"
    unknown = [load_run(tmp_path / run.name) for run in (tool, whole)]
    assert meeting_table(unknown) is None                                                        # control: by tokens
    assert plot_comparison(runs, tmp_path / "x.png")
    over, gaps, depths = drawn[0].axes
    assert legend(over) == ["text", "tool", "tool, its base", "sft"]
    assert curve(over, "tool")[1] == [r.trained.bpb for r in tool.records]
    assert curve(over, "tool, its base")[1] == [base] * 3
    assert curve(gaps, "tool")[1][-1] == pytest.approx(own / ours - 1)
    assert "tool (specialist)" in legend(depths) and not any("tool, " in name for name in legend(depths))


# -- tool calls -------------------------------------------------------------------------------------------------------

def test_tool_records_replace_their_like(tmp_path: Path) -> None:
    path = save_tools(tmp_path, tools_record(8, parse=1))
    assert path == tools_path(tmp_path, 8) == tmp_path / "evaluation" / "tools_step_00000008.jsonl"
    save_tools(tmp_path, tools_record(8, constrained=True))
    save_tools(tmp_path, tools_record(8, parse=2))
    assert [(r["request"]["constrained"], r["tools"]["all"]["parse"]["n"]) for r in read_tools(path)] == [
        (True, 18), (False, 4)]
    save_tools(tmp_path, tools_record(8, "e" * 64))                 # the step was trained anew
    assert len(read_tools(path)) == 1
    base = tools_record(8)
    base["request"] |= {"checkpoint": "e" * 64, "view": "base"}
    save_tools(tmp_path, base)                                      # another way of asking stands beside it
    assert [checked_tools(r, path).title for r in read_tools(path)] == ["Step 8", "Step 8, base"]
    path.write_text("{torn\n")
    with pytest.raises(DataError, match="not an evaluation of tool calls"):
        save_tools(tmp_path, tools_record(8))
    broken = tools_record(8)
    broken["tools"]["all"]["parse"]["n"] = -1
    path.write_text(json.dumps(broken) + "\n")
    with pytest.raises(DataError, match=r"tools.all.parse.n: .*greater than or equal to 0"):
        load_run(tmp_path)


def test_reports_show_tool_calls_by_layout(tmp_path: Path) -> None:
    path = write_run(tmp_path / "stage", 1, 0, records=of_steps())
    assert "Tool calls" not in markdown([run_chapter(load_run(path), {})])                       # control
    for one in (tools_record(100, parse=3), tools_record(140), tools_record(140, constrained=True)):
        save_tools(path, one)
    run = load_run(path)
    plain, bound, steps = section(run_chapter(run, {}), "Tool calls").tables
    assert (plain.title, bound.title) == ("Step 140", "Step 140, constrained")
    assert plain.head == ["", "of", "one", "compact", "all"]
    assert plain.rows[0] == ["parse", "replies that open a call", "9/10 90.0 %", "9/10 90.0 %", "18/20 90.0 %"]
    assert plain.rows[2][2:] == ["0/0 -"] * 3
    assert "12 conversations with tools of chats: 24 prompts, 2 too long" in plain.note
    assert "exact 1/4 25.0 %" in plain.note
    assert "5 opened, 1 cut" in bound.note and "opened" not in plain.note
    assert [row[:2] for row in steps.rows] == [["100", "6/20 30.0 %"], ["140", "18/20 90.0 %"],
                                               ["140, constrained", "18/20 90.0 %"]]
    chapters = [run_chapter(run, {})]
    assert "18/20 90.0 %" in html(chapters, {}) and "18/20 90.0 %" in markdown(chapters)


# -- from the training to the page ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stage/, a specialist on base/; tools/val has conversations with a tool."""
    folder = tmp_path_factory.mktemp("stages")
    chat_shards(folder / "chat")
    texts = [json.dumps(one.model_dump(exclude_none=True)) for one in LEARNED]
    write(folder / "tools", [[texts]], column="conversation")
    last = {"checkpoint.every": None, "evaluation.every": None}
    train(ALONE, experiment_dict(data, folder / "base", **last))
    sources = {f"data.{split}": [{"name": "chats", "path": str(folder / "chat" / split)}] for split in ("train", "val")}
    train(ALONE, specialist_dict(data, folder / "stage", folder / "base",
                                 **{**CHAT, **sources, **last, "evaluation.every": 4}))
    return folder


def test_a_specialist_from_training_to_the_page(trained: Path, command: Callable[..., Done]) -> None:
    run, options = trained / "stage", ("--data", trained / "tools", "--tokens", "4", "--layouts", "compact")
    assert command("evaluate", run, "--no-speed").code == 0
    done = command("evaluate_tools", run, *options, "--no-save")
    assert done.code == 0 and not tools_path(run, 8).exists() and "saved" not in done.out + done.err
    done = command("evaluate_tools", run, *options)
    assert done.code == 0 and f"saved in {tools_path(run, 8)}" in done.out, done
    done = command("evaluate_tools", run, *options, "--json")
    (kept,) = read_tools(tools_path(run, 8))
    assert json.loads(done.out) == kept and kept["step"] == 8       # the same request: replaced
    done = command("report", run)
    assert done.code == 0 and "base" in done.out.splitlines()[2], done
    text, page = ((run / "report" / f"report.{kind}").read_text() for kind in ("md", "html"))
    found = json.loads((run / "evaluation" / "step_00000008.json").read_text())
    own, base = found["specialists"]["bpb"]["specialist"][0], found["bpb"]["full"]
    assert own < base
    for said in (f"{own:.6f}", f"{base:.6f}", "Specialist of 2 new layers on base", "The frozen base alone",
                 "By source, step 8", "Tool calls", "references with calls"):
        assert said in text and said in page, said
    for said in ("Adaptive depth", "Alpha sweep", "Routing", "crossover"):
        assert said not in text and said not in page, said
    story = load_run(run)
    assert write_report([story], run / "again")[2:] == ["trajectory.png", "curves.png"]
    assert plots_of(load_run(trained / "base")).keys() > plots_of(story).keys()                  # control


def test_tool_calls_of_a_delta_are_told_and_not_kept(trained: Path, command: Callable[..., Done],
                                                     tmp_path: Path) -> None:
    delta = tmp_path / "delta"
    save_delta(open_cascade(trained / "stage"), delta)
    before = sorted(p.name for p in delta.iterdir())
    done = command("evaluate_tools", delta, "--data", trained / "tools", "--tokens", "4", "--layouts", "one")
    assert done.code == 0 and "is a delta, its run keeps evaluations" in done.err, done
    assert sorted(p.name for p in delta.iterdir()) == before
