"""Tokens through the stages of a nanopoe model, each row of a batch and each stage at its own pace.

A token may stop at any stage boundary. Its state waits there, and the first later token that goes deeper takes all
that waits along, in one chunk. So skipped work is put off, not left out: every key and value that is read is the one
the full model would have, and nothing is approximated.

Shape letters: R rows of a batch, T positions of a chunk, C positions in a buffer, D width, V vocabulary, K stages.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 256                              # positions by which buffers grow


def norm(x: Tensor) -> Tensor:
    """RMS norm without parameters over the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


class Decoder:
    """Tokens in the stages, each row and each stage at its own pace.

    Buffers hold, of each row and position, the token, the states `x[k]` before stage k (`x[K]`: behind the last one),
    and in every layer key and value. `ends[k][row]` positions have arrived before stage k. Chunks are padded on the
    right; what padding writes lies behind a row's end, where nobody looks before it is written again. For the same
    reason tokens are taken back by lowering `ends`. The layers see this object as their cache.
    """

    def __init__(self, model: Any, rows: int):
        self.model, self.trunk = model, model.model
        weight, K = self.trunk.embed_tokens.weight, len(model.config.stage_boundaries)
        self.ends = [[0] * rows for _ in range(K + 1)]
        self.ids = torch.zeros(rows, 0, dtype=torch.int64, device=weight.device)
        self.x = torch.zeros(K + 1, rows, 0, weight.size(1), dtype=weight.dtype, device=weight.device)
        self.kv: dict[int, Tensor] = {}                          # layer -> (2, R, Hkv, C, d)
        self.rows = self.positions = self.ids                    # (R', 1) and (R', T) of the chunk that runs
        self.seen = slice(0)                                     # the keys it may look at, in the layer that runs

    @property
    def stages(self) -> int:
        return len(self.ends) - 1

    def feed(self, tokens: dict[int, list[int]]) -> None:
        """Append tokens to rows; they wait before stage 0."""
        for row, new in tokens.items():
            start, end = self.ends[0][row], self.ends[0][row] + len(new)
            self._reach(end)
            self.ids[row, start:end] = torch.tensor(new)
            self.ends[0][row] = end

    def cut(self, row: int, count: int) -> None:
        """Take back the last `count` tokens of a row, wherever they are."""
        length = self.ends[0][row] - count
        for ends in self.ends:
            ends[row] = min(ends[row], length)

    def run(self, k: int, rows: list[int]) -> None:
        """Take through stage k whatever of these rows waits before it."""
        starts = [self.ends[k + 1][row] for row in rows]
        T = max(self.ends[k][row] - start for row, start in zip(rows, starts, strict=True))
        self._reach(max(starts) + T)
        device, trunk, config = self.ids.device, self.trunk, self.model.config
        self.rows = torch.tensor(rows, device=device)[:, None]
        self.positions = torch.tensor(starts, device=device)[:, None] + torch.arange(T, device=device)
        here = self.rows, self.positions
        ids = self.ids[here]
        if k == 0:
            before = self.ids[self.rows, (self.positions - 1).clamp_min(0)]
            self.x[0][here] = trunk.smear(norm(trunk.embed_tokens(ids)), before, self.positions)
        x0, x = self.x[0][here], self.x[k][here]                 # (R', T, D)
        rotary, sights = trunk.rotary(self.positions, x.dtype), {}
        for i in range(config.stage_boundaries[k - 1] + 1 if k else 0, config.stage_boundaries[k] + 1):
            window = trunk.layers[i + 1].self_attn.sliding_window
            if window not in sights:
                sights[window] = self._sight(starts, window, x.dtype)
            self.seen, mask = sights[window]
            r, c = trunk.resid_lambdas[i].to(x.dtype), trunk.x0_lambdas[i].to(x.dtype)
            x, _ = trunk.layers[i + 1](x, x0, r, c, ids, self.positions, rotary, attention_mask=mask,
                                       past_key_values=self)
        self.x[k + 1][here] = x.to(self.x)
        for row in rows:
            self.ends[k + 1][row] = self.ends[k][row]

    def logits(self, k: int, rows: list[int], counts: list[int] | None = None) -> Tensor:
        """Capped logits (sum of counts, V) of stage k at the last counts[i] (1) positions of rows[i] behind it."""
        at = [(row, self.ends[k + 1][row] - n + j) for row, n in zip(rows, counts or [1] * len(rows), strict=True)
              for j in range(n)]
        row, position = torch.tensor(at, device=self.x.device).T
        return self.model.stage_logits(self.x[k + 1][row, position], k)

    def update(self, k: Tensor, v: Tensor, layer: int, _: Any = None) -> tuple[Tensor, Tensor]:
        """The layers call this: store (R', Hkv, T, d) where the chunk is; all keys and values it may look at."""
        if layer not in self.kv:
            heads, _, d = k.shape[1:]
            self.kv[layer] = k.new_zeros(2, len(self.ids), heads, self.ids.size(1), d)
        rows, positions = self.rows.to(k.device), self.positions.to(k.device)
        found = []
        for held, new in zip(self.kv[layer], (k, v), strict=True):
            held[rows, :, positions] = new.transpose(1, 2)       # (R', T, Hkv, d)
            held = held[:, :, self.seen]
            found.append(held if len(rows) == len(held) else held[rows[:, 0]])
        return found[0], found[1]

    def _sight(self, starts: list[int], window: int | None, dtype: torch.dtype) -> tuple[slice, Tensor | None]:
        """The slice of keys that a layer's chunk sees any of, and (R', 1, T, keys) which; None: all of them."""
        T = self.positions.size(1)
        low = max(0, min(starts) - window + 1) if window else 0
        seen = slice(low, max(starts) + T)
        if T == 1 and len(set(starts)) == 1:
            return seen, None
        keys, queries = torch.arange(seen.start, seen.stop, device=self.ids.device), self.positions[:, None, :, None]
        mask = keys <= queries
        if window:
            mask = mask & (keys > queries - window)              # a window counts the token itself
        if self.model.config._attn_implementation == "eager":    # which adds it to the scores
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        return seen, mask

    def _reach(self, length: int) -> None:
        """Make room for `length` positions."""
        if length > self.ids.size(1):
            more = -(-length // PIECE) * PIECE - self.ids.size(1)
            self.ids, self.x = F.pad(self.ids, (0, more)), F.pad(self.x, (0, 0, 0, more))
            self.kv = {layer: F.pad(held, (0, 0, 0, more)) for layer, held in self.kv.items()}


class Texts:
    """The rows and what they have written. `live` rows want more tokens, `left` counts how many at most."""

    def __init__(self, prompts: list[list[int]], most: int, stop: set[int], streamer: Any):
        self.fresh = prompts             # the tokens of a row that were not fed yet
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.stages: list[list[int]] = [[] for _ in prompts]
        self.left = [most] * len(prompts)
        self.live = list(range(len(prompts)))
        self.stop, self.streamer = stop, streamer

    def push(self, row: int, token: int, stage: int) -> bool:
        """Append a token; whether the row goes on. A stop token is the last one of its row."""
        self.fresh[row] = [token]
        self.answers[row].append(token)
        self.stages[row].append(stage)
        self.left[row] -= 1
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token]))
        if self.left[row] == 0 or token in self.stop:
            self.live.remove(row)
        return row in self.live


