"""What a report says, in its order: sections of text, tables and pictures. As Markdown here, as HTML in page.py."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import quote

import yaml

from nanopoe.config import dump_experiment
from nanopoe.config.counts import count_parameters, trained_shapes
from nanopoe.config.layout import layout_of
from nanopoe.config.schema import Experiment, ModelConfig
from nanopoe.report.cells import Table, number, percent
from nanopoe.report.compare import baseline_name, meeting_table
from nanopoe.report.record import Record
from nanopoe.report.runs import RunStory
from nanopoe.report.seams import in_cycles, seams_table
from nanopoe.report.tables import comparison_rows, escaped, markdown_table
from nanopoe.report.tools import tools_tables
from nanopoe.report.trajectory import (
    alpha_tables,
    depth_tables,
    key_figures,
    measured_tables,
    probe_tables,
    routing_tables,
    score_tables,
)

COMPARISON_NOTE = "Bits per byte, less is better. The gap is that of the full pool to the run trained end to end (BP)."
SPECIALISTS_NOTE = ("Bits per byte, less is better. Of a specialist's run full is the specialist, dual its pool with "
                    "the base, of equal weights, and base the frozen model below, as it reads the same text with the "
                    "chat tokens of that run.")


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it; `code` is literal text, folded where that is possible."""

    title: str
    text: str = ""
    pictures: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    code: str = ""

    @property
    def empty(self) -> bool:
        return not (self.text or self.pictures or self.tables or self.code)


@dataclass(frozen=True)
class Chapter:
    """A run, or the comparison of several; `figures` are (what, figure, what to know of it)."""

    title: str
    text: str
    figures: list[tuple[str, str, str]]
    sections: list[Section]


# -- what is in it ------------------------------------------------------------------------------------------------

def run_chapter(run: RunStory, pictures: dict[str, str]) -> Chapter:
    """A run; `pictures` are the files drawn of it by their kind: write.OF_A_RUN."""
    def drawn(*kinds: str) -> list[str]:
        return [pictures[kind] for kind in kinds if kind in pictures]

    records, newest = run.records, run.newest
    sections = [
        Section("Trajectory", "" if records else NOT_EVALUATED, drawn("trajectory"),
                [in_cycles(run, table) for table in score_tables(records)]),
        Section("Training", _progress(run), drawn("curves")),
        Section("Tool calls", "", [], list(tools_tables(run.tools))),
    ]
    if not run.is_specialist:                       # the stages of a specialist's run are another's
        to_calibrate = newest is not None and bool(newest.bpb.stages) and newest.n_stages > 1 and not newest.calibration
        sections += [
            Section("Adaptive depth", NOT_CALIBRATED.format(newest) if to_calibrate else "", drawn("depth", "exits"),
                    list(depth_tables(records))),
            Section("Routing", "", drawn("routing"), list(routing_tables(records))),
            Section("Speed", "", drawn("speed"), list(measured_tables(records))),
            Section("Alpha sweep", "", drawn("alpha"), list(alpha_tables(records))),
        ]
    sections += [Section("Probes", "", [], list(probe_tables(records))), *_experiment_sections(run)]
    return Chapter(run.name, _what(run), key_figures(newest) if newest else [], [s for s in sections if not s.empty])


def comparison_chapter(runs: Sequence[RunStory], pictures: list[str]) -> Chapter:
    results = {run.name: run.newest for run in runs if run.newest}
    tables = [Table("The newest of each", *comparison_rows(results), _comparison_note(results))] if results else []
    met = meeting_table(runs)
    silent = [run.name for run in runs if run.newest is None]
    text = f"Not evaluated yet: {', '.join(silent)}." if silent else ""
    return Chapter("Comparison", f"{len(runs)} runs: {', '.join(run.name for run in runs)}.", [],
                   [Section("Bits per byte", text, pictures, [*tables, *([met] if met else [])])])


def _comparison_note(results: Mapping[str, Record]) -> str:
    if not any(record.specialists for record in results.values()):
        return COMPARISON_NOTE
    name = baseline_name(results)
    return SPECIALISTS_NOTE + (f" The gap is to {name}." if name else "")


NOT_EVALUATED = "No step was evaluated yet: run scripts.evaluate."
NOT_CALIBRATED = "Step {0.step} is not calibrated: run scripts.calibrate."


def _what(run: RunStory) -> str:
    """The model, what was trained of it, and how far it is, in a few sentences."""
    newest, parts = run.newest, []
    if run.experiment is not None:
        parts += [_trained(run.experiment), _model(run.experiment.model.base)]
    elif run.is_specialist:
        parts.append("A specialist on a frozen base.")
    elif newest is not None:
        parts.append("Trained end to end (BP)." if newest.poe_mode == "none" else f"{newest.n_stages} stages.")
    if newest is not None:
        parts.append(f"Newest evaluated step: {newest.step:,}.")
    return " ".join(part for part in parts if part)


