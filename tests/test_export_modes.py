"""The modes of an exported model against our engine, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nanopoe.export.hub_code import decoding_nanopoe, modes_nanopoe
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99
from nanopoe.infer.depth import Routed, Wand
from nanopoe.infer.engine import Engine
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import Speculative
from nanopoe.infer.views import Composition
from nanopoe.model import GPT
from tests.exports import (
    DEEP,
    NEW,
    PROMPTS,
    assert_same,
    hub_model,
    new_tokens,
    padded,
    plain,
    stage_model,
)
from tests.models import live_model, run
from tests.ranks import model_config
from tests.test_speculative import chi_square_p, two_token_distribution, two_token_distribution_of_stage_0


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "heads"])
def pair(request: pytest.FixtureRequest) -> tuple[Engine, Any]:
    """Our engine and the exported model."""
    model = stage_model(request.param)
    return Engine(model), hub_model(model)


@pytest.fixture
def hub() -> Any:
    """One that a test may change."""
    return hub_model(stage_model(True))


# -- adaptive depth and routing ---------------------------------------------------------------------------------------

def test_wand_is_that_of_the_engine(pair: tuple[Engine, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, hub = pair
    full = plain(hub, PROMPTS)
    assert full == engine.generate(PROMPTS, max_new_tokens=NEW)
    answers, stats = assert_same(hub, engine, Wand(DEEP), bounds=DEEP)
    assert answers == full and stats["exits"] == [0, 0, 4 * NEW]
    for bounds in ([0.5, 0.5], [1.0, 0.2]):
        answers, stats = assert_same(hub, engine, Wand(bounds), bounds=bounds)
        assert min(stats["exits"]) > 0 and answers != full          # it left at every stage, wrongly now and then
    monkeypatch.setattr(decoding_nanopoe, "PIECE", 7)               # buffers that grow many times
    assert_same(hub, engine, Wand(bounds), bounds=bounds)
    attention = hub.model.layers[1].self_attn                       # control: the windows count
    monkeypatch.setattr(attention, "sliding_window", attention.sliding_window - 1)
    assert new_tokens(hub.generate_wand(**padded(PROMPTS), bounds=bounds, max_new_tokens=NEW),
                      padded(PROMPTS)) != answers


def test_looks_are_put_off_as_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 stages: what stage 0 leaves open, stage 1 cannot settle within these bounds, but stage 2 can."""
    model, bounds = live_model(model_config(n_layer=4, poe_every=1, stage_heads=True)), [0.1, 1.0, 0.6]
    engine, hub = Engine(model), hub_model(model)
    _, stats = assert_same(hub, engine, Wand(bounds), PROMPTS[:1], bounds=bounds)
    assert stats["exits"][2] > 0 and stats["exits"][3] > 0
    hub.config.poe_wand_lead_max_bounds = hub.config.poe_wand_lead_p99_bounds = bounds
    for name in ("lead", "lead_p99"):                               # and never, with bounds of the lead
        assert assert_same(hub, engine, Wand(bounds, lead=True), PROMPTS[:1], bounds=name)[1] != stats

    def forgetful(self: Any, k: int, rows: list[int]) -> bool:      # control: what a stage may add is forgotten
        return any(self.reach[row] > sum(self.bounds[k:]) for row in rows)

    for wrong in (forgetful, lambda *_: True):
        monkeypatch.setattr(modes_nanopoe.Wand, "looks", wrong)
        found = hub.generate_wand(torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, bounds=bounds,
                                  return_dict_in_generate=True)
        assert found.statistics != stats


