"""Targets of packed rows, and the loss of the pooled expert. The stages' own losses are in head.py."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE = -1              # a target that does not count


def split_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Packed rows (B, T+1) -> inputs (B, T), targets (B, T) with IGNORE where there is none.

    An entry of a row is a token id, or ~id (its bitwise complement, negative) for a token that nobody is to predict.
    """
    return torch.where(rows < 0, ~rows, rows)[:, :-1], rows[:, 1:].clamp(min=IGNORE)


@torch.no_grad()
def pooled_nats(pool: Tensor, n: int, targets: Tensor) -> Tensor:
    """Sum over (N,) targets of -log softmax(pool / n)[target]; `pool` (N, V) fp32 is the sum of n stages'
    log-probabilities, and is overwritten.

    They are those of capped logits, -30 - ln V at the least, so no maximum is taken off before exp.
    """
    pool /= n
    picked = pool.gather(1, targets[:, None]).sum()
    return pool.exp_().sum(1).log().sum() - picked
