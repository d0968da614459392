"""BP reproduces the reference trainer: logits, loss, gradients, six optimizer steps, on 1, 2 and 4 ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nanopoe.config.schema import ObjectiveConfig, OptimConfig
from nanopoe.dist import World
from nanopoe.model import GPT
from nanopoe.model.stages import backward_stages
from nanopoe.optim import DistMuonAdamW, build_groups
from tests.ranks import model_config, run_ranks

CE = ObjectiveConfig(kind="ce", alpha=0.0, rho=None)


def golden_model(folder: Path) -> GPT:
    model = GPT(model_config(n_embd=128, vocab_size=512, sequence_len=256, poe_mode="none", poe_every=None))
    model.load_state_dict(load_file(folder / "init.safetensors"))
    return model


@torch.no_grad()
def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-20))


def golden_optimizer(model: GPT, folder: Path, world: World) -> DistMuonAdamW:
    call = json.loads((folder / "config.json").read_text())["optimizer_call"]
    optim = OptimConfig(**call, reference_batch_tokens=None, reference_scaling_params=None)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    groups = build_groups(params, optim, n_embd=128, tokens_per_step=512, scaling_params=1)
    return DistMuonAdamW(params, groups, world.rank, world.size)


def test_logits_loss_and_gradients(golden: Path) -> None:
    model, expect = golden_model(golden), load_file(golden / "expect.safetensors")
    rows = load_file(golden / "batch.safetensors")["batch0"]
    ids, targets = rows[:, :-1], rows[:, 1:]
    assert error(model(ids), expect["logits"]) <= 1e-5
    losses = backward_stages(model, ids, targets, CE, 1 / targets.numel())
    assert abs(float(losses.total) / targets.numel() - float(expect["loss"])) <= 1e-5 * float(expect["loss"])
    for name, p in model.named_parameters():
        assert p.grad is not None
        assert error(p.grad, expect[f"grads/{name}"]) <= 1e-5, name
    other = golden_model(golden)                    # control: another batch has other gradients
    other_rows = load_file(golden / "batch.safetensors")["batch1"]
    backward_stages(other, other_rows[:, :-1], other_rows[:, 1:], CE, 1 / targets.numel())
    assert other.lm_head.weight.grad is not None
    assert error(other.lm_head.weight.grad, expect["grads/lm_head.weight"]) > 1e-2


def test_groups_are_the_references(golden: Path) -> None:
    theirs = {}
    for group in json.loads((golden / "config.json").read_text())["groups"]:
        for name in group["params"]:
            theirs[name] = (group["kind"], group["lr"], group["weight_decay"], tuple(group.get("betas", (0, 0))))
    optimizer = golden_optimizer(golden_model(golden), golden, World(0, 1, torch.device("cpu")))
    ours = {name: (b.group.kind, b.group.lr, b.group.weight_decay, b.group.betas)
            for b in optimizer.parcels for name in (piece.param for piece in b.pieces)}
    assert ours.keys() == theirs.keys()
    for name, (kind, lr, decay, betas) in theirs.items():
        assert ours[name] == (kind, pytest.approx(lr), pytest.approx(decay), betas), name


def six_steps(world: World, folder: str) -> tuple[list[float], float, float]:
    """Losses, worst error after one step, worst error after six; each rank takes its half or quarter of the targets."""
    golden = Path(folder)
    model, expect = golden_model(golden), load_file(golden / "expect.safetensors")
    batches, optimizer = load_file(golden / "batch.safetensors"), golden_optimizer(model, golden, world)
    losses, worst = [], {}
    for step in range(6):
        rows = batches[f"batch{step}"]
        ids, targets = rows[:, :-1], rows[:, 1:].clone()
        mine = torch.zeros_like(targets, dtype=torch.bool)
        mine.view(-1)[world.rank::world.size] = True     # the targets are split, not the rows: 4 ranks, 2 rows
        losses_here = backward_stages(model, ids, targets.masked_fill(~mine, -1), CE, 1 / targets.numel())
        assert losses_here.targets == targets.numel() // world.size
        losses.append(float(losses_here.total) / targets.numel())
        optimizer.take()
        optimizer.reduce()
        optimizer.update(lr_scale=(step + 1) / 6, momentum=0.85 + 0.02 * step, decay_scale=1.0)
        if step in (0, 5):
            worst[step] = max(error(p, expect[f"step{step + 1}/{name}"]) for name, p in model.named_parameters())
    return losses, worst[0], worst[5]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_six_optimizer_steps(golden: Path, size: int) -> None:
    results = run_ranks(six_steps, size, str(golden))
    expected = json.loads((golden / "config.json").read_text())["losses"]
    for step in range(6):
        assert sum(r[0][step] for r in results) == pytest.approx(expected[step], rel=2e-5)
    assert all(r[1] <= 1e-4 and r[2] <= 1e-4 for r in results), [(r[1], r[2]) for r in results]
