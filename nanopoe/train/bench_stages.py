"""What stages on different ranks bring: a step on all ranks against one on a single rank, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.config import Experiment, make_plan
from nanopoe.dist import World
from nanopoe.errors import ConfigError
from nanopoe.model import GPT
from nanopoe.schedule import Schedule
from nanopoe.train.bench import clock, spread_of
from nanopoe.train.build import build_model, build_optimizer, stage_column
from nanopoe.train.compute import choose_compute
from nanopoe.train.pipeline import Pipeline
from nanopoe.train.step import accumulate, train_step


def bench_stages(experiment: Experiment, world: World, steps: int = 5) -> dict[str, Any]:
    """Time `steps` steps of both arms after one to warm up: the same model, rows (random tokens) and threads of a rank.
    Collective; while rank 0 computes alone the others sleep.

    Returns of each arm the median seconds, their `spread`, all `times` and tokens per second; `speedup`, the median of
    the ratios of neighbouring steps; `idle`, of each rank the median share of a step in which it waited for states or
    for the last rank; the largest relative difference of a step's loss and of a weight (|a - b| / |a| of a tensor)
    between the arms; `spread_seconds` of optimizer.spread() and the bytes it sends. ConfigError without stages on
    different ranks.
    """
    if experiment.parallel.stages == 1:
        raise ConfigError("every rank runs all stages", "parallel.stages", "set it to 2 or more")
    plan = make_plan(experiment, world.size)
    compute = choose_compute(experiment.runtime, world, world.size, experiment.data.document_mask)
    schedule, pipe = Schedule(experiment.schedule.cycles), Pipeline(plan, world)
    model = build_model(experiment, world, compute, None)
    optimizer = build_optimizer(experiment, model, world, compute, plan, stage_column(experiment, plan))
    alone = Alone(experiment, world) if world.is_main else None
    rows = random_rows(experiment, steps + 1).to(world.device)                     # (steps + 1, M, b, T + 1)

    def together(step: int) -> tuple[float, list[float]]:
        losses = train_step(model, optimizer, rows[step, pipe.group::plan.world_size], step, experiment.objective,
                            schedule, plan, world, False, pipe=pipe)
        return losses.loss, losses.idle or []

    def apart(step: int) -> float | None:
        return None if alone is None else alone.step(rows[step], step)

    seconds: dict[str, list[float]] = {"alone": [], "stages": []}
    idle, differences = [], []
    for step in range(steps + 1):
        first, own_loss = timed(world, partial(apart, step))
        second, (loss, waits) = timed(world, partial(together, step))
        differences.append(abs(loss / own_loss - 1) if own_loss else 0.0)
        if step:
            seconds["alone"].append(first)
            seconds["stages"].append(second)
            idle.append([wait / second for wait in waits])
    took, _ = timed(world, optimizer.spread)
    sent = sum(optimizer.params[p.param][p.low:p.high].nbytes for parcel in optimizer.parcels for p in parcel.pieces
               if p.param in optimizer.homes)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "experiment": experiment.name, "grid": plan.grid(), "ranks": world.size, "compute": compute.reason,
        "micro_steps": plan.micro_steps, "tokens_per_step": plan.tokens_per_step, **medians,
        "tokens_per_s": {name: plan.tokens_per_step / median for name, median in medians.items()}, "times": seconds,
        "spread": {name: spread_of(times) for name, times in seconds.items()},
        "speedup": statistics.median(a / b for a, b in zip(seconds["alone"], seconds["stages"], strict=True)),
        "idle": [statistics.median(shares) for shares in zip(*idle, strict=True)],
        "loss_difference": max(differences), "weight_difference": alone.difference(model) if alone else 0.0,
        "spread_seconds": took, "spread_bytes": sent,
    }


class Alone:
    """The same training on one rank that sends nothing."""

    def __init__(self, experiment: Experiment, world: World):
        whole = experiment.model_copy(update={"parallel": experiment.parallel.model_copy(update={"stages": 1})})
        self.experiment, self.plan = whole, make_plan(whole, 1)
        self.compute = choose_compute(whole.runtime, world, world.size, whole.data.document_mask)
        here = World(0, 1, world.device)
        self.model = build_model(whole, here, self.compute, None)
        self.optimizer = build_optimizer(whole, self.model, here, self.compute)
        self.schedule = Schedule(whole.schedule.cycles)

    def step(self, rows: Tensor, step: int) -> float:
        """What train_step does, of rows (M, b, T + 1) that have all targets; the loss in nats a target."""
        tokens = self.plan.tokens_per_step
        sums = accumulate(self.model, self.optimizer, rows, self.experiment.objective, 1 / tokens, False, None, None)
        norm = self.optimizer.reduce()
        found: list[float] = torch.cat([sums, norm.view(1)]).tolist()
        self.optimizer.update(self.schedule.lr_scale(step), self.schedule.momentum(step),
                              self.schedule.weight_decay_scale(step), 1.0)
        return found[0] / tokens

    def difference(self, other: GPT) -> float:
        """|a - b| / |a| of the tensor where it is largest."""
        pairs = zip(self.model.parameters(), other.parameters(), strict=True)
        return max(float((a.detach() - b.detach()).norm() / a.detach().norm().clamp(min=1e-30)) for a, b in pairs)


def random_rows(experiment: Experiment, steps: int) -> Tensor:
    """(steps, M, b, T + 1) int64, the same on every rank."""
    plan = make_plan(experiment, experiment.parallel.stages)
    shape = (steps, plan.micro_batches, plan.device_batch_size, plan.sequence_len + 1)
    return torch.randint(experiment.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def timed(world: World, run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds from when all ranks are here to when rank 0 is done, and what `run` returned. Collective."""
    dist.barrier()
    start = clock(world)
    result = run()
    return clock(world) - start, result
