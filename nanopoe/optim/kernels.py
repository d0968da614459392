"""Optimizer math on plain tensors: no state of its own, no communication. Everything is in place and deterministic."""

from __future__ import annotations

import torch
from torch import Tensor

# Polar Express, arXiv 2505.16932: 5 iterations, safety factor 2e-2, cushion 2. (a, b, c) of a X + (b A + c A^2) X.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
TINY = 2**-126            # the least normal fp32; its root is nothing beside eps, and a CPU is slow at the root of 0
CACHE_BLOCK = 1 << 18     # elements of an AdamW block; four tensors and two temporaries of it are 6 MiB


def adamw_(p: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, lr: float,
           betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """One AdamW step (arXiv 1711.05101) on any contiguous shape; `step` counts from 1. Element-wise: any rows can be a
    shard, and on a CPU it goes block by block, since what fits the cache is read once and not at every line below."""
    beta1, beta2 = betas
    block = CACHE_BLOCK if p.device.type == "cpu" else max(p.numel(), 1)
    for w, g, m, v in zip(*(t.view(-1).split(block) for t in (p, grad, exp_avg, exp_avg_sq)), strict=True):
        if weight_decay:
            w.mul_(1 - lr * weight_decay)
        m.lerp_(g, 1 - beta1)
        v.lerp_(g.square(), 1 - beta2)
        denominator = v.div(1 - beta2**step).clamp_min_(TINY).sqrt_().add_(eps)
        w.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))


def orthogonalize(update: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., m, n) -> near-orthogonal of the same shape with Frobenius norm sqrt(min(m, n)), in fp32.

    Row equilibration (arXiv 2603.28254): each row to the mean row norm, so that the spectrum is better conditioned;
    then the polar iteration in `dtype`; then the norm of an exactly semi-orthogonal matrix (arXiv 2602.21545).
    """
    m, n = update.shape[-2:]
    x = update.to(dtype)
    row_norm = x.float().norm(dim=-1, keepdim=True).clamp_min_(1e-6)
    mean_norm = x.float().norm(dim=(-2, -1), keepdim=True) / m**0.5
    x = x * (mean_norm / row_norm).to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:                   # the Gram matrix of the smaller side, min(m, n) squared
        gram = x.mT @ x if m > n else x @ x.mT
        poly = b * gram + c * (gram @ gram)
        x = a * x + (x @ poly if m > n else poly @ x)
    x = x.float()
    return x * (min(m, n) ** 0.5 / x.norm(dim=(-2, -1), keepdim=True).clamp_min_(1e-6))


def reduce_variance_(x: Tensor, second: Tensor, beta2: float) -> Tensor:
    """NorMuon (arXiv 2510.05491): scale rows (tall) or columns (wide) by a running second moment, keep the norm.

    x (..., m, n); second (..., m, 1) if m >= n else (..., 1, n), updated in place.
    """
    dim = -1 if x.size(-2) >= x.size(-1) else -2
    mean_sq = x.square().mean(dim=dim, keepdim=True)
    second.lerp_(mean_sq, 1 - beta2)
    step = second.clamp_min(1e-10).rsqrt_()
    before = mean_sq.sum(dim=(-2, -1), keepdim=True).sqrt_()
    after = (mean_sq * step.square()).sum(dim=(-2, -1), keepdim=True).sqrt_().clamp_min_(1e-10)
    return x * (step * (before / after))


def muon_(p: Tensor, grad: Tensor, momentum_buffer: Tensor, second: Tensor, lr: float, momentum: float,
          beta2: float, weight_decay: float, dtype: torch.dtype) -> None:
    """One Muon step on matrices (..., m, n) of one shape; weight decay only where update and weight agree in sign.

    The rate is multiplied by sqrt(max(1, m/n)), so a tall matrix moves its outputs as much as a square one.
    """
    m, n = p.shape[-2:]
    lr = lr * max(1.0, m / n) ** 0.5
    momentum_buffer.lerp_(grad, 1 - momentum)
    nesterov = grad.lerp(momentum_buffer, momentum)
    update = reduce_variance_(orthogonalize(nesterov, dtype), second, beta2)
    agree = (update * p) >= 0
    p.sub_(lr * update + (lr * weight_decay) * p * agree)


def second_moment_shape(m: int, n: int) -> tuple[int, int]:
    """Shape of NorMuon's factored second moment of an (m, n) matrix."""
    return (m, 1) if m >= n else (1, n)
