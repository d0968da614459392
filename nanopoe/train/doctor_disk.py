"""The doctor's look at the run folder: does every rank write into the same one, and has the disk room for the run?"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from nanopoe.checkpoint import list_steps
from nanopoe.checkpoint.commit import ROOM
from nanopoe.checkpoint.files import DurableFile, fsync_path, remove
from nanopoe.config import Experiment, make_plan
from nanopoe.config.counts import group_of, parameter_shapes, trained_shapes
from nanopoe.config.memory import FP32
from nanopoe.config.shares import Kind, state_elements
from nanopoe.errors import StorageError
from nanopoe.train.compute import size_text
from nanopoe.train.doctor_exam import Exam, Found, Trouble, told

PROBE_BYTES = 1 << 16
SEEN_S = 3.0                 # in which what one rank wrote must be seen by all: a network's file system may lag
SLOW_S = 1.0


# -- the folder -------------------------------------------------------------------------------------------------------

def check_folder(exam: Exam) -> Found:
    """Every rank sees what rank 0 wrote into the run folder, and can write, fsync and rename beside it.

    A folder that was not there before is gone afterwards, also when this fails.
    """
    world, folder = exam.world, Path(exam.experiment.out)
    probe = folder / f".doctor-{exam.ask_first(lambda: secrets.token_hex(4))}"
    made: list[Path] = []
    left: list[str] = []
    try:
        exam.ask_first(lambda: begin(probe, made))
        exam.ask(lambda: wait_for([probe / "rank_0"], folder))
        times = exam.ask(lambda: write_probe(probe, world.rank))
        exam.ask(lambda: wait_for([probe / f"rank_{rank}.done" for rank in range(world.size)], folder))
    finally:
        if world.is_main:
            left = remove(probe) if os.path.lexists(probe) else []
            remove_empty(made)
    left = exam.ask_first(lambda: left)
    slowest = max(times)
    text = f"{folder}: a file written, fsynced and renamed in {1e3 * min(times):.0f} ms"
    if world.size > 1:
        text += f" to {1e3 * slowest:.0f} ms (rank {times.index(slowest)}), seen by all {world.size} ranks"
    if left:
        return Found(text, left[0])
    return Found(text, "a slow disk: saves and logs will wait for it" if slowest > SLOW_S else "")


def begin(probe: Path, made: list[Path]) -> None:
    """Make the probe's folder and those above it, which `made` lists from the top, and rank 0's first file in it."""
    missing = [path for path in [probe, *probe.parents] if not os.path.lexists(path)]
    for path in reversed(missing):
        os.mkdir(path)
        if path != probe:
            made.append(path)
    with DurableFile(probe / "rank_0") as file:
        file.write(b"here")


def write_probe(probe: Path, rank: int) -> float:
    """Write a file, make it durable, rename it; seconds."""
    start, path = time.perf_counter(), probe / f"rank_{rank}.tmp"
    with DurableFile(path) as file:
        file.write(bytes(PROBE_BYTES))
    os.rename(path, probe / f"rank_{rank}.done")
    fsync_path(probe)
    return time.perf_counter() - start


def wait_for(paths: list[Path], folder: Path) -> None:
    """StorageError unless all of `paths` are seen from here within SEEN_S."""
    end = time.monotonic() + SEEN_S
    while missing := [path for path in paths if not path.exists()]:
        if time.monotonic() > end:
            ranks = [int(path.stem.removeprefix("rank_")) for path in missing]
            raise StorageError(f"what {told(ranks)} wrote is not seen from here", folder,
                               "run_dir must be one folder that all hosts share")
        time.sleep(0.05)


def remove_empty(made: list[Path]) -> None:
    for path in reversed(made):
        try:
            os.rmdir(path)
        except OSError:
            return                                               # somebody else uses it by now


# -- room -------------------------------------------------------------------------------------------------------------

def check_disk(exam: Exam) -> Found:
    """Free room for what will be kept, the save under way, and a specialist's kept states."""
    experiment, folder = exam.experiment, Path(exam.experiment.out)

    def look() -> tuple[int, list[int]]:
        there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
        return shutil.disk_usage(there).free, list_steps(folder)

    free, present = exam.ask_first(look)
    room = room_needed(experiment, present, exam.world.size, exam.world.device.type)
    text = (f"{size_text(free)} free, {size_text(room.needed)} needed: a checkpoint is {size_text(room.size)}, "
            f"{room.kept:,} are kept, {len(present)} of them there")
    if room.cache:
        text += f"; states of rows {size_text(room.cache)}"
    if room.needed <= free:
        return Found(text)
    first = free < ROOM * room.size                              # not even the next save would fit
    raise Trouble(text, "free some space, set checkpoint.keep_last (and no small keep_every), or use another run_dir",
                  StorageError if first else None, str(folder))


