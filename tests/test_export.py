"""An exported repo: stock transformers loads it without a word and computes what our model computes.

The exported code and nanopoe.model are written apart, so each is the reference of the other; the golden files tie
both to the reference trainer.
"""

from __future__ import annotations

import ast
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import nanopoe.export.repo as repo_module
from nanopoe.errors import ConfigError
from nanopoe.export import export
from nanopoe.export.names import from_hub, hub_names, hub_shapes, to_hub
from nanopoe.export.repo import plan_shards, shard_bytes
from nanopoe.export.stage import export_stage
from nanopoe.tokenizer import Tokenizer
from tests.exports import (
    KINDS,
    POE,
    ROOT,
    VOCAB,
    Exports,
    config_of,
    first_of,
    gap,
    load,
    random_model,
    some_ids,
    specialist_model,
)
from tests.ranks import model_config

# -- weights and names --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", KINDS)
def test_names_and_tensors_go_there_and_back(kind: str) -> None:
    m = config_of(kind)
    model = random_model(m)
    ours = model.state_dict()
    theirs = dict(to_hub(m, ours, torch.float32))
    assert set(hub_names(m)) == set(ours) and len(set(hub_names(m).values())) == len(ours)
    assert {name: tuple(t.shape) for name, t in theirs.items()} == hub_shapes(m)
    back = from_hub(m, theirs)
    assert back.keys() == ours.keys()
    for name, tensor in ours.items():
        rows = slice(VOCAB) if tensor.shape[0] == model.layout.padded_vocab else slice(None)
        assert torch.equal(back[name][rows], tensor[rows]), name
        assert back[name].shape == tensor.shape
    assert any(not torch.equal(back[name], ours[name]) for name in ours)         # control: padding rows were dropped


@pytest.mark.parametrize("changes, parameters, tensors", [
    (dict(n_layer=24, n_embd=1536, n_head=12, n_kv_head=12, vocab_size=32768, poe_every=6), 1_384_122_122, 175),
    (dict(n_layer=32, n_embd=2048, n_head=16, n_kv_head=8, vocab_size=32768, intermediate_size=12800, poe_every=None,
          poe_stage_layers=(16, 6, 5, 5), stage_heads=True), 3_019_900_506, 235),
    (dict(n_layer=24, n_embd=1536, n_head=12, n_kv_head=6, vocab_size=48000, poe_every=None,
          poe_stage_layers=(12, 5, 4, 3), stage_heads=True), 1_507_591_082, 179),
])
def test_published_sizes(changes: dict[str, Any], parameters: int, tensors: int) -> None:
    shapes = hub_shapes(model_config(sequence_len=2048, **changes))
    assert (sum(math.prod(s) for s in shapes.values()), len(shapes)) == (parameters, tensors)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_ours_and_every_tensor_is_read(exports: Exports, kind: str) -> None:
    ours, theirs, _ = exports(kind)
    ids = some_ids(2, 200)                           # longer than the short window of 128
    with torch.no_grad():
        expected, got = ours(ids), theirs(ids).logits
    assert got.dtype == torch.float32 and got.shape == (2, 200, VOCAB)
    assert gap(got, expected) <= 1e-4
    if kind in POE:
        assert gap(got.exp().sum(-1), torch.ones(2, 200)) <= 1e-4                # log-probabilities, normalised
    for name, p in theirs.named_parameters():        # control: no tensor is decoration (but backout where it is off)
        with torch.no_grad():
            kept = p.clone()
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
            changed = gap(theirs(ids[:, :40]).logits, got[:, :40])
            p.copy_(kept)
        assert (changed > 1e-4) == (kind == "bp" or name != "model.backout_lambda"), name


