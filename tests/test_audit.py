"""The audit: what a run read is written down and proves that nothing came twice, was skipped or half placed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.config import experiment_from_dict
from nanopoe.data.audit import AUDIT, check_audit
from nanopoe.data.loader import merge_positions
from nanopoe.data.packing import PACKINGS
from nanopoe.dist import World
from nanopoe.errors import DataError, StorageError
from nanopoe.train.loop import train
from tests.ranks import experiment_dict
from tests.rows import loader, two_sources

Line = dict[str, Any]


def run(make_sources: Callable[..., Any], folder: Path, steps: int, *, world_size: int = 1, start_step: int = 0,
        position: Any = None, killed: bool = False, **options: Any) -> Any:
    """A life of `steps` steps with an audit; the merged position at its end. Killed, it leaves no last line."""
    ranks = [loader(make_sources(), world_size=world_size, rank=rank, start_step=start_step, position=position,
                    audit=folder / AUDIT, **options) for rank in range(world_size)]
    positions = []
    for _ in range(steps):
        positions = [next(r)[1] for r in ranks]
    for r in ranks:
        if killed:
            r._steps.close()
        else:
            r.close()
    return json.loads(json.dumps(merge_positions(positions)))


@pytest.fixture
def mixture(tmp_path):
    return two_sources(tmp_path)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_walk_over_world_sizes_passes(mixture, tmp_path, packing):
    step, position = 0, None
    for world_size in (1, 2, 3, 4, 6, 1):
        position = run(mixture, tmp_path, 4, world_size=world_size, start_step=step, position=position,
                       packing=packing)
        step += 4
    result = check_audit(tmp_path)
    assert result.problems == [] and result.notes == []
    assert (result.steps, result.rows) == (24, 24 * 12)
    lanes = position["lanes"].values()
    total = {key: sum(lane["counts"][key] for lane in lanes) for key in ("documents", "placed", "cropped")}
    assert {key: getattr(result, key) for key in total} == total
    assert (result.cropped > 0) == (not PACKINGS[packing].keeps_rest)
    assert sum(sum(by_epoch.values()) for by_epoch in result.epochs.values()) == total["documents"]
    assert result.waiting == sum(len(lane["buffer"]) + (lane["rest"] is not None) for lane in lanes)
    assert "every document read was placed once or waits" in result.report()
    assert len(result.lives) == 6 and "steps 5 to 8 on 2 ranks" in result.report()


@pytest.mark.parametrize("packing", ["bestfit_split", "bestfit_pad"])
def test_lines_after_the_checkpoint_are_dropped(mixture, tmp_path, packing):
    """4 ranks make 9 steps and are killed; the checkpoint is of step 5; 2 ranks go on and are killed, then one."""
    first = run(mixture, tmp_path / "other", 5, world_size=4, packing=packing)
    run(mixture, tmp_path, 9, world_size=4, packing=packing, killed=True)
    with open(tmp_path / AUDIT / "rank_0.jsonl", "ab") as file:
        file.write(b'{"step": 10, "rows": [[0, [["pro')                       # torn
    assert "did not end in order" in check_audit(tmp_path).notes[0]
    run(mixture, tmp_path, 3, world_size=2, start_step=5, position=first, packing=packing, killed=True)
    assert {p.name: p.read_text().count('"step"') for p in (tmp_path / AUDIT).iterdir()} == {
        "rank_0.jsonl": 8, "rank_1.jsonl": 8, "rank_2.jsonl": 5, "rank_3.jsonl": 5}
    run(mixture, tmp_path, 8, world_size=1, start_step=5, position=first, packing=packing)
    result = check_audit(tmp_path)
    assert result.problems == result.notes == [] and result.steps == 13
    assert result.lives == ["steps 1 to 5 on 4 ranks", "steps 6 to 13 on 1 rank"]


def test_an_approximate_resume_is_found(mixture, tmp_path):
    """What the audit is for: a run that goes on without its buffers, from an older place, or one document further."""
    first = run(mixture, tmp_path, 6, packing="bestfit_split")

    def life(change: Callable[[Any], None]) -> list[str]:
        position = json.loads(json.dumps(first))
        for lane in position["lanes"].values():
            change(lane)
        run(mixture, tmp_path, 6, start_step=6, position=position, packing="bestfit_split")
        return check_audit(tmp_path).problems

    assert life(lambda lane: None) == []                                      # control
    assert any("was read and never placed" in line for line in life(lambda lane: lane.update(buffer=[])))
    assert any("placed up to token" in line for line in life(lambda lane: lane.update(rest=None)))
    assert any("waits with" in line for line in life(
        lambda lane: lane.update(rest=lane["rest"] and [*lane["rest"][:3], lane["rest"][3] + 1])))

    def back(lane: Any) -> None:
        lane["cursors"]["prose"][1] -= 1

    assert any("went back" in line for line in life(back))

    def skip(lane: Any) -> None:
        lane["cursors"]["prose"][1] += 1

    assert any("was read and never placed" in line for line in life(skip))
    assert life(lambda lane: None) == []


def edit(folder: Path, change: Callable[[list[Line]], list[Line] | None]) -> list[str]:
    """The problems that the audit shows after `change` of the lines of rank 0; the file is put back."""
    path = folder / AUDIT / "rank_0.jsonl"
    whole = path.read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    lines = change(lines) or lines
    path.write_text("".join(json.dumps(line, separators=(",", ": ")) + "\n" for line in lines))
    problems = check_audit(folder).problems
    path.write_text(whole)
    return problems


def piece_of(lines: list[Line], which: Callable[[list], bool]) -> tuple[Line, int, int]:
    """(line, row, piece) of the first piece that `which` picks."""
    return next((line, r, p) for line in lines if "step" in line for r, (_, pieces) in enumerate(line["rows"])
                for p, piece in enumerate(pieces) if which(piece))


@pytest.fixture
def audited(mixture, tmp_path):
    run(mixture, tmp_path, 8, world_size=2, packing="bestfit_split")
    assert edit(tmp_path, lambda lines: None) == []                           # control: writing it again is harmless
    return tmp_path


def test_forged_repeats_gaps_and_overlaps_are_found(audited):
    def forge(change: Callable[[list], list], which: Callable[[list], bool]) -> list[str]:
        def apply(lines: list[Line]) -> None:
            line, r, p = piece_of(lines, which)
            line["rows"][r][1][p] = change(line["rows"][r][1][p])
        return edit(audited, apply)

    later = lambda piece: piece[3] > 0                                        # noqa: E731
    whole = lambda piece: piece[3] == 0 and piece[4] == piece[5]              # noqa: E731
    overlap = forge(lambda p: [*p[:3], p[3] - 1, p[4], p[5]], later)
    assert any("repeats tokens" in line for line in overlap)
    hole = forge(lambda p: [*p[:3], p[3] + 1, p[4] - 1, p[5]], later)
    assert any("skips tokens" in line for line in hole) and any("its pieces make" in line for line in hole)
    short = forge(lambda p: [*p[:4], p[4] - 1, p[5]], whole)
    assert any("was placed up to token" in line for line in short)
    other = forge(lambda p: [*p[:2], (p[2] + 1) % 15, *p[3:]], whole)         # another document in its place
    assert any("was read and never placed" in line for line in other)
    assert any("placed and not read" in line or "repeats" in line or "is in lane" in line for line in other)
    too_long = forge(lambda p: [*p[:4], p[4], p[4] - 1], whole)
    assert any("tokens, not 0 to" in line for line in too_long)


def test_forged_rows_and_steps_are_found(audited):
    def swap_rows(lines: list[Line]) -> None:
        rows = lines[3]["rows"]
        rows[0][1], rows[1][1] = rows[1][1], rows[0][1]

    def repeat_a_step(lines: list[Line]) -> list[Line]:
        return [*lines[:4], {**lines[3], "step": 4}, *lines[5:]]

    def drop_a_row(lines: list[Line]) -> None:
        lines[4]["rows"].pop()

    def double_a_row(lines: list[Line]) -> None:
        lines[4]["rows"].append(lines[4]["rows"][0])

    def foreign_row(lines: list[Line]) -> None:
        lines[4]["rows"][0][0] = 12

    assert any("is in lane" in line for line in edit(audited, swap_rows))
    assert any("repeats tokens" in line for line in edit(audited, repeat_a_step))
    assert any("rows 10 are missing" in line for line in edit(audited, drop_a_row))
    assert any("rows 0 are there twice" in line for line in edit(audited, double_a_row))
    assert any("rows 12 are foreign" in line for line in edit(audited, foreign_row))
    assert any("step 4 is not there of rank 0" in line for line in edit(audited, lambda lines: lines[:4] + lines[5:]))


def test_missing_steps_and_ranks_are_found(mixture, tmp_path):
    first = run(mixture, tmp_path, 6, world_size=2, packing="concat")
    run(mixture, tmp_path, 4, world_size=2, start_step=6, position=first, packing="concat")
    assert check_audit(tmp_path).ok
    assert any("step 3 is not there of rank 0" in line for line in edit(tmp_path, lambda lines: lines[:3] + lines[4:]))
    (tmp_path / AUDIT / "rank_1.jsonl").unlink()
    result = check_audit(tmp_path)
    assert any("no lines of rank 1" in line for line in result.problems) and "the audit fails" in result.report()
    with pytest.raises(DataError, match=r"no audit.*logging.audit=true"):
        check_audit(tmp_path / "nowhere")
    (tmp_path / AUDIT / "rank_0.jsonl").write_text("hello\n")
    assert any("line 1: not a line of an audit" in line for line in check_audit(tmp_path).problems)


def test_data_changed_on_purpose_begin_a_new_account(mixture, tmp_path):
    first = run(mixture, tmp_path, 5)
    run(lambda: mixture()[:1], tmp_path, 5, start_step=5, position=first, may_change=["sources"])
    result = check_audit(tmp_path)
    assert result.ok and "data or batch were changed after step 5" in result.notes[0] and result.steps == 10


def test_what_the_disk_refuses_is_an_error(mixture, tmp_path):
    (tmp_path / AUDIT).write_text("a file")
    with pytest.raises(StorageError, match="cannot be written"):
        run(mixture, tmp_path, 1)


def test_a_training_writes_its_audit(data, tmp_path):
    """5 steps, of which the checkpoint after 4 is gone on from; then to the end. And none where it is not asked for."""
    alone = World(0, 1, torch.device("cpu"))

    def run_to_end(run_dir: Path, **changes: Any) -> None:
        train(experiment_from_dict(experiment_dict(data, run_dir, **{"data.packing": "bestfit_split", **changes}),
                                   "test"), alone)

    run_to_end(tmp_path, **{"logging.audit": True})
    assert check_audit(tmp_path).ok and check_audit(tmp_path).steps == 8
    run_to_end(tmp_path, **{"logging.audit": True, "resume": {"step": 4}})
    result = check_audit(tmp_path)
    assert result.problems == result.notes == []
    assert result.lives == ["steps 1 to 4 on 1 rank", "steps 5 to 8 on 1 rank"]
    run_to_end(tmp_path / "quiet")
    assert not (tmp_path / "quiet" / AUDIT).exists()
