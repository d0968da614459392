"""Saving: all ranks write into a temporary folder, rank 0 the manifest last, then a rename; and what is kept after.

A step folder is whole or absent at every instant: nothing is ever written into one, and what goes is renamed before
it is deleted. `.tmp-*` is a save under way, `.trash-*` is being deleted, `.old-*` is a checkpoint whose step is being
saved again; what a crash leaves of them is put in order by `clean`.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nanopoe
from nanopoe import dist
from nanopoe.checkpoint.container import DTYPE_NAMES, write_tensors
from nanopoe.checkpoint.files import fsync_path, remove
from nanopoe.checkpoint.format import (
    CONFIG,
    FORMAT,
    MANIFEST,
    STATE,
    VERSION,
    seal,
    tensor_entry,
    write_json,
)
from nanopoe.checkpoint.store import PIN, Checkpoint, checkpoints_of, folder_of, list_steps, opens
from nanopoe.config import Experiment, dump_experiment
from nanopoe.data.loader import merge_positions
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, StorageError
from nanopoe.optim.dist_muon_adamw import StatePart

ROOM = 1.2                          # free bytes asked for, relative to the checkpoint's


@dataclass(frozen=True)
class Target:
    """Whose checkpoints: the same for all saves of a run. The step `source` that it went on from is never rotated
    away: the command that named it must work again. `group` is that of a thread with collectives of its own."""

    experiment: Experiment
    world: World
    fingerprints: Mapping[str, str]
    source: int | None = None
    group: dist.Group | None = None

    @property
    def folder(self) -> Path:
        return checkpoints_of(self.experiment.out)

    @property
    def device(self) -> torch.device:
        """Where this group's collectives take their tensors."""
        return self.world.device if self.group is None else torch.device("cpu")


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, and what else the user should know, the same on all ranks."""

    path: Path
    warnings: list[str]


def share_weights(sizes: Mapping[str, int], world_size: int) -> dict[str, int]:
    """Which rank writes which parameter, by bytes: the largest first, each to the rank that has least so far."""
    load, owners = [0] * world_size, {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners


def own_weights(weights: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Those of all weights that this rank writes."""
    owners = share_weights({name: tensor.nbytes for name, tensor in weights.items()}, world.size)
    return {name: tensor.detach() for name, tensor in weights.items() if owners[name] == world.rank}


def save_checkpoint(target: Target, weights: Mapping[str, Tensor], optimizer: Iterable[StatePart],
                    state: Mapping[str, Any]) -> Saved:
    """Commit step state["step"] from all `weights` and this rank's optimizer state. Collective; see `commit`."""
    return commit(target, own_weights(weights, target.world), list(optimizer), state)


def commit(target: Target, weights: Mapping[str, Tensor], optimizer: Sequence[StatePart],
           state: Mapping[str, Any]) -> Saved:
    """Commit step state["step"] from what this rank writes. `state`, of JSON types, is the same on all ranks but for
    "position", the data position of each, which are put together. Collective.

    Any rank's failure is raised on all, and what was there before stays, and nothing else. When the disk refuses, one
    checkpoint fewer than keep_last is kept, if that frees one, and the save is tried once more. Then StorageError.
    """
    try:
        return commit_once(target, weights, optimizer, state, [])
    except StorageError as first:
        warnings = [f"the checkpoint of step {state['step']} was refused ({first.what}), and tried again"]
        if target.world.is_main:
            warnings += clean(target.folder)
            keep = target.experiment.checkpoint.keep_last
            warnings += rotate(target, None if keep is None else max(1, keep - 1))
        return commit_once(target, weights, optimizer, state, warnings)


def commit_once(target: Target, weights: Mapping[str, Tensor], optimizer: Sequence[StatePart],
                state: Mapping[str, Any], warnings: list[str]) -> Saved:
    world, device, group = target.world, target.device, target.group
    final = folder_of(target.experiment.out, state["step"])
    own = sum(tensor.nbytes for tensor in [*weights.values(), *(part.tensor for part in optimizer)])
    everyone = dist.gather_json([own, secrets.token_hex(4)], device, group)
    temporary = final.parent / f".tmp-{final.name}-{everyone[0][1]}"
    try:
        with dist.agree(device, group):
            if world.is_main:
                warnings += prepare(temporary, sum(size for size, _ in everyone))
        with dist.agree(device, group):
            written = write_rank(temporary, world, weights, optimizer)
        written["position"] = state.get("position")
        everyone = dist.gather_json(written, device, group)
        with dist.agree(device, group):
            if world.is_main:
                write_manifest(temporary, target, state, everyone)
                warnings += publish(temporary, final)
    except BaseException:
        if world.is_main:
            remove(temporary)
        raise
    if world.is_main:
        warnings += rotate(target, target.experiment.checkpoint.keep_last)
    return Saved(final, dist.gather_json(warnings, device, group)[0])


