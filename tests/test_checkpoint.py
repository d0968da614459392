"""Checkpoints: whole or absent at every instant, altered ones refused by name, tensors from any world size."""

from __future__ import annotations

import errno
import json
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

from nanopoe import dist
from nanopoe.checkpoint import (
    Checkpoint,
    Target,
    clean,
    digest,
    folder_of,
    list_steps,
    open_checkpoint,
    rotate,
    run_lock,
    save_checkpoint,
)
from nanopoe.checkpoint import commit as committing
from nanopoe.checkpoint import store as storing
from nanopoe.checkpoint.container import read_header, read_rows, write_tensors
from nanopoe.checkpoint.format import seal
from nanopoe.checkpoint.store import checkpoints_of, sha256_file
from nanopoe.config import Experiment, experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError, NanopoeError, StorageError
from nanopoe.optim import DistMuonAdamW
from nanopoe.optim.dist_muon_adamw import StatePart
from nanopoe.train import build, loop, restore
from tests.ranks import experiment_dict, run_ranks
from tests.test_optim import groups, parameters

MODEL = "model-0001-of-0001.safetensors"
OPTIM = "optim-0001-of-0001.safetensors"
ALONE = World(0, 1, torch.device("cpu"))


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

def save_steps(run_dir: Path, *steps: int, **changes: Any) -> list[str]:
    warnings = []
    for step in steps:
        target = target_of(run_dir, **changes)
        warnings += save_checkpoint(target, {"w": torch.full((3,), float(step))}, [], {"step": step}).warnings
    return warnings


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
            with pytest.raises(StorageError, match="4 MiB are free, a checkpoint needs 5; free some space"):
                save_checkpoint(target_of(tmp_path), large, [], {"step": 2})
            assert [p.name for p in checkpoints_of(tmp_path).iterdir()] == ["step_00000001"]
        else:
            save_checkpoint(target_of(tmp_path), large, [], {"step": 2})


# -- a disk that refuses, a process that dies ------------------------------------------------------------------------

class Died(BaseException):
    """The process is gone: nothing after this changes the disk."""


class Disk:
    """Counts what changes the disk. From the `at`-th change on it refuses with `code` (just once, or always), or the
    process is dead."""

    def __init__(self, patch: pytest.MonkeyPatch, at: int = 0, code: int | None = None, once: bool = False):
        self.changes, self.at, self.code, self.once = 0, at, code, once
        for name in ("open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            patch.setattr(os, name, self.shim(name, getattr(os, name)))

    def shim(self, name: str, real: Any) -> Any:
        def call(*args: Any, **kw: Any) -> Any:
            if (name == "open" and not args[1] & os.O_CREAT) or (self.code and name in ("unlink", "rmdir")):
                return real(*args, **kw)
            self.changes += 1
            if self.at and (self.changes == self.at or (self.changes > self.at and not self.once)):
                if self.code is None:
                    raise Died
                raise OSError(self.code, os.strerror(self.code))
            return real(*args, **kw)
        return call


def save_over(run_dir: Path, step: int) -> list[str]:
    parts = [StatePart("w", "exp_avg", 0, torch.full((3,), 0.5))]
    target = target_of(run_dir, **{"checkpoint.keep_last": 2})
    return save_checkpoint(target, {"w": torch.full((3,), -float(step))}, parts, {"step": step}).warnings


@pytest.fixture(params=["next", "again", "over a damaged one"])
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, int, list[str]]:
    """A run with checkpoints 2 and 4, a step to save, and the digests there may be of the newest afterwards."""
    base = tmp_path / "base"
    save_steps(base, 2, 4)
    before = [digest(open_checkpoint(base, 4)), digest(open_checkpoint(base, 2))]
    if request.param == "over a damaged one":
        flip(folder_of(base, 4) / MODEL, -1)
    step = 6 if request.param == "next" else 4
    after = tmp_path / "after"
    shutil.copytree(base, after)
    save_over(after, step)
    return base, step, [*before, digest(open_checkpoint(after))]


def whole_folders(run_dir: Path) -> int:
    return sum(committing.is_whole(p) for p in checkpoints_of(run_dir).iterdir()
               if not p.name.startswith((".tmp", ".trash")))


def test_death_at_every_change_leaves_whole_checkpoints(scene: tuple[Path, int, list[str]], tmp_path: Path) -> None:
    base, step, known = scene
    changes, seen = 1, set()
    for at in range(1, 1000):
        run_dir = tmp_path / str(at)
        shutil.copytree(base, run_dir)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at)
            try:
                save_over(run_dir, step)
                break
            except Died:
                changes = disk.changes
        assert whole_folders(run_dir) >= 1
        clean(checkpoints_of(run_dir))                                           # the next life begins
        found = next(s for s in reversed(list_steps(run_dir)) if committing.is_whole(folder_of(run_dir, s)))
        seen.add(known.index(digest(open_checkpoint(run_dir, found))))
        assert not [p for p in checkpoints_of(run_dir).iterdir() if p.name.startswith(".")]
        assert committing.is_whole(folder_of(run_dir, 2)) or found > 4, "the one before goes after a newer has come"
        save_over(run_dir, 8)
        assert committing.is_whole(folder_of(run_dir, 8))
    assert at > 20 and changes >= at - 1, "every change was tried"
    assert 2 in seen and len(seen) == 2, "it died before the commit and after it"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("once", [True, False])
