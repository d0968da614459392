"""Measurements of the bench: the memory of ranks within the formula, the two optimizers equal, the loader's figures."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.train.bench import bench_memory, bench_optimizer
from tests.ranks import experiment_dict, run_ranks


def memory(world: World, experiment: dict[str, Any]) -> dict[str, Any]:
    return bench_memory(experiment_from_dict(experiment, "test"), world)


def test_the_memory_of_ranks_is_the_formulas(data: Any, tmp_path: Any) -> None:
    for numerics in ("fast", "strict"):
        experiment = experiment_dict(data, tmp_path, **{"batch.device_batch_size": 2, "runtime.numerics": numerics})
        alone, four = memory(World(0, 1, torch.device("cpu")), experiment), run_ranks(memory, 4, experiment)[0]
        for found in (alone, four):
            assert found["weights"] == found["weights_formula"] and found["optimizer"] == found["optimizer_formula"]
            assert found["weights"] / found["world_size"] < found["gradients"] <= found["gradients_formula"]
        assert four["optimizer"] < 0.3 * alone["optimizer"] and alone["weights"] == four["weights"]


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
