"""Tokens through the stages, cached, each row and each stage at its own pace.

A token is fed once; then `run(k)` takes through stage k what waits before it. So a token may stop early and wait at a
boundary with its state, for as long as nothing behind it needs stage k; when something does, all that waits goes
through in one chunk, and the keys and values of stage k are those that would be there anyway. Adaptive depth and
speculation are made of this and nothing is approximated.

With specialists the stages are a tree: what leaves a stage waits before every one that reads it, so that the base runs
once for all siblings. A row may be kept to a part of the tree (`keep`).

Tokens of several rows are packed, (N, D) with the rows one after another and no padding: prompts may have different
lengths and rows may advance at different speeds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe.config.layout import SMEAR_CHANNELS
from nanopoe.infer.cache import PIECE, LayerCache
from nanopoe.infer.weights import LayerWeights, Weights
from nanopoe.model.attention import attend, rotary_tables
from nanopoe.model.gpt import norm

Span = tuple[int, int, int]                      # row, first position, tokens


@dataclass(frozen=True)
class Chunk:
    """N packed tokens before a stage or behind it. `rows` and `positions` are nondecreasing within a row."""

    rows: list[int]
    positions: list[int]
    ids: Tensor              # (N,) int64
    x0: Tensor               # (N, D) what the blocks inject
    x: Tensor                # (N, D) residual stream

    def select(self, index: Sequence[int]) -> Chunk:
        if list(index) == list(range(len(self.rows))):
            return self
        at = torch.tensor(index, dtype=torch.int64, device=self.x.device)
        return Chunk([self.rows[i] for i in index], [self.positions[i] for i in index],
                     self.ids[at], self.x0[at], self.x[at])

    def last(self, counts: Sequence[int]) -> Tensor:
        """States (sum of counts, D) of the last counts[i] tokens of the i-th row in this chunk."""
        index: list[int] = []
        end = 0
        for (_, group), count in zip(groupby(self.rows), counts, strict=True):
            end += len(list(group))
            index += range(end - count, end)
        return self.select(index).x


def merged(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk of all, the tokens of a row together and in their order."""
    if len(chunks) == 1:
        return chunks[0]
    rows, positions = [r for c in chunks for r in c.rows], [p for c in chunks for p in c.positions]
    whole = Chunk(rows, positions, *(torch.cat(t) for t in zip(*((c.ids, c.x0, c.x) for c in chunks), strict=True)))
    return whole.select(sorted(range(len(rows)), key=lambda i: (rows[i], positions[i])))


