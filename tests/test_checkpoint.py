"""Checkpoints: files that the library reads too, tensors from any world size, what is kept and what goes."""

from __future__ import annotations

import errno
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopoe.checkpoint import Checkpoint, digest, folder_of, list_steps, open_checkpoint, rotate, save_checkpoint
from nanopoe.checkpoint import commit as committing
from nanopoe.checkpoint import store as storing
from nanopoe.checkpoint.container import read_header, read_rows, write_tensors
from nanopoe.checkpoint.store import checkpoints_of, sha256_file
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, StorageError
from nanopoe.optim import DistMuonAdamW
from nanopoe.train import restore
from tests.checkpoints import ALONE, MODEL, filled, flip, position_of, save_steps, saved_by, target_of
from tests.ranks import run_ranks
from tests.test_optim import groups, parameters

# -- files -----------------------------------------------------------------------------------------------------------

TENSORS = {"f32": torch.randn(3, 5), "bf16": torch.randn(7).bfloat16(), "i64": torch.arange(4),
           "none": torch.empty(0, 3), "scalar": torch.tensor(2.5), "bool": torch.tensor([True, False, True]),
           "turned": torch.randn(4, 6).T, "f16": torch.randn(1, 1, 3).half()}


def test_the_library_reads_what_we_write_and_we_what_it_writes(tmp_path: Path) -> None:
    entry_, crcs = write_tensors(tmp_path / "ours", TENSORS)
    assert entry_ == {"bytes": (tmp_path / "ours").stat().st_size, "sha256": sha256_file(tmp_path / "ours")}
    for name, tensor in load_file(tmp_path / "ours").items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name]), name
    save_file({n: t.contiguous() for n, t in TENSORS.items()}, tmp_path / "theirs")
    for path in (tmp_path / "ours", tmp_path / "theirs"):
        header = read_header(path)
        assert header.keys() == TENSORS.keys() == crcs.keys()
        for name, tensor in TENSORS.items():
            rows = tensor.size(0) if tensor.dim() else 1
            assert torch.equal(read_rows(path, header[name], 0, rows), tensor), name
        assert torch.equal(read_rows(path, header["f32"], 1, 3), TENSORS["f32"][1:3])
        assert all(stored.offset % 8 == 0 for stored in header.values() if stored.dtype == "I64")


def test_a_file_that_is_there_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "x", TENSORS)
    assert (tmp_path / "x").read_text() == "old"


def peak_of_writing(_: World, folder: str, copy: bool) -> int:
    """Bytes that the process's peak grows by when a tensor of 192 MiB is written (after a copy, as a control)."""
    import resource

    tensor = torch.ones(48 << 20)
    write_tensors(Path(folder) / "warm", {"x": torch.ones(8 << 20)})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_tensors(Path(folder) / "large", {"x": tensor.clone() if copy else tensor})
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10


def test_writing_needs_no_second_copy(tmp_path: Path) -> None:
    for copy, low, high in ((False, 0, 40 << 20), (True, 150 << 20, 300 << 20)):
        folder = tmp_path / str(copy)
        folder.mkdir()
        assert low <= run_ranks(peak_of_writing, 1, str(folder), copy)[0] <= high


def test_weights_are_shared_out_by_bytes() -> None:
    draw = random.Random(0)
    sizes = {f"w{i}": draw.choice([4, 400, 4000, 100_000]) for i in range(200)}
    for world_size in (1, 3, 4, 12):
        owners = committing.share_weights(sizes, world_size)
        shuffled = dict(sorted(sizes.items(), key=lambda _: draw.random()))
        assert owners == committing.share_weights(shuffled, world_size) and owners.keys() == sizes.keys()
        loads = [sum(size for name, size in sizes.items() if owners[name] == rank) for rank in range(world_size)]
        assert max(loads) - min(loads) <= max(sizes.values())
    assert set(committing.share_weights({"a": 1}, 4).values()) == {0}


# -- any world size --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 3, 4])
def test_tensors_do_not_depend_on_the_world_size(tmp_path: Path, size: int) -> None:
    alone = saved_by(ALONE, str(tmp_path / "alone"))
    assert run_ranks(saved_by, size, str(tmp_path / "run")) == [alone] * size
    checkpoint = open_checkpoint(tmp_path / "run", 1)
    read_back(checkpoint)
    writers = {item.file for e in checkpoint.weights.values() for item in e.parts}
    assert len(writers) == size and {"untrained", "constant"} <= checkpoint.weights.keys()
    assert checkpoint.state["position"]["lanes"] == {str(n): n * n for n in range(12)}
    assert torch.equal(checkpoint.read("rows"), parameters()["rows"]) and checkpoint.read("constant") == 7


def read_back(checkpoint: Checkpoint) -> None:
    """Every rank of many world sizes gets its rows."""
    for reader in (1, 2, 3, 4, 5, 8, 16):
        for rank in range(reader):
            optimizer = DistMuonAdamW(parameters(), groups(), rank, reader)
            optimizer.load_state(checkpoint.optimizer_rows, 1)
            restore.check_state(optimizer, checkpoint)
            for item, wanted in zip(optimizer.state_parts(),
                                    filled(World(rank, reader, ALONE.device)).state_parts(), strict=True):
                assert torch.equal(item.tensor, wanted.tensor), (item.param, item.slot)


