"""F10: a damaged checkpoint is refused before a weight is used, by name, at once, and takes no memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from nanopoe.checkpoint import Checkpoint, digest, folder_of, list_steps
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import NanopoeError
from tests.faults.harness import Report, Room, copied, fault
from tests.faults.mutants import KINDS, MANIFEST, Damage, Victim, bomb
from tests.faults.resume import CYCLE
from tests.ranks import forked

ALONE = World(0, 1, torch.device("cpu"))
SECONDS, MEMORY = 2.0, 2.0             # of a refusal; the peak of memory, relative to that of a clean load
CRASHED = {"kind": "crash"}


class Reader:
    """A process of its own that loads runs; it is looked at from outside, and replaced when it dies."""

    def __init__(self, good: dict[str, Any]):
        self._good = good
        self.begin()

    def begin(self) -> None:
        """A new process, that has loaded a good run once: what that costs the first time is no mutant's."""
        context = forked()
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs,))
        self._process.start()
        theirs.close()
        self._pipe.send(self._good)
        assert self._pipe.recv()["kind"] == "loaded"

    def load(self, experiment: dict[str, Any]) -> dict[str, Any]:
        """{kind: "loaded" or of the error, message, seconds, peak: bytes, taken: memory was taken for the model}"""
        try:
            self._pipe.send(experiment)
            if self._pipe.poll(60):
                found: dict[str, Any] = self._pipe.recv()
                return found
        except (EOFError, OSError):
            pass
        self.end()
        message = f"the process ended with {self._process.exitcode}"
        self.begin()
        return {**CRASHED, "message": message, "seconds": 0.0, "peak": 0, "taken": True}

    def end(self) -> None:
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()


def serve(pipe: Connection) -> None:
    from nanopoe.model import GPT

    torch.set_num_threads(1)
    taken, real = [], GPT.to_empty

    def seen(*args: Any, **kwargs: Any) -> Any:
        taken.append(True)
        return real(*args, **kwargs)

    GPT.to_empty = seen                                                        # type: ignore[method-assign]
    with contextlib.suppress(EOFError):
        while True:
            experiment = pipe.recv()
            taken.clear()
            Path("/proc/self/clear_refs").write_text("5")                      # the peak starts anew
            begin = time.perf_counter()
            kind, message = load(experiment)
            seconds = time.perf_counter() - begin
            peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10  # type: ignore[index]
            pipe.send({"kind": kind, "message": message, "seconds": seconds, "peak": peak, "taken": bool(taken)})


def load(experiment: dict[str, Any]) -> tuple[str, str]:
    """Build the run as training does."""
    from nanopoe.train.build import build_run

    try:
        build_run(experiment_from_dict(experiment, "damaged"), ALONE).loader.close()
    except NanopoeError as error:
        return error.kind, str(error)
    except Exception as error:
        return "bug", f"{type(error).__name__}: {error}"
    return "loaded", ""


def fingerprint(folder: Path) -> str:
    """Of all that lies in a step folder: names, kinds, bytes."""
    h = hashlib.sha256()
    for path in [folder, *sorted(folder.iterdir())] if folder.is_dir() else [folder]:
        h.update(f"{path.name} {path.is_symlink()} {path.is_file()} {path.is_dir()}\n".encode())
        if path.is_file() and not str(path.resolve()).startswith("/dev"):
            h.update(path.read_bytes())
    return h.hexdigest()


@fault("F10", "a damaged checkpoint is refused before a weight is used: error 4 by name, <= 2 s, <= 2 x the memory",
       short=60, full=1000)
