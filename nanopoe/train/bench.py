"""What training costs: a step (rate, share of the matmul peak), the optimizer against its plain form, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.config import Experiment, make_plan
from nanopoe.config.counts import flops_per_token
from nanopoe.config.memory import memory_per_rank
from nanopoe.dist import World
from nanopoe.model import GPT
from nanopoe.model.loss import split_rows
from nanopoe.model.specialist import backward
from nanopoe.model.stages import trained_losses
from nanopoe.optim import DistMuonAdamW
from nanopoe.optim.groups import Group
from nanopoe.optim.kernels import adamw_, muon_, second_moment_shape
from nanopoe.train.build import build_model, build_optimizer, stage_column
from nanopoe.train.compute import choose_compute, measured_peak, memory_bytes
from nanopoe.train.pipeline import Pipeline
from nanopoe.train.step import accumulate


def bench_step(experiment: Experiment, world: World, steps: int = 5) -> dict[str, Any]:
    """Time `steps` optimizer steps on random tokens, after one to warm up; no data, no checkpoints, one rank.

    Returns medians in seconds (`backward` is forward and backward of all micro-batches), `spread` of the whole step,
    `first_step`, seconds from the built model to the end of the step that warms up (the compiler's, if it is on, are in
    it), tokens_per_s, flops_per_s, mfu against `matmul_peak`, which is measured before the model is built and after the
    steps, in the same process and dtype, and peak memory in bytes.
    """
    plan = make_plan(experiment, world.size)
    compute = choose_compute(experiment.runtime, world, world.size, experiment.data.document_mask)
    generator = torch.Generator().manual_seed(0)
    shape = (plan.micro_steps, plan.device_batch_size, plan.sequence_len + 1)
    rows = torch.randint(experiment.model.vocab_size, shape, generator=generator).to(world.device)
    peak = measured_peak(world.device, compute.dtype)
    model = build_model(experiment, world, compute, None)
    built = clock(world)
    optimizer = build_optimizer(experiment, model, world, compute)

    def step() -> tuple[float, float]:
        start = clock(world)
        for batch in rows.unbind(0):
            backward(model, *split_rows(batch), experiment.objective, 1 / plan.tokens_per_step)
            optimizer.take()
        middle = clock(world)
        optimizer.reduce()
        optimizer.update(1.0, 0.95, 1.0)
        return middle - start, clock(world) - middle

    step()
    first = clock(world) - built
    backwards, updates = zip(*(step() for _ in range(steps)), strict=True)
    peak = max(peak, measured_peak(world.device, compute.dtype))
    whole = timing([b + u for b, u in zip(backwards, updates, strict=True)])
    rate = plan.tokens_per_step / whole["seconds"]
    return {
        "experiment": experiment.name, "device": f"{world.device} {compute.device_name}",
        "dtype": str(compute.dtype)[6:], "compute": compute.reason,
        "tokens_per_step": plan.tokens_per_step, **whole, "first_step": first,
        "backward": statistics.median(backwards), "optimizer": statistics.median(updates), "tokens_per_s": rate,
        "flops_per_s": rate * flops_per_token(experiment.model), "matmul_peak": peak,
        "mfu": rate * flops_per_token(experiment.model) / peak, "memory_bytes": memory_bytes(world.device),
    }


# -- the optimizer against its plain form ------------------------------------------------------------------------------

def bench_optimizer(experiment: Experiment, world: World, steps: int = 9) -> dict[str, Any]:
    """Median seconds of an update of DistMuonAdamW on one rank and of `PlainMuonAdamW`, alternating on equal gradients,
    and the `spread` of each.

    Ours includes taking the gradients over and their norm; the plain form has neither.
    """
    compute = choose_compute(experiment.runtime, world, 1, experiment.data.document_mask)
    ours, plain = (build_model(experiment, world, compute, None) for _ in range(2))
    optimizer = build_optimizer(experiment, ours, world, compute)
    groups = list({id(b.group): b.group for b in optimizer.parcels}.values())
    stock = PlainMuonAdamW(dict(plain.named_parameters()), groups, compute.dtype)
    generator = torch.Generator(world.device).manual_seed(0)
    grads = {name: torch.randn(p.shape, generator=generator, device=world.device)
             for name, p in optimizer.params.items()}

    def sharded() -> None:
        optimizer.take()
        optimizer.reduce()
        optimizer.update(1.0, 0.95, 1.0)

    seconds: dict[str, list[float]] = {"sharded": [], "plain": []}
    arms: list[tuple[str, GPT, Callable[[], None]]] = [("sharded", ours, sharded), ("plain", plain, stock.step)]
    for i in range(steps + 1):
        for name, model, step in arms if i % 2 else reversed(arms):
            for key, p in model.named_parameters():
                p.grad = grads[key].clone() if key in grads else None
            start = clock(world)
            step()
            if i:
                seconds[name].append(clock(world) - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    difference = max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)
    return {"experiment": experiment.name, "device": f"{world.device} {compute.device_name}",
            "dtype": str(compute.dtype)[6:], "parameters": sum(g.numel() for g in grads.values()), **median,
            "spread": {name: spread_of(times) for name, times in seconds.items()},
            "ratio": median["sharded"] / median["plain"], "difference": difference}


class PlainMuonAdamW:
    """The usual form on one process, for comparison: gradients in `.grad`, state per parameter, Muon's matrices of one
    shape stacked for each update. The same mathematics."""

    def __init__(self, params: dict[str, Tensor], groups: list[Group], dtype: torch.dtype):
        self.dtype, self.steps = dtype, 0
        self.adamw: list[tuple[Group, Tensor, Tensor, Tensor]] = []
        self.muon: list[tuple[Group, list[Tensor], Tensor, Tensor]] = []
        for group in groups:
            tensors = [params[name] for name in group.params]
            if group.kind == "adamw":
                self.adamw += [(group, p, torch.zeros_like(p), torch.zeros_like(p)) for p in tensors]
                continue
            for shape in dict.fromkeys(p.shape for p in tensors):
                stack = [p for p in tensors if p.shape == shape]
                like = stack[0].detach()
                self.muon.append((group, stack, like.new_zeros(len(stack), *shape),
                                  like.new_zeros(len(stack), *second_moment_shape(*shape))))

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        for group, p, first, second in self.adamw:
            assert p.grad is not None
            adamw_(p, p.grad, first, second, self.steps, group.lr, group.betas, group.eps, group.weight_decay)
        for group, stack, momentum, second in self.muon:
            values, grads = torch.stack(stack), torch.stack([p.grad for p in stack if p.grad is not None])
            muon_(values, grads, momentum, second, group.lr, 0.95, group.beta2, group.weight_decay, self.dtype)
            torch._foreach_copy_(stack, list(values.unbind()))


# -- memory ------------------------------------------------------------------------------------------------------------

def bench_memory(experiment: Experiment, world: World, steps: int = 2) -> dict[str, Any]:
    """Bytes that the fullest rank holds at the fullest moment of a step, beside the planner's. Collective.

    `measured` is weights, optimizer state and the most that one of `steps` steps, after one to warm up, allocates at a
    time, with the pool's loss where the run reports one; `spread` is that of the steps, so memory that grows from step
    to step shows; `planned` is memory_per_rank's total, `ratio` planned / measured. `gradients` is the most at any
    moment a gradient was completed: sums, whole gradients, and those in flight.
    """
    plan = make_plan(experiment, world.size)
    compute = choose_compute(experiment.runtime, world, world.size, experiment.data.document_mask)
    model = build_model(experiment, world, compute, None)
    most, optimizer = 0, None

    def look(_: Tensor | None = None) -> None:
        nonlocal most
        assert optimizer is not None
        most = max(most, storage_bytes(gradients(optimizer)))

    for p in model.parameters():
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(look)          # before the optimizer's, which sends the gradient off
    optimizer = build_optimizer(experiment, model, world, compute, plan, stage_column(experiment, plan))
    pipe = Pipeline(plan, world) if plan.stages else None
    generator = torch.Generator().manual_seed(plan.place(world.rank)[0])
    shape = (plan.micro_steps, plan.device_batch_size, plan.sequence_len + 1)
    rows = torch.randint(experiment.model.vocab_size, shape, generator=generator, dtype=torch.int32).to(world.device)
    report_pool = trained_losses(model) > 1 and pipe is None

    def step(_: int = 0) -> None:
        if pipe is not None:
            pipe.begin()
        accumulate(model, optimizer, rows.long(), experiment.objective, 1 / plan.tokens_per_step, report_pool, None,
                   pipe)
        if pipe is not None:
            pipe.end()
        optimizer.reduce()
        optimizer.update(1.0, 0.95, 1.0)

    step()
    weights = storage_bytes(model.parameters())
    state = storage_bytes(t for b in optimizer.parcels for t in b.state.values())
    totals = [weights + state + peak_bytes(world, step) for _ in range(steps)]
    mine: dict[str, Any] = {"weights": weights, "gradients": most, "optimizer": state, "measured": max(totals),
                            "spread": spread_of(totals)}
    everyone = dist.gather_json(mine, world.device)
    planned = memory_per_rank(experiment, world.size)
    found = {key: max(rank[key] for rank in everyone) for key in mine}
    return {"experiment": experiment.name, "world_size": world.size, "grid": plan.grid(),
            "device": f"{world.device} {compute.device_name}", "dtype": str(compute.dtype)[6:],
            "micro_steps": plan.micro_steps, "device_batch_size": plan.device_batch_size, **found,
            "planned": planned.total, "ratio": planned.total / found["measured"], "peak": planned.peak,
            "weights_formula": planned.weights, "optimizer_formula": planned.optimizer}


def peak_bytes(world: World, run: Callable[[int], object]) -> int:
    """The most that torch has allocated at a time in run(0), beside what was there before."""
    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(world.device)
        before = torch.cuda.memory_allocated(world.device)
        run(0)
        return torch.cuda.max_memory_allocated(world.device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(0)
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    changes = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def gradients(optimizer: DistMuonAdamW) -> Iterable[Tensor]:
    """Every tensor that holds a gradient now."""
    yield from (p.grad for p in optimizer.params.values() if p.grad is not None)
    yield from (s.grad for b in optimizer.parcels for s in b.own if s.grad is not None)
    for flight in optimizer.flights:
        yield from (flight.grad, *(flight.parts or ()))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of memory behind `tensors`, each storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


# -- time --------------------------------------------------------------------------------------------------------------

def timing(seconds: Sequence[float]) -> dict[str, float]:
    """The median of times, and their spread."""
    return {"seconds": statistics.median(seconds), "spread": spread_of(seconds)}


def spread_of(values: Sequence[float]) -> float:
    """(max - min) / median."""
    return (max(values) - min(values)) / statistics.median(values)


def clock(world: World) -> float:
    """Seconds, after the device has done all it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()
