"""Tables say what the evaluations say, a run's folder is read as it is, and what is damaged is named."""

from __future__ import annotations

import copy
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from nanopoe.checkpoint.evaluation import parse_steps
from nanopoe.config.schema import CycleConfig, ScheduleConfig
from nanopoe.errors import ConfigError, DataError
from nanopoe.report.cells import Table
from nanopoe.report.compare import baseline_of, meeting_table, meetings
from nanopoe.report.record import record_of
from nanopoe.report.runs import Phase, choose, load_run, phases_of
from nanopoe.report.tables import (
    comparison_rows,
    comparison_table,
    evaluation_markdown,
    evaluation_rows,
    evaluation_table,
    markdown_table,
)
from nanopoe.report.trajectory import (
    alpha_tables,
    depth_tables,
    measured_tables,
    probe_tables,
    routing_tables,
    score_tables,
)
from tests.reports import LEAD_MAX, LEAD_P99, MAX, P99, calibration, measured, record, write_run

# SPEC 7, the published rows, a field for each column; SPEC 11, the integers of speculative decoding
PUBLISHED = """
83923 | .724738 | .727740 .725798 .725063 .724273 | .726103 .725363 | .4844 .4856 .4859 .4862 .4860 | 3.9429 2.0193 1.4479 | .791984 .980340 1.298269 1.778352 | +.000465 | .9852 3.83 1.61 | .8505 1.715 .9746 | .772893
86000 | .822195 | .825607 .823068 .822524 .821900 | .823529 .822770 | .4405 .4419 .4422 .4424 .4420 | 3.9832 2.0023 1.4030 | .899830 1.114882 1.477344 2.024439 | +.000295 | .9402 3.67 1.53 | .7105 1.534 .9685 | .875501
96000 | .827363 | .830721 .828278 .827653 .826947 | .828749 .827980 | .4391 .4400 .4405 .4409 .4404 | 3.6387 1.8206 1.3109 | .901554 1.114122 1.474327 2.018869 | +.000416 | .9853 3.94 1.59 | .7051 1.526 .9683 | .878945
"""  # noqa: E501
DRAFTED = {83923: (87, 333, 338), 86000: (90, 330, 351), 96000: (85, 335, 340)}
BP = record(100, poe=False)
SCHEDULE = ScheduleConfig(cycles=(
    CycleConfig(steps=100, warmup_steps=10, warmdown_ratio=0.65, peak=1.0, final_frac=0.05, momentum_warmup_steps=0),
    CycleConfig(steps=40, warmup_steps=0, warmdown_ratio=1.0, peak=0.5, final_frac=0.0, momentum_warmup_steps=0)))


def published() -> list[dict[str, Any]]:
    """The published rows as records; what they do not say is made up."""
    found = []
    for line in PUBLISHED.strip().splitlines():
        fields = [[float(v) for v in part.split()] for part in line.split("|")]
        (step,), (full,), stages, inner, hits, bounds, alphas, (gap,), (_, _, speed), routing, (log,) = fields
        one = record(int(step), 4)
        own = calibration(int(step), 4)
        own |= {P99: bounds, "routing": own["routing"] | dict(zip(
            ("routed", "projected_speedup", "agreement"), routing, strict=True))}
        ran = measured(int(step), 4)
        ran["speculative_auto"] = None
        ran["speculative"] |= {**dict(zip(("rounds", "accepted", "drafted"), DRAFTED[int(step)], strict=True)),
                               "measured_speedup": speed}
        found.append(one | {
            "bpb": {"full": full, "stages": stages, "prefixes": [stages[0], *inner, full], "renormalise_false": log,
                    "alpha": dict(zip(("0", "0.25", "0.5", "0.75", "1"), [full, *alphas], strict=True))},
            "accuracy": {"full": hits[4], "stages": hits[:4], "prefixes": hits[1:]}, "crossover_gap": gap,
            "tokens": 1048576, "calibration": own, "modes": ran})
    return found


