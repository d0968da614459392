"""Damaged checkpoints: refused by name before a weight is used, fallen back from, set aside; another model's too."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nanopoe.checkpoint import Checkpoint, Target, digest, folder_of, list_steps, open_checkpoint, save_checkpoint
from nanopoe.checkpoint import store as storing
from nanopoe.checkpoint.container import read_header, write_tensors
from nanopoe.checkpoint.store import checkpoints_of, sha256_file
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, NanopoeError
from nanopoe.train import build, loop, restore
from tests.checkpoints import ALONE, MODEL, OPTIM, cut, flip, refresh, rewrite_manifest
from tests.ranks import experiment_dict, run_ranks


def steps_of(n: int, data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """An experiment of one cycle of n steps, with a checkpoint after every second."""
    cycle = experiment_dict(data, run_dir)["schedule"]["cycles"][0] | {"steps": n}
    return experiment_dict(data, run_dir, **{"schedule.cycles": [cycle], "checkpoint.every": 2, **changes})


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints of steps 2 and 4. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    loop.train(experiment_from_dict(steps_of(4, data, folder), "test"), ALONE)
    return folder


@pytest.fixture
def run(trained: Path, data: Path, tmp_path: Path) -> dict[str, Any]:
    """The experiment of a copy of that run."""
    shutil.copytree(trained, tmp_path / "run")
    return steps_of(4, data, tmp_path / "run")


def drop_tensor(folder: Path) -> None:
    """A file that is whole and in the manifest, but lacks a tensor."""
    tensors = {n.replace("lm_head.weight", "lm_head.wait"): t.clone() for n, t in load_file(folder / MODEL).items()}
    save_file(tensors, folder / MODEL)
    refresh(folder, MODEL)


def drop_state(folder: Path) -> None:
    tensors = {n: t.clone() for n, t in load_file(folder / OPTIM).items() if n != "lm_head.weight::exp_avg::0"}
    save_file(tensors, folder / OPTIM)
    rewrite_manifest(folder, lambda m: m["tensors"].pop("lm_head.weight::exp_avg"))
    refresh(folder, OPTIM)


def entry(manifest: dict[str, Any], name: str = "lm_head.weight::exp_avg") -> dict[str, Any]:
    found: dict[str, Any] = manifest["tensors"][name]
    return found


def part(manifest: dict[str, Any], **change: Any) -> None:
    entry(manifest)["parts"][0].update(change)


def cut_in_two(manifest: dict[str, Any], row: int) -> None:
    """The 320 rows of lm_head's exp_avg as [0, 150) and [row, ...)."""
    first = entry(manifest)["parts"][0]
    second = {**first, "row0": row, "rows": 150, "key": f"lm_head.weight::exp_avg::{row}"}
    entry(manifest)["parts"] = [{**first, "rows": 150}, second]


def relink(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / "elsewhere")
    (folder / name).symlink_to(folder.parent / "elsewhere")


