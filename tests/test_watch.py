"""What a run tells: metrics that survive resumes and NaN, plain lines, the live display, logs of ranks, wandb."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from nanopoe.dist import World
from nanopoe.errors import ConfigError, StorageError
from nanopoe.train.console import rates, time_left
from nanopoe.train.watch import Header, Smooth, Watch, clean, truncate_metrics
from tests.ranks import run_ranks

WORLD = World(0, 1, torch.device("cpu"))
HEADER = Header(
    name="tiny", parameters=1234567, device="cpu", dtype="float32", dtype_reason="auto: no GPU is visible",
    world_size=1, config_hash="abcdef0123456789", n_stages=2, total_steps=6, poe_mode="flat")
EVAL = {"poe_mode": "flat",
        "bpb": {"full": 1.25, "stages": [1.5, 1.375], "prefixes": [1.5, 1.25], "alpha": {"0": 1.25}},
        "accuracy": {"full": 0.5, "stages": [0.25, 0.375], "prefixes": [0.25, 0.5]}}


def report(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 512 * step, "loss": 5 / step, "stage_loss": [6 / step, 4.1 / step],
            "pool_loss": 1 / (3 * step), "lr_scale": 0.5, "momentum": 0.9, "weight_decay": 0.1, "grad_norm": 1.5,
            "seconds": 2.0, "tokens_per_s": 25600.0, "mfu": None, "memory_bytes": 3 << 30, **changes}


def watch(folder: Path, terminal: bool = False, **options: Any) -> tuple[Watch, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=120, color_system="truecolor" if terminal else None)
    return Watch(folder, HEADER, WORLD, console=console, **options), out


def metrics(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder: Path, first: int, last: int, **options: Any) -> str:
    told, out = watch(folder, start_step=first - 1, **options)
    with told:
        for step in range(first, last + 1):
            told.train(report(step))
            if step % 2 == 0:
                told.eval(EVAL)
    return out.getvalue()


def test_waiting_for_rows_is_told_when_it_is_worth_a_word() -> None:
    assert "waits for rows 25 %" in rates({"seconds": 2.0, "wait_seconds": 0.5})
    assert "waits" not in rates({"seconds": 2.0, "wait_seconds": 0.001}) and "waits" not in rates({"seconds": 2.0})


def test_lines_hold_the_report(tmp_path: Path) -> None:
    run(tmp_path, 1, 2)
    lines = metrics(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("eval", 2)]
    assert lines[1] == {"kind": "train", **report(2)}               # every float comes back to the bit
    assert lines[2] == {"kind": "eval", "step": 2, **EVAL}


def test_tensors_become_numbers(tmp_path: Path) -> None:
    told, _ = watch(tmp_path)
    told.train(report(1, loss=torch.tensor(2.5), stage_loss=torch.tensor([2.0, 3.0])))
    assert metrics(tmp_path)[0]["loss"] == 2.5
    assert metrics(tmp_path)[0]["stage_loss"] == [2.0, 3.0]


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_resumed_metrics_equal_uninterrupted_ones(tmp_path: Path, stop: int) -> None:
    run(tmp_path / "whole", 1, 6)
    run(tmp_path / "cut", 1, 5)                                     # went on after the checkpoint at `stop`, then died
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 6, "los')             # in the middle of a line
    before = (tmp_path / "cut" / "metrics.jsonl").read_bytes()
    run(tmp_path / "cut", stop + 1, 6)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == whole
    assert before != whole
    assert not list((tmp_path / "cut").glob(".*"))


def test_truncation_keeps_bytes_and_tells_the_evaluations(tmp_path: Path) -> None:
    run(tmp_path, 1, 5)
    path = tmp_path / "metrics.jsonl"
    raw = path.read_bytes().splitlines(keepends=True)
    inode = path.stat().st_ino
    assert truncate_metrics(path, 5) == {2, 4}
    assert path.stat().st_ino == inode
    assert truncate_metrics(path, 3) == {2}
    assert path.read_bytes() == b"".join(raw[:4])
    assert path.stat().st_ino != inode
    assert truncate_metrics(tmp_path / "none.jsonl", 3) == set()
    for foreign in (b'{"kind": "eval", "step": "x"}', b'{"kind": "eval"}', b'[1]', b'{"step": null}', b'\xff'):
        path.write_bytes(b"".join(raw[:4]) + foreign + b"\n")
        assert truncate_metrics(path, 3) == {2} and path.read_bytes() == b"".join(raw[:4]), foreign
    told, _ = watch(tmp_path, start_step=3)
    assert told.evaluated == {2}
    told.eval(EVAL)
    assert told.evaluated == {2, 3}


def test_nan_is_valid_json_and_flagged(tmp_path: Path) -> None:
    for terminal in (False, True):
        told, out = watch(tmp_path / str(terminal), terminal)
        told.train(report(1))
        told.train(report(2, loss=float("nan"), stage_loss=[1.0, float("inf")], grad_norm=torch.tensor(float("-inf"))))
        told.close()
        first, second = metrics(tmp_path / str(terminal))
        assert "nonfinite" not in first
        assert second["loss"] is None
        assert second["stage_loss"] == [1.0, None]
        assert second["grad_norm"] is None
        assert second["nonfinite"] == ["loss", "stage_loss.1", "grad_norm"]
    assert "not finite: loss, stage_loss.1, grad_norm" in (tmp_path / "False" / "logs" / "rank_0.log").read_text()


def test_plain_lines_off_a_terminal(tmp_path: Path) -> None:
    out = run(tmp_path, 1, 6, every=4)
    assert "\x1b" not in out
    lines = out.splitlines()
    assert lines[0] == "tiny: PoE flat, 2 stages, 1,234,567 parameters, 6 steps, config abcdef012345"
    assert lines[1] == "cpu, 1 rank, float32 (auto: no GPU is visible)"
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        "eval @ 2: bpb 1.2500", "step 4/6", "eval @ 4: bpb 1.2500", "step 6/6", "eval @ 6: bpb 1.2500"]
    assert lines[3].startswith("step 4/6 | loss 1.2500 | stages 1.5000 1.0250 | pool 0.0833 | lr x0.500  momentum 0.9")
    assert lines[3].endswith("25.6k tok/s  3.00 GiB | 4s left")
    assert not lines[5].endswith("left")
    assert run(tmp_path / "each", 1, 6, every=1).count("step ") == 6


def test_live_display_on_a_terminal(tmp_path: Path) -> None:
    told, out = watch(tmp_path, terminal=True)
    assert told._display is not None
    told.train(report(1))
    told.event("checkpoint", path="step_00000001")
    told.eval(EVAL)
    told.train(report(2, mfu=0.412, pool_loss=None))
    plain = Console(width=120, file=io.StringIO())
    plain.print(told._display.render())
    shown = plain.file.getvalue()                                   # type: ignore[attr-defined]
    for part in ("tiny: PoE flat, 2 stages", "auto: no GPU is visible", "2/6", "8s left", "stage 0", "stage 1", "pool",
                 "bpb @ 1", "1.3750", "3.0000", "lr x0.500", "25.6k tok/s", "MFU 41.2 %", "3.00 GiB",
                 "0.3333"):                                         # the pool's last loss stays
        assert part in shown, part
    told.close()
    told.close()
    assert out.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in out.getvalue()   # the cursor is back
    assert "checkpoint path=step_00000001" in out.getvalue()
    assert "| loss" not in out.getvalue()                           # plain lines go to the log alone
    assert "step 2/6 | loss 2.5000" in (tmp_path / "logs" / "rank_0.log").read_text()


def test_bp_has_one_row(tmp_path: Path) -> None:
    header = Header(**{**HEADER.__dict__, "poe_mode": "none", "n_stages": 1})
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with Watch(tmp_path, header, WORLD, console=console) as told:
        told.train(report(1, stage_loss=[5.0], pool_loss=None))
        told.eval({"bpb": {"full": 1.1, "stages": None}, "accuracy": {"full": 0.4, "stages": None}})
        assert told._display is not None
        plain = Console(width=100, file=io.StringIO())
        plain.print(told._display.render())
    shown = plain.file.getvalue()                                   # type: ignore[attr-defined]
    assert "1.1000" in shown
    assert "BP" in shown
    assert "stage 0" not in shown
    assert "pool" not in shown


def test_events_are_recorded(tmp_path: Path) -> None:
    told, out = watch(tmp_path, start_step=2)
    told.event("resumed", checkpoint=Path("x/y"), world_size=2)
    line = metrics(tmp_path)[0]
    assert (line["kind"], line["step"], line["event"], line["checkpoint"]) == ("event", 2, "resumed", "x/y")
    assert out.getvalue().splitlines()[-1] == "resumed checkpoint=x/y world_size=2"


def rank_run(world: World, folder: str) -> str:
    out = io.StringIO()
    with Watch(folder, HEADER, world, start_step=1, console=Console(file=out, width=120)) as told:
        assert told.evaluated == {1}
        told.train(report(2))
        told.event("checkpoint")
    return out.getvalue()


def test_only_rank_zero_talks_and_each_rank_has_a_log(tmp_path: Path) -> None:
    told, _ = watch(tmp_path)
    told.train(report(1))
    told.eval(EVAL)
    told.close()
    first, second = run_ranks(rank_run, 2, str(tmp_path))
    assert "step 2/6" in first
    assert second == ""
    assert len(metrics(tmp_path)) == 4
    for rank in (0, 1):
        assert "step 2/6" in (tmp_path / "logs" / f"rank_{rank}.log").read_text()


def rank_wandb(world: World, folder: str) -> str:
    try:
        Watch(folder, HEADER, world, wandb_mode="online", console=Console(file=io.StringIO()))
    except ConfigError as error:
        return str(error)
    return "started"


def test_wandb_without_a_key_fails_on_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for text in run_ranks(rank_wandb, 2, str(tmp_path)):
        assert "WANDB_API_KEY" in text
        assert "logging.wandb=offline" in text
        assert "\n" not in text


def test_wandb_offline_needs_no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    told, out = watch(tmp_path, wandb_mode="offline", config={"seed": 1})
    told.train(report(1))
    told.eval(EVAL)
    told.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert "wandb" not in out.getvalue()
    assert len(metrics(tmp_path)) == 2
    run(tmp_path / "without", 1, 1)
    assert not (tmp_path / "without" / "wandb").exists()
    assert "wandb" in sys.modules


def test_wandb_that_breaks_in_the_run_only_warns(tmp_path: Path) -> None:
    class Broken:
        def log(self, numbers: dict[str, float]) -> None:
            assert numbers["train/stage_loss.1"] == 4.1
            assert numbers["train/step"] == 1
            raise OSError("connection lost")

    told, out = watch(tmp_path)
    told._wandb = Broken()
    told.train(report(1))
    told.train(report(2))
    told.close()
    assert out.getvalue().count("connection lost") == 1
    assert [line["kind"] for line in metrics(tmp_path)] == ["train", "event", "train"]


def test_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="cannot open"):
        watch(tmp_path / "run")
    watch(tmp_path / "other")[0].close()


class Disk:
    """os.write on files that are full while `full`: of each line `takes` bytes are still taken, then an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, takes: int = 0, code: int = errno.ENOSPC,
                 truncates: bool = True):
        self.full, self.refused, self._takes, self._code = False, 0, takes, code
        write, truncate = os.write, os.ftruncate

        def refusing(fd: int, data: bytes) -> int:
            if not self.full or not os.readlink(f"/proc/self/fd/{fd}").endswith(name):
                return write(fd, data)
            if self._takes and self.refused % 2 == 0:
                self.refused += 1
                return write(fd, data[:self._takes])
            self.refused += 1
            raise OSError(self._code, os.strerror(self._code))

        def cutting(fd: int, length: int) -> None:
            if not truncates and self.full:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            truncate(fd, length)

        monkeypatch.setattr(os, "write", refusing)
        monkeypatch.setattr(os, "ftruncate", cutting)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("name", ["metrics.jsonl", "rank_0.log"])
