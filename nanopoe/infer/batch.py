"""The texts that are being written: what each has, may still get and ends with."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nanopoe.infer.constrain import Row
from nanopoe.infer.sampling import Sampling, draw, generator_of


class Emitted(NamedTuple):
    """A new token of a row, and the stage that decided it: the last one whose expert was asked."""

    row: int
    token: int
    stage: int


class Batch:
    """Rows 0..R-1 with their prompts. `live` are those that still want tokens; `left` counts how many at most; `ends`
    has the stop token of each row that met one. `bound` are the rows whose calls are constrained."""

    def __init__(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling,
                 stop: Collection[int], device: torch.device, bound: Mapping[int, Row] | None = None):
        self.texts = [list(p) for p in prompts]
        self.left = [max_new_tokens] * len(prompts)
        self.live = list(range(len(prompts)))
        self.ends: list[int | None] = [None] * len(prompts)
        self.sampling, self.stop, self.bound = sampling, stop, bound or {}
        self.generators = [] if sampling.greedy else [generator_of(sampling.seed, row, device)
                                                      for row in range(len(prompts))]

    def push(self, row: int, token: int, stage: int) -> Emitted | None:
        """Append a token to a live row, or end the row with its stop token, which is not part of the answer."""
        if token in self.stop:
            self.live.remove(row)
            self.ends[row] = token
            return None
        self.texts[row].append(token)
        self.left[row] -= 1
        if self.left[row] == 0:
            self.live.remove(row)
        return Emitted(row, token, stage)

    def choose(self, scores: Tensor, rows: Sequence[int]) -> list[int]:
        """The next token of each of `rows` by pooled scores (N, V), log-probabilities up to a constant per row."""
        if not self.bound:
            return self._chosen(scores, rows)
        for n, row in enumerate(rows):
            allowed = self.bound[row].allowed(self.left[row]) if row in self.bound else None
            if allowed is not None:
                scores[n].masked_fill_(~allowed.to(scores.device), float("-inf"))
        return [self.bound[row].take(token, self.left[row]) if row in self.bound else token
                for row, token in zip(rows, self._chosen(scores, rows), strict=True)]

    def _chosen(self, scores: Tensor, rows: Sequence[int]) -> list[int]:
        if self.sampling.plain:
            return scores.argmax(-1).tolist()
        chosen = draw(scores.log_softmax(-1), self.sampling, [self.generators[r] for r in rows] if self.generators
                      else [], [self.texts[r] for r in rows])
        return chosen[:, 0].tolist()
