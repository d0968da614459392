"""Cached generation equals uncached, a prefix equals the truncated model, and every view differs from the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nanopoe.errors import ConfigError
from nanopoe.infer.decoder import Decoder
from nanopoe.infer.engine import Engine
from nanopoe.infer.sampling import Sampling, draw, penalised, probabilities
from nanopoe.infer.views import Composition
from nanopoe.model import GPT
from nanopoe.model.pool import View, view_logps
from nanopoe.model.stages import truncate
from tests.models import live_model, three_stages
from tests.ranks import model_config

VIEWS = ("full", "stage:0", "stage:1", "stage:2", "prefix:1", "prefix:2", "prefix:3")


@pytest.fixture(scope="module")
def poe() -> GPT:
    return three_stages()


@pytest.fixture(scope="module")
def bp() -> GPT:
    return live_model(model_config(poe_mode="none", poe_every=None))


PROMPTS = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(3))


def uncached(model: GPT, ids: torch.Tensor, view: View) -> torch.Tensor:
    """(B, V) log-probabilities after ids, from the whole model and the pool's definition."""
    with torch.no_grad():
        states = model.boundary_states(ids)
        logps = [model.stage_logits(x, k)[:, -1].log_softmax(-1) for k, x in enumerate(states)]
    return view_logps(logps, view, model.layout.n_stages, poe_mode=model.config.poe_mode)


@pytest.mark.parametrize("text", VIEWS)
def test_cached_logits_equal_uncached_for_every_view(poe: GPT, text: str) -> None:
    engine = Engine(poe, View.parse(text))
    cache = engine.decoder(2, 64)
    ids, fed = PROMPTS, PROMPTS
    for _ in range(40):                                            # past the trained context of 32 as well
        logps = engine.next_logps(fed, cache)
        assert torch.allclose(logps, uncached(poe, ids, engine.view), atol=1e-4)
        fed = logps.argmax(-1, keepdim=True)
        ids = torch.cat([ids, fed], dim=1)
    cache.tokens = [[1] * len(t) for t in cache.tokens]            # with another token before, it does not hold
    expected = uncached(poe, torch.cat([ids, fed], dim=1), engine.view)
    assert not torch.allclose(engine.next_logps(fed, cache), expected, atol=1e-4)


