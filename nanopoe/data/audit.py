"""The audit: which documents every row was made of, and the proof that each was placed once.

RUN/audit/rank_N.jsonl holds, in the order of steps:
  {"begin": step, ..}              a life of the run: sizes, sources, and the state of the rank's lanes at its start
  {"begin": step, "again": true}   the same where a pass of data.replay_steps begins; the state is that which it leaves
  {"step": step, "rows": [[row in the global batch, [[source, epoch, ordinal, offset, taken, length], ..]], ..]}
  {"end": step, "lanes": ..}       the state of the lanes where the life ended in order
Lines after the checkpoint that a run goes on from are dropped, whatever number of ranks wrote them.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from nanopoe.data.audit_book import AuditResult, Book
from nanopoe.errors import DataError, StorageError

AUDIT = "audit"
AuditedRow = tuple[int, list[tuple]]
_HEAD = re.compile(rb'\{"(begin|step|end)": (\d+)[,}]')


class AuditWriter:
    """Appends what a rank reads to its file. StorageError if the disk refuses: an audit with a hole proves nothing.

    Nothing is touched before the first line: a run that fails to build leaves the audit as it was.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, header: dict[str, Any]):
        self._folder, self._rank, self._world_size, self._header = folder, rank, world_size, header
        self._fd: int | None = None
        self._last: dict[str, Any] | None = None

    def write(self, position: dict[str, Any], rows: list[AuditedRow]) -> None:
        """The rows of the step that leads to `position`."""
        before, replay_steps = position["step"] - 1, self._header["fingerprint"]["replay_steps"]
        if self._fd is None:
            self._open()
        elif self._last is not None and replay_steps is not None and before % replay_steps == 0:
            self._begin({"begin": before, "again": True, "lanes": self._last["lanes"]})
        self._append({"step": position["step"], "rows": rows})
        self._last = position

    def close(self) -> None:
        """Write down where it ended. May be called twice."""
        if self._fd is not None and self._last is not None:
            self._append({"end": self._last["step"], "lanes": self._last["lanes"]})
            os.close(self._fd)
        self._fd = self._last = None

    def _open(self) -> None:
        begin, own = self._header["begin"], _rank_file(self._folder, self._rank)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            drop_after(own, begin)
            if self._rank == 0:                              # ranks that are no more
                for path in _rank_files(self._folder).values():
                    if _number(path) >= self._world_size:
                        drop_after(path, begin)
            self._fd = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise _refused(error, own) from error
        self._begin({"begin": begin, "again": False})

    def _begin(self, head: dict[str, Any]) -> None:
        self._append({**head, "rank": self._rank, "world_size": self._world_size, **self._header, **head})

    def _append(self, record: dict[str, Any]) -> None:
        assert self._fd is not None, "closed"
        line = json.dumps(record, separators=(",", ": ")).encode() + b"\n"
        try:
            while line:
                line = line[os.write(self._fd, line):]
        except OSError as error:
            raise _refused(error, _rank_file(self._folder, self._rank)) from error


def drop_after(path: Path, step: int) -> None:
    """Cut off what was written after `step` updates, and a torn last line."""
    if not path.exists():
        return
    keep = 0
    with open(path, "rb") as file:
        for line in file:
            head = _HEAD.match(line)
            if head is None or not line.endswith(b"\n") or int(head[2]) > step - (head[1] == b"begin"):
                break
            keep += len(line)
    os.truncate(path, keep)


# -- the check ---------------------------------------------------------------------------------------------------------

def check_audit(run_dir: str | Path) -> AuditResult:
    """Read RUN/audit of all ranks and check every row, document and token of it; DataError if there is none.

    Every step must have each row of the global batch once. A document must be placed once: with bestfit_split and
    concat every token of it, in order. Wherever the state of the lanes is known (when a life began, and at an end in
    order), what was read, by the order of documents that seed and files give, must be placed or waiting: no gaps.
    With data.replay_steps that holds for each pass, and a step that replays another must have the same rows.
    """
    folder = Path(run_dir) / AUDIT
    files = _rank_files(folder)
    if not files:
        raise DataError("no audit", folder, "train with logging.audit=true")
    result = AuditResult(folder)
    lives = _lives(files, result)
    book: Book | None = None
    since = 0
    for i, life in enumerate(lives):
        until = lives[i + 1].begin if i + 1 < len(lives) else None
        if not life.complete(until is None, result):
            book = None
            continue
        header, state = life.headers[0], life.state()
        if book is None or not book.goes_on(header):
            if book is not None:
                result.notes.append(f"data or batch were changed after step {life.begin}: the account begins anew")
            book = Book(header, state, result)
        else:
            book.settle(state, life.begin)
            book.begin_pass(life.begin, state)
        last = _follow(life, until, book, result)
        if header["again"] and result.lives:
            result.lives.pop()                               # of the same ranks, from `since` on
        else:
            since = life.begin
        result.lives.append(f"steps {since + 1} to {last} on {life.world_size} rank{'s' * (life.world_size > 1)}")
        if until is None:
            _end(life, last, book, result)
    if book is not None:
        result.waiting = len(book.due)
    return result


