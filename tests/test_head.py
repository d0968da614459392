"""The fused head and loss against the plain autograd form: losses, pool and every gradient, and the memory held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nanopoe.config import experiment_from_dict
from nanopoe.config.schema import ObjectiveConfig
from nanopoe.dist import World
from nanopoe.model import GPT
from nanopoe.model.gpt import norm
from nanopoe.model.head import FusedHead, chunk_rows, head_backward, head_chunks
from nanopoe.model.loss import pooled_nats
from nanopoe.train.bench_head import bench_head
from tests.ranks import experiment_dict, model_config

CE = ObjectiveConfig(kind="ce", alpha=0.0, rho=None)
LOGOP = ObjectiveConfig(kind="residual_logop", alpha=0.0, rho=0.4)
HEADS: dict[str, dict[str, Any]] = {
    "shared head": {}, "stage heads": {"stage_heads": True},
    "specialist": {"specialists": ({"n_layer": 1, "parent": None},)}}


def lively(dtype: torch.dtype = torch.float32, spread: float = 0.3, **changes: Any) -> GPT:
    """A model in which nothing is zero; the cap bends its logits."""
    model = GPT(model_config(**changes), dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, spread, generator=generator)
    return model


def plain(model: GPT, x: Tensor, k: int, targets: Tensor, pool: Tensor | None, objective: ObjectiveConfig,
          scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """head_backward by autograd over all rows, the ignored ones too; `pool` (B*T, V)."""
    states = x.detach().flatten(0, 1).requires_grad_()
    z = F.linear(norm(states), model.head_weight(k).to(x.dtype)).float()
    logits = 15 * torch.tanh(z / 15)
    loss = ce = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="sum")
    log_p = logits.log_softmax(-1)
    if objective.kind == "residual_logop" and k > 0:
        assert objective.rho is not None and pool is not None
        residual = F.cross_entropy((pool + log_p) / (k + 1), targets.flatten(), ignore_index=-1, reduction="sum")
        loss = (1 - objective.rho) * ce + objective.rho * (k + 1) * residual
    if pool is not None:
        pool += log_p.detach()
    (loss * scale).backward()
    assert states.grad is not None
    return loss.detach(), ce.detach(), states.grad.view_as(x)


def inputs(dtype: torch.dtype, rows: int = 5, T: int = 16) -> tuple[Tensor, Tensor]:
    """States (rows, T, 32) and targets, a third of them ignored."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, T, 32, generator=generator)
    targets = torch.randint(300, (rows, T), generator=generator)
    return (3 * x).to(dtype), targets.masked_fill(torch.rand(rows, T, generator=generator) < 1 / 3, -1)


def gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.fixture(params=["one tile", "tiles and chunks"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once all at once; once 7 rows and 64 columns at a time, and 300 is no multiple of 64."""
    if request.param != "one tile":
        monkeypatch.setattr("nanopoe.model.head.CHUNK_ELEMENTS", 300 * 7)
        monkeypatch.setattr("nanopoe.model.head.TILE_ELEMENTS", 64 * 7)


@pytest.mark.usefixtures("cut")
@pytest.mark.parametrize("objective", [CE, LOGOP], ids=["ce", "logop"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_fused_head_is_the_plain_form(heads: str, objective: ObjectiveConfig, dtype: torch.dtype) -> None:
    """fp32: all within 1e-6. bf16: losses within 1e-6 of the same logits, gradients as near as bf16 rounds (2^-8)."""
    ours, theirs = lively(dtype, **HEADS[heads]), lively(dtype, **HEADS[heads])
    stages = [ours.layout.n_stages] if heads == "specialist" else [0, 1]
    targets = inputs(dtype)[1]
    kept, chunks = targets.flatten() != -1, head_chunks(targets, 300)
    pool = None if heads == "specialist" else [torch.zeros(len(rows), 300) for rows in chunks]
    theirs_pool = None if heads == "specialist" else torch.zeros(targets.numel(), 300)
    if heads == "specialist" and objective is LOGOP:
        return                                                       # the configuration refuses it
    for k in stages:
        x = inputs(dtype)[0] * (1 + 0.2 * k)
        a = head_backward(ours, x, k, targets, chunks, pool, objective, 0.01)
        b = plain(theirs, x, k, targets, theirs_pool, objective, 0.01)
        for found, expected in zip(a[:2], b[:2], strict=True):
            assert float(found) == pytest.approx(float(expected), rel=1e-6)
        assert (float(a[0]) == float(a[1])) == (objective is CE or k == 0)         # what is minimised is not always ce
        limit = 1e-6 if dtype == torch.float32 else 6e-3
        assert gap(a[2], b[2]) < limit
        assert not a[2].flatten(0, 1)[~kept].any() and a[2].flatten(0, 1)[kept].any(1).all()
        if pool is not None and theirs_pool is not None:
            assert gap(torch.cat(pool), theirs_pool[kept]) < 1e-6
    seen = 0
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None and q.grad is not None:
            assert gap(p.grad, q.grad) < limit, name
            seen += 1
    assert seen == {"shared head": 1, "stage heads": 3, "specialist": 1}[heads]


def test_the_check_sees_a_wrong_gradient() -> None:
    """Control: without the cap's slope, or with one target moved, the gap is far above what is allowed."""
    x, targets = inputs(torch.float32)
    model, other = lively(), lively()
    found = head_backward(model, x, 0, targets, head_chunks(targets, 300), None, CE, 1.0)[2]
    moved = targets.clone()
    moved[0, 0] = (moved[0, 0] + 1) % 300
    assert gap(plain(other, x, 0, moved, None, CE, 1.0)[2], found) > 1e-2
    states = x.flatten(0, 1).clone().requires_grad_()
    F.cross_entropy(F.linear(norm(states), model.head_weight(0)), targets.flatten(), ignore_index=-1,
                    reduction="sum").backward()
    assert states.grad is not None and gap(states.grad.view_as(x), found) > 1e-2


@pytest.mark.parametrize("kept", [0, 1, 80])
def test_few_targets_or_none(kept: int) -> None:
    """No target at all, one, and every row: in place of nothing there are zeros, and the head has a gradient."""
    x, targets = inputs(torch.float32)
    targets = torch.arange(80).view_as(targets).masked_fill(torch.arange(80).view_as(targets) >= kept, -1)
    ours, theirs = lively(), lively()
    a = head_backward(ours, x, 1, targets, head_chunks(targets, 300), None, CE, 1.0)
    b = plain(theirs, x, 1, targets, None, CE, 1.0)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert ours.lm_head.weight.grad is not None and theirs.lm_head.weight.grad is not None
    torch.testing.assert_close(ours.lm_head.weight.grad, theirs.lm_head.weight.grad, rtol=1e-5, atol=1e-6)
    assert bool(ours.lm_head.weight.grad.any()) == (kept > 0) == bool(a[0] > 0)


def test_logits_at_the_cap_and_what_is_not_finite() -> None:
    """z up to +-1e4: the loss is finite and that of the capped logits. A NaN in one row stays in the sums for all."""
    weight = torch.randn(300, 8, generator=torch.Generator().manual_seed(0)) * 1000
    h, y = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)), torch.arange(6)
    fused = FusedHead(weight, 6, 0, CE, 1.0)
    gradient = fused.chunk(h, y, None)
    expected = F.cross_entropy(15 * torch.tanh(h @ weight.T / 15), y, reduction="sum")
    assert float(fused.ce) == pytest.approx(float(expected), rel=1e-6) and bool(gradient.isfinite().all())
    h[3, 2] = torch.nan
    fused = FusedHead(weight, 6, 0, CE, 1.0)
    fused.chunk(h, y, None)
    assert bool(fused.ce.isnan()) and bool(fused.d_weight.isnan().any())


def test_the_pools_loss() -> None:
    log_p = [(4 * torch.randn(9, 50, generator=torch.Generator().manual_seed(i))).log_softmax(-1) for i in range(3)]
    y = torch.arange(9)
    expected = F.cross_entropy(torch.stack(log_p).mean(0), y, reduction="sum")
    assert float(pooled_nats(torch.stack(log_p).sum(0), 3, y)) == pytest.approx(float(expected), rel=1e-6)
    assert float(pooled_nats(log_p[0].clone(), 1, y)) != pytest.approx(float(expected), rel=1e-2)


def test_memory_does_not_grow_with_the_rows() -> None:
    """What the fused head holds beside its head's gradient is of a chunk; the plain form holds several (B*T, V)."""
    def held(rows: int) -> int:
        fused = FusedHead(torch.zeros(32768, 8), min(rows, chunk_rows(32768, torch.device("cpu"))), 0, CE, 1.0)
        return fused.gradient.nbytes + fused.tiles.nbytes

    assert held(64) < held(512) == held(8192) < 8192 * 32768 * 4 / 8


def test_the_bench_compares_equal_things(data: Any, tmp_path: Any) -> None:
    found = bench_head(experiment_from_dict(experiment_dict(data, tmp_path), "test"),
                       World(0, 1, torch.device("cpu")), steps=1)
    assert found["heads"] == 2 and found["loss_gap"] < 1e-6 and found["gradient_gap"] < 1e-5
    arms = found["arms"]
    assert found["time_ratio"] == pytest.approx(arms["fused"]["seconds"] / arms["materialised"]["seconds"])
    assert arms["materialised"]["bytes"] > 3 * found["rows"] * found["vocab_size"] * 4  # more than once