class Decoder:
    """The state of `rows` texts of at most `capacity` tokens, in `stages` (None: all) and those on the way to them.

    `rollback` is how many tokens `cut` may take back. Short-window layers keep their window, the rollback and a piece.
    """

    def __init__(self, weights: Weights, rows: int, capacity: int, stages: Collection[int] | None = None,
                 rollback: int = 0):
        w = self.weights = weights
        self.stages = w.way_to(range(len(w.heads)) if stages is None else stages)
        self.after = {k: [j for j in self.stages if w.layout.input_of(j) == k] for k in self.stages}
        self.tokens: list[list[int]] = [[] for _ in range(rows)]
        self.held = {k: [0] * rows for k in self.stages}                 # positions of a row behind stage k
        self.waiting: dict[int, list[Chunk]] = {k: [] for k in self.stages}
        self.kept: dict[int, tuple[int, ...]] = {}                       # rows that do not go through all stages
        self.caches = {i: LayerCache(rows, w.config.n_kv_head, w.layout.head_dim, w.layers[i].window, rollback,
                                     capacity, w.dtype, w.device) for k in self.stages for i in w.stage_layers[k]}
        cos, sin = rotary_tables(torch.arange(capacity, device=w.device), w.layout.head_dim, w.dtype)
        self.cos, self.sin = torch.cat([cos, cos], -1)[:, None], torch.cat([sin, -sin], -1)[:, None]     # (C, 1, D)

    # -- in and back ------------------------------------------------------------------------------------------------

    def feed(self, ids: Mapping[int, Sequence[int]]) -> None:
        """Append tokens to rows; they wait before stage 0."""
        w = self.weights
        rows: list[int] = []
        positions: list[int] = []
        now: list[int] = []
        before: list[int] = []
        for row in sorted(ids):
            new, old = ids[row], self.tokens[row]
            positions += range(len(old), len(old) + len(new))
            rows += [row] * len(new)
            now += new
            before += [old[-1] if old else 0, *new[:-1]]
            old += new
        both = torch.tensor([now, before], dtype=torch.int64, device=w.device)              # (2, N)
        x, previous = rms(F.embedding(both, w.embedding).to(w.dtype))
        gate = w.smear_lambda * torch.sigmoid(F.linear(x[:, :SMEAR_CHANNELS], w.smear_gate))
        if 0 in positions:                                      # nothing comes before the first token of a text
            gate = gate * torch.tensor([[float(p > 0)] for p in positions], dtype=w.dtype, device=w.device)
        x0 = torch.addcmul(x, gate, previous)
        self.waiting[0].append(Chunk(rows, positions, both[0], x0, x0))

    def cut(self, row: int, length: int) -> None:
        """Take back all tokens of a row from position `length` on, wherever they are."""
        assert length <= len(self.tokens[row])
        del self.tokens[row][length:]
        for held in self.held.values():
            held[row] = min(held[row], length)
        self._keep_waiting(self.stages, lambda r, p: r != row or p < length)

    def release(self, row: int) -> None:
        """A text has ended: what waits of it need not run."""
        self._keep_waiting(self.stages, lambda r, p: r != row)

    def keep(self, row: int, stages: Collection[int]) -> None:
        """From now on a row goes through `stages` only and those on the way to them, and through no other ever again:
        what waits before others need not run."""
        self.kept[row] = self.weights.way_to(stages)
        self._keep_waiting([k for k in self.stages if k not in self.kept[row]], lambda r, p: r != row)

    def _keep_waiting(self, stages: Collection[int], wanted: Callable[[int, int], bool]) -> None:
        """Drop of what waits before `stages` all tokens (row, position) that are not wanted."""
        for k in stages:
            kept = []
            for c in self.waiting[k]:
                index = [i for i, (r, p) in enumerate(zip(c.rows, c.positions, strict=True)) if wanted(r, p)]
                if index:
                    kept.append(c.select(index))
            self.waiting[k] = kept

    # -- through a stage ----------------------------------------------------------------------------------------------

    def run(self, k: int, rows: Collection[int] | None = None) -> Chunk:
        """Take through stage k what waits before it, of `rows` or of all; the chunk behind it, boundary states in x."""
        chunk = self._take(k, rows)
        lengths = [len(list(group)) for _, group in groupby(chunk.rows)]
        if max(lengths) <= PIECE:
            x = self._stage(k, chunk, lengths)
        else:
            x = self._stage_by_pieces(k, chunk, lengths)
        out = Chunk(chunk.rows, chunk.positions, chunk.ids, chunk.x0, x)
        for after in self.after[k]:
            if not self.kept:
                self.waiting[after].append(out)
            elif going := [i for i, row in enumerate(out.rows) if after in self.kept.get(row, self.stages)]:
                self.waiting[after].append(out.select(going))
        return out

    def _take(self, k: int, rows: Collection[int] | None) -> Chunk:
        whole = merged(self.waiting[k])
        self.waiting[k] = []
        present = set(whole.rows)
        rows = present if rows is None else present.intersection(rows)
        if rows == present:
            return whole
        self.waiting[k].append(whole.select([i for i, r in enumerate(whole.rows) if r not in rows]))
        return whole.select([i for i, r in enumerate(whole.rows) if r in rows])

    def _stage_by_pieces(self, k: int, chunk: Chunk, lengths: list[int]) -> Tensor:
        x = torch.empty_like(chunk.x)
        for low in range(0, max(lengths), PIECE):
            index: list[int] = []
            sizes: list[int] = []
            start = 0
            for n in lengths:
                part = range(start + low, start + min(low + PIECE, n))
                index += part
                sizes += [len(part)] * (len(part) > 0)
                start += n
            x[torch.tensor(index, device=x.device)] = self._stage(k, chunk.select(index), sizes)
        return x

    def _stage(self, k: int, chunk: Chunk, lengths: list[int]) -> Tensor:
        """Blocks of stage k on a chunk whose rows have `lengths` tokens: the residual stream (N, D) at its boundary."""
        w, spans, at = self.weights, [], 0
        for n in lengths:
            row, start = chunk.rows[at], chunk.positions[at]
            assert self.held[k][row] == start, "tokens out of order"
            self.held[k][row] = start + n
            spans.append((row, start, n))
            at += n
        if len(spans) == 1:
            positions: slice | Tensor = slice(spans[0][1], spans[0][1] + lengths[0])
        else:
            positions = torch.tensor(chunk.positions, device=w.device)
        rope = self.cos[positions], self.sin[positions]
        even = all(s == (spans[0][0] + i, *spans[0][1:]) for i, s in enumerate(spans))
        x, middle = chunk.x, None
        for i, injected in zip(w.stage_layers[k], (chunk.x0 * w.inject[k]).unbind(), strict=True):
            x = torch.add(injected, x, alpha=w.layers[i].resid)
            x = self._block(w.layers[i], self.caches[i], x, chunk.ids, rope, spans, even)
            if i == w.config.n_layer // 2:
                middle = x
        if w.backout is not None and k < w.n_stages:
            assert middle is not None
            x = torch.sub(x, middle, alpha=w.backout)
        return x

    def _block(self, w: LayerWeights, cache: LayerCache, x: Tensor, ids: Tensor, rope: tuple[Tensor, Tensor],
               spans: list[Span], even: bool) -> Tensor:
        n, D, kv, heads = x.size(0), self.cos.size(-1), cache.k.size(1), w.heads
        qk, v, *gates = w.qkv(rms(x)).split_with_sizes(w.widths, dim=-1)
        qk, v = qk.view(n, heads + kv, D), v.view(n, kv, D)
        if w.values is not None:
            gate = torch.sigmoid(gates[0]).unsqueeze(-1)                                     # (N, Hkv, 1)
            v = torch.addcmul(v, gate, F.embedding(ids, w.values).to(v.dtype).view_as(v), value=3)
        qk = rms(torch.addcmul(qk * rope[0], qk.roll(D // 2, -1), rope[1]))                  # rotate, then norm
        if even and cache.level(spans[0][0], len(spans)):
            y = self._attend(cache, spans[0], len(spans), qk, v)
        else:
            parts, at = [], 0
            for span in spans:
                part = slice(at, at + span[2])
                parts.append(self._attend(cache, span, 1, qk[part], v[part]))
                at = part.stop
            y = torch.cat(parts)
        x = x + w.out(y)
        h = w.fc(rms(x)).relu_()
        return x + w.proj(h.mul_(h))

    def _attend(self, cache: LayerCache, span: Span, rows: int, qk: Tensor, v: Tensor) -> Tensor:
        """Attention of `rows` rows with the same positions: qk (rows*T, H+Hkv, D), v (rows*T, Hkv, D) ->
        (rows*T, H*D)."""
        first, start, T = span
        kv = v.size(1)
        if T == 1:                                              # (B, heads, 1, D) is a view
            qk, v = qk.unsqueeze(2), v.unsqueeze(2)
        else:
            qk, v = qk.unflatten(0, (rows, T)).transpose(1, 2), v.unflatten(0, (rows, T)).transpose(1, 2)
        q, k = qk.split_with_sizes([qk.size(1) - kv, kv], dim=1)
        keys, values = cache.update(first, start, k, v)
        y = attend(q, keys, values, cache.window, self.weights.attention_scale)
        return y.transpose(1, 2).reshape(rows * T, -1)


def rms(x: Tensor) -> Tensor:
    """`norm` in half the time where there is no one kernel for it, on a CPU: x / sqrt(mean x^2 + eps)."""
    if x.device.type != "cpu" or x.dtype != torch.float32:
        return norm(x)
    scale, root_eps = _rms_constants(x.size(-1))
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).mul_(scale).hypot_(root_eps)


@lru_cache(maxsize=16)
def _rms_constants(width: int) -> tuple[Tensor, Tensor]:
    """As tensors: from a Python number each call would make one."""
    return torch.tensor(width ** -0.5), torch.tensor(torch.finfo(torch.float32).eps ** 0.5)
