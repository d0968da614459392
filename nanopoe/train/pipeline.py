"""Stage parallelism: this rank's stages, and the boundary states that come in and go out (SPEC 2).

No gradient crosses a boundary, so all traffic between stages is forward: a rank hands on the state behind its last
stage before that stage's backward, and goes on with its next micro-batch without waiting for anybody behind it. What a
rank waits for is told: the states before it, room for those it sends, and at the end the ranks that are not done.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.config import Plan
from nanopoe.dist import World

AHEAD = 2                # micro-batches whose states may be on their way to the next rank, and so in memory


class Pipeline:
    """The stages of this rank and the ranks beside it, as backward_stages wants them (stages.Part)."""

    def __init__(self, plan: Plan, world: World):
        self.world = world
        self.group, self.column = plan.place(world.rank)
        self.stages = plan.stages[self.column]
        self._before = world.rank - 1 if self.column > 0 else None
        self._behind = world.rank + 1 if self.column + 1 < len(plan.stages) else None
        self._sent: deque[dist.Pending] = deque()
        self._times = StopWatch(world.device)

    def enter(self, x0: Tensor) -> Tensor:
        """The state of the stage before this rank's first: it is of x0's shape and dtype, (b, T, D)."""
        if self._before is None:
            return x0
        state = torch.empty_like(x0, requires_grad=False)
        with self._times.waiting():
            dist.receive(state, self._before).wait()
        return state

    def leave(self, x: Tensor) -> None:
        """Start sending the state behind this rank's last stage."""
        if self._behind is None:
            return
        while len(self._sent) >= AHEAD:
            with self._times.waiting():
                self._sent.popleft().wait()
        self._sent.append(dist.send(x.contiguous(), self._behind))

    def begin(self) -> None:
        """The first micro-batch of a step comes next, on all ranks at about this time."""
        self._times.start()

    def end(self) -> Tensor:
        """The last one is done: wait until all states have left. Returns (2, W) fp64, zero but for this rank: seconds
        that it waited since begin(), and all seconds since."""
        with self._times.waiting():
            while self._sent:
                self._sent.popleft().wait()
        self._times.stop()
        times = torch.zeros(2, self.world.size, dtype=torch.float64)
        times[:, self.world.rank] = torch.tensor(self._times.read(), dtype=torch.float64)
        return times.to(self.world.device)


def idle_seconds(times: Tensor) -> list[float]:
    """`times` summed over ranks -> seconds that each did nothing in a step's micro-batches: waiting for states, and
    for the last rank to be done."""
    waited, whole = times.unbind(0)
    found: list[float] = (waited + whole.max() - whole).tolist()
    return found


Moment = float | torch.cuda.Event


class StopWatch:
    """Seconds as the device sees them: on a GPU what its stream waits is no time of the CPU's."""

    def __init__(self, device: torch.device):
        self._device = device
        self._waits: list[tuple[Moment, Moment]] = []
        self._span: list[Moment] = []

    def start(self) -> None:
        self._waits, self._span = [], [self._now()]

    def stop(self) -> None:
        self._span.append(self._now())

    @contextmanager
    def waiting(self) -> Iterator[None]:
        begun = self._now()
        yield
        self._waits.append((begun, self._now()))

    def read(self) -> tuple[float, float]:
        """(seconds waited, seconds from start to stop)."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return sum(between(a, b) for a, b in self._waits), between(self._span[0], self._span[1])

    def _now(self) -> Moment:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def between(a: Moment, b: Moment) -> float:
    """Seconds from a to b."""
    if isinstance(a, torch.cuda.Event):
        assert isinstance(b, torch.cuda.Event)
        return float(a.elapsed_time(b)) / 1e3
    assert isinstance(b, float)
    return b - a
