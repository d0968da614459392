"""One optimizer step: accumulate micro-batches, reduce, agree that all is finite, update."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NoReturn

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.config import ObjectiveConfig, Plan
from nanopoe.dist import World
from nanopoe.errors import NumericsError, everywhere
from nanopoe.model import GPT
from nanopoe.model.loss import split_rows
from nanopoe.model.specialist import Keep, backward
from nanopoe.model.stages import MicroLosses, backward_stages, trained_losses
from nanopoe.optim import DistMuonAdamW
from nanopoe.schedule import Schedule
from nanopoe.train.pipeline import Pipeline, idle_seconds


@dataclass(frozen=True)
class Losses:
    """Of one step over all ranks, nats per target: what was minimised, each stage's cross-entropy, the pool's."""

    loss: float
    stage_loss: list[float]          # (K,), of a specialist its own
    pool_loss: float | None
    targets: int
    grad_norm: float
    idle: list[float] | None = None  # with stages on different ranks: seconds that each rank did nothing


def train_step(model: GPT, optimizer: DistMuonAdamW, rows: Tensor, step: int, objective: ObjectiveConfig,
               schedule: Schedule, plan: Plan, world: World, report_pool: bool, keep: Keep | None = None,
               pipe: Pipeline | None = None) -> Losses:
    """Run this rank's `rows` (micro_steps, b, T+1) int32 backward and update every parameter once. Collective.

    The mean is over the targets of all ranks: a micro-batch that is masked altogether adds nothing.

    NumericsError on every rank when a loss or gradient of any is not finite; weights and moments are untouched then.
    `report_pool` asks for the pool's loss too, which costs another pass over the logits; there is none with `pipe`,
    which runs some stages only. For `keep` see backward_specialist.
    """
    K = trained_losses(model)
    scale = 1.0 / plan.tokens_per_step
    rows = rows.to(world.device, non_blocking=True)
    if pipe is not None:
        pipe.begin()
    sums = accumulate(model, optimizer, rows.long(), objective, scale, report_pool, keep, pipe)
    times = sums.new_zeros(0) if pipe is None else pipe.end()
    squared_norm = optimizer.reduce()
    everything = dist.all_reduce_sum_(torch.cat([sums, squared_norm.view(1), times.flatten()]))
    flat: list[float] = everything[:K + 4].tolist()
    if not all(map(math.isfinite, flat)):
        optimizer.discard()
        _stop(model, optimizer, rows, step, objective, scale, plan, world, pipe)
    # Losses were divided by the tokens of a full step; masked targets make the real number smaller.
    targets = int(flat[K + 2])
    grad_scale = plan.tokens_per_step / targets if targets else 1.0
    idle = None if pipe is None else idle_seconds(everything[K + 4:].view(2, -1))
    losses = _losses(flat, K, report_pool and pipe is None, grad_scale, idle)
    optimizer.update(schedule.lr_scale(step), schedule.momentum(step), schedule.weight_decay_scale(step), grad_scale)
    return losses


def accumulate(model: GPT, optimizer: DistMuonAdamW, rows: Tensor, objective: ObjectiveConfig, scale: float,
               report_pool: bool, keep: Keep | None, pipe: Pipeline | None) -> Tensor:
    """Run all micro-batches backward; this rank's sums (K + 3,) fp64: total, stages.., pool, targets."""
    K, first = trained_losses(model), 0 if pipe is None else pipe.stages.start
    sums = torch.zeros(K + 3, dtype=torch.float64, device=rows.device)
    for batch in rows.unbind(0):
        micro = run_backward(model, batch, objective, scale, report_pool, keep, pipe)
        sums[0] += micro.total
        sums[first + 1:first + 1 + len(micro.stages)] += micro.stages
        if micro.pool is not None:
            sums[K + 1] += micro.pool
        if first == 0:                                           # the same rows are on all ranks of a pipeline
            sums[K + 2] += micro.targets
        optimizer.take()
    return sums


def run_backward(model: GPT, batch: Tensor, objective: ObjectiveConfig, scale: float, report_pool: bool = False,
                 keep: Keep | None = None, pipe: Pipeline | None = None) -> MicroLosses:
    """Add the gradients of one micro-batch, (b, T+1), of all that this rank trains."""
    if pipe is None:
        return backward(model, *split_rows(batch), objective, scale, report_pool, keep)
    return backward_stages(model, *split_rows(batch), objective, scale, part=pipe)


def _losses(sums: list[float], K: int, pool: bool, grad_scale: float, idle: list[float] | None) -> Losses:
    targets = max(sums[K + 2], 1.0)
    return Losses(
        loss=sums[0] / targets,
        stage_loss=[nats / targets for nats in sums[1:K + 1]],
        pool_loss=sums[K + 1] / targets if pool and K > 1 else None,
        targets=int(sums[K + 2]),
        grad_norm=sums[K + 3] ** 0.5 * grad_scale,
        idle=idle,
    )


def _stop(model: GPT, optimizer: DistMuonAdamW, rows: Tensor, step: int, objective: ObjectiveConfig, scale: float,
          plan: Plan, world: World, pipe: Pipeline | None) -> NoReturn:
    """Name the ranks, micro-batches and first parameters whose loss or gradient is not finite; raise on all ranks.

    The weights are as before and nothing is random, so doing the step's backward again finds it, without sending any
    gradient. A stage that is not finite makes those behind it so: the first rank of a pipeline is the one to look at.
    """
    with dist.agree(world.device), optimizer.deaf():
        mine = find_nonfinite(model, rows.to(world.device, torch.int64), objective, scale, pipe)
    found = dist.gather_json(mine, world.device)
    batches = [[i * plan.world_size + plan.place(r)[0] for i in sorted(map(int, f))] for r, f in enumerate(found)]
    ranks = [f"rank {r} (micro-batch {', '.join(map(str, numbers))})" for r, numbers in enumerate(batches) if numbers]
    names = [name for f in found for micro in f.values() for name in micro]
    where = ", ".join(ranks) or "only in sums over micro-batches or ranks"
    what = f"loss or gradient is not finite in step {step + 1}, {where}"
    if names:
        what += f", first in {', '.join(names[:3])}"
    raise everywhere(NumericsError(what, do="weights are as before the step: resume from the last checkpoint with a "
                                            "lower learning rate or other data"))


def find_nonfinite(model: GPT, rows: Tensor, objective: ObjectiveConfig, scale: float,
                   pipe: Pipeline | None = None) -> dict[str, list[str]]:
    """Index of every micro-batch of `rows` (micro_steps, b, T+1) with a loss or gradient that is not finite -> the
    first parameters, in the order of the backward pass, that have one. Gradients are freed as they are looked at."""
    bad: list[str] = []

    def look(name: str, param: Tensor) -> None:
        if param.grad is not None and not bool(param.grad.isfinite().all()) and name not in bad:
            bad.append(name)
        param.grad = None

    found = {}
    hooks = [p.register_post_accumulate_grad_hook(partial(look, name))
             for name, p in model.named_parameters() if p.requires_grad]
    if pipe is not None:
        pipe.begin()
    for i, batch in enumerate(rows.unbind(0)):
        bad.clear()
        losses = run_backward(model, batch, objective, scale, pipe=pipe)
        if bad or not bool(losses.total.isfinite()):
            found[i] = bad[:3]
    for hook in hooks:
        hook.remove()
    if pipe is not None:
        pipe.end()
    return {str(i): names for i, names in found.items()}