def test_logits_of_the_reference_trainer(golden: Path, tmp_path: Path) -> None:
    m = model_config(n_embd=128, vocab_size=512, sequence_len=256, poe_mode="none", poe_every=None)
    tokenizer = Tokenizer.train([path.read_text() for path in sorted((ROOT / "nanopoe").rglob("*.py"))], 512)
    out = export(m, load_file(golden / "init.safetensors"), tokenizer, tmp_path / "golden", step=0, name="golden",
                 dtype="float32")
    ids, expected = load_file(golden / "batch.safetensors"), load_file(golden / "expect.safetensors")["logits"]
    model = load(out)
    with torch.no_grad():
        assert gap(model(ids["batch0"][:, :-1]).logits, expected) <= 1e-5
        assert gap(model(ids["batch1"][:, :-1]).logits, expected) > 1e-2         # control


def test_windows_are_inclusive_on_the_left(exports: Exports) -> None:
    ours, theirs, _ = exports("shared")
    assert theirs.config.sliding_window == 129 and theirs.config.layer_types.count("full_attention") == 1
    ids = some_ids(1, 200)
    blocks = [theirs.model.layers[i].self_attn for i in range(1, 5)]
    for attention in blocks:                         # control: one token less, in the layers and in the mask
        attention.sliding_window = attention.sliding_window and 128
    theirs.config.sliding_window = 128
    try:
        with torch.no_grad():
            shrunk = theirs(ids).logits
    finally:
        theirs.config.sliding_window = 129
        for attention in blocks:
            attention.sliding_window = attention.sliding_window and 129
    with torch.no_grad():
        assert gap(shrunk[:, :128], ours(ids)[:, :128]) <= 1e-4 < gap(shrunk, ours(ids))


