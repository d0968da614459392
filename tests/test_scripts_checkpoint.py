"""scripts.checkpoint: what it says of whole, damaged and different checkpoints, and its exit codes."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.checkpoint import Checkpoint, folder_of, save_checkpoint
from nanopoe.checkpoint.container import read_header
from tests.checkpoints import ALONE, MODEL, filled, flip, position_of, saved_by, target_of
from tests.ranks import run_ranks
from tests.test_optim import parameters

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """main() with arguments: exit code, stdout, stderr."""
    from scripts.checkpoint import main

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


def save(run_dir: Path, step: int, weights: dict[str, Any] | None = None, state: dict[str, Any] | None = None,
         **changes: Any) -> Path:
    values = {"step": step, "tokens": 1000 * step, "optimizer_steps": step, "position": position_of(ALONE)}
    return save_checkpoint(target_of(run_dir, **changes), parameters() if weights is None else weights,
                           filled(ALONE).state_parts(), {**values, **(state or {})}).path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with steps 1 (pinned), 2 and 3, and 2 once more set aside."""
    for step in (1, 2, 2, 3):
        save(tmp_path / "run", step)
    (folder_of(tmp_path / "run", 1) / "KEEP").touch()
    return tmp_path / "run"


def test_ls(run: Path, call: Call) -> None:
    flip(folder_of(run, 2) / "manifest.json", 20)
    code, out, _ = call("ls", run)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 6 and max(map(len, lines)) < 150
    assert re.fullmatch(r"checkpoint +size +age +ranks +kept +state", lines[0])
    assert re.fullmatch(r"step_00000001 +\d+\.\d KiB +\d+ s +1 +pinned +ok", lines[1])
    assert re.fullmatch(r"step_00000002 .* damaged: manifest.json: .*", lines[2])
    assert re.fullmatch(r"aside_1_step_00000002 .* ok", lines[3])
    assert lines[4].startswith("step_00000003") and re.fullmatch(r"4 checkpoints, \d+\.\d KiB", lines[5])
    code, out, _ = call("ls", run, "--json")
    listed = json.loads(out)
    assert [(item["step"], item["pinned"], item["problem"] is None) for item in listed] == [
        (1, True, True), (2, False, False), (2, False, True), (3, False, True)]
    code, out, err = call("ls", run / "nothing")
    assert (code, out) == (4, "") and "no checkpoint" in err


