"""The trunk and its stages: locality, stage-local backward against the joint graph, prefixes, init."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ObjectiveConfig
from nanopoe.model import GPT
from nanopoe.model.attention import attend
from nanopoe.model.stages import backward_stages, stage_weight, truncate
from tests.ranks import model_config

CE = ObjectiveConfig(kind="ce", alpha=0.0, rho=None)
LOGOP = ObjectiveConfig(kind="residual_logop", alpha=0.0, rho=0.5)


def lively(seed: int = 0, **changes: Any) -> GPT:
    """A model in which nothing is zero, so that every path carries signal."""
    model = GPT(model_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.3, generator=generator)
    return model


def batch(rows: int = 3, T: int = 32, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, 300, (rows, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


def joint_loss(model: GPT, ids: torch.Tensor, targets: torch.Tensor, objective: ObjectiveConfig,
               only: int | None = None) -> torch.Tensor:
    """The total loss (mean over targets) written plainly: one graph, `detach` at each boundary if flat."""
    K, cut = model.layout.n_stages, model.config.poe_mode == "flat"
    x0 = model.embed(ids)
    x, places, logps, losses = x0, model.positions(ids), [], []
    for k in range(K):
        x = model.run_stage(k, x, x0.detach() if model.config.detach_x0 and k else x0, ids, places)
        logp = model.stage_logits(x, k).log_softmax(-1).flatten(0, 1)
        ce = F.nll_loss(logp, targets.flatten())
        if objective.kind == "residual_logop":
            q = ((torch.stack([p.detach() for p in logps] + [logp])).sum(0) / (k + 1)).log_softmax(-1)
            ce = (1 - objective.rho) * ce + objective.rho * (k + 1) * F.nll_loss(q, targets.flatten())
        logps.append(logp)
        losses.append(ce)
        x = x.detach() if cut else x
    if only is not None:
        return losses[only]
    return torch.stack(losses).sum() * stage_weight(K, objective.alpha)


def stage_of(name: str, model: GPT) -> int | None:
    """The stage that owns a parameter; None for what all share."""
    if name.startswith("lm_head_stages."):
        return int(name.split(".")[1])
    if name.startswith(("transformer.h.", "value_embeds.")):
        layer = int(next(part for part in name.split(".") if part.isdigit()))
        return next(k for k, last in enumerate(model.layout.boundaries) if layer <= last)
    return None


FLAT: list[dict[str, Any]] = [{}, {"stage_heads": True}, {"detach_x0": True},
                              {"poe_every": None, "poe_stage_layers": (1, 2, 1), "n_kv_head": 1}]
CONNECTED: list[dict[str, Any]] = [{"poe_mode": "hier"}, {"poe_mode": "none", "poe_every": None}]
HALF = ObjectiveConfig(kind="ce", alpha=0.5, rho=None)


@pytest.mark.parametrize("changes, objective", [*((c, o) for c in FLAT for o in (CE, LOGOP, HALF)),
                                                *((c, o) for c in CONNECTED for o in (CE, HALF))])
def test_stage_local_backward_equals_the_joint_graph(changes: dict[str, Any], objective: ObjectiveConfig) -> None:
    ids, targets = batch()
    ours, theirs = lively(**changes), lively(**changes)
    losses = backward_stages(ours, ids, targets, objective, 1 / targets.numel())
    total = joint_loss(theirs, ids, targets, objective)
    total.backward()
    assert float(losses.total) / targets.numel() == pytest.approx(float(total.detach()), rel=1e-6)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        if p.requires_grad:
            assert p.grad is not None and q.grad is not None, name
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)
            assert q.grad.abs().max() > 0, name


@pytest.mark.parametrize("objective", [CE, LOGOP])
def test_locality(objective: ObjectiveConfig) -> None:
    """d loss_k / d (own parameters of stage j) is exactly 0 for j != k, not 0 for j = k; hier is the control arm."""
    ids, targets = batch()
    for k in range(2):
        model = lively(stage_heads=True)
        joint_loss(model, ids, targets, objective, only=k).backward()
        for name, p in model.named_parameters():
            owner = stage_of(name, model)
            size = 0.0 if p.grad is None else float(p.grad.abs().max())
            if owner is not None:
                assert (size > 0) == (owner == k), (name, k, size)
    for field in ("resid_lambdas", "x0_lambdas"):                   # vectors over layers: stage 1 owns the second half
        grad = getattr(model, field).grad
        assert torch.equal(grad[:2], torch.zeros(2)) and bool((grad[2:] != 0).all())
    model = lively(poe_mode="hier")
    joint_loss(model, ids, targets, CE, only=1).backward()
    assert float(model.transformer["h"][0].attn.c_q.weight.grad.abs().max()) > 0


def test_backward_stages_is_local_itself() -> None:
    """Stage 1's parameters cannot change what stage 0 learns; they do under hier."""
    ids, targets = batch()
    grads = {}
    for mode in ("flat", "hier"):
        for seed in (0, 1):
            model = lively(poe_mode=mode)
            with torch.no_grad():
                model.transformer["h"][2].mlp.c_fc.weight.mul_(1.0 + seed)
            backward_stages(model, ids, targets, CE, 1.0)
            grads[mode, seed] = model.transformer["h"][0].mlp.c_fc.weight.grad
    assert torch.equal(grads["flat", 0], grads["flat", 1])
    assert not torch.equal(grads["hier", 0], grads["hier", 1])


