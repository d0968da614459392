"""From log-probabilities to a token: repetition penalty, temperature, top-k, top-p, in this order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanopoe.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn. Temperature 0 is greedy.

    `top_k` keeps the so many most probable tokens, `top_p` the fewest that hold this share of the probability.
    `repetition_penalty` multiplies the log-probabilities of tokens that the text has already (arXiv 1909.05858; those
    are negative, so above 1 it makes them rarer). A row's random numbers depend on (seed, row) alone.
    """

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-4 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0, or 0.0001 or more, got {self.temperature}", do="0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, got {self.top_k}", do="leave it out to keep all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}",
                              do="leave it out to keep all tokens")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError(f"repetition_penalty must be above 0, got {self.repetition_penalty}",
                              do="1 is none")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Greedy without a penalty: nothing but the order of the scores counts."""
        return self.greedy and self.repetition_penalty == 1


def penalised(logps: Tensor, penalty: float, texts: Sequence[Iterable[int]]) -> Tensor:
    """logps (N, V) with those of row n's tokens texts[n] multiplied by `penalty`."""
    if penalty == 1:
        return logps
    logps = logps.clone()
    for row, text in zip(logps, texts, strict=True):
        seen = torch.tensor(sorted(set(text)), dtype=torch.int64, device=row.device)
        row[seen] *= penalty
    return logps


def probabilities(logps: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities (N, V), already penalised, to the probabilities tokens are drawn with; temperature > 0."""
    scores = logps / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.size(-1):
        kept = scores.topk(sampling.top_k, dim=-1)
        scores = torch.full_like(scores, float("-inf")).scatter(-1, kept.indices, kept.values)
    probs = scores.softmax(-1)
    if sampling.top_p is not None and sampling.top_p < 1:
        ordered, index = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered                        # probability of all that rank higher
        ordered = ordered.masked_fill(before >= sampling.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, index, ordered)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draw(logps: Tensor, sampling: Sampling, generators: Sequence[torch.Generator],
         texts: Sequence[Iterable[int]] = ()) -> Tensor:
    """One token per row of log-probabilities (B, V) -> (B, 1); row b uses generators[b], unless greedy.

    `texts` are the tokens of each row so far; only the repetition penalty reads them.
    """
    logps = penalised(logps, sampling.repetition_penalty, texts)
    if sampling.greedy:
        return logps.argmax(-1, keepdim=True)
    return torch.stack([pick(p, g) for p, g in zip(probabilities(logps, sampling), generators, strict=True)])


def pick(probs: Tensor, generator: torch.Generator) -> Tensor:
    """A token (1,) drawn from probabilities (V,)."""
    return torch.multinomial(probs, 1, generator=generator)


def generator_of(seed: int, row: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed((seed * 1_000_003 + row) % 2**63)
