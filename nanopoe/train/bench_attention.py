"""What windowed attention costs beside full causal attention, forward and backward."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe.dist import World
from nanopoe.model.attention import attend
from nanopoe.model.windows import choose_kernel, find_documents, window_mask
from nanopoe.train.bench import clock, spread_of
from nanopoe.train.compute import choose_fp32_matmul, keep_freed_memory

HEADS, HEAD_DIM = 4, 64
MOST_MASKED = 4096           # positions up to which the dense mask is timed too: its (T, T) scores are computed in full


def bench_attention(world: World, length: int, window: int, rounds: int = 7, dtype: torch.dtype = torch.float32,
                    threads: int | None = None, document: int = 512) -> dict[str, Any]:
    """Median seconds of attention over (1, HEADS, length, HEAD_DIM) and its gradient, the forms in turns.

    `full` is causal, `windowed` is what training runs, `masked` a (T, T) mask given to PyTorch (None if too long),
    `documents` full attention within documents of `document` tokens. `pairs`: query-key pairs in windows, of all causal
    ones.
    """
    if world.device.type == "cpu":
        if threads:
            torch.set_num_threads(threads)
        keep_freed_memory()
        choose_fp32_matmul()
    generator = torch.Generator(world.device).manual_seed(0)
    q, k, v, g = (torch.randn(1, length, HEADS, HEAD_DIM, generator=generator, device=world.device, dtype=dtype)
                  .transpose(1, 2) for _ in range(4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    forms: dict[str, Callable[..., Tensor]] = {"full": lambda q, k, v: attend(q, k, v, length),
                                               "windowed": lambda q, k, v: attend(q, k, v, window)}
    choose_kernel(world.device, dtype, documents=True)
    places = torch.arange(length, device=world.device).unsqueeze(0)
    found = find_documents(places % document, 0, [length], dtype)
    forms["documents"] = lambda q, k, v: attend(q, k, v, length, documents=found)
    if length <= MOST_MASKED:
        mask = window_mask(length, length, window, world.device)
        forms["masked"] = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    for i in range(rounds + 1):
        for name, form in forms.items():
            start = clock(world)
            torch.autograd.grad(form(*inputs), inputs, g)
            if i:
                seconds[name].append(clock(world) - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    pairs = sum(min(t, window) + 1 for t in range(length)) / (length * (length + 1) / 2)
    return {"length": length, "window": window, "dtype": str(dtype)[6:], "device": str(world.device),
            "threads": torch.get_num_threads(), "spread": {name: spread_of(times) for name, times in seconds.items()},
            "full": median["full"], "windowed": median["windowed"], "masked": median.get("masked"),
            "document": document, "documents": median["documents"],
            "ratio": median["windowed"] / median["full"], "pairs": pairs}
