"""Speculative decoding: greedy output is the full model's token for token, sampled output has its distribution."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.errors import ConfigError
from nanopoe.infer import speculative
from nanopoe.infer.engine import Engine
from nanopoe.infer.probes import PROBES
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import (
    BELIEF,
    LEADS,
    MOST_DRAFTS,
    Draft,
    Pace,
    Speculative,
    SpeculativeStats,
    accept,
    ideal_speedup,
)
from nanopoe.model import GPT
from nanopoe.model.pool import View
from nanopoe.tokenizer import Tokenizer
from tests.models import documents, live_model, run, three_stages
from tests.ranks import model_config

PROMPTS = [[5, 6, 7], [8], list(range(20)), [9, 9]]
MODES = [Speculative(m, n) for n in (1, 2) for m in (1, 4, 7, None)]


@pytest.fixture(scope="module")
def poe() -> GPT:
    return three_stages(window_sizes=(5, 9, 9, 32, 9, 32))


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_greedy_equals_full_greedy_whatever_drafts(poe: GPT, mode: Speculative) -> None:
    engine = Engine(poe)
    full = engine.generate(PROMPTS, max_new_tokens=60)
    answers, stats = run(engine, PROMPTS, 60, mode)
    assert answers == full
    assert stats.accepted + stats.rounds == 4 * 60                  # a round adds one token of the full pool
    assert 0 < stats.accepted < stats.drafted                       # the rejecting path was taken, and the other
    assert answers != engine.seen_as(View("prefix", mode.prefix)).generate(PROMPTS, max_new_tokens=60)


def test_greedy_on_trained_model_probes_and_real_text(trained: tuple[GPT, Tokenizer], corpus: Path) -> None:
    """The seven probes x 60 tokens, and 50 prompts of held-out text x 128."""
    model, tokenizer = trained
    engine = Engine(model)
    probes = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in PROBES]
    texts = [[tokenizer.bos_id, *tokenizer.encode(d[:150])][:40] for d in documents(corpus, 6, 50)]
    assert len(texts) == 50
    for prompts, tokens in ((probes, 60), (texts, 128)):
        full = engine.generate(prompts, max_new_tokens=tokens)
        answers, stats = run(engine, prompts, tokens, Speculative(4))
        assert answers == full
        assert stats.acceptance > 0.5
        assert stats.accepted < stats.drafted


def test_drafts_of_a_round_leave_room_for_its_own_token(poe: GPT) -> None:
    """d = min(m, remaining - 1): five tokens by m = 4 are one round at best, one token is a round without drafts."""
    for tokens in (1, 2, 5):
        answers, stats = run(Engine(poe), PROMPTS[:1], tokens, Speculative(4))
        assert len(answers[0]) == tokens
        assert stats.drafted <= tokens - 1 if tokens <= 2 else stats.drafted >= 4
    _, stats = run(Engine(poe), PROMPTS[:1], 1, Speculative(4))
    assert stats == SpeculativeStats(rounds=1, accepted=0, drafted=0)


def test_published_counts_give_the_published_rates() -> None:
    """SPEC 11: 420 tokens (7 probes x 60), three checkpoints."""
    for counts, acceptance, mean in (((87, 333, 338), 0.9852, 3.83), ((90, 330, 351), 0.9402, 3.67),
                                     ((85, 335, 340), 0.9853, 3.94)):
        stats = SpeculativeStats(*counts)
        assert stats.rounds + stats.accepted == 420
        assert round(stats.acceptance, 4) == acceptance
        assert round(stats.mean_accepted, 2) == mean
    assert round(ideal_speedup(3.83, 4, 0.5), 2) == 1.61            # the published speed-up of that row, c = 1/2
    assert ideal_speedup(0, 4, 0.5) < 1


def test_stop_inside_accepted_drafts_ends_the_text(poe: GPT) -> None:
    engine = Engine(poe)
    full = engine.generate(PROMPTS, max_new_tokens=40)
    for stop in sorted(set(full[0][2:12]))[:3]:
        wanted = [a[:a.index(stop)] if stop in a else a for a in full]
        assert run(engine, PROMPTS, 40, Speculative(7, 2), stop={stop})[0] == wanted


def test_penalty_counts_drafts_as_text(poe: GPT) -> None:
    sampling = Sampling(repetition_penalty=1.5)
    full = Engine(poe).generate(PROMPTS, max_new_tokens=40, sampling=sampling)
    assert run(Engine(poe), PROMPTS, 40, Speculative(4, 2), sampling=sampling)[0] == full
    assert full != Engine(poe).generate(PROMPTS, max_new_tokens=40)


def drafted(pace: Pace, leads: list[float], most: int = MOST_DRAFTS) -> int:
    """How far a drafter runs that has these leads, one after the other."""
    draft = Draft(min(most, pace.most))
    for lead in leads:
        if not pace.goes_on(draft, lead):
            break
        draft.tokens.append(0)
    return len(draft.tokens)


def test_drafting_stops_where_it_does_not_pay() -> None:
    sure, torn = [5.0] * 20, [0.05] * 20
    assert drafted(Pace(Speculative(None), 0.5), sure) == MOST_DRAFTS
    assert drafted(Pace(Speculative(None), 0.5), sure, most=3) == 3
    assert drafted(Pace(Speculative(None), 0.5), torn) == 1              # .6 for .5, then .36 for .5
    assert drafted(Pace(Speculative(None), 0.7), torn) == 0              # .6 for .7
    assert drafted(Pace(Speculative(None), 0.1), torn) > 1               # a cheap drafter may gamble
    assert drafted(Pace(Speculative(None), 0.5), [5.0, 5.0, 0.05, *sure]) == 2
    assert drafted(Pace(Speculative(4), 0.9), torn) == drafted(Pace(Speculative(4), 0.1), sure) == 4


def test_drafting_stops_where_the_rate_is_highest() -> None:
    """Against trying every length: tokens expected for their cost."""
    draw = random.Random(0)
    for _ in range(200):
        share, leads = draw.uniform(0.05, 0.9), [draw.expovariate(1.0) for _ in range(MOST_DRAFTS)]
        chances, chance = [], 1.0
        for lead in leads:
            chance *= BELIEF[sum(lead >= edge for edge in LEADS)]
            chances.append(chance)
        rates = [(1 + sum(chances[:n])) / (1 + n * share) for n in range(MOST_DRAFTS + 1)]
        assert rates[drafted(Pace(Speculative(None), share), leads)] == pytest.approx(max(rates))


def test_the_pace_learns_from_what_was_accepted() -> None:
    pace = Pace(Speculative(None), 0.5)
    for _ in range(60):
        draft = Draft(4)
        while pace.goes_on(draft, 5.0):
            draft.tokens.append(0)
        if not draft.tokens:
            break
        pace.learn(draft, accepted=0)                                    # sure of itself, and always wrong
    assert drafted(pace, [5.0] * 20) == 0
    assert drafted(pace, [1.0] * 20) > 4                                 # the other classes know nothing of it
    draft = Draft(4)
    for lead in (0.5, 1.0, 5.0):
        pace.goes_on(draft, lead)
        draft.tokens.append(0)
    seen = list(pace.seen)
    pace.learn(draft, accepted=1)
    added = [b - a for a, b in zip(seen[3:5], pace.seen[3:5], strict=True)]
    assert added == pytest.approx([0.98, 0.98]) and pace.seen[5] < seen[5]     # not what comes behind; a little fades
    for _ in range(400):
        pace.learn(Draft(4), 0)
    assert drafted(pace, [5.0] * 20) == MOST_DRAFTS                      # and in time it tries again


def test_adaptive_drafts_stop_at_different_lengths_and_change_nothing(trained: tuple[GPT, Tokenizer]) -> None:
    model, tokenizer = trained
    prompts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in PROBES]
    full = Engine(model).generate(prompts, max_new_tokens=60)
    answers, stats = run(Engine(model), prompts, 60, Speculative(None))
    assert answers == full
    fixed = run(Engine(model), prompts, 60, Speculative(4))[1]
    assert stats.acceptance > fixed.acceptance
    assert run(Engine(model), prompts[:1], 60, Speculative(None))[0] == full[:1]


def test_sampling_is_a_function_of_seed_and_row(poe: GPT) -> None:
    def sample(prompts: list[list[int]], seed: int) -> list[list[int]]:
        return run(Engine(poe), prompts, 20, Speculative(None), sampling=Sampling(1.0, seed=seed))[0]

    one = sample([[5, 6], [5, 6]], 1)
    assert one == sample([[5, 6], [5, 6]], 1)
    assert one[0] == sample([[5, 6], [7] * 20], 1)[0]
    assert one[0] != one[1]
    assert one[0] != sample([[5, 6]], 2)[0]


# -- the distribution -------------------------------------------------------------------------------------------------

V, DRAWS = 8, 20_000


def chi_square_p(counts: torch.Tensor, probs: torch.Tensor) -> float:
    """p-value of counts under probs (cells of less than 5 expected are merged)."""
    expected = probs.double() * counts.sum()
    small = expected < 5
    c = torch.cat([counts[~small].double(), counts[small].sum().double()[None]])
    e = torch.cat([expected[~small], expected[small].sum()[None]])
    keep = e > 0
    statistic = ((c[keep] - e[keep]) ** 2 / e[keep]).sum()
    half = torch.tensor((int(keep.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def two_token_distribution(model: GPT, prompt: list[int], temperature: float) -> torch.Tensor:
    """(V*V,) probabilities of the next two tokens by full sampling, exactly."""
    engine = Engine(model)
    first = (engine.next_logps(torch.tensor([prompt])) / temperature).softmax(-1)[0]
    second = (engine.next_logps(torch.tensor([[*prompt, t] for t in range(V)])) / temperature).softmax(-1)
    return (first[:, None] * second).flatten()


def drawn(model: GPT, prompt: list[int], mode: Speculative | None, temperature: float, rows: int) -> torch.Tensor:
    """(V*V,) counts of the next two tokens of `rows` samples; three are asked for, so that two may be drafted."""
    answers, _ = run(Engine(model), [prompt] * rows, 3, mode, sampling=Sampling(temperature, seed=11))
    return torch.bincount(torch.tensor([a * V + b for a, b, _ in answers]), minlength=V * V)


@pytest.fixture(scope="module")
def toy() -> GPT:
    """2 stages that disagree, V 8."""
    model = live_model(model_config(vocab_size=V, stage_heads=True, n_layer=2, poe_every=1), seed=1)
    with torch.no_grad():
        for head in model.lm_head_stages:
            head.weight.mul_(0.7)
    return model


def test_sampled_text_has_the_distribution_of_the_full_model(toy: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square over 20,000 draws of two tokens; a wrong acceptance rule does not pass it."""
    prompt, temperature = [1, 2, 3], 2.0
    exact = two_token_distribution(toy, prompt, temperature)
    drafter = two_token_distribution_of_stage_0(toy, prompt, temperature)
    assert 0.5 * (exact - drafter).abs().sum() > 0.1                # they differ, so there is something to reject
    assert chi_square_p(drawn(toy, prompt, Speculative(2), temperature, DRAWS), exact) > 0.001

    def always(p: torch.Tensor, q: torch.Tensor, token: int, generator: Any) -> tuple[bool, int]:
        return True, token

    def from_p(p: torch.Tensor, q: torch.Tensor, token: int, generator: Any) -> tuple[bool, int]:
        kept, other = accept(p, q, token, generator)
        return (kept, other) if kept else (False, int(torch.multinomial(p, 1, generator=generator)))

    for wrong in (always, from_p):                                  # no test at all; resampling from p, not (p - q)+
        monkeypatch.setattr(speculative, "accept", wrong)
        assert chi_square_p(drawn(toy, prompt, Speculative(2), temperature, 4000), exact) < 1e-4