def _trained(experiment: Experiment) -> str:
    """The task, what it begins with, and how much of the model it trains; nothing of a pretraining from the seed."""
    m, start = experiment.model, experiment.init_from
    if experiment.task == "sft":
        return f"Full fine-tuning (SFT){' of ' + _begun(start.path, start.step) if start else ''}: all is trained."
    if experiment.specialist is None and start is not None:
        return (f"Pretraining that begins with the weights of {_begun(start.path, start.step)}, "
                f"{'and' if start.optimizer else 'without'} its optimizer's state.")
    if experiment.specialist is None:
        return ""
    below, new = experiment.specialist, m.specialists[-1].n_layer
    trained = sum(map(math.prod, trained_shapes(m).values()))
    whole = count_parameters(m).total
    others = len(m.specialists) - 1
    chain = " is" if not others else \
        f" and {'the specialist' if others == 1 else f'the {others} specialists'} on it are"
    return (f"Specialist of {new} new {'layer' if new == 1 else 'layers'} on {_begun(below.base, below.base_step)}: "
            f"{trained:,} of {whole:,} parameters are trained, the base{chain} frozen. Of the base:")


def _begun(path: str, step: int | None) -> str:
    """A run by its folder's name."""
    return os.path.basename(os.path.normpath(path)) + ("" if step is None else f", step {step:,}")


def _model(m: ModelConfig) -> str:
    layout = layout_of(m)
    kind = {"none": "Trained end to end (BP)", "flat": "Product of Experts",
            "hier": "Stage losses without detaching"}[m.poe_mode]
    stages = f", stages of {', '.join(str(len(layout.stage_layers(k))) for k in range(layout.n_stages))} layers" \
        if m.poe_mode != "none" else ""
    return (f"{kind}{stages}: {count_parameters(m).total:,} parameters, {m.n_layer} layers of width {m.n_embd}, "
            f"vocabulary {m.vocab_size:,}.")


def _progress(run: RunStory) -> str:
    if not run.train:
        return "There are no metrics of the training."
    last = run.train[-1]
    unit = "targets" if run.experiment and run.experiment.data.kind == "conversations" else "tokens"
    tokens = f", {last['tokens']:,} {unit}" if last.get("tokens") is not None else ""
    total = sum(c.steps for c in run.experiment.schedule.cycles) if run.experiment else None
    of = "" if total is None else f" of {total:,}" + (" (not finished)" if last["step"] < total else "")
    return f"Step {last['step']:,}{of}{tokens}."


def _experiment_sections(run: RunStory) -> list[Section]:
    experiment = run.experiment
    if experiment is None:
        return [Section("Configuration", f"Not known: {run.unknown}.")] if run.unknown else []
    d = experiment.data
    packing = f"{d.kind}, packing {d.packing}, case augmentation {d.case_aug_prob:g}; validation on " \
              f"{', '.join(s.name for s in d.val)}."
    config = yaml.safe_dump(dump_experiment(experiment), sort_keys=False, allow_unicode=True)
    return [Section("Data", packing, [], [_mixture(run, experiment)]),
            Section("Schedule", "", [], [_cycles(run, experiment), *([seams] if (seams := seams_table(run)) else [])]),
            Section("Configuration", code=config)]


def _mixture(run: RunStory, experiment: Experiment) -> Table:
    """Sources with the share asked for and, as far as the run has told it, how it came out."""
    sources = experiment.data.train
    total, rows = sum(s.weight for s in sources), []
    for s in sources:
        asked = f"{s.repeat} times" if experiment.data.kind == "conversations" else percent(s.weight / total)
        came = run.sources.get(s.name)
        rows.append([s.name, asked, percent(came.share if came else None), number(came.epochs if came else None, 2)])
    return Table("Training mixture", ["source", "asked", "came out", "epochs"], rows)


def _cycles(run: RunStory, experiment: Experiment) -> Table:
    """Every cycle of the schedule, with the last step evaluated in it."""
    rows, start = [], 0
    for n, c in enumerate(experiment.schedule.cycles):
        inside = [r for r in run.records if start < r.step <= start + c.steps]
        rows.append([str(n), f"{start:,} to {start + c.steps:,}", f"{c.warmup_steps:,}",
                     f"{round(c.warmdown_ratio * c.steps):,}", f"{c.peak:g}", f"{c.final_frac:g}",
                     f"{inside[-1].trained.bpb:.6f} at {inside[-1].step:,}" if inside else "-"])
        start += c.steps
    return Table("Cycles", ["cycle", "steps", "warm-up", "warm-down", "peak", "final", "last bits per byte"], rows)


# -- as Markdown --------------------------------------------------------------------------------------------------

def markdown(chapters: Sequence[Chapter]) -> str:
    """The whole report; pictures are files beside it."""
    return "\n\n".join(part for chapter in chapters for part in _chapter_markdown(chapter)) + "\n"


def _chapter_markdown(chapter: Chapter) -> list[str]:
    parts = [f"# {escaped(chapter.title)}", escaped(chapter.text)]
    if chapter.figures:
        parts.append(markdown_table(["", "", ""], [list(figure) for figure in chapter.figures], numbers=False))
    for section in chapter.sections:
        parts += [f"## {escaped(section.title)}", escaped(section.text)]
        parts += [f"![{escaped(section.title)}]({quote(name)})" for name in section.pictures]
        for table in section.tables:
            parts += [f"### {escaped(table.title)}", escaped(table.note),
                      markdown_table(table.head, table.rows, numbers=table.numbers)]
        if section.code:
            parts.append("\n".join(f"    {line}" for line in section.code.splitlines()))
    return [part for part in parts if part]
