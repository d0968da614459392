"""Moving in: what nanochat wrote becomes a run that everything reads; what is no such thing is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopoe.checkpoint import digest, open_checkpoint
from nanopoe.checkpoint.foreign import open_foreign
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from nanopoe.train import loop
from nanopoe.train.restore import load_cascade
from tests.commands import ROOT, contents, refused, write_yaml
from tests.exports import load
from tests.models import live_model
from tests.ranks import experiment_dict, model_config
from tests.rows import chat_shards
from tests.test_specialist import specialist_dict

ALONE = World(0, 1, torch.device("cpu"))
BP = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}
SHORT = {"schedule.cycles.0.steps": 2, "schedule.cycles.0.warmdown_ratio": 0.0, "evaluation.every": None,
         "schedule.cycles.1.steps": 2, "schedule.cycles.1.warmdown_ratio": 0.0, "checkpoint.every": None}
TOLD = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd", "window_pattern")
Model = dict[str, Tensor]


def bp_model(seed: int = 0) -> GPT:
    return live_model(model_config(poe_mode="none", poe_every=None), seed)


def meta_of(step: int, model: GPT, **changes: Any) -> dict[str, Any]:
    """As nanochat writes it: its best loss is Infinity before the first evaluation."""
    told = {key: getattr(model.config, key) for key in TOLD}
    return {"step": step, "val_bpb": None, "model_config": told | changes, "user_config": {"depth": 4},
            "loop_state": {"min_val_bpb": float("inf")}}


def write_source(folder: Path, *steps: int, seed: int = 0) -> Model:
    """A nanochat folder: compiled names, bfloat16 embeddings, optimizer shards. The last state dict as it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    for step in steps:
        model = bp_model(seed + step)
        held = {name: p.detach().bfloat16() if "embed" in name or "wte" in name else p.detach()
                for name, p in model.state_dict().items()}
        torch.save({f"_orig_mod.{name}": tensor for name, tensor in held.items()}, folder / f"model_{step:06d}.pt")
        (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta_of(step, model)))
        (folder / f"optim_{step:06d}_rank0.pt").write_bytes(b"never read")
    return held


@pytest.fixture
def source(tmp_path: Path) -> Path:
    write_source(tmp_path / "d4", 20)
    return tmp_path / "d4"


@pytest.fixture
def config(data: Path, tmp_path: Path) -> Path:
    """The experiment of the import: BP on the tiny data, into run/."""
    return write_yaml(tmp_path / "bp.yaml", experiment_dict(data, tmp_path / "run", **BP, **SHORT))


def resaved(source: Path, change: Callable[[Model], Any]) -> None:
    """The state dict of the source with a change, saved again."""
    path = source / "model_000020.pt"
    held = torch.load(path, weights_only=True)
    changed = change(held)
    torch.save(held if changed is None else changed, path)


