"""Training a specialist: the last one of a model, on what stands below it and never changes (SPEC 8).

The frozen part runs without gradient, so of it nothing is kept but the boundary state that the new blocks read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from nanopoe.config.layout import CHAT_TOKENS
from nanopoe.config.schema import ObjectiveConfig
from nanopoe.errors import NumericsError
from nanopoe.model.attention import Positions
from nanopoe.model.gpt import GPT, Specialist
from nanopoe.model.loss import IGNORE
from nanopoe.model.stages import MicroLosses, backward_stages, head_backward, head_chunks

Keep = Callable[[Tensor, Callable[[], Tensor]], Tensor]      # (ids (B, T), compute) -> what compute() gives, (B, T, D)


def backward(model: GPT, ids: Tensor, targets: Tensor, objective: ObjectiveConfig, scale: float,
             report_pool: bool = False, keep: Keep | None = None) -> MicroLosses:
    """Add the gradients of scale * total loss to the `.grad` of what is trained: the last specialist, or all stages."""
    if model.config.specialists:
        return backward_specialist(model, ids, targets, objective, scale, keep)
    return backward_stages(model, ids, targets, objective, scale, report_pool)


def backward_specialist(model: GPT, ids: Tensor, targets: Tensor, objective: ObjectiveConfig, scale: float,
                        keep: Keep | None = None) -> MicroLosses:
    """Add the gradients of scale * loss (a sum over targets) to the last specialist's `.grad`. ids, targets (B, T).

    `keep` may answer from memory what the frozen part computes for these ids.
    """
    k, places = model.layout.n_stages + len(model.config.specialists) - 1, model.positions(ids)
    with torch.no_grad():
        x0 = model.embed(ids)
        compute = partial(frozen_state, model, x0, ids, places)
        x = compute() if keep is None else keep(ids, compute)
    x = model.run_stage(k, x, x0, ids, places)
    loss, ce, grad = head_backward(model, x, k, targets, head_chunks(targets, model.config.vocab_size), None, objective,
                                   scale)
    torch.autograd.backward(x, grad)
    return MicroLosses(loss, ce.unsqueeze(0), None, (targets != IGNORE).sum())


@torch.no_grad()
def frozen_state(model: GPT, x0: Tensor, ids: Tensor, places: Positions) -> Tensor:
    """(B, T, D) that the last specialist reads: x0 through the base and the specialists below."""
    K, x = model.layout.n_stages, x0
    for k in (*range(K), *(K + i for i in model.layout.chains[-1][:-1])):
        x = model.run_stage(k, x, x0, ids, places)
    return x


@torch.no_grad()
def warm_start(model: GPT, words: list[list[int]]) -> None:
    """Set the chat tokens' embeddings, in the order of their ids, to those of the base's tokens of `words` (the mean,
    where a word is several tokens)."""
    wte = cast(torch.nn.Embedding, model.transformer["wte"]).weight
    assert len(words) == CHAT_TOKENS
    for row, tokens in zip(model.chat_rows, words, strict=True):
        row.copy_(wte[torch.tensor(tokens, device=wte.device)].mean(0))


@torch.no_grad()
def scale_entry(model: GPT, seed: int) -> None:
    """Set r of the last specialist's first block to a power of two near 1 / RMS of the states it reads.

    The residual stream of a trained base is long (RMS 66 a channel in the quickstart's), and every norm divides by it,
    so what zero-initialised blocks add counts for nothing for hundreds of steps. The expert stays what it was, since
    its norm undoes any scale, but for the epsilon in that. Deviation from SPEC 8, where r = 1 (runs/LOG.md has both).
    """
    shape, generator = (4, min(256, model.config.sequence_len)), torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.chat_rows.device)
    state = frozen_state(model, model.embed(ids), ids, model.positions(ids))
    rms = float(state.float().square().mean().sqrt())
    if not 0 < rms < math.inf:
        raise NumericsError(f"the base's last state is of size {rms}", "specialist.scale_entry",
                            "the base is broken: use an earlier step")
    cast(Specialist, model.specialists[-1]).resid_lambdas[0] = 2.0 ** -round(math.log2(rms))
