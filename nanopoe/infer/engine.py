"""Generation with a key/value cache, by any view of the model: the full pool, one stage, or a prefix (SPEC 3).

Only the stages a view needs are run. Prompts of one length share a batch; others are grouped by length. A row's
random numbers depend on (seed, row) alone, so its text does not change with what is generated beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanopoe.errors import ConfigError
from nanopoe.model import GPT, KVCache
from nanopoe.model.pool import View, aggregate


@dataclass(frozen=True)
class Sampling:
    """How a next token is drawn: temperature 0 is greedy; `top_k` keeps the so many most probable tokens."""

    temperature: float = 0.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature must be 0 or more, got {self.temperature}", do="0 is greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"top_k must be 1 or more, got {self.top_k}", do="null keeps all tokens")


class Engine:
    """Generates with `model` as `view` sees it. The model is not changed; several engines may share one."""

    def __init__(self, model: GPT, view: View | None = None):
        self.model, self.view = model, view or View()
        self.stages = self.view.stages(model.layout.n_stages, model.config.poe_mode)

    @torch.no_grad()
    def next_logps(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Feed ids (B, T) after what the cache holds; log-probabilities (B, V) fp32 of the token after the last."""
        states = self.model.boundary_states(ids, cache, stages=self.stages.stop)
        return aggregate(self.model.stage_logits(states[k][:, -1], k).log_softmax(-1) for k in self.stages)

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
                 stop: Collection[int] = ()) -> list[list[int]]:
        """Continuations of `prompts` (token ids, any lengths), each up to `max_new_tokens` or a stop token.

        The stop token itself is not part of the answer. ConfigError on an empty prompt or an id the model lacks.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for length in sorted({len(p) for p in prompts}):
            rows = [i for i, p in enumerate(prompts) if len(p) == length]
            group = [prompts[i] for i in rows]
            for tokens in self.stream(group, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, rows=rows):
                for i, token in zip(rows, tokens, strict=True):
                    if token is not None:
                        answers[i].append(token)
        return answers

    def stream(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
               stop: Collection[int] = (), rows: Sequence[int] | None = None) -> Iterator[list[int | None]]:
        """The tokens of each step as they come, one per prompt of *equal* length; None for a row that has stopped.

        `rows` are the numbers of the prompts for the random streams, 0, 1, .. by default. The trained context may be
        exceeded: every layer then sees at most its own window.
        """
        sampling = sampling or Sampling()
        ids = self._checked(prompts, max_new_tokens)
        draws = [_generator(sampling.seed, row, ids.device) for row in rows or range(len(prompts))]
        cache = KVCache(self.model, ids.size(0), ids.size(1) + max_new_tokens)
        live = [True] * ids.size(0)
        for _ in range(max_new_tokens):
            ids = draw(self.next_logps(ids, cache), sampling, draws)       # (B, 1)
            live = [on and token not in stop for on, token in zip(live, ids[:, 0].tolist(), strict=True)]
            if not any(live):
                return
            yield [token if on else None for on, token in zip(live, ids[:, 0].tolist(), strict=True)]

    def _checked(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> Tensor:
        """Prompts as (B, T) int64 on the model's device, or ConfigError."""
        vocab = self.model.config.vocab_size
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        if not prompts or not all(prompts):
            raise ConfigError("an empty prompt", do="begin it with the <|bos|> token")
        if len({len(p) for p in prompts}) > 1:
            raise ConfigError("prompts of different lengths in one stream", do="use generate, which groups them")
        for i, prompt in enumerate(prompts):
            if not all(0 <= token < vocab for token in prompt):
                raise ConfigError(f"a token id outside 0..{vocab - 1}", f"prompt {i}", "use the model's own tokenizer")
        return torch.tensor(prompts, dtype=torch.int64, device=next(self.model.parameters()).device)


def draw(logps: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row of log-probabilities (B, V) -> (B, 1); row b uses generators[b], unless greedy."""
    if sampling.temperature == 0:
        return logps.argmax(-1, keepdim=True)
    scores = logps / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.size(-1):
        kept = scores.topk(sampling.top_k, dim=-1)
        scores = torch.full_like(scores, float("-inf")).scatter(-1, kept.indices, kept.values)
    probs = scores.softmax(-1)
    return torch.stack([torch.multinomial(p, 1, generator=g) for p, g in zip(probs, generators, strict=True)])


def _generator(seed: int, row: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed((seed * 1_000_003 + row) % 2**63)
