"""The pace: which rank all others wait for, step after step. No thread or store of its own.

A rank's own part of a step is the time that it takes to get its rows, and from the mark "forward/backward" until all
ranks meet in a collective, without what it waits for meanwhile. Its updates are not in it: owners own unequal parts.
The first step of a life is not measured, nor is an evaluation or a save.

The rule: every LOOK_S seconds, LOOK_STEPS steps at least, the mean part of each rank is held against the median (of an
even number the lower one). A rank is slow when it took more than SLOW times that in LOOKS looks in a row.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from nanopoe.dist.roll import Record

LOOK_S = 5.0
LOOK_STEPS = 5
LOOKS = 3
SLOW = 1.5

Stamp = float | torch.cuda.Event


@dataclass(frozen=True)
class Slow:
    """A rank that keeps the others waiting; seconds per step, its own part and the median of all ranks' parts."""

    rank: int
    host: str
    seconds: float
    median_seconds: float


@dataclass
class Stopwatch:
    """This rank's own parts, added up over `steps`. On a GPU what counts is its stream: the host runs ahead of it, and
    is never made to wait for the sake of the time."""

    steps: int = 0
    seconds: float = 0.0
    _fetching: Stamp | None = None                                     # since when; null when it does not
    _computing: Stamp | None = None
    _parts: list[tuple[Stamp, Stamp]] = field(default_factory=list)
    _open: bool = False                                                # between "forward/backward" and the meeting

    def mark(self, phase: str) -> None:
        """The rank enters a phase: what lies behind is over, and on a GPU done, since the losses were read."""
        self._take()
        self._fetching = time.perf_counter() if phase == "data" else None
        self._open = phase == "forward/backward"
        self._computing = stamp() if self._open else None

    def wait(self, meets: bool) -> None:
        """The rank is about to wait in a collective; one that `meets` all others ends its part."""
        if self._fetching is not None:
            self._parts.append((self._fetching, time.perf_counter()))
            self._fetching = None
        if self._computing is not None:
            self._parts.append((self._computing, stamp()))
            self._computing = None
        self._open = self._open and not meets

    def go_on(self) -> None:
        """A collective is over."""
        if self._open and self._computing is None:
            self._computing = stamp()

    def _take(self) -> None:
        """Count the step if it came as far as the meeting. The phase before "forward/backward" is a part of it."""
        if self._fetching is not None or self._open:                   # cut short
            self._parts.clear()
        elif any(isinstance(end, torch.cuda.Event) and not end.query() for _, end in self._parts):
            self._parts.clear()
        if len(self._parts) > 1:
            self.seconds += sum(between(*part) for part in self._parts)
            self.steps += 1
            self._parts.clear()


def stamp() -> Stamp:
    """Now: on this process's GPU, if it has one, when its stream gets here."""
    if not torch.cuda.is_initialized():
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Stamp, end: Stamp) -> float:
    """Seconds from one to the other."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


class Pace:
    """Who is slow, by the rule above. `hear` is the heartbeat thread's, `slow` may be read by any."""

    def __init__(self, size: int):
        self.slow: tuple[Slow, ...] = ()
        self._late = [0] * size                                        # looks in a row
        self._since: list[tuple[int, float]] | None = None             # steps and seconds of the ranks at the last look
        self._clock = 0.0

    def hear(self, records: Sequence[Record | None], seconds: float) -> None:
        """What the ranks say now, by rank, `seconds` after the last time."""
        self._clock += seconds
        now = [(record.parts, record.part_seconds) for record in records if record is not None]
        if len(now) < len(self._late):
            return
        if self._since is None:
            self._since = now
        steps = [n - before for (n, _), (before, _) in zip(now, self._since, strict=True)]
        if self._clock < LOOK_S or min(steps) < LOOK_STEPS:
            return
        means = [(total - before) / n for (_, total), (_, before), n in zip(now, self._since, steps, strict=True)]
        median = statistics.median_low(means)
        self._late = [late + 1 if mean > SLOW * median else 0 for late, mean in zip(self._late, means, strict=True)]
        self.slow = tuple(Slow(rank, record.host, means[rank], median) for rank, record in enumerate(records)
                          if record is not None and self._late[rank] >= LOOKS)
        self._clock, self._since = 0.0, now
