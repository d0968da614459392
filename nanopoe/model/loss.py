"""Losses of a stage on a chunk of rows: cross-entropy and residual_logop (SPEC 2). Sums in nats, never means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe.config.schema import ObjectiveConfig

IGNORE = -1              # a target that does not count


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows (B, T+1) -> inputs (B, T), targets (B, T) with IGNORE where there is none.

    An entry of a row is a token id, or ~id (its bitwise complement, negative) for a token that nobody is to predict.
    """
    return torch.where(rows < 0, ~rows, rows)[:, :-1], rows[:, 1:].clamp(min=IGNORE)


def nats(log_scores: Tensor, targets: Tensor) -> Tensor:
    """Sum over the unmasked targets of -log softmax(log_scores)[target]. log_scores (N, V) fp32, targets (N,)."""
    return F.cross_entropy(log_scores, targets, ignore_index=IGNORE, reduction="sum")


def stage_loss(logits: Tensor, targets: Tensor, k: int, pool: Tensor | None,
               objective: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Loss of stage k on one chunk: (what is minimised, plain cross-entropy), both sums in nats.

    logits (N, V) capped; `pool` (N, V) holds sum_{j<k} l_j of the stages before, without gradient, and gets l_k
    added in place (residual_logop always needs it; for ce it is kept only to report the pool's loss).

    residual_logop: (1-rho) CE(y, p_k) + rho (k+1) CE(y, q_k) with q_k = softmax((sum_{j<k} l_j + l_k) / (k+1)).
    The factor k+1 undoes the 1/(k+1) in the exponent, so each stage sees gradients of the same size; stage k fits
    what the pool before it lacks, and stays local.
    """
    ce = nats(logits, targets)
    if pool is None:
        return ce, ce
    log_p = logits.log_softmax(-1)
    loss = ce
    if objective.kind == "residual_logop" and k > 0:
        assert objective.rho is not None
        residual = nats((pool + log_p) / (k + 1), targets)
        loss = (1 - objective.rho) * ce + objective.rho * (k + 1) * residual
    pool += log_p.detach()
    return loss, ce