def prepare(temporary: Path, size: int) -> list[str]:
    """Make the folder to write into. StorageError if `size` bytes of tensors would not fit the disk with some room."""
    os.makedirs(temporary.parent, exist_ok=True)
    warnings = clean(temporary.parent)
    free = shutil.disk_usage(temporary.parent).free
    if free < ROOM * size:
        raise StorageError(f"{free / 2**20:,.1f} MiB are free, a checkpoint needs {ROOM * size / 2**20:,.1f}",
                           temporary.parent, "free some space")
    os.mkdir(temporary)
    return warnings


def write_rank(folder: Path, world: World, weights: Mapping[str, Tensor],
               optimizer: Sequence[StatePart]) -> dict[str, Any]:
    """This rank's files; their manifest entries, and the parts of tensors in them."""
    files, tensors = {}, []
    model_parts = [(name, name, 0, tensor) for name, tensor in weights.items()]
    optim_parts = [(f"{p.param}::{p.slot}", f"{p.param}::{p.slot}::{p.row0}", p.row0, p.tensor) for p in optimizer]
    for kind, parts in (("model", model_parts), ("optim", optim_parts)):
        if not parts:
            continue
        file = f"{kind}-{world.rank + 1:04d}-of-{world.size:04d}.safetensors"
        files[file], crcs = write_tensors(folder / file, {key: tensor for _, key, _, tensor in parts})
        for name, key, row0, tensor in parts:
            rows = tensor.size(0) if tensor.dim() else 1
            part = {"file": file, "key": key, "row0": row0, "rows": rows, "crc32": crcs[key]}
            tensors.append([name, DTYPE_NAMES[tensor.dtype], list(tensor.shape), part])
    return {"files": files, "tensors": tensors}


def write_manifest(folder: Path, target: Target, state: Mapping[str, Any], everyone: list[dict[str, Any]]) -> None:
    """What is rank 0's to write: state.json, config.json, and manifest.json, which makes a checkpoint of it all."""
    files: dict[str, Any] = {}
    for written in everyone:
        files.update(written["files"])
    if "position" in state:
        state = {**state, "position": merge_positions([written["position"] for written in everyone])}
    files[STATE] = write_json(folder / STATE, state)
    files[CONFIG] = write_json(folder / CONFIG, dump_experiment(target.experiment), indent=1)
    write_json(folder / MANIFEST, seal({
        "format": FORMAT, "version": VERSION, "step": state["step"], "nanopoe": nanopoe.__version__,
        "torch": torch.__version__, "world_size": target.world.size, "fingerprints": dict(target.fingerprints),
        "files": files, "tensors": whole_tensors(everyone)}))
    fsync_path(folder)


def whole_tensors(everyone: list[dict[str, Any]]) -> dict[str, Any]:
    """The manifest's entry of every tensor, from the parts that all ranks wrote."""
    found: dict[str, tuple[str, list[int], list[dict[str, Any]]]] = {}
    for written in everyone:
        for name, dtype, shape, part in written["tensors"]:
            if name not in found:
                found[name] = (dtype, shape, [part])
                continue
            assert (found[name][0], found[name][1][1:]) == (dtype, shape[1:]), f"{name} differs between ranks"
            found[name][1][0] += shape[0]
            found[name][2].append(part)
    return {name: tensor_entry(shape, dtype, parts) for name, (dtype, shape, parts) in found.items()}


