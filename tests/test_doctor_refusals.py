"""What operations meet in the wild: paths that cannot be, disks that are full or read-only, names that hold anything.

Each is one line, with a documented exit code, beside a control that goes well.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nanopoe.checkpoint import list_steps
from nanopoe.errors import ConfigError, DataError, StorageError, entrypoint, one_line, typed
from tests.commands import Call, call, contents, refused, write_yaml
from tests.ranks import experiment_dict

LONG = "x" * 5000


@contextlib.contextmanager
def mounted(where: Path, *words: str | Path) -> Iterator[Path]:
    """A mount for the time of the block; skips where this machine allows none."""
    where.mkdir()
    command = ["mount", *map(str, words), str(where)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield where
    finally:
        subprocess.run(["umount", str(where)], check=True, capture_output=True)


@pytest.mark.parametrize("error, code, line", [
    (OSError(36, "File name too long", "x"), 7, "error[storage] x: File name too long; free some space or check the "),
    (PermissionError(13, "Permission denied", "a\nb"), 7, r"error[storage] a\nb: Permission denied; "),
    (DataError("two\nlines\x1b[2J", "\udcff"), 3, r"error[data] \udcff: two\nlines\x1b[2J"),
    (ConfigError("", "c.yaml", problems=["a\nb", "c"]), 2, "error[config] c.yaml\n  a\\nb\n  c\n"),
    (ZeroDivisionError("division"), 1, "error[internal] ZeroDivisionError: division; this is a bug")])       # control
def test_what_the_system_refuses_is_no_bug_of_ours(capsys: pytest.CaptureFixture[str], error: Exception, code: int,
                                                   line: str) -> None:
    """And no name of a file can begin a line or move the cursor."""
    @entrypoint
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as left:
        main()
    said = capsys.readouterr().err
    assert left.value.code == code and said.startswith(line), said
    assert said.count("\n") == (3 if isinstance(error, ConfigError) else 1)
    assert isinstance(typed(error), StorageError) == isinstance(error, OSError)
    assert one_line("ünï-日本 é") == "ünï-日本 é"                                                    # control


def test_paths_that_cannot_be(finished: Path, tmp_path: Path, cli: Call) -> None:
    run = finished / "run"
    for verb in ("ls", "verify", "digest", "show"):
        refused(cli("checkpoint", verb, LONG), 7, "storage", "File name too long")
        refused(cli("checkpoint", verb, "a\nb"), 4, "checkpoint", r"a\\nb.*: no checkpoint; train first")
        assert cli("checkpoint", verb, run).code == 0                                                # control
    refused(cli("publish", LONG, "--to", tmp_path / "git"), 7, "storage", "File name too long")
    for name in ("a\nb", "x\udcff", 'a"b', "a\\b"):
        refused(cli("publish", run, "--to", tmp_path / name), 2, "config", "the cards cannot tell the name")
    for repo in ("me", "../x", "me/x y", 'me/"x"', "ünï/x"):
        refused(cli("publish", run, "--repo", repo, "--to", tmp_path / "git"), 2, "config", "expected ORG/NAME, got")
    assert not (tmp_path / "git").exists()
    assert cli("publish", run, "--steps", "8", "--to", tmp_path / "ünï 日本").code == 0               # control


def test_branches_of_others_may_be_called_anything(finished: Path, tmp_path: Path, cli: Call) -> None:
    git = ["git", "--git-dir", tmp_path / "git"]
    assert cli("publish", finished / "run", "--steps", "8", "--to", tmp_path / "git").code == 0
    subprocess.run([*git, "branch", b"f\xff", "main"], check=True)
    done = cli("publish", finished / "run", "--steps", "7,8", "--to", tmp_path / "git")
    assert done.code == 0 and "step 7 -> step-000007" in done.out, done
    assert b"f\xff" in subprocess.run([*git, "branch"], check=True, capture_output=True).stdout
    lock = tmp_path / "git" / "refs" / "heads" / "step-000006.lock"                      # as a killed git leaves it
    lock.touch()
    again = ["publish", finished / "run", "--steps", "6", "--to", tmp_path / "git"]
    refused(cli(*again), 7, "storage", r"step-000006\.lock': File exists.*; remove that file if no other git works")
    lock.unlink()
    assert cli(*again).code == 0                                                                     # control


def trains(data: Path, folder: Path) -> Callable[..., Any]:
    """The tiny experiment as a command, in a run folder and with overrides."""
    file = write_yaml(folder / "tiny.yaml", experiment_dict(data, folder / "run", **{"evaluation.every": None}))
    return lambda run, *more: call("train", file, f"run_dir={run}", *more, folder=folder)


def test_a_folder_that_is_read_only(data: Path, finished: Path, tmp_path: Path) -> None:
    train = trains(data, tmp_path)
    shutil.copytree(finished / "run", tmp_path / "source")
    before = contents(tmp_path / "source")
    with mounted(tmp_path / "ro", "--bind", tmp_path / "source") as ro:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(ro)], check=True)
        refused(train(ro), 7, "storage", r"ro/\.lock: Read-only file system")
        refused(train(ro / "new"), 7, "storage", "ro/new: Read-only file system")
        refused(call("publish", finished / "run", "--to", ro / "git", folder=tmp_path), 7, "storage",
                "ro/git: cannot be written or read .Read-only file system")
        assert call("checkpoint", "verify", ro, "--all", folder=tmp_path).code == 0                  # controls: to read
        begin = f"init_from.path={ro}", "init_from.step=null", "init_from.optimizer=true"
        assert train(tmp_path / "on", *begin).code == 0
    assert contents(tmp_path / "source") == before


def test_a_disk_that_is_full(data: Path, tmp_path: Path) -> None:
    """At the start, and for a publish; with room again both go on, and nothing is lost."""
    train, words = trains(data, tmp_path), ["checkpoint.keep_last=2"]
    with mounted(tmp_path / "small", "-t", "tmpfs", "-o", "size=16m", "tmpfs") as small:
        assert train(small / "run", *words, "schedule.cycles.1.steps=1").code == 0
        steps, fill = list_steps(small / "run"), small / "fill"
        with contextlib.suppress(OSError), open(fill, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        refused(train(small / "new"), 7, "storage", "No space left on device")
        refused(train(small / "run", *words), 7, "storage", r"small/run/\.\S+: No space left on device")
        refused(call("publish", small / "run", "--to", small / "git", folder=tmp_path), 7, "storage",
                r"small/git: cannot be written or read .*No space left on device")
        assert list_steps(small / "run") == steps
        fill.unlink()
        assert train(small / "run", *words, "resume.allow=[schedule]").code == 0
        assert call("publish", small / "run", "--to", small / "git", folder=tmp_path).code == 0
        assert json.loads((small / "run" / "status.json").read_text())["state"] == "finished"
        assert list_steps(small / "run")[-1] == 8 and os.listdir(small / "git" / "refs" / "heads")
