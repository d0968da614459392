"""Head and loss of a stage, forward and backward at once and without autograd: (B*T, V) is never held (SPEC 2).

With s = sigmoid(2 z / 15) the capped logits are 15 tanh(z / 15) = 30 s - 15 and their slope is 4 s (1 - s); for
p = softmax(30 s) the gradient of cross-entropy into z = h W^T is (p - onehot) 4 s (1 - s). 30 s lies in [0, 30], so
exp(30 s) needs no maximum taken off first, and its sum is a factor of a row: a tile of logits goes through the cache
once, and the rows of all tiles are divided by their sums when these are known.

residual_logop needs p and q together: the gradient is ((1-rho) p + rho q - onehot) 4 s (1 - s), where the factors k+1
of the loss and 1/(k+1) of the exponent cancel and the normaliser of l_k adds nothing, since q - onehot sums to 0. There
all s are kept until both sums are known.

Powers of two everywhere: on CPUs torch has vector code of its own for exp2, while exp and tanh go through MKL, which on
those of AMD takes 30 to 80 times as long (runs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nanopoe.config.layout import CHUNK_ELEMENTS
from nanopoe.config.schema import ObjectiveConfig
from nanopoe.model.gpt import GPT, SOFTCAP, norm
from nanopoe.model.loss import IGNORE

CPU_ROWS = 512              # of a chunk on a CPU at most: fewer read the head too often, more gain nothing (LOG.md)
TILE_ELEMENTS = 1 << 20     # logits that go through a CPU's cache together
LOG2_E = math.log2(math.e)
SPAN = 2 * SOFTCAP          # capped logits lie in [-15, 15]; 30 s is 15 more


def chunk_rows(vocab_size: int, device: torch.device) -> int:
    """The most rows that go through the head together."""
    rows = max(1, CHUNK_ELEMENTS // vocab_size)
    return min(rows, CPU_ROWS) if device.type == "cpu" else rows


def head_chunks(targets: Tensor, vocab_size: int) -> tuple[Tensor, ...]:
    """Rows of (B*T,) that go through the head together: those with a target, chunk_rows of them.

    Conversations have targets in a fifth of their rows, so most of the head's work is not there. One synchronisation
    with a GPU.
    """
    rows = (targets.reshape(-1) != IGNORE).nonzero().flatten()
    return rows.split(chunk_rows(vocab_size, targets.device))


def head_backward(model: GPT, x: Tensor, k: int, targets: Tensor, chunks: Sequence[Tensor],
                  pool: Sequence[Tensor] | None, objective: ObjectiveConfig,
                  scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Head and loss of stage k on x (B, T, D), in the chunks of head_chunks.

    Adds scale * gradient of the loss to the heads; returns (loss sum, cross-entropy sum, both fp32 in nats, scaled
    gradient (B, T, D) into x). `pool` holds for each chunk (N, V) fp32 sum_{j<k} l_j of the stages before and gets l_k
    added in place; residual_logop always needs it, for ce it is kept only to report the pool's loss.
    """
    states, flat_targets = x.detach().view(-1, x.size(-1)).requires_grad_(), targets.reshape(-1)
    normed = norm(states)
    head = model.head_weight(k)                                       # heads are added up once, not once a chunk
    rows = min(chunk_rows(head.size(0), x.device), len(states))       # not of the chunks: equal from batch to batch
    fused = FusedHead(head.detach().to(x.dtype), rows, k, objective, scale)
    gradient = torch.zeros_like(states)
    for i, at in enumerate(chunks):
        if len(at):
            gradient[at] = fused.chunk(normed.detach()[at], flat_targets[at], None if pool is None else pool[i])
    loss, ce, d_weight = fused.loss, fused.ce, fused.d_weight
    del fused                                                         # the largest memory, before more is asked for
    head.backward(d_weight)
    return loss, ce, torch.autograd.grad(normed, states, gradient)[0].view_as(x)


