"""data.replay_steps: later passes read the very same rows, wherever the run stops and on however many ranks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nanopoe.config import experiment_from_dict
from nanopoe.data import loader as loader_module
from nanopoe.data.audit import AUDIT, check_audit
from nanopoe.data.loader import summary
from nanopoe.data.packing import PACKINGS
from nanopoe.data.shards import Source, open_source
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, DataError
from nanopoe.train.loop import train
from tests.ranks import experiment_dict
from tests.rows import global_steps, loader, numbered, same, two_sources
from tests.test_audit import edit, run

P = 5
MakeSources = Callable[[], list[Source]]


@pytest.fixture
def mixture(tmp_path: Path) -> MakeSources:
    return two_sources(tmp_path)


def equal(a: list[Any], b: list[Any]) -> bool:
    """Whether two lists of global steps have the same rows."""
    return len(a) == len(b) and all(np.array_equal(x[0], y[0]) for x, y in zip(a, b, strict=True))


# -- the same rows ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("micro_batches", [12, 5])
def test_every_pass_reads_the_same_rows(mixture: MakeSources, packing: str, micro_batches: int) -> None:
    """With 5 rows a step on 12 lanes, too, where the lane of a row depends on the step."""
    options = {"packing": packing, "micro_batches": micro_batches, "case_aug_prob": 0.5}
    once = global_steps(mixture, 3 * P, **options)
    steps = global_steps(mixture, 3 * P + 2, replay_steps=P, **options)
    assert equal(steps[:P], once[:P])                                         # the first pass is as without
    assert equal(steps[P:2 * P], once[:P]) and equal(steps[2 * P:3 * P], once[:P]) and equal(steps[3 * P:], once[:2])
    assert not equal(once[P:2 * P], once[:P]) and not equal(once[2 * P:], once[:P])             # control
    for s, (_, position) in enumerate(steps):                                 # a position is that within the pass
        assert position["step"] == s + 1 and position["lanes"] == steps[s % P][1]["lanes"]
        assert summary(position)["passes"] == (s + 1) / P
        assert summary(position)["rows"] == (s % P + 1) * micro_batches
    assert once[P][1]["lanes"] != once[0][1]["lanes"] and summary(once[P][1])["passes"] is None


@pytest.mark.parametrize("packing", PACKINGS)
def test_resume_is_exact_around_the_edge(mixture: MakeSources, packing: str) -> None:
    options = {"packing": packing, "replay_steps": P}
    whole = global_steps(mixture, 3 * P + 2, **options)
    for k in range(P - 2, 2 * P + 3):
        rest = global_steps(mixture, P - 1, start_step=k, position=whole[k - 1][1], **options)
        assert same(rest, whole[k:k + P - 1]), k
    other = global_steps(mixture, 2, start_step=P, position={**whole[P - 2][1], "step": P}, **options)
    assert same(other, whole[P:P + 2])                                        # at an edge nothing of it counts
    damaged = json.loads(json.dumps(whole[P][1]))
    for lane in damaged["lanes"].values():
        lane["buffer"], lane["rest"] = [], None
    assert not equal(global_steps(mixture, 3, start_step=P + 1, position=damaged, **options),
                     whole[P + 1:P + 4])                                      # control: within a pass it does


@pytest.mark.parametrize("packing", ["bestfit_split", "bestfit_pad"])
def test_a_walk_over_world_sizes_and_device_batches(mixture: MakeSources, packing: str) -> None:
    options = {"packing": packing, "replay_steps": P}
    whole = global_steps(mixture, 16, micro_batches=24, **options)
    step, position = 0, None
    for world_size, micro_batches, n in ((1, 24, 4), (2, 12, 1), (3, 12, 2), (2, 6, 3), (4, 24, 5), (1, 1, 1)):
        part = global_steps(mixture, n, world_size=world_size, micro_batches=micro_batches, start_step=step,
                            device_batch_size=24 // micro_batches, position=position, **options)
        assert same(part, whole[step:step + n])
        step, position = step + n, part[-1][1]
    assert step == 16


def test_the_next_pass_is_made_ahead(mixture: MakeSources, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module, "PREFETCH_TOKENS", 1)                  # two steps ahead
    with loader(mixture(), replay_steps=P) as batches:
        first = next(batches)[0].clone()
        for _ in range(P - 1):
            next(batches)
        end = time.monotonic() + 20
        while batches.ready < 2 and time.monotonic() < end:
            time.sleep(0.01)
        assert batches.ready == 2                                             # and nobody has asked for them
        rows, position = next(batches)
        assert torch.equal(rows, first) and position["step"] == P + 1


# -- what may change --------------------------------------------------------------------------------------------------

def test_data_change_where_a_pass_begins_only(mixture: MakeSources, tmp_path: Path) -> None:
    steps = global_steps(mixture, 2 * P, replay_steps=P)
    new = open_source("prose", numbered(tmp_path / "new", [[60]], lambda n: 3 + n * 5 % 23), weight=2.0)

    def changed() -> list[Source]:
        return [new, mixture()[1]]

    def go_on(k: int, sources: MakeSources = mixture, **options: Any) -> list[Any]:
        return global_steps(sources, P + 1, replay_steps=P, start_step=k, position=steps[k - 1][1], **options)

    for options in ({"sources": changed, "may_change": ["sources"]}, {"seed": 2, "may_change": ["seed"]},
                    {"recount": True}, {"micro_batches": 6}):
        with pytest.raises(DataError, match=r"data.replay_steps: step 7 is within a pass of 5 steps.*multiple of 5"):
            go_on(P + 2, **options)
        rows = go_on(P, **options)
        assert equal(rows[P:], rows[:1])
        assert equal(rows[:P], steps[:P]) == ("recount" in options)           # control: the change is one
    with pytest.raises(DataError, match="'sources' was"):                     # and not without being asked for
        go_on(P, changed)
    with pytest.raises(DataError, match="'replay_steps' was 5, now it is 6"):
        global_steps(mixture, 1, replay_steps=6, start_step=P, position=steps[P - 1][1])
    with pytest.raises(DataError, match="'replay_steps' was 5, now it is None"):
        global_steps(mixture, 1, start_step=P, position=steps[P - 1][1])


# -- the audit --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", PACKINGS)
def test_an_audit_knows_a_replay(mixture: MakeSources, tmp_path: Path, packing: str) -> None:
    """Through edges, to an edge, from an edge on, on 1, 2 and 3 ranks."""
    step, position = 0, None
    for world_size, n in ((1, 2 * P + 2), (2, P - 2), (3, P), (1, 2)):
        position = run(mixture, tmp_path, n, world_size=world_size, start_step=step, position=position, packing=packing,
                       replay_steps=P)
        step += n
    result = check_audit(tmp_path)
    assert result.problems == result.notes == []
    assert (result.steps, result.replayed, result.rows) == (22, 22 - P, 22 * 12)
    assert result.lives == ["steps 1 to 12 on 1 rank", "steps 13 to 15 on 2 ranks", "steps 16 to 20 on 3 ranks",
                            "steps 21 to 22 on 1 rank"]
    assert "17 of these steps replay the rows of earlier ones, as data.replay_steps asks" in result.report()
    told = [summary(p) for _, p in global_steps(mixture, P, packing=packing)]
    assert result.documents == 4 * told[-1]["documents"] + told[1]["documents"]
    once = run(mixture, tmp_path / "once", 2 * P, packing=packing)            # control
    assert once["step"] == 2 * P and check_audit(tmp_path / "once").replayed == 0
    assert "as data.replay_steps asks" not in check_audit(tmp_path / "once").report()


def test_an_audit_of_replays_whose_rows_do_not_come_round_to_the_lanes(mixture: MakeSources, tmp_path: Path) -> None:
    """5 rows a step on 12 lanes."""
    first = run(mixture, tmp_path, P + 3, micro_batches=5, replay_steps=P)
    run(mixture, tmp_path, P, start_step=P + 3, position=first, micro_batches=5, replay_steps=P)
    result = check_audit(tmp_path)
    assert (result.problems, result.notes, result.replayed) == ([], [], P + 3)

    def swap(lines: list[dict[str, Any]]) -> None:
        rows = next(line["rows"] for line in lines if line.get("step") == P + 2)
        rows[0][1], rows[1][1] = rows[1][1], rows[0][1]

    assert any("is of lane" in line for line in edit(tmp_path, swap))         # control: the lane is looked at


def test_an_audit_of_replays_finds_what_is_wrong(mixture: MakeSources, tmp_path: Path) -> None:
    run(mixture, tmp_path, 2 * P + 2, packing="bestfit_split", replay_steps=P)
    assert edit(tmp_path, lambda lines: None) == []                           # control

    def change(step: int, what: Callable[[list[Any]], Any]) -> list[str]:
        def apply(lines: list[dict[str, Any]]) -> None:
            what(next(line["rows"] for line in lines if line.get("step") == step))
        return edit(tmp_path, apply)

    def other_document(rows: list[Any]) -> None:
        rows[3][1][-1][2] = (rows[3][1][-1][2] + 1) % 15

    def swap(rows: list[Any]) -> None:
        rows[0][1], rows[1][1] = rows[1][1], rows[0][1]

    for what in (other_document, swap):
        found = change(P + 2, what)
        assert any("step 7: its rows are not those of the step it replays, 2 of a pass" in line for line in found)
        assert len(found) > 1                                                 # and the account of the pass is wrong

    def as_if_without(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if "begin" in line:
                line["fingerprint"]["replay_steps"] = None

    assert any("repeats tokens" in line for line in edit(tmp_path, as_if_without))

    def no_rest(lines: list[dict[str, Any]]) -> None:
        begin = next(line for line in lines if line.get("begin") == P)
        for lane in begin["lanes"].values():
            lane["buffer"] = []

    assert any("step 5:" in line and "was read and never placed" in line for line in edit(tmp_path, no_rest))


def test_a_killed_pass_is_gone_on_from(mixture: MakeSources, tmp_path: Path) -> None:
    """Killed in the second pass; the checkpoint is of the edge, or of the first pass."""
    for k in (P, P - 2):
        first = run(mixture, tmp_path / "other", k, world_size=2, replay_steps=P)
        run(mixture, tmp_path, P + 3, world_size=2, replay_steps=P, killed=True)
        assert check_audit(tmp_path).notes and check_audit(tmp_path).ok
        run(mixture, tmp_path, P, world_size=1, start_step=k, position=first, replay_steps=P)
        result = check_audit(tmp_path)
        assert result.problems == result.notes == []
        assert (result.steps, result.replayed) == (k + P, k)


def test_one_rank_began_the_pass_and_was_killed(mixture: MakeSources, tmp_path: Path) -> None:
    run(mixture, tmp_path, P + 1, world_size=2, replay_steps=P, killed=True)
    path = tmp_path / AUDIT / "rank_1.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))                                      # its begin and its step
    result = check_audit(tmp_path)
    assert result.problems == [] and "the pass from step 5 is not there of rank 1" in result.notes[0]
    path.write_text("".join(lines[:-4] + lines[-2:]))                         # control: steps of a pass in the middle
    assert any("step 4 is not there of rank 1" in line for line in check_audit(tmp_path).problems)


# -- in training ------------------------------------------------------------------------------------------------------

def test_a_training_replays(data: Any, tmp_path: Path) -> None:
    """8 steps in passes of 3; from a checkpoint within a pass; never with other passes."""
    alone = World(0, 1, torch.device("cpu"))

    def run_to_end(run_dir: Path, **changes: Any) -> list[dict[str, Any]]:
        train(experiment_from_dict(experiment_dict(data, run_dir, **changes), "test"), alone)
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    lines = run_to_end(tmp_path / "a", **{"logging.audit": True, "data.replay_steps": 3})
    told = [line for line in lines if line.get("event") == "data"]
    assert [line["passes"] for line in told] == pytest.approx([4 / 3, 8 / 3])
    assert told[1]["rows"] == 2 * told[0]["rows"]                             # two steps of the third pass, one before
    run_to_end(tmp_path / "a", **{"logging.audit": True, "data.replay_steps": 3, "resume": {"step": 4}})
    result = check_audit(tmp_path / "a")
    assert (result.problems, result.notes, result.replayed) == ([], [], 5)
    for other in (None, 4):
        with pytest.raises(CheckpointError, match=r"data.replay_steps 3, now.*never change"):
            run_to_end(tmp_path / "a", **{"data.replay_steps": other})
    lines = run_to_end(tmp_path / "b", **{"logging.audit": True})             # control
    assert check_audit(tmp_path / "b").replayed == 0
    assert all(line["passes"] is None for line in lines if line.get("event") == "data")