def publish(temporary: Path, final: Path) -> list[str]:
    """Put the finished folder in place, durably, and open it; if that fails, all is as before. Returns warnings.

    What already is there under this step is set aside if all of it is good, and removed if it is damaged.
    """
    old = final.with_name(f".old-{final.name}")
    if os.path.lexists(final):
        os.rename(final, old)
    try:
        os.rename(temporary, final)
        fsync_path(final.parent)
        Checkpoint(final)
    except (OSError, CheckpointError) as error:
        with suppress(OSError):
            if not os.path.lexists(temporary):
                os.rename(final, temporary)
            if os.path.lexists(old):
                os.rename(old, final)
        if isinstance(error, CheckpointError):
            raise StorageError(f"what was just written reads back otherwise: {error.what}", error.where,
                               "the disk is bad") from error
        raise
    if not os.path.lexists(old):
        return []
    return set_aside_old(old, final) if is_whole(old) else discard(old)


def set_aside_old(old: Path, final: Path) -> list[str]:
    """Rename a replaced checkpoint to a name of its own; a warning where that fails."""
    try:
        os.rename(old, free_name(final.parent, "aside_{}_" + final.name))
    except OSError as error:
        return [f"{old} cannot be renamed: {error.strerror or error}"]
    return []


def is_whole(path: Path) -> bool:
    """Whether all of a checkpoint is as its manifest says."""
    try:
        Checkpoint(path).verify()
    except Exception:
        return False
    return True


# -- what is kept ----------------------------------------------------------------------------------------------------

def rotate(target: Target, keep_last: int | None) -> list[str]:
    """Remove what is older than the newest `keep_last` checkpoints that open: renamed first, then deleted.

    There stay: multiples of keep_every, those with a file KEEP, the source of the run, and damaged ones, which are
    nobody's to delete but the user's and count for nothing. Returns warnings; what cannot be removed is no failure.
    """
    if keep_last is None:
        return []
    run_dir, every = target.experiment.out, target.experiment.checkpoint.keep_every
    kept, warnings = 0, []
    for step in reversed(list_steps(run_dir)):
        folder = folder_of(run_dir, step)
        stays = step == target.source or (every is not None and step % every == 0) or (folder / PIN).exists()
        if kept >= keep_last and stays:
            continue
        if not opens(folder):
            continue
        kept += 1
        if kept > keep_last and not stays:
            warnings += discard(folder)
    return warnings


def discard(folder: Path) -> list[str]:
    """Rename to the trash, then delete; warnings where that fails."""
    trash = trash_of(folder)
    try:
        os.rename(folder, trash)
        fsync_path(folder.parent)
    except OSError as error:
        return [f"{folder} cannot be rotated away: {error.strerror or error}"]
    return remove(trash)


def clean(folder: Path) -> list[str]:
    """Put in order what a crash left in RUN/checkpoints, while no save is under way; warnings."""
    warnings = []
    for old in folder.glob(".old-step_*"):
        final = folder / old.name.removeprefix(".old-")
        if os.path.lexists(final):
            warnings += set_aside_old(old, final)
            continue
        try:
            os.rename(old, final)
        except OSError as error:
            warnings.append(f"{old} cannot be renamed: {error.strerror or error}")
    for left in [*folder.glob(".tmp-*"), *folder.glob(".trash-*")]:
        warnings += remove(left)
    return warnings


def set_aside_after(run_dir: str | Path, step: int) -> list[str]:
    """Rename the checkpoints of steps > `step`, so that none of them is taken for the newest; their new names.

    For a run that goes back: what it had learned later is another branch, kept until the user removes it.
    """
    names = []
    for later in (s for s in list_steps(run_dir) if s > step):
        folder = folder_of(run_dir, later)
        aside = free_name(folder.parent, "aside_{}_" + folder.name)
        os.rename(folder, aside)
        names.append(aside.name)
    if names:
        fsync_path(checkpoints_of(run_dir))
    return names


def set_bad(run_dir: str | Path, step: int) -> Path:
    """Rename a damaged checkpoint out of the way, for the user to look at; its new path."""
    folder = folder_of(run_dir, step)
    bad = free_name(folder.parent, f"bad_{folder.name}_{{}}")
    os.rename(folder, bad)
    fsync_path(folder.parent)
    return bad


def trash_of(folder: Path) -> Path:
    return folder.with_name(f".trash-{folder.name}-{secrets.token_hex(4)}")


def free_name(folder: Path, pattern: str) -> Path:
    """The first path in `folder` that is not taken, `pattern` with a number from 1."""
    return next(path for n in count(1) if not os.path.lexists(path := folder / pattern.format(n)))
