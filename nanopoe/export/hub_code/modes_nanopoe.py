"""Adaptive depth, routing and self-speculation of a nanopoe model: which stages a token runs through.

Shape letters: N texts, V vocabulary, K stages.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .decoding_nanopoe import Decoder, Sampling, Texts

NO_STAGES = "this model was trained without stage losses; only full is valid"
MOST_DRAFTS = 16                                         # of a round
LEADS = (0.1, 0.2, 0.4, 0.8, 1.6)                        # nats; edges of the classes
BELIEF = (0.6, 0.75, 0.88, 0.96, 0.99, 0.998)            # kept in each class before any round: seen on small models
BELIEF_WEIGHT = 4.0                                      # drafts that it counts as
FORGET = 0.02                                            # of what a row has learned, each round


# -- adaptive depth and routing ---------------------------------------------------------------------------------------

@dataclass
class Wand:
    """Leave when the top-1 margin of the pool so far exceeds the sum of the bounds that remain.

    bounds[k] bounds max_v d - min_v d with d = L_{k+1} - L_k, L_k the mean log-probability of stages 0 to k. While they
    hold, a later stage cannot change the token, and the margin of the next pool is at most this one plus the bound:
    where even that would not do, the next stage's head is not computed. With `lead` the bounds say how much of a margin
    is lost, not how much is won: every stage is looked at.
    """

    bounds: list[float]
    lead: bool = False
    reach: dict[int, float] = field(default_factory=dict)        # row -> largest margin it can have now

    def begin(self, rows: list[int]) -> None:
        self.reach = dict.fromkeys(rows, math.inf)

    def looks(self, k: int, rows: list[int]) -> bool:
        if any(self.reach[row] > sum(self.bounds[k:]) for row in rows):
            return True
        for row in rows:
            self.reach[row] += self.bounds[k]
        return False

    def leave(self, k: int, total: Tensor, rows: list[int]) -> list[bool]:
        best = total.topk(2, dim=-1).values / (k + 1)
        margins = (best[:, 0] - best[:, 1]).tolist()
        self.reach |= {row: math.inf if self.lead else margin + self.bounds[k]
                       for row, margin in zip(rows, margins, strict=True)}
        return [margin > sum(self.bounds[k:]) for margin in margins]


@dataclass
class Routed:
    """Leave at stage 0 when its largest probability reaches the threshold, else ask all stages."""

    threshold: float

    def begin(self, rows: list[int]) -> None:
        pass

    def looks(self, k: int, rows: list[int]) -> bool:
        return k == 0

    def leave(self, k: int, total: Tensor, rows: list[int]) -> list[bool]:
        return ((total.amax(-1) - total.logsumexp(-1)).exp() >= self.threshold).tolist()


def adaptive(decoder: Decoder, texts: Texts, rule: Wand | Routed) -> dict[str, Any]:
    """Write all rows to their end, each token by as many stages as the rule asks for. The statistics."""
    exits = [0] * decoder.stages
    while texts.live:
        rows = list(texts.live)
        decoder.feed({row: texts.fresh[row] for row in rows})
        for row, token, k in _decide(decoder, rows, rule):
            exits[k] += 1
            texts.push(row, token, k)
    tokens = sum(exits)
    return {"tokens": tokens, "exits": exits, "mean_depth": sum((k + 1) * n for k, n in enumerate(exits)) / tokens}


def _decide(decoder: Decoder, rows: list[int], rule: Wand | Routed) -> Iterator[tuple[int, int, int]]:
    """(row, token, stage) of the next token of each row; rows that leave early come first."""
    rule.begin(rows)
    total: Any = 0.0                     # sum of the logits of stages 0 to k, once somebody looks
    unread = 0                           # the first stage whose head was not computed yet
    for k in range(decoder.stages):
        decoder.run(k, rows)
        final = k == decoder.stages - 1
        if not final and not rule.looks(k, rows):
            continue
        for j in range(unread, k + 1):
            total = total + decoder.logits(j, rows)
        unread = k + 1
        leaves = [True] * len(rows) if final else rule.leave(k, total, rows)
        for row, token, leave in zip(rows, total.argmax(-1).tolist(), leaves, strict=True):
            if leave:
                yield row, token, k
        stay = [i for i, leave in enumerate(leaves) if not leave]
        if not stay:
            return
        rows, total = [rows[i] for i in stay], total[stay]


# -- self-speculation -------------------------------------------------------------------------------------------------

@dataclass
class Draft:
    """A row's round of `most` drafts or fewer: tokens, the distribution each was drawn from, the drafter's sums of
    logits before each and behind the last, and for Pace its lead before each and the chance that all up to it are kept.
    """

    most: int
    tokens: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)           # one more (V,)
    leads: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)


class Pace:
    """When a row's drafter stops: after `fixed` drafts, or before the draft that would cost more than it brings.

    A draft costs `share` of a token of the full model. The chance that it is kept is learned from the row's own rounds,
    by the drafter's lead (top-1 margin in nats) before it. Drafting goes on while the chance of one more, for its cost,
    is above the tokens expected of the round so far for theirs. It looks at distributions, never at what was drawn from
    them, so a sampled text keeps its distribution.
    """

    def __init__(self, fixed: int | None, share: float):
        self.fixed, self.share, self.most = fixed, share, fixed or MOST_DRAFTS
        self.seen = [BELIEF_WEIGHT] * len(BELIEF)
        self.kept = [BELIEF_WEIGHT * p for p in BELIEF]

    def goes_on(self, draft: Draft, lead: float) -> bool:
        """Whether to draft one more token; notes what it expects of it."""
        n = len(draft.tokens)
        if n == draft.most or self.fixed:
            return n < draft.most
        kind = bisect_right(LEADS, lead)
        chance = (draft.chances[-1] if n else 1.0) * self.kept[kind] / self.seen[kind]
        if chance * (1 + n * self.share) < self.share * (1 + sum(draft.chances)):
            return False
        draft.leads.append(lead)
        draft.chances.append(chance)
        return True

    def learn(self, draft: Draft, kept: int) -> None:
        """The first so many drafts were kept; the one after them was not, and those behind it say nothing."""
        for i, lead in enumerate(draft.leads[:kept + 1]):
            kind = bisect_right(LEADS, lead)
            self.seen[kind] += 1
            self.kept[kind] += i < kept
        for kind, belief in enumerate(BELIEF):           # so a class that nothing is drafted in any more comes back
            self.seen[kind] += FORGET * (BELIEF_WEIGHT - self.seen[kind])
            self.kept[kind] += FORGET * (BELIEF_WEIGHT * belief - self.kept[kind])


def cost_share(config: Any, depth: int) -> float:
    """Cost of a token in the first `depth` stages relative to all of them, by the matrices and heads it reads."""
    d, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
    layer = 2 * d * d + 2 * d * kv + 2 * d * config.intermediate_size
    costs = [(last + 1) * layer + (k + 1 if config.stage_heads else 1) * config.vocab_size * d
             for k, last in enumerate(config.stage_boundaries)]
    return costs[depth - 1] / costs[-1]


def speculate(decoder: Decoder, texts: Texts, drafts: int | None, prefix: int, sampling: Sampling) -> dict[str, Any]:
    """Write all rows to their end: the first `prefix` stages draft, all stages verify in one chunk. The statistics.

    A round of a row has `drafts` drafts; None: as long as it pays. Verification runs the later stages only.
    """
    K, rounds, accepted, drafted = decoder.stages, 0, 0, 0
    paces = [Pace(drafts, cost_share(decoder.model.config, prefix)) for _ in texts.left]
    while texts.live:
        rows = list(texts.live)
        found = {row: Draft(min(paces[row].most, texts.left[row] - 1)) for row in rows}
        _draft(decoder, texts, prefix, sampling, found, paces)
        counts = [len(found[row].totals) for row in rows]
        total = torch.stack([t for row in rows for t in found[row].totals])
        for k in range(prefix, K):
            decoder.run(k, rows)
            total = total + decoder.logits(k, rows, counts)
        for row, probs in zip(rows, sampling.probabilities(total / K).split(counts), strict=True):
            draft = found[row]
            kept, token = _verify(row, draft, probs, sampling)
            rounds, accepted, drafted = rounds + 1, accepted + kept, drafted + len(draft.tokens)
            paces[row].learn(draft, kept)
            decoder.cut(row, len(draft.tokens) - kept)
            for i, new in enumerate([*draft.tokens[:kept], token]):
                if not texts.push(row, new, prefix - 1 if i < kept else K - 1):
                    break
    return {"rounds": rounds, "accepted": accepted, "drafted": drafted, "acceptance": accepted / max(drafted, 1),
            "mean_accepted": accepted / rounds}


def _draft(decoder: Decoder, texts: Texts, prefix: int, sampling: Sampling, found: dict[int, Draft],
           paces: list[Pace]) -> None:
    """Fill the drafts: the first stages run over what is new in a row, then over each draft, the last one included."""
    rows = list(found)
    while rows:
        decoder.feed({row: found[row].tokens[-1:] or texts.fresh[row] for row in rows})
        total: Any = 0.0
        for k in range(prefix):
            decoder.run(k, rows)
            total = total + decoder.logits(k, rows)
        best = total.topk(2, dim=-1).values / prefix
        leads = (best[:, 0] - best[:, 1]).tolist()
        going = []
        for row, scores, q, lead in zip(rows, total, sampling.probabilities(total / prefix), leads, strict=True):
            found[row].totals.append(scores)
            if paces[row].goes_on(found[row], lead):
                going.append(row)
                found[row].tokens.append(sampling.draw(row, q))
                found[row].probs.append(q)
        rows = going


def _verify(row: int, draft: Draft, probs: Tensor, sampling: Sampling) -> tuple[int, int]:
    """(drafts kept, the token behind them), by the full model's probabilities (drafts + 1, V)."""
    for i, (token, q) in enumerate(zip(draft.tokens, draft.probs, strict=True)):
        kept, token = sampling.accept(row, probs[i], q, token)
        if not kept:
            return i, token
    return len(draft.tokens), sampling.draw(row, probs[-1])


__all__ = ["MOST_DRAFTS", "NO_STAGES", "Routed", "Wand", "adaptive", "speculate"]
