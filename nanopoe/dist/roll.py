"""The roll: from what the ranks last said of themselves, who is lost. No thread, store or clock of its own.

The rules, in this order; `timeout_s` is runtime.timeout_s:
- Lost is a rank that left with an error, or whose process is gone from this machine.
- Lost is a rank that no longer beats: after min(timeout_s, 30 s); or that came but never did: after 30 s. On this
  machine a process that lives and is not stopped is never lost for that alone: it may hold Python's lock for long, or
  wait to be swapped in.
- Hung is a rank that made no progress for timeout_s while another waited as long for it: the one that entered the
  fewest collectives and does not wait in one. A mark (a batch, a micro-batch, a phase), a collective entered and the
  end of a wait are progress.
- In the phases "build" (which includes the first step, where things are compiled) and "save" both limits are
  max(timeout_s, 600 s).
- When all ranks wait and none moves for that long, no rank is to blame; the ranks end all the same. But one of them
  that no longer beats may have gone on since, and is lost after max(timeout_s, 30 s).
Time in which the judge itself stood still (a stopped process, a suspended machine) counts for nobody: its clock goes on
by at most 1.5 s between two looks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, Self

BEAT_S = 0.5
NOTICE_S = 3 * BEAT_S            # silence that means something, and the time others have to speak first
SILENT_S = 30.0
LONG_S = 600.0
LONG_PHASES = ("build", "save")

State = Literal["alive", "stopped", "gone"]


@dataclass(frozen=True)
class Record:
    """What a rank says of itself with every beat. `moves` counts its progress. `left` is null while it is here, else
    its last words (empty: it left in order), and `blames` the ranks that it left for. `parts` and `part_seconds` are
    the steps it measured and what they took it (pace.py)."""

    beat: int
    step: int
    phase: str
    moves: int
    entered: int
    waiting: bool
    host: str
    machine: str
    pid: int
    born: str
    left: str | None = None
    blames: tuple[int, ...] = ()
    parts: int = 0
    part_seconds: float = 0.0

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> Self:
        value = json.loads(text)
        return cls(**{**value, "blames": tuple(value["blames"])})


@dataclass(frozen=True)
class Verdict:
    """Which ranks are lost, in words too. `cut_off`: none is known, since the store is gone that all speak by."""

    ranks: tuple[int, ...]
    what: str
    cut_off: bool = False


@dataclass
class Peer:
    """A rank as seen from here; times are of the roll's clock."""

    record: Record | None = None
    state: State | None = None       # null: on another machine, or the system does not tell
    heard: float = 0.0               # its last new beat
    moved: float = 0.0               # its last progress
    missed: float | None = None      # since when it is known to be lost


class Roll:
    """`look` tells the state of a record's process (`process_state`)."""

    def __init__(self, size: int, timeout_s: float, look: Callable[[Record], State | None]):
        self.peers, self.timeout_s, self._look = [Peer() for _ in range(size)], timeout_s, look
        self.clock = 0.0

    def hear(self, records: Mapping[int, Record], seconds: float) -> None:
        """What the ranks say now, `seconds` after the last time."""
        self.clock += min(seconds, NOTICE_S)
        for rank, record in records.items():
            peer, before = self.peers[rank], self.peers[rank].record
            if before is None or record.beat != before.beat:
                peer.heard = self.clock
            if before is None or record.moves != before.moves:
                peer.moved = self.clock
            peer.record, peer.state = record, self._look(record)
            lost = bool(record.left) or (record.left is None and peer.state == "gone")
            peer.missed = None if not lost else self.clock if peer.missed is None else peer.missed

    def judge(self) -> Verdict | None:
        """Who is lost by the rules above; null when nobody is."""
        return (self.gone(NOTICE_S) or self._silent(lambda p: self._patience(p, min(self.timeout_s, SILENT_S)))
                or self._stuck())

    def explain(self) -> Verdict | None:
        """Who may be the reason of a collective that has failed: here three missed beats are enough."""
        return self.gone() or self._silent(lambda _: NOTICE_S) or self._stuck() or self._gone_home()

    def stopped(self, ranks: tuple[int, ...]) -> list[int]:
        """Process ids of those of `ranks` that are stopped on this machine."""
        records = [p.record for r, p in enumerate(self.peers) if r in ranks and p.record is not None]
        return [record.pid for record in records if self._look(record) == "stopped"]

    def gone(self, notice_s: float = 0.0, until: float = float("inf")) -> Verdict | None:
        """Who left with an error, or whose process is gone from this machine, and has been for `notice_s`; since
        `until` at the latest, of the roll's clock."""
        lost = [r for r, p in enumerate(self.peers)
                if p.missed is not None and self.clock - p.missed >= notice_s and p.missed <= until]
        first = [r for r in lost if not self._record(r).blames]
        if first:
            return self.verdict(first, lambda record: "left" if record.left else "is gone")
        for rank in lost:                          # it left since it found another one lost: its words are repeated
            return Verdict(self._record(rank).blames, self._record(rank).left or "")
        return None

    # -- the other rules ---------------------------------------------------------------------------------------

    def _silent(self, limit: Callable[[Peer], float]) -> Verdict | None:
        silent = [r for r, p in enumerate(self.peers)
                  if p.state != "alive" and self._is_here(p) and self.clock - p.heard >= limit(p)]
        return self.verdict(silent, lambda record: self._stands(record, "no longer beats"))

    def _stuck(self) -> Verdict | None:
        here = {r: p for r, p in enumerate(self.peers) if p.record is not None and self._is_here(p)}
        still = {r: self.clock - p.moved for r, p in here.items()}
        idle = [r for r, p in here.items() if not self._record(r).waiting
                and still[r] >= self._patience(p, self.timeout_s)]
        if idle:
            fewest = min(self._record(r).entered for r in idle)
            waited_for = any(still[r] >= self.timeout_s and (self._record(r).waiting
                                                             or self._record(r).entered > fewest) for r in here)
            hung = [r for r in idle if self._record(r).entered == fewest] if waited_for else []
            return self.verdict(hung, lambda record: self._stands(record, "hangs"))
        if here and all(self._record(r).waiting and still[r] >= self._patience(p, self.timeout_s)
                        for r, p in here.items()):
            mute = {r: self.clock - p.heard for r, p in here.items() if self.clock - p.heard >= NOTICE_S}
            if mute:                                    # what it last said may be long over
                late = [r for r, seconds in mute.items() if seconds >= max(self.timeout_s, SILENT_S)]
                return self.verdict(late, lambda record: "no longer beats")
            some = self._record(min(here))
            return Verdict((), f"all ranks wait for each other since step {some.step} ({some.phase})")
        return None

    def _gone_home(self) -> Verdict | None:
        return self.verdict([r for r, p in enumerate(self.peers) if p.record is not None and p.record.left == ""],
                             lambda record: "left in order, before the others")

    # -- words -------------------------------------------------------------------------------------------------

    def _patience(self, peer: Peer, limit: float) -> float:
        """How long this rank may be silent or still where others may for `limit`."""
        if peer.record is None:                            # it came to the rendezvous, and there beats begin
            return SILENT_S
        long = peer.record.phase in LONG_PHASES and peer.state != "stopped"
        return max(self.timeout_s, LONG_S) if long else limit

    def _stands(self, record: Record, otherwise: str) -> str:
        return "is stopped (State: T)" if self._look(record) == "stopped" else otherwise

    @staticmethod
    def _is_here(peer: Peer) -> bool:
        return peer.missed is None and (peer.record is None or peer.record.left is None)

    def _record(self, rank: int) -> Record:
        record = self.peers[rank].record
        assert record is not None
        return record

    def verdict(self, ranks: list[int], what: Callable[[Record], str]) -> Verdict | None:
        """`what` became of each rank, in words: "rank 1 is gone, last seen in step 12 (save, pid 17 on node2)"."""
        words = []
        for rank in ranks:
            record = self.peers[rank].record
            if record is None:
                words.append(f"rank {rank} was never heard of")
                continue
            why = f": {record.left}" if record.left else ""
            words.append(f"rank {rank} {what(record)}, last seen in step {record.step} ({record.phase}, pid "
                         f"{record.pid} on {record.host}){why}")
        return Verdict(tuple(ranks), " and ".join(words)) if ranks else None


# -- processes of this machine ----------------------------------------------------------------------------------------

def machine() -> str:
    """What is equal for two processes only if they see each other in /proc; empty where there is no telling."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def process(pid: int) -> tuple[str, str] | None:
    """(state letter, start time in ticks) of a process, null if there is none."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return None


def process_state(record: Record, here: str) -> State | None:
    """Of the record's process if it is on the machine `here`: "alive", "stopped" or "gone"; else null."""
    if not here or record.machine != here:
        return None
    found = process(record.pid)
    if found is None or found[1] != record.born or found[0] in "ZX":
        return "gone"
    return "stopped" if found[0] in "Tt" else "alive"
