"""Attention: rotary positions and windowed causal attention. One interface, `attend`, for every caller."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe.model.windows import Documents, windowed_kernel

ROPE_BASE = 1e5


class Positions(NamedTuple):
    """What blocks know of the places of a batch's tokens: rotary tables (T, head_dim/2), and the documents of its rows,
    if these are not to see each other."""

    cos: Tensor
    sin: Tensor
    documents: Documents | None = None


def rotary_tables(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of shape (T, head_dim/2) for integer `positions` (T,); angles in fp32 (RoPE, arXiv 2104.09864)."""
    channel = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = 1.0 / (ROPE_BASE ** (channel / head_dim))
    angle = torch.outer(positions.float(), frequency)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, H, D) by *minus* the angle, the halves of D as pairs (nanochat's convention, SPEC 1)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]                      # (T, 1, D/2)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None = None,
           documents: Documents | None = None) -> Tensor:
    """Causal attention in which position t sees t-window..t, of its own document if there are `documents` (Tq = Tk).

    q (B, H, Tq, D), k and v (B, Hkv, Tk, D) with Tk >= Tq: the queries are the last Tq of the Tk positions.
    Returns (B, H, Tq, D). `scale` is 1/sqrt(D) by default; grouped queries share key/value heads.
    """
    queries, keys = q.size(2), k.size(2)
    gqa = q.size(1) != k.size(1)
    if queries == 1 and documents is None:                           # decoding: cut the keys, no mask needed
        if keys > window + 1:
            k, v = k[:, :, -window - 1:], v[:, :, -window - 1:]
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=gqa)
    if queries == keys and window >= keys - 1 and documents is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=gqa)
    scale = q.size(-1) ** -0.5 if scale is None else scale
    return windowed_kernel(q.device, q.dtype).run(q, k, v, min(window, keys), scale, documents)
