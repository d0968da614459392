"""What an ingest reads: an origin is a list of units (a file, some small files, a shard of the hub) of rows.

An origin yields its rows in a fixed order, from any row on, so that a killed ingest goes on where it stopped and any
number of processes can share the units. A row that is no document is a `Bad`: the writer counts it or stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from nanopoe.errors import DataError

DOCUMENT_BYTES = 64 << 20        # a document longer than this is an accident
_ROLES = {"human": "User", "user": "User", "gpt": "Assistant", "assistant": "Assistant", "system": "System"}
_MAP = "name the text column with --column"


@dataclass(frozen=True, slots=True)
class Raw:
    """A document as found. Documents of one `group` never end up in different splits; None: each by its own text."""

    text: str
    where: str
    group: str | None = None


@dataclass(frozen=True, slots=True)
class Bad:
    """A row that is no document: `reason` is what it is counted under, `detail` what is special about this one."""

    reason: str
    where: str
    detail: str = ""
    do: str = "correct or remove it"

    def error(self, label: str, more: str = "") -> DataError:
        """As an error; `label` goes before the place, `more` behind the advice."""
        return DataError(self.reason + self.detail, label + self.where, self.do + more)


@dataclass(frozen=True, slots=True)
class Unit:
    """A share of an origin that is read in one go: its name, its bytes (None: unknown), and what it consists of."""

    name: str
    size: int | None
    items: tuple[str, ...]


class Origin(Protocol):
    """Can be sent to another process. `source` goes into the manifest; `label` before the place of a bad row."""

    @property
    def source(self) -> dict[str, Any]: ...
    @property
    def label(self) -> str: ...

    def units(self) -> list[Unit]:
        """In the order of reading. DataError if there is nothing."""
        ...

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        """Rows `start`, `start` + 1, ... of a unit, each with the bytes of the unit read by then.

        DataError if the unit itself cannot be read.
        """
        ...


@dataclass(frozen=True)
class Part:
    """Every `of`-th unit of an origin, from number `index` (1..of) on: what one machine of several ingests."""

    whole: Origin
    index: int
    of: int

    @property
    def source(self) -> dict[str, Any]:
        return {**self.whole.source, "part": self.index, "of": self.of}

    @property
    def label(self) -> str:
        return self.whole.label

    def units(self) -> list[Unit]:
        units = self.whole.units()
        if len(units) < self.of:
            raise DataError(f"{len(units)} files or shards cannot be shared by {self.of}",
                            self.whole.label.strip(" /"), f"use at most --part .../{len(units)}")
        return units[self.index - 1::self.of]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        return self.whole.read(unit, start)


@dataclass(frozen=True)
class Shape:
    """How a row becomes a document.

    The string in `column`; or the list of turns there, written as a transcript; or, with an `adapter` of
    nanopoe/data/adapters.py, the whole row as a conversation in canonical JSON.
    """

    column: str = "text"
    transcript: bool = False
    adapter: str | None = None

    @property
    def whole_rows(self) -> bool:
        return self.adapter is not None

    @property
    def told(self) -> dict[str, Any]:
        """What a manifest says of it."""
        if self.adapter is not None:
            return {"adapter": self.adapter}
        return {"column": self.column, **({"transcript": True} if self.transcript else {})}

    def document(self, value: Any, where: str) -> Raw | Bad:
        """`value` is the column's, or the whole row for an adapter."""
        if self.adapter is not None:
            return _conversation(self.adapter, value, where)
        if value is None:
            return Bad("null text", where)
        if self.transcript:
            value = transcript(value)
            if value is None:
                return Bad("not a list of turns", where, f" in column '{self.column}'")
        if not isinstance(value, str):
            return Bad("not a string", where, f": column '{self.column}' is {type(value).__name__}", _MAP)
        return Raw(value, where)

    def of_row(self, row: Any, where: str) -> Raw | Bad:
        """The document of a whole row, which must be a mapping."""
        if self.whole_rows and isinstance(row, dict):
            return self.document(row, where)
        if not isinstance(row, dict) or self.column not in row:
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            return Bad(f"no column '{self.column}'", where, f", there is: {keys[:200]}", _MAP)
        return self.document(row[self.column], where)


TEXT = Shape()


def transcript(turns: Any) -> str | None:
    """[{role, content}, ...] (or from and value) as paragraphs "User: ...", "Assistant: ..."; None if it is no such."""
    if not isinstance(turns, (list, tuple)) or not turns:
        return None
    paragraphs = []
    for turn in turns:
        if not isinstance(turn, dict):
            return None
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(text, str):
            return None
        paragraphs.append(f"{_ROLES.get(role.lower(), role.capitalize())}: {text.strip()}")
    return "\n\n".join(paragraphs)


def _conversation(adapter: str, row: dict[str, Any], where: str) -> Raw | Bad:
    from nanopoe.data.adapters import conversations_of
    from nanopoe.data.copies import copy_key

    try:
        found = list(conversations_of(adapter, [row]))
    except DataError as error:
        return Bad("no conversation", where, f" ({error.what})", error.do or "correct or remove it")
    return Raw(found[0].text, where, found[0].group or copy_key(found[0].text))