@pytest.mark.parametrize("head_dim", [16, 32, 64, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_previous_token_lookup_is_exact(exports: Exports, head_dim: int, dtype: torch.dtype) -> None:
    code = sys.modules[type(exports("bp")[1]).__module__]
    vocab, T = 2**15, 700
    config = code.NanoPoEConfig(vocab_size=vocab, num_attention_heads=2, num_key_value_heads=1, head_dim=head_dim)
    config._attn_implementation = "sdpa"
    ids = torch.randint(0, vocab, (2, T), generator=torch.Generator().manual_seed(2))

    def looked_up(sharpness: float, start: int) -> Tensor:
        lookup = code.NanoPoEPreviousToken(config, 0)
        lookup.scaling = sharpness / head_dim
        positions = torch.arange(start, start + T).expand(2, T)
        return lookup(torch.zeros(2, T, 1, dtype=dtype), ids, positions, (None, None))[0]

    for start in (0, 5000):
        assert torch.equal(looked_up(code.LOOKUP_SHARPNESS, start)[:, 1:], ids[:, :-1])
    assert not torch.equal(looked_up(1.0, 0)[:, 1:], ids[:, :-1])                # control: a blunt one is wrong


# -- loading ------------------------------------------------------------------------------------------------------

SILENT_LOAD = """
import json, logging, sys, warnings
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging as hub_logging
hub_logging.disable_progress_bar()
said = {}
class Keep(logging.Handler):
    def emit(self, record): said[where].append(record.getMessage())
logging.getLogger("transformers").addHandler(Keep(logging.WARNING))
def step(name, function):
    global where
    where = name
    said[name] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    said[name] += [f"{w.category.__name__} {w.filename}: {w.message}" for w in caught]
    return result
for repo in sys.argv[1:]:
    step(repo + " config", lambda: AutoConfig.from_pretrained(repo, trust_remote_code=True))
    tokenizer = step(repo + " tokenizer", lambda: AutoTokenizer.from_pretrained(repo, trust_remote_code=True))
    model = step(repo + " causal", lambda: AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True))
    step(repo + " auto dtype", lambda: AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype="auto"))
    inputs = tokenizer(["<|bos|>def f(x):", "<|bos|>return"], return_tensors="pt", padding=True)
    step(repo + " generate", lambda: model.generate(**inputs, max_new_tokens=5))
    step(repo + " generate ids", lambda: model.generate(inputs["input_ids"][:1], max_new_tokens=5, do_sample=False))
    step(repo + " forward", lambda: model(**inputs, labels=inputs["input_ids"]).loss.backward())
    pipe = step(repo + " pipeline", lambda: pipeline("text-generation", model=repo, trust_remote_code=True))
    text = step(repo + " pipeline text", lambda: pipe("<|bos|>def f(x):", max_new_tokens=5)[0]["generated_text"])
    assert text.startswith("<|bos|>def f(x):"), text
    chat = [{"role": "user", "content": "hello"}]
    answer = step(repo + " pipeline chat", lambda: pipe(chat, max_new_tokens=5)[0]["generated_text"])
    assert answer[-1]["role"] == "assistant", answer
    step(repo + " save", lambda: model.save_pretrained(repo + "-saved"))
    step(repo + " trunk", lambda: AutoModel.from_pretrained(repo, trust_remote_code=True))
print(json.dumps(said))
"""


def test_nothing_is_said_while_loading_and_generating(exports: Exports, tmp_path: Path) -> None:
    for kind in ("bp", "heads"):
        shutil.copytree(exports(kind)[2], tmp_path / kind)
    model, common = specialist_model(), {"step": 1, "dtype": "float32"}
    export(first_of(model, 0).config, first_of(model, 0).state_dict(), exports.tokenizer, tmp_path / "below",
           name="below", **common)
    part = first_of(model, 1)
    export_stage(part.config, part.state_dict(), exports.tokenizer, tmp_path / "stage", parent=str(tmp_path / "below"),
                 base="below", specialists=("stage",), name="stage", **common)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
                   "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", SILENT_LOAD, "bp", "heads", "stage"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said, heard = json.loads(done.stdout), done.stderr.replace("[transformers] ", "")
    for kind in ("bp", "heads", "stage"):
        report = said.pop(f"{kind} trunk")           # control, and stock models say it too: the trunk has no head
        assert len(report) == 1 and "lm_head.weight" in report[0] and "UNEXPECTED" in report[0]
        assert said.pop(f"{kind} save") == []
        heard = heard.replace(report[0], "")
    assert len(said) == 30 and {name: messages for name, messages in said.items() if messages} == {}
    assert heard.strip() == ""                       # nor by print


@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_trunk_loads_alone(exports: Exports, kind: str) -> None:
    from transformers import AutoModel

    ours, theirs, out = exports(kind)
    trunk = AutoModel.from_pretrained(out, trust_remote_code=True)
    ids = some_ids(1, 30)
    with torch.no_grad():
        states = ours.boundary_states(ids)
        hidden = trunk(ids, output_hidden_states=True)
        assert gap(hidden.last_hidden_state, torch.nn.functional.rms_norm(states[-1], (64,))) <= 1e-4
        assert len(hidden.hidden_states) == theirs.config.num_hidden_layers + 1
        if kind == "heads":                          # a prefix of the trunk, and the full one as control
            first = trunk(ids, prefix=1).last_hidden_state
            assert gap(first, torch.nn.functional.rms_norm(states[0], (64,))) <= 1e-4 < gap(
                first, hidden.last_hidden_state)


def test_save_and_load_again(exports: Exports, tmp_path: Path) -> None:
    _, theirs, _ = exports("heads")
    theirs.save_pretrained(tmp_path / "again", max_shard_size="100KB")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    again = load(tmp_path / "again")
    ids = some_ids(1, 50)
    with torch.no_grad():
        expected = theirs(ids).logits
        assert torch.equal(again(ids).logits, expected)
        again.lm_head_stages[2].weight.mul_(0.9)     # control
        assert gap(again(ids).logits, expected) > 1e-4
    assert again.generation_config.eos_token_id == theirs.generation_config.eos_token_id


def test_bfloat16_is_the_default_and_half_the_size(exports: Exports, tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours, theirs, exact = exports("heads")
    out = export(ours.config, ours.state_dict(), tokenizer, tmp_path / "bf16", step=7, name="heads")
    half = load(out, dtype="auto")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in theirs.parameters()} == {torch.float32}
    size = (out / "model.safetensors").stat().st_size / (exact / "model.safetensors").stat().st_size
    assert 0.48 < size < 0.52
    ids = some_ids(2, 150)
    with torch.no_grad():
        logits, reference = half(ids).logits, theirs(ids).logits
        assert logits.dtype == torch.float32
        kl = (reference.exp() * (reference - logits)).sum(-1)
        shuffled = (reference.exp() * (reference - logits.flip(1))).sum(-1)
        assert float(kl.mean()) < 0.01 < 1 < float(shuffled.mean())              # control: other positions
        widened = load(out, dtype=torch.float32)
        assert {p.dtype for p in widened.parameters()} == {torch.float32}


def test_shards_and_what_is_in_the_folder(exports: Exports, tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours, theirs, out = exports("heads")
    files = {path.name for path in repo_module.TEMPLATES.iterdir() if path.is_file()} | {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert {"modeling_nanopoe.py", "chat_template.jinja", "LICENSE"} < files
    assert {path.name for path in out.iterdir()} == files | {"model.safetensors"}
    cut = export(ours.config, ours.state_dict(), tokenizer, tmp_path / "cut", step=7, name="heads", dtype="float32",
                 max_shard_size="200KB")
    shards = sorted(path.name for path in cut.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert {path.name for path in cut.iterdir()} == files | set(shards) | {"model.safetensors.index.json"}
    assert all((cut / name).stat().st_mode & 0o777 == (cut / "config.json").stat().st_mode & 0o777 for name in shards)
    whole, parts = theirs.state_dict(), load(cut).state_dict()
    assert whole.keys() == parts.keys() and all(torch.equal(whole[name], parts[name]) for name in whole)


def test_shard_plan_and_sizes() -> None:
    sizes = {"a": 4, "b": 4, "c": 3, "d": 20, "e": 1}
    assert plan_shards(sizes, 8) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert plan_shards(sizes, 100) == [["a", "b", "c", "d", "e"]]
    assert (shard_bytes("5GB"), shard_bytes("200KB")) == (5 * 10**9, 200_000)
    for wrong in ("5", "0GB", "5 GB", "-1GB", "5TB"):
        with pytest.raises(ConfigError, match="shard size"):
            shard_bytes(wrong)


def test_configuration_is_explicit_and_the_code_stands_alone(exports: Exports) -> None:
    *_, out = exports("heads")
    config = json.loads((out / "config.json").read_text())
    assert config["stage_boundaries"] == [1, 2, 3] and config["value_embedding_blocks"] == [1, 3]
    assert config["window_sizes"] == [128, 128, 128, 512] and config["num_hidden_layers"] == 5
    assert None not in config.values()
    assert list(config["auto_map"]) == ["AutoConfig", "AutoModel", "AutoModelForCausalLM"]
    assert "backout_block" not in config
    assert json.loads((exports("bp")[2] / "config.json").read_text())["backout_block"] == 2
    allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
    relative: dict[str, set[str]] = {}
    for path in out.glob("*.py"):
        assert path.read_bytes() == (repo_module.TEMPLATES / path.name).read_bytes()
        relative[path.stem] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed
            elif isinstance(node, ast.ImportFrom) and node.level:
                relative[path.stem].add(str(node.module))
            elif isinstance(node, ast.ImportFrom):
                assert node.module and node.module.split(".")[0] in allowed
    assert relative.pop("modeling_nanopoe") == set(relative)     # transformers 4 copies what this file imports, no more
    assert relative["configuration_nanopoe"] == set()            # and of a configuration that is loaded alone, nothing
    assert (out / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    pretrained = type(exports("heads")[1])           # vLLM would drop the head's weights without a word
    assert not pretrained._keys_to_ignore_on_load_unexpected
