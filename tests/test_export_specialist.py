"""Stage repos: a delta put on its parents by stock transformers is our model, and the base below stays what it was."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanopoe.checkpoint.delta import delta_shapes
from nanopoe.config.layout import CHAT_TOKENS
from nanopoe.config.schema import ModelConfig, SpecialistShape
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.export import export
from nanopoe.export.hub_code.cascade_nanopoe import delta_names
from nanopoe.export.names import hub_names, hub_shapes, to_hub
from nanopoe.export.stage import export_stage
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from tests.exports import VOCAB, first_of, gap, greedy, load, slow_greedy, specialist_model
from tests.ranks import model_config

CHAIN, NAMES = ((1, None), (2, 0), (1, 1)), ("a", "b", "c")


class Family:
    """A base and a chain of specialists as repos beside each other; loaded when they are asked for."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, model: GPT, dtype: Any = "float32"):
        self.folder, self.tokenizer, self.model, self.dtype = folder, tokenizer, model, dtype
        base, common = first_of(model, 0), {"step": 7, "dtype": dtype}
        export(base.config, base.state_dict(), tokenizer, folder / "base", name="base", **common)
        for n, name in enumerate(NAMES):
            part, names = first_of(model, n + 1), NAMES[:n + 1]
            export_stage(part.config, part.state_dict(), tokenizer, folder / name, base="base", specialists=names,
                         parent=str(folder / ("base", *NAMES)[n]), name=name, **common)
        export(model.config, model.state_dict(), tokenizer, folder / "whole", name="c", specialists=NAMES, **common)
        self.loaded: dict[str, Any] = {}

    def __call__(self, name: str) -> Any:
        if name not in self.loaded:
            self.loaded[name] = load(self.folder / name)
        return self.loaded[name]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Family:
    return Family(tmp_path_factory.mktemp("family"), tokenizer, specialist_model())


@pytest.fixture
def copied(family: Family, tmp_path: Path) -> Path:
    """The repos in a folder that a test may change."""
    shutil.copytree(family.folder, tmp_path / "family")
    return tmp_path / "family"


def plain_ids(batch: int = 2, length: int = 60) -> Tensor:
    """Without chat tokens."""
    return torch.randint(VOCAB - CHAT_TOKENS, (batch, length), generator=torch.Generator().manual_seed(1))


def any_ids() -> Tensor:
    ids = plain_ids()
    ids[:, 5::9], ids[:, 7] = VOCAB - 3, VOCAB - CHAT_TOKENS
    return ids


def edit(path: Path, **changes: Any) -> None:
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, **changes}))


# -- what is computed -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_a_chain_is_our_model_and_the_base_is_bit_for_bit_the_base(tmp_path: Path, tokenizer: Tokenizer, kind: str
                                                                   ) -> None:
    model = specialist_model(kind)
    family, ids = Family(tmp_path, tokenizer, model), any_ids()
    with torch.no_grad():
        states, K, base = model.boundary_states(ids), model.layout.n_stages, family("base")(plain_ids()).logits
        for n, name in enumerate(NAMES):
            repo = family(name)
            expected = model.stage_logits(states[K + n], K + n)
            assert gap(repo(ids).logits, expected) <= 1e-5
            assert gap(repo(plain_ids(), head_mode="base").logits, base) == 0.0
            assert gap(repo(plain_ids()).logits, base) > 1e-2                    # control: it says something else
            assert gap(repo(ids, head_mode="base").logits, model.base_scores(states)) <= 1e-5
            both = (model.base_scores(states).log_softmax(-1) + expected.log_softmax(-1)) / 2
            assert gap(repo(ids, head_mode="dual").logits, both.log_softmax(-1)) <= 1e-5
        ours = slow_greedy(model, ids, 12, repo.generation_config.eos_token_id)
        assert torch.equal(greedy(repo, ids, 12), ours)
        assert gap(family("base")(ids).logits, repo(ids, head_mode="base").logits) > 1e-3    # control: new chat tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_is_the_assembled_one_bit_for_bit(family: Family, tmp_path: Path, tokenizer: Tokenizer, dtype: str
                                                 ) -> None:
    if dtype != family.dtype:
        family = Family(tmp_path / "half", tokenizer, family.model, dtype)
    whole, chained, ids = family("whole"), family("c"), any_ids()
    assert {p.dtype for p in chained.parameters()} == {getattr(torch, dtype)}
    theirs, ours = whole.state_dict(), chained.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert {name: tuple(t.shape) for name, t in ours.items()} == hub_shapes(family.model.config)
    with torch.no_grad():
        for view in ({}, {"head_mode": "base"}, {"head_mode": "dual"}, {"specialist": "a"}, {"stage": 0}):
            assert torch.equal(whole(ids, **view).logits, chained(ids, **view).logits)
            assert torch.equal(whole(ids, **view).logits, whole(ids).logits) == (not view)        # control
    chained.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")                 # far from its parents
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in ours.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["parent"] is None
    assert again.generation_config.eos_token_id == chained.generation_config.eos_token_id == list(
        family("base").generation_config.eos_token_id)


