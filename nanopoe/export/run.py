"""Export a checkpoint of a run: its weights, its tokenizer, and the record of that step if it was evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nanopoe.checkpoint import Checkpoint, open_checkpoint, open_tokenizer
from nanopoe.checkpoint.cascade import open_cascade
from nanopoe.checkpoint.evaluation import evaluation_path, read_calibration, read_evaluation
from nanopoe.config.counts import parameter_shapes
from nanopoe.errors import ConfigError
from nanopoe.export.names import check_tensors
from nanopoe.export.repo import Dtype, export
from nanopoe.export.stage import export_stage


def export_run(run_dir: Path, out_dir: Path, *, step: int | None = None, dtype: Dtype = "bfloat16",
               parent: str | None = None, merged: bool = False, overwrite: bool = False) -> tuple[Path, int]:
    """Write the repo of `step` (None: the newest); (its folder, the step). Errors as of `export` and the checkpoint.

    A specialist's run is written as a stage repo on `parent`, or `merged` with all that it stands on.
    CheckpointError when RUN/tokenizer is not the tokenizer the run was trained with, or the calibration is of another
    checkpoint of that step.
    """
    checkpoint = open_checkpoint(run_dir, step)
    if checkpoint.experiment.model.specialists:
        return export_specialist(checkpoint, run_dir, out_dir, dtype, parent, merged, overwrite), checkpoint.step
    if parent is not None or merged:
        raise ConfigError("is a base, not a specialist", run_dir, "leave out --parent and --merged")
    tokenizer = open_tokenizer(run_dir, checkpoint)
    scores, experiment = scores_of(run_dir, checkpoint.step), checkpoint.experiment
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


def export_specialist(checkpoint: Checkpoint, run_dir: Path, out_dir: Path, dtype: Dtype, parent: str | None,
                      merged: bool, overwrite: bool) -> Path:
    """Write the repo of a specialist's checkpoint; the folder."""
    if merged == (parent is not None):
        raise ConfigError("is a specialist's run", run_dir, "give --parent, the export it stands on, or --merged for "
                                                            "one model with all that it stands on")
    tokenizer, experiment = open_tokenizer(run_dir, checkpoint), checkpoint.experiment
    scores = scores_of(run_dir, checkpoint.step)
    # what was calibrated is of the base on these data; the base's own export has its own
    own_scores = {key: value for key, value in scores.items() if key != "calibration"} if scores else None
    cascade = open_cascade(run_dir, checkpoint.step)
    m, tools = cascade.config, bool(experiment.data.json_layout_prob)     # conversations with tools were laid out anew
    tensors = {name: cascade.read(name) for name in parameter_shapes(m)}
    if parent is None:
        return export(m, tensors, tokenizer, out_dir, step=checkpoint.step, name=experiment.name, dtype=dtype,
                      specialists=cascade.names, tools=tools, evaluation=own_scores, overwrite=overwrite)
    return export_stage(m, tensors, tokenizer, out_dir, parent=parent, base=cascade.base.experiment.name,
                        specialists=cascade.names, step=checkpoint.step, name=experiment.name, dtype=dtype,
                        tools=tools, evaluation=own_scores, overwrite=overwrite)
