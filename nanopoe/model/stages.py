"""Stage-local training: forward and backward one stage at a time, the gradient cut at every boundary (SPEC 2).

`detach` at a boundary sits here and only here. Since only x0 and the heads are shared between stages, stage k runs
its backward right after its forward and frees its activations; the gradients into x0 are summed over the stages
and sent once through smear and embedding at the end. The result is that of the joint graph with detached boundaries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nanopoe.config.layout import CHUNK_ELEMENTS, layout_of
from nanopoe.config.schema import ModelConfig, ObjectiveConfig
from nanopoe.model.gpt import GPT, capped_logits, norm
from nanopoe.model.loss import IGNORE, nats, stage_loss


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


def backward_stages(model: GPT, ids: Tensor, targets: Tensor, objective: ObjectiveConfig, scale: float,
                    report_pool: bool = False) -> MicroLosses:
    """Add the gradients of scale * total loss (a sum over targets) to every `.grad`. ids, targets (B, T) int64.

    total = sum_k loss_k / K^(1-alpha). BP is the case K = 1; `hier` keeps the boundaries connected, so its stages
    run backward together at the end.
    """
    K = model.layout.n_stages
    local = model.config.poe_mode == "flat"
    weight = stage_weight(K, objective.alpha)
    pool = None
    if objective.kind == "residual_logop" or (report_pool and K > 1):
        pool = torch.zeros(ids.numel(), model.config.vocab_size, device=ids.device)
    embedded = model.embed(ids)
    x0 = embedded.detach().requires_grad_()                           # stages leave their gradients in x0.grad
    rope = model.rope(ids)
    x: Tensor = x0
    boundaries, gradients, totals, plain = [], [], [], []
    for k in range(K):
        injected = x0.detach() if model.config.detach_x0 and k > 0 else x0
        x = model.run_stage(k, x, injected, ids, rope)
        loss, ce, grad = head_backward(model, x, k, targets, pool, objective, scale * weight)
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
    assert x0.grad is not None
    embedded.backward(x0.grad)
    pool_nats = None
    if report_pool and pool is not None:
        rows = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
        parts = zip(pool.split(rows), targets.reshape(-1).split(rows), strict=True)
        pool_nats = torch.stack([nats(log_p / K, y) for log_p, y in parts]).sum()
    return MicroLosses(torch.stack(totals).sum(), torch.stack(plain), pool_nats, (targets != IGNORE).sum())


def head_backward(model: GPT, x: Tensor, k: int, targets: Tensor, pool: Tensor | None, objective: ObjectiveConfig,
                  scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Head and loss of stage k in chunks of rows, each run backward at once, so that (B*T, V) is never held.

    Adds the gradients of the heads; returns (loss sum, cross-entropy sum, gradient (B, T, D) into x).
    """
    states, flat_targets = x.detach().view(-1, x.size(-1)), targets.reshape(-1)
    head = model.head_weight(k)
    weight = head.detach().requires_grad_()                           # heads are added up once, not once a chunk
    rows = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    loss_sum = torch.zeros((), device=x.device)
    ce_sum = torch.zeros((), device=x.device)
    gradients = []
    for start in range(0, states.size(0), rows):
        part = slice(start, start + rows)
        h = states[part].requires_grad_()
        loss, ce = stage_loss(capped_logits(norm(h), weight), flat_targets[part], k,
                              None if pool is None else pool[part], objective)
        (loss * scale).backward()
        assert h.grad is not None
        gradients.append(h.grad)
        loss_sum += loss.detach()
        ce_sum += ce.detach()
    assert weight.grad is not None
    head.backward(weight.grad)
    return loss_sum, ce_sum, torch.cat(gradients).view_as(x)


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
