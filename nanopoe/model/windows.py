"""Kernels of windowed causal attention whose work grows with length x window, and the one that is taken where.

All are called as attend() is, with a window that cuts something off and a scale: q (B, H, Tq, D), k and v
(B, Hkv, Tk, D). Values and gradients are those of softmax attention under window_mask, but for rounding. With
Documents (Tq = Tk, any window) a position also sees nothing before the beginning of its own document.
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


class Documents(NamedTuple):
    """Of packed rows whose documents do not see each other: where the document of each position begins, (B, T) int64,
    and masks for FlexAttention by window, where that is the kernel."""

    starts: Tensor
    masks: dict[int, Any]


class Kernel(NamedTuple):
    name: str                                                        # as the log says it
    run: Callable[..., Tensor]     # q, k, v, window, scale, documents (None: each row is one)
    whole: bool = True       # torch.compile takes it into a graph; of FlashAttention that depends on its version


_taken: dict[tuple[str, torch.dtype], Kernel] = {}


def windowed_kernel(device: torch.device, dtype: torch.dtype) -> Kernel:
    """What choose_kernel chose, and where nobody called that, the first of "flash", "flex", "blocks" that fits."""
    key = (device.type, dtype)
    if key not in _taken:
        choose_kernel(device, dtype)
    return _taken[key]


def choose_kernel(device: torch.device, dtype: torch.dtype, name: str = "auto", documents: bool = False) -> Kernel:
    """The kernel of this process from now on: "flash", "flex", "blocks", or the first of them that fits with "auto".
    With `documents` FlashAttention does not fit: its masks know a window alone.

    ConfigError for one that is not there, or is not for this device and dtype.
    """
    kernel = None
    if name == "flash" or (name == "auto" and not documents):
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


def find_documents(ids: Tensor, bos: int, windows: Iterable[int], dtype: torch.dtype) -> Documents:
    """Of rows `ids` (B, T) in which every document begins with `bos`; before the first of a row goes on what another
    row began. `windows` and `dtype` are those that attention will run with."""
    starts = torch.where(ids == bos, torch.arange(ids.size(1), device=ids.device), 0).cummax(1).values
    flex = windowed_kernel(ids.device, dtype).run is _flex and ids.size(1) % FLEX_BLOCK == 0
    return Documents(starts, {window: _flex_mask(ids.size(1), window, ids.device, starts)
                              for window in {min(window, ids.size(1)) for window in windows if flex}})


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

def _flash(function: Callable[..., Any]) -> Callable[..., Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None = None) -> Tensor:
        if documents is not None:
            return _sdpa_of_documents(q, k, v, window, scale, documents)
        y = function(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale=scale, causal=True, window_size=(window, 0))
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)                 # some versions add log-sum-exps
    return run


def _flex(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents | None = None) -> Tensor:
    """Of whole blocks of training; prompts would be compiled anew for every length."""
    queries, keys = q.size(2), k.size(2)
    if queries != keys or queries % FLEX_BLOCK:
        return _sdpa_in_blocks(q, k, v, window, scale, documents)
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    mask = _block_mask(queries, window, q.device) if documents is None else documents.masks[window]
    y: Tensor = flex(q, k, v, block_mask=mask, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


_block_masks: dict[tuple[int, int, torch.device], Any] = {}    # a compiled graph reads it, but looks through lru_cache


def _block_mask(length: int, window: int, device: torch.device) -> Any:
    key = (length, window, device)
    if key not in _block_masks:
        _block_masks[key] = _flex_mask(length, window, device)
    return _block_masks[key]


def _flex_mask(length: int, window: int, device: torch.device, starts: Tensor | None = None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(batch: Tensor, head: Tensor, t: Tensor, s: Tensor) -> Tensor:
        inside = (s <= t) & (s >= t - window)
        return inside if starts is None else inside & (s >= starts[batch, t])

    return create_block_mask(sees, None if starts is None else len(starts), None, length, length, device, FLEX_BLOCK)


# -- anywhere ---------------------------------------------------------------------------------------------------------

def _sdpa_of_documents(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, documents: Documents) -> Tensor:
    """With a mask (B, 1, T, T): as much work as without."""
    k, v = _ungrouped(q, k, v)
    T, starts = q.size(2), documents.starts
    mask = window_mask(T, T, window, q.device) & (torch.arange(T, device=q.device) >= starts.unsqueeze(-1))
    return F.scaled_dot_product_attention(q, k, v, mask.unsqueeze(1), scale=scale)


def _sdpa_in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float,
                    documents: Documents | None = None) -> Tensor:
    """The first `window` queries are causal; then blocks of as many, each against twice as many keys, as one batch."""
    if documents is not None:
        return _sdpa_of_documents(q, k, v, window, scale, documents)
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

def _in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float,
               documents: Documents | None = None) -> Tensor:
    """For a CPU, in fp32 if the inputs are shorter."""
    B, H, queries, _ = q.shape
    k, v = _ungrouped(q, k, v)
    dtype = torch.promote_types(q.dtype, torch.float32)
    apply: Callable[..., Tensor] = _opaque_blocks if torch.compiler.is_compiling() else _Blocks.apply
    y = apply(*(x.to(dtype).reshape(B * H, x.size(2), x.size(3)) for x in (q * scale, k, v)), window,
              None if documents is None else documents.starts)
    return y.view(B, H, queries, -1).to(q.dtype)


class _Blocks(torch.autograd.Function):
    """Windowed attention whose work grows with Tq x window, not Tq x Tk: q (N, Tq, D) scaled, k, v (N, Tk, D), and
    `starts` (B, Tq) of documents or None, where N = B H.

    Blocks of queries, each against the keys its windows reach. The probabilities of a block stay in the cache and are
    computed again for the gradient; PyTorch's own kernel on a CPU computes what a mask forbids, too.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None) -> Tensor:
        ctx.window = window
        ctx.save_for_backward(q, k, v, starts)
        return _attend_blocks(q, k, v, window, starts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, starts = ctx.saved_tensors
        return *_blocks_backward(grads[0], q, k, v, ctx.window, starts), None, None


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


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, starts: Tensor | None) -> Tensor:
    y = torch.empty_like(q)
    with _small_products():
        for at, seen, mask, other in _blocks(q.size(1), k.size(1), window, starts):
            y[:, at] = torch.bmm(_probabilities(q[:, at], k[:, seen], mask, other), v[:, seen])
    return y


