"""Keys and values of one layer: only as far back as its window and a possible rollback reach."""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 256              # longest run of positions of a row that a layer takes at once


class LayerCache:
    """(R, Hkv, C, D) buffers. Slot i of row r holds position base[r] + i.

    A row that reaches the end of its buffer is moved to the front, all but what no query can see any more. So C is
    window + rollback + PIECE at most, and a move is paid back by the PIECE positions after it.
    """

    def __init__(self, rows: int, heads: int, head_dim: int, window: int, rollback: int, capacity: int,
                 dtype: torch.dtype, device: torch.device):
        self.window, self.reach = window, window + rollback
        self.capacity = min(capacity, self.reach + PIECE)
        self.k = torch.zeros(rows, heads, self.capacity, head_dim, dtype=dtype, device=device)
        self.v = torch.zeros_like(self.k)
        self.base = [0] * rows

    def level(self, first: int, count: int) -> bool:
        """Whether these rows begin at one position, so that a slice is the same positions in all."""
        return count == 1 or len(set(self.base[first:first + count])) == 1

    def update(self, first: int, start: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, Hkv, T, D) at position `start` of the level rows first..first+B-1, over what was there.

        Returns the keys and values that position `start` and the T-1 after it may see, the last T among them.
        """
        rows, length = slice(first, first + k.size(0)), k.size(2)
        if start + length - self.base[first] > self.capacity:
            self._move(rows, start)
        base = self.base[first]
        low = max(0, start - self.window) - base
        assert low >= 0, "a rollback further than this cache was made for"
        at = start - base
        keys, values = (self.k, self.v) if k.size(0) == len(self.base) else (self.k[rows], self.v[rows])
        keys.narrow(2, at, length).copy_(k)
        values.narrow(2, at, length).copy_(v)
        return keys.narrow(2, low, at + length - low), values.narrow(2, low, at + length - low)

    def _move(self, rows: slice, start: int) -> None:
        base, new = self.base[rows.start], max(0, start - self.reach)
        assert new >= base, "a cache that is too small"
        for buffer in (self.k, self.v):
            buffer[rows, :, :start - new] = buffer[rows, :, new - base:start - base].clone()
        self.base[rows] = [new] * (rows.stop - rows.start)
