"""Routing: isotonic estimate, threshold and figures against plain arithmetic; generation at both ends and between."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nanopoe.errors import ConfigError, DataError
from nanopoe.infer.calibrate import calibrate, lowest_confidence, non_increasing, projected_speedup, route
from nanopoe.infer.depth import Routed
from nanopoe.infer.engine import Engine
from nanopoe.infer.sampling import Sampling
from nanopoe.model import GPT
from nanopoe.model.pool import View
from nanopoe.tokenizer import Tokenizer
from tests.models import live_model, run, three_stages
from tests.ranks import model_config

PROMPTS = [[5, 6, 7], [8], list(range(20)), [9, 9]]


@pytest.fixture(scope="module")
def poe() -> GPT:
    return three_stages()


def test_isotonic_estimate_is_the_nearest_non_increasing_sequence() -> None:
    """Against the min-max formula of isotonic regression."""
    draw = np.random.default_rng(0)
    for _ in range(30):
        values, weights = draw.normal(size=12), draw.integers(1, 5, size=12)

        def mean(i: int, j: int, values: np.ndarray = values, weights: np.ndarray = weights) -> float:
            return float(np.average(values[i:j + 1], weights=weights[i:j + 1]))

        exact = [min(max(mean(i, j) for j in range(k, 12)) for i in range(k + 1)) for k in range(12)]
        found = non_increasing(values, weights)
        assert found == pytest.approx(exact)
        assert (np.diff(found) <= 1e-12).all()
    assert non_increasing(np.array([3.0, 2.0, 1.0]), np.ones(3)).tolist() == [3, 2, 1]
    assert non_increasing(np.array([1.0, 2.0, 3.0]), np.ones(3)).tolist() == [2, 2, 2]


def test_threshold_is_the_lowest_confidence_under_the_cap() -> None:
    confidence = np.array([0.1, 0.2, 0.3, 0.4, 0.4, 0.9])
    loss = np.array([1.0, 0.0, 1.0, 0.0, 0.0, 0.0])                 # estimates 1, .5, .5, 0, 0, 0
    assert lowest_confidence(confidence, loss, 0.02) == 0.4
    assert lowest_confidence(confidence, loss, 0.5) == 0.2
    assert lowest_confidence(confidence, loss, 1.0) == 0.1
    assert lowest_confidence(confidence, np.ones(6), 0.02) == float("inf")
    shuffled = np.array([3, 0, 5, 1, 4, 2])
    assert lowest_confidence(confidence[shuffled], loss[shuffled], 0.02) == 0.4


def test_three_modes_measure_three_losses() -> None:
    draw = np.random.default_rng(1)
    n = 4000
    confidence = draw.uniform(size=n)
    first = (draw.uniform(size=n) < confidence).astype(float)
    agrees = (draw.uniform(size=n) < confidence).astype(float)
    seen = {"confidence": confidence, "first_right": first, "agrees": agrees,
            "pool_right": np.maximum(first, draw.uniform(size=n) < 0.5).astype(float),
            "first_nats": 1 + 0.2 * (1 - confidence), "pool_nats": np.ones(n)}
    masked = {k: np.concatenate([v, np.full(50, np.nan)]) for k, v in seen.items()}
    losses = {"target_regression": seen["pool_right"] * (1 - first), "agreement": 1 - agrees,
              "nll": seen["first_nats"] - 1}
    thresholds = {}
    for mode, loss in losses.items():
        found = route(masked, mode, 0.02, 0.4)                      # type: ignore[arg-type]
        above = confidence >= found["threshold"]
        thresholds[mode] = found["threshold"]
        assert found["routed"] == pytest.approx(above.mean())
        assert found["regression"] == pytest.approx((loss * above).mean())
        assert found["regression"] <= 0.02
        assert found["regression_held_out"] < 0.03
        assert found["agreement"] == pytest.approx(agrees.mean())
        assert found["projected_speedup"] == pytest.approx(1 / (above.mean() * 0.4 + 1 - above.mean()))
        wider = route(masked, mode, 0.2, 0.4)                       # type: ignore[arg-type]
        assert wider["threshold"] < found["threshold"]
    assert len(set(thresholds.values())) == 3
    assert thresholds["nll"] == pytest.approx(0.9, abs=0.01)
    none = route({**masked, "agrees": np.zeros(n + 50)}, "agreement", 0.02, 0.4)
    assert (none["threshold"], none["routed"], none["projected_speedup"]) == (None, 0.0, 1.0)


def test_published_rows_have_one_cost_share() -> None:
    """SPEC 7, columns routed and speed-up: the three rows give the same share c of stage 0, near 1/2 (16 of 32
    layers)."""
    for routed, speedup in ((0.8505, 1.715), (0.7105, 1.534), (0.7051, 1.526)):
        assert projected_speedup(routed, 0.51) == pytest.approx(speedup, abs=0.003)
    assert projected_speedup(0.8505, 0.4) != pytest.approx(1.715, abs=0.1)


def test_calibration_counts_targets_only(poe: GPT) -> None:
    rows = torch.randint(300, (8, 33), generator=torch.Generator().manual_seed(0))
    masked = torch.where(torch.arange(33) < 20, ~rows, rows)
    with torch.no_grad():
        logps = [poe.stage_logits(x, k).log_softmax(-1) for k, x in enumerate(poe.boundary_states(rows[:, :-1]))]
    pool, target = torch.stack(logps).mean(0), rows[:, 1:]
    agrees = (logps[0].argmax(-1) == pool.argmax(-1)).double()
    whole, part = calibrate(poe, [rows], mode="agreement", cap=0.9), calibrate(poe, [masked], mode="agreement", cap=0.9)
    assert whole["routing"]["agreement"] == pytest.approx(float(agrees.mean()))
    assert part["routing"]["agreement"] == pytest.approx(float(agrees[:, 19:].mean()))
    assert (whole["tokens"], part["tokens"]) == (target.numel(), 8 * 13)
    confidence = logps[0].amax(-1).exp()
    routed = (confidence >= whole["routing"]["threshold"]).double()
    assert whole["routing"]["routed"] == pytest.approx(float(routed.mean()), abs=1 / 256)
    with pytest.raises(DataError, match="no targets"):
        calibrate(poe, [~rows])
    with pytest.raises(DataError, match="no rows"):
        calibrate(poe, [])
    with pytest.raises(ConfigError, match="unknown mode"):
        calibrate(poe, [rows], mode="speed")                        # type: ignore[arg-type]


# -- generation -------------------------------------------------------------------------------------------------------

def test_thresholds_at_the_ends_are_stage_0_and_the_pool(poe: GPT) -> None:
    engine = Engine(poe)
    full = engine.generate(PROMPTS, max_new_tokens=40)
    first = engine.seen_as(View("stage", 0)).generate(PROMPTS, max_new_tokens=40)
    assert full != first
    assert run(engine, PROMPTS, 40, Routed(float("inf")))[0] == full
    answers, stats = run(engine, PROMPTS, 40, Routed(0.0))
    assert answers == first
    assert stats.exits == [160, 0, 0]


def test_a_confident_stage_0_answers_and_the_pool_else(trained: tuple[GPT, Tokenizer]) -> None:
    """Each token by the rule, from the text so far without any cache."""
    model, tokenizer = trained
    engine = Engine(model)
    first = engine.seen_as(View("stage", 0))
    prompts = [[tokenizer.bos_id, *tokenizer.encode(p)] for p in ("def f(", "The list of")]
    text = prompts[0] + engine.generate(prompts[:1], max_new_tokens=40)[0]
    with torch.no_grad():
        seen = model.stage_logits(model.boundary_states(torch.tensor([text]))[0], 0).softmax(-1).amax(-1)
    ordered = seen.sort().values
    threshold = float(ordered[len(ordered) // 2:][:2].mean())          # between two confidences, not one of them
    texts = [list(p) for p in prompts]
    stages = set()
    for row, token, stage in engine.stream(prompts, max_new_tokens=40, mode=Routed(threshold)):
        ids = torch.tensor([texts[row]])
        logps = first.next_logps(ids)
        confident = float(logps.max().exp()) >= threshold
        assert stage == (0 if confident else 2)
        assert token == int((logps if confident else engine.next_logps(ids)).argmax())
        texts[row].append(token)
        stages.add(stage)
    assert stages == {0, 2}


def test_bad_requests_are_refused(poe: GPT) -> None:
    for engine, mode, sampling, word in (
            (Engine(poe), Routed(-1.0), None, "threshold"), (Engine(poe), Routed(float("nan")), None, "threshold"),
            (Engine(poe), Routed(0.5), Sampling(1.0), "greedy"), (Engine(poe, alpha=1.0), Routed(0.5), None, "greedy"),
            (Engine(live_model(model_config(poe_mode="none", poe_every=None))), Routed(0.5), None, "stage losses")):
        with pytest.raises(ConfigError, match=word):
            engine.stream([[1]], max_new_tokens=1, mode=mode, sampling=sampling)
