"""RUN/status.json: who writes it when ranks are lost, never over the next life of the run, and the command to go on."""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import DataError, PeerError
from nanopoe.train import loop
from nanopoe.train.status import Status, read_status, resume_command
from tests.ranks import experiment_dict

ALONE = World(0, 1, torch.device("cpu"))


def test_who_writes_the_status(tmp_path: Path) -> None:
    def life(*, of: str = "one") -> list[Status]:
        (tmp_path / ".lock").write_text(of)
        ranks = [Status(tmp_path, rank, 3) for rank in range(3)]
        for status in reversed(ranks):                                   # rank 0 is the last, as others may be faster
            status.begin(4, 10, of)
        return ranks

    def lost(*ranks: int, cut_off: bool = False) -> PeerError:
        error = PeerError(f"rank {ranks} is gone")
        error.ranks, error.cut_off = ranks, cut_off
        return error

    def told() -> tuple[str, int | None]:
        status = read_status(tmp_path) or {}
        return status["state"], status["exit_code"]

    before = Status(tmp_path, 0, 3)
    assert not before.fail(DataError("refused")) and read_status(tmp_path) is None, "the folder may be another job's"
    zero, one, two = life()
    assert told() == ("running", None)
    assert not one.fail(DataError("x")), "all ranks have it, rank 0 tells it"
    assert not two.fail(lost(1)) and told() == ("running", None), "rank 0 is there to tell it"
    for cut_off in (False, True):                                        # rank 0 is lost, or the store of its host is
        zero, one, two = life()
        assert two.fail(lost(*[0][cut_off:], cut_off=cut_off)) and told() == ("failed", 6)
        assert "is gone" in (read_status(tmp_path) or {})["reason"]
        assert not one.fail(lost(0)), "one survivor is enough"
        assert not zero.fail(lost(1, 2)), "awake again, it hears that they left for it"
        zero, one, two = life()
        assert zero.fail(DataError("a bad shard")) and not one.fail(lost(0, cut_off=cut_off))
        assert told() == ("failed", 3), "rank 0 left with a better reason"
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed", "exit_code": 3}))
    one = Status(tmp_path, 1, 3)
    one.begin(4, 10, "one")
    assert one.fail(lost(0)) and told() == ("failed", 6), "rank 0 was killed before a word: what was there is older"


def test_a_late_survivor_leaves_the_next_life_alone(tmp_path: Path) -> None:
    """The run was started again before a rank of the last life noticed that it is over."""
    for again in (True, False):
        (tmp_path / ".lock").write_text("one")
        late = Status(tmp_path, 1, 2)
        late.begin(4, 10, "one")
        cut_off = PeerError("the store is gone")
        cut_off.cut_off = True
        if again:
            (tmp_path / ".lock").write_text("two")
        Status(tmp_path, 0, 2).begin(4, 10, "two")
        assert late.fail(cut_off) == (not again)
        assert (read_status(tmp_path) or {})["state"] == ("running" if again else "failed")           # and control


def test_survivors_take_turns(tmp_path: Path) -> None:
    """All notice in the same moment: one of them tells it, and what it wrote is whole."""
    (tmp_path / ".lock").write_text("one")
    Status(tmp_path, 0, 40).begin(4, 10, "one")
    ranks = [Status(tmp_path, rank, 40) for rank in range(1, 40)]
    for status in ranks:
        status.begin(4, 10, "one")
    error = PeerError("the store is gone")
    error.cut_off = True
    start = threading.Barrier(len(ranks))

    def fail(status: Status) -> bool:
        start.wait()
        return status.fail(error)

    with ThreadPoolExecutor(len(ranks)) as pool:
        spoke = list(pool.map(fail, ranks))
    assert sum(spoke) == 1, "each that speaks also prints how to go on"
    assert (read_status(tmp_path) or {})["reason"] == error.render()


def test_a_disk_that_refuses_the_status_stops_nothing(data: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def refuse(source: Any, target: Any, **kw: Any) -> None:
        if str(target).endswith("status.json"):
            raise OSError(28, "No space left on device")
        real(source, target, **kw)

    monkeypatch.setattr(os, "replace", refuse)
    assert loop.train(experiment_from_dict(experiment_dict(data, tmp_path), "test"), ALONE).step == 8
    assert read_status(tmp_path) is None
    monkeypatch.undo()
    loop.train(experiment_from_dict(experiment_dict(data, tmp_path), "test"), ALONE)
    assert (read_status(tmp_path) or {})["state"] == "finished"                             # control


def test_the_command_to_go_on() -> None:
    given = ["configs/x.yaml", "run_dir=out/a b", "resume.step=200", "schedule.cycles.0.steps=9", "--debug"]
    kept = "configs/x.yaml 'run_dir=out/a b' schedule.cycles.0.steps=9 --debug"
    assert resume_command("scripts.train", given, {}) == f"python -m scripts.train {kept}"
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "GROUP_WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "8"}
    assert resume_command("scripts.train", given, torchrun) == \
        f"torchrun --standalone --nproc-per-node=8 -m scripts.train {kept}"
    nodes = {**torchrun, "GROUP_WORLD_SIZE": "2", "MASTER_ADDR": "node0", "MASTER_PORT": "29400"}
    assert resume_command("scripts.train", given, nodes) == (
        "torchrun --nnodes=2 --node-rank=$NODE_RANK --master-addr=node0 --master-port=29400 --nproc-per-node=8 "
        f"-m scripts.train {kept}")
