"""The doctor: is all as a run needs it, on every rank? A table of rows; the cheap ones again when a training starts."""

from __future__ import annotations

import time
from dataclasses import dataclass

from nanopoe.config import Experiment
from nanopoe.dist import World
from nanopoe.errors import everywhere
from nanopoe.train.doctor_batch import check_batch, check_data, check_kernels, check_memory
from nanopoe.train.doctor_disk import check_disk, check_folder
from nanopoe.train.doctor_exam import Check, Exam, Row, examine
from nanopoe.train.doctor_ranks import check_clocks, check_reduce, check_same, check_world

CHECKS: tuple[Check, ...] = (
    ("world", (), check_world), ("same", (), check_same), ("clocks", (), check_clocks), ("folder", (), check_folder),
    ("disk", ("world",), check_disk), ("all-reduce", (), check_reduce), ("data", (), check_data),
    ("kernels", (), check_kernels), ("memory", ("world",), check_memory),
    ("dry batch", ("world", "same", "data", "kernels", "memory"), check_batch))
CHEAP = ("world", "same", "clocks", "folder", "disk", "all-reduce")


@dataclass(frozen=True)
class Started:
    """What the cheap checks say at a start where nothing forbids it: one line, and warnings for the user."""

    line: str
    warnings: list[str]


def diagnose(experiment: Experiment, world: World) -> list[Row]:
    """All checks, the same rows on all ranks. Collective; leaves nothing behind. It trains no step of the run: the dry
    batch is one of its own. A rank that runs out of memory among others ends all, with an error that says so."""
    return examine(Exam(experiment, world), CHECKS)


def preflight(experiment: Experiment, world: World) -> Started:
    """The cheap checks, before a training is built. Collective. Raises, on all ranks alike, the error of the first row
    in trouble that has one; other trouble is a warning, since the run may go well for long or be meant so."""
    start = time.perf_counter()
    rows = examine(Exam(experiment, world, at_start=True), [check for check in CHECKS if check[0] in CHEAP])
    for row in rows:
        if row.error is not None:
            raise everywhere(row.error)
    warnings = [f"{row.check}: {row.found}; {row.do}" for row in rows if row.state != "ok"]
    return Started(f"{len(rows)} checks, {time.perf_counter() - start:.2f} s", warnings)