def test_siblings_and_their_caches(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """s and t on the base, u on t."""
    model, names = specialist_model("shared", ((1, None), (2, None), (1, 1))), ("s", "t", "u")
    out = export(model.config, model.state_dict(), tokenizer, tmp_path / "x", step=1, name="x", dtype="float32",
                 specialists=names)
    repo, ids, K = load(out), any_ids(), model.layout.n_stages
    texts = []
    for i, name in enumerate(names):
        def logits(ids: Tensor, i: int = i) -> Tensor:
            return model.stage_logits(model.boundary_states(ids)[K + i], K + i)
        with torch.no_grad():
            assert gap(repo(ids, specialist=name).logits, logits(ids)) <= 1e-5
        expected = slow_greedy(logits, ids, 10, repo.generation_config.eos_token_id)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(greedy(repo, ids, 10, specialist=i, **options), expected)
        texts.append(expected.tolist())
    assert texts[0] != texts[1] != texts[2] != texts[0]                          # control
    dual = greedy(repo, ids, 10, head_mode="dual", specialist="t")
    assert torch.equal(dual, greedy(repo, ids, 10, head_mode="dual", specialist="t", use_cache=False))
    assert dual.tolist() not in texts
    with torch.no_grad():
        cache = repo(ids, specialist="u").past_key_values                        # ran t on its way
        repo(ids[:, :1], specialist="t", past_key_values=cache)
        for behind in ("s", "u"):
            with pytest.raises(ValueError, match=r"another view has filled it.*start with a new cache"):
                repo(ids[:, :1], specialist=behind, past_key_values=cache)
        repo(ids[:, :1], head_mode="base", past_key_values=cache)                # control: what ran for all goes on
    delta = export_stage(model.config, model.state_dict(), tokenizer, tmp_path / "u", step=1, name="u", base="base",
                         dtype="float32", specialists=names, parent="me/t@main")
    found = json.loads((delta / "config.json").read_text())
    assert [one["name"] for one in found["specialists"]] == ["t", "u"]           # s is no part of it
    assert found["parent"]["name"] == "t"


def test_views_that_do_not_exist_are_refused(family: Family) -> None:
    ids = plain_ids(1, 4)
    for repo, view, message in [
            ("base", {"head_mode": "specialist"}, "no specialists; only head_mode=\"base\""),
            ("base", {"specialist": 0}, "no specialists"),
            ("c", {"head_mode": "both"}, "one of base, specialist, dual, got 'both'"),
            ("c", {"specialist": "d"}, "specialist 'd': this model has a, b, c, by name or 0 to 2"),
            ("c", {"specialist": 3}, "by name or 0 to 2"),
            ("c", {"specialist": "a", "head_mode": "base"}, "exclude each other"),
            ("c", {"stage": 0, "head_mode": "dual"}, "are of the base"),
            ("c", {"prefix": 1, "specialist": "a"}, "are of the base")]:
        with pytest.raises(ValueError, match=message):
            family(repo).generate(ids, max_new_tokens=1, **view)
    assert torch.equal(family("base")(ids, head_mode="base").logits, family("base")(ids).logits)       # control


def test_the_modes_of_the_base_stay(family: Family) -> None:
    ids = plain_ids(2, 20)
    plain = family("base").generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1)
    for repo in ("base", "c"):
        assert torch.equal(family(repo).generate_speculative(ids, max_new_tokens=12, eos_token_id=[]), plain)
    assert not torch.equal(family("c").generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=-1), plain)


# -- what is on the disk ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("blocks, tensors, elements", [(4, 28, 213_909_560), (2, 16, 157_286_452)])
def test_published_sizes_of_a_delta(blocks: int, tensors: int, elements: int) -> None:
    m = model_config(n_layer=24, n_embd=1536, n_head=12, n_kv_head=12, vocab_size=32768, poe_every=6,
                     sequence_len=2048, specialists=(SpecialistShape(n_layer=blocks, parent=None),))
    shapes = delta_shapes(m)
    assert (len(shapes), sum(math.prod(s) for s in shapes.values())) == (tensors, elements)
    assert shapes.keys() == {*delta_names(24, blocks), "lm_head_stage.weight"}
    assert shapes.keys() != {*delta_names(23, blocks), "lm_head_stage.weight"}   # control
    whole = hub_shapes(m)
    assert sum(math.prod(s) for s in whole.values()) == 1_384_122_122 + elements - 32768 * 1536 - 2 * 24
    assert set(hub_names(m).values()) == set(whole)


