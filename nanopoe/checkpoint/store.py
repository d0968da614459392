"""The checkpoints of a run: committed by rename, found, opened, rotated. RUN/checkpoints/step_00000200/..."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nanopoe
from nanopoe import dist
from nanopoe.checkpoint.format import FORMAT, MODEL_FILE, VERSION, Manifest, fsync_path, write_json, write_tensors
from nanopoe.config import Experiment, dump_experiment, experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import CheckpointError
from nanopoe.optim.dist_muon_adamw import StatePart
from nanopoe.tokenizer import Tokenizer

STEP_FOLDER = re.compile(r"step_(\d{8,})")


class Checkpoint:
    """One step of a run, opened: sizes checked, contents verified as they are read."""

    def __init__(self, path: Path):
        self.path, self.manifest = path, Manifest(path)
        self.step = self.manifest.step

    @cached_property
    def experiment(self) -> Experiment:
        return experiment_from_dict(self.manifest.json("config.json"), str(self.path / "config.json"))

    @cached_property
    def state(self) -> dict[str, Any]:
        """The train state: step, tokens, optimizer_steps, position (of the last step trained on)."""
        return self.manifest.json("state.json")

    def load_model_tensors(self) -> dict[str, Tensor]:
        """Weights by parameter name, fp32, verified."""
        return self.manifest.load_model()

    def optimizer_rows(self, param: str, slot: str, low: int, high: int) -> Tensor:
        return self.manifest.optimizer_rows(param, slot, low, high)


def folder_of(run_dir: str | Path, step: int) -> Path:
    return Path(run_dir) / "checkpoints" / f"step_{step:08d}"


def list_steps(run_dir: str | Path) -> list[int]:
    """Steps with a committed folder, ascending. A folder is committed by its rename, so every one counts."""
    folder = Path(run_dir) / "checkpoints"
    if not folder.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(p.name) for p in folder.iterdir() if p.is_dir())
    return sorted(int(m.group(1)) for m in matches if m)


def open_checkpoint(run_dir: str | Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest. CheckpointError if there is none or it is damaged.

    A damaged newest one is never passed over in silence: the error names the step before it.
    """
    steps = list_steps(run_dir)
    if not steps:
        raise CheckpointError("no checkpoint", Path(run_dir) / "checkpoints", "train first, or check the run folder")
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step}", Path(run_dir) / "checkpoints",
                              f"steps there: {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    try:
        checkpoint = Checkpoint(folder_of(run_dir, chosen))
        if checkpoint.step != chosen:
            raise CheckpointError(f"is of step {checkpoint.step}", checkpoint.path)
        return checkpoint
    except CheckpointError as error:
        if error.do is None and chosen > steps[0]:
            error.do = "use another step"
        before = [s for s in steps if s < chosen]
        if before:
            do = f"{error.do}; the one before is step {before[-1]}"
            raise CheckpointError(error.what, error.where, do) from error
        raise