@pytest.mark.parametrize("takes, code, truncates", [(0, errno.ENOSPC, True), (7, errno.ENOSPC, True),
                                                    (7, errno.EDQUOT, False), (0, errno.EIO, True)])
def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str,
                                                     takes: int, code: int, truncates: bool) -> None:
    run(tmp_path / "whole", 1, 6)
    disk = Disk(monkeypatch, name, takes, code, truncates)
    told, out = watch(tmp_path / "full")
    file = told.run_dir / ("logs/rank_0.log" if "log" in name else name)
    with told:
        for step in range(1, 7):
            disk.full = step in (2, 3, 4)
            told.train(report(step))
            if step == 3 and truncates:
                assert file.read_bytes().endswith(b"\n"), "no torn line stays"
                assert disk.refused and b'"step": 2' not in file.read_bytes()
            if step % 2 == 0:
                told.eval(EVAL)
    strip = (lambda text: [line[21:] for line in text.splitlines()]) if "log" in name else str.splitlines
    assert strip(file.read_text()) == strip((tmp_path / "whole" / file.relative_to(told.run_dir)).read_text())
    assert out.getvalue().count("cannot be written") == out.getvalue().count("is written again, and complete") == 1
    assert os.strerror(code) in out.getvalue()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_what_a_full_disk_never_took_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch, "metrics.jsonl", takes=9)
    told, out = watch(tmp_path)
    told.train(report(1))
    disk.full = True
    for step in (2, 3):
        told.train(report(step))
    told.close()
    told.close()
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    lines = [line for line in out.getvalue().splitlines() if line.startswith("warning: ")]
    assert len(lines) == 2 and lines[1].endswith("metrics.jsonl lacks its last 2 lines: No space left on device")
    disk.full = False                                               # control: it was the disk
    run(tmp_path, 2, 3)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 2, 3]