def retold(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = source / "meta_000020.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


# -- the reference's model --------------------------------------------------------------------------------------------

@torch.no_grad()
def test_golden_comes_in_and_goes_out(golden: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """Its logits are the reference trainer's, from our checkpoint and from the export of it."""
    pairs = [bytes([97 + i // 20, 97 + i % 20]) for i in range(512 - 9 - 256)]
    Tokenizer({bytes([i]): i for i in range(256)} | {pair: 256 + i for i, pair in enumerate(pairs)}).save(
        tmp_path / "tokenizer")
    shape = {f"model.{key}": value for key, value in json.loads((golden / "config.json").read_text())["model"].items()}
    experiment = experiment_dict(data, tmp_path / "run", **{
        **BP, **shape, "batch.tokens_per_step": 2048, "tokenizer": str(tmp_path / "tokenizer")})
    done = command("import_checkpoint", golden / "init.safetensors", write_yaml(tmp_path / "bp.yaml", experiment))
    assert done.code == 0 and "35 tensors taken: 35 of float32\nstep 0 imported" in done.out, done
    expect, ids = load_file(golden / "expect.safetensors")["logits"], load_file(golden / "batch.safetensors")["batch0"]
    ours = load_cascade(tmp_path / "run", None, ALONE).model
    assert command("export_hf", tmp_path / "run", "--out", tmp_path / "hub", "--dtype", "float32").code == 0
    theirs = load(tmp_path / "hub")
    for name, logits in (("ours", ours(ids[:, :-1])), ("exported", theirs(ids[:, :-1]).logits)):
        error = float((logits - expect).norm() / expect.norm())
        print(f"{name}: relative {error:.2e}, largest {float((logits - expect).abs().max()):.2e}")
        assert error <= 1e-6, name
    for name, tensor in load_file(golden / "init.safetensors").items():
        assert torch.equal(ours.get_parameter(name), tensor), name
    ours.smear_lambda.add_(0.1)                                          # control: one number of 1,048,658 is seen
    assert (ours(ids[:, :-1]) - expect).norm() / expect.norm() > 1e-4


# -- nanochat's files -------------------------------------------------------------------------------------------------

def test_a_nanochat_folder_is_a_run(tmp_path: Path, config: Path, command: Any) -> None:
    held = write_source(tmp_path / "d4", 5, 20)
    before = contents(tmp_path / "d4")
    longer = "schedule.cycles.0.steps=50"
    done = command("import_checkpoint", tmp_path / "d4", config, longer)
    assert (done.code, done.err) == (0, ""), done
    assert "35 tensors taken: 3 of bfloat16, 32 of float32" in done.out
    assert "not taken: optim_000020_rank0.pt" in done.out and "step 20 imported to" in done.out
    checkpoint = open_checkpoint(tmp_path / "run")
    checkpoint.verify()
    assert checkpoint.weights.keys() == held.keys() and not checkpoint.optimizer_state
    for name, tensor in held.items():
        assert checkpoint.read(name).dtype == torch.float32 and torch.equal(checkpoint.read(name), tensor.float()), name
    assert contents(tmp_path / "d4") == before
    done = command("evaluate", tmp_path / "run", "--no-speed", "--tokens", "256", "--calibration-tokens", "64")
    assert done.code == 0, done
    said = command("generate", tmp_path / "run", "a", "--tokens", "3", "--json")
    assert said.code == 0 and json.loads(said.out)["step"] == 20, said
    older = command("import_checkpoint", tmp_path / "d4", config, f"run_dir={tmp_path / 'older'}", "--step", "5")
    assert older.code == 0, older
    assert digest(open_checkpoint(tmp_path / "older")) != digest(checkpoint)                     # control
    refused(command("train", config, longer), 4, "checkpoint",
            "holds imported weights alone; name this run in init_from of another")


def test_a_poe_state_dict_keeps_its_stages(data: Path, tmp_path: Path, command: Any) -> None:
    model = live_model(model_config(poe_every=None, poe_stage_layers=(3, 1), stage_heads=True))
    save_file(dict(model.state_dict()), tmp_path / "poe.safetensors")
    told = meta_of(9, model, poe_mode="flat", poe_stage_layers=[3, 1], stage_heads=True, poe_every=None)
    (tmp_path / "told.json").write_text(json.dumps(told))
    other = write_yaml(tmp_path / "other.yaml", experiment_dict(data, tmp_path / "run"))           # two stages of 2
    named = ("--meta", tmp_path / "told.json")
    refused(command("import_checkpoint", tmp_path / "poe.safetensors", other), 4, "checkpoint", "config.json: missing")
    refused(command("import_checkpoint", tmp_path / "poe.safetensors", other, *named), 2, "config",
            r"poe_stage_layers: \[3, 1\] there, null in the experiment; model.poe_stage_layers=\[3,1\] takes it over")
    done = command("import_checkpoint", tmp_path / "poe.safetensors", other, "model.poe_stage_layers=[3,1]",
                   "model.poe_every=null", *named)
    assert done.code == 0, done
    ids = torch.randint(0, 290, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        loaded = load_cascade(tmp_path / "run", 9, ALONE).model
        assert torch.equal(loaded(ids), model(ids))
        loaded.lm_head_stages[0].weight.zero_()
        assert not torch.equal(loaded(ids), model(ids))                                          # control


def test_a_dry_run_shows_all_and_writes_nothing(source: Path, tmp_path: Path, config: Path, command: Any) -> None:
    done = command("import_checkpoint", source, config, "--dry-run")
    assert (done.code, done.err) == (0, "") and "step 20 would be imported to" in done.out, done
    assert "transformer.wte.weight               bfloat16 320 x 32  float32 320 x 32  taken\n" in done.out
    assert sum(line.endswith("taken") for line in done.out.splitlines()) == 35

    def damage(held: Model) -> None:
        held["extra"] = held.pop("_orig_mod.smear_lambda")

    resaved(source, damage)
    done = command("import_checkpoint", source, config, "--dry-run")
    assert done.code == 4 and "missing\n" in done.out and "unknown\n" in done.out, done
    assert not (tmp_path / "run").exists()


def test_what_is_missing_is_initialised_only_if_named(source: Path, tmp_path: Path, config: Path, command: Any) -> None:
    gone = ["backout_lambda", "smear_gate.weight", "smear_lambda"]
    resaved(source, lambda held: {key: t for key, t in held.items() if key.removeprefix("_orig_mod.") not in gone})
    refused(command("import_checkpoint", source, config), 4, "checkpoint",
            "lacks: smear_gate.weight, smear_lambda, backout_lambda; .*--allow-missing")
    refused(command("import_checkpoint", source, config, "--allow-missing", "smear_*"), 4, "checkpoint",
            "lacks: backout_lambda;")
    refused(command("import_checkpoint", source, config, "--allow-missing", "smear_*", "lm_head*"), 2, "config",
            r"nothing that is missing is named 'lm_head\*'")
    done = command("import_checkpoint", source, config, "--allow-missing", "smear_*", "backout_lambda")
    assert done.code == 0 and "3 initialised: smear_gate.weight, smear_lambda, backout_lambda" in done.out, done
    checkpoint, new = open_checkpoint(tmp_path / "run"), GPT(bp_model().config)
    new.init_weights(7)                                                  # the experiment's seed
    for name in gone:
        assert torch.equal(checkpoint.read(name), new.get_parameter(name)), name
    assert sorted(checkpoint.state["imported"]["initialised"]) == gone


def test_bp_weights_become_a_poe(source: Path, data: Path, tmp_path: Path, command: Any) -> None:
    """The experiment adds the stages: heads at zero, so the last stage is the BP model without its backout."""
    config = write_yaml(tmp_path / "poe.yaml", experiment_dict(data, tmp_path / "run"))
    refused(command("import_checkpoint", source, config), 4, "checkpoint", "lacks: lm_head_stages.0.weight, lm_head_")
    done = command("import_checkpoint", source, config, "--allow-missing", "lm_head_stages.*")
    assert done.code == 0 and "2 initialised: lm_head_stages.0.weight, lm_head_stages.1.weight" in done.out, done
    assert "not said by meta_000020.json, so as in the experiment: poe_mode=flat, poe_every=2, " in done.out, done
    bp, ids = bp_model(20), torch.randint(0, 290, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        bp.load_state_dict({name: p.bfloat16().float() if "embed" in name or "wte" in name else p
                            for name, p in bp.state_dict().items()})
        poe = load_cascade(tmp_path / "run", None, ALONE).model
        last = poe.stage_logits(poe.boundary_states(ids)[-1], 1)
        assert not torch.equal(last, bp(ids))                            # control: the backout is no small thing
        bp.backout_lambda.zero_()
        assert torch.equal(last, bp(ids))


# -- what is refused --------------------------------------------------------------------------------------------------

class Caller:
    """Unpickled by a loader that calls what it is told, it makes a folder."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_that_calls_is_not_run(source: Path, tmp_path: Path, config: Path, command: Any) -> None:
    mark = tmp_path / "called"
    resaved(source, lambda held: held.update(extra=Caller(mark)))
    refused(command("import_checkpoint", source, config), 4, "checkpoint", r"asks for \w+\.mkdir to be called; only te")
    assert not mark.exists() and not (tmp_path / "run").exists()
    torch.load(source / "model_000020.pt", weights_only=False)
    assert mark.exists()                                                 # control: it does call


def compressed(source: Path) -> None:
    path = source / "model_000020.pt"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def cut(source: Path) -> None:
    path = source / "model_000020.pt"
    path.write_bytes(path.read_bytes()[:-500])


def linked(source: Path) -> None:
    outside = source.parent / "elsewhere.pt"
    (source / "model_000020.pt").rename(outside)
    (source / "model_000020.pt").symlink_to(outside)


def wte(held: Model, change: Callable[[Tensor], Tensor]) -> None:
    held["_orig_mod.transformer.wte.weight"] = change(held["_orig_mod.transformer.wte.weight"])


@pytest.mark.parametrize(("damage", "words"), [
    (cut, "is no file of torch.save, or was cut"),
    (compressed, "not as torch.save writes it"),
    (linked, "is a link out of its folder"),
    (lambda s: (s / "model_000020.pt").rename(s / "weights.bin"), r"d4: holds no model_\*.pt; name the folder"),
    (lambda s: (s / "meta_000020.json").unlink(), "meta_000020.json: missing; say with --meta"),
    (lambda s: (s / "meta_000020.json").write_text("{"), "not valid JSON"),
    (lambda s: (s / "meta_000020.json").write_text("[" * 10**5), "not valid JSON"),
    (lambda s: retold(s, lambda m: m.update(step=21)), "is of step 20 by the name of the file, 21 by meta_000020"),
    (lambda s: retold(s, lambda m: m.pop("model_config")), "has no model_config"),
    (lambda s: resaved(s, lambda h: {"model": h}), "'model' is no tensor but dict; save the model's state_dict"),
    (lambda s: resaved(s, lambda h: torch.zeros(3)), "holds one Tensor, not tensors by name"),
    (lambda s: resaved(s, lambda h: {}), "holds nothing"),
    (lambda s: resaved(s, lambda h: h.update({"a/../b": torch.zeros(3)})), "a tensor is named 'a/../b'"),
    (lambda s: resaved(s, lambda h: h.update({"lm_head.weight": torch.zeros(3)})), "lm_head.weight is there twice"),
    (lambda s: resaved(s, lambda h: h.update(x=torch.zeros(3), y=torch.zeros(3))), "has unknown: x, y;"),
    (lambda s: resaved(s, lambda h: wte(h, lambda t: t[:300])),
     "wte.weight .bfloat16 300 x 32, the model has float32 320 x 32"),
    (lambda s: resaved(s, lambda h: wte(h, lambda t: t.double())), "wte.weight .float64 320 x 32"),
    (lambda s: resaved(s, lambda h: wte(h, lambda t: t.float().to_sparse())), "sparse_coo on cpu, no plain tensor"),
    (lambda s: resaved(s, lambda h: wte(h, lambda t: t / 0)), "wte.weight holds numbers that are not finite"),
])
def test_what_is_no_checkpoint_is_refused(source: Path, tmp_path: Path, config: Path, command: Any,
                                          damage: Callable[[Path], Any], words: str) -> None:
    damage(source)
    refused(command("import_checkpoint", source, config), 4, "checkpoint", words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("told", "words"), [
    ({"n_layer": 5, "n_head": 1}, r"n_layer: 5 there, 4 in the experiment; model.n_layer=5 (.*\n)*  n_head: 1 there"),
    ({"n_layer": True}, "n_layer: true there, 4 in"),
    ({"n_embd": None}, "n_embd: not said there"),
    ({"window_pattern": "L"}, 'window_pattern: "L" there, "SSSL" in'),
    ({"intermediate_size": 64}, "intermediate_size: 64 there, 128 in"),
    ({"rope_base": 1e6}, "rope_base: 1000000.0 there, unknown here; .* --ignore it"),
])
def test_a_meta_that_lies_is_refused(source: Path, tmp_path: Path, config: Path, command: Any, told: dict[str, Any],
                                     words: str) -> None:
    retold(source, lambda meta: meta["model_config"].update(told))
    refused(command("import_checkpoint", source, config), 2, "config", words)
    assert not (tmp_path / "run").exists()


def test_only_what_is_unknown_can_be_ignored(source: Path, config: Path, command: Any) -> None:
    retold(source, lambda meta: meta["model_config"].update(note="x", window_pattern="sssl", intermediate_size=128))
    for key in ("n_layer", "other"):
        refused(command("import_checkpoint", source, config, "--ignore", "note", key), 2, "config", f"--ignore {key}: ")
    assert command("import_checkpoint", source, config, "--ignore", "note").code == 0


def test_the_experiment_must_fit(source: Path, data: Path, tmp_path: Path, config: Path, command: Any) -> None:
    refused(command("import_checkpoint", source, config, f"run_dir={data}"), 2, "config", "exists already")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    refused(command("import_checkpoint", source, config, f"run_dir={tmp_path / 'gone'}"), 2, "config", "exists already")
    Tokenizer({bytes([i]): i for i in range(256)}).save(tmp_path / "small")
    refused(command("import_checkpoint", source, config, f"tokenizer={tmp_path / 'small'}"), 3, "data",
            "has 265 tokens, the model 300")
    refused(command("import_checkpoint", source, config, "--step", "7"), 4, "checkpoint", "step 7; steps there: 20")
    refused(command("import_checkpoint", tmp_path / "none", config), 4, "checkpoint", "none: missing")
    assert not (tmp_path / "run").exists()


def test_a_full_disk_leaves_nothing(source: Path, tmp_path: Path, config: Path, command: Any,
                                    monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(os, "write", full)
        done = command("import_checkpoint", source, config)
    refused(done, 7, "storage", "No space left")
    assert not (tmp_path / "run").exists()
    assert command("import_checkpoint", source, config).code == 0                                # control


# -- what goes on -----------------------------------------------------------------------------------------------------

def train(experiment: dict[str, Any]) -> None:
    loop.train(experiment_from_dict(experiment, "test"), ALONE)


def test_sft_and_a_specialist_stand_on_an_import(source: Path, data: Path, tmp_path: Path, config: Path,
                                                 command: Any) -> None:
    assert command("import_checkpoint", source, config).code == 0
    start, chat = open_checkpoint(tmp_path / "run"), chat_shards(tmp_path / "chat")
    experiment = experiment_dict(data, tmp_path / "sft", **{
        **BP, **SHORT, "task": "sft", "init_from": {"path": str(tmp_path / "run"), "step": None},
        "optim.matrix_lr": 1e-9, "optim.embedding_lr": 1e-9, "optim.unembedding_lr": 1e-9, "optim.scalar_lr": 1e-9})
    experiment["data"] = {"kind": "conversations", "train": [{"name": "c", "path": str(chat / "train")}],
                          "val": [{"name": "c", "path": str(chat / "val")}], "lanes": 4, "packing": "bestfit_pad",
                          "buffer_documents": 8, "case_aug_prob": 0.0, "json_layout_prob": 0.0}
    train(experiment)
    moved, names = open_checkpoint(tmp_path / "sft"), ("lm_head.weight", "transformer.h.2.attn.c_q.weight")
    for name in names:                                                   # with rates of nearly 0 it is where it began
        assert 0 < (moved.read(name) - start.read(name)).abs().max() < 1e-6, name
        assert (bp_model(7).get_parameter(name) - start.read(name)).abs().max() > 0.1            # control
    train(specialist_dict(data, tmp_path / "tool", tmp_path / "run", **BP, **SHORT))
    standing = load_cascade(tmp_path / "tool", None, ALONE).model
    for name, tensor in start.load_model_tensors().items():
        assert torch.equal(standing.get_parameter(name), tensor), name
    done = command("delta", "save", tmp_path / "tool", "--out", tmp_path / "delta")
    assert done.code == 0 and command("delta", "verify", tmp_path / "delta").code == 0, done


def test_the_help_brings_the_tokenizer(data: Path, tmp_path: Path) -> None:
    """The lines of --help, run as they stand beside a tokenizer.pkl as nanochat writes it, give the same tokenizer."""
    from scripts.import_checkpoint import EXAMPLES

    tokenizer = Tokenizer.load(data / "tokenizer")
    with open(tmp_path / "tokenizer.pkl", "wb") as file:
        pickle.dump(tokenizer._encoding, file)
    code = EXAMPLES.split("python -c '")[1].split("'")[0].replace("\\\n", "")
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert Tokenizer.load(tmp_path / "data" / "tokenizer").digest == tokenizer.digest


def test_weights_are_mapped_until_they_are_used(source: Path) -> None:
    """An open file takes no memory for its tensors, and lets go of the file when they are let go of."""
    def mapped() -> bool:
        return str(source / "model_000020.pt") in Path("/proc/self/maps").read_text()

    foreign = open_foreign(source)
    assert foreign.tensors["lm_head.weight"].shape == (320, 32) and mapped()
    del foreign
    assert not mapped()
