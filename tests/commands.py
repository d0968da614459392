"""The commands, each in a process of its own: what it said, its exit code, and that a refusal is one typed line.

Most processes are forked from one that has imported torch already (0.1 s instead of 4 s); the shell's own way,
`python -m` and torchrun, is taken where it matters.
"""

from __future__ import annotations

import hashlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.ranks import forked

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Done:
    code: int | None
    out: str
    err: str


def _child(module: str, arguments: list[str], out: str, err: str, variables: dict[str, str]) -> None:
    for path, fd in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, fd)
        os.close(handle)
    os.chdir(ROOT)
    os.environ.update(variables)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def call(script: str, *arguments: str | Path, folder: Path, **variables: str) -> Done:
    """`python -m scripts.<script> arguments`, forked from a process that has torch; its output by way of `folder`.

    `variables` of the environment are added to what the fork server has.
    """
    files = str(folder / ".stdout"), str(folder / ".stderr")
    words = [str(argument) for argument in arguments]
    process = forked().Process(target=_child, args=(f"scripts.{script}", words, *files, variables))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the command hangs"
    return Done(process.exitcode, *(Path(f).read_text("utf-8") for f in files))


Call = Callable[..., Done]


def shell(*arguments: str | Path) -> Done:
    """The same, as a user's shell does it."""
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


def write_yaml(path: Path, experiment: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    return path


def refused(done: Done, code: int, kind: str, words: str) -> None:
    """One typed line that says `words` (a pattern), or a head and a line per problem; the exit code; no traceback."""
    assert (done.code, done.err.split(" ")[0]) == (code, f"error[{kind}]"), done
    head, *problems = done.err.splitlines()
    assert not problems or (kind == "config" and all(line.startswith("  ") for line in problems)), done.err
    assert re.search(words, done.err), done.err
    assert "Traceback" not in done.out + done.err
    assert "this is a bug" not in done.err


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below `folder`."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}
