"""The plan: an experiment and a world size as the integers that a run is made of (RELIABILITY 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanopoe.config.check import divisors
from nanopoe.config.counts import forward_flops_per_stage, trained_shapes
from nanopoe.config.layout import layout_of
from nanopoe.config.schema import Experiment, ModelConfig
from nanopoe.config.shares import share_stages, stage_of
from nanopoe.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Whole numbers only; rows are packed sequences of sequence_len + 1 ids, tokens count targets.

    With stages on different ranks, P of them make a data group and read the same rows: rank = group * P + column. So
    neighbours, which wait for each other's boundary states, sit on one host (torchrun counts ranks by hosts), where
    they also read the same files; a gradient that goes to the same column of other groups is waited for by nobody
    until the step ends.
    """

    world_size: int              # readers: data groups, each a rank unless stages are on different ranks
    rows_per_step: int           # B, of all ranks
    micro_batches: int           # M, of all ranks: micro-batch g holds the rows j = g (mod M)
    micro_steps: int             # M / world_size, forward-backward passes of one rank in a step
    device_batch_size: int       # rows of one micro-batch
    sequence_len: int
    tokens_per_step: int
    total_steps: int             # over all cycles
    total_tokens: int
    stages: tuple[range, ...] = ()      # of each column; empty: every rank runs all stages

    def place(self, rank: int) -> tuple[int, int]:
        """(data group, column) of a rank."""
        return divmod(rank, len(self.stages) or 1)

    def column(self, index: int) -> tuple[int, ...]:
        """The ranks that run stages[index]."""
        P = len(self.stages)
        return tuple(range(index, self.world_size * P, P))

    def grid(self) -> str:
        """The ranks in words, empty if every rank runs all stages."""
        runs = " | ".join(str(s[0]) if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in self.stages)
        return f"{self.world_size} x {len(self.stages)}: stages {runs}" if runs else ""


def valid_world_sizes(exp: Experiment) -> list[int]:
    """Numbers of ranks that share both the lanes and the micro-batches out evenly, ascending; times parallel.stages."""
    micro_batches = exp.batch.tokens_per_step // (exp.model.sequence_len * exp.batch.device_batch_size)
    return [exp.parallel.stages * n for n in divisors(math.gcd(exp.data.lanes, micro_batches))]


def make_plan(exp: Experiment, world_size: int) -> Plan:
    """The plan of a checked experiment on `world_size` ranks.

    The world size must divide the lanes and the micro-batches, so that the global batches depend on neither.
    Raises ConfigError with the valid world sizes otherwise.
    """
    rows, P = exp.batch.tokens_per_step // exp.model.sequence_len, exp.parallel.stages
    micro_batches = rows // exp.batch.device_batch_size
    valid = valid_world_sizes(exp)
    if world_size not in valid:
        groups = f"{world_size} ranks" if P == 1 else f"{world_size} ranks in groups of {P} (parallel.stages)"
        raise ConfigError(
            f"{groups} do not divide both data.lanes ({exp.data.lanes}) and the {micro_batches} "
            "micro-batches of a step", where=exp.name,
            do=f"use {', '.join(map(str, valid))} ranks, or change data.lanes, batch.device_batch_size or "
               "batch.tokens_per_step")
    total_steps = sum(cycle.steps for cycle in exp.schedule.cycles)
    return Plan(
        world_size=world_size // P,
        rows_per_step=rows,
        micro_batches=micro_batches,
        micro_steps=micro_batches // (world_size // P),
        device_batch_size=exp.batch.device_batch_size,
        sequence_len=exp.model.sequence_len,
        tokens_per_step=exp.batch.tokens_per_step,
        total_steps=total_steps,
        total_tokens=total_steps * exp.batch.tokens_per_step,
        stages=share_stages(forward_flops_per_stage(exp.model), P) if P > 1 else (),
    )


def parameter_homes(m: ModelConfig, plan: Plan) -> dict[str, tuple[int, ...]]:
    """The ranks of the column that trains a parameter, of those that not all ranks train; in order of the model."""
    layout, homes = layout_of(m), {}
    columns = {k: c for c, stages in enumerate(plan.stages) for k in stages}
    for name in trained_shapes(m) if columns else ():
        stage = stage_of(name, layout, m.detach_x0)
        if stage is not None:
            homes[name] = plan.column(columns[stage])
    return homes
