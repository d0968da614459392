"""Export a checkpoint of a run: its weights, its tokenizer, and the scores of that step if it was evaluated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from nanopoe.checkpoint import open_checkpoint
from nanopoe.errors import CheckpointError, DataError
from nanopoe.export.repo import export
from nanopoe.tokenizer import Tokenizer


def export_run(run_dir: Path, out_dir: Path, *, step: int | None = None,
               dtype: Literal["bfloat16", "float32"] = "bfloat16", overwrite: bool = False) -> tuple[Path, int]:
    """Write the repo of `step` (None: the newest); (its folder, the step). Errors as of `export` and the checkpoint.

    CheckpointError when RUN/tokenizer is not the tokenizer the run was trained with.
    """
    checkpoint = open_checkpoint(run_dir, step)
    tokenizer = Tokenizer.load(run_dir / "tokenizer")
    digest = checkpoint.manifest.value.get("fingerprints", {}).get("tokenizer")
    if digest != tokenizer.digest:
        raise CheckpointError("was trained with another tokenizer", checkpoint.path,
                              f"put the one whose sha256 begins with {str(digest)[:12]} in {run_dir / 'tokenizer'}")
    scores = read_evaluation(run_dir / "evaluation" / f"step_{checkpoint.step:08d}.json")
    experiment = checkpoint.experiment
    out = export(experiment.model, checkpoint.load_model_tensors(), tokenizer, out_dir, step=checkpoint.step,
                 name=experiment.name, dtype=dtype, evaluation=scores, overwrite=overwrite)
    return out, checkpoint.step


def read_evaluation(path: Path) -> dict[str, Any] | None:
    """What scripts.evaluate saved, None when it has not been run. DataError for a file it did not write."""
    if not path.exists():
        return None
    do = "run scripts.evaluate again, or remove the file"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"is not readable JSON ({error})", path, do) from error
    if not isinstance(found, dict) or not isinstance(found.get("bpb"), dict):
        raise DataError("is not an evaluation: it has no bpb", path, do)
    return found