def test_calibrated_bounds_give_the_text_of_generate(calibrated: tuple[GPT, list[list[int]], dict[str, Any]]) -> None:
    model, prompts, found = calibrated
    engine, hub = Engine(model), hub_model(model, calibration=found)
    full, depths = plain(hub, prompts), []
    for name, mode in (("max", Wand(found[MAX])), ("lead", Wand(found[LEAD_MAX], lead=True)),
                       ("p99", Wand(found[P99])), ("lead_p99", Wand(found[LEAD_P99], lead=True))):
        answers, stats = assert_same(hub, engine, mode, prompts, bounds=name)
        assert answers == full or name.endswith("p99")
        assert min(stats["exits"]) > 0
        depths.append(stats["mean_depth"])
    assert depths[0] > depths[1] and depths[2] > depths[3]
    assert torch.equal(hub.generate_wand(**padded(prompts)), hub.generate_wand(**padded(prompts), bounds="lead"))
    careless, _ = assert_same(hub, engine, Wand([0.0, 0.0]), prompts, bounds=[0.0, 0.0])
    assert careless != full                                         # control: bounds that do not hold
    assert careless == plain(hub, prompts, stage=0)


def test_routing_is_that_of_the_engine(pair: tuple[Engine, Any]) -> None:
    engine, hub = pair
    answers, stats = assert_same(hub, engine, Routed(0.2), threshold=0.2)
    assert stats["exits"][0] > 0 == stats["exits"][1] and stats["exits"][2] > 0
    assert answers != plain(hub, PROMPTS)
    assert assert_same(hub, engine, Routed(0.0), threshold=0.0)[0] == plain(hub, PROMPTS, stage=0)


def test_layers_run_no_more_than_needed(hub: Any) -> None:
    """Stage k runs once per token that goes so far, over it and what was put off; nothing runs twice."""
    ran: dict[int, list[int]] = {}
    hooks = [layer.register_forward_hook(lambda _, args, out, i=i: ran.setdefault(i, []).append(out[0].shape[1]))
             for i, layer in enumerate(hub.model.layers)]
    try:
        found = hub.generate_wand(torch.tensor([PROMPTS[2]]), max_new_tokens=40, bounds=[0.5, 0.5],
                                  return_dict_in_generate=True)
        wand, ran = ran, {}
        drafted = hub.generate_speculative(torch.tensor([PROMPTS[2]]), max_new_tokens=40, return_dict_in_generate=True)
    finally:
        for hook in hooks:
            hook.remove()
    exits, last = found.statistics["exits"], found.stages[0].tolist()
    assert set(wand) == set(range(1, 7)) and min(exits) > 0         # not layer 0, the lookup: decoding knows the token
    for layer, lengths in wand.items():
        k = (layer - 1) // 2
        deepest = max(i for i, stage in enumerate(last) if stage >= k)
        assert len(lengths) == sum(exits[k:])
        assert sum(lengths) == 12 + deepest                         # each position once, up to the last that went deep
        assert (max(lengths[1:]) > 1) == (k > 0)                    # put off and caught up
    s = drafted.statistics
    assert {layer: len(lengths) for layer, lengths in ran.items()} == {
        layer: s["drafted"] + s["rounds"] if layer <= 2 else s["rounds"] for layer in range(1, 7)}
    assert max(ran[1][1:]) == 1 and max(ran[3][1:]) == 5            # drafts one by one, verified in one chunk


# -- speculation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("drafts, prefix", [(4, 1), (7, 2), (None, 1), (None, 2)])
def test_greedy_speculation_is_the_text_of_generate(pair: tuple[Engine, Any], drafts: int | None, prefix: int) -> None:
    engine, hub = pair
    answers, stats = assert_same(hub, engine, Speculative(drafts, prefix), drafts=drafts or "auto", prefix=prefix)
    assert answers == plain(hub, PROMPTS) != plain(hub, PROMPTS, prefix=prefix)
    assert 0 < stats["accepted"] < stats["drafted"]                 # both paths were taken
    assert stats["accepted"] + stats["rounds"] == 4 * NEW


