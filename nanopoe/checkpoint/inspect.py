"""What people ask of checkpoints: which are there, are they whole, what is in one. Data here, text in tables.py."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.format import MANIFEST
from nanopoe.checkpoint.store import (
    NAMED_FOR_A_STEP,
    STEP_FOLDER,
    Checkpoint,
    checkpoints_of,
    folder_of,
    list_steps,
    open_checkpoint,
)
from nanopoe.errors import CheckpointError


@dataclass(frozen=True)
class Listed:
    """A folder in RUN/checkpoints. `problem` is None if it opens (contents are not hashed here)."""

    name: str
    step: int
    bytes: int
    age_s: float
    ranks: int | None
    pinned: bool
    problem: str | None


def list_folders(run_dir: str | Path) -> list[Listed]:
    """The checkpoints of a run by step, with those set aside or found bad; CheckpointError if there are none."""
    folder = checkpoints_of(run_dir)
    named = [(p, NAMED_FOR_A_STEP.fullmatch(p.name)) for p in folder.iterdir()] if folder.is_dir() else []
    found = sorted((int(m.group(1)), not STEP_FOLDER.fullmatch(p.name), p) for p, m in named if m)
    if not found:
        raise CheckpointError("no checkpoint", folder, "train first, or check the run folder")
    return [list_one(path, step) for step, _, path in found]


def list_one(path: Path, step: int) -> Listed:
    problem, ranks = None, None
    try:
        ranks = Checkpoint(path).manifest.world_size
    except CheckpointError as error:
        problem = f"{error.where}: {error.what}".removeprefix(f"{path}/").removeprefix(f"{path}: ")
    try:
        size = sum(p.lstat().st_size for p in path.iterdir())
        changed = (path / MANIFEST if (path / MANIFEST).exists() else path).stat().st_mtime
    except OSError:
        size, changed = 0, path.lstat().st_mtime
    return Listed(path.name, step, size, max(0.0, time.time() - changed), ranks, (path / "KEEP").exists(), problem)


@dataclass(frozen=True)
class Verified:
    """A checkpoint of which every byte was hashed; `error` is the first damage."""

    path: Path
    files: int
    bytes: int
    seconds: float
    error: CheckpointError | None


def verify_all(path: Path, step: int | None, every: bool) -> Iterator[Verified]:
    """Hash a step folder, `step` of a run folder (the newest by default), or every step of it."""
    if not every:
        yield verify_one(path_of(path, step))
        return
    steps = list_steps(path)
    if not steps:
        open_checkpoint(path)                                  # which says that there are none
    for number in steps:
        yield verify_one(folder_of(path, number))


def path_of(path: Path, step: int | None) -> Path:
    """The step folder meant by a path and a step: damaged or not, it is there. CheckpointError if not."""
    if (path / MANIFEST).exists() or NAMED_FOR_A_STEP.fullmatch(path.absolute().name):
        return path
    steps = list_steps(path)
    if not steps or (step is not None and step not in steps):
        open_checkpoint(path, step)                            # which says so
    return folder_of(path, steps[-1] if step is None else step)


def verify_one(path: Path) -> Verified:
    start, files, size, failure = time.perf_counter(), 0, 0, None
    try:
        checkpoint = Checkpoint(path)
        files = len(checkpoint.manifest.files)
        size = sum(n for n, _ in checkpoint.manifest.files.values())
        checkpoint.verify()
    except CheckpointError as error:
        failure = error
    return Verified(path, files, size, time.perf_counter() - start, failure)


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint is, as JSON-able data; sizes in bytes."""
    manifest, model, state = checkpoint.manifest, checkpoint.experiment.model, checkpoint.state
    weights = checkpoint.weights.values()
    return {
        "path": str(checkpoint.path), "experiment": checkpoint.experiment.name, "step": checkpoint.step,
        "tokens": state.get("tokens"), "optimizer_steps": state.get("optimizer_steps"),
        "model": {"n_layer": model.n_layer, "n_embd": model.n_embd, "vocab_size": model.vocab_size,
                  "poe_mode": model.poe_mode, "parameters": sum(math.prod(e.shape) for e in weights),
                  "weights": len(weights), "optimizer_tensors": len(checkpoint.optimizer_state)},
        "bytes": sum(size for size, _ in manifest.files.values()), "files": len(manifest.files),
        "world_size": manifest.world_size, "nanopoe": manifest.nanopoe, "torch": manifest.torch,
        "fingerprints": manifest.fingerprints, "pinned": checkpoint.pinned, "lineage": state.get("lineage", []),
        "data": describe_position(state.get("position")),
    }


def describe_position(position: Any) -> dict[str, Any] | None:
    """The data position in short: lanes, and by source the epochs they are in and the tokens read."""
    try:
        lanes = list(position["lanes"].values())
        sources = {
            name: {"epochs": sorted({lane["cursors"][name][0] for lane in lanes}),
                   "tokens": sum(lane["tokens"][name] for lane in lanes)} for name in lanes[0]["cursors"]}
        return {"lanes": len(lanes), "buffered_documents": sum(len(lane["buffer"]) for lane in lanes),
                "sources": sources}
    except (KeyError, TypeError, IndexError, AttributeError):
        return None


def tensor_rows(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Every tensor with its dtype, global shape and the files that hold it."""
    return [{"name": entry.name, "dtype": entry.dtype, "shape": list(entry.shape),
             "parts": [asdict(part) for part in entry.parts]}
            for _, entry in sorted(checkpoint.manifest.tensors.items())]
