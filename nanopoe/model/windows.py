"""Kernels of windowed causal attention whose work grows with length x window, and the one that is taken where.

All are called as attend() is, with a window that cuts something off and a scale: q (B, H, Tq, D), k and v
(B, Hkv, Tk, D). Values and gradients are those of softmax attention under window_mask, but for rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe.errors import ConfigError

BLOCK = 64               # queries that a CPU takes together: 32 and 128 are slower (runs/LOG.md)
FLEX_BLOCK = 128         # FlexAttention's own


class Kernel(NamedTuple):
    name: str                                                        # as the log says it
    run: Callable[[Tensor, Tensor, Tensor, int, float], Tensor]      # q, k, v, window, scale
    whole: bool = True       # torch.compile takes it into a graph; of FlashAttention that depends on its version


_taken: dict[tuple[str, torch.dtype], Kernel] = {}


def windowed_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """What choose_kernel chose, and where nobody called that, the first of "flash", "flex", "blocks" that fits."""
    key = (device.type, dtype)
    if key not in _taken:
        choose_kernel(device, dtype)
    return _taken[key]


def choose_kernel(device: torch.device, dtype: torch.dtype, name: str = "auto") -> Kernel:
    """The kernel of this process from now on: "flash", "flex", "blocks", or the first of them that fits with "auto".

    ConfigError for one that is not there, or is not for this device and dtype.
    """
    kernel = None
    if name in ("auto", "flash"):
        kernel = _flash_kernel(device, dtype)
        if kernel is None and name == "flash":
            raise ConfigError(f"FlashAttention is not there for {dtype} on a {device.type}", "runtime.attention",
                              "on an NVIDIA GPU install flash-attn and compute in bfloat16, or use auto")
    if kernel is None and name in ("auto", "flex"):
        if device.type == "cuda" and find_spec("triton") is not None:
            kernel = Kernel("FlexAttention", _flex)
        elif name == "flex":
            raise ConfigError(f"FlexAttention cannot train here, on a {device.type}", "runtime.attention",
                              "on an NVIDIA GPU install triton, or use auto")
    if kernel is None:
        cpu = device.type == "cpu"
        kernel = Kernel("blocks for a CPU", _in_blocks) if cpu else Kernel("blocks of SDPA", _sdpa_in_blocks)
    _taken[device.type, dtype] = kernel
    return kernel


def _flash_kernel(device: torch.device, dtype: torch.dtype) -> Kernel | None:
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    hopper = torch.cuda.get_device_capability(device)[0] == 9
    for module, name, fits in (("flash_attn_interface", "FlashAttention 3", hopper),
                               ("flash_attn", "FlashAttention 2", True)):
        if fits and find_spec(module) is not None:
            return Kernel(name, _flash(import_module(module).flash_attn_func), whole=False)
    return None


def prepare(kernel: Kernel, length: int, windows: Iterable[int], device: torch.device) -> None:
    """Make what `kernel` needs for rows of this length before it is compiled: a graph makes no masks of blocks."""
    for window in windows:
        if kernel.run is _flex and length % FLEX_BLOCK == 0 and window < length - 1:
            _block_mask(length, window, device)


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
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    y: Tensor = flex(q, k, v, block_mask=_block_mask(queries, window, q.device), scale=scale,
                     enable_gqa=q.size(1) != k.size(1))
    return y


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


_block_masks: dict[tuple[int, int, torch.device], Any] = {}    # a compiled graph reads it, but looks through lru_cache


def _block_mask(length: int, window: int, device: torch.device) -> Any:
    key = (length, window, device)
    if key not in _block_masks:
        from torch.nn.attention.flex_attention import create_block_mask

        def sees(batch: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return (s <= t) & (s >= t - window)

        _block_masks[key] = create_block_mask(sees, None, None, length, length, device, FLEX_BLOCK)
    return _block_masks[key]


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
    apply: Callable[..., Tensor] = _opaque_blocks if torch.compiler.is_compiling() else _Blocks.apply
    y = apply(*(x.to(dtype).reshape(B * H, x.size(2), x.size(3)) for x in (q * scale, k, v)), window)
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
        return _attend_blocks(q, k, v, window)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        return *_blocks_backward(grads[0], q, k, v, ctx.window), None


@contextmanager
def _small_products() -> Iterator[None]:
    """Without oneDNN, if fp32 products go there: it is the faster one for large matrices, and slower for blocks."""
    backend: Any = torch.backends.mkldnn
    matmul = backend.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "none"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    y = torch.empty_like(q)
    with _small_products():
        for at, seen, mask in _blocks(q.size(1), k.size(1), window):
            y[:, at] = torch.bmm(_probabilities(q[:, at], k[:, seen], mask), v[:, seen])
    return y


def _blocks_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with _small_products():
        for at, seen, mask in _blocks(q.size(1), k.size(1), window):
            p = _probabilities(q[:, at], k[:, seen], mask)
            dv[:, seen] += torch.bmm(p.mT, dy[:, at])
            dp = torch.bmm(dy[:, at], v[:, seen].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)        # one pass for p * (dp - sum(p * dp))
            dq[:, at] = torch.bmm(ds, k[:, seen])
            dk[:, seen] += torch.bmm(ds.mT, q[:, at])
    return dq, dk, dv


# The same as operators that a compiled graph calls as they are: unrolled, it would have several matmuls for each block.
_opaque_blocks = torch.library.custom_op("nanopoe::window_blocks", _attend_blocks, mutates_args=())
_opaque_backward = torch.library.custom_op("nanopoe::window_blocks_backward", _blocks_backward, mutates_args=())
_opaque_blocks.register_fake(lambda q, k, v, window: torch.empty_like(q))
_opaque_backward.register_fake(lambda dy, q, k, v, window: tuple(map(torch.empty_like, (q, k, v))))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.window = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return *_opaque_backward(dy.contiguous(), *ctx.saved_tensors, ctx.window), None


_opaque_blocks.register_autograd(_gradients, setup_context=_keep)


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
