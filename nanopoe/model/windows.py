"""Kernels of windowed causal attention whose work grows with length x window, and the one that is taken where.

All are called as attend() is, with a window that cuts something off and a scale: q (B, H, Tq, D), k and v
(B, Hkv, Tk, D). Values and gradients are those of softmax attention under window_mask, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64               # queries that a CPU takes together: 32 and 128 are slower (runs/LOG.md)
FLEX_BLOCK = 128         # FlexAttention's own


class Kernel(NamedTuple):
    name: str                                                        # as the log says it
    run: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]      # q, k, v, window, scale


@lru_cache(maxsize=16)
def windowed_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """FlashAttention 3 or 2 where it is installed and fits, else FlexAttention, on a GPU; blocks elsewhere."""
    if device.type == "cpu":
        return Kernel("blocks for a CPU", _in_blocks)
    if device.type == "cuda":
        hopper = torch.cuda.get_device_capability(device)[0] == 9
        if dtype in (torch.bfloat16, torch.float16):
            for module, name, fits in (("flash_attn_interface", "FlashAttention 3", hopper),
                                       ("flash_attn", "FlashAttention 2", True)):
                if fits and find_spec(module) is not None:
                    return Kernel(name, _flash(import_module(module).flash_attn_func))
        if find_spec("triton") is not None:
            return Kernel("FlexAttention", _flex)
    return Kernel("blocks of SDPA", _sdpa_in_blocks)


@lru_cache(maxsize=16)
def window_mask(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Boolean (Tq, Tk), True = may look: the last Tq of Tk positions as queries, t - window <= s <= t."""
    t = torch.arange(keys - queries, keys, device=device)[:, None]
    s = torch.arange(keys, device=device)[None, :]
    return (s <= t) & (s >= t - window)


def _ungrouped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v with as many heads as q: with a mask CUDA's fused kernels take no grouped queries."""
    groups = q.size(1) // k.size(1)
    return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))


# -- on a GPU ---------------------------------------------------------------------------------------------------------

def _flash(function: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor, int, float], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
        y = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=True, window_size=(window, 0))
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)                 # some versions add log-sum-exps
    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """Of whole blocks of training; prompts would be compiled anew for every length."""
    queries, keys = q.size(2), k.size(2)
    if queries != keys or queries % FLEX_BLOCK:
        return _sdpa_in_blocks(q, k, v, window, scale)
    return _compiled_flex()(q, k, v, block_mask=_block_mask(queries, window, q.device), scale=scale,
                            enable_gqa=q.size(1) != k.size(1))


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=16)
def _block_mask(length: int, window: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (s <= t) & (s >= t - window)

    return create_block_mask(sees, None, None, length, length, device, FLEX_BLOCK)


# -- anywhere ---------------------------------------------------------------------------------------------------------

def _sdpa_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """The first `window` queries are causal; then blocks of as many, each against twice as many keys, as one batch."""
    k, v = _ungrouped(q, k, v)
    (B, H, queries, D), keys = q.shape, k.size(2)
    n = (queries - window) // window
    if queries != keys or n < 1:                                     # little to gain
        return F.scaled_dot_product_attention(q, k, v, attn_mask=window_mask(queries, keys, window, q.device),
                                              scale=scale)

    def overlapping(x: Tensor) -> Tensor:
        """(B, H, (n+1) window, D) -> (B n, H, 2 window, D)."""
        return x.unfold(2, 2 * window, window).permute(0, 2, 1, 4, 3).reshape(B * n, H, 2 * window, D)

    stop, mask = (n + 1) * window, window_mask(window, 2 * window, window, q.device)
    y = [F.scaled_dot_product_attention(q[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True,
                                        scale=scale)]
    blocks = q[:, :, window:stop].unflatten(2, (n, window)).transpose(1, 2).reshape(B * n, H, window, D)
    middle = F.scaled_dot_product_attention(blocks, overlapping(k[:, :, :stop]), overlapping(v[:, :, :stop]), mask,
                                            scale=scale)
    y.append(middle.unflatten(0, (B, n)).transpose(1, 2).reshape(B, H, n * window, D))
    if left := queries - stop:
        rest = slice(stop - window, queries)
        y.append(F.scaled_dot_product_attention(q[:, :, stop:], k[:, :, rest], v[:, :, rest],
                                                mask[:left, :window + left], scale=scale))
    return torch.cat(y, dim=2)


# -- on a CPU ---------------------------------------------------------------------------------------------------------

def _in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float) -> Tensor:
    """For a CPU, in fp32 if the inputs are shorter."""
    B, H, queries, _ = q.shape
    k, v = _ungrouped(q, k, v)
    dtype = torch.promote_types(q.dtype, torch.float32)
    y = _Blocks.apply(*(x.to(dtype).reshape(B * H, x.size(2), x.size(3)) for x in (q * scale, k, v)), window)
    return y.view(B, H, queries, -1).to(q.dtype)


class _Blocks(torch.autograd.Function):
    """Windowed attention whose work grows with Tq x window, not Tq x Tk: q (N, Tq, D) scaled, k, v (N, Tk, D).

    Blocks of queries, each against the keys its windows reach. The probabilities of a block stay in the cache and are
    computed again for the gradient; PyTorch's own kernel on a CPU computes what a mask forbids, too.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(q, k, v)
        y = torch.empty_like(q)
        for at, seen, mask in _blocks(q.size(1), k.size(1), window):
            y[:, at] = torch.bmm(_probabilities(q[:, at], k[:, seen], mask), v[:, seen])
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        dy, dq, dk, dv = grads[0], torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for at, seen, mask in _blocks(q.size(1), k.size(1), ctx.window):
            p = _probabilities(q[:, at], k[:, seen], mask)
            dv[:, seen] += torch.bmm(p.mT, dy[:, at])
            dp = torch.bmm(dy[:, at], v[:, seen].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)    # one pass for p * (dp - sum(p * dp))
            dq[:, at] = torch.bmm(ds, k[:, seen])
            dk[:, seen] += torch.bmm(ds.mT, q[:, at])
        return dq, dk, dv, None


def _blocks(queries: int, keys: int, window: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Slices of queries, of the keys that they see, and the mask to be added."""
    before = keys - queries
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        first = max(0, before + start - window)
        yield slice(start, stop), slice(first, before + stop), _added_mask(stop - start, before + stop - first, window)


@lru_cache(maxsize=64)
def _added_mask(queries: int, keys: int, window: int) -> Tensor:
    """window_mask as 0 and -inf, fp32 (Tq, Tk)."""
    return torch.zeros(queries, keys).masked_fill_(~window_mask(queries, keys, window, torch.device("cpu")), -torch.inf)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    return torch.baddbmm(mask.to(q.dtype), q, k.mT).softmax(-1)