@pytest.mark.parametrize("which", ["poe", "bp"])
def test_greedy_equals_uncached_greedy(which: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(which)
    ids = PROMPTS
    for _ in range(20):
        ids = torch.cat([ids, uncached(model, ids, View()).argmax(-1, keepdim=True)], dim=1)
    answers = Engine(model).generate(PROMPTS.tolist(), max_new_tokens=20)
    assert answers == ids[:, 9:].tolist()
    assert answers[0] != answers[1]


def test_views_answer_differently(poe: GPT) -> None:
    answers = {v: Engine(poe, View.parse(v)).generate(PROMPTS.tolist(), max_new_tokens=12) for v in VIEWS}
    assert answers["prefix:1"] == answers["stage:0"]
    assert answers["prefix:3"] == answers["full"]
    distinct = [answers[v] for v in ("full", "stage:0", "stage:1", "stage:2", "prefix:2")]
    assert all(a != b for i, a in enumerate(distinct) for b in distinct[:i])


@pytest.mark.parametrize("n", [1, 2])
def test_prefix_equals_the_truncated_model_bitwise(poe: GPT, n: int) -> None:
    config, tensors = truncate(poe.config, dict(poe.state_dict()), n)
    small = GPT(config)
    small.load_state_dict(tensors)
    prefix = Engine(poe, View("prefix", n))
    assert torch.equal(Engine(small).next_logps(PROMPTS), prefix.next_logps(PROMPTS))
    assert not torch.equal(Engine(poe).next_logps(PROMPTS), prefix.next_logps(PROMPTS))


def test_later_stages_are_not_run(poe: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    stage = Decoder._stage

    def spied(self: Decoder, k: int, *rest: Any) -> torch.Tensor:
        ran.append(k)
        return stage(self, k, *rest)

    monkeypatch.setattr(Decoder, "_stage", spied)
    for view, stages in (("prefix:2", [0, 1]), ("stage:2", [0, 1, 2]), ("stage:0", [0]), ("full", [0, 1, 2])):
        ran.clear()
        Engine(poe, View.parse(view)).generate([[1, 2]], max_new_tokens=1)
        assert ran == stages


def test_a_composition_is_the_weighted_pool(poe: GPT) -> None:
    """log p ~ sum w_k l_k with weights that sum to 1, whatever they were given as."""
    with torch.no_grad():
        logps = [poe.stage_logits(x, k)[:, -1].log_softmax(-1) for k, x in enumerate(poe.boundary_states(PROMPTS))]
    found = Engine(poe, Composition.parse("0=1,2=3")).next_logps(PROMPTS)
    torch.testing.assert_close(found, (0.25 * logps[0] + 0.75 * logps[2]).log_softmax(-1), rtol=0, atol=1e-4)
    torch.testing.assert_close(found, Engine(poe, Composition.parse("2=0.3,0=0.1")).next_logps(PROMPTS), rtol=0,
                               atol=1e-5)
    assert not torch.allclose(found, Engine(poe, Composition.parse("0=3,2=1")).next_logps(PROMPTS), atol=1e-2)
    equal = Engine(poe, Composition.parse("0=2,1=2,2=2")).next_logps(PROMPTS)
    torch.testing.assert_close(equal, Engine(poe).next_logps(PROMPTS), rtol=0, atol=1e-5)
    assert Engine(poe).seen_as(View("stage", 1)).weights is not Engine(poe).weights
    shared = Engine(poe)
    assert shared.seen_as(View("stage", 1)).weights is shared.weights
    for bad in ("", "0", "0=x", "0=1,0=2", "0=-1", "0=0", "0=inf", "0=nan"):
        with pytest.raises(ConfigError, match="composition"):
            Composition.parse(bad)
    with pytest.raises(ConfigError, match="stages 0 to 2"):
        Engine(poe, Composition.parse("0=1,3=1"))


def test_alpha_sharpens_the_pool_and_keeps_its_order(poe: GPT) -> None:
    plain = Engine(poe).next_logps(PROMPTS)
    for alpha in (0.5, 1.0):
        sharp = Engine(poe, alpha=alpha).next_logps(PROMPTS)
        torch.testing.assert_close(sharp, (3**alpha * plain).log_softmax(-1), rtol=0, atol=1e-4)
        assert torch.equal(sharp.argsort(-1)[:, -5:], plain.argsort(-1)[:, -5:])
        assert not torch.allclose(sharp, plain, atol=1e-2)
    with pytest.raises(ConfigError, match="alpha"):
        Engine(poe, alpha=-1.0)


def test_stop_ends_a_row_and_not_its_neighbour(poe: GPT) -> None:
    free = Engine(poe).generate(PROMPTS.tolist(), max_new_tokens=12)
    stop = next(t for t in free[0] if t not in free[1])
    stopped = Engine(poe).generate(PROMPTS.tolist(), max_new_tokens=12, stop={stop})
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stopped[1] == free[1]
    steps = list(Engine(poe).stream(PROMPTS[:1].tolist(), max_new_tokens=12, stop={stop}))
    assert len(steps) == len(stopped[0]) < 12                       # nothing is computed after the last row stopped


def test_prompts_of_any_length_equal_each_alone(poe: GPT) -> None:
    prompts = [[5, 6, 7], [8], [9, 10, 11], [12, 13]]
    together = Engine(poe).generate(prompts, max_new_tokens=8)
    assert together == [Engine(poe).generate([p], max_new_tokens=8)[0] for p in prompts]
    assert len({tuple(a) for a in together}) > 1
    logps = [Engine(poe).next_logps(torch.tensor([p])) for p in prompts]
    decoder = Engine(poe).decoder(4, 3)
    decoder.feed(dict(enumerate(prompts)))
    with torch.no_grad():
        torch.testing.assert_close(Engine(poe)._scores(decoder, 4).log_softmax(-1), torch.cat(logps), rtol=0, atol=1e-4)


def test_sampling_is_a_function_of_seed_and_row(poe: GPT) -> None:
    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return Engine(poe).generate(prompts, max_new_tokens=16, sampling=Sampling(1.0, None, seed))

    two = sample([[5, 6], [5, 6]], 7)
    assert two == sample([[5, 6], [5, 6]], 7)
    assert two[0] == sample([[5, 6], [9, 9, 9]], 7)[0]              # whatever is generated beside it
    assert two[0] != two[1]
    assert two[0] != sample([[5, 6]], 8)[0]


def test_sampling_follows_the_distribution() -> None:
    logps = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    generator = torch.Generator().manual_seed(0)

    def frequencies(sampling: Sampling) -> torch.Tensor:
        draws = [int(draw(logps, sampling, [generator])) for _ in range(4000)]
        return torch.bincount(torch.tensor(draws), minlength=4) / 4000

    assert torch.allclose(frequencies(Sampling(1.0)), logps.exp()[0], atol=0.03)
    top = frequencies(Sampling(1.0, top_k=2))
    assert torch.allclose(top, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=0.03)
    cold = frequencies(Sampling(0.5))
    assert torch.allclose(cold, (2 * logps).softmax(-1)[0], atol=0.03)
    assert cold[0] > 0.6
    assert frequencies(Sampling(1.0, top_k=1))[0] == 1 == frequencies(Sampling(0.0))[0]
    tied = torch.zeros(1, 4).log_softmax(-1)
    assert len({int(draw(tied, Sampling(1.0, top_k=2), [generator])) for _ in range(200)}) == 2
    assert len({int(draw(tied, Sampling(1.0), [generator])) for _ in range(200)}) == 4


def test_top_p_keeps_the_fewest_tokens_that_hold_the_share() -> None:
    logps = torch.tensor([[0.15, 0.5, 0.05, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()
    kept = probabilities(logps, Sampling(1.0, top_p=0.6))
    torch.testing.assert_close(kept, torch.tensor([[0, 0.625, 0, 0.375], [1 / 3, 1 / 3, 1 / 3, 0]]))
    torch.testing.assert_close(probabilities(logps, Sampling(1.0, top_p=0.4))[0], torch.tensor([0.0, 1, 0, 0]))
    torch.testing.assert_close(probabilities(logps, Sampling(1.0, top_p=1.0)), logps.exp())
    both = probabilities(logps, Sampling(1.0, top_k=3, top_p=0.8))               # top-k first
    torch.testing.assert_close(both[0], torch.tensor([0.0, 0.625, 0, 0.375]))


def test_repetition_penalty_makes_old_tokens_rarer(poe: GPT) -> None:
    logps = torch.tensor([[0.5, 0.3, 0.2]]).log()
    found = penalised(logps, 2.0, [[0, 0, 2]])
    torch.testing.assert_close(found, logps * torch.tensor([[2.0, 1, 2]]))
    assert penalised(logps, 1.0, [[0]]) is logps
    free, strict = (Engine(poe).generate([[5, 6, 7]], max_new_tokens=40, sampling=Sampling(repetition_penalty=r))[0]
                    for r in (1.0, 50.0))
    assert free == Engine(poe).generate([[5, 6, 7]], max_new_tokens=40)[0]
    assert len(set(free)) < len(set(strict)) == 40
    assert not set(strict) & {5, 6, 7}


def test_bad_requests_are_refused(poe: GPT, bp: GPT) -> None:
    engine = Engine(poe)
    for prompts, word in (([[]], "empty"), ([[300]], "token id"), ([[-1]], "token id")):
        with pytest.raises(ConfigError, match=word):
            engine.generate(prompts, max_new_tokens=1)
    with pytest.raises(ConfigError, match="max_new_tokens"):
        engine.generate([[1]], max_new_tokens=0)
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(temperature=-1.0)
    with pytest.raises(ConfigError, match="top_k"):
        Sampling(1.0, top_k=0)
    for options, word in (({"top_p": 0.0}, "top_p"), ({"top_p": 1.5}, "top_p"),
                          ({"repetition_penalty": 0.0}, "penalty")):
        with pytest.raises(ConfigError, match=word):
            Sampling(1.0, **options)
    for view in (View("stage", 0), Composition.parse("0=1")):
        with pytest.raises(ConfigError, match="without stage losses"):
            Engine(bp, view)
    assert len(engine.generate([[299]], max_new_tokens=1)[0]) == 1
