"""How fast decoding is: against the weights it must read, and a mode against plain decoding. Times of one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from nanopoe import dist
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99
from nanopoe.infer.depth import DepthStats, Routed, Wand
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
    read = engine.weights.bytes_read(engine.experts.stages)
    return {"tokens_per_s": tokens / best, "bytes_per_token": read, "bandwidth": rate,
            "bound_tokens_per_s": rate / read, "of_bound": tokens / best * read / rate}


def in_turns(ours: Callable[[], list[int]], theirs: Callable[[], list[int]], rounds: int = 5) -> dict[str, Any]:
    """Two ways to the same tokens, alternating after a first time each: tokens_per_s and their_tokens_per_s (medians),
    ratio of the medians, and whether the tokens were equal."""
    a, b = ours(), theirs()
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for work, taken in zip((ours, theirs), times, strict=True):
            taken.append(_seconds(work))
    mine, other = (statistics.median(taken) for taken in times)
    return {"tokens_per_s": len(a) / mine, "their_tokens_per_s": len(b) / other, "ratio": other / mine, "equal": a == b}


def calibrated_modes(calibration: dict[str, Any]) -> dict[str, Mode]:
    """Every mode with its calibrated figures, by the name it has in a record."""
    threshold = calibration["routing"]["threshold"]
    return {"speculative": Speculative(), "speculative_auto": Speculative(None),
            "wand_max": Wand(calibration[MAX]), "wand_p99": Wand(calibration[P99]),
            "wand_lead": Wand(calibration[LEAD_MAX], lead=True),
            "wand_lead_p99": Wand(calibration[LEAD_P99], lead=True),
            "routed": Routed(float("inf") if threshold is None else threshold)}


def compare(engine: Engine, modes: Mapping[str, Mode], prompts: Sequence[Sequence[int]], max_new_tokens: int,
            repeats: int = 1) -> dict[str, dict[str, Any]]:
    """Modes against plain greedy decoding of the full pool, all in turns on one prompt after the other.

    Of each mode its statistics, and: measured_speedup, of the sums of each prompt's best times; predicted_speedup, by
    weights read: of adaptive depth from its exits, of speculation (mean + 1) / (m c + 1); agreement, the share of
    tokens that are those of plain decoding, `equal` the number of answers that are so as a whole; tokens_per_s.
    """
    plain, totals = _Total(), {name: _Total() for name in modes}
    for i, prompt in enumerate(prompts):
        ways = [_Timed(engine, prompt, max_new_tokens, mode) for mode in (None, *modes.values())]
        for _ in range(repeats + (i == 0)):                         # the first of all warms up
            for way in ways:
                dist.mark("measure")
                way.run()
        for total, way in zip((plain, *totals.values()), ways, strict=True):
            total.add(way, ways[0].answer)
    found = {}
    for name, mode in modes.items():
        total, kind = totals[name], SpeculativeStats if isinstance(mode, Speculative) else DepthStats
        stats = kind(**total.counts)
        found[name] = {
            **stats.as_dict(), "prompts": len(prompts), "equal": total.equal,
            "agreement": total.same / max(total.tokens, 1),
            "predicted_speedup": predicted_speedup(engine, mode, stats),
            "measured_speedup": plain.seconds / total.seconds,
            "tokens_per_s": total.tokens / total.seconds, "plain_tokens_per_s": plain.tokens / plain.seconds}
    return found


def predicted_speedup(engine: Engine, mode: Mode, stats: SpeculativeStats | DepthStats) -> float:
    """By bytes of weights that are read, nothing else counted."""
    w = engine.weights
    if isinstance(stats, SpeculativeStats):
        assert isinstance(mode, Speculative)
        return ideal_speedup(stats.mean_accepted, stats.drafted / max(stats.rounds, 1), w.share(mode.prefix))
    cost = sum(n * w.share(k + 1) for k, n in enumerate(stats.exits))
    return stats.tokens / cost if cost else 1.0


@dataclass
class _Total:
    """Sums over prompts; `same` and `equal` against plain decoding."""

    seconds: float = 0.0
    tokens: int = 0
    same: int = 0
    equal: int = 0
    counts: dict[str, Any] = field(default_factory=dict)             # of the statistics

    def add(self, way: _Timed, plain: list[int]) -> None:
        self.seconds += way.best
        self.tokens += len(way.answer)
        self.same += sum(a == b for a, b in zip(way.answer, plain, strict=True))
        self.equal += way.answer == plain
        for name, value in vars(way.stats).items() if way.stats else ():
            old = self.counts.get(name)
            self.counts[name] = value if old is None else \
                [a + b for a, b in zip(old, value, strict=True)] if isinstance(value, list) else old + value


class _Timed:
    """One prompt in one mode, again and again: its answer, the statistics of a run, the best time."""

    def __init__(self, engine: Engine, prompt: Sequence[int], tokens: int, mode: Mode | None):
        self.engine, self.prompt, self.tokens, self.mode = engine, prompt, tokens, mode
        self.best = float("inf")
        self.answer: list[int] = []
        self.stats: Any = None

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
