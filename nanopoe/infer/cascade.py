"""Rows that different experts answer, over one pass of what they share; and the choice of an expert by the prompt.

The base runs once for all rows; a row goes on only through the specialists that it asks (Decoder.keep).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanopoe.config.layout import CHUNK_ELEMENTS
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError
from nanopoe.infer.batch import Batch, Emitted
from nanopoe.infer.decoder import Chunk, Decoder
from nanopoe.infer.depth import last_states
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.views import Experts
from nanopoe.infer.weights import Weights

States = dict[int, tuple[list[int], Tensor]]     # stage -> rows, and their states (R, D)


def scores(decoder: Decoder, experts: Mapping[int, Experts], alpha: float = 0.0) -> Tensor:
    """What was fed to the rows of `experts` (rising) goes through; pooled scores (R, V) fp32 of the next token of
    each, in their order."""
    asked = {k for own in set(experts.values()) for k in own.way}
    states: States = {}
    for k in sorted(asked):
        rows = [row for row, own in experts.items() if k in own.way]
        states[k] = rows, last_states(decoder.run(k, rows), len(rows))
    return pooled(decoder.weights, states, experts, alpha)


def pooled(weights: Weights, states: States, experts: Mapping[int, Experts], alpha: float) -> Tensor:
    """Scores (R, V) of the rows of `experts`, each by its own, given the states of the stages that they ask."""
    groups: dict[Experts, list[int]] = {}
    for row, own in experts.items():
        groups.setdefault(own, []).append(row)
    parts = [own.pool(weights.logits(own.stages, [_of_rows(states[k], rows) for k in own.stages]), own.gain(alpha))
             for own, rows in groups.items()]
    if len(parts) == 1:
        return parts[0]
    order = [row for rows in groups.values() for row in rows]
    return torch.cat(parts)[torch.tensor([order.index(row) for row in experts], device=parts[0].device)]


def _of_rows(states: tuple[list[int], Tensor], rows: list[int]) -> Tensor:
    held, x = states
    return x if held == rows else x[torch.tensor([held.index(row) for row in rows], device=x.device)]


def write(decoder: Decoder, batch: Batch, experts: Mapping[int, Experts], alpha: float,
          first: Tensor | None = None) -> Iterator[Emitted]:
    """Write all rows to their end, each by its own experts. `first` are the scores (R, V) of their first new tokens, if
    the prompts have gone through already."""
    feed = dict(enumerate(batch.texts))
    for row, own in experts.items():
        if own.way != decoder.stages:
            decoder.keep(row, own.way)
    while batch.live:
        rows = list(batch.live)
        if first is None:
            decoder.feed({row: feed[row] for row in rows})
            first = scores(decoder, {row: experts[row] for row in rows}, alpha)
        for row, token in zip(rows, batch.choose(first, rows), strict=True):
            feed[row] = [token]
            emitted = batch.push(row, token, experts[row].stages[-1])
            if emitted is not None:
                yield emitted
        first = None


# -- route: prompt ----------------------------------------------------------------------------------------------------

@dataclass
class RouteStats:
    """Of each row who answered it, and the perplexity that its prompt has for each."""

    chosen: list[str] = field(default_factory=list)
    perplexity: list[dict[str, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {"chosen": self.chosen, "perplexity": self.perplexity}


@dataclass(frozen=True)
class Route:
    """Each prompt is answered by that one of the base and the specialists for whom it has the lowest perplexity.

    It is of all the prompt's tokens but the first, control tokens like any other, by each expert alone as it would
    answer, from one pass over the prompt. Of equals the earlier one answers, the base before all.

    So it asks whose text the prompt looks like, which is cheap and needs no training, and no more than that. It does
    not ask who answers better. A specialist whose loss was on answers alone has never learned to predict a question,
    and wins by the form of the prompt (its turns, its list of functions) rather than by its subject; a short prompt
    says little, and nothing says that none of them is any good.
    """

    def check(self, config: ModelConfig, n_stages: int, sampling: Sampling, alpha: float) -> None:
        if not config.specialists:
            raise ConfigError("the model has no specialists to choose from", "route", "load some with it")

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        for i, prompt in enumerate(prompts):
            if len(prompt) < 2:
                raise ConfigError("of one token, which says nothing about who should answer", f"route: prompt {i}",
                                  "give a longer one, or choose the specialist")


def write_routed(decoder: Decoder, batch: Batch, candidates: Mapping[str, Experts], alpha: float,
                 stats: RouteStats) -> Iterator[Emitted]:
    """Write all rows to their end, each by the one of `candidates` that its prompt chooses (Route)."""
    decoder.feed(dict(enumerate(batch.texts)))
    chunks = {k: decoder.run(k) for k in decoder.stages}
    nats = torch.stack([prompt_nats(decoder.weights, chunks, own, len(batch.texts), alpha)
                        for own in candidates.values()])                                # (candidates, R)
    names = list(candidates)
    stats.chosen += [names[i] for i in nats.argmin(0).tolist()]
    stats.perplexity += [dict(zip(names, row, strict=True)) for row in nats.exp().T.tolist()]
    experts = {row: candidates[name] for row, name in enumerate(stats.chosen)}
    rows = list(experts)
    states = {k: (rows, last_states(chunk, len(rows))) for k, chunk in chunks.items()}
    yield from write(decoder, batch, experts, alpha, pooled(decoder.weights, states, experts, alpha))


def prompt_nats(weights: Weights, chunks: Mapping[int, Chunk], own: Experts, rows: int, alpha: float) -> Tensor:
    """Mean negative log-likelihood (R,), fp64, that one expert gives the tokens of each prompt after its first.

    `chunks` are the prompts behind each stage that it asks, whole.
    """
    chunk = chunks[own.stages[0]]
    of_row = torch.tensor(chunk.rows, device=chunk.ids.device)
    scored = (of_row[1:] == of_row[:-1]).nonzero().squeeze(1)             # tokens with one behind them in their row
    total = torch.zeros(rows, dtype=torch.float64, device=chunk.ids.device)
    for at in scored.split(max(1, CHUNK_ELEMENTS // weights.config.vocab_size)):
        logps = own.pool(weights.logits(own.stages, [chunks[k].x[at] for k in own.stages]),
                         own.gain(alpha)).log_softmax(-1)
        total.index_add_(0, of_row[at], -logps.gather(1, chunk.ids[at + 1, None]).squeeze(1).double())
    return total / torch.bincount(of_row[scored], minlength=rows)
