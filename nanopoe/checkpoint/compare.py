"""When two checkpoints are equal, and where they are not, whatever their files and world sizes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nanopoe.checkpoint.container import raw_chunks
from nanopoe.checkpoint.format import Entry
from nanopoe.checkpoint.store import Checkpoint, row_ranges
from nanopoe.config import dump_experiment
from nanopoe.config.load import NOT_LEARNED

INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def digest(checkpoint: Checkpoint) -> str:
    """SHA-256 in hex of all tensors (name, dtype, global shape, bytes) and the train state, verified while read.

    Equal if and only if two checkpoints are logically equal: the cut into files and ranks does not enter, nor do the
    config and the versions. Reads rows of up to 64 MiB at a time.
    """
    h = hashlib.sha256()
    for name, entry in sorted(checkpoint.manifest.tensors.items()):
        h.update(json.dumps([name, entry.dtype, entry.shape]).encode() + b"\n")
        for piece in pieces(checkpoint, entry):
            for chunk in raw_chunks(piece):
                h.update(chunk)
    h.update(json.dumps(checkpoint.state, sort_keys=True, separators=(",", ":")).encode())
    return h.hexdigest()


def pieces(checkpoint: Checkpoint, entry: Entry) -> Iterator[Tensor]:
    for low, high in row_ranges(entry.rows, entry.rows * entry.row_bytes):
        yield checkpoint.read(entry.name, low, high)


@dataclass(frozen=True)
class Difference:
    """A config key, a field of the state or a tensor that two checkpoints have differently."""

    kind: str                        # "config" | "fingerprint" | "state" | "tensor"
    name: str
    a: str
    b: str
    max_abs: float | None = None     # of tensors of one shape and dtype
    elements: int | None = None      # how many of them differ
    of: int | None = None


@dataclass
class Comparison:
    """`differences` are what makes two checkpoints unequal; `notes` may differ (run_dir, cadence, what we see)."""

    differences: list[Difference] = field(default_factory=list)
    notes: list[Difference] = field(default_factory=list)


def compare(a: Checkpoint, b: Checkpoint) -> Comparison:
    """Everything but world size, layout and versions. Config keys that change no weights are only notes."""
    result = Comparison()
    configs = [dump_experiment(c.experiment) for c in (a, b)]
    for found in changed("config", *configs):
        free = found.name.split(".")[0] in NOT_LEARNED
        (result.notes if free else result.differences).append(found)
    prints = [{k: v for k, v in c.manifest.fingerprints.items() if k != "config"} for c in (a, b)]
    result.differences += changed("fingerprint", *prints)
    result.differences += changed("state", a.state, b.state)
    mine, yours = a.manifest.tensors, b.manifest.tensors
    for name in sorted(mine.keys() | yours.keys()):
        one, other = mine.get(name), yours.get(name)
        if one is None or other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
            result.differences.append(Difference("tensor", name, form(one), form(other)))
        elif found_ := compare_values(a, b, one, other):
            result.differences.append(found_)
    return result


def compare_values(a: Checkpoint, b: Checkpoint, one: Entry, other: Entry) -> Difference | None:
    """Bit by bit, so a NaN equals itself and -0.0 is not 0.0; the largest difference as numbers."""
    elements, largest, total = 0, 0.0, 0
    for x, y in zip(pieces(a, one), pieces(b, other), strict=True):
        bits = INTS[x.element_size()]
        differ = x.reshape(-1).view(bits) != y.reshape(-1).view(bits)
        total += x.numel()
        elements += int(differ.sum())
        if differ.any():
            gap = float((x.reshape(-1)[differ].double() - y.reshape(-1)[differ].double()).abs().max())
            largest = gap if gap != gap or gap > largest else largest          # a NaN stays
    return Difference("tensor", one.name, form(one), form(other), largest, elements, total) if elements else None


def changed(kind: str, a: Any, b: Any) -> list[Difference]:
    """The plain values in nested dicts and lists that differ, by dotted path."""
    mine, yours = dict(leaves(a)), dict(leaves(b))
    return [Difference(kind, path, short(mine, path), short(yours, path)) for path in dict.fromkeys([*mine, *yours])
            if path not in mine or path not in yours or mine[path] != yours[path]]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict | list) or not value:
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def short(values: dict[str, Any], path: str) -> str:
    if path not in values:
        return "absent"
    text = json.dumps(values[path])
    return text if len(text) <= 60 else text[:57] + "..."


def form(entry: Entry | None) -> str:
    return "absent" if entry is None else f"{entry.dtype} {list(entry.shape)}"
