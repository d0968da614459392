"""Specialists: the base never moves, resumes are bitwise, a cache changes nothing, what does not fit is refused."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.checkpoint import digest as checkpoint_digest
from nanopoe.checkpoint import folder_of, list_steps, open_checkpoint
from nanopoe.checkpoint.cascade import open_cascade
from nanopoe.config import experiment_from_dict, load_experiment
from nanopoe.config.counts import parameter_shapes, trained_shapes
from nanopoe.config.schema import ModelConfig, SpecialistShape
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError, NanopoeError
from nanopoe.model import GPT
from nanopoe.model.specialist import backward, scale_entry
from nanopoe.train import loop
from nanopoe.train.restore import load_cascade
from nanopoe.train.state_cache import StateCache
from tests.models import live_model
from tests.ranks import experiment_dict, model_config, run_ranks
from tests.rows import chat_shards

ALONE = World(0, 1, torch.device("cpu"))
ROOT = Path(__file__).parents[1]
BP = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}


def stage(n_layer: int = 2, parent: int | None = None) -> dict[str, Any]:
    return {"n_layer": n_layer, "parent": parent}


def specialist_dict(data: Path, run_dir: Path, base: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A tiny specialist on the run `base`: the schedule, data and batch of experiment_dict."""
    chain = list(stages) or [stage()]
    return experiment_dict(data, run_dir, **{
        "name": run_dir.name, "task": "specialist", "seed": 3, "optim.embedding_lr": None,
        "specialist": {"base": str(base), "base_step": None, "warm_start": len(chain) == 1, "scale_entry": False},
        "model.specialists": chain, **changes})


def train(world: World, experiment: dict[str, Any]) -> int:
    return loop.train(experiment_from_dict(experiment, "test"), world).step


def digest(run: Path, step: int) -> str:
    return checkpoint_digest(open_checkpoint(run, step))


