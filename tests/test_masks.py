"""Masked targets: split rows, a mean over the targets of all ranks, and micro-batches that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanopoe.config.load import experiment_from_dict
from nanopoe.config.plan import make_plan
from nanopoe.dist import World
from nanopoe.model import GPT
from nanopoe.model.loss import IGNORE, split_rows
from nanopoe.model.stages import shared_parameters
from nanopoe.optim import DistMuonAdamW, Group
from nanopoe.schedule import Schedule
from nanopoe.train.evaluate import evaluate
from nanopoe.train.step import Losses, train_step
from tests.ranks import experiment_dict, run_ranks

ALONE = World(0, 1, torch.device("cpu"))
T, V = 32, 300


def rows_of(*masked: float) -> torch.Tensor:
    """(micro-batches, 4, T+1): of micro-batch g a share masked[g] of the entries is no target."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V - 9, (len(masked), 4, T + 1), generator=generator, dtype=torch.int32)
    drawn = torch.rand(ids.shape, generator=generator)
    return torch.where(drawn < torch.tensor(masked)[:, None, None], ~ids, ids)


def test_rows_are_split() -> None:
    ids, targets = split_rows(torch.tensor([[5, ~7, 0, ~0, 3]]))
    assert ids.tolist() == [[5, 7, 0, 0]]
    assert targets.tolist() == [[IGNORE, 0, IGNORE, 3]]


def one_step(world: World, experiment: dict[str, Any], rows: np.ndarray) -> tuple[Losses, dict[str, list[float]]]:
    """A step's losses, and its gradients as the update sees them: weights would hide a scale, AdamW divides it away."""
    exp = experiment_from_dict(experiment, "test")
    model = GPT(exp.model)
    model.init_weights(3)
    torch.manual_seed(3)
    with torch.no_grad():                                            # nothing is zero: every gradient shows
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    seen: dict[str, list[float]] = {}

    class Looking(DistMuonAdamW):
        def update(self, lr_scale: float, momentum: float, decay_scale: float, grad_scale: float = 1.0) -> None:
            for parcel in self.parcels:
                for own in parcel.own:
                    if own.grad is not None:
                        seen.setdefault("all", []).extend((own.grad * grad_scale).flatten().tolist())
            super().update(lr_scale, momentum, decay_scale, grad_scale)

    optimizer = Looking(params, [Group("all", "adamw", 0.01, 0.0, tuple(params), (0.8, 0.95))], world.rank, world.size,
                        shared=shared_parameters(model))
    mine = torch.from_numpy(rows)[world.rank::world.size].contiguous()
    losses = train_step(model, optimizer, mine, 0, exp.objective, Schedule(exp.schedule.cycles),
                        make_plan(exp, world.size), world, True)
    return losses, seen


def test_the_mean_is_over_the_targets(tmp_path: Path) -> None:
    """A step with a half-masked micro-batch and one masked altogether is the step of the first alone."""
    both, one = (experiment_dict(tmp_path, tmp_path, **{"batch.tokens_per_step": T * 4 * n}) for n in (2, 1))
    rows = rows_of(0.5, 1.0).numpy()
    masked, seen = one_step(ALONE, both, rows)
    alone, expected = one_step(ALONE, one, rows[:1])
    assert masked.targets == alone.targets == int((rows[0, :, 1:] >= 0).sum())
    assert masked.loss == pytest.approx(alone.loss, rel=1e-6) and masked.stage_loss == pytest.approx(alone.stage_loss)
    assert masked.pool_loss == pytest.approx(alone.pool_loss) and masked.grad_norm == pytest.approx(alone.grad_norm)
    assert np.allclose(seen["all"], expected["all"], rtol=1e-4, atol=1e-9)
    other, moved = one_step(ALONE, both, rows_of(0.5, 0.9).numpy())                                         # control
    assert not np.allclose(seen["all"], moved["all"], rtol=1e-2) and other.targets > masked.targets


def test_a_step_without_targets_is_zero_not_nan(tmp_path: Path) -> None:
    losses, seen = one_step(ALONE, experiment_dict(tmp_path, tmp_path), rows_of(1.0, 1.0).numpy())
    assert (losses.loss, losses.targets, losses.grad_norm) == (0.0, 0, 0.0)
    assert set(seen["all"]) == {0.0}


def of_rank(world: World, experiment: dict[str, Any], rows: np.ndarray) -> tuple[float, int, float]:
    losses, _ = one_step(world, experiment, rows)
    return losses.loss, losses.targets, losses.grad_norm


def test_ranks_with_few_targets_count_less(tmp_path: Path) -> None:
    """Two ranks, one of which has hardly a target: the mean is that of one rank, not the mean of two means."""
    experiment, rows = experiment_dict(tmp_path, tmp_path), rows_of(0.05, 0.95).numpy()
    loss, targets, norm = of_rank(ALONE, experiment, rows)
    for found in run_ranks(of_rank, 2, experiment, rows):
        assert found == (pytest.approx(loss, rel=1e-6), targets, pytest.approx(norm, rel=1e-5))


def test_an_evaluation_counts_targets_alone() -> None:
    model = GPT(experiment_from_dict(experiment_dict(Path("x"), Path("y")), "test").model)
    model.init_weights(1)
    sizes = np.concatenate([np.full(V - 9, 2), np.zeros(9)]).astype(np.int64)
    rows = rows_of(0.7)[0]
    result = evaluate(model, [rows], sizes)
    assert result["targets"] == int((rows[:, 1:] >= 0).sum()) and result["bytes"] == 2 * result["targets"]
    assert evaluate(model, [rows_of(0.0)[0]], sizes)["targets"] == 4 * T                                    # control
    ids, targets = split_rows(rows.long())
    with torch.no_grad():
        logp = model.stage_logits(model.boundary_states(ids)[0], 0).log_softmax(-1)
    kept = targets >= 0
    nats = -logp[kept].gather(-1, targets[kept][:, None]).double().sum().item()
    assert result["bpb"]["stages"][0] == pytest.approx(nats / np.log(2) / result["bytes"], rel=1e-5)
