"""A cascade in the engine: its tree of stages equals the model's definition, the base stays the base bit for bit, and
compositions, rows with views of their own and the route by the prompt are what they say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nanopoe.config.layout import CHAT_TOKENS
from nanopoe.config.schema import SpecialistShape
from nanopoe.errors import ConfigError
from nanopoe.infer.cascade import Route
from nanopoe.infer.decoder import Decoder
from nanopoe.infer.depth import Wand
from nanopoe.infer.engine import Engine
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import Speculative
from nanopoe.infer.views import Composition
from nanopoe.infer.weights import Weights
from nanopoe.model import GPT
from nanopoe.model.gpt import SOFTCAP, norm
from nanopoe.model.pool import View
from tests.models import answers_of, live_model
from tests.ranks import model_config

BASES: dict[str, dict[str, Any]] = {
    "bp": {"poe_mode": "none", "poe_every": None},
    "poe": {"stage_heads": True, "n_kv_head": 1},
    "shared": {"window_sizes": (6, 9, 6, 32), "n_kv_head": 1},
}
CHAIN = ((2, None), (1, 0), (3, 1))              # layers and parent: base -> a -> b -> c
SIBLINGS = ((2, None), (1, None))
TREE = ((1, None), (2, None), (1, 0), (1, 1))    # two siblings, each with a child
VOCABULARY, K = 300, 2
CHAT = VOCABULARY - CHAT_TOKENS                  # the first chat token

PROMPTS = torch.randint(CHAT, (2, 9), generator=torch.Generator().manual_seed(3))
WITH_CHAT = torch.cat([PROMPTS[:, :4], torch.tensor([[CHAT, 5, VOCABULARY - 1], [7, CHAT + 3, 9]])], dim=1)


def shapes(tree: tuple[tuple[int, int | None], ...]) -> tuple[SpecialistShape, ...]:
    return tuple(SpecialistShape(n_layer=n, parent=parent) for n, parent in tree)


def cascade(base: str, tree: tuple[tuple[int, int | None], ...], seed: int = 0) -> GPT:
    """Specialists with no tensor at what it is initialised to, each drawn by its place in the list."""
    model = live_model(model_config(**BASES[base], specialists=shapes(tree)), seed)
    with torch.no_grad():
        for i, specialist in enumerate(model.specialists):
            generator = torch.Generator().manual_seed(100 * seed + i)
            for name, p in specialist.named_parameters():
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(1 + 0.1 * noise if name == "resid_lambdas" else 0.1 * noise)
        model.chat_rows.normal_(generator=torch.Generator().manual_seed(seed))
    return model


def base_of(model: GPT) -> GPT:
    base = GPT(model.config.base)
    base.load_state_dict({name: t for name, t in model.state_dict().items()
                          if not name.startswith(("specialists.", "chat_rows"))})
    return base


@torch.no_grad()
def unfolded(model: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
    """l_k (B, T, V) of all stages, as SPEC 8 writes them: every head multiplied on its own, then added and capped."""
    found = []
    for k, x in enumerate(model.boundary_states(ids)):
        stages = model.layout.n_stages
        heads = [model.lm_head.weight]
        if model.layout.stage_heads:
            heads.append(model.lm_head_stages[min(k, stages - 1)].weight)
        for i in model.layout.chains[k - stages] if k >= stages else ():
            heads.append(model.specialists[i].lm_head_stage.weight)
        z = sum(F.linear(norm(x), head) for head in heads)[..., :model.config.vocab_size]
        found.append((SOFTCAP * torch.tanh(z / SOFTCAP)).log_softmax(-1))
    return found


def base_logps(model: GPT, logps: list[torch.Tensor]) -> torch.Tensor:
    n = model.layout.n_stages
    return torch.stack(logps[:n]).mean(0).log_softmax(-1)


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected, rtol=0, atol=1e-5)


# -- logits -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("tree", [CHAIN, SIBLINGS, TREE], ids=["chain", "siblings", "tree"])
@pytest.mark.parametrize("base", BASES)
def test_every_expert_equals_its_unfolded_definition(base: str, tree: tuple[tuple[int, int | None], ...]) -> None:
    """For a whole prompt, and for tokens one by one behind it, past the trained context too."""
    model = cascade(base, tree)
    weights, stages = Weights(model), model.layout.n_stages
    ids = torch.cat([WITH_CHAT, torch.randint(VOCABULARY, (2, 33), generator=torch.Generator().manual_seed(1))], dim=1)
    expected = unfolded(model, ids)
    for k in range(stages + len(tree)):
        if base == "bp" and k == 0:
            engine = Engine(weights, View("base"))
        else:
            engine = Engine(weights, View("stage", k))
        cache = engine.decoder(2, ids.size(1))
        for start, end in ((0, 7), *((t, t + 1) for t in range(7, ids.size(1)))):
            found = engine.next_logps(ids[:, start:end], cache)
            assert close(found, expected[k][:, end - 1]), (k, end)
        others = [j for j in range(len(expected)) if j != k]
        assert not any(close(found, expected[j][:, -1]) for j in others)


def test_full_is_what_the_model_answers() -> None:
    model = cascade("poe", TREE)
    with torch.no_grad():
        assert close(Engine(model).next_logps(WITH_CHAT), model(WITH_CHAT)[:, -1].log_softmax(-1))
    last = Engine(model, View("specialist", name="3"))
    assert torch.equal(Engine(model).next_logps(WITH_CHAT), last.next_logps(WITH_CHAT))


@pytest.mark.parametrize("base", BASES)
def test_the_base_view_is_the_base_alone_bitwise(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran, stage = cascade(base, TREE), set(), Decoder._stage

    def spied(self: Decoder, k: int, *rest: Any) -> torch.Tensor:
        ran.add(k)
        return stage(self, k, *rest)

    engine, alone = Engine(model, View("base")), Engine(base_of(model))
    prompts, chat = [*PROMPTS.tolist(), [4, 5]], range(CHAT, VOCABULARY)
    expected = alone.generate(prompts, max_new_tokens=12, stop=chat)
    logps = alone.next_logps(PROMPTS)
    monkeypatch.setattr(Decoder, "_stage", spied)
    assert torch.equal(engine.next_logps(PROMPTS), logps)
    assert engine.generate(prompts, max_new_tokens=12, stop=chat) == expected
    assert ran == set(range(model.layout.n_stages))
    for name in engine.weights.names:                                # control: what stands on it says something else
        assert not close(engine.seen_as(View("specialist", name=name)).next_logps(PROMPTS), logps)
    assert not torch.equal(engine.next_logps(WITH_CHAT), alone.next_logps(WITH_CHAT))     # chat tokens are the delta's


def test_only_ancestors_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ran, stage = cascade("poe", TREE), [], Decoder._stage

    def spied(self: Decoder, k: int, *rest: Any) -> torch.Tensor:
        ran.append(k)
        return stage(self, k, *rest)

    monkeypatch.setattr(Decoder, "_stage", spied)
    weights = Weights(model, names=("a", "b", "aa", "bb"))
    for view, stages in (("base", [0, 1]), ("stage:0", [0]), ("specialist:a", [0, 1, 2]), ("dual:b", [0, 1, 3]),
                         ("specialist:aa", [0, 1, 2, 4]), ("specialist", [0, 1, 3, 5]), ("full", [0, 1, 3, 5])):
        ran.clear()
        Engine(weights, View.parse(view)).generate([[1, 2]], max_new_tokens=1)
        assert ran == stages, view
    caches = Engine(weights, View.parse("specialist:aa")).decoder(1, 8).caches
    assert len(caches) == 4 + 1 + 1                                  # of the layers on the way, no others


# -- pools ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", BASES)
def test_dual_and_composition_are_the_weighted_pool(base: str) -> None:
    model = cascade(base, SIBLINGS)
    n, logps = model.layout.n_stages, [x[:, -1] for x in unfolded(model, WITH_CHAT)]
    own, a, b = base_logps(model, logps), logps[n], logps[n + 1]
    weights = Weights(model, names=("a", "b"))

    def found(view: View | Composition) -> torch.Tensor:
        return Engine(weights, view).next_logps(WITH_CHAT)

    assert close(found(View.parse("dual:a")), (own / 2 + a / 2).log_softmax(-1))
    assert close(found(View.parse("dual")), (own / 2 + b / 2).log_softmax(-1))
    assert not close(found(View.parse("dual:a")), found(View.parse("dual:b")))
    mixed = found(Composition.parse("base=1,a=2,b=3"))
    assert close(mixed, ((own + 2 * a + 3 * b) / 6).log_softmax(-1))
    for other in ("b=3,base=1,a=2", "a=2,b=3,base=1"):
        assert torch.equal(found(Composition.parse(other)), mixed)
    assert torch.equal(found(Composition((("b", 3), ("base", 1), ("a", 2)))), mixed)
    assert not close(found(Composition.parse("base=1,a=3,b=2")), mixed)
    assert close(found(Composition.parse(f"a=2,{n + 1}=3,base=1")), mixed)             # a number is a stage
    assert close(found(Composition.parse("base=2,0=1,b=1")), ((2 * own + logps[0] + b) / 4).log_softmax(-1))


def test_the_order_of_siblings_does_not_matter() -> None:
    model = cascade("poe", SIBLINGS)
    swapped = GPT(model.config.model_copy(update={"specialists": shapes(SIBLINGS[::-1])}))
    names = {"specialists.0.": "specialists.1.", "specialists.1.": "specialists.0."}
    swapped.load_state_dict({names.get(name[:14], name[:14]) + name[14:]: t for name, t in model.state_dict().items()})
    one, other = Weights(model, names=("a", "b")), Weights(swapped, names=("b", "a"))
    for text in ("specialist:a", "specialist:b", "dual:a", "compose:base=1,a=2,b=3"):
        view = Composition.parse(text[8:]) if text.startswith("compose:") else View.parse(text)
        assert close(Engine(one, view).next_logps(WITH_CHAT), Engine(other, view).next_logps(WITH_CHAT)), text
    assert not close(Engine(one).next_logps(WITH_CHAT), Engine(other).next_logps(WITH_CHAT))     # the last one is b, a


def test_alpha_counts_the_stages_of_a_pool() -> None:
    model = cascade("poe", SIBLINGS)
    plain, sharp = (Engine(model, View("dual"), alpha=alpha).next_logps(WITH_CHAT) for alpha in (0.0, 0.5))
    torch.testing.assert_close(sharp, (3 ** 0.5 * plain).log_softmax(-1), rtol=0, atol=1e-4)
    assert not close(sharp, plain)
    alone = [Engine(model, View("specialist"), alpha=alpha).next_logps(WITH_CHAT) for alpha in (0.0, 0.5)]
    assert torch.equal(*alone)                                       # a pool of one has nothing to sharpen


# -- rows -------------------------------------------------------------------------------------------------------------

def test_rows_of_different_views_share_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cascade("poe", TREE)
    engine = Engine(Weights(model, names=("a", "b", "aa", "bb")))
    views = [View.parse("specialist:a"), View("base"), View.parse("dual:bb"), Composition.parse("a=1,aa=2")]
    prompts, tokens = [[5, 6, 7], [8], [9, CHAT, 11], [5, 6, 7]], 10
    alone = [engine.seen_as(view).generate([prompt], max_new_tokens=tokens)[0]
             for view, prompt in zip(views, prompts, strict=True)]
    ran, decoders, stage = [], set(), Decoder._stage

    def spied(self: Decoder, k: int, chunk: Any, lengths: list[int]) -> torch.Tensor:
        ran.append((k, len(lengths)))
        decoders.add(self)
        return stage(self, k, chunk, lengths)

    monkeypatch.setattr(Decoder, "_stage", spied)
    assert engine.generate(prompts, max_new_tokens=tokens, views=views) == alone
    assert alone[0] != alone[3]
    by_stage = {k: {rows for j, rows in ran if j == k} for k in range(6)}
    assert by_stage == {0: {4}, 1: {4}, 2: {2}, 3: {1}, 4: {1}, 5: {1}}
    assert len(ran) == 6 * tokens                                    # every stage once a token, the base for all
    [decoder] = decoders
    assert not any(decoder.waiting.values())                         # nothing piles up before what a row does not ask


def test_a_row_kept_to_its_way_waits_before_no_other_stage() -> None:
    decoder = Decoder(Weights(cascade("poe", SIBLINGS)), 2, 16)

    def waiting(k: int) -> set[int]:
        return {row for chunk in decoder.waiting[k] for row in chunk.rows}

    decoder.feed({0: [1, 2], 1: [3]})
    decoder.run(0)
    decoder.run(1)
    assert waiting(2) == waiting(3) == {0, 1}                        # control: the base ran once, both wait for it
    decoder.keep(0, [2])
    assert (waiting(2), waiting(3)) == ({0, 1}, {1})
    decoder.feed({0: [4]})
    decoder.run(0)
    decoder.run(1)
    assert (waiting(2), waiting(3)) == ({0, 1}, {1})
    assert len(decoder.run(2, [0]).rows) == 3 and waiting(2) == {1}


def test_modes_of_the_base_work_on_its_view() -> None:
    model = cascade("poe", SIBLINGS)
    engine, alone = Engine(model, View("base")), Engine(base_of(model))
    prompts, chat = PROMPTS.tolist(), range(CHAT, VOCABULARY)
    for mode in (Speculative(3), Wand([1e9])):
        found = engine.generate(prompts, max_new_tokens=12, stop=chat, mode=mode)
        assert found == alone.generate(prompts, max_new_tokens=12, stop=chat) and any(found)
    for view in ("full", "specialist", "dual", "stage:0"):
        with pytest.raises(ConfigError, match="needs the whole pool of the base"):
            engine.seen_as(View.parse(view)).generate(prompts, max_new_tokens=1, mode=Speculative())


# -- route ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("base", ["bp", "poe"])
def test_the_prompt_chooses_who_has_the_lowest_perplexity(base: str) -> None:
    model, names = cascade(base, TREE), ("a", "b", "aa", "bb")
    generator = torch.Generator().manual_seed(0)
    lengths = [2, 3, 12, 5, 300, 7, 4, 9, 6, 2]
    prompts = [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    prompts[5][3] = CHAT + 1
    expected = []
    for prompt in prompts:
        logps, targets = unfolded(model, torch.tensor([prompt])), torch.tensor(prompt[1:])[None, :, None]
        experts = {"base": base_logps(model, logps), **dict(zip(names, logps[model.layout.n_stages:], strict=True))}
        expected.append({name: float((-l[:, :-1].gather(2, targets)).double().mean().exp())
                         for name, l in experts.items()})
    engine = Engine(Weights(model, names=names))
    generation = engine.stream(prompts, max_new_tokens=5, mode=Route())
    answers, stats = answers_of(generation, len(prompts)), generation.stats
    assert stats is not None
    told = stats.as_dict()
    for perplexity, by_hand in zip(told["perplexity"], expected, strict=True):
        assert perplexity == pytest.approx(by_hand, rel=1e-4)
    assert told["chosen"] == [min(by_hand, key=by_hand.__getitem__) for by_hand in expected]
    assert len(set(told["chosen"])) >= 3                             # control: it is not one for all
    for prompt, answer, name in zip(prompts, answers, told["chosen"], strict=True):
        view = View("base") if name == "base" else View("specialist", name=name)
        assert answer == engine.seen_as(view).generate([prompt], max_new_tokens=5)[0]


def test_of_equals_the_base_answers() -> None:
    """Specialists as they are initialised change nothing, so no perplexity is lower than another."""
    model = GPT(model_config(**BASES["bp"], specialists=shapes(SIBLINGS)))
    model.init_weights(0)
    generation = Engine(model).stream([[1, 2, 3]], max_new_tokens=2, mode=Route(), sampling=Sampling(1.0, seed=3))
    assert len(answers_of(generation, 1)[0]) == 2
    assert generation.stats is not None and generation.stats.as_dict()["chosen"] == ["base"]
    assert len(set(generation.stats.as_dict()["perplexity"][0].values())) == 1


# -- refused ----------------------------------------------------------------------------------------------------------

def test_views_the_model_lacks_are_refused() -> None:
    weights, alone = Weights(cascade("bp", SIBLINGS), names=("a", "b")), Weights(live_model(model_config()))
    for view, words in ((View.parse("specialist:c"), "no specialist 'c'.*use a or b"), (View.parse("dual:c"), "'c'"),
                        (View("stage", 3), "has 3 stages"), (View("prefix", 1), "only full is valid"),
                        (Composition.parse("a=1,c=1"), "no specialist 'c'"),
                        (Composition.parse("3=1"), "stages 0 to 2")):
        with pytest.raises(ConfigError, match=words):
            Engine(weights, view)
    for view in (View("specialist"), View.parse("dual:a")):
        with pytest.raises(ConfigError, match="has no specialists"):
            Engine(alone, view)
    with pytest.raises(ConfigError, match="the model has none"):
        Engine(alone, Composition.parse("a=1"))
    assert Engine(alone, View("base")).experts == Engine(alone).experts


def test_names_that_could_mean_something_else_are_refused() -> None:
    model = cascade("bp", SIBLINGS)
    assert Weights(model).names == ("0", "1")
    for names in (("a",), ("a", "a"), ("a", "base"), ("a", ""), ("a", "7"), ("a", "b=1"), ("a", "b:c"), ("a", "b,c")):
        with pytest.raises(ConfigError, match="names of specialists"):
            Weights(model, names=names)


def test_routes_that_cannot_be_are_refused() -> None:
    model, alone = cascade("bp", SIBLINGS), live_model(model_config())
    engine = Engine(model)
    for refused, prompts, options, words in (
            (Engine(alone), [[1, 2]], {}, "no specialists to choose from"),
            (engine, [[1, 2], [1]], {}, "prompt 1: of one token"),
            (engine.seen_as(View("base")), [[1, 2]], {}, "chooses who answers"),
            (engine, [[1, 2]], {"views": [View("base")]}, "one view")):
        with pytest.raises(ConfigError, match=words):
            refused.generate(prompts, max_new_tokens=1, mode=Route(), **options)
    with pytest.raises(ConfigError, match="2 views for 1 prompts"):
        engine.generate([[1, 2]], max_new_tokens=1, views=[View("base"), View("base")])
    with pytest.raises(ConfigError, match="without stage losses"):
        engine.seen_as(View("base")).generate([[1, 2]], max_new_tokens=1, mode=Speculative())
