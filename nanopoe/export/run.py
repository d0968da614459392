"""Export a checkpoint of a run: its weights, its tokenizer, and the record of that step if it was evaluated."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from nanopoe.checkpoint import open_checkpoint, open_tokenizer
from nanopoe.checkpoint.evaluation import evaluation_path, read_calibration, read_evaluation
from nanopoe.export.names import check_tensors
from nanopoe.export.repo import export


def export_run(run_dir: Path, out_dir: Path, *, step: int | None = None,
               dtype: Literal["bfloat16", "float32"] = "bfloat16", overwrite: bool = False) -> tuple[Path, int]:
    """Write the repo of `step` (None: the newest); (its folder, the step). Errors as of `export` and the checkpoint.

    CheckpointError when RUN/tokenizer is not the tokenizer the run was trained with, or the calibration is of another
    checkpoint of that step.
    """
    checkpoint = open_checkpoint(run_dir, step)
    tokenizer = open_tokenizer(run_dir, checkpoint)
    record = evaluation_path(run_dir, checkpoint.step)
    scores = read_evaluation(record) if record.exists() else None
    experiment = checkpoint.experiment
    tensors = checkpoint.load_model_tensors()
    check_tensors(experiment.model, tensors)                     # a damaged checkpoint is the first thing to tell
    if scores and scores.get("calibration"):
        read_calibration(run_dir, checkpoint.step, checkpoint.identity)
    out = export(experiment.model, tensors, tokenizer, out_dir, step=checkpoint.step,
                 name=experiment.name, dtype=dtype, evaluation=scores, overwrite=overwrite)
    return out, checkpoint.step
