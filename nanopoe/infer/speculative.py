"""Self-speculative decoding: a prefix drafts, the whole pool verifies (SPEC 5; arXiv 2211.17192 for the sampling).

The drafter's states are the states of the first stages, so verification runs only the stages above, on all drafts in
one chunk. Greedy output is that of the full model; sampled output has its distribution.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError
from nanopoe.infer.batch import Batch, Emitted
from nanopoe.infer.decoder import Decoder
from nanopoe.infer.depth import check_poe, last_states
from nanopoe.infer.sampling import Sampling, penalised, pick, probabilities

MOST_DRAFTS = 16


@dataclass
class SpeculativeStats:
    """A round drafts some tokens, keeps the `accepted` first ones and adds one of the full pool."""

    rounds: int = 0
    accepted: int = 0
    drafted: int = 0

    @property
    def acceptance(self) -> float:
        return self.accepted / max(self.drafted, 1)

    @property
    def mean_accepted(self) -> float:
        return self.accepted / max(self.rounds, 1)

    def as_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds, "accepted": self.accepted, "drafted": self.drafted,
                "acceptance": self.acceptance, "mean_accepted": self.mean_accepted}


def ideal_speedup(mean_accepted: float, drafts: float, share: float) -> float:
    """Tokens per round over the cost of a round, where a draft costs `share` of a token of the full model."""
    return (mean_accepted + 1) / (drafts * share + 1)


@dataclass(frozen=True)
class Speculative:
    """The first `prefix` stages draft `drafts` tokens a round, or, if None, as long as it pays (Pace)."""

    drafts: int | None = 4
    prefix: int = 1

    def check(self, config: ModelConfig, n_stages: int, sampling: Sampling, alpha: float) -> None:
        where = "speculative decoding"
        check_poe(config, where)
        if not 1 <= self.prefix < n_stages:
            raise ConfigError(f"a prefix of {self.prefix} stages cannot draft for {n_stages}", where,
                              f"use a prefix of 1 to {n_stages - 1}" if n_stages > 1 else "the model has one stage")
        if self.drafts is not None and not 1 <= self.drafts <= MOST_DRAFTS:
            raise ConfigError(f"drafts must be 1 to {MOST_DRAFTS}, got {self.drafts}", where)


@dataclass
class Draft:
    """A row's round of `most` drafts or fewer: tokens, the sums of the drafter's experts at each, and (sampling) their
    distributions; for Pace the drafter's lead before each and the chance that all up to it are accepted."""

    most: int
    tokens: list[int] = field(default_factory=list)
    totals: list[Tensor] = field(default_factory=list)   # one more (V,): sum of z_k before each draft, behind the last
    probs: list[Tensor] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)
    chances: list[float] = field(default_factory=list)


LEADS = (0.1, 0.2, 0.4, 0.8, 1.6)                        # nats; edges of the classes
BELIEF = (0.6, 0.75, 0.88, 0.96, 0.99, 0.998)            # accepted in each class before any round: seen on small models
BELIEF_WEIGHT = 4.0                                      # drafts that it counts as
FORGET = 0.02                                            # of what a row has learned, each round


class Pace:
    """When a row's drafter stops: before the draft that would cost more than it brings.

    A draft costs `share` of a token of the full model and brings a token if it and all before it are accepted. The
    chance of that is learned from the row's own rounds, by the drafter's lead (top-1 margin in nats) before the draft:
    where it hesitates, it is corrected. Drafting goes on while the chance of one more, for its cost, is above the
    tokens expected of the round so far for theirs. It looks at distributions, never at what was drawn from them, so a
    sampled text keeps its distribution. Of our own making; the literature stops at a fixed confidence.
    """

    def __init__(self, mode: Speculative, share: float):
        self.fixed, self.share = mode.drafts, share
        self.seen = [BELIEF_WEIGHT] * len(BELIEF)
        self.kept = [BELIEF_WEIGHT * p for p in BELIEF]

    @property
    def most(self) -> int:
        return self.fixed or MOST_DRAFTS

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

    def learn(self, draft: Draft, accepted: int) -> None:
        """The first so many drafts were accepted; the one after them was not, and those behind it say nothing."""
        for i, lead in enumerate(draft.leads[:accepted + 1]):
            kind = bisect_right(LEADS, lead)
            self.seen[kind] += 1
            self.kept[kind] += i < accepted
        for kind, belief in enumerate(BELIEF):           # so a class that nothing is drafted in any more comes back
            self.seen[kind] += FORGET * (BELIEF_WEIGHT - self.seen[kind])
            self.kept[kind] += FORGET * (BELIEF_WEIGHT * belief - self.kept[kind])


