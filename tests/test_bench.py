"""Measurements of the bench: the memory of ranks as planned, the two optimizers equal, the loader's figures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from nanopoe.config import experiment_from_dict
from nanopoe.config.memory import memory_per_rank
from nanopoe.dist import World
from nanopoe.train.bench import bench_memory, bench_optimizer
from tests.ranks import experiment_dict, run_ranks


def memory(world: World, experiment: dict[str, Any]) -> dict[str, Any]:
    return bench_memory(experiment_from_dict(experiment, "test"), world)


WIDE = {"model.n_embd": 64, "model.sequence_len": 256, "model.vocab_size": 300, "batch.tokens_per_step": 4 * 256,
        "batch.device_batch_size": 2}
BP = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}


@pytest.mark.parametrize("changes", [
    {}, {"runtime.compute_dtype": "bfloat16", "model.n_head": 4},
    BP, {**BP, "batch.device_batch_size": 4, "runtime.activation_checkpointing": True},
    {"model.poe_mode": "hier", "batch.device_batch_size": 1},
    {"objective.kind": "residual_logop", "objective.rho": 0.5, "model.intermediate_size": 512},
], ids=["poe", "poe bf16 gqa", "bp", "bp run again", "hier", "residual_logop"])
def test_the_plan_is_within_a_tenth_of_the_measured(changes: dict[str, Any], data: Any, tmp_path: Any) -> None:
    experiment = experiment_dict(data, tmp_path, **{**WIDE, **changes})
    alone = World(0, 1, torch.device("cpu"))
    found = memory(alone, experiment)
    assert found["weights"] == found["weights_formula"] and found["optimizer"] == found["optimizer_formula"]
    assert 0.9 < found["ratio"] < 1.1
    doubled = experiment_dict(data, tmp_path, **{**WIDE, **changes, "model.intermediate_size": 1024})      # control
    planned = memory_per_rank(experiment_from_dict(doubled, "test"), 1).total
    assert not 0.9 < planned / found["measured"] < 1.1


def test_the_memory_of_ranks_is_the_plans(data: Any, tmp_path: Any) -> None:
    alone = memory(World(0, 1, torch.device("cpu")), experiment_dict(data, tmp_path, **WIDE))
    for changes in ({}, {"runtime.numerics": "strict"}, {"parallel.stages": 2, "batch.device_batch_size": 2}):
        two = run_ranks(memory, 2, experiment_dict(data, tmp_path, **{**WIDE, **changes}))[0]
        assert two["weights"] == two["weights_formula"] == alone["weights"]
        assert two["optimizer"] == pytest.approx(two["optimizer_formula"], rel=0.05)     # of the rank that has most
        assert two["optimizer"] < 0.7 * alone["optimizer"]
        assert 0.9 < two["ratio"] < 1.1
        assert two["measured"] < 0.95 * alone["measured"]


def test_both_forms_of_the_optimizer_are_one(data: Any, tmp_path: Any) -> None:
    found = bench_optimizer(experiment_from_dict(experiment_dict(data, tmp_path), "test"),
                            World(0, 1, torch.device("cpu")), steps=2)
    assert found["difference"] < 1e-5 and found["ratio"] == pytest.approx(found["sharded"] / found["plain"])


def test_the_bench_of_data_tells_what_a_packing_loses(data: Any) -> None:
    """Documents of 4 to 60 words in rows of 33: crop loses some, split nothing."""
    command = [sys.executable, "-m", "scripts.bench", "data", "--data", str(data / "train"), "--tokenizer",
               str(data / "tokenizer"), "--rows", "2", "--seq", "32", "--lanes", "4", "--buffer", "16",
               "--seconds", "0.2"]
    done = subprocess.run([*command, "--packing", "bestfit_split", "bestfit_crop", "--json"], capture_output=True,
                          text=True, check=True)
    split, crop = map(json.loads, done.stdout.splitlines())
    assert split["cropped"] == 0 < crop["cropped"] < 1
    for found in (split, crop):
        assert found["utilisation"] == 1 and found["epochs"] > 1
        assert found["tokens_per_s"] > 0 < found["encode_per_s"] and 0 < found["ratio"] < 10
        assert 0 < found["packing_share"] < found["thread_share"] < 1
        assert 0 < found["wait"] and found["steps_paced"] > 10 and 0 <= found["ready_share"] <= 1
    assert 0.7 < split["buffered_length"] < 1.4 < crop["buffered_length"]     # crop: the long ones pile up
    done = subprocess.run([*command[:4], "--data", str(data / "nowhere")], capture_output=True, text=True)
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr
