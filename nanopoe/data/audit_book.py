"""The account of an audit: every row entered, every document followed until it is placed or known to wait."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nanopoe.data.order import Part, StreamOrder, training_order
from nanopoe.data.packing import PACKINGS

MOST_PROBLEMS = 100             # lines of a report
Ref = tuple[str, int, int]      # source, epoch, ordinal


@dataclass
class AuditResult:
    """What an audit proves. `problems`: repeats, gaps, overlaps, missing rows, a line each; `notes`: what it cannot."""

    folder: Path
    lives: list[str] = field(default_factory=list)
    steps: int = 0
    rows: int = 0
    documents: int = 0
    placed: int = 0
    cropped: int = 0
    cropped_documents: int = 0
    waiting: int = 0
    replayed: int = 0               # steps whose rows are those of an earlier step, as data.replay_steps wants it
    epochs: dict[str, Counter[int]] = field(default_factory=dict)       # source -> documents placed by epoch
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unlisted: int = 0

    @property
    def ok(self) -> bool:
        return not self.problems

    def problem(self, line: str) -> None:
        if len(self.problems) < MOST_PROBLEMS:
            self.problems.append(line)
        else:
            self.unlisted += 1

    def report(self) -> str:
        """Lines for people."""
        lines = [f"{self.folder}: {self.steps:,} steps, {self.rows:,} rows, {self.documents:,} documents, "
                 f"{self.placed:,} tokens placed", *(f"  {life}" for life in self.lives)]
        lines += [f"  source '{source}': " + ", ".join(f"epoch {e} {n:,}" for e, n in sorted(by_epoch.items()))
                  for source, by_epoch in sorted(self.epochs.items())]
        if self.replayed:
            lines.append(f"  {self.replayed:,} of these steps replay the rows of earlier ones, as data.replay_steps "
                         "asks: each pass over them is counted")
        lines.append(f"  cropped: {self.cropped:,} tokens of {self.cropped_documents:,} documents; "
                     f"still in buffers: {self.waiting:,} documents")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"problem: {problem}" for problem in self.problems]
        if self.unlisted:
            lines.append(f"problem: and {self.unlisted:,} more")
        lines.append("every document read was placed once or waits" if self.ok else "the audit fails")
        return "\n".join(lines)


class Book:
    """The account of documents since the data were last changed on purpose; with replay_steps of one pass at a time."""

    def __init__(self, header: dict[str, Any], lanes: dict[str, Any], result: AuditResult):
        self.result, self.fingerprint = result, header["fingerprint"]
        self.replay_steps = self.fingerprint["replay_steps"]
        self.seen: dict[int, bytes] = {}                     # by step within a pass: a hash of its rows
        self.rows_per_step, self.n_lanes = header["rows_per_step"], header["fingerprint"]["lanes"]
        self.row_len = header["fingerprint"]["sequence_len"] + 1
        self.packing = header["fingerprint"]["packing"]
        self.orders = _orders(header)
        self._open(lanes if not self._at_edge(header["begin"]) else _beginning(lanes))

    def _at_edge(self, step: int) -> bool:
        return self.replay_steps is not None and step % self.replay_steps == 0

    def _open(self, lanes: dict[str, Any]) -> None:
        """An empty account, the lanes in these states."""
        self.placed: dict[Ref, tuple[int, int]] = {}         # tokens placed of a document, of how many
        self.lane_of: dict[Ref, int] = {}
        self.read: set[Ref] = set()                          # as of the last known state of the lanes
        self.due: set[Ref] = set()                           # of these, what was then not placed to its end
        self.cursors: dict[tuple[str, str], list[int]] = {}
        for number, lane in lanes.items():
            waiting = _waiting(lane)
            self.read |= waiting.keys()
            for ref, offset in waiting.items():
                self.lane_of[ref] = int(number)
                if offset:
                    self.placed[ref] = (offset, -1)
            self.cursors.update({(number, stream): cursor for stream, cursor in lane["cursors"].items()})
        self.due |= self.read

    def goes_on(self, header: dict[str, Any]) -> bool:
        return header["fingerprint"] == self.fingerprint and header["rows_per_step"] == self.rows_per_step

    def begin_pass(self, begin: int, lanes: dict[str, Any]) -> None:
        """Where a pass begins, after it was settled with what the one before has left: a new account."""
        if self._at_edge(begin):
            self._open(_beginning(lanes))

    def enter(self, step: int, rows: list[list]) -> None:
        """Enter step `step` (1 is the first): its rows [number, pieces], in order."""
        if self.replay_steps is not None:
            at, digest = (step - 1) % self.replay_steps, hashlib.blake2b(json.dumps(rows).encode()).digest()
            if at not in self.seen:
                self.seen[at] = digest
            elif self.seen[at] == digest:
                self.result.replayed += 1
            else:
                self.result.problem(f"step {step}: its rows are not those of the step it replays, {at + 1} of a pass")
        for j, pieces in rows:
            self._row(step, j, pieces)

    def _row(self, step: int, j: int, pieces: Iterable[list]) -> None:
        at = step - 1 if self.replay_steps is None else (step - 1) % self.replay_steps
        where, lane, total = f"step {step} row {j}", (at * self.rows_per_step + j) % self.n_lanes, 0
        for i, (source, epoch, ordinal, offset, taken, length) in enumerate(pieces):
            ref = (source, epoch, ordinal)
            total += taken + (i == 0 and offset > 0 and self.packing == "bestfit_split")
            self._piece(where, ref, offset, taken, length)
            if self.lane_of.setdefault(ref, lane) != lane:
                self.result.problem(f"{where}: {_name(ref)} is in lane {lane}, it began in lane {self.lane_of[ref]}")
        if total != self.row_len and not (self.packing == "bestfit_pad" and 0 < total < self.row_len):
            self.result.problem(f"{where}: its pieces make {total} tokens, not {self.row_len}")
        self.result.rows += 1

    def _piece(self, where: str, ref: Ref, offset: int, taken: int, length: int) -> None:
        result, end = self.result, offset + taken
        before = self.placed.get(ref, (0, length))[0]
        if offset < before:
            result.problem(f"{where}: {_name(ref)} repeats tokens {offset} to {min(end, before) - 1}")
        elif offset > before:
            result.problem(f"{where}: {_name(ref)} skips tokens {before} to {offset - 1}")
        if taken <= 0 or end > length:
            result.problem(f"{where}: {_name(ref)} has {length} tokens, not {offset} to {end - 1}")
        if before == 0:
            result.documents += 1
            result.epochs.setdefault(ref[0], Counter())[ref[1]] += 1
        result.placed += taken
        if end < length and not PACKINGS[self.packing].keeps_rest:
            result.cropped += length - end
            result.cropped_documents += 1
            end = length
        self.placed[ref] = (max(before, end), length)

    def settle(self, lanes: dict[str, Any], step: int) -> None:
        """Compare with the known state of the lanes after `step`: all that was read is placed, or waits."""
        problem = self.result.problem
        for number, lane in lanes.items():
            for stream, cursor in lane["cursors"].items():
                for ref in self._read(number, stream, cursor):
                    if ref in self.read:
                        problem(f"step {step}: {_name(ref)} was read twice")
                    self.read.add(ref)
                    self.due.add(ref)
                    if self.lane_of.setdefault(ref, int(number)) != int(number):
                        problem(f"step {step}: {_name(ref)} is of lane {number}, not {self.lane_of[ref]}")
        waiting = {ref: offset for lane in lanes.values() for ref, offset in _waiting(lane).items()}
        for ref, offset in waiting.items():
            placed = self.placed.get(ref, (0, -1))[0]
            if ref not in self.read:
                problem(f"step {step}: {_name(ref)} waits and was not read")
            elif placed != offset:
                problem(f"step {step}: {_name(ref)} waits with {offset} tokens placed, not with {placed}")
        for ref in sorted(self.due - waiting.keys()):
            placed, length = self.placed.get(ref, (0, -1))
            if placed == 0:
                problem(f"step {step}: {_name(ref)} was read and never placed")
            elif placed != length:
                problem(f"step {step}: {_name(ref)} was placed up to token {placed} of {length} only")
        for ref in sorted(self.placed.keys() - self.read):
            problem(f"step {step}: {_name(ref)} was placed and not read")
        self.due &= waiting.keys()

    def _read(self, number: str, stream: str, cursor: list[int]) -> Iterator[Ref]:
        """The documents that a lane has read since the state before."""
        order, (epoch, index) = self.orders[stream], self.cursors[number, stream]
        self.cursors[number, stream] = cursor
        while [epoch, index] != list(cursor):
            if int(number) + index * self.n_lanes >= len(order):
                epoch, index = epoch + 1, 0
            if epoch > cursor[0]:
                self.result.problem(f"lane {number}: the cursor of {stream} went back")
                return
            yield order.find(epoch, int(number) + index * self.n_lanes)
            index += 1


def _beginning(lanes: dict[str, Any]) -> dict[str, Any]:
    """The lanes before they have read anything."""
    return {number: {"cursors": {name: [0, 0] for name in lane["cursors"]}, "rest": None, "buffer": []}
            for number, lane in lanes.items()}


def _waiting(lane: dict[str, Any]) -> dict[Ref, int]:
    """Documents in the buffer of a lane -> tokens of them that are placed."""
    waiting: dict[Ref, int] = {tuple(ref): 0 for ref in lane["buffer"]}
    if lane["rest"] is not None:
        *ref, placed = lane["rest"]
        waiting[tuple(ref)] = placed
    return waiting


def _orders(header: dict[str, Any]) -> dict[str, StreamOrder]:
    parts: dict[str, list[Part]] = {}
    for name, source in header["sources"].items():
        parts.setdefault(source["stream"], []).append(Part(name, header["groups"][name], source["repeat"]))
    return {stream: training_order(header["fingerprint"]["seed"], stream, those) for stream, those in parts.items()}


def _name(ref: Ref) -> str:
    return f"source '{ref[0]}' epoch {ref[1]} document {ref[2]}"
