"""The record of an evaluated step, RUN/evaluation/step_00000200.json, with the same as Markdown beside it.

`scripts.evaluate` writes it; exports and reports read it. Its keys: nanopoe.train.evaluate.evaluate. Under
`calibration` scripts.calibrate adds what nanopoe.infer.calibrate.calibrate found; generate and chat read that.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.files import replace_file
from nanopoe.errors import CheckpointError, DataError


def evaluation_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "evaluation" / f"step_{step:08d}.json"


def save_evaluation(run_dir: str | Path, result: dict[str, Any], markdown: str) -> Path:
    """Write the record of result["step"] and its Markdown, each atomically; returns the path of the JSON.

    The calibration of an older record stays if that was of the same config.
    """
    path = evaluation_path(run_dir, result["step"])
    if "calibration" not in result:
        with contextlib.suppress(DataError):               # no record, or one that is to be replaced because it is bad
            old = read_evaluation(path)
            if "calibration" in old and old.get("config_hash") == result.get("config_hash"):
                result = {**result, "calibration": old["calibration"]}
    replace_file(path.with_suffix(".md"), markdown.encode())
    _write(path, result)
    return path


def save_calibration(run_dir: str | Path, step: int, calibration: dict[str, Any]) -> Path:
    """Add a calibration to the record of a step, which must be there; returns its path."""
    path = evaluation_path(run_dir, step)
    _write(path, {**read_evaluation(path), "calibration": calibration})
    return path


def read_calibration(run_dir: str | Path, step: int, config_hash: str) -> dict[str, Any]:
    """The calibration of a step; CheckpointError when there is none, or it is of a run with another config."""
    path = evaluation_path(run_dir, step)
    record = read_evaluation(path) if path.exists() else {}
    if "calibration" not in record or record.get("config_hash") != config_hash:
        raise CheckpointError(f"step {step} is not calibrated", run_dir,
                              f"run scripts.calibrate {run_dir} --step {step}")
    return dict(record["calibration"])


def _write(path: Path, record: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_evaluation(path: Path) -> dict[str, Any]:
    """One record; DataError for a file that scripts.evaluate did not write."""
    try:
        result = json.loads(path.read_bytes())
        result["bpb"]["full"], result["accuracy"]["full"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("not an evaluation of nanopoe", path,
                        "run scripts.evaluate again, or remove the file") from error
    return dict(result)
