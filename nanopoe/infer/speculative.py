"""Self-speculative decoding: a prefix drafts, the whole pool verifies (SPEC 5; arXiv 2211.17192 for the sampling).

The drafter's states are the states of the first stages, so verification runs only the stages above, on all drafts in
one chunk. Greedy output is that of the full model; sampled output has its distribution.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """The first `prefix` stages draft `drafts` tokens a round, or, if None, as many as have lately been accepted."""

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

    def first(self) -> int:
        return self.drafts or 4

    def next(self, drafts: int, drafted: int, accepted: int) -> int:
        """Drafts of a row's next round; one more when all were accepted, else about as many as were."""
        if self.drafts is not None or drafted == 0:
            return drafts
        return min(drafts + 1, MOST_DRAFTS) if accepted == drafted else max(1, (drafts + accepted) // 2)


@dataclass
class Draft:
    """A row's round: drafted tokens, the sums of the drafter's experts at each, and (sampling) their distributions."""

    wanted: int
    tokens: list[int]
    totals: list[Tensor]         # wanted + 1 of (V,): sum of the drafter's z_k before each draft and behind the last
    probs: list[Tensor]


def speculate(decoder: Decoder, batch: Batch, mode: Speculative, gain: float,
              stats: SpeculativeStats) -> Iterator[Emitted]:
    """Write all rows to their end, in rounds of drafts; every row at its own pace. `gain` is K^alpha of the pool."""
    w, n = decoder.weights, mode.prefix
    feed = {row: list(text) for row, text in enumerate(batch.texts)}
    sizes = {row: mode.first() for row in feed}
    while batch.live:
        rows = list(batch.live)
        drafts = {row: Draft(min(sizes[row], batch.left[row] - 1), [], [], []) for row in rows}
        _draft(decoder, batch, n, feed, drafts, gain)
        counts = [drafts[row].wanted + 1 for row in rows]
        states = [decoder.run(k, rows).last(counts) for k in range(n, w.n_stages)]
        partial = torch.stack([total for row in rows for total in drafts[row].totals])
        total = sum(w.logits(range(n, w.n_stages), states), partial)
        verdicts = _verify_plain(total, rows, drafts) if batch.sampling.plain else \
            _verify(batch, total * (gain / w.n_stages), rows, drafts)
        for row, (accepted, token) in zip(rows, list(verdicts), strict=True):
            draft = drafts[row]
            stats.rounds += 1
            stats.accepted += accepted
            stats.drafted += draft.wanted
            sizes[row] = mode.next(sizes[row], draft.wanted, accepted)
            feed[row] = [token]
            if accepted < draft.wanted:
                decoder.cut(row, len(decoder.tokens[row]) - (draft.wanted - accepted))
            for i, new in enumerate([*draft.tokens[:accepted], token]):
                emitted = batch.push(row, new, n - 1 if i < accepted else w.n_stages - 1)
                if emitted is None:
                    break
                yield emitted


def _draft(decoder: Decoder, batch: Batch, n: int, feed: dict[int, list[int]], drafts: dict[int, Draft],
           gain: float) -> None:
    """Fill `drafts`: stages 0..n-1 run over what is to be fed, then over each draft, the last one included."""
    w = decoder.weights
    for i in range(max(d.wanted for d in drafts.values()) + 1):
        rows = [row for row, d in drafts.items() if d.wanted >= i]
        decoder.feed({row: drafts[row].tokens[-1:] or feed[row] for row in rows})
        states = [last_states(decoder.run(k, rows), len(rows)) for k in range(n)]
        logits = w.logits(range(n), states)
        total = sum(logits[1:], logits[0])
        for row, part in zip(rows, total, strict=True):
            drafts[row].totals.append(part)
        going = [j for j, row in enumerate(rows) if drafts[row].wanted > i]
        if not going:
            return
        if len(going) < len(rows):
            rows, total = [rows[j] for j in going], total[torch.tensor(going, device=total.device)]
        if batch.sampling.plain:
            for row, token in zip(rows, total.argmax(-1).tolist(), strict=True):
                drafts[row].tokens.append(token)
            continue
        probs = _distributions(batch, total * (gain / n), [[*batch.texts[row], *drafts[row].tokens] for row in rows])
        for row, q in zip(rows, probs, strict=True):
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

    `scores` (sum of wanted + 1, V): of each row the pool before each of its drafts and behind the last.
    """
    best, at = scores.argmax(-1).tolist(), 0
    for row in rows:
        tokens = drafts[row].tokens
        accepted = next((i for i, token in enumerate(tokens) if token != best[at + i]), len(tokens))
        yield accepted, best[at + accepted]
        at += len(tokens) + 1


def _verify(batch: Batch, scores: Tensor, rows: Sequence[int], drafts: dict[int, Draft]) -> Iterator[tuple[int, int]]:
    """The same for a penalty and for sampling."""
    texts = [[*batch.texts[row], *drafts[row].tokens[:i]] for row in rows for i in range(drafts[row].wanted + 1)]
    parts = _distributions(batch, scores, texts).split([drafts[row].wanted + 1 for row in rows])
    for row, probs in zip(rows, parts, strict=True):
        draft = drafts[row]
        generator = None if batch.sampling.greedy else batch.generators[row]
        for i, (token, q) in enumerate(zip(draft.tokens, draft.probs, strict=True)):
            kept, other = accept(probs[i], q, token, generator)
            if not kept:
                yield i, other
                break
        else:
            yield draft.wanted, _pick(batch, row, probs[-1])


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
