"""The loop: a resume cannot be told from an uninterrupted run, ranks agree, non-finite steps are not taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.checkpoint import digest as checkpoint_digest
from nanopoe.checkpoint import folder_of, list_steps, open_checkpoint
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError, DataError, NanopoeError, NumericsError
from nanopoe.train import build, loop
from nanopoe.train import step as training
from tests.ranks import experiment_dict, run_ranks

ALONE = World(0, 1, torch.device("cpu"))
TIMINGS = ("seconds", "wait_seconds", "tokens_per_s", "mfu", "memory_bytes")


def train(world: World, experiment: dict[str, Any]) -> int:
    return loop.train(experiment_from_dict(experiment, "test"), world).step


def digest(run_dir: Path, step: int) -> str:
    """Of everything that a run has learned and where it stands: weights, optimizer state, data position."""
    return checkpoint_digest(open_checkpoint(run_dir, step))


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says of training and evaluation, without timings."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines if line["kind"] != "event"]


def interrupted_at(whole: Path, step: int, to: Path) -> None:
    """The run folder as it was after `step`."""
    shutil.copytree(whole, to)
    for later in list_steps(to):
        if later > step:
            shutil.rmtree(folder_of(to, later))


@pytest.mark.parametrize("size", [1, 2])
def test_resume_is_bitwise(data: Path, tmp_path: Path, size: int) -> None:
    """From the start (1), mid-epoch (3; 2 micro-steps on 1 rank), the edge of a cycle (5), inside it (6), the end."""
    whole = tmp_path / "whole"
    assert run_ranks(train, size, experiment_dict(data, whole)) == [8] * size
    final = digest(whole, 8)
    assert len(list_steps(whole)) == 8
    for step in (1, 3, 5, 6):
        again = tmp_path / f"from{step}"
        interrupted_at(whole, step, again)
        run_ranks(train, size, experiment_dict(data, again))
        assert digest(again, 8) == final, step
        assert metrics(again) == metrics(whole), step
    before = (whole / "checkpoints" / "step_00000008" / "manifest.json").stat().st_mtime_ns
    assert run_ranks(train, size, experiment_dict(data, whole)) == [8] * size        # finished: nothing to do
    assert (whole / "checkpoints" / "step_00000008" / "manifest.json").stat().st_mtime_ns == before
    assert "nothing to do" in (whole / "metrics.jsonl").read_text()
    other = tmp_path / "other"                                                      # control: the digest sees a seed
    run_ranks(train, size, experiment_dict(data, other, seed=8))
    assert digest(other, 8) != final


def test_epochs_are_crossed(data: Path, tmp_path: Path) -> None:
    """The test above means something only if its run reads documents of a second epoch."""
    train(ALONE, experiment_dict(data, tmp_path / "run", **{"schedule.cycles.0.steps": 60}))
    state = open_checkpoint(tmp_path / "run").state
    assert max(lane["cursors"]["tiny"][0] for lane in state["position"]["lanes"].values()) >= 1
    interrupted_at(tmp_path / "run", 57, tmp_path / "again")
    train(ALONE, experiment_dict(data, tmp_path / "again", **{"schedule.cycles.0.steps": 60}))
    assert digest(tmp_path / "again", 63) == digest(tmp_path / "run", 63)


def test_a_small_validation_split_is_said(data: Path, tmp_path: Path) -> None:
    for tokens, said in ((256, False), (10**6, True)):
        run_dir = tmp_path / str(tokens)
        train(ALONE, experiment_dict(data, run_dir, **{"evaluation.tokens": tokens, "evaluation.every": None}))
        assert ("the validation split fills" in (run_dir / "metrics.jsonl").read_text()) == said


def test_ranks_share_a_batch(data: Path, tmp_path: Path) -> None:
    """The same batches on 1, 2 and 4 ranks give the same losses to 1e-5, and a run moves between world sizes."""
    losses = {}
    small = {"batch.device_batch_size": 2}                                           # 4 micro-batches
    for size in (1, 2, 4):
        run_ranks(train, size, experiment_dict(data, tmp_path / str(size), **small))
        losses[size] = [m["loss"] for m in metrics(tmp_path / str(size)) if m["kind"] == "train"]
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    assert losses[4] == pytest.approx(losses[1], rel=1e-5)
    interrupted_at(tmp_path / "4", 4, tmp_path / "moved")
    run_ranks(train, 2, experiment_dict(data, tmp_path / "moved", **small))
    moved = [m["loss"] for m in metrics(tmp_path / "moved") if m["kind"] == "train"]
    assert moved == pytest.approx(losses[1], rel=1e-5)
    run_ranks(train, 1, experiment_dict(data, tmp_path / "seed", seed=8, **small))
    assert [m["loss"] for m in metrics(tmp_path / "seed") if m["kind"] == "train"] != pytest.approx(losses[1], rel=1e-5)


def test_strict_numerics_walk_over_world_sizes(data: Path, tmp_path: Path) -> None:
    """A run that goes on with 3, 4 and 2 ranks ends where it would have ended on one, bit for bit."""
    twelve = {"batch.device_batch_size": 1, "batch.tokens_per_step": 32 * 12, "data.lanes": 12,
              "evaluation.every": None, "checkpoint.every": 2}
    strict = {**twelve, "runtime.numerics": "strict"}
    train(ALONE, experiment_dict(data, tmp_path / "alone", **strict))
    before = tmp_path / "alone"
    for step, size in ((2, 3), (4, 4), (6, 2)):
        walk = tmp_path / f"from{step}"
        interrupted_at(before, step, walk)
        assert run_ranks(train, size, experiment_dict(data, walk, **strict)) == [8] * size
        before = walk
    assert digest(walk, 8) == digest(tmp_path / "alone", 8)
    interrupted_at(tmp_path / "alone", 2, tmp_path / "fast")                                # control
    run_ranks(train, 3, experiment_dict(data, tmp_path / "fast", **twelve))
    assert digest(tmp_path / "fast", 8) != digest(tmp_path / "alone", 8)


@pytest.mark.parametrize("changes", [
    {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False},
    {"model.poe_mode": "hier"}, {"objective.kind": "residual_logop", "objective.rho": 0.5},
    {"model.stage_heads": False}, {"model.n_kv_head": 1}, {"runtime.compute_dtype": "bfloat16"}])
def test_every_objective_learns(data: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    experiment = experiment_dict(data, tmp_path, **{"schedule.cycles.0.steps": 40, "checkpoint.every": None, **changes})
    train(ALONE, experiment)
    lines = [m for m in metrics(tmp_path) if m["kind"] == "train"]
    assert lines[-1]["stage_loss"][-1] < 0.8 * lines[0]["stage_loss"][-1]
    evaluations = [m for m in metrics(tmp_path) if m["kind"] == "eval"]
    assert evaluations[-1]["bpb"]["full"] < evaluations[0]["bpb"]["full"]


def momentum_of(optimizer: Any) -> torch.Tensor:
    """Muon's momentum of the first matrices that this rank owns."""
    found: torch.Tensor = next(b.state["momentum"] for b in optimizer.parcels if "momentum" in b.state)
    return found


