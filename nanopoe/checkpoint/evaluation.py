"""The record of an evaluated step, RUN/evaluation/step_00000200.json, with the same as Markdown beside it.

`scripts.evaluate` writes it; generation, exports and reports read it. Its keys: nanopoe.train.trajectory. What is under
`calibration` scripts.calibrate may replace.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.files import replace_file
from nanopoe.errors import CheckpointError, ConfigError, DataError


def evaluation_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "evaluation" / f"step_{step:08d}.json"


def select_steps(text: str, there: Sequence[int], where: Path) -> list[int]:
    """"all", or steps and ranges as in "100,300-500" -> those of `there`, ascending.

    ConfigError for other text, CheckpointError for a step that is not there or a range without any.
    """
    if text == "all":
        return sorted(there)
    chosen: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not all(n.isascii() and n.isdecimal() for n in ([first, last] if dash else [first])):
            raise ConfigError(f"{part!r} is no step", "--steps", "write it as all or 100,300-500")
        found = [step for step in there if int(first) <= step <= int(last if dash else first)]
        if not found:
            raise CheckpointError(f"no step {part.strip()}", where,
                                  f"steps there: {', '.join(map(str, there)) or 'none'}")
        chosen.update(found)
    return sorted(chosen)


def save_evaluation(run_dir: str | Path, result: dict[str, Any], markdown: str) -> Path:
    """Write the record of result["step"] and its Markdown, each atomically; returns the path of the JSON."""
    path = evaluation_path(run_dir, result["step"])
    replace_file(path.with_suffix(".md"), markdown.encode())
    _write(path, result)
    return path


def save_calibration(run_dir: str | Path, step: int, calibration: dict[str, Any]) -> Path:
    """Put a calibration into the record of a step, which must be there; returns its path."""
    path = evaluation_path(run_dir, step)
    _write(path, {**read_evaluation(path), "calibration": calibration})
    return path


def read_calibration(run_dir: str | Path, step: int, config_hash: str) -> dict[str, Any]:
    """The calibration of a step; CheckpointError when there is none, or it is of a run with another config."""
    path = evaluation_path(run_dir, step)
    record = read_evaluation(path) if path.exists() else {}
    if not record.get("calibration") or record.get("config_hash") != config_hash:
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