def text_of(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(renderable)
    return console.file.getvalue()                                  # type: ignore[attr-defined]


# -- one evaluation -----------------------------------------------------------------------------------------------

def test_evaluation_shows_every_view() -> None:
    _, rows = evaluation_rows(published()[0])
    stages, prefixes = [f"stage {k}" for k in range(4)], [f"prefix {n}" for n in range(1, 5)]
    assert [row[0] for row in rows] == ["full pool", *stages, *prefixes]
    assert rows[1] == ["stage 0", "0.727740", "+0.003002", "48.44 %"]
    assert rows[4][2] == "-0.000465"
    assert rows[6] == ["prefix 2", "0.726103", "+0.001365", "48.59 %"]
    assert [row[0] for row in evaluation_rows(BP)[1]] == ["full"]


def test_both_media_show_the_same_cells() -> None:
    probes = [{"prompt": "The x is", "answers": {"full": "a | <b>\n*c* &lt; $d$", "stage:0": "[bold]d"}}]
    result = {**published()[0], "probes": probes}
    on_screen, markdown = text_of(evaluation_table(result)), evaluation_markdown(result)
    for cell in ("0.724738", "48.62 %", "+0.000465", "alpha 0.25", "1.778352", "1,048,576 tokens", "stage:0",
                 "3.9429 2.0193 1.4479", "wand lead p99", "measured 1.61x",
                 "98.52 % of drafts accepted", "85.05 % routed"):
        assert cell in " ".join(on_screen.split()), cell
        assert cell in markdown, cell
    assert "[bold]d" in on_screen                                   # a model's text is not read as markup
    row = next(line for line in markdown.splitlines() if line.startswith("| The x"))
    assert row == "| The x is | full | a \\| &lt;b&gt; \\*c\\* &amp;lt; \\$d\\$ |"      # stays one row of three cells
    assert "Probes" not in evaluation_markdown({**result, "probes": []})
    old = {key: value for key, value in result.items() if key not in ("calibration", "modes")}
    assert "wand max" in on_screen and "wand" not in text_of(evaluation_table(old))


# -- several ------------------------------------------------------------------------------------------------------

def test_comparison_tells_the_gap_to_bp() -> None:
    bp = {**BP, "bpb": {**BP["bpb"], "full": .676788}}
    poe = {**published()[0], "bpb": {**published()[0]["bpb"], "full": .720935}}
    head, rows = compared(bp=bp, poe=poe)
    cells = dict(zip(head, rows[1], strict=True))
    assert cells["gap to BP"] == "+6.52 %"                          # SPEC 11
    assert cells["stage 3"] == "0.724273"
    assert cells["prefix 3"] == "0.725363"
    assert rows[0][head.index("gap to BP")] == "baseline"
    assert rows[0][head.index("stage 0")] == "-"
    assert compared(poe=poe)[1][0][2] == "-"                        # no BP, no gap
    assert compared(bp=bp, poe={**poe, "bytes": 401})[1][1][2] == "other data"
    two = record(100, 2)
    head, rows = compared(poe=poe, two=two)
    assert len({len(row) for row in [head, *rows]}) == 1
    assert rows[1][head.index("stage 2")] == "-"
    for cell in ("+6.52 %", "0.720935", "baseline"):
        assert cell in text_of(comparison_table({"bp": record_of(bp, Path("x")), "poe": record_of(poe, Path("x"))}))


def compared(**results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    return comparison_rows({name: record_of(result, Path("x")) for name, result in results.items()})


def test_runs_meet_after_the_same_tokens(tmp_path: Path) -> None:
    """A run with twice the batch meets the other at half the steps; without metrics, at the same steps."""
    bp = load_run(write_run(tmp_path / "bp", 1, 400, records=[record(s, poe=False) for s in (100, 200, 400)]))
    big = load_run(write_run(tmp_path / "big", 3, 200, tokens_per_step=1024,
                             records=[record(s, 3, level=1.1) for s in (50, 150, 200)]))
    bare = load_run(write_run(tmp_path / "bare", 2, 0, records=[record(s, 2, level=1.1) for s in (200, 300)]))
    assert baseline_of([big, bp]) is bp
    assert [(m.baseline.step, m.other.step, m.tokens) for m in meetings(bp, big)] == [
        (100, 50, 51200), (400, 200, 204800)]
    assert [(m.baseline.step, m.other.step) for m in meetings(bp, bare)] == [(200, 200)]
    table = meeting_table([big, bp, bare])
    assert table is not None
    assert table.head == ["step", "tokens", "bp", "big", "gap", "bare", "gap"]
    assert [row[:2] for row in table.rows] == [["100", "51,200"], ["200", "102,400"], ["400", "204,800"]]
    full, ours = bp.records[2].bpb.full, big.records[2].bpb.full
    assert table.rows[2][2:] == [f"{full:.6f}", f"{ours:.6f}", f"{100 * (ours / full - 1):+.2f} %", "-", "-"]
    other = load_run(write_run(tmp_path / "other", 2, 0, records=[record(200, 2, bytes=9)]))
    assert meetings(bp, other) == [] and meeting_table([bp, other]) is None       # other bytes do not compare


# -- a trajectory -------------------------------------------------------------------------------------------------

def columns(tables: list[Table], row: int) -> dict[str, str]:
    """Cells of a row by "table: column"."""
    return {f"{t.title}: {name}": cell for t in tables for name, cell in zip(t.head, t.rows[row], strict=True)}


def test_the_published_rows_come_out_as_published(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", 4, 0, records=published()))
    tables = [t for make in (score_tables, alpha_tables, depth_tables, routing_tables, measured_tables)
              for t in make(run.records) if "measured" not in t.title]
    depth, routing, drafts = "Adaptive depth, p99 bounds", "Routing as calibrated", "Speculative decoding"
    order = [
        ["Bits per byte: step"], ["Bits per byte: full"], [f"Bits per byte: stage {k}" for k in range(4)],
        [f"Bits per byte: prefix {n}" for n in (2, 3)], [*(f"Accuracy: stage {k}" for k in range(4)), "Accuracy: full"],
        [f"{depth}: bound {k} to {k + 1}" for k in range(3)],
        [f"Bits per byte by alpha: alpha {a}" for a in ("0.25", "0.5", "0.75", "1")], ["Bits per byte: gap"],
        [f"{drafts}: acceptance", f"{drafts}: mean accepted", f"{drafts}: measured speed-up"],
        [f"{routing}: routed", f"{routing}: projected speed-up", f"{routing}: agreement"],
        ["Bits per byte: train-log bpb"]]
    lines = []
    for row in range(3):
        cells = columns(tables, row)
        lines.append(" | ".join(" ".join(cells[name].rstrip("x") for name in names) for names in order))
    assert re.sub(r"(?<!\d)0\.", ".", "\n".join(lines)) == PUBLISHED.strip()      # published without leading zeros


def test_stages_of_different_number_share_a_table() -> None:
    records = [record_of(r, Path("x")) for r in (record(100, 2), record(200, 12), record(300, poe=False))]
    for make in (score_tables, alpha_tables, depth_tables, routing_tables, measured_tables, probe_tables):
        for table in make(records):
            assert {len(row) for row in table.rows} == {len(table.head)}, table.title
    bpb = next(iter(score_tables(records)))
    assert bpb.rows[0][bpb.head.index("stage 2")] == bpb.rows[0][bpb.head.index("prefix 2")] == "-"
    assert "-" not in bpb.rows[1]
    only_bp = [record_of(BP, Path("x"))]
    assert [t.title for t in score_tables(only_bp)] == ["Bits per byte", "Accuracy"]
    for make in (alpha_tables, depth_tables, routing_tables, measured_tables):
        assert list(make(only_bp)) == []


def test_what_was_not_measured_is_a_dash() -> None:
    ran = measured(100, 4)
    ran["speculative"] |= {"measured_speedup": None, "tokens_per_s": None, "rounds": 0, "drafted": 0, "accepted": 0}
    ran["wand_max"] = ran["wand_lead"] = ran["wand_lead_p99"] = None
    tables = list(measured_tables([record_of({**record(100), "modes": ran}, Path("x"))]))
    cells = columns(tables[:1], 0)
    for name in ("acceptance", "mean accepted", "measured speed-up", "tokens/s"):
        assert cells[f"Speculative decoding: {name}"] == "-"
    assert cells["Speculative decoding: predicted speed-up"] == "1.90x"
    assert [row[1] for row in tables[0].rows] == ["4", "auto"]
    assert [row[1] for row in tables[1].rows] == ["wand p99", "routed"]


def test_probes_side_by_side_and_over_steps() -> None:
    newest, *over = probe_tables([record_of(record(s, 2), Path("x")) for s in (100, 200, 300, 500, 600)])
    assert newest.head == ["prompt", "full", "stage 0", "stage 1"]
    assert newest.rows[0] == ["The capital of France is", " full says 2", " stage:0 says 2", " stage:1 says 2"]
    assert [t.title for t in over] == [row[0] for row in newest.rows]
    assert over[0].rows == [["100", " full says 0"], ["300", " full says 1"], ["600", " full says 2"]]
    assert "\n" not in markdown_table(["a"], [["x\ny"]]).splitlines()[-1]


# -- what is read -------------------------------------------------------------------------------------------------

def test_load_run_reads_what_is_there(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run", 4, evals=[record(50), record(100)]))
    assert (run.name, len(run.train), len(run.evals), run.n_stages) == ("run", 140, 2, 4)
    assert run.newest is not None
    assert run.newest.step == 100
    assert run.tokens[100] == 51200
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')                         # a run that is still writing
    assert len(load_run(tmp_path / "run").train) == 140


def test_the_trajectory_is_every_comparable_step(tmp_path: Path) -> None:
    """Evaluations of training count where no record is and the bytes are those of the records."""
    evals = [record(50, level=1.3), record(100, level=1.3)]
    alone = load_run(write_run(tmp_path / "alone", 4, evals=evals))
    assert [r.step for r in alone.records] == [50, 100]
    both = load_run(write_run(tmp_path / "both", 4, evals=evals, records=[record(100), record(140)]))
    assert [r.step for r in both.records] == [50, 100, 140]
    assert both.records[1].bpb.full == record(100)["bpb"]["full"]   # the record, not training's evaluation
    assert both.records[0].bpb.full == evals[0]["bpb"]["full"]
    more = load_run(write_run(tmp_path / "more", 4, evals=evals, records=[record(140, bytes=7)]))
    assert [r.step for r in more.records] == [140]
    assert len(more.evals) == 2


def test_steps_are_chosen(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / str(i), 4, 0, records=[record(s) for s in steps]))
            for i, steps in enumerate(((100, 200, 300), (300, 400)))]
    picked = choose(runs, parse_steps("100, 250-400"))
    assert [[r.step for r in run.records] for run in picked] == [[100, 300], [300, 400]]
    assert [run.newest.step for run in picked if run.newest] == [300, 400]
    for text in ("", "a", "1-", "5-2", "1,,2", "-3", "1-2-3", "1.5"):
        with pytest.raises(ConfigError, match="expected steps such as 100,200-600"):
            parse_steps(text)
    with pytest.raises(ConfigError, match="step 150 was not evaluated; evaluated: 100, 200, 300, 400"):
        choose(runs, parse_steps("100,150"))
    with pytest.raises(ConfigError, match="steps 500 to 900 were not evaluated"):
        choose(runs, parse_steps("500-900"))


def test_phases_follow_the_schedule() -> None:
    assert phases_of(SCHEDULE) == [Phase(0, "warm-up", 0, 10), Phase(0, "hold", 10, 35), Phase(0, "warm-down", 35, 100),
                                   Phase(1, "warm-down", 100, 140)]


# -- what is refused ----------------------------------------------------------------------------------------------

def test_bad_metrics_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither"):
        load_run(tmp_path)
    folder = write_run(tmp_path / "run", 1)
    whole = (folder / "metrics.jsonl").read_text()
    for line in ("broken", "3", "[]", "[" * 100_000):
        (folder / "metrics.jsonl").write_text(f"{whole}{line}\n")
        with pytest.raises(DataError, match="line 141 is not a JSON object"):
            load_run(folder)
    for bad in ('{"kind": "train"}', '{"kind": "train", "step": 9, "stage_loss": "x"}',
                '{"kind": "event", "event": "data", "step": 1, "sources": 3}'):
        (folder / "metrics.jsonl").write_text(f"{whole}{bad}\n")
        with pytest.raises(DataError, match=r"metrics.jsonl: line 141: (step|stage_loss|sources): "):
            load_run(folder)
    (folder / "metrics.jsonl").write_text(f'{whole}{{"kind": "eval", "step": 9}}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl: line 141: (poe_mode|bpb): Field required"):
        load_run(folder)


DAMAGE: dict[str, tuple[tuple[str | int, ...], Any]] = {
    "bpb.full": (("bpb", "full"), "0.7"), "bpb.stages": (("bpb", "stages"), [0.7]), "n_stages": (("n_stages",), 0),
    "bpb.alpha": (("bpb", "alpha"), {"nan": 1.0}), "accuracy.full": (("accuracy", "full"), 1.5),
    "poe_mode": (("poe_mode",), "x"), "bytes": (("bytes",), 0), "step": (("step",), -1),
    "the p99 bounds": (("calibration", P99), [1.0]), "calibration": (("calibration", MAX), None),
    "calibration.wand.p99": (("calibration", "wand", "p99"), {}),
    "max: exits": (("calibration", "wand", "max", "exits"), [1.0]),
    "the lead bounds": (("calibration", LEAD_MAX), [1.0]),
    "calibration.curves.wand.0": (("calibration", "curves", "wand", 0, "agreement"), None),
    "modes.speculative.rounds": (("modes", "speculative", "rounds"), 1.5),
    "modes: routed: exits": (("modes", "routed", "exits"), []), "probes.0": (("probes", 0, "answers"), [1]),
    "bpb.prefixes": (("bpb", "prefixes"), [0.7, 0.7, 0.7, float("nan")]),
}


@pytest.mark.parametrize("key", DAMAGE)
def test_a_damaged_record_is_named(tmp_path: Path, key: str) -> None:
    where, value = DAMAGE[key]
    broken = copy.deepcopy(record(100))
    place: Any = broken
    for part in where[:-1]:
        place = place[part]
    place[where[-1]] = value
    folder = write_run(tmp_path / "run", 4, 0, records=[record(50)])
    assert load_run(folder).records                                  # control: the other record is well
    (folder / "evaluation" / "step_00000100.json").write_text(json.dumps(broken))
    with pytest.raises(DataError, match=r"run scripts\.evaluate again, or remove the file") as caught:
        load_run(folder)
    assert caught.value.where == str(folder / "evaluation" / "step_00000100.json")
    assert key in caught.value.what


def test_other_files_are_not_records(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", 4, 0, records=[record(100)])
    path = folder / "evaluation" / "step_00000200.json"
    for text in ("", "{", "{}", "[]", "null", '{"bpb": {"full": 1.0}}'):
        path.write_text(text)
        with pytest.raises(DataError, match="not an evaluation"):
            load_run(folder)
    path.write_text(json.dumps(record(300)))
    with pytest.raises(DataError, match="is of step 300; it was renamed"):
        load_run(folder)


def test_an_old_record_lacks_what_came_later(tmp_path: Path) -> None:
    later = ("calibration", "modes", "probes", "diversity", "curves", LEAD_P99, LEAD_MAX)
    old = {key: value for key, value in record(100).items() if key not in later}
    old["calibration"] = {key: value for key, value in calibration(100, 4).items() if key not in later}
    run = load_run(write_run(tmp_path / "run", 4, 0, records=[old]))
    assert run.newest is not None and run.newest.calibration is not None
    assert run.newest.calibration.curves is None and run.newest.modes is None
    assert list(run.newest.calibration.kinds) == ["p99", "max"]
    assert [t.title for t in depth_tables(run.records)] == ["Adaptive depth, p99 bounds", "Adaptive depth, max bounds"]
    new = record_of(record(100), Path("x")).calibration              # control
    assert new is not None and list(new.kinds) == ["p99", "max", "lead_p99", "lead"]