def with_nan(world: World, experiment: dict[str, Any], bad_rank: int, where: str) -> str:
    """Train 3 steps; in the third a NaN appears on one rank. The message, and whether the weights stayed."""
    run = loop.build_run(experiment_from_dict(experiment, "test"), world)
    real = loop.train_step
    before: dict[str, torch.Tensor] = {}

    def poisoned(model: Any, optimizer: Any, rows: Any, step: int, *args: Any, **kw: Any) -> Any:
        if step == 2:
            before.update({n: p.detach().clone() for n, p in model.named_parameters()})
            before["momentum"] = momentum_of(optimizer).clone()
            if world.rank == bad_rank:
                if where == "gradient":
                    model.lm_head_stages[1].weight.register_hook(lambda g: g * float("nan"))
                else:
                    with torch.no_grad():                       # one rank's copy of a weight: its loss is NaN at once
                        before["held"] = model.transformer["h"][2].mlp.c_fc.weight.clone()
                        model.transformer["h"][2].mlp.c_fc.weight[0, 0] = float("inf")
        return real(model, optimizer, rows, step, *args, **kw)

    loop.train_step = poisoned
    loop.build_run, built = (lambda *_: run), loop.build_run
    try:
        loop.train(run.experiment, world)
    except NumericsError as error:
        held = before.pop("held", None)
        momentum = before.pop("momentum")
        same = all(torch.equal(p, before[n]) for n, p in run.model.named_parameters()
                   if not (held is not None and n == "transformer.h.2.mlp.c_fc.weight"))
        same = same and torch.equal(momentum_of(run.optimizer), momentum)
        return f"{error} same={same} steps={run.optimizer.steps}"
    finally:
        loop.train_step, loop.build_run = real, built
    return "trained on"