# -- drawing tokens ---------------------------------------------------------------------------------------------------

class Sampling:
    """How tokens are drawn; greedy without a seed. A row's random numbers depend on (seed, row) alone."""

    def __init__(self, seed: int | None, temperature: float = 1.0, top_k: int | None = None,
                 top_p: float | None = None):
        self.seed, self.temperature, self.top_k, self.top_p = seed, temperature, top_k, top_p
        self.generators: dict[int, torch.Generator] = {}

    def generator(self, row: int, device: torch.device) -> torch.Generator:
        if row not in self.generators:
            self.generators[row] = torch.Generator(device).manual_seed(((self.seed or 0) * 1_000_003 + row) % 2**63)
        return self.generators[row]

    def probabilities(self, scores: Tensor) -> Tensor:
        """Pooled log-probabilities but for a constant (N, V) -> probabilities of drawing; greedy: all on one."""
        if self.seed is None:
            return F.one_hot(scores.argmax(-1), scores.size(-1)).to(scores.dtype)
        scores = scores / self.temperature
        if self.top_k is not None and self.top_k < scores.size(-1):
            best = scores.topk(self.top_k, dim=-1)
            scores = torch.full_like(scores, -math.inf).scatter(-1, best.indices, best.values)
        probs = scores.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            ordered, index = probs.sort(dim=-1, descending=True, stable=True)
            ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
            probs = torch.zeros_like(probs).scatter(-1, index, ordered)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs

    def draw(self, row: int, probs: Tensor) -> int:
        """A token by probabilities (V,)."""
        if self.seed is None:
            return int(probs.argmax())
        return int(torch.multinomial(probs, 1, generator=self.generator(row, probs.device)))

    def accept(self, row: int, p: Tensor, q: Tensor, token: int) -> tuple[bool, int]:
        """Keep `token`, drawn from q (V,), with probability min(1, p/q), else draw from (p - q)+ (arXiv 2211.17192).

        So the token that comes out has the distribution p.
        """
        u = 0.0
        if self.seed is not None:
            u = float(torch.rand((), generator=self.generator(row, p.device), device=p.device))
        if u < float(p[token] / q[token]):
            return True, token
        rest = (p - q).clamp_min(0)
        return False, self.draw(row, rest if rest.sum() > 0 else p)      # p = q but for rounding


def sampling_of(do_sample: bool, temperature: float | None, top_k: int | None, top_p: float | None,
                seed: int | None) -> Sampling:
    """What the arguments of a call mean. ValueError for those that mean nothing."""
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed}
    if not do_sample:
        if unused := [f"`{name}`" for name, value in given.items() if value is not None]:
            raise ValueError(f"{', '.join(unused)} without do_sample=True, which draws tokens")
        return Sampling(None)
    if temperature is not None and not 1e-4 <= temperature < math.inf:
        raise ValueError(f"`temperature` must be 0.0001 or more, got {temperature}: "
                         "leave out `do_sample` for greedy text")
    if top_k is not None and top_k < 1:
        raise ValueError(f"`top_k` must be 1 or more, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be above 0 and at most 1, got {top_p}")
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    return Sampling(seed, 1.0 if temperature is None else temperature, top_k, top_p)


__all__ = ["Decoder", "Sampling", "Texts", "norm", "sampling_of"]
