"""The pool's identities (SPEC 2, 3), each with an aggregation or a view for which it must not hold."""

from __future__ import annotations

import pytest
import torch

from nanopoe.errors import ConfigError
from nanopoe.model.pool import View, aggregate, diversity, view_logps

K, ROWS, V = 4, 64, 97


@pytest.fixture
def logps() -> torch.Tensor:
    """(K, ROWS, V) experts that agree on something and differ on the rest."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(ROWS, V, generator=generator)
    return (2 * common + torch.randn(K, ROWS, V, generator=generator)).log_softmax(-1)


@pytest.fixture
def targets() -> torch.Tensor:
    return torch.randint(V, (ROWS,), generator=torch.Generator().manual_seed(1))


def nll(logps: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return -logps.gather(-1, targets[:, None])[:, 0]


def test_pool_is_normalised_and_renormalise_false_is_not(logps):
    for alpha in (0.0, 0.25, 0.5, 1.0):
        mass = aggregate(logps, alpha).exp().sum(-1)
        assert torch.allclose(mass, torch.ones(ROWS), atol=1e-5)
        assert (aggregate(logps, alpha, renormalise=False).exp().sum(-1) < 0.99).all()


def test_alpha_is_a_temperature_of_the_mean(logps):
    for alpha, scale in ((0.0, 1.0), (0.5, K ** 0.5), (1.0, float(K))):
        expected = (scale * logps.mean(0)).log_softmax(-1)
        assert torch.allclose(aggregate(logps, alpha), expected, atol=1e-5)
    assert not torch.allclose(aggregate(logps, 1.0), aggregate(logps, 0.0), atol=1e-2)


def test_diversity_identity_per_token_holds_for_the_pool_only(logps, targets):
    mean_ce = torch.stack([nll(l, targets) for l in logps]).mean(0)
    assert torch.allclose(nll(aggregate(logps), targets), mean_ce - diversity(logps), atol=1e-5)
    arithmetic = logps.exp().mean(0).log()
    assert not torch.allclose(nll(arithmetic, targets), mean_ce - diversity(logps), atol=1e-2)
    assert not torch.allclose(nll(aggregate(logps, 0.5), targets), mean_ce - diversity(logps), atol=1e-2)


def test_diversity_is_the_mean_divergence(logps):
    pool = aggregate(logps)
    divergence = (pool.exp() * (pool - logps)).sum(-1).mean(0)             # (ROWS,) by its definition
    assert torch.allclose(diversity(logps), divergence, atol=1e-5)
    assert (diversity(logps) > 1e-3).all()
    assert diversity(logps[:1].expand(K, -1, -1)).abs().max() < 1e-5       # equal experts: none


def test_unnormalised_pool_is_the_mean_stage_loss(logps, targets):
    mean_ce = torch.stack([nll(l, targets) for l in logps]).mean()
    assert torch.allclose(nll(aggregate(logps, renormalise=False), targets).mean(), mean_ce, atol=1e-5)
    assert nll(aggregate(logps), targets).mean() < mean_ce - 1e-3


def test_argmax_does_not_depend_on_alpha(logps):
    best = aggregate(logps).argmax(-1)
    for alpha in (0.25, 0.5, 0.75, 1.0):
        assert torch.equal(aggregate(logps, alpha).argmax(-1), best)
    assert not torch.equal(logps[0].argmax(-1), best)


def test_views(logps):
    def view(text: str) -> torch.Tensor:
        return view_logps(logps, View.parse(text), K)

    assert torch.equal(view(f"prefix:{K}"), view("full"))
    assert torch.equal(view("prefix:1"), view("stage:0"))
    assert torch.equal(view("stage:2"), logps[2])
    assert torch.equal(view("prefix:3"), aggregate(logps[:3]))             # the truncated model, bitwise
    assert not torch.equal(view("prefix:3"), view("full"))
    assert not torch.equal(view("stage:1"), view("prefix:2"))


def test_one_expert_is_unchanged_for_every_alpha(logps):
    for alpha in (0.0, 1.0):
        assert torch.equal(aggregate(logps[:1], alpha), logps[0])
    assert not torch.equal(aggregate(logps[:2], 1.0), aggregate(logps[:2], 0.0))


def test_iterable_equals_tensor_and_later_stages_are_not_computed(logps):
    assert torch.equal(aggregate(iter(list(logps))), aggregate(logps))
    ran = []

    def stages():
        for k in range(K):
            ran.append(k)
            yield logps[k]

    view_logps(stages(), View.parse("prefix:2"), K)
    assert ran == [0, 1]
    view_logps(stages(), View.parse("full"), K)
    assert ran == [0, 1, 0, 1, 2, 3]


@pytest.mark.parametrize("text", ["", "ful", "full:1", "stage:", "stage:-1", "stage:1.5", "prefix:²", "prefix: 1"])
def test_unknown_view_is_refused(text):
    with pytest.raises(ConfigError, match="unknown view"):
        View.parse(text)


@pytest.mark.parametrize("text", ["full", "stage:0", "stage:3", "prefix:1", "prefix:4"])
def test_parse_round_trips(text):
    assert str(View.parse(text)) == text
    assert len(View.parse(text).stages(K)) >= 1


@pytest.mark.parametrize("text", ["stage:4", "prefix:0", "prefix:5"])
def test_view_the_model_lacks_is_refused(text):
    with pytest.raises(ConfigError, match="has 4 stages"):
        View.parse(text).stages(K)


@pytest.mark.parametrize("text", ["stage:0", "prefix:1"])
def test_bp_model_has_only_the_full_view(text):
    with pytest.raises(ConfigError, match="trained without stage losses; only full is valid"):
        View.parse(text).stages(1, "none")
    assert View.parse("full").stages(1, "none") == range(1)