def resealed(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return lambda folder: rewrite_manifest(folder, change)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit in the weights": (lambda f: flip(f / MODEL, -100), MODEL),
    "a flipped bit in the optimizer": (lambda f: flip(f / OPTIM, -100), OPTIM),
    "a flipped bit in a header": (lambda f: flip(f / OPTIM, 30), f"{OPTIM}: content .*in its header"),
    "a cut file": (lambda f: cut(f / MODEL, 64), f"{MODEL}: has"),
    "an appended byte": (lambda f: (f / "state.json").open("a").write(" "), "state.json"),
    "a missing file": (lambda f: (f / OPTIM).unlink(), f"{OPTIM}: missing"),
    "an altered state": (lambda f: flip(f / "state.json", 30), "state.json"),
    "an altered config": (lambda f: flip(f / "config.json", 40), "config.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json"),
    "half a manifest": (lambda f: cut(f / "manifest.json", 200), "manifest.json"),
    "a manifest of lists": (lambda f: (f / "manifest.json").write_text("[" * 100_000), "manifest.json"),
    "a deep manifest": (lambda f: (f / "manifest.json").write_text('{"a":' * 50 + "1" + "}" * 50), "deeper than 32"),
    "a manifest of NaN": (lambda f: (f / "manifest.json").write_text('{"step": NaN}'), "NaN"),
    "a manifest that is a link": (lambda f: relink(f, "manifest.json"), "is a link"),
    "a manifest that is a pipe": (lambda f: (os.unlink(f / "manifest.json"), os.mkfifo(f / "manifest.json")), "no fi"),
    "a space in the manifest": (lambda f: (f / "manifest.json").open("a").write(" "), "seal"),
    "a newer format": (resealed(lambda m: m.update(version=99)), "version 99"),
    "a path outside": (resealed(lambda m: m["files"].update({"../x": {"bytes": 1, "sha256": "0" * 64}})), "outside"),
    "a file in a folder": (resealed(lambda m: m["files"].update({"a/b": {"bytes": 1, "sha256": "0" * 64}})), "outside"),
    "a file of another kind": (resealed(lambda m: m["files"].update(x={"bytes": 1, "sha256": "0" * 64})), "no file of"),
    "a link": (lambda f: relink(f, "state.json"), "outside"),
    "a folder that is a link": (lambda f: relink(f.parent, f.name), "link"),
    "a folder for a file": (lambda f: ((f / OPTIM).unlink(), (f / OPTIM).mkdir()), "no file"),
    "a file of no size": (resealed(lambda m: m["files"][OPTIM].pop("bytes")), "bytes"),
    "a file of true bytes": (resealed(lambda m: m["files"][OPTIM].update(bytes=True)), "bytes is True"),
    "a huge JSON file": (resealed(lambda m: m["files"]["state.json"].update(bytes=1 << 40)), "over 64 MiB"),
    "no state": (resealed(lambda m: m["files"].pop("state.json")), "state.json"),
    "an idle file": (resealed(lambda m: m["files"].update({"x.safetensors": m["files"][OPTIM]})), "nothing is in x"),
    "a file not in the list": (resealed(lambda m: part(m, file="x.safetensors")), "x.safetensors is not in the list"),
    "a tensor of no shape": (resealed(lambda m: entry(m).update(shape="x")), "shape is 'x'"),
    "a tensor of a huge shape": (resealed(lambda m: entry(m).update(shape=[1 << 40, 1 << 40])), "shape is"),
    "a tensor larger than its file": (resealed(lambda m: (entry(m).update(shape=[300_000, 32]), part(m, rows=300_000))),
                                      "cannot hold"),
    "a negative dimension": (resealed(lambda m: entry(m).update(shape=[300, -32])), "shape is"),
    "a tensor of no dtype": (resealed(lambda m: entry(m).update(dtype="F31")), "dtype is 'F31'"),
    "a tensor of no parts": (resealed(lambda m: entry(m).update(parts=[])), "no parts"),
    "a tensor of a wild name": (resealed(lambda m: m["tensors"].update({"a b": entry(m)})), "named 'a b'"),
    "rows before the first": (resealed(lambda m: part(m, row0=-3)), "row0 is -3"),
    "rows that are missing": (resealed(lambda m: cut_in_two(m, 160)), "exp_avg: rows 150 to 159 are missing"),
    "rows there twice": (resealed(lambda m: cut_in_two(m, 140)), "exp_avg: rows 140 to 149 are there twice"),
    "rows missing at the end": (resealed(lambda m: part(m, rows=319)), "exp_avg: row 319 is missing"),
    "rows beyond the end": (resealed(lambda m: part(m, rows=321)), "exp_avg: row 320 is more"),
    "a foreign key": (resealed(lambda m: part(m, key="x")), "its key is x"),
    "parts that are none": (resealed(lambda m: entry(m).update(parts=[None])), "a part is None"),
    "fingerprints in a list": (resealed(lambda m: m.update(fingerprints=[])), "fingerprints is"),
    "another step's manifest": (resealed(lambda m: m.update(step=3)), "is of step 3"),
    "another step's folder": (lambda f: (shutil.rmtree(f), shutil.copytree(f.with_name("step_00000002"), f)), "step 2"),
    "another step's state": (lambda f: (shutil.copy(f.with_name("step_00000002") / "state.json", f),
                                        refresh(f, "state.json")), "is of step 2"),
    "another step's weights": (lambda f: shutil.copy(f.with_name("step_00000002") / MODEL, f), "not match its SHA-256"),
    "a missing tensor": (drop_tensor, "lm_head.wait is F32 .* the manifest says missing"),
    "a header bomb": (lambda f: ((f / OPTIM).write_bytes(b"\xff" * 7 + b"\x00" + bytes((f / OPTIM).stat().st_size - 8)),
                                 refresh(f, OPTIM)), "no safetensors file"),
    "a tensor too many": (resealed(lambda m: m["tensors"].pop("lm_head.weight::exp_avg")), "manifest says missing"),
    "missing optimizer state": (drop_state, "lacks lm_head.weight::exp_avg"),
    "foreign optimizer state": (lambda f: foreign_state(f), "unknown lm_head.weight::third"),
    "a missing field": (lambda f: ((f / "state.json").write_text('{"step": 4}'), refresh(f, "state.json")),
                        "state.json has no"),
}