def corrupt(room: Room, trials: int) -> Report:
    """Mutants of a run by one rank and one by two, kinds in turn; every 100th is a bomb, every 50th goes through the
    command line."""
    report = Report()
    changes = {"schedule.cycles": [{**CYCLE, "steps": 3}], "evaluation.every": None, "evaluation.tokens": 128}
    runs = [room.whole(name, ranks, seed=seed, **changes)
            for name, ranks, seed in (("by1", 1, 7), ("by2", 2, 7), ("foreign1", 1, 8), ("foreign2", 2, 8))]
    reader = Reader(room.experiment("by1", **changes))
    clean = controls(room, report, reader, runs[:2], changes)
    worst = [0.0, 0.0]
    for i in range(trials):
        make = bomb if i % 100 == 50 else list(KINDS.values())[i // 2 % len(KINDS)]
        step = room.draw.choice([2, 3, 3])
        with copied(runs[i % 2], room.folder / "victim") as run:
            folder = folder_of(run, step)
            before = fingerprint(folder)
            damage = make(Victim(folder, folder_of(runs[i % 2], step - 1), folder_of(runs[2 + i % 2], step), room.draw))
            what = f"{make.__name__} {i} ({runs[i % 2].name} step {step}): {damage.what}"
            if not report.check(fingerprint(folder) != before, f"{what}: changed nothing"):
                continue
            report.trials += 1
            experiment = room.experiment("victim", **changes, **({} if step == 3 else {"resume": {"step": step}}))
            found = reader.load(experiment)
            if found["seconds"] > SECONDS:                         # others use the machine: the better of two
                found = min(found, reader.load(experiment), key=lambda f: f["seconds"])
            if make is bomb:
                reader.end()                                       # what it has taken must not count for the next one
                reader.begin()
            judge(report, {**found, "peak": found["peak"] / clean}, damage, what)
            report.check(list_steps(run) == [1, 2, 3], f"{what}: left the steps {list_steps(run)}")
            worst = [max(worst[0], found["seconds"]), max(worst[1], found["peak"] / clean)]
            if i % 50 == 25:
                command_line(room, report, experiment, what)
    reader.end()
    report.note = f"slowest {worst[0]:.2f} s, most memory {worst[1]:.2f} x"
    return report


def judge(report: Report, found: dict[str, Any], damage: Damage, what: str) -> None:
    """`peak` is relative to a clean load's."""
    message = found["message"]
    report.check(found["seconds"] <= SECONDS, f"{what}: took {found['seconds']:.1f} s")
    report.check(found["peak"] <= MEMORY, f"{what}: took {found['peak']:.1f} x the memory of a clean load")
    if not report.check(found["kind"] in damage.kinds, f"{what}: {found['kind']}: {message[:200]}"):
        return
    report.check("\n" not in message and len(message) < 1000, f"{what}: not one line: {message[:200]}")
    report.check(any(name in message for name in damage.files), f"{what}: names no file: {message}")
    small = "cannot hold" in message                    # then a file that is too small for its tensors is named instead
    report.check(damage.tensor in message or small, f"{what}: does not name {damage.tensor}: {message}")
    report.check(damage.late or not found["taken"], f"{what}: refused after memory was taken for the model: {message}")


def command_line(room: Room, report: Report, experiment: dict[str, Any], what: str) -> None:
    life = room.start(experiment)
    codes, lines = life.wait(), life.said().splitlines()
    life.console.unlink()
    errors = [line for line in lines if line.startswith("error[checkpoint]")]
    report.check(codes == [4] and len(errors) == 1 and "Traceback" not in "\n".join(lines),
                 f"{what}: scripts.train ended with {codes}: {lines}")


# -- control ---------------------------------------------------------------------------------------------------------

def controls(room: Room, report: Report, reader: Reader, runs: list[Path], changes: dict[str, Any]) -> int:
    """What is whole loads, as it is and with what does not matter; the peak of memory of a clean load, bytes."""
    peak = 0
    for run in runs:
        with copied(run, room.folder / "victim") as victim_run:
            folder, end = folder_of(victim_run, 3), digest(Checkpoint(folder_of(run, 3)))
            for harmless in (nothing, pinned, alone, other_order, other_spaces):
                harmless(folder)
                found = reader.load(room.experiment("victim", **changes))
                report.check(found["kind"] == "loaded" and found["taken"] and digest(Checkpoint(folder)) == end,
                             f"control: {harmless.__name__} in {run.name}: {found['kind']} {found['message']}")
                peak = max(peak, found["peak"]) if harmless is nothing else peak
    return peak


def nothing(folder: Path) -> None:
    """Unchanged."""


def pinned(folder: Path) -> None:
    (folder / "KEEP").touch()
    (folder / "notes.txt").write_text("the good one")
    os.utime(folder / MANIFEST, (0, 0))


def alone(folder: Path) -> None:
    """The other steps are gone."""
    for step in (1, 2):
        shutil.rmtree(folder_of(folder.parent.parent, step))


def other_order(folder: Path) -> None:
    """Parts in another order, versions of other programs."""
    victim = Victim(folder, folder, folder, None)                               # type: ignore[arg-type]
    manifest = victim.manifest()
    for entry in manifest["tensors"].values():
        entry["parts"].reverse()
    victim.reseal({**manifest, "torch": "9.9", "nanopoe": "9.9", "world_size": 5})


def other_spaces(folder: Path) -> None:
    """The same tensors under another header, as the library could have written it."""
    victim = Victim(folder, folder, folder, None)                               # type: ignore[arg-type]
    for name in victim.tensor_files:
        raw = (folder / name).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        text = json.dumps(dict(reversed(json.loads(raw[8:8 + length]).items())), indent=1).encode()
        victim.rewrite(name, len(text).to_bytes(8, "little") + text + raw[8 + length:], sealed=True)