def test_saved_by_twelve_simulated_ranks(tmp_path: Path) -> None:
    """Each rank's files as it would write them, one rank after the other."""
    alone = saved_by(ALONE, str(tmp_path / "alone"))
    weights = {**parameters(), "untrained": torch.tensor([2.0, 3.0]), "constant": torch.tensor(7.0)}
    folder, written = folder_of(tmp_path, 1), []
    folder.mkdir(parents=True)
    for rank in range(12):
        world = World(rank, 12, ALONE.device)
        own = committing.own_weights(weights, world)
        written.append({**committing.write_rank(folder, world, own, list(filled(world).state_parts())),
                        "position": position_of(world)})
    state = {"step": 1, "tokens": 7, "optimizer_steps": 1, "position": None}
    committing.write_manifest(folder, target_of(tmp_path, World(0, 12, ALONE.device)), state, written)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.manifest.world_size == 12 and len(list(folder.glob("optim-*-of-0012.safetensors"))) > 6
    assert digest(checkpoint) == alone
    read_back(checkpoint)


def test_the_digest_sees_every_kind_of_change(tmp_path: Path) -> None:
    digests = {change: saved_by(ALONE, str(tmp_path / str(change)), change)
               for change in (None, "weight", "state", "tokens")}
    assert len(set(digests.values())) == 4
    names = []
    for name, tensor in (("w", torch.zeros(6)), ("v", torch.zeros(6)), ("w", torch.zeros(2, 3)),
                         ("w", torch.zeros(6, dtype=torch.int32))):
        saved = save_checkpoint(target_of(tmp_path / str(len(names))), {name: tensor}, [], {"step": 1})
        names.append(digest(Checkpoint(saved.path)))
    assert len(set(names)) == 4


def test_only_the_rows_that_are_needed_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved_by(ALONE, str(tmp_path))
    checkpoint = open_checkpoint(tmp_path, 1)
    checkpoint.verify()
    read: list[int] = []
    monkeypatch.setattr(storing, "read_rows", lambda *a: read.append(a[3] - a[2]) or read_rows(*a))
    assert torch.equal(checkpoint.read("rows", 30, 40), parameters()["rows"][30:40])
    assert read == [10]
    with pytest.raises(CheckpointError, match="rows has 127 rows, 128 are needed"):
        checkpoint.read("rows", 100, 128)
    with pytest.raises(CheckpointError, match="lacks rows::third"):
        checkpoint.optimizer_rows("rows", "third", 0, 1)


# -- what is kept ----------------------------------------------------------------------------------------------------

def test_rotation(tmp_path: Path) -> None:
    save_steps(tmp_path, *range(1, 8))
    assert list_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]                                            # control: keep all
    (folder_of(tmp_path, 1) / "KEEP").touch()
    (folder_of(tmp_path, 5) / "manifest.json").unlink()
    (folder_of(tmp_path, 7) / "state.json").unlink()
    target = target_of(tmp_path, source=2, **{"checkpoint.keep_every": 3})
    assert rotate(target, 2) == []
    # 4 and 6 are the newest two that open, 5 and 7 damaged, 1 pinned, 2 the source, 3 a multiple
    assert list_steps(tmp_path) == [1, 2, 3, 4, 5, 6, 7]
    assert rotate(target, 1) == [] and list_steps(tmp_path) == [1, 2, 3, 5, 6, 7]
    assert rotate(target_of(tmp_path), 1) == [] and list_steps(tmp_path) == [1, 5, 6, 7]
    (folder_of(tmp_path, 6) / "manifest.json").unlink()
    assert rotate(target_of(tmp_path), 1) == [] and list_steps(tmp_path) == [1, 5, 6, 7], "the last that opens stays"
    assert sorted(p.name for p in checkpoints_of(tmp_path).iterdir()) == [f"step_{s:08d}" for s in (1, 5, 6, 7)]


def test_what_cannot_be_deleted_is_told_and_stops_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2, **{"checkpoint.keep_last": 2})

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        warnings = save_steps(tmp_path, 3, **{"checkpoint.keep_last": 2})
    assert len(warnings) == 1 and "cannot be deleted: Operation not permitted" in warnings[0]
    assert list_steps(tmp_path) == [2, 3]
    assert save_steps(tmp_path, 4, **{"checkpoint.keep_last": 2}) == []                # and the next save cleans up
    assert sorted(p.name for p in checkpoints_of(tmp_path).iterdir()) == ["step_00000003", "step_00000004"]


def test_a_step_saved_again_sets_the_good_one_aside(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 1)
    names = sorted(p.name for p in checkpoints_of(tmp_path).iterdir())
    assert names == ["aside_1_step_00000001", "step_00000001"]
    flip(folder_of(tmp_path, 1) / MODEL, -1)
    save_steps(tmp_path, 1)                                                             # control: a damaged one goes
    assert sorted(p.name for p in checkpoints_of(tmp_path).iterdir()) == names
    open_checkpoint(tmp_path).verify()


def test_no_room_is_told_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, **{"checkpoint.keep_last": 1})
    large, usage = {"w": torch.zeros(1 << 20)}, shutil.disk_usage(tmp_path)
    for free, fits in ((4 << 20, False), (5 << 20, True)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage._replace(free=free))
        if not fits:
            with pytest.raises(StorageError, match=r"4\.0 MiB are free, a checkpoint needs 4\.8; free some space"):
                save_checkpoint(target_of(tmp_path), large, [], {"step": 2})
            assert [p.name for p in checkpoints_of(tmp_path).iterdir()] == ["step_00000001"]
        else:
            save_checkpoint(target_of(tmp_path), large, [], {"step": 2})