@dataclass
class Life:
    """From a start of the run to its end. `parts` by rank: (file, offset of the first line after the header)."""

    begin: int
    headers: dict[int, dict[str, Any]] = field(default_factory=dict)
    parts: dict[int, tuple[Path, int]] = field(default_factory=dict)

    @property
    def world_size(self) -> int:
        return next(iter(self.headers.values()))["world_size"]

    def complete(self, is_last: bool, result: AuditResult) -> bool:
        missing = sorted(set(range(self.world_size)) - set(self.headers))
        if missing and is_last and next(iter(self.headers.values()))["again"]:
            result.notes.append(f"the pass from step {self.begin} is not there of {_ranks(missing)}: not counted")
        elif missing:                                        # else killed, when some ranks had begun it, some not
            result.problem(f"life from step {self.begin}: no lines of {_ranks(missing)}")
        return not missing

    def state(self) -> dict[str, Any]:
        """The state of all lanes at its start, by number."""
        return {number: lane for header in self.headers.values() for number, lane in header["lanes"].items()}


def _lives(files: dict[int, Path], result: AuditResult) -> list[Life]:
    lives: dict[int, Life] = {}
    for rank, path in files.items():
        for record, end in _records(path, 0, heads_only=True, result=result):
            if "begin" in record:
                life = lives.setdefault(record["begin"], Life(record["begin"]))
                life.headers[rank], life.parts[rank] = record, (path, end)
    return [lives[begin] for begin in sorted(lives)]


def _records(path: Path, offset: int, heads_only: bool, result: AuditResult) -> Iterator[tuple[dict[str, Any], int]]:
    """(record, offset of the next line) from `offset` on; with `heads_only` only those of lives are parsed."""
    with open(path, "rb") as file:
        file.seek(offset)
        for number in count(1):
            line = file.readline()
            if not line:
                return
            head = _HEAD.match(line)
            if head is None or not line.endswith(b"\n"):
                if heads_only:
                    result.problem(f"{path.name} line {number}: not a line of an audit")
                return
            if heads_only and head[1] != b"begin":
                continue
            try:
                yield json.loads(line), file.tell()
            except ValueError:
                result.problem(f"{path.name}: the line of {head[1].decode()} {int(head[2])} is damaged")
                return


def _follow(life: Life, until: int | None, book: Book, result: AuditResult) -> int:
    """Check the steps of a life, up to the step `until` where the next one began; returns the last step."""
    streams = [_records(path, offset, heads_only=False, result=result)
               for _, (path, offset) in sorted(life.parts.items())]
    heads = [_next_step(stream) for stream in streams]
    for step in count(life.begin + 1):
        if until is not None and step > until:
            return until
        lacking = [rank for rank, head in enumerate(heads) if head.get("step") != step]
        goes_on = until is not None or any(head.get("step", 0) > step for head in heads)
        if lacking and not goes_on:
            if len(lacking) < len(heads):                    # killed: some ranks had written it, some not
                result.notes.append(f"step {step} is not there of {_ranks(lacking)}: not counted")
            return step - 1
        if lacking:
            result.problem(f"step {step} is not there of {_ranks(lacking)}")
        found = [head["rows"] for rank, head in enumerate(heads) if rank not in lacking]
        rows = sorted((row for part in found for row in part), key=lambda row: row[0])
        _check_rows(step, [j for j, _ in rows], book.rows_per_step, result)
        book.enter(step, rows)
        heads = [head if rank in lacking else _next_step(streams[rank]) for rank, head in enumerate(heads)]
        result.steps += 1
    raise AssertionError


def _next_step(stream: Iterator[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """The next line of rows; empty at the end of a life."""
    record = next(stream, ({}, 0))[0]
    return record if "step" in record else {}


def _check_rows(step: int, numbers: list[int], B: int, result: AuditResult) -> None:
    seen = Counter(numbers)
    for what, those in (("missing", set(range(B)) - seen.keys()), ("foreign", seen.keys() - set(range(B))),
                        ("there twice", {j for j, n in seen.items() if n > 1})):
        if those:
            result.problem(f"step {step}: rows {_some(those)} are {what}")


def _end(life: Life, last: int, book: Book, result: AuditResult) -> None:
    """Settle the account at the end of the last life, if it ended in order."""
    lanes: dict[str, Any] = {}
    for path, offset in life.parts.values():
        for record, _ in _records(path, offset, heads_only=False, result=result):
            if record.get("end") == last:
                lanes.update(record["lanes"])
    if lanes.keys() == life.state().keys():
        book.settle(lanes, last)
    else:
        result.notes.append(f"the run did not end in order: gaps after step {life.begin} are not looked for")


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank}.jsonl"


def _rank_files(folder: Path) -> dict[int, Path]:
    return {_number(path): path for path in sorted(folder.glob("rank_*.jsonl")) if path.stem[5:].isdigit()}


def _number(path: Path) -> int:
    return int(path.stem[5:])


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {_some(ranks)}"


def _some(numbers: Iterable[int]) -> str:
    found = sorted(numbers)
    return ", ".join(map(str, found[:8])) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _refused(error: OSError, path: Path) -> StorageError:
    return StorageError(f"cannot be written ({error.strerror or error})", path,
                        "free space, or train without logging.audit")
