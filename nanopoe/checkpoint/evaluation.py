"""The record of an evaluated step, RUN/evaluation/step_00000200.json, with the same as Markdown beside it.

`scripts.evaluate` writes it; generation, exports and reports read it. Its keys: nanopoe.train.trajectory. What is under
`calibration` scripts.calibrate may replace. What scripts.evaluate_tools found of the same step is beside it, in
tools_step_00000200.jsonl, a line for each way it was asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.files import replace_file
from nanopoe.errors import CheckpointError, ConfigError, DataError


def evaluation_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "evaluation" / f"step_{step:08d}.json"


def parse_steps(text: str) -> list[range]:
    """"100,200-600" -> the step 100 and those from 200 to 600. ConfigError for anything else."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,18})\s*(?:-\s*(\d{1,18})\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise ConfigError(f"expected steps such as 100,200-600, got {text[:60]!r}", "--steps")
        found.append(range(first, last + 1))
    return found


def select_steps(text: str, there: Sequence[int], where: Path) -> list[int]:
    """"all", or steps and ranges as of parse_steps -> those of `there`, ascending.

    CheckpointError for a step that is not there or a range without any.
    """
    if text == "all":
        return sorted(there)
    wanted = parse_steps(text)
    for steps in wanted:
        if not any(step in steps for step in there):
            name = f"step {steps[0]}" if len(steps) == 1 else f"step from {steps[0]} to {steps[-1]}"
            raise CheckpointError(f"no {name}", where, f"steps there: {', '.join(map(str, there)) or 'none'}")
    return sorted(step for step in there if any(step in steps for steps in wanted))


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


def is_of(record: dict[str, Any], identity: str) -> bool:
    """Whether a record was made from the checkpoint of this identity, and not of one that was there before."""
    request = record.get("request")
    return isinstance(request, dict) and request.get("checkpoint") == identity


def read_calibration(run_dir: str | Path, step: int, identity: str) -> dict[str, Any]:
    """The calibration of a step; CheckpointError when there is none, or it is of another checkpoint of that step."""
    path = evaluation_path(run_dir, step)
    record = read_evaluation(path) if path.exists() else {}
    if not record.get("calibration") or not is_of(record, identity):
        raise CheckpointError(f"step {step} is not calibrated", run_dir,
                              f"run scripts.evaluate {run_dir} --step {step}")
    return dict(record["calibration"])


# -- tool calls -------------------------------------------------------------------------------------------------------

def tools_path(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "evaluation" / f"tools_step_{step:08d}.jsonl"


def save_tools(run_dir: str | Path, record: dict[str, Any]) -> Path:
    """Add what scripts.evaluate_tools found to what is known of its step, atomically; returns the path.

    It replaces the record of the same request; those of another checkpoint that was there before are dropped.
    """
    path = tools_path(run_dir, record["step"])
    request = record["request"]
    kept = [one for one in (read_tools(path) if path.exists() else [])
            if one["request"] != request and one["request"]["checkpoint"] == request["checkpoint"]]
    lines = [json.dumps(one, ensure_ascii=False, allow_nan=False) for one in (*kept, record)]
    replace_file(path, "".join(f"{line}\n" for line in lines).encode())
    return path


def read_tools(path: Path) -> list[dict[str, Any]]:
    """The records of a step, in the order they were made; DataError for a file scripts.evaluate_tools did not write."""
    try:
        records = [dict(json.loads(line)) for line in path.read_bytes().splitlines()]
        for record in records:
            record["tools"]["all"], record["arithmetic"]["exact"], record["request"]["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("not an evaluation of tool calls", path,
                        "remove the file, and run scripts.evaluate_tools") from error
    return records


# -- files ------------------------------------------------------------------------------------------------------------

def _write(path: Path, record: dict[str, Any]) -> None:
    replace_file(path, (json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_evaluation(path: Path) -> dict[str, Any]:
    """One record; DataError for a file that scripts.evaluate did not write."""
    try:
        result = json.loads(path.read_bytes())
        result["bpb"]["full"], result["accuracy"]["full"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError("not an evaluation of nanopoe", path,
                        "run scripts.evaluate --again, or remove the file") from error
    return dict(result)
