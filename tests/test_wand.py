"""Adaptive depth: the theorem of the bounds, exactness of what is cached, calibration against plain arithmetic."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from nanopoe.errors import ConfigError
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99, calibrate, lead_bounds, predicted_exits
from nanopoe.infer.depth import DepthStats, Wand
from nanopoe.infer.engine import Engine
from nanopoe.infer.probes import PROBES
from nanopoe.infer.sampling import Sampling
from nanopoe.model import GPT
from nanopoe.model.pool import View
from nanopoe.tokenizer import Tokenizer
from tests.models import documents, live_model, run, three_stages
from tests.ranks import model_config

PROMPTS = [[5, 6, 7], [8], list(range(20)), [9, 9]]


@pytest.fixture(scope="module")
def poe() -> GPT:
    return three_stages(window_sizes=(5, 9, 9, 32, 9, 32))


def rows_of(tokenizer: Tokenizer, texts: Sequence[str], T: int, count: int) -> list[torch.Tensor]:
    ids = torch.tensor([i for text in texts for i in [tokenizer.bos_id, *tokenizer.encode(text[:2000])]])
    return [ids[i * T:(i + 8) * T].unfold(0, T, T) for i in range(0, count, 8)]


@pytest.fixture(scope="module")
def calibration(trained: tuple[GPT, Tokenizer], corpus: Path) -> dict:
    model, tokenizer = trained
    return calibrate(model, rows_of(tokenizer, documents(corpus, 6, 60), 65, 64))


# -- generation -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("bounds,lead", [(MAX, False), (LEAD_MAX, True)], ids=["ranges", "lead"])
def test_bounds_of_all_tokens_equal_full_on_probes_and_real_text(
        trained: tuple[GPT, Tokenizer], corpus: Path, calibration: dict, bounds: str, lead: bool) -> None:
    model, tokenizer = trained
    engine = Engine(model)
    probes = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in PROBES]
    texts = [[tokenizer.bos_id, *tokenizer.encode(d[:150])][:40] for d in documents(corpus, 6, 50)]
    exits = np.zeros(3, dtype=int)
    for prompts in (probes, texts):
        full = engine.generate(prompts, max_new_tokens=60)
        answers, stats = run(engine, prompts, 60, Wand(calibration[bounds], lead))
        assert answers == full
        exits += np.array(stats.exits)
    assert exits.sum() == 57 * 60
    assert (exits > 0).all()                                        # it did leave early, at every stage
    assert 1 < stats.mean_depth < 3
    ranges = run(engine, texts, 60, Wand(calibration[MAX]))[1]
    assert stats.mean_depth < ranges.mean_depth if lead else stats.mean_depth == ranges.mean_depth
    careless, _ = run(engine, texts, 60, Wand([0.0, 0.0]))          # bounds that do not hold
    assert careless != full
    assert careless == engine.seen_as(View("stage", 0)).generate(texts, max_new_tokens=60)


def test_infinite_depth_and_random_weights(poe: GPT) -> None:
    engine = Engine(poe)
    full = engine.generate(PROMPTS, max_new_tokens=60)
    answers, stats = run(engine, PROMPTS, 60, Wand([1e9, 1e9]))
    assert answers == full
    assert stats.exits == [0, 0, 240]
    assert stats.mean_depth == 3
    assert run(engine, PROMPTS, 60, Wand([0.5, 0.5]))[0] != full


class Scripted:
    """A rule that leaves at given stages, sure or not."""

    def __init__(self, seed: int, weights: Sequence[int]):
        self.draw, self.weights, self.stage = random.Random(seed), weights, {}

    def check(self, *_: object) -> None:
        pass

    def begin(self, rows: Sequence[int]) -> None:
        self.stage = {r: self.draw.choices(range(3), self.weights)[0] for r in rows}

    def looks(self, k: int, rows: Sequence[int]) -> bool:
        return any(self.stage[r] == k for r in rows)

    def leave(self, k: int, total: torch.Tensor, rows: Sequence[int]) -> list[bool]:
        return [self.stage[r] == k for r in rows]


@pytest.mark.parametrize("seed", range(4))
def test_each_token_is_what_its_prefix_says_of_the_text(poe: GPT, seed: int) -> None:
    """Whatever was skipped before: a token that left at stage k is the prefix's answer to the text, and the pool's
    log-probabilities after a run of skips are those of no skips within 1e-4."""
    engine, rule = Engine(poe), Scripted(seed, [6, 2, 1])
    stream = list(engine.stream(PROMPTS, max_new_tokens=30, mode=rule))            # type: ignore[arg-type]
    assert {stage for *_, stage in stream} == {0, 1, 2}
    texts = [list(p) for p in PROMPTS]
    for row, token, stage in stream:
        view = engine.seen_as(View("prefix", stage + 1))
        assert int(view.next_logps(torch.tensor([texts[row][-80:]])).argmax()) == token
        texts[row].append(token)
    decoder, ids = engine.decoder(1, 60), texts[2]
    with torch.no_grad():
        for token in ids[:-1]:
            decoder.feed({0: [token]})
            decoder.run(0)
            if rule.draw.random() < 0.2:
                decoder.run(1)
        skipped = engine.next_logps(torch.tensor([ids[-1:]]), decoder)
    torch.testing.assert_close(skipped, engine.next_logps(torch.tensor([ids])), rtol=0, atol=1e-4)


def test_a_look_that_is_put_off_could_not_have_decided() -> None:
    """Within the bounds, `looks` says no only where the margin cannot suffice; and it does say no."""
    generator, put_off = torch.Generator().manual_seed(0), 0
    for _ in range(300):
        bounds = (0.2 + torch.rand(3, generator=generator)).tolist()
        means = [torch.randn(1, 20, generator=generator)]
        for bound in bounds:                                        # deltas with a range of exactly the bound at most
            delta = torch.rand(1, 20, generator=generator) * bound
            means.append(means[-1] + delta)
        rule = Wand(bounds)
        rule.begin([7])
        for k in range(3):
            looks = rule.looks(k, [7])
            leaves = Wand(bounds)
            leaves.begin([7])
            would = leaves.leave(k, means[k] * (k + 1), [7])[0]
            assert looks or not would
            put_off += not looks
            if looks and rule.leave(k, means[k] * (k + 1), [7])[0]:
                assert all(int(m.argmax()) == int(means[k].argmax()) for m in means[k:])     # the theorem
                break
    assert put_off > 20


def test_the_theorem_needs_all_remaining_bounds() -> None:
    """The margin must exceed the sum, not the next bound alone: here the last stage turns the answer around."""
    first = torch.tensor([[1.0, 0.0]])
    rule = Wand([0.6, 0.6])
    rule.begin([0])
    assert rule.leave(0, first, [0]) == [False]
    second = (first + torch.tensor([[0.0, 0.6]])) * 2
    third = second / 2 + torch.tensor([[0.0, 0.6]])
    assert int(third.argmax()) == 1 != int(first.argmax())
    alone = Wand([0.6, 0.0])                                        # the control: one bound forgotten
    alone.begin([0])
    assert alone.leave(0, first, [0]) == [True]


def test_released_rows_do_not_hold_up_the_others(poe: GPT) -> None:
    engine = Engine(poe)
    full = engine.generate(PROMPTS, max_new_tokens=30)
    stop = full[0][3]
    wanted = [a[:a.index(stop)] if stop in a else a for a in full]
    answers, stats = run(engine, PROMPTS, 30, Wand([1e9, 1e9]), stop={stop})
    assert answers == wanted
    assert stats.tokens == sum(len(a) + (len(a) < 30) for a in wanted)             # a stop token was decided too


# -- calibration ------------------------------------------------------------------------------------------------------

def naive_prefixes(model: GPT, rows: torch.Tensor) -> torch.Tensor:
    """(K, N, V) mean log-probabilities of every prefix, by the definition."""
    with torch.no_grad():
        logps = [model.stage_logits(x, k).log_softmax(-1).flatten(0, 1)
                 for k, x in enumerate(model.boundary_states(rows[:, :-1]))]
    return torch.stack([torch.stack(logps[:k + 1]).mean(0) for k in range(len(logps))])


def test_bounds_are_the_ranges_of_the_transitions(poe: GPT) -> None:
    rows = torch.randint(300, (6, 33), generator=torch.Generator().manual_seed(0))
    found = calibrate(poe, list(rows.split(2)))
    prefixes = naive_prefixes(poe, rows)
    delta = prefixes[1:] - prefixes[:-1]
    ranges = (delta.amax(-1) - delta.amin(-1)).T.numpy()                           # (N, K-1)
    assert found["tokens"] == len(ranges) == 192
    assert found[MAX] == pytest.approx(ranges.max(0), abs=1e-4)
    assert found[P99] == pytest.approx(np.quantile(ranges, 0.99, axis=0), abs=1e-4)
    assert all(p < m for p, m in zip(found[P99], found[MAX], strict=True))
    shifted = delta + torch.randn(2, 192, 1)                                       # a constant per position is no range
    assert (shifted.amax(-1) - shifted.amin(-1)).T.numpy() == pytest.approx(ranges, abs=1e-4)


def test_lead_bounds_are_what_the_later_stages_take(poe: GPT) -> None:
    rows = torch.randint(300, (6, 33), generator=torch.Generator().manual_seed(0))
    found, prefixes = calibrate(poe, [rows]), naive_prefixes(poe, rows)
    losses = []
    for means in prefixes[:-1]:
        top = means.argmax(-1)

        def lead(scores: torch.Tensor, top: torch.Tensor = top) -> torch.Tensor:      # of `top` over all others
            others = scores.scatter(-1, top[:, None], -torch.inf)
            return scores.gather(-1, top[:, None])[:, 0] - others.amax(-1)

        losses.append((lead(means) - lead(prefixes[-1])).numpy())
    needed = [max(l.max() for l in losses[k:]) for k in range(2)]                     # later never more than earlier
    assert np.cumsum(found[LEAD_MAX][::-1])[::-1] == pytest.approx(needed, abs=1e-4)
    first, last = (np.quantile(l, 0.99) for l in losses)
    assert np.cumsum(found[LEAD_P99][::-1])[::-1] == pytest.approx([max(first, last), last], abs=1e-4)
    assert sum(found[LEAD_P99]) < sum(found[LEAD_MAX]) < sum(found[MAX])
    assert found["wand"]["lead"]["agreement"] == 1 > found["curves"]["lead"][0]["agreement"]
    assert lead_bounds(np.array([1.0, 3.0, -2.0])).tolist() == [0.0, 3.0, 0.0]


def test_a_lead_that_grows_lets_the_next_stage_decide() -> None:
    """Bounds on what is lost say nothing about what is won: no look is put off. Bounds on ranges do put it off."""
    first, second = torch.tensor([[0.1, 0.0]]), torch.tensor([[5.0, 0.0]])
    for lead in (True, False):
        rule = Wand([0.2, 0.5], lead)
        rule.begin([0])
        assert rule.looks(0, [0]) and rule.leave(0, first, [0]) == [False]
        assert rule.looks(1, [0]) is lead
    assert rule.leave(1, second * 2, [0]) == [True]


def test_predicted_exits_are_those_of_generation(trained: tuple[GPT, Tokenizer], calibration: dict) -> None:
    """The prediction, replayed token by token with the rule itself."""
    prefixes = torch.randn(3, 500, 30, generator=torch.Generator().manual_seed(0)).cumsum(0)
    best = prefixes.topk(2, dim=-1)
    margins, tops = (best.values[..., 0] - best.values[..., 1])[:2].T.numpy(), best.indices[..., 0].T.numpy()
    bounds = np.array([0.5, 0.3])
    found = predicted_exits(margins, tops, bounds, [0.4, 0.7, 1.0])
    exits = []
    for i in range(500):
        rule = Wand(bounds.tolist())
        rule.begin([0])
        exits.append(next((k for k in range(2) if rule.leave(k, prefixes[k, i:i + 1] * (k + 1), [0])[0]), 2))
    counts = np.bincount(exits, minlength=3)
    assert found["exits"] == pytest.approx(counts / 500)
    assert found["mean_depth"] == pytest.approx(np.mean(exits) + 1)
    assert found["predicted_speedup"] == pytest.approx(500 / (counts @ [0.4, 0.7, 1.0]))
    assert found["agreement"] == pytest.approx(np.mean([tops[i, e] == tops[i, 2] for i, e in enumerate(exits)]))
    assert found["agreement"] < 1 == calibration["wand"]["max"]["agreement"]       # which hold where found
    assert calibration["wand"]["p99"]["mean_depth"] < calibration["wand"]["max"]["mean_depth"]


# -- refused ----------------------------------------------------------------------------------------------------------

def test_bad_requests_are_refused(poe: GPT) -> None:
    engine = Engine(poe)
    for bounds in ([], [1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ConfigError, match="bounds for 3 stages, which need 2"):
            engine.stream([[1]], max_new_tokens=1, mode=Wand(bounds))
    for bounds in ([-1.0, 1.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(ConfigError, match="finite and not negative"):
            engine.stream([[1]], max_new_tokens=1, mode=Wand(bounds))
    for sampling in (Sampling(0.5), Sampling(repetition_penalty=1.1)):
        with pytest.raises(ConfigError, match="greedy"):
            engine.stream([[1]], max_new_tokens=1, mode=Wand([1.0, 1.0]), sampling=sampling)
    with pytest.raises(ConfigError, match="alpha"):
        Engine(poe, alpha=0.5).stream([[1]], max_new_tokens=1, mode=Wand([1.0, 1.0]))
    with pytest.raises(ConfigError, match="whole pool"):
        engine.seen_as(View("prefix", 2)).stream([[1]], max_new_tokens=1, mode=Wand([1.0, 1.0]))
    bp = live_model(model_config(poe_mode="none", poe_every=None))
    for call in (lambda: Engine(bp).stream([[1]], max_new_tokens=1, mode=Wand([])), lambda: calibrate(bp, [])):
        with pytest.raises(ConfigError, match="without stage losses; only full is valid"):
            call()
    assert DepthStats([1, 0, 1]).mean_depth == 2
