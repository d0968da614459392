"""An exported repo: stock transformers loads it without a word and computes what our model computes.

The exported code and nanopoe.model are written apart, so each is the reference of the other; the golden files tie
both to the reference trainer.
"""

from __future__ import annotations

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

import nanopoe.export.repo as repo_module
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import CheckpointError, ConfigError, DataError, StorageError
from nanopoe.export import export
from nanopoe.export.card import card
from nanopoe.export.hub_tokenizer import merge_pairs
from nanopoe.export.names import from_hub, hub_names, hub_shapes, to_hub
from nanopoe.export.repo import plan_shards, shard_bytes
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99
from nanopoe.model import GPT
from nanopoe.model.pool import aggregate
from nanopoe.tokenizer import SPECIALS, Tokenizer
from tests.ranks import model_config

ROOT = Path(__file__).parents[1]
VOCAB = 420                                          # not a multiple of 64: rows are cropped
SHAPE = dict(vocab_size=VOCAB, sequence_len=512, n_embd=64, n_head=4, n_kv_head=4)     # S is 128 tokens
KINDS: dict[str, dict[str, Any]] = {
    "bp": dict(poe_mode="none", poe_every=None),
    "shared": dict(poe_mode="flat", poe_every=2),
    "heads": dict(poe_mode="flat", poe_every=None, poe_stage_layers=(2, 1, 1), stage_heads=True, n_kv_head=2),
    "hier": dict(poe_mode="hier", poe_every=1, window_pattern="L", n_layer=3, n_kv_head=1),
}
POE = [kind for kind in KINDS if kind != "bp"]


def config_of(kind: str) -> ModelConfig:
    return model_config(**{**SHAPE, **KINDS[kind]})


def random_model(m: ModelConfig, seed: int = 0) -> GPT:
    """Weights under which every tensor matters, and text does not fall into a loop."""
    model = GPT(m)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = {"lm_head": 0.15, "lm_head_stages": 0.1, "smear_gate": 0.5}.get(name.split(".")[0], 0.08)
            p.add_(scale * torch.randn(p.shape, generator=generator))
        model.smear_lambda.fill_(0.7)
        model.backout_lambda.fill_(0.3)
    return model.eval()


class Exports:
    """Exports each kind once and loads it with stock transformers."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.loaded: dict[str, tuple[GPT, Any, Path]] = {}

    def __call__(self, kind: str) -> tuple[GPT, Any, Path]:
        """(our model, theirs, the repo), all fp32."""
        if kind not in self.loaded:
            model = random_model(config_of(kind))
            out = export(model.config, model.state_dict(), self.tokenizer, self.folder / kind, step=7, name=kind,
                         dtype="float32")
            self.loaded[kind] = (model, load(out), out)
        return self.loaded[kind]


def load(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "nanopoe").rglob("*.py"))]
    return Tokenizer.train(texts, VOCAB)


@pytest.fixture(scope="module", autouse=True)
def modules_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Copies of exported code go to a temporary folder, not to the user's cache."""
    from transformers import dynamic_module_utils

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setenv("TOKENIZERS_PARALLELISM", "false")
        yield


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"), tokenizer)


