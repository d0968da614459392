"""A YAML file without surprises: what is read is what is written, and no file can hurt (STYLE 3, RELIABILITY 3.12).

We read the parser's events and never build a PyYAML object. Against its safe loader: `1e-3` is a float and not a
string, `no` and `on` stay strings, numbers are decimal only; duplicate keys, anchors, aliases, merge keys, tags,
infinite numbers and second documents are refused with their line; size, depth and number of nodes are bounded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_NODES = 20_000

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_WORDS: dict[str, Any] = {"": None, "~": None, "null": None, "Null": None, "NULL": None,
                          "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


class Refused(Exception):
    """The text cannot be read; `problems` has a line for everything found up to there."""

    def __init__(self, problems: list[str]):
        self.problems = problems
        super().__init__("; ".join(problems))


def parse(text: str) -> Any:
    """One YAML document -> dicts, lists and scalars. Raises Refused; an empty text is refused too."""
    return _Reader(text).document()


def scalar(text: str) -> Any:
    """The value of a plain (unquoted) scalar. Raises ValueError for numbers that are not finite or absurdly long."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        if len(text) > 100:
            raise ValueError("a number of over 100 digits")
        return int(text)
    if _FLOAT.fullmatch(text) or _NOT_FINITE.fullmatch(text):
        value = float(text) if _FLOAT.fullmatch(text) else math.nan
        if not math.isfinite(value):
            raise ValueError(f"{text[:20]} is not a finite number")
        return value
    return text


def _mark(error: yaml.YAMLError) -> str:
    """One line of a PyYAML error: where and what."""
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or getattr(error, "reason", None) or "cannot be read"
    where = f"line {mark.line + 1}: " if mark is not None else ""
    return f"{where}not valid YAML: {what}"


class _Reader:
    """Recursive descent over parser events; small problems are collected, large ones end the reading."""

    def __init__(self, text: str):
        self.events: Iterator[Any] = iter(yaml.parse(text, Loader=yaml.SafeLoader))
        self.problems: list[str] = []
        self.nodes = 0

    def document(self) -> Any:
        try:
            next(self.events)                                        # start of the stream
            if isinstance(next(self.events), yaml.StreamEndEvent):
                raise Refused(["empty: nothing to read"])
            value = self.node(next(self.events), depth=0)
            next(self.events)                                        # end of the document
            after = next(self.events)
            if not isinstance(after, yaml.StreamEndEvent):
                self.add(after, "a second document; one experiment per file")
        except yaml.YAMLError as error:
            self.problems.append(_mark(error))
        if self.problems:
            raise Refused(self.problems)
        return value

    def add(self, event: Any, what: str) -> None:
        self.problems.append(f"line {event.start_mark.line + 1}: {what}")

    def node(self, event: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            self.add(event, f"nested deeper than {MAX_DEPTH}" if depth > MAX_DEPTH else f"more than {MAX_NODES} values")
            raise Refused(self.problems)
        if isinstance(event, yaml.AliasEvent):
            self.add(event, f"alias *{str(event.anchor)[:40]}; aliases are refused, write the value out (or quote it)")
            return None
        if event.anchor is not None:
            self.add(event, f"anchor &{str(event.anchor)[:40]}; anchors are refused")
        if event.tag is not None:
            self.add(event, f"tag {event.tag[:40]!r}; tags are refused")
        if isinstance(event, yaml.ScalarEvent):
            return self.scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            return self.sequence(depth)
        return self.mapping(depth)

    def scalar(self, event: Any) -> Any:
        if event.style is not None:                                  # quoted or block text
            return event.value
        try:
            return scalar(event.value)
        except ValueError as error:
            self.add(event, str(error))
            return None

    def sequence(self, depth: int) -> list[Any]:
        items = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            items.append(self.node(event, depth + 1))
        return items

    def mapping(self, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        lines: dict[str, int] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key = self.node(event, depth + 1)
            value = self.node(next(self.events), depth + 1)
            if key == "<<" and event.style is None:
                self.add(event, "merge key '<<'; merge keys are refused")
            elif not isinstance(key, str):
                self.add(event, f"a key that is not a string: {str(key)[:40]!r}")
            elif key in found:
                self.add(event, f"duplicate key {key[:40]!r}, first on line {lines[key]}")
            else:
                found[key], lines[key] = value, event.start_mark.line + 1
        return found