def test_a_delta_holds_its_own_tensors_alone(family: Family) -> None:
    for n, (name, (blocks, _)) in enumerate(zip(NAMES, CHAIN, strict=True)):
        folder = family.folder / name
        assert [path.name for path in folder.glob("*.safetensors")] == ["delta.safetensors"]
        own = load_file(folder / "delta.safetensors")
        part = first_of(family.model, n + 1).config
        assert {name: tuple(t.shape) for name, t in own.items()} == delta_shapes(part)
        assert f"transformer.h.{4 + sum(c for c, _ in CHAIN[:n])}.attn.c_q.weight" in own
        config = json.loads((folder / "config.json").read_text())
        assert config["parent"]["repo"] == f"../{('base', *NAMES)[n]}" and config["specialists"][-1]["blocks"] == blocks
        base = load_file(family.folder / "base" / "model.safetensors")["model.embed_tokens.weight"]
        moved = (own["transformer.wte.weight"] != base).any(-1).nonzero().flatten().tolist()
        assert moved == list(range(VOCAB - CHAT_TOKENS, VOCAB))
    assert "digest" not in (family.folder / "whole" / "config.json").read_text()


def test_no_code_of_a_parent_runs(copied: Path) -> None:
    for folder in ("base", "a", "b"):
        for path in (copied / folder).glob("*.py"):
            path.write_text("raise SystemExit('code of a parent')")
    assert load(copied / "c").config.num_hidden_layers == 4 + 4 + 1
    with pytest.raises(SystemExit):                                              # control
        load(copied / "b")


def test_a_parent_on_the_hub_is_read_at_its_revision(family: Family, tmp_path: Path) -> None:
    """From a filled cache, without a network: main of the parent is another model."""
    sha = "ab" * 20
    for name, snapshots in (("base", {sha: "base", "cd" * 20: "whole"}), ("a", {"ef" * 20: "stage"})):
        cached = tmp_path / f"models--me--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(list(snapshots)[-1])
        for revision, source in snapshots.items():
            if source == "stage":
                part = first_of(family.model, 1)
                export_stage(part.config, part.state_dict(), family.tokenizer, cached / "snapshots" / revision,
                             base="base", specialists=("a",), parent=f"me/base@{sha}", name="a", step=7,
                             dtype="float32")
            else:
                shutil.copytree(family.folder / source, cached / "snapshots" / revision)
    repo = load("me/a", cache_dir=tmp_path)                                      # type: ignore[arg-type]
    ids = any_ids()
    with torch.no_grad():
        assert torch.equal(repo(ids).logits, family("a")(ids).logits)
    card = (tmp_path / "models--me--a" / "snapshots" / ("ef" * 20) / "README.md").read_text()
    assert "base_model: me/base\nbase_model_relation: finetune\n" in card
    stage = tmp_path / "models--me--a" / "snapshots" / ("ef" * 20)
    for change, message in (({"revision": "main"}, r"me/base \(c\) is not the model it was trained on \(base\)"),
                            ({"repo": "../base"}, "the folder ../base beside it: load it from a folder")):
        edit(stage / "config.json", parent={**parent_of(stage), **change})
        with pytest.raises(ValueError, match=message):
            load("me/a", cache_dir=tmp_path)                                     # type: ignore[arg-type]


def test_a_parent_may_be_in_shards(family: Family, copied: Path) -> None:
    base = first_of(family.model, 0)
    export(base.config, base.state_dict(), family.tokenizer, copied / "base", name="base", step=7, dtype="float32",
           max_shard_size="200KB", overwrite=True)
    assert len(list((copied / "base").glob("*.safetensors"))) > 2
    with torch.no_grad():
        assert torch.equal(load(copied / "c")(any_ids()).logits, family("c")(any_ids()).logits)
    index = copied / "base" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../base/model-00001"))
    with pytest.raises(ValueError, match="its index names files outside of it"):
        load(copied / "c")


# -- what does not fit ------------------------------------------------------------------------------------------------

def parent_of(path: Path) -> dict[str, Any]:
    return dict(json.loads((path / "config.json").read_text())["parent"])


