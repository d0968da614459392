"""The doctor's dry run: data and tokenizer, kernels, the memory plan, and a step of which nothing is kept."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.checkpoint import list_steps, open_checkpoint
from nanopoe.config import Experiment, Plan, make_plan
from nanopoe.config.memory import USABLE, memory_per_rank
from nanopoe.data.loader import open_sources, train_loader
from nanopoe.errors import ConfigError, DataError, NumericsError
from nanopoe.model import GPT
from nanopoe.model.stages import trained_losses
from nanopoe.optim import DistMuonAdamW
from nanopoe.train.bench import peak_bytes, storage_bytes
from nanopoe.train.build import build_model, build_optimizer, find_start, load_tokenizer, stage_column
from nanopoe.train.compute import Compute, choose_compute, knobs, out_of_memory, planned_on, size_text
from nanopoe.train.doctor_exam import Exam, Found, Trouble, clock, count, told
from nanopoe.train.pipeline import Pipeline
from nanopoe.train.step import accumulate, find_nonfinite

MICRO_STEPS = 2              # of the dry step: from the second on a step holds all that it ever holds


def check_data(exam: Exam) -> Found:
    """The tokenizer is the model's, all sources open, and every rank sees the same ones."""
    experiment, data = exam.experiment, exam.experiment.data

    def look() -> dict[str, Any]:
        tokenizer = load_tokenizer(experiment)
        sources = {f"{split} {source.name}": source.digest
                   for split, configs in (("train", data.train), ("val", data.val))
                   for source in open_sources(configs, data.kind)}
        return {"tokenizer": tokenizer.digest, **sources}

    ranks = exam.ask(look)
    for name, digest in ranks[0].items():
        others = [rank for rank, seen in enumerate(ranks) if seen[name] != digest]
        if others:
            raise Trouble(f"{told(others)} found another {name} than rank 0", "every host must see the same files",
                          DataError, told(others))
    return Found(f"tokenizer of {experiment.model.vocab_size:,}; {count(len(data.train), 'source')} to train on, "
                 f"{len(data.val)} to validate")


def check_kernels(exam: Exam) -> Found:
    """What choose_compute chooses, and that it is the same on all ranks but for their speed."""
    ranks = exam.ask(lambda: as_told(compute_here(exam)))
    others = [rank for rank, (dtype, _, _) in enumerate(ranks) if dtype != ranks[0][0]]
    if others:
        raise Trouble(f"{told(others)} would compute in {ranks[others[0]][0]}, rank 0 in {ranks[0][0]}",
                      "set runtime.compute_dtype", ConfigError, told(others))
    dtype, device, reason = ranks[0]
    kinds = sorted({name for _, name, _ in ranks})
    return Found(f"{dtype} ({reason}) on {', '.join(kinds)}",
                 "" if len(kinds) == 1 else "the slowest device sets the pace of all")


def compute_here(exam: Exam) -> Compute:
    """Chosen once: finding the peak takes a third of a second."""
    if "compute" not in exam.notes:
        exam.notes["compute"] = choose_once(exam)
    found: Compute = exam.notes["compute"]
    return found


def choose_once(exam: Exam) -> Compute:
    return choose_compute(exam.experiment.runtime, exam.world, int(os.environ.get("LOCAL_WORLD_SIZE", exam.world.size)),
                          exam.experiment.data.document_mask)


def as_told(compute: Compute) -> tuple[str, str, str]:
    return str(compute.dtype).removeprefix("torch."), compute.device_name, compute.reason


def check_memory(exam: Exam) -> Found:
    """The plan of a step against what the fullest device has left."""
    experiment, world = exam.experiment, exam.world
    plan = exam.ask(lambda: memory_per_rank(planned_on(experiment, world.device), world.size).as_dict())[0]
    here = exam.ask(lambda: list(memory_left(world.device)))
    least, whole = min(here)
    total, where = plan["total"], f" (rank {here.index([least, whole])})" * (world.size > 1)
    text = (f"{size_text(total)} planned, fullest at {plan['peak']}; {size_text(least)} of {size_text(whole)} "
            f"are free for a rank{where}")
    if total > least:
        do = knobs(experiment, world.device, world.size)
        if world.device.type == "cpu":                           # no error comes: the system swaps, or ends processes
            raise Trouble(text, do)
        return Found(text, f"of a GPU the plan was never measured; the dry batch shows it. If it does not fit: {do}")
    return Found(text, "close: libraries and what is lost between blocks come on top" if total > USABLE * least else "")