def test_speculation_on_text(calibrated: tuple[GPT, list[list[int]], dict[str, Any]]) -> None:
    model, prompts, _ = calibrated
    hub = hub_model(model, attention="eager")
    answers, stats = assert_same(hub, Engine(model), Speculative(), prompts)
    assert answers == plain(hub, prompts)
    assert 0.5 < stats["acceptance"] < 1
    assert assert_same(hub, Engine(model), Speculative(None), prompts, drafts="auto")[1] != stats


def test_sampling_draws_what_the_engine_draws(pair: tuple[Engine, Any]) -> None:
    engine, hub = pair
    sampling = Sampling(0.9, top_k=40, top_p=0.9, seed=3)
    options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k,
               "top_p": sampling.top_p, "seed": sampling.seed}
    assert_same(hub, engine, Speculative(None, 2), sampling=sampling, drafts="auto", prefix=2, **options)
    answers, stats = assert_same(hub, engine, Speculative(), sampling=sampling, **options)
    assert 0 < stats["accepted"] < stats["drafted"]
    for other in (Sampling(0.9, top_k=40, seed=3), Sampling(0.9, top_p=0.9, seed=3), Sampling(0.9, 40, 4, 0.9)):
        assert answers != run(engine, PROMPTS, NEW, Speculative(), sampling=other)[0]                  # control


def test_without_a_seed_torch_decides(hub: Any) -> None:

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return hub.generate_speculative(torch.tensor([[5, 6], [5, 6]]), max_new_tokens=10, do_sample=True).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert len(set(map(tuple, sample(1)))) == 2


def test_sampled_text_has_the_distribution_of_the_full_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square over two tokens; wrong rules of acceptance do not pass it."""
    V, draws, prompt = 8, 1500, [1, 2, 3]
    toy = live_model(model_config(vocab_size=V, stage_heads=True, n_layer=2, poe_every=1), seed=1)
    with torch.no_grad():
        for head in toy.lm_head_stages:
            head.weight.mul_(0.7)
    exact, hub = two_token_distribution(toy, prompt, 2.0), hub_model(toy)
    assert 0.5 * (exact - two_token_distribution_of_stage_0(toy, prompt, 2.0)).abs().sum() > 0.1

    def counts() -> Tensor:
        ids = torch.tensor([prompt]).expand(draws, -1)
        out = hub.generate_speculative(ids, max_new_tokens=3, drafts=2, do_sample=True, temperature=2.0, seed=11)
        return torch.bincount(out[:, 3] * V + out[:, 4], minlength=V * V)

    assert chi_square_p(counts(), exact) > 0.001
    right = decoding_nanopoe.Sampling.accept

    def always(self: Any, row: int, p: Tensor, q: Tensor, token: int) -> tuple[bool, int]:
        return True, token

    def from_p(self: Any, row: int, p: Tensor, q: Tensor, token: int) -> tuple[bool, int]:
        kept, other = right(self, row, p, q, token)
        return (True, token) if kept else (False, self.draw(row, p))

    for wrong in (always, from_p):
        monkeypatch.setattr(decoding_nanopoe.Sampling, "accept", wrong)
        assert chi_square_p(counts(), exact) < 1e-4


@pytest.mark.parametrize("weights", [{0: 1.0, 2: 3.0}, {1: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0}], ids=str)
def test_composition_of_chosen_stages(pair: tuple[Engine, Any], weights: dict[int, float]) -> None:
    engine, hub = pair
    ours = engine.seen_as(Composition(tuple(sorted(weights.items()))))
    assert plain(hub, PROMPTS, 20, weights=weights) == ours.generate(PROMPTS, max_new_tokens=20)
    assert (plain(hub, PROMPTS, 20, weights=weights) == plain(hub, PROMPTS, 20)) == (len(weights) == 3)
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        torch.testing.assert_close(hub(ids, weights=weights).logits[:, -1], ours.next_logps(ids), rtol=0, atol=1e-4)
        other = hub(ids, weights={0: 3.0, 2: 1.0}).logits[:, -1]
        assert float((other - ours.next_logps(ids)).abs().max()) > 1e-2                                # control
