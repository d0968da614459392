"""Measurements of the bench: the memory of ranks within the formula, the two optimizers equal."""

from __future__ import annotations

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