def _blocks_backward(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, window: int,
                     starts: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    with _small_products():
        for at, seen, mask, other in _blocks(q.size(1), k.size(1), window, starts):
            p = _probabilities(q[:, at], k[:, seen], mask, other)
            dv[:, seen] += torch.bmm(p.mT, dy[:, at])
            dp = torch.bmm(dy[:, at], v[:, seen].mT)
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)        # one pass for p * (dp - sum(p * dp))
            dq[:, at] = torch.bmm(ds, k[:, seen])
            dk[:, seen] += torch.bmm(ds.mT, q[:, at])
    return dq, dk, dv


# The same as operators that a compiled graph calls as they are: unrolled, it would have several matmuls for each block.
_opaque_blocks = torch.library.custom_op("nanopoe::window_blocks", _attend_blocks, mutates_args=())
_opaque_backward = torch.library.custom_op("nanopoe::window_blocks_backward", _blocks_backward, mutates_args=())
_opaque_blocks.register_fake(lambda q, k, v, window, starts: torch.empty_like(q))
_opaque_backward.register_fake(lambda dy, q, k, v, window, starts: tuple(map(torch.empty_like, (q, k, v))))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, ctx.window, starts = inputs
    ctx.save_for_backward(q, k, v, starts)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, starts = ctx.saved_tensors
    return *_opaque_backward(dy.contiguous(), q, k, v, ctx.window, starts), None, None


_opaque_blocks.register_autograd(_gradients, setup_context=_keep)


def _blocks(queries: int, keys: int, window: int,
            starts: Tensor | None) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
    """Slices of queries, of the keys that they see, the mask to be added, and which keys are of other documents."""
    before, width = keys - queries, min(window, keys) + BLOCK
    for start in range(0, queries, BLOCK):
        stop = min(start + BLOCK, queries)
        first, other = max(0, before + start - window), None
        if starts is not None:                                       # of a row they only grow
            first = max(first, int(starts[:, start].min()))
            other = torch.arange(first, stop) < starts[:, start:stop, None]
        seen = before + stop - first
        mask = _added_mask(stop - start, width, window)[:, -seen:]
        yield slice(start, stop), slice(first, before + stop), mask, other


@lru_cache(maxsize=64)
def _added_mask(queries: int, keys: int, window: int) -> Tensor:
    """window_mask as 0 and -inf, fp32 (Tq, Tk)."""
    return torch.zeros(queries, keys).masked_fill_(~window_mask(queries, keys, window, torch.device("cpu")), -torch.inf)


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, other: Tensor | None) -> Tensor:
    """(N, q, k), of keys that `mask` (q, k) lets through and that are not `other` (B, q, k)."""
    scores = torch.baddbmm(mask.to(q.dtype), q, k.mT)
    if other is not None:
        scores.unflatten(0, (len(other), -1)).masked_fill_(other.unsqueeze(1), -torch.inf)
    return scores.softmax(-1)