@pytest.mark.parametrize("size, bad_rank, where", [(1, 0, "gradient"), (2, 1, "gradient"), (2, 0, "loss")])
def test_a_step_that_is_not_finite_is_not_taken(data: Path, tmp_path: Path, size: int, bad_rank: int,
                                                where: str) -> None:
    answers = run_ranks(with_nan, size, experiment_dict(data, tmp_path), bad_rank, where)
    assert len(set(answers)) == 1, "all ranks stop with one message"
    assert f"step 3, rank {bad_rank} (micro-batch " in answers[0]
    assert "same=True steps=2" in answers[0]
    if where == "gradient":
        assert "lm_head_stages.1.weight" in answers[0]
    assert list_steps(tmp_path) == [1, 2]


def test_a_changed_experiment_is_refused(data: Path, tmp_path: Path) -> None:
    base = experiment_dict(data, tmp_path)
    train(ALONE, base)
    final = digest(tmp_path, 8)
    for key, value in (("optim.matrix_lr", 0.03), ("seed", 8), ("schedule.cycles.0.steps", 6), ("objective.alpha", 0.5),
                       ("data.case_aug_prob", 0.0)):
        with pytest.raises(CheckpointError):
            train(ALONE, experiment_dict(data, tmp_path, **{key: value}))
    third = base["schedule"]["cycles"] + [{**base["schedule"]["cycles"][1], "steps": 2}]
    assert train(ALONE, experiment_dict(data, tmp_path, **{"schedule.cycles": third})) == 10    # cycles may be appended
    assert digest(tmp_path, 8) == final
    with pytest.raises(CheckpointError, match=r"was trained with optim\.matrix_lr 0\.02, now 0\.03;"):
        train(ALONE, experiment_dict(data, tmp_path, **{"optim.matrix_lr": 0.03, "schedule.cycles": third}))
    with pytest.raises(CheckpointError, match="no checkpoint of step 77"):
        train(ALONE, {**base, "resume": {"step": 77}})