def two_token_distribution_of_stage_0(model: GPT, prompt: list[int], temperature: float) -> torch.Tensor:
    engine = Engine(model, View("stage", 0))
    first = (engine.next_logps(torch.tensor([prompt])) / temperature).softmax(-1)[0]
    second = (engine.next_logps(torch.tensor([[*prompt, t] for t in range(V)])) / temperature).softmax(-1)
    return (first[:, None] * second).flatten()


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=3), Sampling(1.0, top_p=0.8), Sampling(0.5)], ids=str)
def test_acceptance_gives_p_for_filtered_distributions(sampling: Sampling) -> None:
    """On distributions alone: what is accepted or drawn anew follows p, also where q has no or other tokens."""
    from nanopoe.infer.sampling import pick, probabilities

    generator = torch.Generator().manual_seed(0)
    p, q = probabilities(torch.randn(2, 6, generator=generator).log_softmax(-1), sampling)
    outcomes = []
    for _ in range(6000):
        token = int(pick(q, generator))
        kept, other = accept(p, q, token, generator)
        outcomes.append(token if kept else other)
    counts = torch.bincount(torch.tensor(outcomes), minlength=6)
    assert counts[p == 0].sum() == 0
    assert chi_square_p(counts, p) > 0.001
    assert chi_square_p(counts, q + 1e-9) < 1e-4


def test_bad_requests_are_refused(poe: GPT) -> None:
    engine = Engine(poe)
    for mode, word in ((Speculative(0), "drafts"), (Speculative(99), "drafts"), (Speculative(4, 3), "cannot draft"),
                       (Speculative(4, 0), "cannot draft")):
        with pytest.raises(ConfigError, match=word):
            engine.stream([[1]], max_new_tokens=1, mode=mode)
    with pytest.raises(ConfigError, match="whole pool"):
        engine.seen_as(View("stage", 1)).stream([[1]], max_new_tokens=1, mode=Speculative())
    bp = live_model(model_config(poe_mode="none", poe_every=None))
    with pytest.raises(ConfigError, match="without stage losses; only full is valid"):
        Engine(bp).stream([[1]], max_new_tokens=1, mode=Speculative())
    assert math.isfinite(run(engine, [[1]], 3, Speculative())[1].acceptance)
