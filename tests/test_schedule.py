"""The schedules as published, to the step, against a naive formulation, and as properties."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.config import load_experiment
from nanopoe.config.schema import CycleConfig
from nanopoe.schedule import Schedule

ROOT = Path(__file__).parents[1]


def schedule_of(name: str) -> Schedule:
    return Schedule(load_experiment(ROOT / "configs" / f"{name}.yaml").schedule.cycles)


def naive(N: int, W: int, D: int, peak: float, final: float, ramp: int) -> list[tuple[float, float, float]]:
    """(lr, momentum, decay) for rel 0 .. N, walked from both ends: another way to say SPEC 9."""
    lr, momentum = [peak] * (N + 1), [0.97] * (N + 1)
    for i in range(D):                                       # from the last value back to the hold
        lr[N - i] = peak * final + (peak - peak * final) * i / D
        momentum[N - i] = 0.90 + 0.07 * i / D
    for i in range(W):
        lr[i] = peak * (i + 1) / W
    for i in range(ramp):
        momentum[i] = 0.85 + 0.12 * i / ramp
    decay = [math.cos(math.pi * i / (2 * N)) ** 2 for i in range(N + 1)]      # half-angle form of the cosine
    return list(zip(lr, momentum, decay, strict=True))


def values(schedule: Schedule, step: int) -> tuple[float, float, float]:
    return schedule.lr_scale(step), schedule.momentum(step), schedule.weight_decay_scale(step)


def close(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(math.isclose(x, y, rel_tol=1e-12, abs_tol=1e-12) for x, y in zip(a, b, strict=True))


def test_1p3b_to_the_step() -> None:
    schedule = schedule_of("bp_1p3b")
    assert schedule.total_steps == 26_430
    expected = naive(26_430, 40, 17_180, 1.0, 0.05, 400)
    assert all(close(values(schedule, s), expected[s]) for s in range(26_431))
    assert schedule.lr_scale(0) == 1 / 40
    assert schedule.lr_scale(38) < 1
    assert schedule.lr_scale(39) == 1
    assert schedule.lr_scale(26_430 - 17_180) == 1 > schedule.lr_scale(26_430 - 17_180 + 1)
    assert schedule.lr_scale(26_430) == pytest.approx(0.05, abs=1e-15)
    assert schedule.momentum(0) == 0.85
    assert schedule.momentum(400) == 0.97
    assert schedule.momentum(200) == pytest.approx(0.91)
    assert schedule.momentum(26_430) == pytest.approx(0.90)


def test_3b_to_the_step() -> None:
    schedule = schedule_of("poe_3b")
    assert schedule.total_steps == 83_923
    expected = naive(83_923, 1000, 54_550, 1.0, 0.05, 400)
    assert all(close(values(schedule, s), expected[s]) for s in range(83_924))
    assert schedule.lr_scale(999) == 1 > schedule.lr_scale(998)
    assert schedule.lr_scale(29_373) == 1 > schedule.lr_scale(29_374)


def test_continual_cycle_to_the_step() -> None:
    schedule, anchor = schedule_of("poe_3b_cycle2"), 83_923
    assert schedule.total_steps == 134_723
    assert schedule.cycle_at(anchor) == (1, 0)
    assert schedule.cycle_at(134_723) == (1, 50_800)
    assert schedule.cycle_at(anchor - 1) == (0, 83_922)
    lr = {rel: schedule.lr_scale(anchor + rel) for rel in (0, 77, 999, 1000, 22_860, 22_861, 50_799, 50_800)}
    assert lr[0] == 0.5 * 1 / 1000
    assert lr[77] == pytest.approx(0.039, abs=1e-15)
    assert lr[999] == lr[1000] == lr[22_860] == 0.5
    assert lr[22_861] == pytest.approx(0.5 * 27_939 / 27_940, abs=1e-15)
    assert anchor + 22_861 == 106_784
    assert lr[50_799] == pytest.approx(0.5 / 27_940, abs=1e-15)
    assert lr[50_800] == 0
    first_decayed = next(s for s in range(anchor + 1000, 134_724) if schedule.lr_scale(s) < 0.5)
    assert first_decayed == 106_784
    assert schedule.momentum(anchor) == 0.97                    # does not ramp again
    assert schedule.momentum(134_723) == pytest.approx(0.90)
    assert schedule.weight_decay_scale(anchor) == 1
    assert schedule.weight_decay_scale(anchor + 25_400) == pytest.approx(0.5)
    expected = naive(50_800, 1000, 27_940, 0.5, 0.0, 0)
    assert all(close(values(schedule, anchor + rel), expected[rel]) for rel in range(50_801))
    base = schedule_of("poe_3b")
    assert all(values(schedule, s) == values(base, s) for s in range(anchor))


SHORT = Schedule([CycleConfig(steps=300, warmup_steps=10, warmdown_ratio=0.65, peak=1.0, final_frac=0.05,
                              momentum_warmup_steps=50)])


def test_phases() -> None:
    schedule = SHORT
    runs = [(phase, len(list(steps))) for phase, steps in itertools.groupby(range(301), schedule.phase)]
    assert runs == [("warm-up", 10), ("hold", 96), ("warm-down", 195)]


def test_steps_outside_of_the_run_are_refused() -> None:
    schedule = SHORT
    for ask in (schedule.lr_scale, schedule.momentum, schedule.weight_decay_scale, schedule.cycle_at, schedule.phase):
        ask(0), ask(300)
        for step in (-1, 301):
            with pytest.raises(ValueError, match=r"outside of 0\.\.300"):
                ask(step)


@st.composite
def cycles(draw: st.DrawFn) -> CycleConfig:
    steps = draw(st.integers(1, 200))
    ratio = draw(st.floats(0, 1))
    free = steps - round(ratio * steps)
    return CycleConfig(steps=steps, warmup_steps=draw(st.integers(0, free)), warmdown_ratio=ratio,
                       peak=draw(st.floats(0.01, 2)), final_frac=draw(st.floats(0, 1)),
                       momentum_warmup_steps=draw(st.integers(0, free)))


@settings(max_examples=150, deadline=None)
@given(st.lists(cycles(), min_size=1, max_size=4))
def test_any_schedule_equals_the_naive_one_and_is_append_only(items: list[CycleConfig]) -> None:
    schedule = Schedule(items)
    assert schedule.total_steps == sum(c.steps for c in items)
    start = 0
    for index, c in enumerate(items):
        down = round(c.warmdown_ratio * c.steps)
        expected = naive(c.steps, c.warmup_steps, down, c.peak, c.final_frac, c.momentum_warmup_steps)
        last = index == len(items) - 1
        for rel in range(c.steps + last):
            assert schedule.cycle_at(start + rel) == (index, rel)
            assert close(values(schedule, start + rel), expected[rel])
        prefix = Schedule(items[: index + 1])
        assert all(values(prefix, s) == values(schedule, s) for s in range(prefix.total_steps))
        start += c.steps


@settings(max_examples=100, deadline=None)
@given(cycles())
def test_inside_a_cycle_nothing_jumps(c: CycleConfig) -> None:
    schedule, down = Schedule([c]), round(c.warmdown_ratio * c.steps)
    lr_bound = c.peak * max(1 / max(c.warmup_steps, 1), (1 - c.final_frac) / max(down, 1)) + 1e-12
    momentum_bound = 0.12 / max(c.momentum_warmup_steps, 1) + 0.07 / max(down, 1) + 1e-12
    for s in range(c.steps):
        (lr, momentum, decay), (lr2, momentum2, decay2) = values(schedule, s), values(schedule, s + 1)
        assert abs(lr2 - lr) <= lr_bound
        assert 0 < lr <= c.peak * (1 + 1e-12)
        assert abs(momentum2 - momentum) <= momentum_bound
        assert 0.85 - 1e-12 <= momentum <= 0.97
        assert 0 <= decay - decay2 <= math.pi / 2 / c.steps + 1e-12
