"""Cached generation equals uncached, a prefix equals the truncated model, and every view differs from the others."""

from __future__ import annotations

import pytest
import torch

from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError
from nanopoe.infer.engine import Engine, Sampling, draw
from nanopoe.model import GPT, KVCache
from nanopoe.model.pool import View, view_logps
from nanopoe.model.stages import truncate
from tests.ranks import model_config

VIEWS = ("full", "stage:0", "stage:1", "stage:2", "prefix:1", "prefix:2", "prefix:3")


def live_model(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in which every tensor matters: no projection, gate or head left at zero, logits of some spread."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") or name.startswith(("lm_head", "smear")):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def three_stages(**changes: object) -> GPT:
    return live_model(model_config(n_layer=6, stage_heads=True, n_kv_head=1, **changes))


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
    cache = KVCache(poe, 2, 64)
    ids, fed = PROMPTS, PROMPTS
    for _ in range(40):                                            # past the trained context of 32 as well
        logps = engine.next_logps(fed, cache)
        assert torch.allclose(logps, uncached(poe, ids, engine.view), atol=1e-4)
        fed = logps.argmax(-1, keepdim=True)
        ids = torch.cat([ids, fed], dim=1)
    cache.previous = None                                          # without the smear's memory it would not hold
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


def test_later_stages_are_not_run(poe: GPT) -> None:
    ran: list[int] = []
    hooks = [block.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, block in enumerate(poe.transformer.h)]
    Engine(poe, View("prefix", 2)).generate([[1, 2]], max_new_tokens=1)
    assert ran == [0, 1, 2, 3]
    ran.clear()
    Engine(poe, View("stage", 2)).generate([[1, 2]], max_new_tokens=1)
    assert ran == [0, 1, 2, 3, 4, 5]
    for hook in hooks:
        hook.remove()


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
    with pytest.raises(ConfigError, match="different lengths"):
        next(Engine(poe).stream(prompts, max_new_tokens=8))


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
    with pytest.raises(ConfigError, match="without stage losses"):
        Engine(bp, View("stage", 0))
    assert len(engine.generate([[299]], max_new_tokens=1)[0]) == 1
