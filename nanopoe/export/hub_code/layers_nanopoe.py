"""The layers of a nanopoe language model: attention, the lookup of the previous token, MLP, block.

Shape letters: B batch, T time, D width, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .configuration_nanopoe import NanoPoEConfig
from .decoding_nanopoe import norm
from .masks_nanopoe import window_of

LOOKUP_SHARPNESS = 160.0                 # peak score of the previous-token lookup is half of this


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, H, d) by minus the angle, halves of d as pairs; cos and sin are (B or 1, T, 1, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """(B, Hkv, T, d) -> (B, Hkv * times, T, d)."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def last_keys(x: Tensor, mask: Any) -> Tensor:
    """Of x (B, Hkv, keys in a cache, d) those that a mask (B, 1, T, keys) has columns for: a window below the largest
    sees no more."""
    return x[:, :, -mask.shape[-1]:] if isinstance(mask, Tensor) and mask.ndim == 4 else x


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: (B, H, Tq, d) and (B, Hkv, Tk, d) -> (B, Tq, H, d) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class NanoPoEAttention(nn.Module):
    """Rotary positions, then QK norm, then `qk_scale` on both sides (inside `scaling`); gated value embeddings."""

    def __init__(self, config: NanoPoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.qk_scale**2 / math.sqrt(config.head_dim)
        self.sliding_window = window_of(config, layer_idx)
        self.build()

    def build(self) -> None:
        config, kv_width = self.config, self.config.num_key_value_heads * self.head_dim
        width = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.has_value_embedding = self.layer_idx - 1 in config.value_embedding_blocks
        if self.has_value_embedding:
            self.value_embed = nn.Embedding(config.vocab_size, kv_width)
            self.ve_gate = nn.Linear(config.value_gate_channels, config.num_key_value_heads, bias=False)

    def project(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed x (B, T, D) -> q (B, H, T, d), k and v (B, Hkv, T, d)."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (p(x).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_value_embedding:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., : self.config.value_gate_channels]))
            v = v + gate.unsqueeze(-1) * self.value_embed(input_ids).view_as(v).to(v.dtype)
        q, k = norm(rotate(q, *rotary)), norm(rotate(k, *rotary))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def read(self, out: Tensor) -> Tensor:
        """Attention output (B, T, H, d) -> (B, T, D)."""
        return self.o_proj(out.reshape(*out.shape[:2], -1))

    def forward(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None, past_key_values: Cache | None = None,
        cache_position: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(x, input_ids, position_ids, rotary)
        if past_key_values is not None:      # transformers 4 static caches write where cache_position says
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
            if self.sliding_window not in (None, self.config.sliding_window):
                k, v = last_keys(k, attention_mask), last_keys(v, attention_mask)
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward)
        elif self.config._attn_implementation == "eager":
            attention_interface = eager_attention_forward
        else:
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attention_interface(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window,
            position_ids=position_ids, **kwargs)
        return self.read(out), weights


class NanoPoEPreviousToken(NanoPoEAttention):
    """Looks up the id of the token before each position. No parameters.

    Keys encode positions on the unit circle at head_dim/2 incommensurable frequencies and queries the position
    before, so scores depend on the lag alone and peak, sharply, at lag 1. Values are the id's bits. At a first
    position the answer is the token itself; the caller ignores it there.
    """

    def build(self) -> None:
        self.scaling = LOOKUP_SHARPNESS / self.head_dim
        self.bits = max(self.config.vocab_size - 1, 1).bit_length()
        if self.head_dim % 2 or self.head_dim < max(16, self.bits):
            raise ValueError(f"head_dim {self.head_dim} cannot encode a vocabulary of {self.config.vocab_size} tokens; "
                             f"it has to be even and at least {max(16, self.bits)}")

    def encode(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        """Positions (B, T) -> (B, 1, T, d)."""
        m = torch.arange(self.head_dim // 2, device=position.device, dtype=torch.float32)
        frequency = math.pi * (m + 0.5 + 0.37 * torch.sin(12.9898 * (m + 1))) / (self.head_dim // 2)
        angle = position[..., None].float() * frequency
        return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype).unsqueeze(1)

    def project(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, (B, T) = self.config, input_ids.shape
        bit = torch.arange(self.bits, device=input_ids.device)
        v = F.pad((input_ids[..., None] >> bit) & 1, (0, self.head_dim - self.bits)).to(x.dtype).unsqueeze(1)
        q, k = self.encode(position_ids - 1, x.dtype), self.encode(position_ids, x.dtype)
        kv_heads = config.num_key_value_heads
        return (q.expand(B, config.num_attention_heads, T, -1), k.expand(B, kv_heads, T, -1),
                v.expand(B, kv_heads, T, -1))

    def read(self, out: Tensor) -> Tensor:
        """Attention output (B, T, H, d) -> ids (B, T); clamped, because engines warm up on unfilled outputs."""
        bit = torch.arange(self.bits, device=out.device)
        return ((out[..., 0, : self.bits] > 0.5).long() << bit).sum(-1).clamp_max(self.config.vocab_size - 1)


class NanoPoELookupLayer(nn.Module):
    """Layer 0."""

    def __init__(self, config: NanoPoEConfig):
        super().__init__()
        self.self_attn = NanoPoEPreviousToken(config, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.self_attn(x, *args, **kwargs)


class NanoPoEMLP(nn.Module):
    """relu squared (Primer, arXiv 2109.08668)."""

    def __init__(self, config: NanoPoEConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NanoPoEDecoderLayer(GradientCheckpointingLayer):
    """One trained block: mix in x0, attention, MLP."""

    def __init__(self, config: NanoPoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = NanoPoEAttention(config, layer_idx)
        self.mlp = NanoPoEMLP(config)

    def forward(self, x: Tensor, x0: Tensor, r: Tensor, c: Tensor, *args: Any, **kwargs: Any
                ) -> tuple[Tensor, Tensor | None]:
        x = r * x + c * x0
        out, weights = self.self_attn(norm(x), *args, **kwargs)
        x = x + out
        return x + self.mlp(norm(x)), weights


__all__ = ["LOOKUP_SHARPNESS", "NanoPoEDecoderLayer", "NanoPoELookupLayer", "NanoPoEPreviousToken"]
