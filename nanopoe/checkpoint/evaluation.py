"""The record of an evaluated step, RUN/evaluation/step_00000200.json, with the same as Markdown beside it.

`scripts.evaluate` writes it; exports and reports read it. Its keys: nanopoe.train.evaluate.evaluate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.files import replace_file
from nanopoe.errors import DataError


def evaluation_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "evaluation" / f"step_{step:08d}.json"


def save_evaluation(run_dir: str | Path, result: dict[str, Any], markdown: str) -> Path:
    """Write the record of result["step"] and its Markdown, each atomically; returns the path of the JSON."""
    path = evaluation_path(run_dir, result["step"])
    replace_file(path.with_suffix(".md"), markdown.encode())
    replace_file(path, (json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    return path


def read_evaluation(path: Path) -> dict[str, Any]:
    """One record; DataError for a file that scripts.evaluate did not write."""
    try:
        result = json.loads(path.read_bytes())
        result["bpb"]["full"], result["accuracy"]["full"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("not an evaluation of nanopoe", path,
                        "run scripts.evaluate again, or remove the file") from error
    return dict(result)