def test_smoothing_and_time_left() -> None:
    smooth = Smooth(0.5)
    assert smooth.add({"step": 1, "loss": 4.0, "stage_loss": [1.0]})["loss"] == 4.0          # no bias towards 0
    assert smooth.add({"step": 2, "loss": 1.0, "stage_loss": [3.0]})["loss"] == pytest.approx(2.0)
    assert smooth.add({"step": 3, "loss": None, "stage_loss": []})["loss"] == pytest.approx(2.0)     # a NaN is skipped
    dense, sparse = Smooth(0.9), Smooth(0.9)
    for step in range(1, 202):
        every = dense.add({"step": step, "loss": 100.0 - step / 4})["loss"]
        tenth = sparse.add({"step": step, "loss": 100.0 - step / 4 if step % 10 == 1 else None})["loss"]
    assert tenth == pytest.approx(every, abs=2)                     # lags like the one that comes at each step
    assert abs(tenth - 49.75) < 5 < abs(sum(100 - s / 4 for s in range(1, 202, 10)) / 21 - 49.75)
    assert [time_left(0, n, 1.0) for n in (12, 200, 7500, 90_000 * 2)] == ["12s", "3m 20s", "2h 05m", "2d 02h"]
    assert time_left(5, 5, 1.0) == time_left(0, 5, None) == ""


def test_clean_leaves_finite_values_alone() -> None:
    line = {"kind": "train", "a": [1, 2.5, None, "x"], "b": {"c": True}}
    assert clean(line) == line
    assert clean({"a": (1, float("inf"))}) == {"a": [1, None], "nonfinite": ["a.1"]}
