"""Checkpoints: whole or absent, altered ones refused by name, optimizer rows from any world size."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopoe.checkpoint import list_steps, open_checkpoint, save_checkpoint
from nanopoe.checkpoint.format import sha256_file
from nanopoe.checkpoint.store import folder_of
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, NanopoeError, StorageError
from nanopoe.optim import DistMuonAdamW
from nanopoe.optim.dist_muon_adamw import StatePart
from nanopoe.train import loop
from tests.ranks import experiment_dict, run_ranks
from tests.test_optim import groups, parameters

OPTIM = "optim-0001-of-0001.safetensors"
ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def run(data: Path, tmp_path: Path) -> dict[str, Any]:
    """The experiment of a run with checkpoints of steps 2 and 4."""
    cycle = experiment_dict(data, tmp_path)["schedule"]["cycles"][0] | {"steps": 4}
    experiment = experiment_dict(data, tmp_path / "run", **{"schedule.cycles": [cycle], "checkpoint.every": 2})
    loop.train(experiment_from_dict(experiment, "test"), ALONE)
    return experiment


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


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


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {n: t.clone() for n, t in tensors.items() if n != "lm_head.weight"}
    save_file(tensors, folder / "model.safetensors")
    refresh(folder, "model.safetensors")


def drop_optimizer_rows(folder: Path) -> None:
    rewrite_manifest(folder, lambda m: m["optimizer"].pop("lm_head.weight::exp_avg"))


def first_part(manifest: dict[str, Any]) -> dict[str, Any]:
    part: dict[str, Any] = manifest["optimizer"]["lm_head.weight::exp_avg"][0]
    return part


def symlink(folder: Path) -> None:
    (folder / "state.json").rename(folder.parent / "elsewhere.json")
    (folder / "state.json").symlink_to(folder.parent / "elsewhere.json")


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the weights": (lambda f: flip(f / "model.safetensors", -100), "model.safetensors"),
    "a flipped bit in the optimizer": (lambda f: flip(f / OPTIM, -100), OPTIM),
    "a cut file": (lambda f: cut(f / "model.safetensors", 64), "model.safetensors"),
    "an appended byte": (lambda f: (f / "state.json").open("a").write(" "), "state.json"),
    "a missing file": (lambda f: (f / OPTIM).unlink(), OPTIM),
    "an altered state": (lambda f: flip(f / "state.json", 30), "state.json"),
    "an altered config": (lambda f: flip(f / "config.json", 40), "config.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda f: cut(f / "manifest.json", 200), "manifest.json"),
    "a manifest of lists": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json"),
    "a newer format": (lambda f: rewrite_manifest(f, lambda m: m.update(version=99)), "version 99"),
    "a path outside": (lambda f: rewrite_manifest(
        f, lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": ""}})), "outside"),
    "a link": (symlink, "outside"),
    "a file of no size": (lambda f: rewrite_manifest(f, lambda m: m["files"][OPTIM].pop("bytes")), "bytes"),
    "a tensor of no shape": (lambda f: rewrite_manifest(f, lambda m: m["tensors"]["lm_head.weight"].update(shape="x")),
                             "shape is 'x'"),
    "rows before the first": (lambda f: rewrite_manifest(f, lambda m: first_part(m).update(row0=-3)), "row0 is '-3'"),
    "parts that are none": (lambda f: rewrite_manifest(f, lambda m: m["optimizer"].update(w=[None])), "malformed"),
    "fingerprints in a list": (lambda f: rewrite_manifest(f, lambda m: m.update(fingerprints=[])), "fingerprints is"),
    "another step's manifest": (lambda f: rewrite_manifest(f, lambda m: m.update(step=3)), "is of step 3"),
    "a missing tensor": (drop_tensor, "lm_head.weight"),
    "missing optimizer rows": (drop_optimizer_rows, "lm_head.weight::exp_avg"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(run: dict[str, Any], damage: str) -> None:
    spoil, named = DAMAGE[damage]
    folder = folder_of(run["run_dir"], 4)
    spoil(folder)
    with pytest.raises(CheckpointError) as caught:
        loop.build_run(experiment_from_dict(run, "test"), ALONE)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert list_steps(run["run_dir"]) == [2, 4]                       # nothing is removed
    with pytest.raises(NanopoeError):                                 # nor passed over: the choice is the user's
        loop.train(experiment_from_dict(run, "test"), ALONE)
    resumed = loop.train(experiment_from_dict({**run, "resume": {"step": 2}}, "test"), ALONE)      # control
    assert resumed.step == 4
    open_checkpoint(run["run_dir"], 4).load_model_tensors()           # and the damaged one was replaced by a good one


def test_the_message_names_the_step_before(run: dict[str, Any]) -> None:
    (folder_of(run["run_dir"], 4) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"the one before is step 2"):
        open_checkpoint(run["run_dir"])


def test_another_model_is_refused(run: dict[str, Any], data: Path) -> None:
    checkpoint = open_checkpoint(run["run_dir"], 4)
    other = experiment_from_dict({**run, "model": {**run["model"], "stage_heads": False}}, "test")
    built = loop.build_run(experiment_from_dict({**run, "resume": {"step": 4}}, "test"), ALONE)
    built.loader.close()
    from nanopoe.train.build import build_model

    with pytest.raises(CheckpointError, match=r"has unknown lm_head_stages\.0\.weight"):
        build_model(other, ALONE, built.compute, checkpoint)
    same = build_model(experiment_from_dict(run, "test"), ALONE, built.compute, checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), built.model.parameters(), strict=True))


def test_keep_last(data: Path, tmp_path: Path) -> None:
    experiment = experiment_dict(data, tmp_path / "a", **{"checkpoint.keep_last": 2})
    loop.train(experiment_from_dict(experiment, "test"), ALONE)
    assert list_steps(tmp_path / "a") == [7, 8]
    assert sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir()) == ["step_00000007", "step_00000008"]


def test_the_step_a_run_went_on_from_is_kept(data: Path, tmp_path: Path) -> None:
    """The command that names it must work again; a run that named none keeps the newest alone."""
    for step, kept in ((None, [8]), (4, [4, 8])):
        experiment = experiment_dict(data, tmp_path / str(step), **{"evaluation.every": None})
        loop.train(experiment_from_dict(experiment, "test"), ALONE)
        shutil.rmtree(folder_of(tmp_path / str(step), 8))
        experiment |= {"checkpoint": {"every": 1, "keep_last": 1}, "resume": {"step": step}}
        if step is None:
            shutil.rmtree(tmp_path / str(step) / "checkpoints")
        loop.train(experiment_from_dict(experiment, "test"), ALONE)
        assert list_steps(tmp_path / str(step)) == kept


def test_going_back_sets_later_checkpoints_aside(run: dict[str, Any]) -> None:
    """At once: a crash before the next save must not resume what was left behind, whose metrics are gone."""
    folder = folder_of(run["run_dir"], 4)
    before = (folder / "manifest.json").read_bytes()
    loop.train(experiment_from_dict(run, "test"), ALONE)                              # control: nothing to go back from
    assert list_steps(run["run_dir"]) == [2, 4]
    back = experiment_from_dict({**run, "resume": {"step": 2}}, "test")
    built = loop.build_run(back, ALONE)
    built.loader.close()
    assert list_steps(run["run_dir"]) == [2] and built.set_aside == ["aside_1_step_00000004"]
    assert loop.train(back, ALONE).step == 4
    assert list_steps(run["run_dir"]) == [2, 4]
    assert (folder.parent / "aside_1_step_00000004" / "manifest.json").read_bytes() == before       # nothing is lost
    assert loop.train(back, ALONE).set_aside == ["aside_2_step_00000004"]


def test_a_failed_save_leaves_what_was_there(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full at each of the writes in turn: a typed error, and every old checkpoint still opens."""
    import nanopoe.checkpoint.store as store

    experiment = experiment_from_dict(run, "test")
    model = {"w": torch.ones(3)}
    state = {"step": 4, "tokens": 0, "optimizer_steps": 0, "position": {}}
    for name in ("write_tensors", "write_json", "commit"):
        def full(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(store, name, full)
            with pytest.raises(StorageError, match="No space left"):
                save_checkpoint(run["run_dir"], experiment, ALONE, model, [], state, {}, None)
        assert open_checkpoint(run["run_dir"]).load_model_tensors().keys() != model.keys()
        assert not list(folder_of(run["run_dir"], 4).parent.glob(".t*")), "a full disk must not stay full"
    save_checkpoint(run["run_dir"], experiment, ALONE, model, [], state, {}, None)                 # control
    assert open_checkpoint(run["run_dir"]).load_model_tensors().keys() == model.keys()
    assert not list(folder_of(run["run_dir"], 4).parent.glob(".t*"))


def saved_by(world: World, run_dir: str, experiment: dict[str, Any]) -> None:
    params = parameters()
    optimizer = DistMuonAdamW(params, groups(), world.rank, world.size)
    for part in optimizer.state_parts():
        rows = torch.arange(part.row0, part.row0 + part.tensor.size(0)).float()
        part.tensor.copy_(rows.view(-1, *[1] * (part.tensor.dim() - 1)) + len(part.param))
    save_checkpoint(run_dir, experiment_from_dict(experiment, "test"), world, params, optimizer.state_parts(),
                    {"step": 1, "tokens": 0, "optimizer_steps": 1, "position": {}}, {}, None)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_optimizer_rows_do_not_depend_on_the_world_size(data: Path, tmp_path: Path, size: int) -> None:
    run_ranks(saved_by, size, str(tmp_path), experiment_dict(data, tmp_path))
    checkpoint = open_checkpoint(tmp_path, 1)
    for reader in (1, 2, 5):
        for rank in range(reader):
            optimizer = DistMuonAdamW(parameters(), groups(), rank, reader)
            optimizer.load_state(checkpoint.optimizer_rows, 1)
            for part in optimizer.state_parts():
                rows = torch.arange(part.row0, part.row0 + part.tensor.size(0)).float()
                expected = rows.view(-1, *[1] * (part.tensor.dim() - 1)) + len(part.param)
                assert torch.equal(part.tensor, expected.expand_as(part.tensor)), (part.param, part.slot)


def test_rows_there_twice_are_refused(data: Path, tmp_path: Path) -> None:
    parts = [StatePart("w", "exp_avg", 0, torch.ones(4, 2))]
    experiment = experiment_from_dict(experiment_dict(data, tmp_path), "test")
    state = {"step": 1, "tokens": 0, "optimizer_steps": 1, "position": {}}
    folder = save_checkpoint(tmp_path, experiment, ALONE, {"w": torch.ones(4, 2)}, parts, state, {}, None)
    assert torch.equal(open_checkpoint(tmp_path).optimizer_rows("w", "exp_avg", 1, 3), torch.ones(2, 2))
    rewrite_manifest(folder, lambda m: m["optimizer"]["w::exp_avg"].append(m["optimizer"]["w::exp_avg"][0]))
    with pytest.raises(CheckpointError, match="twice"):
        open_checkpoint(tmp_path).optimizer_rows("w", "exp_avg", 1, 3)
