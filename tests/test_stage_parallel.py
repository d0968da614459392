"""parallel.stages: stages on different ranks learn what one rank learns, and leave the same checkpoints."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanopoe.checkpoint import Checkpoint, open_checkpoint
from nanopoe.config import experiment_from_dict, make_plan, valid_world_sizes
from nanopoe.config.counts import trained_shapes
from nanopoe.config.plan import parameter_homes
from nanopoe.config.shares import share_out, share_stages
from nanopoe.dist import World
from nanopoe.errors import ConfigError, NumericsError, PeerError
from nanopoe.train import loop
from nanopoe.train.bench_stages import bench_stages
from nanopoe.train.console import rates
from nanopoe.train.drift import compare_ranks
from nanopoe.train.step import train_step
from nanopoe.train.watch import rank_log
from tests.ranks import experiment_dict, run_ranks
from tests.test_train import interrupted_at

FOUR = {"model.poe_every": 1, "batch.device_batch_size": 2, "schedule.cycles.0.steps": 3, "evaluation.every": 6,
        "optim.embedding_lr": 0.001}


def train(world: World, experiment: dict[str, Any]) -> int:
    return loop.train(experiment_from_dict(experiment, "test"), world).step


def tiny(data: Path, folder: Path, P: int, **changes: Any) -> dict[str, Any]:
    """6 steps of 4 micro-batches, K = 4."""
    return experiment_dict(data, folder, **{**FOUR, **changes, "parallel.stages": P})


def go(data: Path, folder: Path, size: int, P: int, **changes: Any) -> Path:
    assert run_ranks(train, size, tiny(data, folder, P, **changes)) == [6] * size
    return folder


def go_on(data: Path, source: Path, step: int, folder: Path, size: int, P: int, **changes: Any) -> Path:
    """The run from the checkpoint `step` of another, on other ranks."""
    interrupted_at(source, step, folder)
    return go(data, folder, size, P, **changes)


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == kind]


def difference(a: Path, b: Path) -> float:
    """Of the last checkpoints, which hold the same tensors: |a - b| / |a|, of the tensor where it is largest."""
    one, other = open_checkpoint(a, 6), open_checkpoint(b, 6)
    for tensors in ("weights", "optimizer_state"):
        assert {n: (t.dtype, t.shape) for n, t in getattr(one, tensors).items()} == \
               {n: (t.dtype, t.shape) for n, t in getattr(other, tensors).items()}
    assert one.state.keys() == other.state.keys() and one.state["position"] == other.state["position"]
    return max(apart_by(one, other, n) for n in one.weights)


def apart_by(one: Checkpoint, other: Checkpoint, name: str) -> float:
    a, b = one.read(name), other.read(name)
    return float((a - b).norm() / a.norm().clamp(min=1e-30))


@pytest.mark.parametrize("changes, grids", [({"model.stage_heads": False}, [(2, 1), (2, 2)]), ({}, [(4, 1)]),
                                            ({"model.detach_x0": True}, [(2, 1)])])
def test_weights_are_those_of_one_rank(data: Path, tmp_path: Path, changes: dict[str, Any],
                                       grids: list[tuple[int, int]]) -> None:
    """From step 3 on: AdamW's first steps go by signs of gradients that are nothing but rounding (of lambdas 1e-13)."""
    alone = go(data, tmp_path / "alone", 1, 1, **changes)
    for P, D in grids:
        run = go_on(data, alone, 3, tmp_path / f"{P}x{D}", P * D, P, **changes)
        assert difference(alone, run) < 1e-5, (P, D)
        for ours, theirs in zip(lines(run, "train")[3:], lines(alone, "train")[3:], strict=True):
            for key in ("loss", "stage_loss", "grad_norm", "tokens"):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
            assert ours["pool_loss"] is None and len(ours["idle"]) == P * D and 0 <= min(ours["idle"]) < 1
        assert lines(run, "eval")[0]["bpb"]["full"] == pytest.approx(lines(alone, "eval")[0]["bpb"]["full"], rel=1e-5)
        assert next(line for line in lines(run, "event") if line["event"] == "resumed")["changed"] is None
    back = go_on(data, run, 4, tmp_path / "back", 1, 1, **changes)           # what several ranks saved, on one
    assert difference(alone, back) < 1e-5
    interrupted_at(alone, 3, tmp_path / "other")                             # control: it sees a rate of the lambdas
    faster = tiny(data, tmp_path / "other", 2, **changes, **{"optim.scalar_lr": 0.101})
    run_ranks(train, 2, {**faster, "resume": {"allow": ["optim"]}})
    assert difference(alone, tmp_path / "other") > 1e-4


BP = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}


@pytest.mark.parametrize("source, changes", [({}, {}), (BP, {"model.stage_heads": False})],
                         ids=["PoE to PoE", "BP to PoE"])
