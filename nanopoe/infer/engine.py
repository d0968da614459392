"""Generation with a cache: by any view of the model, or in a mode that only a PoE model has (SPEC 3 to 6).

Prompts of any lengths share a batch. Only the stages that are needed run. A row's random numbers depend on
(seed, row) alone, and nothing of a row on the others but rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanopoe.errors import ConfigError
from nanopoe.infer.batch import Batch, Emitted
from nanopoe.infer.decoder import Decoder
from nanopoe.infer.depth import DepthStats, Routed, Wand, adaptive, last_states
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import MOST_DRAFTS, Speculative, SpeculativeStats, speculate
from nanopoe.infer.views import Composition, experts_of
from nanopoe.infer.weights import Weights
from nanopoe.model import GPT
from nanopoe.model.pool import View

Mode = Wand | Routed | Speculative


@dataclass(frozen=True)
class Generation:
    """Tokens as they come: iterate once. `stats` is complete at the end; None for a plain view."""

    tokens: Iterator[Emitted]
    stats: DepthStats | SpeculativeStats | None

    def __iter__(self) -> Iterator[Emitted]:
        return self.tokens


class Engine:
    """Generates with a model as `view` sees it. `alpha` sharpens a pool of K' experts by K'^alpha (SPEC 3).

    Makes its own copy of what it must convert or fuse (weights.py); `seen_as` shares that copy. Later updates of the
    model do not reach it.
    """

    def __init__(self, model: GPT | Weights, view: View | Composition | None = None, *, alpha: float = 0.0,
                 dtype: torch.dtype | None = None):
        self.weights = model if isinstance(model, Weights) else Weights(model, dtype)
        self.view, self.alpha = view or View(), alpha
        self.experts = experts_of(self.view, self.weights.config, self.weights.n_stages)
        if not 0 <= alpha <= 4:
            raise ConfigError(f"alpha must be 0 to 4, got {alpha}", do="0 is the geometric mean, 1 the sum")
        self.gain = float(len(self.experts.stages)) ** alpha

    def seen_as(self, view: View | Composition) -> Engine:
        """The same weights by another view."""
        return Engine(self.weights, view, alpha=self.alpha)

    # -- one token ----------------------------------------------------------------------------------------------------

    def decoder(self, rows: int, capacity: int, rollback: int = 0) -> Decoder:
        return Decoder(self.weights, rows, capacity, self.experts.depth, rollback)

    def _scores(self, decoder: Decoder, rows: int) -> Tensor:
        """What was fed to `rows` rows goes through; pooled scores (R, V) fp32 of the next token of each."""
        stages, states = self.experts.stages, []
        for k in range(self.experts.depth):
            chunk = decoder.run(k)
            if k in stages:
                states.append(last_states(chunk, rows))
        logits = self.weights.logits(stages, states)
        return self.experts.pool(logits, self.gain)

    @torch.no_grad()
    def next_logps(self, ids: Tensor, decoder: Decoder | None = None) -> Tensor:
        """Feed ids (B, T) after what rows 0..B-1 of `decoder` hold; log-probabilities (B, V) fp32 of the next token."""
        decoder = decoder or self.decoder(ids.size(0), ids.size(1))
        decoder.feed(dict(enumerate(ids.tolist())))
        return self._scores(decoder, ids.size(0)).log_softmax(-1)

    # -- texts --------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
                 stop: Collection[int] = (), mode: Mode | None = None) -> list[list[int]]:
        """Continuations of `prompts` (token ids, any lengths), each up to `max_new_tokens` or a stop token.

        The stop token itself is not part of the answer. Errors as of `stream`.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for row, token, _ in self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop,
                                         mode=mode):
            answers[row].append(token)
        return answers

    def stream(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
               stop: Collection[int] = (), mode: Mode | None = None) -> Generation:
        """The tokens of all rows as they come. `mode`: None is plain decoding by this engine's view.

        ConfigError on an empty prompt, an id the model lacks, or a mode that the model, the view or the sampling does
        not go with. The trained context may be exceeded: every layer then sees at most its own window.
        """
        sampling, w = sampling or Sampling(), self.weights
        self._check(prompts, max_new_tokens)
        batch = Batch(prompts, max_new_tokens, sampling, stop, w.device)
        capacity = max(map(len, prompts)) + max_new_tokens
        if mode is None:
            return Generation(_without_grad(self._plain(self.decoder(len(prompts), capacity), batch)), None)
        if self.view != View() and w.config.poe_mode != "none":
            raise ConfigError(f"a mode needs the whole pool, not {self.view}", type(mode).__name__.lower(),
                              "use the full view")
        mode.check(w.config, w.n_stages, sampling, self.alpha)
        if isinstance(mode, Speculative):
            stats, most = SpeculativeStats(), mode.drafts or MOST_DRAFTS
            decoder = self.decoder(len(prompts), capacity, rollback=most)
            return Generation(_without_grad(speculate(decoder, batch, mode, self.gain, stats)), stats)
        depth = DepthStats([0] * w.n_stages)
        return Generation(_without_grad(adaptive(self.decoder(len(prompts), capacity), batch, mode, depth)), depth)

    def _plain(self, decoder: Decoder, batch: Batch) -> Iterator[Emitted]:
        feed = dict(enumerate(batch.texts))
        stage = self.experts.stages[-1]
        while batch.live:
            rows = list(batch.live)
            decoder.feed({row: feed[row] for row in rows})
            for row, token in zip(rows, batch.choose(self._scores(decoder, len(rows)), rows), strict=True):
                feed[row] = [token]
                emitted = batch.push(row, token, stage)
                if emitted is not None:
                    yield emitted

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        config = self.weights.config
        if max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        if not prompts or not all(prompts):
            raise ConfigError("an empty prompt", do="begin it with the <|bos|> token")
        for i, prompt in enumerate(prompts):
            if not all(0 <= token < config.vocab_size for token in prompt):
                raise ConfigError(f"a token id outside 0..{config.vocab_size - 1}", f"prompt {i}",
                                  "use the model's own tokenizer")


def _without_grad(tokens: Iterator[Any]) -> Iterator[Any]:
    """A generator keeps no `torch.no_grad()` open while its consumer runs; each step gets its own."""
    while True:
        with torch.no_grad():
            try:
                token = next(tokens)
            except StopIteration:
                return
        yield token