class FusedHead:
    """One head of stage k over chunks of rows: the sums, the gradient of the head, and memory that chunks share.

    weight (V, D) in the compute dtype, in which the matmuls run; all else is fp32. A chunk has `rows` at most.
    `loss` and `ce` are sums in nats, `d_weight` (V, D) fp32 is that of scale * loss.
    """

    def __init__(self, weight: Tensor, rows: int, k: int, objective: ObjectiveConfig, scale: float):
        self.weight, self.k, self.objective, self.scale = weight, k, objective, scale
        self.residual = objective.kind == "residual_logop" and k > 0
        vocab_size = weight.size(0)
        self.width = vocab_size if weight.device.type != "cpu" else min(vocab_size, max(64, TILE_ELEMENTS // rows))
        self.fp32 = weight.dtype == torch.float32
        self.gradient = weight.new_empty(rows, vocab_size)
        self.kept = self.gradient if self.fp32 else torch.empty_like(self.gradient, dtype=torch.float32)
        self.tiles = torch.empty(2, rows * self.width, device=weight.device)
        self.raw = self.tiles[0] if self.fp32 else weight.new_empty(rows * self.width)
        self.d_weight = torch.zeros_like(weight, dtype=torch.float32)
        self.loss, self.ce = torch.zeros(2, device=weight.device).unbind()

    @torch.no_grad()
    def chunk(self, h: Tensor, targets: Tensor, pool: Tensor | None) -> Tensor:
        """Add a chunk's share to the sums and d_weight; h (N, D) normed, targets (N,). Returns the gradient into h."""
        total, pooled, s_y = self._forward(h, targets, pool)
        ce = (total.log() - SPAN * s_y).sum()
        self.ce += ce
        gradient, at = self.gradient[:len(h)], torch.arange(len(h), device=h.device)
        if not self.residual:
            self.loss += ce
            row, dc_y = self.scale / total, (SPAN * s_y).exp() - total
        else:
            assert pool is not None and self.objective.rho is not None
            rho, u_y = self.objective.rho, pool[at, targets] / (self.k + 1)
            self.loss += (1 - rho) * ce + rho * (self.k + 1) * (pooled.log() - u_y).sum()
            own, others = (1 - rho) / total, rho / pooled
            self._combine(pool, own, others)
            row, dc_y = torch.full_like(total, self.scale), own * (SPAN * s_y).exp() + others * u_y.exp() - 1
        if pool is not None:
            pool -= total.log()[:, None]
        row = (4 * row)[:, None]
        self._scale_rows(row)
        gradient[at, targets] = (dc_y * (1 - s_y) * s_y * row[:, 0]).to(gradient.dtype)  # scatter_ would copy it all
        if self.fp32:
            self.d_weight.addmm_(gradient.T, h)
        else:
            self.d_weight += gradient.T @ h
        return gradient @ self.weight

    def _forward(self, h: Tensor, targets: Tensor, pool: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """(sum exp(30 s), sum exp((pool + 30 s) / (k+1)) if residual, s at the target), each (N,). Adds 30 s to the
        pool. Leaves exp(30 s) s (1 - s) in `kept`, or if residual s."""
        total, pooled, s_y = torch.zeros(3, len(h), device=h.device).unbind()
        for part, z, s, e in self._parts(len(h)):
            torch.mm(h, self.weight[part].T, out=z)
            (s if self.fp32 else s.copy_(z)).mul_(-2 * LOG2_E / SOFTCAP)
            s.exp2_().add_(1).reciprocal_()
            total += torch.mul(s, SPAN * LOG2_E, out=e).exp2_().sum(1)
            inside = (targets >= part.start) & (targets < part.stop)
            found = s.gather(1, (targets - part.start).clamp(0, s.size(1) - 1)[:, None])[:, 0]
            s_y = torch.where(inside, found, s_y)
            if pool is not None:
                pool[:, part].add_(s, alpha=SPAN)
            if self.residual:
                assert pool is not None
                pooled += torch.mul(pool[:, part], LOG2_E / (self.k + 1), out=e).exp2_().sum(1)
                self.kept[:len(h), part] = s
            else:
                self._leave(e, s, part)
        return total, pooled, s_y

    def _combine(self, pool: Tensor, own: Tensor, others: Tensor) -> None:
        """Put (own exp(30 s) + others exp((pool + 30 s) / (k+1))) s (1 - s) into `kept`; own, others (N,)."""
        for part, _, e, u in self._parts(len(own)):
            s = self.kept[:len(own), part]
            torch.mul(s, SPAN * LOG2_E, out=e).exp2_().mul_(own[:, None])
            torch.mul(pool[:, part], LOG2_E / (self.k + 1), out=u).exp2_()
            self._leave(e.addcmul_(u, others[:, None]), s, part)

    def _leave(self, dc: Tensor, s: Tensor, part: slice) -> None:
        """Put dc s (1 - s) into `kept`."""
        torch.ops.aten.sigmoid_backward.grad_input(dc, s, grad_input=self.kept[:len(dc), part])

    def _scale_rows(self, row: Tensor) -> None:
        """Make `gradient` of `kept` and the factors (N, 1) of its rows, rounded once.

        Multiplied into h instead they would cost no pass, but round alike for all of the vocabulary: in bf16 the loss
        of 20 steps was 1.7 % higher (runs/LOG.md).
        """
        if self.fp32:
            self.gradient[:len(row)] *= row
            return
        for part, _, _, e in self._parts(len(row)):
            self.gradient[:len(row), part] = torch.mul(self.kept[:len(row), part], row, out=e)

    def _parts(self, rows: int) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Columns of the vocabulary, with memory (rows, columns) for z in the compute dtype, s and an exponential."""
        for start in range(0, self.weight.size(0), self.width):
            part = slice(start, min(start + self.width, self.weight.size(0)))
            size = rows * (part.stop - start)
            z, s, e = (m[:size].view(rows, -1) for m in (self.raw, *self.tiles))
            yield part, z, s, e
