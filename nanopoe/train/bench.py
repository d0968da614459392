"""What a training step costs: tokens per second, FLOP/s against a measured matmul peak, where the time goes, memory."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from nanopoe.config import Experiment, make_plan
from nanopoe.config.counts import flops_per_token
from nanopoe.dist import World
from nanopoe.model.stages import backward_stages
from nanopoe.train.build import build_model, build_optimizer
from nanopoe.train.compute import choose_compute, measured_peak, memory_bytes


def bench_step(experiment: Experiment, world: World, steps: int = 5) -> dict[str, Any]:
    """Time `steps` optimizer steps on random tokens, after one to warm up; no data, no checkpoints, one rank.

    Returns medians in seconds (`backward` is forward and backward of all micro-batches), `spread` (max - min) / median
    of the whole step, tokens_per_s, flops_per_s, mfu against `matmul_peak`, which is measured before and after the
    steps in the same process and dtype, and peak memory in bytes.
    """
    plan = make_plan(experiment, world.size)
    compute = choose_compute(experiment.runtime, world, world.size)
    model = build_model(experiment, world, compute, None)
    optimizer = build_optimizer(experiment, model, world, compute)
    generator = torch.Generator().manual_seed(0)
    shape = (plan.micro_steps, plan.device_batch_size, plan.sequence_len + 1)
    rows = torch.randint(experiment.model.vocab_size, shape, generator=generator).to(world.device)
    peak, backward, update = measured_peak(world.device, compute.dtype), [], []
    for step in range(steps + 1):
        start = clock(world)
        for batch in rows.unbind(0):
            backward_stages(model, batch[:, :-1], batch[:, 1:], experiment.objective, 1 / plan.tokens_per_step)
        middle = clock(world)
        optimizer.reduce()
        optimizer.update(1.0, 0.95, 1.0)
        if step:
            backward.append(middle - start)
            update.append(clock(world) - middle)
    peak = max(peak, measured_peak(world.device, compute.dtype))
    whole = [b + u for b, u in zip(backward, update, strict=True)]
    seconds = statistics.median(whole)
    rate = plan.tokens_per_step / seconds
    return {
        "experiment": experiment.name, "device": f"{world.device} {compute.device_name}",
        "dtype": str(compute.dtype)[6:], "compute": compute.reason,
        "tokens_per_step": plan.tokens_per_step, "seconds": seconds,
        "backward": statistics.median(backward), "optimizer": statistics.median(update),
        "spread": (max(whole) - min(whole)) / seconds, "tokens_per_s": rate,
        "flops_per_s": rate * flops_per_token(experiment.model), "matmul_peak": peak,
        "mfu": rate * flops_per_token(experiment.model) / peak, "memory_bytes": memory_bytes(world.device),
    }


def clock(world: World) -> float:
    """Seconds, after the device has done all it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