@dataclass(frozen=True)
class Room:
    """Bytes: `needed` from now on, of checkpoints of `size` each (one more while a save is under way, with the room
    that a save asks for) and of a `cache` of states; `kept` checkpoints are there in the end."""

    needed: int
    size: int
    kept: int
    cache: int


def room_needed(experiment: Experiment, present: list[int], world_size: int, device: str) -> Room:
    """Of a run that has the steps `present` and goes on from the newest, or from resume.step."""
    step = experiment.resume.step
    present = sorted(s for s in present if step is None or s <= step)
    size = checkpoint_bytes(experiment)
    new, kept = count_saves(experiment, present)
    if not new:
        return Room(0, size, kept, 0)
    more = max(1, kept + 1 - len(present))
    cache = cache_bytes(experiment, world_size, max(present, default=0), device)
    return Room(int(ROOM * size) + size * (more - 1) + cache, size, kept, cache)


def checkpoint_bytes(experiment: Experiment) -> int:
    """Tensors of one checkpoint: fp32 weights (a specialist's own and the chat tokens) and optimizer state."""
    model, trained = experiment.model, trained_shapes(experiment.model)
    saved = dict(trained) if model.specialists else parameter_shapes(model)
    if model.specialists:
        saved["chat_rows"] = parameter_shapes(model)["chat_rows"]
    kinds: dict[str, Kind] = {name: "muon" if group_of(name) == "matrices" else "adamw" for name in trained}
    state = sum(state_elements(kinds[name], shape) for name, shape in trained.items())
    return FP32 * (sum(map(math.prod, saved.values())) + state)


def count_saves(experiment: Experiment, present: list[int]) -> tuple[int, int]:
    """(checkpoints still to be saved, checkpoints there in the end), as `rotate` keeps them; `present` ascending."""
    total, config = sum(cycle.steps for cycle in experiment.schedule.cycles), experiment.checkpoint
    done, keep, every = max(present, default=0), config.keep_last, config.keep_every
    if done >= total:
        return 0, len(present)
    step = config.every or total
    regular = range((done // step + 1) * step, total, step)
    new = len(regular) + 1                                       # the last step is always saved
    if keep is None:
        return new, len(present) + new
    older = regular[:max(0, new - keep)]
    old = present[:max(0, len(present) - max(0, keep - new))]
    kept = min(keep, len(present) + new)
    if every is not None:
        kept += sum(step % every == 0 for step in old)
        if older:
            both = math.lcm(every, older.step)
            kept += older[-1] // both - (older[0] - 1) // both
    return new, kept


def cache_bytes(experiment: Experiment, world_size: int, step: int, device: str) -> int:
    """Of the kept states of rows that were not seen yet (specialist.cache_states)."""
    special, replay = experiment.specialist, experiment.data.replay_steps
    if special is None or not special.cache_states or replay is None:
        return 0
    plan, dtype = make_plan(experiment, world_size), experiment.runtime.compute_dtype
    size = 4 if dtype == "float32" or (dtype == "auto" and device == "cpu") else 2
    rows = max(0, min(replay, plan.total_steps) - step) * plan.rows_per_step
    return rows * (plan.sequence_len * experiment.model.n_embd * size + 4)