def speculate(decoder: Decoder, batch: Batch, mode: Speculative, gain: float,
              stats: SpeculativeStats) -> Iterator[Emitted]:
    """Write all rows to their end, in rounds of drafts; every row at its own pace. `gain` is K^alpha of the pool."""
    w, n = decoder.weights, mode.prefix
    feed = {row: list(text) for row, text in enumerate(batch.texts)}
    paces = {row: Pace(mode, w.share(n)) for row in feed}
    while batch.live:
        rows = list(batch.live)
        drafts = {row: Draft(min(paces[row].most, batch.left[row] - 1)) for row in rows}
        _draft(decoder, batch, n, feed, drafts, paces, gain)
        counts = [len(drafts[row].totals) for row in rows]
        states = [decoder.run(k, rows).last(counts) for k in range(n, w.n_stages)]
        partial = torch.stack([total for row in rows for total in drafts[row].totals])
        total = sum(w.logits(range(n, w.n_stages), states), partial)
        verdicts = _verify_plain(total, rows, drafts) if batch.sampling.plain else \
            _verify(batch, total * (gain / w.n_stages), rows, drafts)
        for row, (accepted, token) in zip(rows, list(verdicts), strict=True):
            draft = drafts[row]
            stats.rounds += 1
            stats.accepted += accepted
            stats.drafted += len(draft.tokens)
            paces[row].learn(draft, accepted)
            feed[row] = [token]
            if accepted < len(draft.tokens):
                decoder.cut(row, len(decoder.tokens[row]) - (len(draft.tokens) - accepted))
            for i, new in enumerate([*draft.tokens[:accepted], token]):
                emitted = batch.push(row, new, n - 1 if i < accepted else w.n_stages - 1)
                if emitted is None:
                    break
                yield emitted


def _draft(decoder: Decoder, batch: Batch, n: int, feed: dict[int, list[int]], drafts: dict[int, Draft],
           paces: dict[int, Pace], gain: float) -> None:
    """Fill `drafts`: stages 0..n-1 run over what is to be fed, then over each draft, the last one included."""
    w, rows = decoder.weights, list(drafts)
    while rows:
        decoder.feed({row: drafts[row].tokens[-1:] or feed[row] for row in rows})
        states = [last_states(decoder.run(k, rows), len(rows)) for k in range(n)]
        logits = w.logits(range(n), states)
        total = sum(logits[1:], logits[0])
        for row, part in zip(rows, total, strict=True):
            drafts[row].totals.append(part)
        best = total.topk(2, dim=-1)
        leads = ((best.values[:, 0] - best.values[:, 1]) / n).tolist()
        going = [j for j, row in enumerate(rows) if paces[row].goes_on(drafts[row], leads[j])]
        if len(going) < len(rows):
            rows, at = [rows[j] for j in going], torch.tensor(going, dtype=torch.int64, device=total.device)
            total, best_tokens = total[at], best.indices[at, 0]
        else:
            best_tokens = best.indices[:, 0]
        if batch.sampling.plain:
            for row, token in zip(rows, best_tokens.tolist(), strict=True):
                drafts[row].tokens.append(token)
        elif rows:
            texts = [[*batch.texts[row], *drafts[row].tokens] for row in rows]
            for row, q in zip(rows, _distributions(batch, total * (gain / n), texts), strict=True):
                drafts[row].tokens.append(_pick(batch, row, q))
                drafts[row].probs.append(q)


def _distributions(batch: Batch, scores: Tensor, texts: Sequence[Sequence[int]]) -> Tensor:
    """Pooled scores (N, V) after `texts` -> probabilities (N, V) that tokens are drawn with; greedy: all on one."""
    sampling = batch.sampling
    logps = penalised(scores.log_softmax(-1), sampling.repetition_penalty, texts)
    if sampling.greedy:
        return torch.zeros_like(logps).scatter_(-1, logps.argmax(-1, keepdim=True), 1.0)
    return probabilities(logps, sampling)


def _pick(batch: Batch, row: int, probs: Tensor) -> int:
    return int(probs.argmax() if batch.sampling.greedy else pick(probs, batch.generators[row]))


def _verify_plain(scores: Tensor, rows: Sequence[int], drafts: dict[int, Draft]) -> Iterator[tuple[int, int]]:
    """Greedy: (accepted, next token) of each row, drafts kept as long as they are what the pool says.

    `scores` (sum of drafts + 1, V): of each row the pool before each of its drafts and behind the last.
    """
    best, at = scores.argmax(-1).tolist(), 0
    for row in rows:
        tokens = drafts[row].tokens
        accepted = next((i for i, token in enumerate(tokens) if token != best[at + i]), len(tokens))
        yield accepted, best[at + accepted]
        at += len(tokens) + 1


def _verify(batch: Batch, scores: Tensor, rows: Sequence[int], drafts: dict[int, Draft]) -> Iterator[tuple[int, int]]:
    """The same for a penalty and for sampling."""
    texts = [[*batch.texts[row], *drafts[row].tokens[:i]] for row in rows for i in range(len(drafts[row].totals))]
    parts = _distributions(batch, scores, texts).split([len(drafts[row].totals) for row in rows])
    for row, probs in zip(rows, parts, strict=True):
        draft = drafts[row]
        generator = None if batch.sampling.greedy else batch.generators[row]
        for i, (token, q) in enumerate(zip(draft.tokens, draft.probs, strict=True)):
            kept, other = accept(probs[i], q, token, generator)
            if not kept:
                yield i, other
                break
        else:
            yield len(draft.tokens), _pick(batch, row, probs[-1])


def accept(p: Tensor, q: Tensor, token: int, generator: torch.Generator | None) -> tuple[bool, int]:
    """Keep `token`, drawn from q (V,), with probability min(1, p/q), else draw from (p - q)+. (kept, token).

    What comes out has the distribution p. Without a generator both are greedy: all probability on one token.
    """
    u = 0.0 if generator is None else float(torch.rand((), generator=generator, device=p.device))
    if u < float(p[token] / q[token]):
        return True, token
    rest = (p - q).clamp_min(0)
    if generator is None:
        return False, int(p.argmax())
    return False, int(pick(rest if rest.sum() > 0 else p, generator))       # p = q but for rounding
