"""Export a checkpoint of a run, or a delta: weights, tokenizer, and the record of a run's step if it was evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanopoe.checkpoint import open_checkpoint, open_tokenizer
from nanopoe.checkpoint.cascade import Cascade, is_delta, open_cascade
from nanopoe.checkpoint.evaluation import evaluation_path, read_calibration, read_evaluation
from nanopoe.config.counts import parameter_shapes
from nanopoe.errors import ConfigError
from nanopoe.export.names import check_tensors
from nanopoe.export.repo import Dtype, export
from nanopoe.export.stage import export_stage
from nanopoe.tokenizer import Tokenizer


def export_run(run_dir: Path, out_dir: Path, *, step: int | None = None, dtype: Dtype = "bfloat16",
               parent: str | None = None, merged: bool = False, base: Path | None = None, overwrite: bool = False
               ) -> tuple[Path, int]:
    """Write the repo of `step` (None: the newest); (its folder, the step). Errors as of `export` and the checkpoint.

    A specialist's run, or its delta, is written as a stage repo on `parent`, or `merged` with all that it stands on;
    `base` is the folder of the run below, if it is not where the specialist says. CheckpointError when RUN/tokenizer is
    not the tokenizer the run was trained with, or the calibration is of another checkpoint of that step.
    """
    if is_delta(run_dir):
        if step is not None:
            raise ConfigError("is a delta, which holds one step", run_dir, "leave out --step")
        check_specialist(run_dir, parent, merged)
        cascade = open_cascade(run_dir, base=base)
        tokenizer = open_tokenizer(cascade.base.path.parents[1], cascade.base)           # a delta comes without one
        return export_specialist(cascade, tokenizer, out_dir, dtype, parent, overwrite), cascade.links[-1].step
    checkpoint = open_checkpoint(run_dir, step)
    experiment = checkpoint.experiment
    if experiment.model.specialists:
        check_specialist(run_dir, parent, merged)
        tokenizer, scores = open_tokenizer(run_dir, checkpoint), scores_of(run_dir, checkpoint.step)
        # what was calibrated is of the base on these data; the base's own export has its own
        own_scores = {key: value for key, value in scores.items() if key != "calibration"} if scores else None
        cascade = open_cascade(run_dir, checkpoint.step, base=base)
        tools = bool(experiment.data.json_layout_prob)           # conversations with tools were laid out anew
        out = export_specialist(cascade, tokenizer, out_dir, dtype, parent, overwrite, tools, own_scores)
        return out, checkpoint.step
    if parent is not None or merged or base is not None:
        raise ConfigError("is a base, not a specialist", run_dir, "leave out --parent, --merged and --base")
    tokenizer, scores = open_tokenizer(run_dir, checkpoint), scores_of(run_dir, checkpoint.step)
    tensors = checkpoint.load_model_tensors()
    check_tensors(experiment.model, tensors)                     # a damaged checkpoint is the first thing to tell
    if scores and scores.get("calibration"):
        read_calibration(run_dir, checkpoint.step, checkpoint.identity)
    out = export(experiment.model, tensors, tokenizer, out_dir, step=checkpoint.step,
                 name=experiment.name, dtype=dtype, evaluation=scores, overwrite=overwrite)
    return out, checkpoint.step


def scores_of(run_dir: Path, step: int) -> dict[str, Any] | None:
    """The record of a step that was evaluated."""
    record = evaluation_path(run_dir, step)
    return read_evaluation(record) if record.exists() else None


def check_specialist(path: Path, parent: str | None, merged: bool) -> None:
    """ConfigError unless it is said what stands below."""
    if merged == (parent is not None):
        what = "delta" if is_delta(path) else "run"
        raise ConfigError(f"is a specialist's {what}", path, "give --parent, the export it stands on, or --merged for "
                                                             "one model with all that it stands on")


def export_specialist(cascade: Cascade, tokenizer: Tokenizer, out_dir: Path, dtype: Dtype, parent: str | None,
                      overwrite: bool, tools: bool = False, scores: dict[str, Any] | None = None) -> Path:
    """Write the repo of the last specialist of a cascade, on `parent` or with all below it; the folder."""
    m, link = cascade.config, cascade.links[-1]
    facts: dict[str, Any] = {"step": link.step, "name": link.name, "dtype": dtype, "specialists": cascade.names,
                             "tools": tools, "evaluation": scores, "overwrite": overwrite}
    tensors = {name: cascade.read(name) for name in parameter_shapes(m)}
    if parent is None:
        return export(m, tensors, tokenizer, out_dir, **facts)
    return export_stage(m, tensors, tokenizer, out_dir, parent=parent, base=cascade.base.experiment.name, **facts)