def open_tokenizer(run_dir: str | Path, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer kept in the run folder; CheckpointError if it is not the one the checkpoint was trained with."""
    folder = Path(run_dir) / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    digest = checkpoint.manifest.value["fingerprints"].get("tokenizer")
    if digest != tokenizer.digest:
        raise CheckpointError("was trained with another tokenizer", checkpoint.path,
                              f"put the one whose sha256 begins with {str(digest)[:12]} in {folder}")
    return tokenizer


def save_checkpoint(run_dir: str | Path, experiment: Experiment, world: World, model: Mapping[str, Tensor],
                    optimizer: Iterable[StatePart], state: dict[str, Any], fingerprints: dict[str, str],
                    keep_last: int | None, source: int | None = None) -> Path:
    """Commit step state["step"]: all ranks write into a temporary folder, rank 0 the manifest last, then a rename.

    Collective. Any rank's failure is raised on all, and what was there before stays, and nothing else: a half-written
    checkpoint would keep a full disk full. The same step saved again replaces the old folder by way of a rename.
    `keep_last` and the step `source` that the run went on from: see `rotate`.
    """
    final = folder_of(run_dir, state["step"])
    temporary = final.parent / f".tmp-{final.name}"
    try:
        _save(final, temporary, experiment, world, model, optimizer, state, fingerprints)
    except Exception:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    with dist.agree(world.device):
        if world.is_main:
            rotate(run_dir, keep_last, source)
    return final


def _save(final: Path, temporary: Path, experiment: Experiment, world: World, model: Mapping[str, Tensor],
          optimizer: Iterable[StatePart], state: dict[str, Any], fingerprints: dict[str, str]) -> None:
    with dist.agree(world.device):
        if world.is_main:
            final.parent.mkdir(parents=True, exist_ok=True)
            for left in [*final.parent.glob(".tmp-*"), *final.parent.glob(".trash-*")]:
                shutil.rmtree(left)
            temporary.mkdir()
    written: dict[str, Any] = {"files": {}, "optimizer": {}, "tensors": {}}
    with dist.agree(world.device):
        write_rank(temporary, world, model, optimizer, written)
    everyone = dist.gather_json(written, world.device)
    with dist.agree(world.device):
        if world.is_main:
            write_manifest(temporary, experiment, world, state, fingerprints, everyone)
            commit(temporary, final)


def write_rank(folder: Path, world: World, model: Mapping[str, Tensor], optimizer: Iterable[StatePart],
               written: dict[str, Any]) -> None:
    """This rank's files: its optimizer parts, and on rank 0 the weights (which all ranks hold)."""
    parts = {f"{p.param}::{p.slot}::{p.row0}": p for p in optimizer}
    if parts:
        name = f"optim-{world.rank + 1:04d}-of-{world.size:04d}.safetensors"
        written["files"][name] = write_tensors(folder / name, {key: p.tensor for key, p in parts.items()})
        for p in parts.values():
            written["optimizer"].setdefault(f"{p.param}::{p.slot}", []).append(
                {"file": name, "row0": p.row0, "rows": p.tensor.size(0)})
    if world.is_main:
        written["files"][MODEL_FILE] = write_tensors(folder / MODEL_FILE, model)
        written["tensors"] = {n: {"dtype": str(t.dtype).removeprefix("torch."), "shape": list(t.shape)}
                              for n, t in model.items()}


def write_manifest(folder: Path, experiment: Experiment, world: World, state: dict[str, Any],
                   fingerprints: dict[str, str], everyone: list[dict[str, Any]]) -> None:
    files: dict[str, Any] = {}
    optimizer: dict[str, list[dict[str, Any]]] = {}
    for written in everyone:
        files.update(written["files"])
        for key, parts in written["optimizer"].items():
            optimizer.setdefault(key, []).extend(parts)
    files["state.json"] = write_json(folder / "state.json", state)
    files["config.json"] = write_json(folder / "config.json", dump_experiment(experiment))
    write_json(folder / "manifest.json", {
        "format": FORMAT, "version": VERSION, "step": state["step"], "nanopoe": nanopoe.__version__,
        "torch": torch.__version__, "world_size": world.size, "fingerprints": fingerprints, "files": files,
        "tensors": everyone[0]["tensors"], "optimizer": optimizer})
    fsync_path(folder)


def commit(temporary: Path, final: Path) -> None:
    """Put the finished folder in place; an older one of the same step goes to the trash first."""
    if final.exists():
        trash = final.parent / f".trash-{final.name}"
        final.rename(trash)
        temporary.rename(final)
        shutil.rmtree(trash)
    else:
        temporary.rename(final)
    fsync_path(final.parent)


def set_aside_after(run_dir: str | Path, step: int) -> list[str]:
    """Rename the checkpoints of steps > `step`, so that none of them is taken for the newest; their new names.

    For a run that goes back: what it had learned later is another branch, kept until the user removes it.
    """
    names = []
    for later in (s for s in list_steps(run_dir) if s > step):
        folder = folder_of(run_dir, later)
        free = (folder.with_name(f"aside_{n}_{folder.name}") for n in count(1))
        names.append(folder.rename(next(path for path in free if not path.exists())).name)
    if names:
        fsync_path(Path(run_dir) / "checkpoints")
    return names


def rotate(run_dir: str | Path, keep_last: int | None, source: int | None = None) -> None:
    """Remove all but the newest `keep_last` steps: rename first, so a half-removed folder is never found.

    The step `source` stays: the command that named it (resume.step) must work again after a crash.
    """
    if keep_last is None:
        return
    for step in (s for s in list_steps(run_dir)[:-keep_last] if s != source):
        folder = folder_of(run_dir, step)
        trash = folder.parent / f".trash-{folder.name}"
        folder.rename(trash)
        shutil.rmtree(trash)
