"""One optimizer step: accumulate micro-batches, reduce, agree that all is finite, update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.config import ObjectiveConfig, Plan
from nanopoe.dist import World
from nanopoe.errors import NumericsError, everywhere
from nanopoe.model import GPT
from nanopoe.model.stages import backward_stages
from nanopoe.optim import DistMuonAdamW
from nanopoe.schedule import Schedule


@dataclass(frozen=True)
class Losses:
    """Of one step over all ranks, nats per target: what was minimised, each stage's cross-entropy, the pool's."""

    loss: float
    stage_loss: list[float]          # (K,)
    pool_loss: float | None
    targets: int
    grad_norm: float


def train_step(model: GPT, optimizer: DistMuonAdamW, rows: Tensor, step: int, objective: ObjectiveConfig,
               schedule: Schedule, plan: Plan, world: World, report_pool: bool) -> Losses:
    """Run this rank's `rows` (micro_steps, b, T+1) backward and update every parameter once. Collective.

    NumericsError on every rank when a loss or gradient of any is not finite; weights and moments are untouched then.
    `report_pool` asks for the pool's loss too, which costs another pass over the logits.
    """
    K = model.layout.n_stages
    scale = 1.0 / plan.tokens_per_step
    # sums over this rank: [total, stages.., pool, targets]; then the gradient's norm and a flag per rank
    sums = torch.zeros(K + 3, dtype=torch.float64, device=world.device)
    for batch in rows.to(world.device, torch.int64).unbind(0):
        micro = backward_stages(model, batch[:, :-1], batch[:, 1:], objective, scale, report_pool)
        sums[0] += micro.total
        sums[1:K + 1] += micro.stages
        if micro.pool is not None:
            sums[K + 1] += micro.pool
        sums[K + 2] += micro.targets
    squared_norm = optimizer.reduce()
    flags = torch.zeros(world.size, dtype=torch.float64, device=world.device)
    flags[world.rank] = float(not bool(sums.isfinite().all()))
    flat = dist.all_reduce_sum_(torch.cat([sums, squared_norm.view(1), flags]))
    if not bool(flat.isfinite().all()):
        _stop(model, optimizer, world, step, flat[K + 4:])
    # Losses were divided by the tokens of a full step; masked targets make the real number smaller.
    targets = int(flat[K + 2])
    grad_scale = plan.tokens_per_step / targets if targets else 1.0
    losses = _losses(flat.tolist(), K, report_pool, grad_scale)
    optimizer.update(schedule.lr_scale(step), schedule.momentum(step), schedule.weight_decay_scale(step), grad_scale)
    return losses


def _losses(sums: list[float], K: int, pool: bool, grad_scale: float) -> Losses:
    targets = max(sums[K + 2], 1.0)
    return Losses(
        loss=sums[0] / targets,
        stage_loss=[nats / targets for nats in sums[1:K + 1]],
        pool_loss=sums[K + 1] / targets if pool and K > 1 else None,
        targets=int(sums[K + 2]),
        grad_norm=sums[K + 3] ** 0.5 * grad_scale,
    )


def _stop(model: GPT, optimizer: DistMuonAdamW, world: World, step: int, flags: Tensor) -> NoReturn:
    """Name the ranks and the first parameter whose loss or gradient is not finite, then raise on all ranks."""
    bad = [name for name, p in model.named_parameters() if p.grad is not None and not bool(p.grad.isfinite().all())]
    optimizer.discard()
    found = dist.gather_json({"parameters": bad[:3], "loss": bool(flags[world.rank])}, world.device)
    ranks = [r for r, f in enumerate(found) if f["parameters"] or f["loss"]]
    names: list[str] = next((f["parameters"] for f in found if f["parameters"]), [])
    what = f"loss or gradient is not finite in step {step + 1}, rank {', '.join(map(str, ranks)) or '?'}"
    if names:
        what += f", first in {', '.join(names)}"
    raise everywhere(NumericsError(what, do="weights are as before the step: resume from the last checkpoint with a "
                                            "lower learning rate or other data"))