def some_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


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
repo = sys.argv[1]
step("config", lambda: AutoConfig.from_pretrained(repo, trust_remote_code=True))
tokenizer = step("tokenizer", lambda: AutoTokenizer.from_pretrained(repo, trust_remote_code=True))
model = step("causal", lambda: AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True))
step("auto dtype", lambda: AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype="auto"))
inputs = tokenizer(["<|bos|>def f(x):", "<|bos|>return"], return_tensors="pt", padding=True)
step("generate", lambda: model.generate(**inputs, max_new_tokens=5))
step("generate ids", lambda: model.generate(inputs["input_ids"][:1], max_new_tokens=5, do_sample=False))
step("forward", lambda: model(**inputs, labels=inputs["input_ids"]).loss.backward())
pipe = step("pipeline", lambda: pipeline("text-generation", model=repo, trust_remote_code=True))
text = step("pipeline text", lambda: pipe("<|bos|>def f(x):", max_new_tokens=5)[0]["generated_text"])
assert text.startswith("<|bos|>def f(x):"), text
chat = [{"role": "user", "content": "hello"}]
answer = step("pipeline chat", lambda: pipe(chat, max_new_tokens=5)[0]["generated_text"])
assert answer[-1]["role"] == "assistant", answer
step("save", lambda: model.save_pretrained(sys.argv[2]))
step("trunk", lambda: AutoModel.from_pretrained(repo, trust_remote_code=True))
print(json.dumps(said))
"""


@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_nothing_is_said_while_loading_and_generating(exports: Exports, kind: str, tmp_path: Path) -> None:
    *_, out = exports(kind)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
                   "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    done = subprocess.run([sys.executable, "-c", SILENT_LOAD, str(out), str(tmp_path / "saved")], cwd=tmp_path,
                          env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    report = said.pop("trunk")                       # control, and stock models say it too: the trunk has no head
    assert len(report) == 1 and "lm_head.weight" in report[0] and "UNEXPECTED" in report[0]
    assert said.pop("save") == []
    assert {name: messages for name, messages in said.items() if messages} == {}
    assert done.stderr.replace("[transformers] ", "").replace(report[0], "").strip() == ""       # nor by print


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
    files = {"config.json", "generation_config.json", "configuration_nanopoe.py", "modeling_nanopoe.py",
             "decoding_nanopoe.py", "modes_nanopoe.py", "generation_nanopoe.py", "tokenizer.json",
             "tokenizer_config.json", "chat_template.jinja", "README.md", "LICENSE"}
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
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
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


# -- generation ---------------------------------------------------------------------------------------------------

def greedy(model: Any, ids: Tensor, n: int = 24, **kwargs: Any) -> Tensor:
    """(B, n) new tokens; nothing stops early, so that lengths are equal."""
    out = model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, **kwargs)
    return out[:, ids.shape[1]:]


def slow_greedy(logits_of: Callable[[Tensor], Tensor], ids: Tensor, n: int, never: list[int]) -> Tensor:
    """The same by a full forward of our model for every token."""
    for _ in range(n):
        with torch.no_grad():
            logits = logits_of(ids)[:, -1].clone()
        logits[:, never] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -n:]


@pytest.mark.parametrize("kind", KINDS)
def test_cache_and_no_cache_and_ours_agree(exports: Exports, kind: str) -> None:
    ours, theirs, _ = exports(kind)
    ids = some_ids(2, 120)                           # the 128-token windows fill up on the way
    never = theirs.generation_config.eos_token_id
    expected = slow_greedy(ours, ids, 24, never)
    assert len(set(expected[0].tolist())) > 8        # control: no loop that would hide errors
    assert torch.equal(greedy(theirs, ids), expected)
    assert torch.equal(greedy(theirs, ids, use_cache=False), expected)
    assert torch.equal(greedy(theirs, ids, cache_implementation="static"), expected)
    other = greedy(theirs, some_ids(2, 120, seed=9))
    assert not torch.equal(other, expected)          # control


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_and_chunks(exports: Exports, attention: str) -> None:
    from transformers import DynamicCache

    ours, _, out = exports("heads")
    model = load(out, attn_implementation=attention)
    ids = some_ids(1, 160)
    with torch.no_grad():
        expected = ours(ids)
        assert gap(model(ids).logits, expected) <= 1e-4
        cache = DynamicCache(config=model.config)
        pieces = [model(part, past_key_values=cache).logits for part in ids.split([1, 130, 2, 27], dim=1)]
        assert gap(torch.cat(pieces, dim=1), expected) <= 1e-4
        assert gap(model(ids, logits_to_keep=3).logits, expected[:, -3:]) <= 1e-4
        attentions = model(ids, output_attentions=True).attentions
    assert (attentions[1] is not None) == (attention == "eager") and len(attentions) == 5
    with torch.no_grad():                            # control: a lost chunk is noticed
        assert gap(model(ids[:, 130:]).logits, expected[:, 130:]) > 1e-2


@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_left_padding_changes_nothing(exports: Exports, kind: str) -> None:
    _, theirs, _ = exports(kind)
    pad = theirs.generation_config.pad_token_id
    lengths = [140, 9, 60]
    rows = [some_ids(1, n, seed=n) for n in lengths]
    width = max(lengths)
    batch = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=pad) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - n for n in lengths]).long()
    alone = torch.cat([greedy(theirs, row, n=12) for row in rows])
    assert torch.equal(greedy(theirs, batch, n=12, attention_mask=mask), alone)
    assert torch.equal(greedy(theirs, batch, n=12, attention_mask=mask, cache_implementation="static"), alone)
    assert not torch.equal(greedy(theirs, batch, n=12), alone)                   # control: without the mask
    with torch.no_grad():                            # and in a plain forward, positions come from the mask
        together, single = theirs(batch, attention_mask=mask).logits, theirs(rows[1]).logits
    assert gap(together[1, -9:], single[0]) <= 1e-4


@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_beams_and_sampling(exports: Exports, kind: str) -> None:
    _, theirs, _ = exports(kind)
    ids = some_ids(2, 30)
    beams = greedy(theirs, ids, n=10, num_beams=3)
    assert torch.equal(beams, greedy(theirs, ids, n=10, num_beams=3, use_cache=False))
    assert not torch.equal(beams, greedy(theirs, ids, n=10))                     # control: the search does something

    def sample(seed: int, **kwargs: Any) -> Tensor:
        torch.manual_seed(seed)
        return theirs.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=True, **kwargs)

    assert torch.equal(sample(3), sample(3)) and torch.equal(sample(3), sample(3, use_cache=False))
    assert not torch.equal(sample(3), sample(4))                                 # control
    assert sample(3, num_return_sequences=2, repetition_penalty=1.2).shape[0] == 4


def test_bos_is_not_taken_for_padding(exports: Exports) -> None:
    from transformers import GenerationMixin

    _, theirs, _ = exports("shared")
    bos = theirs.generation_config.bos_token_id
    ids = torch.cat([torch.tensor([[bos]]), some_ids(1, 20)], dim=1)
    options: dict[str, Any] = dict(max_new_tokens=12, do_sample=False, pad_token_id=bos, eos_token_id=3)
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(theirs.generate(ids, **options), expected)
    assert torch.equal(theirs.generate(input_ids=ids, **options), expected)
    trapped: Any = GenerationMixin.generate(theirs, ids, **options)              # control: transformers by itself
    assert not torch.equal(trapped, expected)


def test_training_gradients_and_checkpointing(exports: Exports) -> None:
    *_, out = exports("heads")
    model = load(out).train()
    ids = some_ids(2, 40)
    loss = model(ids, labels=ids).loss
    expected = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert gap(loss.detach(), expected.detach()) <= 1e-5
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert set(dict(model.named_parameters())) - set(plain) == {"model.backout_lambda"}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad is None or gap(p.grad, plain[name]) <= 1e-5, name
    assert any(float(g.abs().max()) > 1e-3 for g in plain.values())              # control: there was something to equal


# -- one stage, a prefix ------------------------------------------------------------------------------------------

def view_of(ours: GPT, stages: range) -> Callable[[Tensor], Tensor]:
    """Log-probabilities of the pooled `stages`, by our model."""
    def logits(ids: Tensor) -> Tensor:
        states = ours.boundary_states(ids)
        return aggregate([ours.stage_logits(states[k], k).log_softmax(-1) for k in stages])
    return logits


@pytest.mark.parametrize("kind", POE)
def test_stages_and_prefixes(exports: Exports, kind: str) -> None:
    ours, theirs, _ = exports(kind)
    K = ours.layout.n_stages
    ids = some_ids(2, 120)
    never = theirs.generation_config.eos_token_id
    texts = []
    for name, index, stages in [*(("stage", k, range(k, k + 1)) for k in range(K)),
                                *(("prefix", n, range(n)) for n in range(1, K + 1))]:
        view = {name: index}
        with torch.no_grad():
            assert gap(theirs(ids, **view).logits, view_of(ours, stages)(ids)) <= 1e-4, view
        texts.append(greedy(theirs, ids, n=14, **view))
        assert torch.equal(texts[-1], slow_greedy(view_of(ours, stages), ids, 14, never)), view
    assert torch.equal(texts[K], texts[0])                                       # prefix 1 is stage 0
    assert torch.equal(texts[-1], greedy(theirs, ids, n=14))                     # prefix K is the full pool
    assert len({tuple(text.flatten().tolist()) for text in texts}) > K           # control: views differ


@pytest.mark.parametrize("view, blocks", [({}, 4), ({"stage": 0}, 2), ({"stage": 1}, 3), ({"prefix": 1}, 2),
                                          ({"prefix": 2}, 3), ({"prefix": 3}, 4)])
def test_a_view_runs_only_what_it_needs(exports: Exports, view: dict[str, int], blocks: int) -> None:
    _, theirs, _ = exports("heads")
    ran: list[int] = []
    hooks = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(theirs.model.layers)]
    heads = [head.register_forward_hook(lambda *_: ran.append(-1)) for head in theirs.lm_head_stages]
    try:
        theirs.generate(some_ids(1, 5), max_new_tokens=1, **view)
    finally:
        for hook in [*hooks, *heads]:
            hook.remove()
    assert [i for i in ran if i >= 0] == list(range(blocks + 1))                 # layer 0 is the lookup
    assert ran.count(-1) == (1 if "stage" in view else view.get("prefix", 3))


def test_views_that_do_not_exist_are_refused(exports: Exports) -> None:
    from transformers import DynamicCache

    _, bp, _ = exports("bp")
    _, poe, _ = exports("heads")
    ids = some_ids(1, 5)
    for view in ({"stage": 0}, {"prefix": 1}):
        with pytest.raises(ValueError, match="only full is valid"):
            bp.generate(ids, max_new_tokens=2, **view)
    for view, message in (({"stage": 3}, "stages 0 to 2"), ({"stage": -1}, "stages 0 to 2"),
                          ({"prefix": 0}, "1 to 3 stages"), ({"prefix": 4}, "1 to 3 stages"),
                          ({"stage": 0, "prefix": 1}, "exclude each other"), ({"stages": 1}, "not used by the model")):
        with pytest.raises(ValueError, match=message):
            poe.generate(ids, max_new_tokens=2, **view)
    with pytest.raises(ValueError, match="input_ids"):
        poe(inputs_embeds=torch.zeros(1, 2, 64))
    cache = DynamicCache(config=poe.config)
    with torch.no_grad():
        poe(ids, past_key_values=cache, stage=0)
        poe(ids, past_key_values=cache, prefix=1)    # control: the same depth goes on
        with pytest.raises(ValueError, match="start with a new cache"):
            poe(ids, past_key_values=cache)


@pytest.mark.slow
def test_early_exit_prompt_lookup_and_compiled_graph(exports: Exports) -> None:
    _, theirs, _ = exports("shared")
    ids = some_ids(1, 30)
    options: dict[str, Any] = dict(max_new_tokens=24, do_sample=False)
    expected = theirs.generate(ids, **options)
    assert expected.shape[1] > 40
    assert torch.equal(theirs.generate(ids, assistant_early_exit=3, **options), expected)
    assert torch.equal(theirs.generate(ids, prompt_lookup_num_tokens=3, **options), expected)
    with torch.no_grad():
        compiled = torch.compile(theirs, fullgraph=True, backend="aot_eager")
        assert gap(compiled(ids, use_cache=False).logits, theirs(ids).logits) <= 1e-4
        assert gap(compiled(ids, use_cache=False).logits, theirs(ids.flip(1)).logits) > 1e-2       # control


# -- tokenizer ----------------------------------------------------------------------------------------------------

TEXTS = [
    "", " ", "\n", "\r\n\r\n  x", "a", "def f(x):\n\treturn x ** 2  # comment\n\n\n", "1 12 123 1234567890 3.14e-10",
    "I'm they'LL we've \u017f'S don't", "caf\u00e9 cafe\u0301 \u4f60\u597d\u4e16\u754c \u0928\u092e\u0938\u094d\u0924",
    "\u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001d54f",
    "\ufeff\x00\x1f\x7f\u2028\u3000 \u0085", "<|bos|>hello<|assistant_end|> <|no_such|>",
    "   \t\t \n \n\n   end   ", "x" * 20_000, " " * 9_000 + "y" + "\n" * 9_000, "ab" * 10_000,
    "https://example.org/a?b=c&d=%20#e", '{"key": [1, 2.5, null], "k": "\\u00e9"}',
]


@pytest.fixture(scope="module")
def hub_tokenizer(exports: Exports) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(exports("bp")[2], trust_remote_code=True)


def test_tokens_equal_ours(tokenizer: Tokenizer, hub_tokenizer: Any) -> None:
    sources = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("nanopoe/**/*.py"))]
    for text in [*TEXTS, *sources]:
        theirs = hub_tokenizer(text, split_special_tokens=True)["input_ids"]
        assert theirs == tokenizer.encode(text), text[:60]
        assert hub_tokenizer.decode(theirs) == text
    assert len(hub_tokenizer("abc abc")["input_ids"]) < 7                        # control: merges do happen


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(alphabet=" \t\n\r'sdtrlvem1230aA\u00e9\u4e2d.,<|bos>", max_size=60)))
def test_tokens_equal_ours_on_any_text(tokenizer: Tokenizer, hub_tokenizer: Any, text: str) -> None:
    theirs = hub_tokenizer(text, split_special_tokens=True)["input_ids"]
    assert theirs == tokenizer.encode(text)
    assert hub_tokenizer.decode(theirs) == text


@pytest.mark.slow
def test_tokens_equal_ours_on_the_corpus(corpus: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from tokenizers import Tokenizer as HubTokenizer

    from nanopoe.export.hub_tokenizer import hub_tokenizer as convert

    texts = pq.read_table(sorted(corpus.glob("*.parquet"))[-1]).column("text").to_pylist()[:1500]
    ours = Tokenizer.train(texts[:300], 4096)
    convert(ours).save(str(tmp_path / "tokenizer.json"))
    theirs = HubTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    tokens = 0
    for text in texts:
        ids = theirs.encode(text).ids
        assert ids == ours.encode(text)
        tokens += len(ids)
    assert tokens > 100_000


def test_special_tokens(tokenizer: Tokenizer, hub_tokenizer: Any) -> None:
    ids = hub_tokenizer("<|bos|>hello<|user_end|>")["input_ids"]
    assert ids == [tokenizer.bos_id, *tokenizer.encode("hello"), tokenizer.special_ids["<|user_end|>"]]
    assert hub_tokenizer("hello")["input_ids"] == tokenizer.encode("hello")      # nothing is added
    assert hub_tokenizer.decode(ids, skip_special_tokens=True) == "hello"
    assert hub_tokenizer.decode(ids) == "<|bos|>hello<|user_end|>"
    assert [hub_tokenizer.convert_tokens_to_ids(name) for name in SPECIALS] == list(tokenizer.special_ids.values())
    assert len(hub_tokenizer) == tokenizer.vocab_size
    assert hub_tokenizer.bos_token_id == hub_tokenizer.eos_token_id == hub_tokenizer.pad_token_id == tokenizer.bos_id
    padded = hub_tokenizer(["<|bos|>hello", "<|bos|>x"], padding=True)
    assert padded["attention_mask"][1][0] == 0 and padded["attention_mask"][0][0] == 1


def test_a_vocabulary_bpe_cannot_make_is_refused(tokenizer: Tokenizer) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    assert list(merge_pairs({**ranks, b"ab": 256, b"abc": 257})) == [(b"a", b"b"), (b"ab", b"c")]
    with pytest.raises(DataError, match="cannot be reached"):
        list(merge_pairs({**ranks, b"abc": 256}))


def test_chat_template(tokenizer: Tokenizer, hub_tokenizer: Any) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": [{"type": "text", "text": "Bye"}]}]
    text = hub_tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == ("<|bos|><|user_start|>Be brief.\n\nHi<|user_end|><|assistant_start|>Hello.<|assistant_end|>"
                    "<|user_start|>Bye<|user_end|><|assistant_start|>")
    encoded = hub_tokenizer.apply_chat_template(chat[:3], return_assistant_tokens_mask=True, return_dict=True)
    marked = [i for i, on in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if on]
    assert marked == [*tokenizer.encode("Hello."), tokenizer.special_ids["<|assistant_end|>"]]
    for wrong in ([chat[2]], [chat[1], chat[1]], [chat[1], chat[0]]):
        with pytest.raises(Exception, match="expected a message of role"):
            hub_tokenizer.apply_chat_template(wrong, tokenize=False)


# -- card ---------------------------------------------------------------------------------------------------------

SCORES = {"bpb": {"full": 1.25, "stages": [1.5, 1.375, 1.3125], "prefixes": [1.5, 1.40625, 1.25]},
          "accuracy": {"full": 0.5, "stages": [0.25, 0.375, 0.4375], "prefixes": [0.25, 0.3125, 0.5]}, "tokens": 4096}
EXITS = {"exits": [0.25, 0.25, 0.5], "mean_depth": 2.25, "agreement": 1.0, "predicted_speedup": 1.25}
CALIBRATION = {
    "tokens": 2048, P99: [2.5, 1.25], MAX: [4.0, 2.0], LEAD_P99: [0.5, 0.25], LEAD_MAX: [1.0, 0.75],
    "wand": {"p99": EXITS, "max": EXITS, "lead_p99": EXITS, "lead": EXITS},
    "routing": {"mode": "target_regression", "cap": 0.02, "threshold": 0.625, "routed": 0.75, "share": 0.5,
                "projected_speedup": 1.6, "agreement": 0.875, "regression": 0.01, "regression_held_out": 0.01}}
SPEED = {"prompts": 7, "equal": 7, "agreement": 0.985, "predicted_speedup": 1.5, "measured_speedup": 1.375,
         "tokens_per_s": 30.0, "plain_tokens_per_s": 20.0}
DEPTH = {**SPEED, "tokens": 420, "exits": [100, 100, 220], "mean_depth": 2.2857}
MODES = {"prompts": 7, "tokens": 60, "threads": 2, "device": "cpu", "wand_max": DEPTH, "wand_p99": DEPTH,
         "routed": {**DEPTH, "measured_speedup": None},
         "speculative": {**SPEED, "drafts": 4, "prefix": 1, "rounds": 100, "accepted": 320, "drafted": 380,
                         "acceptance": 0.842, "mean_accepted": 3.2}}


@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_card(exports: Exports, tmp_path: Path, tokenizer: Tokenizer, kind: str,
              monkeypatch: pytest.MonkeyPatch) -> None:
    ours, *_ = exports(kind)
    scores = {**SCORES, "calibration": CALIBRATION, "modes": MODES}
    if kind == "bp":
        scores = {"bpb": {"full": 1.25, "stages": None, "prefixes": None}, "calibration": None, "modes": None,
                  "accuracy": {"full": 0.5, "stages": None, "prefixes": None}}
    out = export(ours.config, ours.state_dict(), tokenizer, tmp_path / "card", step=1234, name="my-run",
                 evaluation=scores)
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert (head["library_name"], head["pipeline_tag"], head["license"]) == (
        "transformers", "text-generation", "apache-2.0")
    assert None not in head.values()
    assert "# my-run, step 1,234" in body and "{" not in re.sub(r"```.*?```", "", body, flags=re.S)
    assert f"{sum(math.prod(s) for s in hub_shapes(ours.config).values()):,}" in body
    assert ("| first 2 | 1.4062 | 0.3125 |" in body) == (kind == "heads") and "| 1.2500 | 0.5000 |" in body
    assert ("| 0 | 0 to 1 | shared head and its own |" in body) == (kind == "heads")
    assert "## Evaluation" not in (exports(kind)[2] / "README.md").read_text()   # control: none given, none shown
    snippets = re.findall(r"```python\n(.*?)```", body, flags=re.S)
    assert len(snippets) == (7 if kind == "heads" else 2)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["output"].shape[1] > scope["inputs"]["input_ids"].shape[1]


def test_card_has_the_tables_of_the_modes() -> None:
    m = config_of("heads")

    def text(record: dict[str, Any], config: ModelConfig = m) -> str:
        return card(config, name="x", step=1, repo="x", dtype="float32", parameters=1, evaluation=record)

    full = text({**SCORES, "calibration": CALIBRATION, "modes": MODES})
    for line in ("| 0 to 1 | 2.5000 | 4.0000 | 0.5000 | 1.0000 |", "| 1 to 2 | 1.2500 | 2.0000 | 0.2500 | 0.7500 |",
                 "threshold 0.6250, 75.0% of the",
                 "| speculative | 3.20 of 3.8 drafts kept a round (84.2%) | 98.5% | 1.50x | 1.38x |",
                 "| adaptive depth, p99 | 2.29 of 3 stages a token | 98.5% | 1.50x | 1.38x |",
                 "| routing | 2.29 of 3 stages a token | 98.5% | 1.50x |  |", "generate_wand", "generate_routed"):
        assert line in full
    calibrated = text({"calibration": {**CALIBRATION, "routing": {**CALIBRATION["routing"], "threshold": None}}})
    assert "no confidence stays under it" in calibrated and "## Modes" not in calibrated
    bare, bp = text({}), text({}, config_of("bp"))               # control: what was not measured is not shown
    assert "generate_speculative" in bare
    assert not re.search("generate_wand|generate_routed|## (Modes|Calibration)", bare)
    assert not re.search("generate_(wand|routed|speculative)|weights=", bp)
    assert "generate_speculative" not in text({}, config_of("shared").model_copy(update={"poe_every": 4}))


# -- refusals -----------------------------------------------------------------------------------------------------

def test_what_does_not_fit_is_refused(exports: Exports, tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours, *_ = exports("shared")
    m, tensors = ours.config, ours.state_dict()

    def attempt(config: ModelConfig = m, changes: dict[str, Tensor | None] = {}, **kwargs: Any) -> None:  # noqa: B006
        state = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        try:
            export(config, state, tokenizer, tmp_path / "out", step=1, name="x", **kwargs)
        finally:
            leftovers = [path for path in tmp_path.iterdir() if path.name != "out"]
            assert leftovers == []

    with pytest.raises(CheckpointError, match="1 tensors missing"):
        attempt(changes={"smear_lambda": None})
    with pytest.raises(CheckpointError, match="1 unknown"):
        attempt(changes={"lm_head_stages.0.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"resid_lambdas.*shape"):
        attempt(changes={"resid_lambdas": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="not finite"):
        attempt(changes={"x0_lambdas": torch.full((4,), torch.nan)})
    with pytest.raises(ConfigError, match="tokenizer has 420"):
        attempt(config=model_config(**{**SHAPE, "vocab_size": 300}))
    with pytest.raises(ConfigError, match="dtype"):
        attempt(dtype="float16")
    narrow = model_config(**{**SHAPE, "n_head": 8, "n_kv_head": 8})
    with pytest.raises(ConfigError, match="head dimension 8"):
        export(narrow, GPT(narrow).state_dict() | {}, tokenizer, tmp_path / "narrow", step=1, name="x")
    assert not (tmp_path / "out").exists()
    attempt()                                        # control: unchanged, it is written
    assert (tmp_path / "out" / "config.json").exists()


def test_only_an_earlier_export_is_overwritten(exports: Exports, tmp_path: Path, tokenizer: Tokenizer,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    ours, *_ = exports("shared")

    def attempt(out: Path, step: int, **kwargs: Any) -> Path:
        return export(ours.config, ours.state_dict(), tokenizer, out, step=step, name="x", **kwargs)

    out = tmp_path / "out"
    out.mkdir()
    attempt(out, 1)                                  # an empty folder is fine
    before = (out / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"):
        attempt(out, 2)
    with monkeypatch.context() as patch:             # a full disk in the middle of an overwrite
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")
        patch.setattr(repo_module, "save_file", full)
        with pytest.raises(StorageError, match="No space left"):
            attempt(out, 2, overwrite=True)
    assert (out / "config.json").read_bytes() == before
    attempt(out, 2, overwrite=True)
    assert json.loads((out / "config.json").read_text())["nanopoe_run"] == {"name": "x", "step": 2}
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("words")
    with pytest.raises(ConfigError, match="not an earlier export"):
        attempt(precious, 1, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "words"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder"):
        attempt(tmp_path / "file", 1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "precious"]


# -- the script ---------------------------------------------------------------------------------------------------

def test_script_exports_a_checkpoint(exports: Exports, tmp_path: Path, tokenizer: Tokenizer,
                                     monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from nanopoe.checkpoint import Target, open_checkpoint, save_checkpoint
    from nanopoe.config import load_experiment
    from nanopoe.dist import World
    from scripts.export_hf import main
    from scripts.try_export import main as try_main

    ours, *_ = exports("heads")
    capsys.readouterr()                                             # of loading it, where no test did before
    run, world = tmp_path / "run", World(0, 1, torch.device("cpu"))
    experiment = load_experiment(ROOT / "configs" / "quickstart.yaml", [f"run_dir={run}"])
    experiment = experiment.model_copy(update={"model": ours.config})
    for step in (5, 10):
        state = {k: v if step == 10 else v * 0 for k, v in ours.state_dict().items()}
        save_checkpoint(Target(experiment, world, {"tokenizer": tokenizer.digest}), state, [], {"step": step})
    tokenizer.save(run / "tokenizer")
    (run / "evaluation").mkdir()
    record = run / "evaluation" / "step_00000010.json"
    scores = {**SCORES, "calibration": CALIBRATION, "request": {"checkpoint": open_checkpoint(run, 10).identity}}
    record.write_text(json.dumps(scores))

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["export_hf", str(run), *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    def tried(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["try_export", str(tmp_path / "a"), *arguments])
        with pytest.raises(SystemExit) as stop:
            try_main()
        assert not stop.value.code
        return capsys.readouterr().out

    assert call("--out", str(tmp_path / "a"), "--dtype", "float32") == (0, f"step 10 exported to {tmp_path / 'a'}\n")
    ids = some_ids(1, 30)
    with torch.no_grad():
        assert gap(load(tmp_path / "a")(ids).logits, ours(ids)) <= 1e-4
    assert "# quickstart, step 10" in (tmp_path / "a" / "README.md").read_text()
    assert "1.4062" in (tmp_path / "a" / "README.md").read_text()
    assert call("--out", str(tmp_path / "b"), "--step", "5")[0] == 0             # control: the other step
    assert "1.4062" not in (tmp_path / "b" / "README.md").read_text()
    assert json.loads((tmp_path / "a" / "config.json").read_text())[MAX] == [4.0, 2.0]
    assert MAX not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    said = tried("--tokens", "3")
    for way in ("full model", "stage 0 alone", "speculative, mean acc", "adaptive depth, mean depth ", "routed, mean"):
        assert f"\n[{way}" in said, said
    said = tried("--tokens", "3", "--temperature", "0.5")            # control: those that draw
    assert "[speculative" in said and "[adaptive" not in said and "[routed" not in said
    code, said = call("--out", str(tmp_path / "a"))
    assert code == 2 and said.startswith("error[config]") and said.count("\n") == 1
    assert call("--out", str(tmp_path / "a"), "--overwrite")[0] == 0
    assert call("--out", str(tmp_path / "c"), "--step", "6")[0] == 4
    own = scores["request"]["checkpoint"]
    for calibration, identity, expected in (  # control first: not calibrated, and of another checkpoint
            (None, "x", 0), (CALIBRATION, "x", 4), ({**CALIBRATION, MAX: [1.0]}, own, 3)):
        record.write_text(json.dumps({**SCORES, "calibration": calibration, "request": {"checkpoint": identity}}))
        code, said = call("--out", str(tmp_path / "c"), "--overwrite")
        assert code == expected and ("run scripts." in said) == (code > 0)
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
    record.write_text("{}")
    assert call("--out", str(tmp_path / "c"))[0] == 3
    record.unlink()
    Tokenizer.train([path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))], VOCAB).save(run / "tokenizer")
    code, said = call("--out", str(tmp_path / "c"))
    assert code == 4 and "another tokenizer" in said and not (tmp_path / "c").exists()
