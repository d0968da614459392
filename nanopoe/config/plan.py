"""The plan: an experiment and a world size as the integers that a run is made of (RELIABILITY 3.5)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanopoe.config.check import divisors
from nanopoe.config.schema import Experiment
from nanopoe.errors import ConfigError


@dataclass(frozen=True)
class Plan:
    """Whole numbers only; rows are packed sequences of sequence_len + 1 ids, tokens count targets."""

    world_size: int
    rows_per_step: int           # B, of all ranks
    micro_batches: int           # M, of all ranks: micro-batch g holds the rows j = g (mod M)
    micro_steps: int             # M / world_size, forward-backward passes of one rank in a step
    device_batch_size: int       # rows of one micro-batch
    sequence_len: int
    tokens_per_step: int
    total_steps: int             # over all cycles
    total_tokens: int


def valid_world_sizes(exp: Experiment) -> list[int]:
    """Numbers of ranks that share both the lanes and the micro-batches out evenly, ascending."""
    micro_batches = exp.batch.tokens_per_step // (exp.model.sequence_len * exp.batch.device_batch_size)
    return divisors(math.gcd(exp.data.lanes, micro_batches))


def make_plan(exp: Experiment, world_size: int) -> Plan:
    """The plan of a checked experiment on `world_size` ranks.

    The world size must divide the lanes and the micro-batches, so that the global batches depend on neither.
    Raises ConfigError with the valid world sizes otherwise.
    """
    rows = exp.batch.tokens_per_step // exp.model.sequence_len
    micro_batches = rows // exp.batch.device_batch_size
    valid = valid_world_sizes(exp)
    if world_size not in valid:
        raise ConfigError(
            f"{world_size} ranks do not divide both data.lanes ({exp.data.lanes}) and the {micro_batches} "
            "micro-batches of a step", where=exp.name,
            do=f"use {', '.join(map(str, valid))} ranks, or change data.lanes, batch.device_batch_size or "
               "batch.tokens_per_step")
    total_steps = sum(cycle.steps for cycle in exp.schedule.cycles)
    return Plan(
        world_size=world_size,
        rows_per_step=rows,
        micro_batches=micro_batches,
        micro_steps=micro_batches // world_size,
        device_batch_size=exp.batch.device_batch_size,
        sequence_len=exp.model.sequence_len,
        tokens_per_step=exp.batch.tokens_per_step,
        total_steps=total_steps,
        total_tokens=total_steps * exp.batch.tokens_per_step,
    )