def test_another_runs_weights_begin_alike_on_any_grid(data: Path, tmp_path: Path, source: dict[str, Any],
                                                      changes: dict[str, Any]) -> None:
    """init_from, with the moments and without: stages on two ranks end where one rank ends."""
    go(data, tmp_path / "source", 1, 1, **source)
    for optimizer in (True, False):
        begin = {"path": str(tmp_path / "source"), "step": 4, "optimizer": optimizer}
        alone, apart = (go(data, tmp_path / f"{optimizer} {P}", P, P, **changes, init_from=begin) for P in (1, 2))
        one, other = open_checkpoint(alone, 6), open_checkpoint(apart, 6)
        assert difference(alone, apart) < 1e-5
        assert one.manifest.fingerprints == other.manifest.fingerprints and one.state["lineage"]
        for key in ("lineage", "optimizer_steps", "tokens"):
            assert one.state[key] == other.state[key], key
        assert other.state["optimizer_steps"] == (10 if optimizer else 6)
        assert max(apart_by(one, other, n) for n in one.optimizer_state) < 1e-4
    assert difference(tmp_path / "True 2", tmp_path / "False 2") > 1e-4              # control: it sees the moments


def memory(world: World, experiment: dict[str, Any]) -> list[Any]:
    """After two steps: names of parameters with state here, bytes of state, whether the weights are all ranks', before
    and after spread()."""
    run = loop.build_run(experiment_from_dict(experiment, "test"), world)
    with run.loader as batches:
        for step in range(2):
            train_step(run.model, run.optimizer, next(batches)[0], step, run.experiment.objective, run.schedule,
                       run.plan, world, False, pipe=run.pipe)
    same = []
    for _ in range(2):
        try:
            compare_ranks(run.optimizer, world)
            same.append(True)
        except PeerError:
            same.append(False)
        run.optimizer.spread()
    parts = list(run.optimizer.state_parts())
    left = [n for n, p in run.model.named_parameters() if p.grad is not None]
    return [sorted({p.param for p in parts}), sum(p.tensor.nbytes for p in parts), same, left]


def test_a_rank_keeps_state_of_its_stages_only(data: Path, tmp_path: Path) -> None:
    everyone = run_ranks(memory, 4, tiny(data, tmp_path / "a", 2))                      # ranks 0 and 2, 1 and 3
    whole = run_ranks(memory, 1, tiny(data, tmp_path / "b", 1))[0]
    assert sum(found[1] for found in everyone) == whole[1] and max(found[1] for found in everyone) < 0.3 * whole[1]
    for rank, (names, _, same, left) in enumerate(everyone):
        layers = {int(re.findall(r"\d+", n)[0]) for n in names if re.search(r"transformer\.h|value_embeds", n)}
        assert layers <= ({0, 1} if rank % 2 == 0 else {2, 3}) and "lm_head.weight" in names and not left
        assert same == [False, True], "the weights of other columns are old until spread()"
    assert set().union(*(names for names, _, _, _ in everyone)) == set(whole[0]) and whole[2] == [True, True]


def flipped(world: World, experiment: dict[str, Any], rank: int | None) -> str:
    """One step; on a rank a weight then changes that another owns, before all get all of them. What is found."""
    run = loop.build_run(experiment_from_dict(experiment, "test"), world)
    with run.loader as batches:
        train_step(run.model, run.optimizer, next(batches)[0], 0, run.experiment.objective, run.schedule, run.plan,
                   world, False, pipe=run.pipe)
    piece = next(p for b in run.optimizer.parcels for p in b.pieces if p.param in run.optimizer.homes and p.owner == 0)
    if world.rank == rank:
        run.optimizer.params[piece.param].data[piece.low] += 1e-3
    run.optimizer.spread()
    try:
        compare_ranks(run.optimizer, world)
    except PeerError as error:
        return str(error)
    return "equal"


def test_a_wrong_copy_in_a_column_is_not_painted_over(data: Path, tmp_path: Path) -> None:
    """Rank 2 runs the stages of rank 0; rank 1 does not, and gets what it lacks (control)."""
    wrong = run_ranks(flipped, 4, tiny(data, tmp_path, 2), 2)
    assert len(set(wrong)) == 1 and "rank 2 silently holds other values of" in wrong[0]
    assert run_ranks(flipped, 4, tiny(data, tmp_path, 2), 1) == ["equal"] * 4


def test_people_are_told_of_the_grid_and_of_idle_ranks(data: Path, tmp_path: Path) -> None:
    go(data, tmp_path, 2, 2, **{"evaluation.tokens": 64})
    log = rank_log(tmp_path, 0).read_text()
    assert "2 ranks = 1 x 2: stages 0-1 | 2-3, float32" in log and re.search(r"ranks idle \d+-\d+ %", log)
    assert "ranks idle 2-5 %" in rates({"idle": [0.02, 0.051, 0.03]}) and "idle" not in rates({"lr_scale": 1.0})


def test_detached_embeddings_belong_to_the_first_column(data: Path, tmp_path: Path) -> None:
    for detached in (True, False):
        found = run_ranks(memory, 2, tiny(data, tmp_path, 2, **{"model.detach_x0": detached}))
        assert ["transformer.wte.weight" in names for names, _, _, _ in found] == [True, not detached]