def test_a_terminal_gets_a_table(run: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    from nanopoe.checkpoint import tables

    plain = call("ls", run)[1]
    monkeypatch.setattr(tables, "on_terminal", lambda: True)
    assert "━" in call("ls", run)[1] and "━" not in plain


def test_verify(run: Path, call: Call) -> None:
    assert call("verify", run)[:2] == (0, call("verify", run / "checkpoints" / "step_00000003")[1])
    code, out, err = call("verify", run, "--all")
    assert (code, err) == (0, "") and [line.split(":")[0] for line in out.splitlines()] == [
        f"step_0000000{step}" for step in (1, 2, 3)]
    path = folder_of(run, 2) / MODEL
    flip(path, read_header(path)["rows"].offset + 99)
    assert call("verify", run)[0] == 0                                             # control: the newest is whole
    for arguments in ((run, "--step", "2"), (folder_of(run, 2),), (run, "--all")):
        code, out, err = call("verify", *arguments)
        assert code == 4 and "step_00000002: damaged" in out
        assert re.fullmatch(r"error\[checkpoint\] .*step_00000002/model-0001-of-0001\.safetensors: content does not "
                            r"match its SHA-256, in rows rows 0 to 126; .*\n", err)
    assert out.count(": ok") == 2
    assert call("verify", run, "--step", "7")[0] == 4
    (folder_of(run, 3) / "manifest.json").unlink()
    code, _, err = call("verify", run)
    assert code == 4 and "step_00000003/manifest.json: missing" in err


def test_digest_prints_the_digest_alone(tmp_path: Path, call: Call) -> None:
    expected = saved_by(ALONE, str(tmp_path / "a"))
    run_ranks(saved_by, 3, str(tmp_path / "b"))
    for path in (tmp_path / "a", tmp_path / "b", folder_of(tmp_path / "b", 1)):
        assert call("digest", path) == (0, f"{expected}\n", "")
    assert call("digest", tmp_path / "b", "--step", "1")[1] == f"{expected}\n"
    assert call("diff", tmp_path / "a", tmp_path / "b") == (
        0, "logically equal\nconfig keys that change no weights also differ: run_dir\n", "")
    flip(folder_of(tmp_path / "a", 1) / MODEL, -1)
    code, out, err = call("digest", tmp_path / "a")
    assert (code, out) == (4, "") and MODEL in err


def test_diff_tells_what_differs(tmp_path: Path, call: Call) -> None:
    one, two = parameters(), parameters()
    two["rows"].data[100, 3] += 0.5
    two["rows"].data[2, 1] -= 0.25
    two["few"] = torch.nn.Parameter(torch.ones(2, 6))
    del two["tall"]
    with torch.no_grad():
        one["vector"][0], two["vector"][0] = 0.0, -0.0
        one["wide"][0, 0] = two["wide"][0, 0] = math.nan                           # the same NaN is no difference
        two["square0"][0, 0] = math.nan
    a = save(tmp_path / "a", 1, one, {"lineage": []})
    b = save(tmp_path / "b", 1, two, {"lineage": [{"step": 0}], "tokens": 1}, seed=8)
    code, out, err = call("diff", a, b, "--json")
    result = json.loads(out)
    assert (code, err) == (1, "")
    found = {d["name"]: d for d in result["differences"]}
    assert set(found) == {"seed", "tokens", "lineage", "lineage.0.step", "rows", "few", "tall", "vector", "square0"}
    assert (found["rows"]["max_abs"], found["rows"]["elements"], found["rows"]["of"]) == (0.5, 2, 127 * 8)
    assert (found["vector"]["max_abs"], found["vector"]["elements"]) == (0.0, 1)
    assert found["square0"]["max_abs"] == "nan"
    assert (found["few"]["a"], found["few"]["b"], found["tall"]["b"]) == ("F32 [2, 5]", "F32 [2, 6]", "absent")
    assert (found["seed"]["a"], found["seed"]["b"]) == ("7", "8")
    assert [d["name"] for d in result["notes"]] == ["run_dir"]
    code, out, _ = call("diff", a, b)
    assert code == 1 and re.search(r"^rows +F32 \[127, 8\] +F32 \[127, 8\] +0\.5 +2 of 1,016$", out, re.M)
    assert call("diff", a, a)[:2] == (0, "logically equal\n")                                        # control


def test_show(run: Path, call: Call) -> None:
    code, out, _ = call("show", run, "--step", "2")
    fields = {line.split()[0]: line.split(maxsplit=1)[1] for line in out.splitlines()[1:]}
    assert code == 0 and fields["step"] == "2" and fields["tokens"] == "2,000" and fields["experiment"] == "tiny"
    assert fields["world_size"] == "1" and fields["pinned"] == "false" and fields["fingerprints.config"] == "c"
    assert "square0::momentum" not in out
    code, out, _ = call("show", run, "--step", "2", "--tensors")
    assert re.search(r"^square0::momentum +F32 +\[24, 24\] +1$", out, re.M)
    code, out, _ = call("show", folder_of(run, 1), "--json", "--tensors")
    shown = json.loads(out)
    assert shown["pinned"] and shown["model"]["parameters"] == sum(p.numel() for p in parameters().values())
    assert {t["name"] for t in shown["tensors"]} == Checkpoint(folder_of(run, 1)).manifest.tensors.keys()


def test_show_tells_where_the_data_stand(tmp_path: Path, call: Call) -> None:
    lane = {"cursors": {"web": [1, 5]}, "tokens": {"web": 70}, "buffer": [["web", 1, 2]]}
    lanes = {"0": lane, "1": {**lane, "cursors": {"web": [0, 9]}}}
    save(tmp_path, 1, state={"position": {"step": 1, "fingerprint": {}, "lanes": lanes}})
    data = json.loads(call("show", tmp_path, "--json")[1])["data"]
    assert data == {"lanes": 2, "buffered_documents": 2, "sources": {"web": {"epochs": [0, 1], "tokens": 140}}}


@pytest.mark.parametrize("arguments", [[], ["ls"], ["burn", "x"], ["diff", "a"], ["show", "a", "--step", "x"]])
def test_wrong_arguments(arguments: list[str], call: Call) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "") and "usage: python -m scripts.checkpoint" in err


def test_help_has_examples(call: Call) -> None:
    for arguments in (["--help"], ["diff", "--help"]):
        code, out, _ = call(*arguments)
        assert code == 0 and "exit codes: 0 good or equal, 1 different" in out