def test_a_disk_that_refuses_at_every_change(scene: tuple[Path, int, list[str]], tmp_path: Path, code: int,
                                             once: bool) -> None:
    """Once: the save is tried again and succeeds. Always: a typed error, and what was there is there."""
    base, step, known = scene
    failed = unsure = 0
    for at in range(1, 1000):
        run_dir = tmp_path / str(at)
        shutil.copytree(base, run_dir)
        with pytest.MonkeyPatch.context() as patch:
            disk = Disk(patch, at, code, once)
            try:
                save_over(run_dir, step)
                ended = True
            except StorageError as error:
                ended, message = False, str(error)
        if not ended:
            failed += 1
            assert os.strerror(code) in message and not once
        left = [p.name for p in checkpoints_of(run_dir).iterdir() if p.name.startswith(".tmp")]
        assert left == [], "a full disk must not stay full"
        clean(checkpoints_of(run_dir))
        newest = next(s for s in reversed(list_steps(run_dir)) if committing.is_whole(folder_of(run_dir, s)))
        found = known.index(digest(open_checkpoint(run_dir, newest)))
        assert found == 2 or not ended
        unsure += found == 2 and not ended
        if disk.changes < at:
            break
    assert at > 20 and (failed > 10) == (not once)
    assert unsure <= 1, "it is there, but its folder's fsync was refused, and so was to take it back"


def test_a_storage_failure_keeps_one_fewer_and_tries_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1, 2, 3, **{"checkpoint.keep_last": 3})
    tries, write_rank = [], committing.write_rank

    def full(*args: Any) -> Any:
        tries.append(list_steps(tmp_path))
        if len(tries) == 1:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return write_rank(*args)

    monkeypatch.setattr(committing, "write_rank", full)
    warnings = save_steps(tmp_path, 4, **{"checkpoint.keep_last": 3})
    assert tries == [[1, 2, 3], [2, 3]] and list_steps(tmp_path) == [2, 3, 4]
    assert warnings == ["the checkpoint of step 4 was refused (Disk quota exceeded), and tried again"]


def test_other_errors_are_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def bug(*_: Any) -> None:
        tries.append(1)
        raise ZeroDivisionError

    monkeypatch.setattr(committing, "write_rank", bug)
    with pytest.raises(ZeroDivisionError):
        save_steps(tmp_path, 1)
    assert tries == [1] and list(checkpoints_of(tmp_path).iterdir()) == []


def refused_on_one_rank(world: World, run_dir: str, bad_rank: int) -> str:
    real = committing.write_rank

    def full(*args: Any) -> Any:
        if world.rank == bad_rank:
            raise OSError(errno.ENOSPC, "No space left on device", "x")
        return real(*args)

    committing.write_rank = full
    try:
        save_checkpoint(target_of(run_dir, world), {"w": torch.ones(3), "v": torch.ones(2)}, [], {"step": 1})
    except StorageError as error:
        return str(error)
    return "saved"


def test_all_ranks_abandon_together(tmp_path: Path) -> None:
    for bad_rank in (0, 1):
        answers = run_ranks(refused_on_one_rank, 2, str(tmp_path), bad_rank)
        assert answers[0] == answers[1] and f"rank {bad_rank}: x: No space left" in answers[0]
        assert list(checkpoints_of(tmp_path).iterdir()) == []
    assert run_ranks(refused_on_one_rank, 2, str(tmp_path), -1) == ["saved", "saved"]                # control


# -- two jobs --------------------------------------------------------------------------------------------------------

def test_a_second_job_is_refused(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run", ALONE) as warnings:
        assert warnings == []
        held = rf"another job trains in this folder: pid {os.getpid()} on .* since 20"
        with pytest.raises(ConfigError, match=held), run_lock(tmp_path / "run", ALONE):
            pass
    with run_lock(tmp_path / "run", ALONE):                                          # control: it is let go of
        pass
    (tmp_path / "run" / ".lock").write_text('{"host": "gone", "pid": 1, "since": "then"}')
    with run_lock(tmp_path / "run", ALONE) as warnings:                              # of a dead job: without a word
        assert warnings == [] and "gone" not in (tmp_path / "run" / ".lock").read_text()


def locked(world: World, run_dir: str) -> str:
    try:
        with run_lock(run_dir, world):
            dist.barrier()
            return "held"
    except ConfigError as error:
        return str(error)


def test_the_lock_is_for_all_ranks(tmp_path: Path) -> None:
    assert run_ranks(locked, 2, str(tmp_path)) == ["held", "held"]
    with run_lock(tmp_path, ALONE):
        answers = run_ranks(locked, 2, str(tmp_path))
    assert answers[0] == answers[1] and "another job trains in this folder" in answers[0]


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanopoe.checkpoint import lock

    def refuse(code: int) -> Callable[..., None]:
        def flock(*_: Any) -> None:
            raise OSError(code, os.strerror(code))
        return flock

    monkeypatch.setattr(lock.fcntl, "flock", refuse(errno.ENOLCK))
    with run_lock(tmp_path, ALONE) as warnings:
        assert "without locks" in warnings[0]
    monkeypatch.setattr(lock.fcntl, "flock", refuse(errno.EIO))                                      # control
    with pytest.raises(StorageError), run_lock(tmp_path, ALONE):
        pass