def memory_left(device: torch.device) -> tuple[int, int]:
    """(free, all) bytes for this rank: of its GPU, with what this process holds; on a CPU its share of the host's, or
    of what the process's group may use."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device), whole
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.size()))
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = next((1024 * int(line.split()[1]) for line in read("/proc/meminfo").splitlines()
                 if line.startswith("MemAvailable:")), whole)
    limit, used = read("/sys/fs/cgroup/memory.max").strip(), read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdecimal() and used.isdecimal():
        whole, free = min(whole, int(limit)), min(free, int(limit) - int(used))
    return free // ranks, whole // ranks


def read(path: str) -> str:
    """A file of the system, empty where there is none."""
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return ""


# -- a step that nothing is kept of -----------------------------------------------------------------------------------

@dataclass
class Dry:
    """What a step is made of, in memory alone."""

    experiment: Experiment
    plan: Plan
    model: GPT
    optimizer: DistMuonAdamW
    rows: Tensor                     # (micro_steps, b, T+1) int64
    pipe: Pipeline | None

    def step(self, _: int = 0) -> float:
        """One step, collectives and all; this rank's loss, nats per target."""
        if self.pipe is not None:
            self.pipe.begin()
        pool = trained_losses(self.model) > 1 and self.pipe is None
        sums = accumulate(self.model, self.optimizer, self.rows, self.experiment.objective,
                          1 / self.plan.tokens_per_step, pool, None, self.pipe)
        if self.pipe is not None:
            self.pipe.end()
        self.optimizer.reduce()
        self.optimizer.update(1.0, 0.95, 1.0)
        return float(sums[0] / sums[-1].clamp(min=1))


def check_batch(exam: Exam) -> Found:
    """Forward, backward and update of real rows at full size, as training does it; most memory beside the plan's.

    Each rank first runs a micro-batch alone, with gradients that go nowhere: what does not fit or is not finite is told
    here. Then all make a step together. Blocks are not compiled: it takes a minute, and the plan counts them so.
    """
    world, experiment = exam.world, exam.experiment
    column = stage_column(experiment, make_plan(experiment, world.size))
    held: list[Dry] = []
    exam.ask(lambda: held.append(prepare(exam, column)))
    dry = held[0]
    if dry.pipe is None:
        bad = exam.ask(lambda: alone(exam, dry))
        if any(bad):
            ranks = [rank for rank, names in enumerate(bad) if names]
            raise Trouble(f"loss or gradient is not finite on {told(ranks)}, first in {bad[ranks[0]][0]}",
                          "look at the data and runtime.compute_dtype", NumericsError, told(ranks))
    start = clock(world)
    with out_of_memory(experiment, world.device):
        peak = peak_bytes(world, dry.step)
        state = (tensor for parcel in dry.optimizer.parcels for tensor in parcel.state.values())
        most = peak + storage_bytes([*dry.model.parameters(), *state])
        took = clock(world) - start
    everyone = exam.ask(lambda: [most, took])
    seconds, most = max(s for _, s in everyone), max(m for m, _ in everyone)
    planned = memory_per_rank(planned_on(experiment, world.device), world.size).total
    return Found(f"{dry.plan.micro_steps} x {dry.plan.device_batch_size} rows of {dry.plan.sequence_len:,} and an "
                 f"update in {seconds:.2f} s; most memory {size_text(most)}, {size_text(planned)} planned")


def prepare(exam: Exam, column: dist.Group | None) -> Dry:
    """Build it all; the run's newest checkpoint, if there is one, is not loaded."""
    experiment, world = exam.experiment, exam.world
    plan = few_micro_steps(make_plan(experiment, world.size))
    tokenizer = load_tokenizer(experiment)
    with out_of_memory(experiment, world.device):
        newest = open_checkpoint(experiment.out, None) if list_steps(experiment.out) else None
        start = find_start(experiment, tokenizer, newest)
        compute = replace(compute_here(exam), compiled=False)
        model = build_model(experiment, world, compute, None, start)
        optimizer = build_optimizer(experiment, model, world, compute, plan, column)
        group = plan.place(world.rank)[0]
        with train_loader(experiment.data, tokenizer, plan, seed=experiment.seed, rank=group) as loader:
            rows, _ = next(loader)
    return Dry(experiment, plan, model, optimizer, rows.to(world.device).long(),
               Pipeline(plan, world) if plan.stages else None)


def few_micro_steps(plan: Plan) -> Plan:
    """The plan with as few micro-steps as show the fullest moment."""
    steps = min(MICRO_STEPS, plan.micro_steps)
    rows = plan.world_size * steps * plan.device_batch_size
    return replace(plan, rows_per_step=rows, micro_batches=plan.world_size * steps, micro_steps=steps,
                   tokens_per_step=rows * plan.sequence_len)


def alone(exam: Exam, dry: Dry) -> list[str]:
    """The first parameters whose gradient is not finite after one micro-batch on this rank alone."""
    with out_of_memory(exam.experiment, exam.world.device), dry.optimizer.deaf():
        found = find_nonfinite(dry.model, dry.rows[:1], exam.experiment.objective, 1 / dry.plan.tokens_per_step)
    return [name for names in found.values() for name in names or ["the loss"]]
