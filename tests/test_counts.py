"""Parameters, tensors, FLOPs, memory: the published numbers, the formula of SPEC 1, and the model that is built."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.config import ModelConfig, layout_of, load_experiment, memory
from nanopoe.config.counts import (
    GROUPS,
    count_parameters,
    flops_per_token,
    forward_flops_per_stage,
    group_of,
    parameter_shapes,
    scaling_parameters,
)
from nanopoe.config.memory import GIB, Memory, largest_batch, memory_per_rank
from nanopoe.model import GPT, head
from nanopoe.optim import dist_muon_adamw, kernels
from nanopoe.optim.dist_muon_adamw import DistMuonAdamW
from nanopoe.optim.groups import build_groups
from scripts.model_info import assert_built, describe
from tests.ranks import model_config

ROOT = Path(__file__).parents[1]


def published(name: str) -> ModelConfig:
    return load_experiment(ROOT / "configs" / f"{name}.yaml").model


@pytest.mark.parametrize(("name", "parameters", "tensors", "boundaries"), [
    ("bp_1p3b", 1_384_122_122, 175, (23,)),
    ("poe_1p3b", 1_384_122_122, 175, (5, 11, 17, 23)),
    ("poe_3b", 3_019_900_506, 235, (15, 21, 26, 31)),
    ("poe_3b_cycle2", 3_019_900_506, 235, (15, 21, 26, 31)),
    ("poe_1p5b", 1_507_591_082, 179, (11, 16, 20, 23)),
])
def test_published_counts_are_exact(name: str, parameters: int, tensors: int, boundaries: tuple[int, ...]) -> None:
    m = published(name)
    counts = count_parameters(m)
    assert (counts.total, counts.tensors) == (parameters, tensors)
    assert layout_of(m).boundaries == boundaries
    assert set(counts.by_group) == set(GROUPS)
    assert sum(counts.by_group.values()) == parameters
    shallower = m.model_copy(update={"n_layer": m.n_layer - 1, "poe_mode": "none"})           # control
    assert count_parameters(shallower).total != parameters


def test_scaling_parameters() -> None:
    d24 = published("bp_1p3b")
    assert scaling_parameters(d24) == 729_810_624
    assert scaling_parameters(d24.model_copy(update={"n_layer": 12, "n_embd": 768, "n_head": 6, "n_kv_head": 6})) \
        == 110_100_912 == load_experiment(ROOT / "configs/bp_1p3b.yaml").optim.reference_scaling_params


def test_layouts_of_the_published_models() -> None:
    layout = layout_of(published("poe_3b"))
    assert layout.ve_layers == tuple(range(1, 32, 2))
    assert layout.window_sizes == (512, 512, 512, 2048) * 8
    assert layout_of(published("bp_1p3b").model_copy(update={"n_layer": 23})).window_sizes[-1] == 2048
    assert layout_of(published("bp_1p3b").model_copy(update={"n_layer": 23})).ve_layers == tuple(range(0, 23, 2))


models = st.builds(
    lambda L, heads, groups, half, V, I, mode, stage_heads, T: model_config(
        n_layer=L, n_head=heads * groups, n_kv_head=heads, n_embd=heads * groups * 2 * half, vocab_size=V,
        intermediate_size=I, sequence_len=T, poe_mode=mode, poe_every=None if mode == "none" else 1,
        stage_heads=stage_heads and mode != "none"),
    st.integers(1, 7), st.integers(1, 3), st.integers(1, 3), st.integers(12, 20), st.integers(265, 600),
    st.none() | st.integers(1, 300), st.sampled_from(["none", "flat", "hier"]), st.booleans(), st.integers(1, 700))


@settings(max_examples=60, deadline=None)
@given(models)
def test_counts_equal_the_formula_and_the_built_model(m: ModelConfig) -> None:
    layout, counts = layout_of(m), count_parameters(m)
    V, d, L, H, I = layout.padded_vocab, m.n_embd, m.n_layer, layout.stage_heads, layout.intermediate
    kv, n_ve = m.n_kv_head * layout.head_dim, math.ceil(L / 2)
    assert counts.total == (V * d * (2 + H) + L * (2 * d**2 + 2 * d * kv + 2 * d * I)
                            + n_ve * (V * kv + 12 * m.n_kv_head) + 2 * L + 26)
    assert counts.tensors == 2 + H + 6 * L + 2 * n_ve + 5
    with torch.device("meta"):
        built = {name: tuple(p.shape) for name, p in GPT(m).named_parameters()}
    assert built == parameter_shapes(m)


def test_every_parameter_has_one_group() -> None:
    shapes = parameter_shapes(model_config(stage_heads=True))
    found = {group: [n for n in shapes if group_of(n) == group] for group in GROUPS}
    assert sum(map(len, found.values())) == len(shapes)
    assert all(found.values())
    assert found["scalars"] == ["resid_lambdas", "x0_lambdas", "smear_gate.weight", "smear_lambda", "backout_lambda"]
    assert "transformer.h.1.attn.ve_gate.weight" in found["matrices"]
    assert found["wte"] == ["transformer.wte.weight"]


# -- FLOPs ------------------------------------------------------------------------------------------------------------

def naive_flops(m: ModelConfig) -> int:
    """6 per element of a matmul weight and use, 12 H D window per layer: written down another way."""
    with torch.device("meta"):
        model = GPT(m)
    layout = model.layout
    total = sum(6 * p.numel() for n, p in model.named_parameters() if n.startswith("transformer.h."))
    total += 6 * model.lm_head.weight.numel() * layout.n_stages
    return total + sum(12 * m.n_head * layout.head_dim * w for w in layout.window_sizes)


@settings(max_examples=30, deadline=None)
@given(models)
def test_flops(m: ModelConfig) -> None:
    assert flops_per_token(m) == naive_flops(m) == 3 * sum(forward_flops_per_stage(m))
    assert len(forward_flops_per_stage(m)) == layout_of(m).n_stages


def test_flops_against_torch_counter() -> None:
    """The forward of the built model as counted by torch: weights exactly, attention over the full square."""
    from torch.utils.flop_counter import FlopCounterMode

    m = model_config(vocab_size=320, n_kv_head=1)             # no padding, so the cropped head is the whole
    with torch.device("meta"):
        model, ids = GPT(m), torch.zeros(2, 32, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        for k, x in enumerate(model.boundary_states(ids)):
            model.stage_logits(x, k)
    smear = 2 * 24 * 2 * 31                                    # 24 -> 1 gate of every position but the first
    assert counter.get_total_flops() - smear == 2 * 32 * sum(forward_flops_per_stage(m))


def test_published_flops() -> None:
    m = published("bp_1p3b")
    assert flops_per_token(m) == 6 * 729_810_624 + 12 * 1536 * (18 * 512 + 6 * 2048)
    assert flops_per_token(published("poe_1p3b")) - flops_per_token(m) == 6 * 3 * 32768 * 1536    # three heads more


# -- memory -----------------------------------------------------------------------------------------------------------

def state_bytes(exp: Any, rank: int, world_size: int) -> int:
    """Bytes of optimizer state that the real optimizer holds on a rank."""
    with torch.device("meta"):
        model = GPT(exp.model)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = build_groups(params, exp.optim, exp.model.n_embd, exp.batch.tokens_per_step, scaling_parameters(exp.model))
    optimizer = DistMuonAdamW(params, groups, rank, world_size)
    return sum(t.nbytes for batch in optimizer.parcels for t in batch.state.values())


@pytest.mark.parametrize("name", ["poe_3b", "bp_1p3b", "small_poe"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_memory_is_what_the_fullest_rank_holds(name: str, world_size: int) -> None:
    exp = load_experiment(ROOT / "configs" / f"{name}.yaml", ("batch.device_batch_size=2",))
    found = memory_per_rank(exp, world_size)
    counts = count_parameters(exp.model)
    assert found.weights == 4 * counts.total
    held = [state_bytes(exp, rank, world_size) for rank in range(world_size)]
    assert sorted(rank.state for rank in memory.Shares(exp, world_size).ranks()) == sorted(held)
    assert found.optimizer in held                             # of the rank whose whole is largest
    assert max(held) <= 1.1 * sum(held) / world_size + 8 * exp.model.n_embd * 4 * exp.model.n_embd   # one matrix
    assert found.total == sum(v for k, v in found.as_dict().items() if k not in ("total", "peak"))


def small(*overrides: str, rows: int = 8) -> Memory:
    return memory_per_rank(load_experiment(ROOT / "configs/small_poe.yaml", (
        f"batch.device_batch_size={rows}", "model.sequence_len=512", "batch.tokens_per_step=8192", *overrides)), 1)


def test_activations_follow_the_largest_stage() -> None:
    uneven = ("model.poe_every=null", "model.poe_stage_layers=[5,1,1,1]")
    assert small().total < small(*uneven).total < small("model.poe_mode=hier").total
    assert small("runtime.compute_dtype=bfloat16").activations < small().activations == \
        small("runtime.compute_dtype=auto").activations
    assert small("objective.kind=residual_logop", "objective.rho=.5") == small()      # a run reports the pool anyhow
    assert small("runtime.activation_checkpointing=true").total < small().total
    twice, once = (small(rows=rows).activations for rows in (8, 4))
    assert 1.5 < twice / once < 2


def test_stages_on_ranks_hold_their_column_only() -> None:
    exp = load_experiment(ROOT / "configs/small_poe.yaml", ("batch.device_batch_size=2", "parallel.stages=2"))
    alone = memory_per_rank(load_experiment(ROOT / "configs/small_poe.yaml", ("batch.device_batch_size=2",)), 1)
    two, four = memory_per_rank(exp, 2), memory_per_rank(exp, 4)
    assert two.weights == four.weights == alone.weights
    assert two.optimizer < 0.7 * alone.optimizer and four.optimizer < 0.4 * alone.optimizer
    assert four.total < two.total < alone.total


def test_the_planner_knows_the_sizes_that_the_model_and_the_optimizer_use() -> None:
    """They stand above config/, which may not import them."""
    assert (memory.CPU_ROWS, memory.TILE_ELEMENTS) == (head.CPU_ROWS, head.TILE_ELEMENTS)
    assert (memory.PARCEL, memory.CACHE_BLOCK) == (dist_muon_adamw.PARCEL, kernels.CACHE_BLOCK)


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    exp = load_experiment(ROOT / "configs/bp_1p3b.yaml")
    fit = largest_batch(exp, 4, 80 * GIB)
    assert fit.device_batch_size is not None and fit.memory.total <= fit.usable == int(0.9 * 80 * GIB)
    rows = exp.batch.tokens_per_step // exp.model.sequence_len
    assert rows == fit.device_batch_size * fit.micro_steps * 4
    next_batch = fit.device_batch_size * 2                     # the rows are a power of two
    larger = exp.model_copy(update={"batch": exp.batch.model_copy(update={"device_batch_size": next_batch})})
    assert rows & (rows - 1) == 0 and memory_per_rank(larger, 4).total > fit.usable
    none = largest_batch(load_experiment(ROOT / "configs/poe_3b.yaml"), 1, 24 * GIB)
    assert none.device_batch_size is None and none.memory.total > none.usable
    for advice in ("activation_checkpointing", "parallel.stages=4", "ranks plans", "sequence_len"):
        assert advice in none.do


# -- the script -------------------------------------------------------------------------------------------------------

def test_model_info_prints_json() -> None:
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-m", "scripts.model_info", "configs/poe_3b.yaml", "--world-size", "12",
                              "--json"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert time.perf_counter() - start < 60
    assert process.stderr == ""
    info = json.loads(process.stdout)
    wanted = {"parameters", "tensors", "parameters_by_group", "stage_boundaries", "value_embedding_layers",
              "window_sizes", "flops_per_token", "tokens_per_step", "total_steps", "total_tokens", "memory_per_rank"}
    assert wanted <= set(info)
    assert (info["parameters"], info["total_tokens"]) == (3_019_900_506, 65_999_732_736)
    assert set(info["memory_per_rank"]) == {"weights", "gradients", "optimizer", "activations", "total", "peak"}
    assert info == describe(load_experiment(ROOT / "configs/poe_3b.yaml"), 12)


def test_model_info_proposes_a_batch() -> None:
    command = [sys.executable, "-m", "scripts.model_info", "configs/quickstart.yaml"]
    done = subprocess.run([*command, "--gpu-memory", "80", "--json"], cwd=ROOT, capture_output=True, text=True,
                          check=True)
    fit = json.loads(done.stdout)["largest_batch"]
    assert fit["device_batch_size"] == 8 and fit["micro_steps"] == 1        # all rows of a step
    bad = subprocess.run([*command, "--gpu-memory", "-1"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and "--gpu-memory" in bad.stderr and "Traceback" not in bad.stderr


def test_model_info_would_notice_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    exp = load_experiment(ROOT / "configs/quickstart.yaml")
    assert_built(exp)
    wrong = parameter_shapes(exp.model) | {"lm_head.weight": (1, 1)}
    monkeypatch.setattr("scripts.model_info.parameter_shapes", lambda m: wrong)
    with pytest.raises(AssertionError, match=r"lm_head\.weight"):
        assert_built(exp)
