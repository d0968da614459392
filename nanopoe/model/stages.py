"""Stage-local training: forward and backward one stage at a time, the gradient cut at every boundary (SPEC 2).

`detach` at a boundary sits here and only here. Since only x0 and the heads are shared between stages, stage k runs
its backward right after its forward and frees its activations; the gradients into x0 are summed over the stages
and sent once through smear and embedding at the end. The result is that of the joint graph with detached boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ModelConfig, ObjectiveConfig
from nanopoe.model.gpt import GPT
from nanopoe.model.head import head_backward, head_chunks
from nanopoe.model.loss import IGNORE, pooled_nats


@dataclass(frozen=True)
class MicroLosses:
    """Of one micro-batch, sums in nats: `total` as minimised before scaling, `stages` (K',) plain cross-entropy."""

    total: Tensor                # ()
    stages: Tensor               # (K',)
    pool: Tensor | None          # () cross-entropy of the pooled expert, if asked for
    targets: Tensor              # () int64, unmasked


def stage_weight(n_stages: int, alpha: float) -> float:
    """Weight of a stage's loss in the total: 1 / K^(1-alpha)."""
    return float(n_stages) ** (alpha - 1.0)


def shared_parameters(model: GPT) -> tuple[str, ...]:
    """Names of what every stage's backward adds to: their gradients are complete only when backward_stages returns."""
    several = model.layout.n_stages > 1 and not model.config.specialists
    return ("lm_head.weight", "resid_lambdas", "x0_lambdas") if several else ()


def trained_losses(model: GPT) -> int:
    """K' of MicroLosses.stages: the stages of a base, or the one specialist that is trained."""
    return 1 if model.config.specialists else model.layout.n_stages


class Part(Protocol):
    """Consecutive stages of a `flat` model, and what stands at their ends."""

    @property
    def stages(self) -> range: ...

    def enter(self, x0: Tensor) -> Tensor:
        """What the first of them reads, (B, T, D): x0 itself, or the state of the stage before."""

    def leave(self, x: Tensor) -> None:
        """Takes the state (B, T, D) behind the last of them, before its backward; it is never changed."""


def backward_stages(model: GPT, ids: Tensor, targets: Tensor, objective: ObjectiveConfig, scale: float,
                    report_pool: bool = False, part: Part | None = None) -> MicroLosses:
    """Add the gradients of scale * total loss (a sum over targets) to every `.grad`. ids, targets (B, T) int64.

    total = sum_k loss_k / K^(1-alpha). BP is the case K = 1; `hier` keeps the boundaries connected, so its stages
    run backward together at the end. With `part` only its stages run: losses are theirs, and there is no pool.
    """
    K = model.layout.n_stages
    stages = range(K) if part is None else part.stages
    assert part is None or (model.config.poe_mode == "flat" and objective.kind == "ce" and not report_pool)
    local = model.config.poe_mode == "flat"
    weight = stage_weight(K, objective.alpha)
    pool = None
    chunks = head_chunks(targets, model.config.vocab_size)
    if objective.kind == "residual_logop" or (report_pool and K > 1):
        pool = [torch.zeros(len(rows), model.config.vocab_size, device=ids.device) for rows in chunks]
    embedded = model.embed(ids)
    x0 = embedded.detach().requires_grad_()                           # stages leave their gradients in x0.grad
    places = model.positions(ids)
    x = x0 if part is None else part.enter(x0)
    boundaries, gradients, totals, plain = [], [], [], []
    for k in stages:
        injected = x0.detach() if model.config.detach_x0 and k > 0 else x0
        x = model.run_stage(k, x, injected, ids, places)
        if part is not None and k == stages[-1]:
            part.leave(x.detach())
        loss, ce, grad = head_backward(model, x, k, targets, chunks, pool, objective, scale * weight)
        totals.append(loss * weight)
        plain.append(ce)
        if local:
            torch.autograd.backward(x, grad)
            x = x.detach()                                            # the boundary: no gradient crosses
        else:
            boundaries.append(x)
            gradients.append(grad)
    if not local:
        torch.autograd.backward(boundaries, gradients)
    if x0.grad is not None:                                           # detach_x0: later stages leave none
        embedded.backward(x0.grad)
    pool_nats = None
    if report_pool and pool is not None:
        flat = targets.reshape(-1)
        pool_nats = torch.stack([pooled_nats(log_p, K, flat[rows])
                                 for log_p, rows in zip(pool, chunks, strict=True)]).sum()
    return MicroLosses(torch.stack(totals).sum(), torch.stack(plain), pool_nats, (targets != IGNORE).sum())


def truncate(config: ModelConfig, tensors: dict[str, Tensor], n: int) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The first n stages as a model of their own: prefix n of the whole, bit for bit.

    The kept layers stay where they are, so value-embedding layers and windows are written out, not derived anew.
    """
    layout = layout_of(config)
    assert 1 <= n <= layout.n_stages and config.poe_mode != "none"
    depth = layout.boundaries[n - 1] + 1
    small = config.model_copy(update={
        "n_layer": depth, "poe_every": None,
        "poe_stage_layers": tuple(len(layout.stage_layers(k)) for k in range(n)),
        "ve_layers": tuple(i for i in layout.ve_layers if i < depth),
        "window_sizes": layout.window_sizes[:depth],
    })
    kept = {}
    for name, tensor in tensors.items():
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        limit = n if name.startswith("lm_head_stages.") else depth
        if index is None or index < limit:
            kept[name] = tensor[:depth] if name in ("resid_lambdas", "x0_lambdas") else tensor
    return small, kept
