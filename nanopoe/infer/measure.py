"""How fast decoding is: against the weights it must read, and a mode against plain decoding. Times of one process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nanopoe.infer.depth import DepthStats
from nanopoe.infer.engine import Engine, Mode
from nanopoe.infer.speculative import Speculative, SpeculativeStats, ideal_speedup

READ_BYTES = 256 << 20   # far above any cache


def bandwidth(device: torch.device, repeats: int = 5) -> float:
    """Bytes per second at which this process reads memory: the best of some passes over 256 MiB."""
    block = torch.ones(READ_BYTES // 4, device=device)
    return READ_BYTES / min(_seconds(lambda: float(block.sum())) for _ in range(repeats + 1))


def decode_speed(engine: Engine, prompt: Sequence[int], tokens: int, repeats: int = 3) -> dict[str, float]:
    """Plain decoding of one text, greedy: the best of `repeats`. The bound is reading the weights once per token.

    tokens_per_s; bytes_per_token; bandwidth, bytes per second, measured before and after; bound_tokens_per_s;
    of_bound.
    """
    engine.generate([prompt], max_new_tokens=2)
    rate = bandwidth(engine.weights.device)
    best = min(_seconds(lambda: engine.generate([prompt], max_new_tokens=tokens)) for _ in range(repeats))
    rate = max(rate, bandwidth(engine.weights.device))
    read = engine.weights.bytes_read(engine.experts.depth, len(engine.experts.stages))
    return {"tokens_per_s": tokens / best, "bytes_per_token": read, "bandwidth": rate,
            "bound_tokens_per_s": rate / read, "of_bound": tokens / best * read / rate}


def compare(engine: Engine, mode: Mode, prompts: Sequence[Sequence[int]], max_new_tokens: int,
            repeats: int = 1) -> dict[str, Any]:
    """A mode against plain greedy decoding of the full pool, prompt by prompt in turns.

    The statistics of the mode, and: measured_speedup, of the sums of each prompt's best times; predicted_speedup, by
    weights read: of adaptive depth from its exits, of speculation (mean + 1) / (m c + 1); agreement, the share of
    tokens that are those of plain decoding, `equal` the number of answers that are so as a whole; tokens_per_s.
    """
    counts: dict[str, Any] = {}
    plain_s = mode_s = 0.0
    same = tokens = equal = 0
    for i, prompt in enumerate(prompts):
        plain, ours = _Timed(engine, prompt, max_new_tokens, None), _Timed(engine, prompt, max_new_tokens, mode)
        for _ in range(repeats + (i == 0)):                         # the first of all warms up
            plain.run()
            ours.run()
        plain_s, mode_s = plain_s + plain.best, mode_s + ours.best
        tokens += len(ours.answer)
        same += sum(a == b for a, b in zip(plain.answer, ours.answer, strict=True))
        equal += plain.answer == ours.answer
        for name, value in vars(ours.stats).items():
            old = counts.get(name)
            counts[name] = value if old is None else \
                [a + b for a, b in zip(old, value, strict=True)] if isinstance(value, list) else old + value
    stats = SpeculativeStats(**counts) if isinstance(mode, Speculative) else DepthStats(**counts)
    return {**stats.as_dict(), "prompts": len(prompts), "equal": equal, "agreement": same / max(tokens, 1),
            "predicted_speedup": predicted_speedup(engine, mode, stats), "measured_speedup": plain_s / mode_s,
            "tokens_per_s": tokens / mode_s, "plain_tokens_per_s": tokens / plain_s}


def predicted_speedup(engine: Engine, mode: Mode, stats: SpeculativeStats | DepthStats) -> float:
    """By bytes of weights that are read, nothing else counted."""
    w = engine.weights
    if isinstance(stats, SpeculativeStats):
        assert isinstance(mode, Speculative)
        return ideal_speedup(stats.mean_accepted, stats.drafted / max(stats.rounds, 1), w.share(mode.prefix))
    cost = sum(n * w.share(k + 1) for k, n in enumerate(stats.exits))
    return stats.tokens / cost if cost else 1.0


class _Timed:
    """One prompt in one mode, again and again: its answer, the statistics of a run, the best time."""

    def __init__(self, engine: Engine, prompt: Sequence[int], tokens: int, mode: Mode | None):
        self.engine, self.prompt, self.tokens, self.mode = engine, prompt, tokens, mode
        self.best = float("inf")
        self.answer: list[int] = []
        self.stats: SpeculativeStats | DepthStats | None = None

    def run(self) -> None:
        def once() -> None:
            generation = self.engine.stream([self.prompt], max_new_tokens=self.tokens, mode=self.mode)
            self.answer = [token for _, token, _ in generation]
            self.stats = generation.stats

        self.best = min(self.best, _seconds(once))


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