def poisoned(world: World, experiment: dict[str, Any], rank: int) -> str:
    """Training with a weight of the rank's own stages that is not finite: the message, and whether no step was made."""
    run = loop.build_run(experiment_from_dict(experiment, "test"), world)
    assert run.pipe is not None
    if world.rank == rank:
        with torch.no_grad():
            run.model.get_parameter(f"transformer.h.{run.pipe.stages[0]}.mlp.c_fc.weight")[0, 0] = float("inf")
    with run.loader as batches:
        try:
            train_step(run.model, run.optimizer, next(batches)[0], 0, run.experiment.objective, run.schedule, run.plan,
                       world, False, pipe=run.pipe)
        except NumericsError as error:
            return f"{error} steps={run.optimizer.steps}"
    return "trained on"


@pytest.mark.parametrize("rank, said", [(1, "rank 1 (micro-batch 0, 1, 2, 3)"),
                                        (0, "rank 0 (micro-batch 0, 1, 2, 3), rank 1")])
def test_a_step_that_is_not_finite_stops_all(data: Path, tmp_path: Path, rank: int, said: str) -> None:
    answers = run_ranks(poisoned, 2, tiny(data, tmp_path, 2), rank)
    assert len(set(answers)) == 1 and said in answers[0] and "steps=0" in answers[0]
    assert ("rank 0" in answers[0]) == (rank == 0), "a stage is not touched by those behind it"


@pytest.mark.parametrize("changes, line", [
    ({"model.poe_every": 4}, "parallel.stages: 2 ranks cannot share 1 stage; use 1 or fewer"),
    ({"model.poe_mode": "hier"}, "2 needs poe_mode flat, where no gradient crosses a boundary; got hier"),
    ({"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}, "got none"),
    ({"objective.kind": "residual_logop", "objective.rho": 0.5}, "must be 1 with objective residual_logop, got 2"),
    ({"runtime.numerics": "strict"}, "must be 1 with runtime.numerics strict, got 2"),
])
def test_what_cannot_be_is_refused(data: Path, tmp_path: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as refused:
        experiment_from_dict(tiny(data, tmp_path, 2, **changes), "test")
    assert [line in problem for problem in refused.value.problems] == [True]
    experiment_from_dict(tiny(data, tmp_path, 1, **changes), "test")                                        # control


def test_the_world_is_a_grid(data: Path, tmp_path: Path) -> None:
    experiment = experiment_from_dict(tiny(data, tmp_path, 2), "test")
    assert valid_world_sizes(experiment) == [2, 4, 8]
    with pytest.raises(ConfigError, match=r"3 ranks in groups of 2 \(parallel.stages\) .* use 2, 4, 8 ranks"):
        make_plan(experiment, 3)
    plan = make_plan(experiment, 4)
    assert plan.stages == (range(2), range(2, 4)) and (plan.world_size, plan.micro_steps) == (2, 2)
    assert [plan.place(r) for r in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [plan.column(c) for c in (0, 1)] == [(0, 2), (1, 3)] and plan.grid() == "2 x 2: stages 0-1 | 2-3"
    homes, shapes = parameter_homes(experiment.model, plan), trained_shapes(experiment.model)
    assert homes["transformer.h.1.attn.c_q.weight"] == homes["lm_head_stages.0.weight"] == (0, 2)
    assert homes["value_embeds.3.weight"] == (1, 3)
    assert shapes.keys() - homes.keys() == {"transformer.wte.weight", "lm_head.weight", "resid_lambdas", "x0_lambdas",
                                            "smear_gate.weight", "smear_lambda"}
    for piece in share_out(shapes, dict.fromkeys(shapes, "adamw"), 4, homes):
        assert piece.owner in homes.get(piece.param, range(4))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.data())
def test_stages_are_shared_as_evenly_as_can_be(costs: list[int], draw: st.DataObject) -> None:
    ranks = draw.draw(st.integers(1, len(costs)))
    runs = share_stages(costs, ranks)
    assert [k for run in runs for k in run] == list(range(len(costs))) and len(runs) == ranks and all(runs)
    cuts = itertools.combinations(range(1, len(costs)), ranks - 1)
    best = min(max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *cut, len(costs)))) for cut in cuts)
    assert max(sum(costs[k] for k in run) for run in runs) == best


def benched(world: World, experiment: dict[str, Any]) -> dict[str, Any]:
    return bench_stages(experiment_from_dict(experiment, "test"), world, 2)


def test_the_bench_compares_equal_training(data: Path, tmp_path: Path) -> None:
    found = run_ranks(benched, 2, tiny(data, tmp_path, 2))[0]
    assert found["loss_difference"] < 1e-5 and found["weight_difference"] < 1e-5
    assert found["speedup"] > 0 and len(found["idle"]) == 2 and all(0 <= share < 1 for share in found["idle"])