def foreign_state(folder: Path) -> None:
    write_tensors(folder / "more.safetensors", {"lm_head.weight::third::0": torch.ones(2)})
    piece = {"file": "more.safetensors", "key": "lm_head.weight::third::0", "row0": 0, "rows": 2, "crc32": 0}
    more = {"lm_head.weight::third": {"dtype": "F32", "shape": [2], "parts": [piece]}}
    rewrite_manifest(folder, lambda m: (m["files"].update({"more.safetensors": {"bytes": 1, "sha256": "0" * 64}}),
                                        m["tensors"].update(more)))
    refresh(folder, "more.safetensors")


LATE = {"missing optimizer state", "foreign optimizer state", "a missing field"}    # whole, but not this model's


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_name(run: dict[str, Any], damage: str) -> None:
    spoil, named = DAMAGE[damage]
    spoil(folder_of(run["run_dir"], 4))
    with pytest.raises(CheckpointError) as caught:
        loop.build_run(experiment_from_dict(run, "test"), ALONE)
    assert re.search(named, str(caught.value)) and "\n" not in str(caught.value), caught.value
    if damage not in LATE:
        assert "the one before is step 2" in str(caught.value) and "resume.fallback=true" in str(caught.value)
    assert list_steps(run["run_dir"]) == [2, 4]                       # nothing is removed, nor passed over


def test_a_damaged_step_is_trained_again(run: dict[str, Any], trained: Path) -> None:
    flip(folder_of(run["run_dir"], 4) / MODEL, -100)
    with pytest.raises(NanopoeError):
        loop.train(experiment_from_dict(run, "test"), ALONE)
    resumed = loop.train(experiment_from_dict({**run, "resume": {"step": 2}}, "test"), ALONE)
    assert resumed.step == 4
    assert digest(open_checkpoint(run["run_dir"], 4)) == digest(open_checkpoint(trained, 4))


@pytest.mark.parametrize("spoil", [lambda f: flip(f / MODEL, -100), lambda f: (f / "manifest.json").unlink()])
def test_fallback_keeps_the_damaged_one_and_goes_on(run: dict[str, Any], trained: Path, spoil: Any) -> None:
    folder = folder_of(run["run_dir"], 4)
    spoil(folder)
    back = experiment_from_dict({**run, "resume": {"fallback": True}}, "test")
    built = loop.build_run(back, ALONE)
    built.loader.close()
    assert built.step == 2 and "bad_step_00000004_1; step 2 is next" in built.warnings[0]
    assert list_steps(run["run_dir"]) == [2] and folder.with_name("bad_step_00000004_1").is_dir()
    loop.train(back, ALONE)
    assert digest(open_checkpoint(run["run_dir"])) == digest(open_checkpoint(trained))
    for step in (2, 4):
        (folder_of(run["run_dir"], step) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="missing"):                         # never from nothing in silence
        loop.build_run(back, ALONE)
    assert list_steps(run["run_dir"]) == [2, 4]


def fallback_on(world: World, experiment: dict[str, Any]) -> tuple[str, int]:
    """The error without resume.fallback, and the step that is taken with it."""
    try:
        loop.build_run(experiment_from_dict(experiment, "test"), world)
    except CheckpointError as error:
        message = str(error)
    built = loop.build_run(experiment_from_dict({**experiment, "resume": {"fallback": True}}, "test"), world)
    built.loader.close()
    return message, built.step


def test_ranks_verify_their_shares_and_fall_back_together(run: dict[str, Any]) -> None:
    """The damaged file is the share of one of two ranks; both are told, and both go back."""
    flip(folder_of(run["run_dir"], 4) / OPTIM, -100)
    answers = run_ranks(fallback_on, 2, run)
    assert answers[0] == answers[1] and answers[0][1] == 2
    assert OPTIM in answers[0][0] and "resume.fallback=true" in answers[0][0]


