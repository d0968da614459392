"""The doctor: healthy on one rank and on two, every trouble provoked beside its control, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from nanopoe import dist
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import StorageError
from nanopoe.train import doctor, doctor_batch, doctor_disk, doctor_ranks, loop
from nanopoe.train.compute import knobs
from nanopoe.train.doctor_exam import Exam, Found, examine
from tests.commands import call, contents, write_yaml
from tests.ranks import experiment_dict, run_ranks

ALONE = World(0, 1, torch.device("cpu"))
NAMES = [name for name, _, _ in doctor.CHECKS]
Told = dict[str, list[str]]                  # check -> state, found, do, kind of its error
TOGETHER: dict[str, Any] = {"checkpoint.every": 2, "evaluation.every": 3, "resume.step": 2, "logging.pool_every": 3,
                            "parallel.stages": 2, "runtime.compute_dtype": "bfloat16"}
HUGE = {"model.n_embd": 1 << 16, "model.n_head": 1 << 9, "model.n_kv_head": 1 << 9, "model.n_layer": 400,
        "model.poe_every": 200}


def look(world: World, experiment: dict[str, Any], *names: str) -> Told:
    checks = [check for check in doctor.CHECKS if check[0] in (names or NAMES)]
    rows = examine(Exam(experiment_from_dict(experiment, "test"), world), checks)
    return {row.check: [row.state, row.found, row.do, row.error.kind if row.error else ""] for row in rows}


def one_wrong(of: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """`of`, with a number of the result changed on one rank: bad memory."""
    def wrong(tensor: torch.Tensor, *args: Any) -> torch.Tensor:
        of(tensor, *args)
        if rank == 1 and tensor.is_floating_point():
            tensor[3] += 1
        return tensor
    return wrong


def poisoned(of: Callable[..., Any], rank: int) -> Callable[..., Any]:
    def build(*args: Any) -> Any:
        model = of(*args)
        if rank == 1:
            with torch.no_grad():
                model.lm_head.weight[0, 0] = float("nan")
        return model
    return build


def ill(world: World, data: str, folder: str, package: str) -> dict[str, Told]:
    """Every trouble that takes two ranks, rank 1 being the one that is ill; and what they say when both are well."""
    second, here = world.rank == 1, Path(folder)

    def mine(run: str = "run", /, **changes: Any) -> dict[str, Any]:
        return experiment_dict(Path(data), here / run, **changes)

    said = {"healthy": look(world, mine())}
    said["lr"] = look(world, mine(**{"optim.matrix_lr": 0.03 if second else 0.02}), "same")
    for key, theirs in TOGETHER.items():
        changes: dict[str, Any] = {"resume": {"step": theirs}} if key == "resume.step" else {key: theirs}
        said[key] = look(world, mine(**(changes if second else {})), "same")
    said["width"] = look(world, mine(**({"model.n_embd": 64} if second else {})), "same", "dry batch")
    said["logs"] = look(world, mine(**({"logging.every": 3, "runtime.timeout_s": 61} if second else {})), "same")
    copied = {"tokenizer": f"{folder}/copy/tokenizer", "data.train.0.path": f"{folder}/copy/train"}
    said["places"] = look(world, mine(**(copied if second else {})), "same", "data")
    other = {"data.val.0.path": f"{folder}/copy/train"}
    said["other data"] = look(world, mine(**(other if second else {})), "data", "dry batch")
    said["no data"] = look(world, mine(**({"tokenizer": f"{folder}/nowhere"} if second else {})), "data")
    said["plan"] = look(world, mine(**{"batch.device_batch_size": 8}), "world", "disk", "memory")
    said["file"] = look(world, mine("file/run"), "folder")
    with ExitStack() as stack:
        stack.enter_context(patch.object(doctor_disk, "SEEN_S", 0.2))
        said["not shared"] = look(world, mine(f"host{world.rank}"), "folder")
    with ExitStack() as stack:
        if second:
            stack.enter_context(patch.object(doctor_ranks, "PACKAGE", Path(package)))
            stack.enter_context(patch.dict(os.environ, WORLD_SIZE="5"))
        said["code"] = look(world, mine(), "same", "world")
    for late in (2.0, 20.0):
        with patch.object(doctor_ranks.time, "time", lambda late=late: now() - late * second):
            said[f"clock {late:.0f}"] = look(world, mine(), "clocks")
    with patch.object(dist, "all_reduce_sum_", one_wrong(dist.all_reduce_sum_, world.rank)):
        said["sum"] = look(world, mine(), "all-reduce")
    with patch.object(doctor_batch, "build_model", poisoned(doctor_batch.build_model, world.rank)):
        said["nan"] = look(world, mine(), "dry batch")
    said["raises"] = told_of_a_bug(world, mine())
    return said


now = time.time


def told_of_a_bug(world: World, experiment: dict[str, Any]) -> Told:
    """A check that divides by zero on rank 1, and one after it."""
    def check(exam: Exam) -> Found:
        exam.ask(lambda: 1 / (1 - world.rank))
        return Found("never")

    rows = examine(Exam(experiment_from_dict(experiment, "test"), world),
                   [("bug", (), check), ("after", (), lambda exam: Found(f"{len(exam.ask(lambda: 1))} answer"))])
    return {row.check: [row.state, row.found, row.do, row.error.kind if row.error else ""] for row in rows}


@pytest.fixture(scope="module")
def both(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Told], Path]:
    """What two ranks say of all troubles, and the folder they said it in."""
    folder = tmp_path_factory.mktemp("doctor")
    shutil.copytree(data, folder / "copy")
    shutil.copytree(doctor_ranks.PACKAGE, folder / "package")
    with open(folder / "package" / "schedule.py", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    (folder / "file").write_text("in the way")
    before = contents(folder)
    first, second = run_ranks(ill, 2, str(data), str(folder), str(folder / "package"))
    assert first == second                                   # the same rows on all ranks
    assert contents(folder) == before and not any((folder / name).exists() for name in ("run", "host0", "host1"))
    return first, folder


def test_two_ranks_are_healthy(both: tuple[dict[str, Told], Path]) -> None:
    healthy = both[0]["healthy"]
    assert list(healthy) == NAMES
    assert {row[0] for row in healthy.values()} == {"ok"}, healthy
    assert "2 ranks on 1 host" in healthy["world"][1] and healthy["all-reduce"][1].startswith("exact; ")
    assert "seen by all 2 ranks" in healthy["folder"][1] and "1 x 4 rows of 32" in healthy["dry batch"][1]


@pytest.mark.parametrize(("ill", "check", "state", "kind", "words"), [
    ("lr", "same", "trouble", "config", "rank 1 has another experiment than rank 0: optim.matrix_lr 0.03; rank 0: "
                                        "optim.matrix_lr 0.02"),
    *((key, "same", "trouble", "config", f"rank 1 has another cadence than rank 0: {key} {theirs}; rank 0: ")
      for key, theirs in TOGETHER.items()),
    ("width", "same", "trouble", "config", "rank 1 has another experiment than rank 0: model.n_embd 64; rank 0: "),
    ("width", "dry batch", "warning", "", "not looked at, since same is in trouble"),
    ("logs", "same", "ok", "", "config "),                                                         # control
    ("code", "same", "trouble", "config", "rank 1 has another code than rank 0: schedule.py "),
    ("code", "world", "trouble", "peer", "rank 1 of 2: the environment says RANK=1, WORLD_SIZE=5"),
    ("other data", "data", "trouble", "data", "rank 1 found another val tiny than rank 0"),
    ("other data", "dry batch", "warning", "", "not looked at, since data is in trouble"),
    ("no data", "data", "trouble", "data", "rank 1: "),
    ("plan", "world", "trouble", "config", "ranks"),
    ("plan", "disk", "warning", "", "not looked at, since world is in trouble"),
    ("file", "folder", "trouble", "storage", "rank 0: "),
    ("not shared", "folder", "trouble", "storage", "what rank 0 wrote is not seen from here"),
    ("clock 2", "clocks", "warning", "", "rank 1 behind rank 0"),
    ("clock 20", "clocks", "trouble", "", "takes a node that is 15 s behind for lost"),
    ("sum", "all-reduce", "trouble", "peer", "rank 1: 1 of 65536 sums are wrong"),
    ("nan", "dry batch", "trouble", "numerics", "not finite on rank 1"),
    ("raises", "bug", "trouble", "internal", "rank 1: ZeroDivisionError: division by zero"),
    ("raises", "after", "ok", "", "2 answer"),
    ("places", "same", "ok", "", "config "), ("places", "data", "ok", "", "1 source"),             # controls
])
def test_trouble_names_the_rank(both: tuple[dict[str, Told], Path], ill: str, check: str, state: str, kind: str,
                                words: str) -> None:
    row = both[0][ill][check]
    assert (row[0], row[3]) == (state, kind) and words in row[1], row


def test_a_disk_that_is_too_small(data: Path, tmp_path: Path) -> None:
    """Trouble when not all fits; no training starts when not even one checkpoint does."""
    many = {"schedule.cycles.0.steps": 10**11, "checkpoint.keep_last": None}
    said = look(ALONE, experiment_dict(data, tmp_path / "run", **many), "disk")["disk"]
    assert (said[0], said[3]) == ("trouble", "") and "100,000,000,003 are kept" in said[1], said
    said = look(ALONE, experiment_dict(data, tmp_path / "run", **{**many, "checkpoint.keep_last": 2}), "disk")["disk"]
    assert said[0] == "ok" and "2 are kept" in said[1], said                                       # control
    said = look(ALONE, experiment_dict(data, tmp_path / "run", **HUGE), "disk")["disk"]
    assert (said[0], said[3]) == ("trouble", "storage"), said


def test_a_batch_that_does_not_fit(data: Path, tmp_path: Path) -> None:
    rows = 1 << 26
    wide = {"batch.device_batch_size": rows, "batch.tokens_per_step": 32 * rows}
    said = look(ALONE, experiment_dict(data, tmp_path / "run", **wide), "memory", "dry batch")
    assert said["memory"][0] == "trouble" and f"try batch.device_batch_size={rows // 2} (" in said["memory"][2], said
    assert said["dry batch"][1] == "not looked at, since memory is in trouble"
    assert look(ALONE, experiment_dict(data, tmp_path / "run"), "memory")["memory"][0] == "ok"     # control


@pytest.mark.parametrize(("rows", "unit"), [(8, "MiB"), (1 << 14, "GiB")])
def test_the_knobs_are_told_in_a_unit_that_shows_them(data: Path, rows: int, unit: str) -> None:
    """None is 0.00 of something, small or large, and each is less than what is planned now."""
    sizes = {"batch.device_batch_size": rows, "batch.tokens_per_step": 32 * rows}
    experiment = experiment_from_dict(experiment_dict(data, data / "run", **sizes), "test")
    told = re.findall(r"([\d,.]+) (MiB|GiB)", knobs(experiment, torch.device("cpu"), 1))
    assert len(told) >= 3 and all(theirs == unit for _, theirs in told), told
    now, *tried = (float(value.replace(",", "")) for value, _ in told)
    assert all(0 < value < now for value in tried), told


def test_training_looks_first(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong stops it with its typed error, before anything is written; what is well is one line."""
    def train(run: Path, **changes: Any) -> int:
        return loop.train(experiment_from_dict(experiment_dict(data, run, **changes), "test"), ALONE).step

    assert train(tmp_path / "run") == 8
    assert capsys.readouterr().out.count(f"doctor {len(doctor.CHEAP)} checks, ") == 1
    with pytest.raises(StorageError, match="free some space"):
        train(tmp_path / "huge", **HUGE)
    assert not (tmp_path / "huge" / "checkpoints").exists()


def test_the_command(data: Path, tmp_path: Path) -> None:
    file = write_yaml(tmp_path / "run.yaml", experiment_dict(data, tmp_path / "run"))
    before = contents(tmp_path)
    done = call("doctor", file, "--json", folder=data)
    found = json.loads(done.out)
    assert (done.code, found["healthy"], done.err) == (0, True, ""), done
    assert [row["check"] for row in found["checks"]] == NAMES and all(row["state"] == "ok" for row in found["checks"])
    assert contents(tmp_path) == before
    ill = call("doctor", file, "tokenizer=nowhere", folder=data)
    assert ill.code == 2 and "tiny: trouble, 10 checks" in ill.out and "nowhere" in ill.out and not ill.err, ill
    assert contents(tmp_path) == before