def test_what_changes_no_weights_may_change(data: Path, tmp_path: Path) -> None:
    """Places, the validation split and the cut into micro-batches are free; other data at the new place is not."""
    whole = experiment_dict(data, tmp_path / "whole")
    train(ALONE, whole)
    interrupted_at(tmp_path / "whole", 5, tmp_path / "moved")
    moved = tmp_path / "elsewhere"
    shutil.copytree(data, moved)
    changes = {"tokenizer": str(moved / "tokenizer"), "batch.device_batch_size": 2, "evaluation.tokens": 128,
               "data.val": [{"name": "other", "path": str(moved / "val")}], "data.train.0.path": str(moved / "train")}
    assert train(ALONE, experiment_dict(data, tmp_path / "moved", **changes)) == 8
    losses = [[m["loss"] for m in metrics(tmp_path / name) if m["kind"] == "train"] for name in ("whole", "moved")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    interrupted_at(tmp_path / "whole", 5, tmp_path / "fewer")
    (moved / "train" / "shard_00001.parquet").unlink()                               # control
    with pytest.raises(DataError, match="sources"):
        train(ALONE, experiment_dict(data, tmp_path / "fewer", **changes))


def diverged(world: World, experiment: dict[str, Any], at: str) -> str:
    """Rank 1 changes one weight by itself, before the start or before a save; what every rank is told."""
    real, greet = loop.advance, loop.greet

    def flip(run: Any) -> None:
        if world.rank == 1:
            run.model.lm_head.weight.detach().view(torch.int32)[5, 5] ^= 1

    def advance(run: Any, *args: Any, **kw: Any) -> Any:
        position = real(run, *args, **kw)
        if at == "save" and run.step == 4:
            flip(run)
        return position

    def at_start(run: Any, watch: Any) -> None:
        if at == "start":
            flip(run)
        greet(run, watch)

    loop.advance, loop.greet = advance, at_start
    try:
        return f"trained {train(world, experiment)} steps"
    except NanopoeError as error:
        return str(error)
    finally:
        loop.advance, loop.greet = real, greet


@pytest.mark.parametrize("at, saved", [("start", []), ("save", [2]), ("nowhere", [2, 4, 6, 8])])
def test_what_ranks_do_not_agree_on_is_never_saved(data: Path, tmp_path: Path, at: str, saved: list[int]) -> None:
    answers = run_ranks(diverged, 2, experiment_dict(data, tmp_path / "run", **{"checkpoint.every": 2}), at)
    assert len(set(answers)) == 1
    assert ("silently holds other values of lm_head.weight" in answers[0]) == (at != "nowhere")
    assert list_steps(tmp_path / "run") == saved


def masked(world: World, experiment: dict[str, Any], keep: int) -> list[list[float]]:
    """One step with the targets of all but the first `keep` positions of a row masked: two weights afterwards."""
    run = loop.build_run(experiment_from_dict(experiment, "test"), world)
    real = training.backward

    def some(model: Any, ids: Any, targets: Any, *args: Any) -> Any:
        targets = targets.clone()
        targets[:, keep:] = -1
        return real(model, ids, targets, *args)

    training.backward = some
    try:
        with run.loader as batches:
            losses = training.train_step(run.model, run.optimizer, next(batches)[0], 0, run.experiment.objective,
                                         run.schedule, run.plan, world, report_pool=False)
    finally:
        training.backward = real
    first = next(b for b in run.optimizer.parcels if b.group.name == "heads").own[0].state["exp_avg"]
    return [[losses.loss, losses.grad_norm, float(losses.targets)], [float(first.norm())]]


def test_masked_targets_make_a_mean_not_a_smaller_step(data: Path, tmp_path: Path) -> None:
    """The gradient is that of the mean over what counts: moments and norm are of one size whatever is masked."""
    half, whole = (masked(ALONE, experiment_dict(data, tmp_path / str(k)), k) for k in (16, 32))
    assert [half[0][2], whole[0][2]] == [128, 256]
    assert 0.8 < half[1][0] / whole[1][0] < 1.9 and 0.8 < half[0][1] / whole[0][1] < 1.9
    assert half[1][0] == pytest.approx(0.2 * half[0][1], rel=0.2)        # exp_avg is (1 - beta1) of the same gradient


def without_room(world: World, experiment: dict[str, Any]) -> str:
    """What a rank is told when the first one cannot write the tokenizer into the run folder."""
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    build.keep_tokenizer = full
    try:
        train(world, experiment)
    except NanopoeError as error:
        return str(error)
    return "trained"


def test_a_full_disk_at_the_start_stops_all_ranks(data: Path, tmp_path: Path) -> None:
    answers = run_ranks(without_room, 2, experiment_dict(data, tmp_path))
    assert answers == ["error[storage] rank 0: No space left on device; free some space or check the rights"] * 2
    assert run_ranks(train, 2, experiment_dict(data, tmp_path)) == [8, 8]                         # control


def test_out_of_memory_names_the_knobs(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_dry(*_: Any, **__: Any) -> None:
        torch.empty(1 << 50)

    monkeypatch.setattr(loop, "train_step", run_dry)
    knobs = (r"batch\.device_batch_size=4, model\.sequence_len=32; of [1-9][\d.]* MiB planned, try "
             r"batch\.device_batch_size=2 .*, runtime\.activation_checkpointing=true .* or model\.sequence_len=16 ")
    with pytest.raises(ConfigError, match=knobs):
        train(ALONE, experiment_dict(data, tmp_path))
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: torch.ones(2) @ torch.ones(3))       # control: a bug
    with pytest.raises(RuntimeError):
        train(ALONE, experiment_dict(data, tmp_path))


def test_what_does_not_fit_is_refused_before_training(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 300 tokens, the model 310"):
        train(ALONE, experiment_dict(data, tmp_path / "a", **{"model.vocab_size": 310}))
    three = World(0, 3, torch.device("cpu"))
    with pytest.raises(ConfigError, match="use 1, 2"):
        train(three, experiment_dict(data, tmp_path / "b"))
    with pytest.raises(DataError, match="nowhere"):            # also when nothing is evaluated until the end
        train(ALONE, experiment_dict(data, tmp_path / "d", **{"data.val.0.path": str(data / "nowhere")}))
    assert not (tmp_path / "d" / "checkpoints").exists()
    with pytest.raises(DataError, match="lane"):
        train(ALONE, experiment_dict(data, tmp_path / "c", **{"data.lanes": 400}))
    assert not (tmp_path / "c" / "checkpoints").exists()