def without_parent(repos: Path) -> None:
    shutil.rmtree(repos / "a")


def without_files(repos: Path) -> None:
    (repos / "base" / "model.safetensors").unlink()


def cycle(repos: Path) -> None:
    edit(repos / "a" / "config.json", parent={**parent_of(repos / "a"), "repo": "../b"})


def other_base(repos: Path) -> None:
    tensors = load_file(repos / "base" / "model.safetensors")
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, repos / "base" / "model.safetensors", metadata={"format": "pt"})
    edit(repos / "base" / "config.json", nanopoe_run={"name": "cousin", "step": 1})


def absolute(repos: Path) -> None:
    edit(repos / "b" / "config.json", parent={**parent_of(repos / "b"), "repo": str(repos / "a")})


def changed(name: str, row: int) -> Callable[[Path], None]:
    def change(repos: Path) -> None:
        tensors = load_file(repos / "c" / "delta.safetensors")
        tensors[name][row] += 1
        save_file(tensors, repos / "c" / "delta.safetensors")
    return change


def overwrites(repos: Path) -> None:
    tensors = load_file(repos / "c" / "delta.safetensors")
    tensors["transformer.h.3.attn.c_q.weight"] = tensors["transformer.h.7.attn.c_q.weight"].clone()
    save_file(tensors, repos / "c" / "delta.safetensors")


@pytest.mark.parametrize("damage, error, message", [
    (without_parent, OSError, r"/b: its parent is not there \(.*/a: no such folder\)"),
    (without_files, OSError, "base.*no model.safetensors"),
    (cycle, ValueError, "/a: its parent .*/b stands on it: a cycle of parents"),
    (other_base, ValueError, r"/a: .*/base \(cousin\) is not the model it was trained on \(base\): its digest"),
    (absolute, ValueError, "no id on the Hub and no relative folder"),
    (changed("transformer.wte.weight", VOCAB - CHAT_TOKENS - 1), ValueError, "transformer.wte.weight changes what"),
    (changed("resid_lambdas", 6), ValueError, "resid_lambdas changes what belongs to its parent"),
    (changed("x0_lambdas", 0), ValueError, "x0_lambdas changes what belongs to its parent"),
    (overwrites, ValueError, "does not hold the tensors of a specialist.*transformer.h.3.attn.c_q.weight"),
], ids=lambda value: getattr(value, "__name__", ""))
def test_a_damaged_chain_is_refused(copied: Path, damage: Callable[[Path], None], error: type[Exception], message: str
                                    ) -> None:
    damage(copied)
    with pytest.raises(error, match=message) as found:
        load(copied / "c")
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("name, row", [("transformer.wte.weight", VOCAB - CHAT_TOKENS), ("resid_lambdas", 7)])
def test_what_is_new_may_differ(copied: Path, family: Family, name: str, row: int) -> None:
    """Control of the refusals: the first row and entry that are the delta's own."""
    changed(name, row)(copied)
    with torch.no_grad():
        assert gap(load(copied / "c")(any_ids()).logits, family("c")(any_ids()).logits) > 1e-3


def test_export_refuses_another_parent(family: Family, tmp_path: Path, copied: Path) -> None:
    model = first_of(family.model, 2)

    def attempt(parent: Any, dtype: Any = "float32") -> None:
        export_stage(model.config, model.state_dict(), family.tokenizer, tmp_path / "out", base="base",
                     specialists=("a", "b"), parent=str(parent), name="b", step=7, dtype=dtype)

    with pytest.raises(CheckpointError, match="is base, step 7, not the model this specialist stands on"):
        attempt(family.folder / "base")
    with pytest.raises(ConfigError, match="is in float32, this export in bfloat16"):
        attempt(family.folder / "a", "bfloat16")
    with pytest.raises(ConfigError, match="is no folder and no ORG/NAME@REVISION"):
        attempt("me/a")
    with pytest.raises(CheckpointError, match="cannot be read as an export"):
        attempt(tmp_path)
    other_base(copied)
    with pytest.raises(CheckpointError, match=r"cannot be read as an export.*cousin"):
        attempt(copied / "a")
    assert not (tmp_path / "out").exists()
    attempt(family.folder / "a")                                                 # control
    assert gap(load(tmp_path / "out")(any_ids()).logits, family("b")(any_ids()).logits) == 0.0


def test_tensors_without_specialists_are_as_before() -> None:
    m: ModelConfig = first_of(specialist_model(), 0).config
    assert "lm_head_specialists.0.weight" not in dict(to_hub(m, GPT(m).state_dict(), torch.float32))
