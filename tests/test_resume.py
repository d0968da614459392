"""Going on with a changed experiment: free, allowed when asked for, never; the lineage tells what was changed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nanopoe.checkpoint import open_checkpoint
from nanopoe.errors import CheckpointError, ConfigError, DataError
from tests.ranks import experiment_dict, run_ranks, tiny_data
from tests.test_train import ALONE, digest, interrupted_at, train

QUIET = {"evaluation.every": None, "checkpoint.every": 4}


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(ALONE, experiment_dict(data, run_dir, **QUIET))
    return run_dir


@pytest.fixture
def half(finished: Path, tmp_path: Path) -> Path:
    """A run folder that stands at step 4 of 8, with a finished sister `whole` beside it."""
    shutil.copytree(finished, tmp_path / "whole")
    interrupted_at(finished, 4, tmp_path / "half")
    return tmp_path / "half"


def lineage(run_dir: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = open_checkpoint(run_dir).state["lineage"]
    return found


@pytest.mark.parametrize("key, value, group", [
    ("optim.matrix_lr", 0.03, "optim.matrix_lr"), ("optim.weight_decay", 0.0, "optim"), ("seed", 8, "seed"),
    ("objective.alpha", 0.5, "objective"), ("data.case_aug_prob", 0.0, "data.case_aug_prob"),
    ("data.buffer_documents", 16, "data.buffer_documents"), ("batch.tokens_per_step", 32 * 4 * 4, "batch"),
    ("schedule.cycles.1.steps", 5, "schedule.cycles")])
def test_what_changes_learning_must_be_asked_for(data: Path, half: Path, key: str, value: Any, group: str) -> None:
    changed = experiment_dict(data, half, **QUIET, **{key: value})
    with pytest.raises(CheckpointError, match=rf"was trained with {key} .*resume\.allow=\[.*\] if it is meant"):
        train(ALONE, changed)
    steps = train(ALONE, {**changed, "resume": {"allow": [group]}})
    assert steps == (10 if key.startswith("schedule") else 8)
    assert lineage(half)[0]["step"] == 4 and list(lineage(half)[0]["changed"]) == [key]
    assert lineage(half)[0]["changed"][key][1] == value
    assert digest(half, 8) != digest(half.parent / "whole", 8)
    tokens = open_checkpoint(half).state["tokens"]
    assert tokens == (4 * 256 + 4 * 512 if key.startswith("batch") else steps * 256)


def test_once_allowed_it_is_the_runs_own(data: Path, half: Path) -> None:
    """The same command again, and the new value without asking, both go on; a second change is a second entry."""
    allow = {"resume": {"allow": ["optim"]}}
    changed = experiment_dict(data, half, **QUIET, **{"optim.matrix_lr": 0.03})
    third = changed["schedule"]["cycles"] + [{**changed["schedule"]["cycles"][1], "steps": 4}]
    train(ALONE, {**changed, **allow})
    train(ALONE, {**changed, **allow})
    assert train(ALONE, {**changed, "schedule": {"cycles": third}}) == 12         # cycles appended: free
    assert [entry["step"] for entry in lineage(half)] == [4]
    back = experiment_dict(data, half, **QUIET, **{"schedule.cycles": [*third, third[-1]]})
    with pytest.raises(CheckpointError, match=r"was trained with optim\.matrix_lr 0\.03, now 0\.02"):
        train(ALONE, back)
    train(ALONE, {**back, **allow})
    assert [entry["step"] for entry in lineage(half)] == [4, 12]
    assert lineage(half.parent / "whole") == []                                   # control


@pytest.mark.parametrize("key, value", [
    ("model.window_pattern", "L"), ("model.poe_every", 4), ("model.stage_heads", False), ("data.lanes", 8)])
def test_what_the_tensors_mean_never_changes(data: Path, half: Path, key: str, value: Any) -> None:
    changed = experiment_dict(data, half, **QUIET, **{key: value})
    with pytest.raises(CheckpointError, match="can never change in a run"):
        train(ALONE, changed)
    with pytest.raises(ConfigError, match=r"resume\.allow"):
        train(ALONE, {**changed, "resume": {"allow": [key]}})
    assert train(ALONE, experiment_dict(data, half, **QUIET)) == 8                # control
    assert digest(half, 8) == digest(half.parent / "whole", 8)


def test_what_the_schedule_may_become(data: Path, half: Path) -> None:
    """Appending does not hide a change of what was there; a schedule may not end before the checkpoint."""
    base = experiment_dict(data, half, **QUIET)
    cycles = base["schedule"]["cycles"]
    for changed in ([{**cycles[0], "peak": 0.7}, *cycles[1:], cycles[1]], [*cycles, cycles[1]]):
        with pytest.raises(CheckpointError, match=r"resume\.allow=\[schedule\.cycles\]"):
            train(ALONE, {**base, "schedule": {"cycles": changed}})
    allow = {"resume": {"allow": ["schedule"]}}
    with pytest.raises(CheckpointError, match=r"is of step 4, schedule\.cycles now end at 3"):
        train(ALONE, {**base, **allow, "schedule": {"cycles": [{**cycles[0], "steps": 3}]}})
    assert train(ALONE, {**base, **allow, "schedule": {"cycles": [*cycles, cycles[1]]}}) == 11
    assert {key.split(".")[2] for key in lineage(half)[0]["changed"]} == {"2"}


def test_an_allowance_must_name_a_key(data: Path, half: Path) -> None:
    base = experiment_dict(data, half, **QUIET)
    for wrong in ("optim.matrix_lrr", "optim.", "data.tr", ""):
        with pytest.raises(ConfigError, match=r"resume\.allow"):
            train(ALONE, {**base, "resume": {"allow": [wrong]}})
    train(ALONE, {**base, "resume": {"allow": ["optim", "data.train", "seed"]}})  # control: nothing to allow is fine
    assert digest(half, 8) == digest(half.parent / "whole", 8)


def test_other_data_when_asked_for(data: Path, half: Path, tmp_path: Path) -> None:
    """A domain change: sources replaced under resume.allow=[data.train], on the same and on other ranks alike."""
    second = tiny_data(tmp_path / "second")
    sources = [{"name": "tiny", "path": str(data / "train"), "weight": 1.0},
               {"name": "more", "path": str(second / "train"), "weight": 3.0}]
    changed = experiment_dict(data, half, **QUIET, **{"data.train": sources, "runtime.numerics": "strict"})
    with pytest.raises(CheckpointError, match=r"resume\.allow=\[data\.train\]"):
        train(ALONE, changed)
    other = tmp_path / "other"
    shutil.copytree(half, other)
    train(ALONE, {**changed, "resume": {"allow": ["data.train"]}})
    lanes = open_checkpoint(half).state["position"]["lanes"].values()
    assert all(set(lane["cursors"]) == {"tiny", "more"} for lane in lanes)
    run_ranks(train, 2, {**changed, "run_dir": str(other), "resume": {"allow": ["data.train"]}})
    assert digest(other, 8) == digest(half, 8)
    then, now = lineage(half)[0]["changed"]["data.train contents"]
    assert set(then) == {"tiny"} and set(now) == {"tiny", "more"}


def test_other_weights_count_the_shares_anew(data: Path, tmp_path: Path) -> None:
    """What a source was ahead or behind by under the old weights is not made up for under the new ones."""
    second = tiny_data(tmp_path / "second")
    sources = [{"name": "tiny", "path": str(data / "train")}, {"name": "more", "path": str(second / "train")}]
    run_dir = tmp_path / "run"
    train(ALONE, experiment_dict(data, run_dir, **QUIET, **{"data.train": sources}))
    interrupted_at(run_dir, 4, tmp_path / "half")
    then = open_checkpoint(tmp_path / "half").state["position"]["lanes"]
    heavier = [{**sources[0], "weight": 9.0}, sources[1]]
    train(ALONE, {**experiment_dict(data, tmp_path / "half", **QUIET, **{"data.train": heavier}),
                  "resume": {"allow": ["data.train"]}})
    now = open_checkpoint(tmp_path / "half").state["position"]["lanes"]
    assert all(sum(now[n]["tokens"].values()) < sum(then[n]["tokens"].values()) for n in then)
    assert all(now[n]["cursors"][s] >= then[n]["cursors"][s] for n in then for s in ("tiny", "more"))


def test_other_documents_at_the_same_place_are_noticed(data: Path, half: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer"
    shutil.copytree(data, fewer)
    (fewer / "train" / "shard_00001.parquet").unlink()
    changed = experiment_dict(data, half, **QUIET, **{"data.train.0.path": str(fewer / "train")})
    with pytest.raises(DataError, match="sources"):
        train(ALONE, changed)
    assert train(ALONE, {**changed, "resume": {"allow": ["data.train"]}}) == 8
    assert list(lineage(half)[0]["changed"]) == ["data.train contents"]
