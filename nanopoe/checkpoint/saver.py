"""Saving beside training: the training thread makes a copy in memory, a thread of its own writes and commits it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from nanopoe.checkpoint.commit import Target, commit, own_weights
from nanopoe.optim.dist_muon_adamw import StatePart

PATIENCE_S = 5.0                # a run that ends by an error waits so long for a save under way


@dataclass(frozen=True)
class Outcome:
    """How a save ended: `path` of the checkpoint, or the `error`; both and the warnings are the same on all ranks."""

    step: int
    path: Path | None
    error: Exception | None
    warnings: list[str]
    held_s: float               # seconds that save() held the training thread
    total_s: float              # seconds from the call to the commit


class Saver:
    """Saves the run of `target` from live tensors: `weights` by name, and what `optimizer_state()` yields.

    Every rank makes one and calls save(), poll() and close() alike. With checkpoint.async_save the memory to copy into
    is taken once, here: what this rank writes, on the CPU. Without it a save is written from the live tensors while
    save() waits. On several ranks target.group must be one that nothing else uses (dist.side_group).
    """

    def __init__(self, target: Target, weights: Mapping[str, Tensor],
                 optimizer_state: Callable[[], Iterable[StatePart]]):
        self._target = target
        self._weights, self._optimizer_state = own_weights(weights, target.world), optimizer_state
        self._copies = None
        if target.experiment.checkpoint.async_save:
            self._copies = [buffer_for(tensor) for tensor in self._live()[2]]
        self._thread: threading.Thread | None = None
        self._outcomes: deque[Outcome] = deque()

    def save(self, state: Mapping[str, Any], *, wait: bool = False) -> Outcome | None:
        """Save step state["step"] as training stands now. `state`: see `commit`; it must not change afterwards.

        A save still under way is waited for first. With `wait` the outcome is returned, or its error raised; without,
        poll() gives it.
        """
        start = time.perf_counter()
        if self._thread is not None:
            self._thread.join()
        weights, parts = self._snapshot()
        beside = not wait and self._copies is not None
        held = time.perf_counter() - start if beside else None
        self._thread = threading.Thread(target=self._work, args=(weights, parts, dict(state), start, held),
                                        name=f"save of step {state['step']}", daemon=True)
        self._thread.start()
        if beside:
            return None
        self._thread.join()
        if not wait:
            return None
        outcome = self._outcomes.pop()
        if outcome.error is not None:
            raise outcome.error
        return outcome

    @property
    def finished(self) -> bool:
        """Whether poll() has an outcome. Ranks finish at different times: poll when all have (an all-reduce)."""
        return bool(self._outcomes)

    def poll(self) -> Outcome | None:
        """The outcome of the oldest finished save that was not asked for yet, without waiting."""
        return self._outcomes.popleft() if self._outcomes else None

    def close(self, patience_s: float | None = None) -> None:
        """Wait for a save under way, for ever or some seconds; what it leaves then is no checkpoint, and no harm."""
        if self._thread is not None:
            self._thread.join(patience_s)

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        self.close(None if kind is None else PATIENCE_S)

    def _live(self) -> tuple[list[str], list[StatePart], list[Tensor]]:
        """What this rank writes: names of weights, parts of optimizer state, and the tensors of both in this order."""
        parts = list(self._optimizer_state())
        return list(self._weights), parts, [*self._weights.values(), *(part.tensor for part in parts)]

    def _snapshot(self) -> tuple[dict[str, Tensor], list[StatePart]]:
        names, parts, tensors = self._live()
        if self._copies is not None:
            for copy, tensor in zip(self._copies, tensors, strict=True):
                copy.copy_(tensor, non_blocking=True)
            if self._target.world.device.type == "cuda":
                torch.cuda.synchronize(self._target.world.device)
            tensors = self._copies
        weights = dict(zip(names, tensors[:len(names)], strict=True))
        states = [replace(part, tensor=tensor) for part, tensor in zip(parts, tensors[len(names):], strict=True)]
        return weights, states

    def _work(self, weights: dict[str, Tensor], parts: list[StatePart], state: dict[str, Any], start: float,
              held: float | None) -> None:
        """In the thread: all of the save, its collectives included, on a group that training does not use."""
        path, warnings, error = None, [], None
        try:
            saved = commit(self._target, weights, parts, state)
            path, warnings = saved.path, saved.warnings
        except Exception as caught:
            error = caught
        total = time.perf_counter() - start
        self._outcomes.append(Outcome(state["step"], path, error, warnings, total if held is None else held, total))


def buffer_for(tensor: Tensor) -> Tensor:
    """CPU memory for a copy of `tensor`: pinned if that is on a GPU, and touched, so that no copy waits for pages."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda,
                            memory_format=torch.contiguous_format).fill_(0)
