"""The report as files: one page that needs no network and runs nothing, the same bytes for the same run."""

from __future__ import annotations

import base64
import importlib
import json
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanopoe.config import dump_experiment, experiment_from_dict
from nanopoe.report.document import comparison_chapter, markdown, run_chapter
from nanopoe.report.page import html
from nanopoe.report.runs import RunStory, load_run
from nanopoe.report.write import write_report
from tests.ranks import experiment_dict
from tests.reports import record, write_run

EVIL = '<script>alert("1")</script>\n<img src=x onerror=alert(1)> & "quoted" | `code` $x$ \ud800'
NAME = "a&b <i>run $_"                                          # a folder may be called that


OURS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "div", "span", "b", "nav", "a", "img",
        "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre"}
INLINE = "data:image/png;base64,"


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the texts of table cells."""

    VOID = ("meta", "img", "link", "br")

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if "td" in self.open:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("data")
    return experiment_from_dict(experiment_dict(folder, folder / "run"), "test")


def evil_story(folder: Path, experiment: Any) -> RunStory:
    probes = [{"prompt": EVIL, "answers": {"full": EVIL, "stage:0": "</td></table><b>"}}]
    records = [record(s, 2) | {"probes": probes} for s in (4, 8)]
    path = write_run(folder / NAME, 2, 8, evals=records[:1], records=records)
    with open(path / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "event", "event": "data", "step": 8,
                               "sources": {"tiny": {"share": 0.987, "weight": 1.0, "epochs": 2.5}}}) + "\n")
    return load_run(path, experiment)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, experiment: Any) -> tuple[Path, Path, list[str]]:
    """A report of a run with hostile texts, written twice from two readings."""
    folder = tmp_path_factory.mktemp("report")
    first, second = folder / "first" / "deep", folder / "second"
    names = [write_report([evil_story(folder / str(i), experiment)], out) for i, out in enumerate((first, second))]
    assert names[0] == names[1]
    return first, second, names[0]


def test_the_same_run_gives_the_same_bytes(written: tuple[Path, Path, list[str]]) -> None:
    first, second, names = written
    assert names == ["report.html", "report.md", "trajectory.png", "curves.png", "depth.png", "exits.png",
                     "speed.png", "routing.png", "alpha.png"]
    assert sorted(p.name for p in first.iterdir()) == sorted(names)
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_the_page_needs_nothing_and_runs_nothing(written: tuple[Path, Path, list[str]]) -> None:
    folder, _, names = written
    page = Page((folder / "report.html").read_text("utf-8"))
    assert {tag for tag, _ in page.tags} <= OURS
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes), tag
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("src") or INLINE).startswith(INLINE)
    text = (folder / "report.html").read_text("utf-8")
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    anchors = {a["id"] for _, a in page.tags if "id" in a}
    assert {a["href"][1:] for tag, a in page.tags if tag == "a"} <= anchors       # type: ignore[index]
    images = [base64.b64decode((a["src"] or "").split(",")[1]) for tag, a in page.tags if tag == "img"]
    assert sorted(images) == sorted((folder / name).read_bytes() for name in names if name.endswith(".png"))


def test_texts_arrive_as_they_are(written: tuple[Path, Path, list[str]]) -> None:
    folder, _, _ = written
    page = Page((folder / "report.html").read_text("utf-8"))
    said = EVIL.replace("\ud800", "?")                              # what no file can hold
    assert page.cells.count(said) == 3                              # prompt, by view, over the steps
    assert "</td></table><b>" in page.cells
    assert NAME in page.texts
    text = (folder / "report.md").read_text("utf-8")
    assert "<script" not in text and "<i>" not in text and "&lt;script&gt;" in text
    row = next(line for line in text.splitlines() if line.startswith("| &lt;script"))
    assert row.replace("\\|", "").count("|") == 4                   # three cells, whatever is in them
    assert text.startswith("# a&amp;b &lt;i&gt;run \\$\\_\n")


def test_the_escape_check_sees_what_is_not_escaped() -> None:
    assert ("script", {}) in Page("<td><script></script></td>").tags
    with pytest.raises(AssertionError):
        Page("<table><td></table>")


def test_both_media_say_the_same(written: tuple[Path, Path, list[str]]) -> None:
    folder, _, _ = written
    page = Page((folder / "report.html").read_text("utf-8"))
    text = (folder / "report.md").read_text("utf-8")
    in_markdown = sum(1 for line in text.splitlines() if line.startswith("| ") and "---" not in line)
    figures = sum(tag == "div" and not attributes for tag, attributes in page.tags)
    heads = [tag for tag, _ in page.tags].count("thead")
    rows = [tag for tag, _ in page.tags].count("tr")
    assert figures >= 6
    assert in_markdown == rows + figures + 1                        # the figures are a table with a head there
    assert heads >= 12
    for cell in ("98.70 %", "2.50", "0 to 5", "5 to 8"):            # mixture and cycles
        assert cell in page.cells, cell
        assert cell in text, cell


def test_the_configuration_is_that_of_the_checkpoint(tmp_path: Path, experiment: Any) -> None:
    run = load_run(write_run(tmp_path / "run", 2, 3, records=[record(3, 2)]), experiment)
    code = next(s.code for s in run_chapter(run, {}).sections if s.title == "Configuration")
    assert yaml.safe_load(code) == dump_experiment(experiment)
    training = next(s.text for s in run_chapter(run, {}).sections if s.title == "Training")
    assert training == "Step 3 of 8 (not finished), 1,536 tokens."
    done = load_run(write_run(tmp_path / "done", 2, 8), experiment)
    assert next(s.text for s in run_chapter(done, {}).sections if s.title == "Training") == "Step 8 of 8, 4,096 tokens."


# -- what is absent -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "sections"), [
    ("bp", ["Trajectory", "Training", "Probes", "Configuration"]),
    ("bare", ["Trajectory", "Training", "Adaptive depth", "Alpha sweep", "Configuration"]),
    ("one stage", ["Trajectory", "Training", "Alpha sweep", "Probes", "Configuration"]),
    ("twelve stages", ["Trajectory", "Training", "Adaptive depth", "Routing", "Speed", "Alpha sweep", "Probes",
                       "Configuration"]),
    ("young", ["Trajectory", "Training", "Configuration"]),
])
def test_what_is_absent_is_left_out_or_said(tmp_path: Path, name: str, sections: list[str]) -> None:
    records = {"bp": [record(8, poe=False)], "one stage": [record(8, 1)], "twelve stages": [record(8, 12)], "young": [],
               "bare": [record(8, 4, calibrated=False, modes=False, probes=None)]}[name]
    stages = {"bp": 1, "one stage": 1, "twelve stages": 12}.get(name, 4)
    run = load_run(write_run(tmp_path / "run", stages, 0 if name == "bp" else 8, records=records),
                   unknown="there is no checkpoint")
    chapter = run_chapter(run, {})
    assert [s.title for s in chapter.sections] == sections
    by_title = {s.title: s for s in chapter.sections}
    assert by_title["Configuration"].text == "Not known: there is no checkpoint."
    said = {"bp": "There are no metrics of the training.", "bare": "Step 8 is not calibrated: run scripts.calibrate.",
            "young": "No step was evaluated yet: run scripts.evaluate."}.get(name)
    page, text = html([chapter], {}), markdown([chapter])
    assert said is None or (said in page and said in text)
    for title in sections:
        assert f">{title}</h2>" in page and f"## {title}\n" in text
    assert ("adaptive depth" in page.lower()) == (name in ("bare", "twelve stages"))


def test_several_runs_begin_with_their_comparison(tmp_path: Path) -> None:
    runs = [load_run(write_run(tmp_path / "bp", 1, 8, records=[record(8, poe=False, level=0.9)])),
            load_run(write_run(tmp_path / "poe", 3, 8, records=[record(8, 3)])),
            load_run(write_run(tmp_path / "young", 2, 8))]
    chapters = [comparison_chapter(runs, []), *(run_chapter(run, {}) for run in runs)]
    text = markdown(chapters)
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# Comparison", "# bp", "# poe", "# young"]
    assert text.count("+11.11 %") == 2                              # the newest of each, and after the same tokens
    assert "Not evaluated yet: young." in text
    page = Page(html(chapters, {}))
    assert page.cells.count("+11.11 %") == 2
    nothing = comparison_chapter([runs[2], runs[2]], [])
    assert "Not evaluated yet" in markdown([nothing])


# -- the command --------------------------------------------------------------------------------------------------

@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            importlib.import_module("scripts.report").main()
        captured = capsys.readouterr()
        return int(left.value.code or 0), captured.out + captured.err
    return call


def test_the_command(tmp_path: Path, report: Callable[..., tuple[int, str]]) -> None:
    run = write_run(tmp_path / "run", 1, 8, records=[record(s, poe=False) for s in (4, 8)])
    (run / "checkpoints" / "step_00000008").mkdir(parents=True)      # damaged: it holds nothing
    code, said = report(run, "--steps", "4")
    assert (code, said.splitlines()[-1]) == (0, f"written to {run / 'report'}: report.html, report.md, curves.png")
    text = (run / "report" / "report.md").read_text("utf-8")
    assert "| 4 |" in text and "| 8 |" not in text
    assert "Not known: the newest checkpoint " in text
    other = write_run(tmp_path / "other", 2, 0, records=[record(4, 2)])
    for arguments, code, words in (
            ([run, other], 2, "--out: a report of several runs needs a folder; name one"),
            ([run, "--steps", "5"], 2, "--steps: step 5 was not evaluated; evaluated: 4, 8"),
            ([run, "--steps", "x"], 2, "expected steps such as"),
            ([run, run, "--out", tmp_path / "o"], 2, "two runs of one name"),
            ([tmp_path], 3, "neither metrics.jsonl"),
            ([run, "--out", run / "metrics.jsonl"], 7, "metrics.jsonl: cannot be written")):
        found, said = report(*arguments)
        assert (found, said.count("\n")) == (code, 1) and said.startswith("error[") and words in said, said
    assert not (tmp_path / "o").exists()
    code, said = report(run, other, "--steps", "4", "--out", tmp_path / "both")
    assert code == 0 and (tmp_path / "both" / "comparison.png").exists(), said
