"""Adaptive depth: a token leaves at the first stage that is sure enough (SPEC 4, 6). Greedy.

Its state waits at that boundary; the first later token that goes deeper takes it along (decoder.py). So whatever is
computed, is computed as the full model computes it. What a rule decides is only where to stop.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError
from nanopoe.infer.batch import Batch, Emitted
from nanopoe.infer.decoder import Chunk, Decoder
from nanopoe.infer.sampling import Sampling


def check_poe(config: ModelConfig, what: str) -> None:
    if config.poe_mode == "none":
        raise ConfigError("this model was trained without stage losses; only full is valid", what)
    if layout_of(config).n_stages < 2:
        raise ConfigError("a model of one stage has nothing to leave out; only full is valid", what)


@dataclass
class DepthStats:
    """`exits[k]`: tokens that were decided at stage k."""

    exits: list[int]

    @property
    def tokens(self) -> int:
        return sum(self.exits)

    @property
    def mean_depth(self) -> float:
        """Stages that a token needed, 1..K."""
        return sum((k + 1) * n for k, n in enumerate(self.exits)) / max(self.tokens, 1)

    def as_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "exits": self.exits, "mean_depth": self.mean_depth}


class Rule(Protocol):
    """Where tokens leave. One object serves one generation at a time."""

    def begin(self, rows: Sequence[int]) -> None:
        """These rows start a token at stage 0."""

    def looks(self, k: int, rows: Sequence[int]) -> bool:
        """Whether stage k could decide any of `rows`; if not, its head is not computed now."""

    def leave(self, k: int, total: Tensor, rows: Sequence[int]) -> list[bool]:
        """Who leaves at stage k, given sum_{j<=k} z_j (N, V) of `rows`."""


@dataclass
class Wand:
    """Leave when the top-1 margin of the prefix exceeds the sum of the remaining bounds (SPEC 4).

    bounds[k] is a bound of max_v d - min_v d, d = L_{k+1} - L_k. Within the bounds the margin of the next prefix is
    at most this margin plus the bound; where even that would not do, looking at the next stage is put off. With `lead`
    the bounds say how much of a margin is lost, not how much is won (calibrate.lead_bounds): every stage is looked at.
    """

    bounds: Sequence[float]
    lead: bool = False
    _reach: dict[int, float] = field(default_factory=dict, repr=False)     # row -> largest margin possible now

    @staticmethod
    def check_request(config: ModelConfig, sampling: Sampling, alpha: float) -> None:
        """What needs no bounds to be refused."""
        where = "adaptive depth"
        check_poe(config, where)
        if alpha != 0:
            raise ConfigError(f"the bounds hold for the geometric mean, not for alpha {alpha:g}", where,
                              "use alpha 0")
        if not sampling.plain:
            raise ConfigError("is greedy: an early exit keeps the most probable token, not the distribution", where,
                              "leave out temperature and repetition penalty, or use speculative")

    def check(self, config: ModelConfig, n_stages: int, sampling: Sampling, alpha: float) -> None:
        where = "adaptive depth"
        self.check_request(config, sampling, alpha)
        if len(self.bounds) != n_stages - 1:
            raise ConfigError(f"{len(self.bounds)} bounds for {n_stages} stages, which need {n_stages - 1}", where,
                              "run scripts.calibrate on this checkpoint")
        if not all(math.isfinite(b) and b >= 0 for b in self.bounds):
            raise ConfigError(f"bounds must be finite and not negative, got {list(self.bounds)}", where,
                              "run scripts.calibrate on this checkpoint")

    def remaining(self, k: int) -> float:
        return sum(self.bounds[k:])

    def begin(self, rows: Sequence[int]) -> None:
        self._reach = dict.fromkeys(rows, math.inf)

    def looks(self, k: int, rows: Sequence[int]) -> bool:
        if any(self._reach[row] > self.remaining(k) for row in rows):
            return True
        for row in rows:
            self._reach[row] += self.bounds[k]
        return False

    def leave(self, k: int, total: Tensor, rows: Sequence[int]) -> list[bool]:
        best = total.topk(2, dim=-1).values / (k + 1)                      # a mean, so that bounds apply
        margins = (best[:, 0] - best[:, 1]).tolist()
        for row, margin in zip(rows, margins, strict=True):
            self._reach[row] = math.inf if self.lead else margin + self.bounds[k]
        return [margin > self.remaining(k) for margin in margins]


@dataclass(frozen=True)
class Routed:
    """Stage 0 answers when its largest probability reaches `threshold`, else the full pool (SPEC 6)."""

    threshold: float

    @staticmethod
    def check_request(config: ModelConfig, sampling: Sampling, alpha: float) -> None:
        check_poe(config, "routing")
        if not sampling.plain or alpha != 0:
            raise ConfigError("is greedy and has no alpha", "routing", "leave out temperature, penalty and alpha")

    def check(self, config: ModelConfig, n_stages: int, sampling: Sampling, alpha: float) -> None:
        self.check_request(config, sampling, alpha)
        if not 0 <= self.threshold:
            raise ConfigError(f"the threshold must be 0 or more, got {self.threshold}", "routing",
                              "run scripts.calibrate on this checkpoint")

    def begin(self, rows: Sequence[int]) -> None:
        pass

    def looks(self, k: int, rows: Sequence[int]) -> bool:
        return k == 0

    def leave(self, k: int, total: Tensor, rows: Sequence[int]) -> list[bool]:
        confidence = (total.amax(-1) - total.logsumexp(-1)).exp()
        return [c >= self.threshold for c in confidence.tolist()]


def adaptive(decoder: Decoder, batch: Batch, rule: Rule, stats: DepthStats) -> Iterator[Emitted]:
    """Write all rows to their end, each token by as many stages as `rule` asks for."""
    waiting = {row: list(text) for row, text in enumerate(batch.texts)}
    while batch.live:
        rows = list(batch.live)
        decoder.feed({row: waiting[row] for row in rows})
        for row, token, k in _decide(decoder, rows, rule):
            stats.exits[k] += 1
            waiting[row] = [token]
            emitted = batch.push(row, token, k)
            if row not in batch.live:
                decoder.release(row)
            if emitted is not None:
                yield emitted


def _decide(decoder: Decoder, rows: list[int], rule: Rule) -> Iterator[tuple[int, int, int]]:
    """(row, token, stage) for each of `rows`, whose newest tokens wait before stage 0; those who leave early first."""
    w, states, total = decoder.weights, [], None                    # states of the stages whose heads were put off
    rule.begin(rows)
    for k in range(w.n_stages):
        states.append(last_states(decoder.run(k, rows), len(rows)))
        final = k == w.n_stages - 1
        if not final and not rule.looks(k, rows):
            continue
        logits = w.logits(range(k + 1 - len(states), k + 1), states)
        total = sum(logits[1:], logits[0] if total is None else total + logits[0])
        states = []
        leaves = [True] * len(rows) if final else rule.leave(k, total, rows)
        if any(leaves):
            for row, token, leave in zip(rows, total.argmax(-1).tolist(), leaves, strict=True):
                if leave:
                    yield row, token, k
            stay = [i for i, leave in enumerate(leaves) if not leave]
            if not stay:
                return
            rows, total = [rows[i] for i in stay], total[torch.tensor(stay, device=total.device)]


def last_states(chunk: Chunk, rows: int) -> Tensor:
    """States (R, D) of the last token of each of the `rows` rows in a chunk."""
    return chunk.x if len(chunk.rows) == rows else chunk.last([1] * rows)
