"""How the doctor examines: a check is asked of all ranks together and judged from what all of them said, so every rank
has the same rows. What a rank raises while it looks is a row in trouble that names the rank, and all go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch

from nanopoe import dist
from nanopoe.config import Experiment
from nanopoe.dist import World
from nanopoe.errors import NanopoeError, PeerError, everywhere

State = Literal["ok", "warning", "trouble"]
Value = TypeVar("Value")


@dataclass(frozen=True)
class Row:
    """What a check found and what to do about it, the same on all ranks. `error` is what keeps a training from
    starting; trouble without one is a warning there."""

    check: str
    state: State
    found: str
    do: str = ""
    seconds: float = 0.0
    error: NanopoeError | None = field(default=None, compare=False)

    def as_dict(self) -> dict[str, Any]:
        return {key: getattr(self, key) for key in ("check", "state", "found", "do", "seconds")}


@dataclass(frozen=True)
class Found:
    """What a check says of a healthy or nearly healthy machine."""

    found: str
    warning: str = ""                # what to do about it; empty: all is well


@dataclass(frozen=True)
class Exam:
    """What is examined, on this rank among all."""

    experiment: Experiment
    world: World
    at_start: bool = False           # of a training: what it finds out anyway is left out
    notes: dict[str, Any] = field(default_factory=dict)          # of this rank, for later checks

    def ask(self, look: Callable[[], Value]) -> list[Any]:
        """look() of every rank, in rank order, as JSON has it. Collective; `look` must hold no collective.

        What any rank raises is raised on all, naming the rank.
        """
        with dist.agree(self.world.device):
            value = look()
        return dist.gather_json(value, self.world.device)

    def ask_first(self, look: Callable[[], Value]) -> Any:
        """look() of rank 0, on every rank."""
        return self.ask(lambda: look() if self.world.is_main else None)[0]


class Trouble(Exception):
    """What a judge found wrong, on all ranks alike. `error` as of Row."""

    def __init__(self, found: str, do: str, error: type[NanopoeError] | None = None, where: str | None = None):
        super().__init__(found)
        self.found, self.do = found, do
        self.error = None if error is None else everywhere(error(found, where, do))


Check = tuple[str, tuple[str, ...], Callable[[Exam], Found]]          # its name, those it needs, the check


def examine(exam: Exam, checks: Sequence[Check]) -> list[Row]:
    """A row for each check, in order; one whose needs are in trouble is not made. Collective.

    Raises only what the ranks cannot agree on any more: PeerError, or what a rank alone ran into between collectives.
    """
    rows: dict[str, Row] = {}
    for name, needs, check in checks:
        missing = [other for other in needs if other in rows and rows[other].state == "trouble"]
        if missing:
            rows[name] = Row(name, "warning", f"not looked at, since {missing[0]} is in trouble", f"see {missing[0]}")
            continue
        start = time.perf_counter()
        row = one(exam, name, check)
        rows[name] = Row(name, row.state, row.found, row.do, round(time.perf_counter() - start, 3), row.error)
    return list(rows.values())


def one(exam: Exam, name: str, check: Callable[[Exam], Found]) -> Row:
    try:
        found = check(exam)
    except Trouble as trouble:
        return Row(name, "trouble", trouble.found, trouble.do, error=trouble.error)
    except NanopoeError as error:
        if isinstance(error, PeerError) or (exam.world.size > 1 and not error.everywhere):
            raise
        what = "; ".join([error.what, *getattr(error, "problems", [])])
        return Row(name, "trouble", f"{error.where}: {what}" if error.where else what, error.do or "", error=error)
    except Exception as error:
        if exam.world.size > 1:
            raise
        return Row(name, "trouble", f"{type(error).__name__}: {error}", "a bug of nanopoe: please report it")
    return Row(name, "warning" if found.warning else "ok", found.found, found.warning)


def clock(world: World) -> float:
    """Seconds, after the device has done all it was given."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return time.perf_counter()


def told(ranks: Sequence[int]) -> str:
    """The ranks in words."""
    more = f" and {len(ranks) - 8} more" if len(ranks) > 8 else ""
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{more}"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"