def test_damage_is_located(run: dict[str, Any]) -> None:
    """By the CRC-32 of its part, the tensor and the rows."""
    folder = folder_of(run["run_dir"], 4)
    stored = read_header(folder / OPTIM)["lm_head.weight::exp_avg::0"]
    flip(folder / OPTIM, stored.offset + 10)
    with pytest.raises(CheckpointError, match=r"SHA-256, in lm_head\.weight::exp_avg rows 0 to 319;"):
        open_checkpoint(run["run_dir"], 4).verify()
    open_checkpoint(run["run_dir"], 2).verify()                                                    # control


def test_every_bit_of_a_manifest_counts(run: dict[str, Any]) -> None:
    path, draw = folder_of(run["run_dir"], 4) / "manifest.json", random.Random(0)
    whole = path.read_bytes()
    for _ in range(300):
        raw = bytearray(whole)
        raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
        path.write_bytes(raw)
        with pytest.raises(CheckpointError, match=r"manifest\.json"):
            Checkpoint(path.parent)
    path.write_bytes(whole)
    Checkpoint(path.parent)                                                                        # control


def test_each_rank_hashes_its_share_once(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr(storing, "sha256_file", lambda path: hashed.append(path.name) or sha256_file(path))
    shares = []
    for rank in range(3):
        hashed.clear()
        checkpoint = open_checkpoint(run["run_dir"], 4)
        checkpoint.verify(rank, 3)
        shares.append({name for name in hashed if name.endswith(".safetensors")})
        hashed.clear()
        checkpoint.mark_verified()
        checkpoint.load_model_tensors()
        assert hashed == []
    assert sorted(name for share in shares for name in share) == [MODEL, OPTIM]
    open_checkpoint(run["run_dir"], 4).load_model_tensors()                   # control: alone it trusts nobody
    assert hashed == [MODEL]


def test_a_file_that_shrinks_while_it_is_read_is_no_crash(run: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(run["run_dir"], 4)
    checkpoint.verify()
    os.truncate(checkpoint.path / MODEL, 5000)
    with pytest.raises(CheckpointError, match="ends too early"):
        checkpoint.load_model_tensors()


def test_another_model_is_refused(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(run["run_dir"], 4)
    other = experiment_from_dict({**run, "model": {**run["model"], "stage_heads": False}}, "test")
    wider = experiment_from_dict({**run, "model": {**run["model"], "n_embd": 64}}, "test")
    built = loop.build_run(experiment_from_dict({**run, "resume": {"step": 4}}, "test"), ALONE)
    built.loader.close()
    with monkeypatch.context() as patch:
        patch.setattr(build.GPT, "to_empty", lambda *_, **__: pytest.fail("memory was taken"))
        with pytest.raises(CheckpointError, match=r"has unknown lm_head_stages\.0\.weight"):
            build.build_model(other, ALONE, built.compute, checkpoint)
        with pytest.raises(CheckpointError, match=r"is F32 \[.*32\], the model has F32 \[.*64\]"):
            build.build_model(wider, ALONE, built.compute, checkpoint)
    less = {name: tensor for name, tensor in built.model.named_parameters() if name != "smear_lambda"}
    target = Target(experiment_from_dict(run, "test"), ALONE, {})
    saved = save_checkpoint(target, less, [], {"step": 6})
    with pytest.raises(CheckpointError, match="lacks smear_lambda;"):
        restore.load_weights(built.model, Checkpoint(saved.path))
    same = build.build_model(experiment_from_dict(run, "test"), ALONE, built.compute, checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(same.parameters(), built.model.parameters(), strict=True))


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


def test_the_step_a_run_went_on_from_is_kept(run: dict[str, Any]) -> None:
    """The command that names it must work again; a run that named none keeps the newest alone."""
    tight = {**run, "checkpoint": {"every": 1, "keep_last": 1}}
    loop.train(experiment_from_dict({**tight, "resume": {"step": 2}}, "test"), ALONE)
    assert list_steps(run["run_dir"]) == [2, 4]
    shutil.rmtree(checkpoints_of(run["run_dir"]))
    loop.train(experiment_from_dict(tight, "test"), ALONE)
    assert list_steps(run["run_dir"]) == [4]
