"""Checkpoints of a few tensors by any rank, and how to damage one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nanopoe.checkpoint import Checkpoint, Target, digest, save_checkpoint
from nanopoe.checkpoint.format import seal
from nanopoe.checkpoint.store import sha256_file
from nanopoe.config import Experiment, experiment_from_dict
from nanopoe.dist import World
from nanopoe.optim import DistMuonAdamW
from tests.ranks import experiment_dict
from tests.test_optim import groups, parameters

MODEL = "model-0001-of-0001.safetensors"
OPTIM = "optim-0001-of-0001.safetensors"
ALONE = World(0, 1, torch.device("cpu"))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and seal it again: what is then still refused is refused for what it says."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(seal(manifest), sort_keys=True) + "\n")


def refresh(folder: Path, name: str) -> None:
    """Make the manifest believe in a changed file: what is then still refused is refused for its content."""
    entry = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    rewrite_manifest(folder, lambda m: m["files"].update({name: entry}))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def cut(path: Path, end: int) -> None:
    path.write_bytes(path.read_bytes()[:-end])


def small(run_dir: Path | str, **changes: Any) -> Experiment:
    """An experiment to save under; its data is not there."""
    return experiment_from_dict(experiment_dict(Path("nowhere"), Path(run_dir), **changes), "test")


def target_of(run_dir: Path | str, world: World = ALONE, source: int | None = None, **changes: Any) -> Target:
    return Target(small(run_dir, **changes), world, {"config": "c", "tokenizer": "t"}, source)


def filled(world: World) -> DistMuonAdamW:
    """An optimizer whose state says where it belongs."""
    optimizer = DistMuonAdamW(parameters(), groups(), world.rank, world.size)
    for item in optimizer.state_parts():
        rows = torch.arange(item.row0, item.row0 + item.tensor.size(0)).float()
        item.tensor.copy_(rows.view(-1, *[1] * (item.tensor.dim() - 1)) + len(item.param))
    return optimizer


def position_of(world: World, lanes: int = 12) -> dict[str, Any]:
    own = {str(n): n * n for n in range(world.rank, lanes, world.size)}
    return {"step": 1, "fingerprint": {"seed": 1}, "lanes": own}


def saved_by(world: World, run_dir: str, change: str | None = None) -> str:
    """Save step 1 with all there is to save; the digest."""
    weights = {**parameters(), "untrained": torch.tensor([2.0, 3.0]), "constant": torch.tensor(7.0)}
    optimizer = filled(world)
    if change == "weight":
        weights["rows"].data[126, 7] = -weights["rows"].data[126, 7]
    for item in optimizer.state_parts():
        if change == "state" and (item.param, item.slot) == ("square4", "second"):
            item.tensor[0] += 1e-7 + item.tensor[0].abs() * 1e-6
    tokens = 8 if change == "tokens" else 7
    state = {"step": 1, "tokens": tokens, "optimizer_steps": 1, "position": position_of(world)}
    return digest(Checkpoint(save_checkpoint(target_of(run_dir, world), weights, optimizer.state_parts(), state).path))


def save_steps(run_dir: Path, *steps: int, **changes: Any) -> list[str]:
    warnings = []
    for step in steps:
        target = target_of(run_dir, **changes)
        warnings += save_checkpoint(target, {"w": torch.full((3,), float(step))}, [], {"step": step}).warnings
    return warnings