@pytest.fixture(scope="session", params=["poe", "bp"])
def base(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained base of either kind: PoE with stage heads, BP with its backout."""
    run = tmp_path_factory.mktemp("bases") / request.param
    train(ALONE, experiment_dict(data, run, **(BP if request.param == "bp" else {}), **{"checkpoint.every": None}))
    return run


def like(base: Path) -> dict[str, Any]:
    """The changes of experiment_dict that `base` was trained with."""
    return BP if base.name == "bp" else {}


@pytest.fixture(scope="session")
def poe_base(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("bases") / "base"
    train(ALONE, experiment_dict(data, run, **{"checkpoint.every": 4}))
    return run


def ids_without_chat(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 300 - 8, (3, 32), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def base_logits(model: GPT, ids: torch.Tensor) -> torch.Tensor:
    return model.base_scores(model.boundary_states(ids))


# -- the promise ------------------------------------------------------------------------------------------------------

def test_twelve_checkpoints_leave_the_base_as_it_was(data: Path, base: Path, tmp_path: Path) -> None:
    """Base logits of every checkpoint differ from the base's own by exactly 0; the specialist's own do move."""
    ids = ids_without_chat()
    alone = load_cascade(base, None, ALONE).model
    with torch.no_grad():
        before = alone(ids)
    run = tmp_path / "run"
    steps = {"schedule.cycles.0.steps": 9, "schedule.cycles.0.warmup_steps": 0}
    train(ALONE, specialist_dict(data, run, base, **like(base), **steps))
    assert list_steps(run) == list(range(1, 13))
    moved = []
    for step in list_steps(run):
        model = load_cascade(run, step, ALONE).model
        assert torch.equal(base_logits(model, ids), before), step
        with torch.no_grad():
            moved.append((model(ids) - model.stage_logits(model.boundary_states(ids)[-2], model.layout.n_stages - 1))
                         .abs().max().item())
    assert min(moved) > 0 and moved[-1] > moved[0]                             # control


def test_at_step_0_a_specialist_is_the_base(base: Path) -> None:
    config = open_checkpoint(base).experiment.model.model_copy(
        update={"specialists": (SpecialistShape(n_layer=3, parent=None),)})
    model = GPT(config)
    model.init_weights(0)
    with torch.no_grad():
        for name, p in model.named_parameters():                               # a lively base
            if not name.startswith("specialists."):
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        states = model.boundary_states(ids_without_chat())
        assert torch.equal(states[-1], states[-2])
        assert torch.equal(model(ids_without_chat()), model.stage_logits(states[-2], model.layout.n_stages - 1))
        model.specialists[0].h[2].mlp.c_proj.weight.add_(0.1)                  # control
        assert not torch.equal(model.boundary_states(ids_without_chat())[-1], states[-2])


def test_a_scaled_entry_keeps_the_expert(data: Path, poe_base: Path, tmp_path: Path) -> None:
    """r of the first new block is a power of two that brings its state to about one; the expert is the same."""
    loaded = load_cascade(poe_base, None, ALONE).model
    model = GPT(loaded.config.model_copy(update={"specialists": (SpecialistShape(n_layer=2, parent=None),)}))
    model.init_weights(0)
    model.load_state_dict(loaded.state_dict(), strict=False)
    with torch.no_grad():
        for name in ("resid_lambdas", "x0_lambdas"):
            getattr(model, name).mul_(3)                                       # a long residual stream
        before = model(ids_without_chat())
        length = model.boundary_states(ids_without_chat())[-1].square().mean().sqrt()
        scale_entry(model, 0)
        state = model.boundary_states(ids_without_chat())[-1]
        assert length > 4 and 0.5 < state.square().mean().sqrt() < 2           # control: it was long
        torch.testing.assert_close(model(ids_without_chat()), before, rtol=0, atol=1e-4)
    r, *rest = model.specialists[0].resid_lambdas.tolist()
    assert math.log2(r).is_integer() and r < 0.5 and rest[0] == 1
    model.load_state_dict(loaded.state_dict(), strict=False)                   # and in a run, but for one update
    scale_entry(model, 3)
    for run, scaled in (("run", True), ("as", False)):
        train(ALONE, specialist_dict(data, tmp_path / run, poe_base, **{"specialist.scale_entry": scaled}))
    one, other = (float(open_checkpoint(tmp_path / run, 1).read("specialists.0.resid_lambdas")[0])
                  for run in ("run", "as"))
    assert abs(one - float(model.specialists[0].resid_lambdas[0])) < 0.01 and abs(other - 1) < 0.01 < abs(one - 1)


def test_only_the_last_specialist_learns() -> None:
    """Gradients reach all of it and nothing else; what is frozen keeps no graph."""
    model = live_model(model_config(specialists=(SpecialistShape(n_layer=2, parent=None),
                                                 SpecialistShape(n_layer=1, parent=0))))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("lm_head_stage.weight"):
                p.normal_(0, 0.1)
    ids = torch.randint(0, 300, (2, 32))
    objective = experiment_from_dict(experiment_dict(Path("d"), Path("out/x")), "test").objective
    losses = backward(model, ids, ids.roll(-1, 1), objective, 1.0)
    learned = {name for name, p in model.named_parameters() if p.grad is not None and bool(p.grad.any())}
    assert learned == set(trained_shapes(model.config)) and all(name.startswith("specialists.1.") for name in learned)
    assert losses.stages.shape == (1,)
    expected = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="sum")
    torch.testing.assert_close(losses.total, expected.detach(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("layers", "trainable"), [(4, 163_577_856), (2, 106_954_752)])
def test_the_published_specialists_have_the_published_sizes(layers: int, trainable: int) -> None:
    """On the meta device; the published count leaves out the 2n new entries of r and c."""
    base = load_experiment(ROOT / "configs" / "poe_1p3b.yaml").model
    config = base.model_copy(update={"specialists": (SpecialistShape(n_layer=layers, parent=None),)})
    with torch.device("meta"):
        model = GPT(config)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == parameter_shapes(config)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == trainable + 2 * layers
    assert sum(map(math.prod, trained_shapes(config).values())) == trainable + 2 * layers


@pytest.mark.parametrize("n_layer", [1, 2, 3])
@pytest.mark.parametrize("layers", [3, 4])
def test_appending_moves_no_window_and_no_value_embedding(layers: int, n_layer: int) -> None:
    """Odd and even numbers of layers, above and below: what is derived from the depth is the base's."""
    changes = {"n_layer": layers, "poe_every": None, "poe_stage_layers": (1, layers - 1), "sequence_len": 64}
    alone = live_model(model_config(**changes))
    whole = live_model(model_config(**changes, specialists=(SpecialistShape(n_layer=n_layer, parent=None),)))
    assert (alone.layout.ve_layers, alone.layout.window_sizes) == (whole.layout.ve_layers, whole.layout.window_sizes)
    whole.load_state_dict(alone.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.equal(base_logits(whole, ids_without_chat()), alone(ids_without_chat()))


# -- runs -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [1, 2])
def test_a_resume_is_bitwise(data: Path, poe_base: Path, tmp_path: Path, size: int) -> None:
    whole = tmp_path / "whole"
    assert run_ranks(train, size, specialist_dict(data, whole, poe_base)) == [8] * size
    for step in (1, 5, 6):
        again = tmp_path / f"from{step}"
        shutil.copytree(whole, again)
        for later in range(step + 1, 9):
            shutil.rmtree(folder_of(again, later))
        run_ranks(train, size, specialist_dict(data, again, poe_base, name="whole"))
        assert digest(again, 8) == digest(whole, 8), step
    run_ranks(train, size, specialist_dict(data, tmp_path / "other", poe_base, seed=4))
    assert digest(tmp_path / "other", 8) != digest(whole, 8)                   # control


def test_the_world_size_changes_nothing_in_strict_numerics(data: Path, poe_base: Path, tmp_path: Path) -> None:
    strict = {"runtime.numerics": "strict", "runtime.timeout_s": 60}
    run_ranks(train, 1, specialist_dict(data, tmp_path / "one", poe_base, **strict))
    run_ranks(train, 2, specialist_dict(data, tmp_path / "two", poe_base, **strict))
    assert digest(tmp_path / "one", 8) == digest(tmp_path / "two", 8)


def test_the_cache_changes_no_bit_and_is_read(data: Path, poe_base: Path, tmp_path: Path) -> None:
    """Steps come again after 3; with the cache the base runs for those alone. A damaged file is computed anew."""
    def run(name: str, cached: bool) -> Any:
        experiment = specialist_dict(data, tmp_path / name, poe_base, **{"specialist.cache_states": cached,
                                                                         "data.replay_steps": 3})
        return loop.train(experiment_from_dict(experiment, "test"), ALONE)

    run("plain", False)
    keep = run("cached", True).keep
    assert digest(tmp_path / "cached", 8) == digest(tmp_path / "plain", 8)
    assert (keep.computed, keep.read, keep.full) == (3 * 8, 5 * 8, False)      # 8 rows a step
    files = [p for p in (tmp_path / "cached" / "cache").rglob("*") if p.is_file()]
    assert len(files) == 24
    torn = files[0].read_bytes()
    files[0].write_bytes(torn[:-1] + bytes([torn[-1] ^ 1]))
    for step in range(1, 9):
        shutil.rmtree(folder_of(tmp_path / "cached", step))
    again = run("cached", True).keep
    assert digest(tmp_path / "cached", 8) == digest(tmp_path / "plain", 8)
    assert again.computed == 4                                                 # one micro-batch, once
    assert files[0].read_bytes() == torn


def test_a_cache_is_of_its_chat_tokens_too(data: Path, poe_base: Path, tmp_path: Path) -> None:
    """Trained anew in the same folder with other embeddings of the chat tokens: their states are other states."""
    chat = chat_shards(tmp_path / "chat")
    for run, warm in (("one", True), ("one", False), ("fresh", False)):
        experiment = specialist_dict(data, tmp_path / run, poe_base, **{
            "specialist.cache_states": True, "specialist.warm_start": warm})
        experiment["data"] = {"kind": "conversations", "train": [{"name": "c", "path": str(chat / "train")}],
                              "val": [{"name": "c", "path": str(chat / "val")}], "lanes": 4, "packing": "bestfit_pad",
                              "buffer_documents": 8, "case_aug_prob": 0.0, "json_layout_prob": 0.0, "replay_steps": 3}
        if list_steps(tmp_path / run):
            shutil.rmtree(tmp_path / run / "checkpoints")
        train(ALONE, experiment)
    assert digest(tmp_path / "one", 8) == digest(tmp_path / "fresh", 8)


def test_a_full_disk_under_the_cache_is_told(data: Path, poe_base: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "cache").write_text("")
    train(ALONE, specialist_dict(data, tmp_path / "run", poe_base, **{"specialist.cache_states": True,
                                                                      "data.replay_steps": 3}))
    told = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert told.count("states are no longer kept") == 1 and list_steps(tmp_path / "run")[-1] == 8


def apart(world: World, experiment: dict[str, Any], bases: list[str]) -> str:
    experiment["specialist"]["base"] = bases[world.rank]
    try:
        train(world, experiment)
    except CheckpointError as error:
        return error.render()
    return "trained"


def test_ranks_on_different_bases_stop(data: Path, poe_base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    train(ALONE, experiment_dict(data, other, seed=9))
    said = run_ranks(apart, 2, specialist_dict(data, tmp_path / "run", poe_base), [str(poe_base), str(other)])
    assert said[0] == said[1] and "rank 1 found another base than rank 0" in said[0]


def test_a_cache_that_cannot_be_written_costs_time_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    keep = StateCache(tmp_path / "file" / "cache", 2, torch.float32)
    ids, x = torch.arange(6).view(2, 3), torch.randn(2, 3, 2)
    assert torch.equal(keep(ids, lambda: x), x) and torch.equal(keep(ids, lambda: x), x)
    assert keep.problem and keep.full and keep.read == 0


def test_chat_tokens_are_warm_and_the_base_is_not_touched(data: Path, poe_base: Path, tmp_path: Path) -> None:
    train(ALONE, specialist_dict(data, tmp_path / "warm", poe_base))
    train(ALONE, specialist_dict(data, tmp_path / "cold", poe_base, **{"specialist.warm_start": False}))
    warm, cold = (load_cascade(tmp_path / name, None, ALONE) for name in ("warm", "cold"))
    wte = warm.model.transformer["wte"].weight
    newline = warm.tokenizer.encode("\n")
    assert len(newline) == 1 and torch.equal(warm.model.chat_rows[7], wte[newline[0]])
    assert torch.equal(warm.model.chat_rows[1], warm.model.chat_rows[3])
    assert torch.equal(cold.model.chat_rows, wte[292:300])
    ids = torch.tensor([[1, 293, 5]])
    with torch.no_grad():
        assert not torch.equal(warm.model.embed(ids), cold.model.embed(ids))
        assert torch.equal(warm.model.embed(ids[:, :1]), cold.model.embed(ids[:, :1]))


def test_sft_starts_from_a_run_and_goes_on_without_it(data: Path, base: Path, tmp_path: Path) -> None:
    """The weights of init_from are the start; a resume needs it no more, and is bitwise."""
    chat = chat_shards(tmp_path / "chat")
    sft = {**like(base), "task": "sft", "init_from": {"path": str(base), "step": None}}

    def run(name: str, **changes: Any) -> Path:
        experiment = experiment_dict(data, tmp_path / name, **{**sft, **changes})
        experiment["data"] = {"kind": "conversations", "train": [{"name": "c", "path": str(chat / "train")}],
                              "val": [{"name": "c", "path": str(chat / "val")}], "lanes": 4, "packing": "bestfit_pad",
                              "buffer_documents": 8, "case_aug_prob": 0.0, "json_layout_prob": 0.0}
        train(ALONE, experiment)
        return tmp_path / name

    whole = run("sft")
    start, name = open_checkpoint(base), "value_embeds.1.weight"
    far = (open_checkpoint(whole, 1).read(name) - start.read(name)).abs().mean()
    fresh = run("fresh", init_from=None, task="pretrain", seed=11)
    assert far < 0.05 < (open_checkpoint(fresh, 1).read(name) - start.read(name)).abs().mean()       # control
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    for later in range(4, 9):
        shutil.rmtree(folder_of(again, later))
    run("again", init_from={"path": "gone", "step": None})
    assert digest(again, 8) == digest(whole, 8)


# -- what does not fit ------------------------------------------------------------------------------------------------

def test_another_base_is_refused(data: Path, poe_base: Path, tmp_path: Path) -> None:
    run, base = tmp_path / "run", tmp_path / "base"
    shutil.copytree(poe_base, base)
    train(ALONE, specialist_dict(data, run, base, **{"specialist.base_step": 8}))
    train(ALONE, specialist_dict(data, run, base, **{"specialist.base_step": 8}))      # finished, and found again
    with pytest.raises(CheckpointError, match="is not the base this run was trained on"):
        train(ALONE, specialist_dict(data, run, base, **{"specialist.base_step": 4}))
    other = tmp_path / "other"
    train(ALONE, experiment_dict(data, other, seed=9))
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"its base base cannot be opened.*--base"):
        open_cascade(run)
    with pytest.raises(CheckpointError, match=r"stands on base, whose digest begins with .* not on tiny"):
        open_cascade(run, base=other)
    assert open_cascade(run, base=poe_base).names == ("run",)


@pytest.mark.parametrize(("changes", "words"), [
    ({"model.n_embd": 64}, r"model.n_embd is 64, its base has 32"),
    ({"model.window_pattern": "L", "model.sequence_len": 64}, r"model.window_sizes is \(64, 64, 64, 64\), its"),
    ({"model.sequence_len": 16}, "model.sequence_len 16 is below"),
    ({"model.stage_heads": False}, "model.stage_heads is False"),
    ({"model.specialists": [stage(), stage(2, 0)], "specialist.warm_start": False}, "has specialists of"),
    ({"specialist.base": "nowhere"}, "no checkpoint"),
    ({"specialist.base_step": 5}, "no checkpoint of step 5"),
])
def test_a_base_that_does_not_fit_is_refused(data: Path, poe_base: Path, tmp_path: Path, changes: dict[str, Any],
                                             words: str) -> None:
    with pytest.raises(NanopoeError, match=words):
        train(ALONE, specialist_dict(data, tmp_path / "run", poe_base, **changes))
    assert not list_steps(tmp_path / "run")


def test_a_longer_context_needs_the_windows_written_out(data: Path, poe_base: Path, tmp_path: Path) -> None:
    windows = open_checkpoint(poe_base).experiment.model
    assert windows.window_sizes is None
    longer = {"model.sequence_len": 64, "model.window_sizes": [32] * 4, "batch.device_batch_size": 2}
    train(ALONE, specialist_dict(data, tmp_path / "run", poe_base, **longer))
    model = load_cascade(tmp_path / "run", None, ALONE).model
    assert model.specialists[0].h[0].attn.window == 64
    with torch.no_grad():
        alone = load_cascade(poe_base, None, ALONE).model
        assert torch.equal(base_logits(model, ids_without_chat()), alone(ids_without_chat()))


@pytest.mark.parametrize(("changes", "line"), [
    ({"task": "pretrain"}, "specialist: must be null with task pretrain"),
    ({"specialist": None}, "specialist: needed with task specialist"),
    ({"model.specialists": []}, "model.specialists: needed with task specialist"),
    ({"model.specialists": [stage(2, 0)]}, "model.specialists.0.parent: 0 does not come before it; null is the base"),
    ({"model.specialists": [stage(), stage()], "specialist.warm_start": False},
     "model.specialists: a run trains the end of one chain; every parent must be the specialist before"),
    ({"optim.embedding_lr": 0.1}, "optim.embedding_lr: must be null with task specialist, which trains no embeddings"),
    ({"init_from": {"path": "out/x", "step": None}}, "init_from: must be null with task specialist"),
    ({"specialist.cache_states": True},
     "specialist.cache_states: no row comes again without data.replay_steps; set it, or false"),
    ({"name": "base"}, "name: a specialist cannot be called 'base'; the base and stages are called so"),
    ({"objective.alpha": 0.5}, "objective: a specialist has one loss, so kind must be ce and alpha 0"),
    ({"task": "sft", "specialist": None, "model.specialists": [], "optim.embedding_lr": 0.1,
      "init_from": {"path": "out/x", "step": None}}, "data.kind: task sft needs conversations, got text"),
])
def test_a_task_that_makes_no_sense_is_one_line(data: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(specialist_dict(data, Path("out/run"), Path("out/base"), **changes), "test")
    assert line in caught.value.problems
    good: ModelConfig = experiment_from_dict(specialist_dict(data, Path("out/run"), Path("out/base")), "test").model
    assert good.base.specialists == ()