def test_masked_targets_do_not_count() -> None:
    ids, targets = batch()
    model = lively()
    masked = targets.clone()
    masked[:, 16:] = -1
    losses = backward_stages(model, ids, masked, CE, 1.0, report_pool=True)
    full = backward_stages(lively(), ids, targets, CE, 1.0, report_pool=True)
    half = backward_stages(lively(), ids[:, :16], targets[:, :16], CE, 1.0, report_pool=True)   # causal
    assert losses.targets == 48 and full.targets == 96
    torch.testing.assert_close(losses.stages, half.stages)
    torch.testing.assert_close(losses.pool, half.pool)
    assert not torch.allclose(losses.stages, full.stages)
    nothing = backward_stages(lively(), ids, torch.full_like(targets, -1), CE, 1.0)
    assert float(nothing.total) == 0.0 and nothing.targets == 0


def test_chunks_of_rows_do_not_change_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, targets = batch()
    whole, parts = lively(), lively()
    a = backward_stages(whole, ids, targets, LOGOP, 1.0, report_pool=True)
    monkeypatch.setattr("nanopoe.model.head.CHUNK_ELEMENTS", 300 * 7)
    b = backward_stages(parts, ids, targets, LOGOP, 1.0, report_pool=True)
    torch.testing.assert_close(a.stages, b.stages)
    torch.testing.assert_close(a.pool, b.pool)
    assert not torch.allclose(b.pool, b.stages[0])                  # control: the pool is not a stage
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"stage_heads": True, "sequence_len": 512}])
def test_a_prefix_is_the_truncated_model_bitwise(changes: dict[str, Any]) -> None:
    model = lively(n_layer=6, poe_every=2, **changes)
    ids, _ = batch(2, 200 if "sequence_len" in changes else 32)
    states = model.boundary_states(ids)
    for n in (1, 2):
        config, tensors = truncate(model.config, dict(model.named_parameters()), n)
        small = GPT(config)
        small.load_state_dict(tensors)
        for k, x in enumerate(small.boundary_states(ids)):
            assert torch.equal(x, states[k])
            assert torch.equal(small.stage_logits(x, k), model.stage_logits(states[k], k))
        # control: a model of that depth by the rules alone has other windows and value-embedding layers
        assert layout_of(config).ve_layers == tuple(i for i in model.layout.ve_layers if i < 2 * n)
        assert layout_of(config).window_sizes == model.layout.window_sizes[: 2 * n]


def test_windows_of_attention() -> None:
    """Position t sees t-window..t, both ends included; the naive softmax is the reference."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 40, 8, generator=generator) for h in (4, 2, 2))
    t = torch.arange(40)
    for window in (1, 5, 39, 100):
        seen = (t[None] <= t[:, None]) & (t[None] >= t[:, None] - window)
        scores = q @ k.repeat_interleave(2, 1).mT / 8**0.5
        naive = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(attend(q, k, v, window), naive, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(attend(q[:, :, -1:], k, v, window), naive[:, :, -1:], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(attend(q[:, :, -7:], k, v, window), naive[:, :, -7:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(attend(q, k, v, 5), attend(q, k, v, 6))


def test_smear_uses_the_embedding_before_smearing() -> None:
    model = lively()
    ids, _ = batch(1)
    x = F.rms_norm(model.transformer["wte"](ids), (32,))
    gate = model.smear_lambda * torch.sigmoid(x[..., :24] @ model.smear_gate.weight.T)
    expected = x.clone()
    for t in range(1, 32):
        expected[:, t] += gate[:, t] * x[:, t - 1]
    torch.testing.assert_close(model.embed(ids), expected)
    assert not torch.allclose(model.embed(ids), x)


def test_initial_weights() -> None:
    def built(seed: int, **changes: Any) -> dict[str, torch.Tensor]:
        with torch.device("meta"):
            model = GPT(model_config(**changes))
        model.to_empty(device="cpu")
        model.init_weights(seed)
        return {n: p.detach() for n, p in model.named_parameters()}

    a, other = built(1), built(2)
    bound = (3 / 32) ** 0.5
    assert float(a["transformer.h.0.attn.c_q.weight"].abs().max()) <= bound
    assert float(a["transformer.h.0.attn.c_q.weight"].std()) == pytest.approx(32**-0.5, rel=0.1)
    assert float(a["transformer.h.0.mlp.c_fc.weight"].abs().max()) <= 0.4 * bound
    assert float(a["transformer.wte.weight"].std()) == pytest.approx(0.8, rel=0.05)
    assert float(a["lm_head.weight"].std()) == pytest.approx(0.001, rel=0.05)
    assert 0 <= float(a["smear_gate.weight"].min()) <= float(a["smear_gate.weight"].max()) <= 0.02
    for name in ("transformer.h.1.attn.c_proj.weight", "transformer.h.1.mlp.c_proj.weight", "smear_lambda"):
        assert not bool(a[name].any())
    torch.testing.assert_close(a["resid_lambdas"], torch.tensor([1.15, 1.15 - 0.1 / 3, 1.15 - 0.2 / 3, 1.05]))
    torch.testing.assert_close(a["x0_lambdas"], torch.tensor([0.20, 0.15, 0.10, 0.05]))
    bp = built(1, poe_mode="none", poe_every=None)                    # arms with one seed start from one trunk
    assert all(torch.equal(a[n], bp[n]) for n in bp)
    assert not torch.equal(a["transformer.wte.weight"], other["transformer.wte.weight"])
    assert not torch.equal(a["transformer.h.0.attn.c_q.weight"], a["transformer.h.0.attn.c_k.weight"])


def test_backout_is_for_bp_alone() -> None:
    ids, _ = batch()
    for mode, moves in (("none", True), ("flat", False), ("hier", False)):
        model = lively(poe_mode=mode, poe_every=None if mode == "none" else 2)
        before = model(ids)
        with torch.no_grad():
            model.backout_lambda += 1.0
        assert torch.equal(before, model(ids)) != moves
        assert model.backout_lambda.requires_grad == moves
