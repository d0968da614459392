"""Learning rate, Muon momentum and weight decay as pure functions of the step, so a resume replays nothing (SPEC 9).

A run is a list of cycles, each a warm-up, a hold and a warm-down. A cycle's numbers depend on the steps since its
start and on nothing else, so appending a cycle changes no value before it.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

from nanopoe.config.schema import CycleConfig

MOMENTUM_START, MOMENTUM_HOLD, MOMENTUM_END = 0.85, 0.97, 0.90

Phase = Literal["warm-up", "hold", "warm-down"]


class Schedule:
    """Values for step 0 .. total_steps; step counts completed updates, and total_steps is the state after the last.

    Any other step is a bug of the caller and raises ValueError.
    """

    def __init__(self, cycles: Sequence[CycleConfig]):
        self.cycles = tuple(cycles)
        self.starts = (0, *accumulate(cycle.steps for cycle in self.cycles))

    @property
    def total_steps(self) -> int:
        return self.starts[-1]

    def cycle_at(self, step: int) -> tuple[int, int]:
        """(index of the cycle that step belongs to, steps since its start). The end belongs to the last cycle."""
        if not 0 <= step <= self.total_steps:
            raise ValueError(f"step {step} is outside of 0..{self.total_steps}")
        index = min(bisect.bisect_right(self.starts, step) - 1, len(self.cycles) - 1)
        return index, step - self.starts[index]

    def phase(self, step: int) -> Phase:
        cycle, rel = self._at(step)
        if rel < cycle.warmup_steps:
            return "warm-up"
        return "hold" if rel <= cycle.steps - _warmdown_steps(cycle) else "warm-down"

    def lr_scale(self, step: int) -> float:
        """Multiplier of every learning rate: linear up to the peak, hold, linear down to peak * final_frac."""
        cycle, rel = self._at(step)
        if rel < cycle.warmup_steps:
            return cycle.peak * (rel + 1) / cycle.warmup_steps
        down = _warmdown_steps(cycle)
        if rel <= cycle.steps - down:
            return cycle.peak
        left = (cycle.steps - rel) / down                    # 1 at the hold, 0 after the last step
        return cycle.peak * (left + (1 - left) * cycle.final_frac)

    def momentum(self, step: int) -> float:
        """Muon momentum: .85 -> .97 over momentum_warmup_steps, .97, and .97 -> .90 over the warm-down."""
        cycle, rel = self._at(step)
        if rel < cycle.momentum_warmup_steps:
            return MOMENTUM_START + (MOMENTUM_HOLD - MOMENTUM_START) * rel / cycle.momentum_warmup_steps
        down = _warmdown_steps(cycle)
        if rel <= cycle.steps - down:
            return MOMENTUM_HOLD
        return MOMENTUM_HOLD + (MOMENTUM_END - MOMENTUM_HOLD) * (rel - (cycle.steps - down)) / down

    def weight_decay_scale(self, step: int) -> float:
        """Multiplier of Muon's weight decay: a cosine from 1 to 0 over the cycle."""
        cycle, rel = self._at(step)
        return 0.5 * (1 + math.cos(math.pi * rel / cycle.steps))

    def _at(self, step: int) -> tuple[CycleConfig, int]:
        index, rel = self.cycle_at(step)
        return self.cycles[index], rel


def _warmdown_steps(cycle: CycleConfig) -> int:
    return round(cycle.warmdown_ratio * cycle.steps)
