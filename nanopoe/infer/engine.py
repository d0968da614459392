"""Generation with a cache: by any view of the model, or in a mode that only a PoE model has (SPEC 3 to 6), or by the
specialist that the prompt chooses (Route).

Prompts of any lengths share a batch, and rows may each have a view of their own: the base runs once for all of them.
Only the stages that are needed run. A row's random numbers depend on (seed, row) alone, and nothing of a row on the
others but rounding.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanopoe.errors import ConfigError
from nanopoe.infer.batch import Batch, Emitted
from nanopoe.infer.cascade import Route, RouteStats, scores, write, write_routed
from nanopoe.infer.constrain import CallConstraint, CallStats, Row
from nanopoe.infer.decoder import Decoder
from nanopoe.infer.depth import DepthStats, Routed, Wand, adaptive
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import MOST_DRAFTS, Speculative, SpeculativeStats, speculate
from nanopoe.infer.views import Composition, Experts, candidates_of, experts_of
from nanopoe.infer.weights import Weights
from nanopoe.model import GPT
from nanopoe.model.pool import View

Mode = Wand | Routed | Speculative | Route


@dataclass(frozen=True)
class Generation:
    """Tokens as they come: iterate once. Complete at the end: `stats`, None for a plain view; `ends`, the stop token of
    each row, None where the budget ended first; `calls`, None without a constraint."""

    tokens: Iterator[Emitted]
    stats: DepthStats | SpeculativeStats | RouteStats | None
    ends: list[int | None]
    calls: CallStats | None = None

    def __iter__(self) -> Iterator[Emitted]:
        return self.tokens


class Engine:
    """Generates with a model as `view` sees it (None: the pool of all stages, or the last specialist if it has some).
    `alpha` sharpens a pool of K' stages by K'^alpha (SPEC 3).

    Makes its own copy of what it must convert or fuse (weights.py); `seen_as` shares that copy. Later updates of the
    model do not reach it.
    """

    def __init__(self, model: GPT | Weights, view: View | Composition | None = None, *, alpha: float = 0.0,
                 dtype: torch.dtype | None = None):
        self.weights = model if isinstance(model, Weights) else Weights(model, dtype)
        self.view, self.alpha = view or View(), alpha
        self.experts = experts_of(self.view, self.weights)
        if not 0 <= alpha <= 4:
            raise ConfigError(f"alpha must be 0 to 4, got {alpha}", do="0 is the geometric mean, 1 the sum")

    def seen_as(self, view: View | Composition) -> Engine:
        """The same weights by another view."""
        return Engine(self.weights, view, alpha=self.alpha)

    # -- one token ----------------------------------------------------------------------------------------------------

    def decoder(self, rows: int, capacity: int, rollback: int = 0) -> Decoder:
        return Decoder(self.weights, rows, capacity, self.experts.stages, rollback)

    def _scores(self, decoder: Decoder, rows: int) -> Tensor:
        """What was fed to `rows` rows goes through; pooled scores (R, V) fp32 of the next token of each."""
        return scores(decoder, dict.fromkeys(range(rows), self.experts), self.alpha)

    @torch.no_grad()
    def next_logps(self, ids: Tensor, decoder: Decoder | None = None) -> Tensor:
        """Feed ids (B, T) after what rows 0..B-1 of `decoder` hold; log-probabilities (B, V) fp32 of the next token."""
        decoder = decoder or self.decoder(ids.size(0), ids.size(1))
        decoder.feed(dict(enumerate(ids.tolist())))
        return self._scores(decoder, ids.size(0)).log_softmax(-1)

    # -- texts --------------------------------------------------------------------------------------------------------

    def generate(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
                 stop: Collection[int] = (), mode: Mode | None = None,
                 views: Sequence[View | Composition] | None = None,
                 constraint: Sequence[CallConstraint | None] | None = None) -> list[list[int]]:
        """Continuations of `prompts` (token ids, any lengths), each up to `max_new_tokens` or a stop token.

        The stop token itself is not part of the answer. Errors as of `stream`.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        for row, token, _ in self.stream(prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop,
                                         mode=mode, views=views, constraint=constraint):
            answers[row].append(token)
        return answers

    def stream(self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, sampling: Sampling | None = None,
               stop: Collection[int] = (), mode: Mode | None = None,
               views: Sequence[View | Composition] | None = None,
               constraint: Sequence[CallConstraint | None] | None = None) -> Generation:
        """The tokens of all rows as they come. `mode`: None is plain decoding by this engine's view.

        `views`: each row's own instead; without a mode only.
        `constraint`: what the calls of each row may be, None for a row without; plain decoding or Route only.
        ConfigError on an empty prompt, an id the model lacks, or a mode or constraint that the model, the view or the
        sampling does not go with. The trained context may be exceeded: every layer then sees at most its own window.
        """
        sampling, w = sampling or Sampling(), self.weights
        self._check(prompts, max_new_tokens)
        calls = CallStats()
        found = None if constraint is None else calls
        bound = {} if constraint is None else self._bound(prompts, constraint, mode, calls)
        batch = Batch(prompts, max_new_tokens, sampling, stop, w.device, bound)
        capacity = max(map(len, prompts)) + max_new_tokens
        if mode is None:
            experts = self._experts(len(prompts), views)
            decoder = Decoder(w, len(prompts), capacity, {k for own in experts.values() for k in own.stages})
            return Generation(_without_grad(write(decoder, batch, experts, self.alpha)), None, batch.ends, found)
        self._check_mode(mode, prompts, sampling, views)
        if isinstance(mode, Route):
            routes, candidates = RouteStats(), candidates_of(w)
            tokens = write_routed(Decoder(w, len(prompts), capacity), batch, candidates, self.alpha, routes)
            return Generation(_without_grad(tokens), routes, batch.ends, found)
        if isinstance(mode, Speculative):
            stats, most, gain = SpeculativeStats(), mode.drafts or MOST_DRAFTS, self.experts.gain(self.alpha)
            decoder = self.decoder(len(prompts), capacity, rollback=most)
            return Generation(_without_grad(speculate(decoder, batch, mode, gain, stats)), stats, batch.ends)
        depth = DepthStats([0] * w.n_stages)
        return Generation(_without_grad(adaptive(self.decoder(len(prompts), capacity), batch, mode, depth)), depth,
                          batch.ends)

    def _experts(self, rows: int, views: Sequence[View | Composition] | None) -> dict[int, Experts]:
        if views is None:
            return dict.fromkeys(range(rows), self.experts)
        if len(views) != rows:
            raise ConfigError(f"{len(views)} views for {rows} prompts", "views", "give one for each")
        return {row: experts_of(view, self.weights) for row, view in enumerate(views)}

    def _check_mode(self, mode: Mode, prompts: Sequence[Sequence[int]], sampling: Sampling,
                    views: Sequence[View | Composition] | None) -> None:
        w, name = self.weights, type(mode).__name__.lower()
        mode.check(w.config, w.n_stages, sampling, self.alpha)
        if views is not None:
            raise ConfigError("a mode needs one view, not one for each row", name, "leave out the views")
        if isinstance(mode, Route):
            mode.check_prompts(prompts)
            if self.view != View():
                raise ConfigError(f"a route chooses who answers, not {self.view}", name, "leave out the view")
        elif self.experts != experts_of(View("base"), w):
            raise ConfigError(f"a mode needs the whole pool of the base, not {self.view}", name,
                              "use the base view" if w.names else "use the full view")

    def _bound(self, prompts: Sequence[Sequence[int]], constraint: Sequence[CallConstraint | None], mode: Mode | None,
               calls: CallStats) -> dict[int, Row]:
        if mode is not None and not isinstance(mode, Route):
            raise ConfigError("a constraint needs plain decoding", type(mode).__name__.lower(), "leave out the mode")
        if len(constraint) != len(prompts):
            raise ConfigError(f"{len(constraint)} constraints for {len(prompts)} prompts", "constraint",
                              "give one for each, None for a row without")
        for one in constraint:
            if one is not None and one.vocab_size != self.weights.config.vocab_size:
                raise ConfigError(f"of a tokenizer of {one.vocab_size}, the model has {self.weights.config.vocab_size}",
                                  "constraint", "use the model's own tokenizer")
        return {row: Row(one, prompts[row], calls) for row, one in enumerate(constraint) if one is not None}

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
