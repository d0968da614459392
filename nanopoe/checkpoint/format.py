"""Version 2 of a checkpoint: safetensors and JSON, every byte accounted for in a manifest written last.

Every rank writes the weights that fall to it under their plain names, and the rows of optimizer state it owns under
`<param>::<slot>::<row0>`. The manifest gives each tensor its global shape and the parts that make it up, so that any
world size can read it; it ends in a seal over itself. safetensors loads most bit-flipped files as wrong numbers, so
sizes are checked when a checkpoint is opened, and SHA-256 before a weight is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.container import DTYPES, JSON_VALUES, unreadable, values_in
from nanopoe.checkpoint.files import DurableFile
from nanopoe.errors import CheckpointError

FORMAT, VERSION = "nanopoe-checkpoint", 2
MANIFEST, STATE, CONFIG = "manifest.json", "state.json", "config.json"
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
TENSOR_NAME = re.compile(r"([A-Za-z0-9._-]{1,200})(::[a-z0-9_]{1,50})?")
SHA256 = re.compile(r"[0-9a-f]{64}")
TEXT = re.compile(r"[ -~]{0,200}")
JSON_LIMIT = 64 << 20
JSON_DEPTH = 32
FIELDS = {"format", "version", "step", "nanopoe", "torch", "world_size", "fingerprints", "files", "tensors", "sha256"}


@dataclass(frozen=True)
class Part:
    """Rows [row0, row0 + rows) of a tensor: where they lie, and the CRC-32 of their bytes."""

    file: str
    key: str
    row0: int
    rows: int
    crc32: int


@dataclass(frozen=True)
class Entry:
    """A tensor as the manifest has it: safetensors dtype, global shape, parts in the order of their rows."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def rows(self) -> int:
        """Length of the first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * DTYPES[self.dtype].itemsize

    def shape_of(self, part: Part) -> tuple[int, ...]:
        return (part.rows, *self.shape[1:]) if self.shape else ()


@dataclass(frozen=True)
class Manifest:
    """manifest.json, checked: every tensor's rows are there exactly once, every file is one of the folder's own."""

    step: int
    nanopoe: str
    torch: str
    world_size: int
    fingerprints: dict[str, str]
    files: dict[str, tuple[int, str]]        # name -> (bytes, SHA-256)
    tensors: dict[str, Entry]

    def parts_of(self, file: str) -> Iterator[tuple[Entry, Part]]:
        for entry in self.tensors.values():
            yield from ((entry, part) for part in entry.parts if part.file == file)


def tensor_entry(shape: list[int], dtype: str, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """A tensor's line in a manifest."""
    return {"dtype": dtype, "shape": shape, "parts": sorted(parts, key=lambda part: part["row0"])}


# -- JSON ------------------------------------------------------------------------------------------------------------

def write_json(path: Path, value: Any, indent: int | None = None) -> dict[str, Any]:
    """Write and fsync JSON; its manifest entry. CheckpointError if it would be too large to be read again."""
    text = json.dumps(value, sort_keys=True, allow_nan=False, indent=indent).encode() + b"\n"
    if len(text) > JSON_LIMIT or values_in(text) > JSON_VALUES:
        raise CheckpointError(f"would be larger than {JSON_LIMIT >> 20} MiB or {JSON_VALUES:,} values", path,
                              "use fewer lanes or smaller buffers (data.lanes, data.buffer_documents)")
    with DurableFile(path) as file:
        file.write(text)
    return file.entry


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object; CheckpointError if it is missing, too large, too deep or broken."""
    return parse_json(read_limited(path), path)


def read_limited(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            raw = file.read(JSON_LIMIT + 1)
    except FileNotFoundError:
        raise CheckpointError("missing", path, "use another step or copy") from None
    except OSError as error:
        raise unreadable(path, error) from error
    if len(raw) > JSON_LIMIT:
        raise CheckpointError(f"larger than {JSON_LIMIT >> 20} MiB", path, "use another step or copy")
    return raw


def parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        if values_in(raw) > JSON_VALUES:
            raise ValueError(f"over {JSON_VALUES:,} values")
        value = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        level = [value]
        for _ in range(JSON_DEPTH):
            level = [child for node in level if isinstance(node, dict | list)
                     for child in (node.values() if isinstance(node, dict) else node)]
            if any(isinstance(node, float) and not math.isfinite(node) for node in level):
                raise ValueError("a number beyond all bounds")
        if level:
            raise ValueError(f"nested deeper than {JSON_DEPTH}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {str(error)[:80]}", path, "use another step or copy") from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", path, "use another step or copy")
    return value


# -- the manifest ----------------------------------------------------------------------------------------------------

def seal(value: dict[str, Any]) -> dict[str, Any]:
    """`value` with the SHA-256 of the rest of it, so that a flipped bit in a version or a count is seen too."""
    rest = {key: item for key, item in value.items() if key != "sha256"}
    return {**rest, "sha256": hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()}


def open_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a step folder, and the sizes of its files. CheckpointError names what is wrong."""
    path = folder / MANIFEST
    if not stat.S_ISDIR(look(folder).st_mode):
        raise CheckpointError("not a folder, or a link to one", folder, "use another step or copy")
    if not stat.S_ISREG(look(path).st_mode):
        raise CheckpointError("is a link or no file", path, "use another step or copy")
    raw = read_limited(path)
    value = parse_json(raw, path)
    if value.get("format") != FORMAT or value.get("version") != VERSION:
        shown = [str(value.get(key))[:40] for key in ("format", "version")]
        raise CheckpointError(f"format {shown[0]!a} version {shown[1]} is not {FORMAT} version {VERSION}", path,
                              "use the nanopoe that wrote it")
    if seal(value) != value or json.dumps(value, sort_keys=True).encode() + b"\n" != raw:
        raise CheckpointError("does not match its seal", path, "it was altered; use another step or copy")
    try:
        manifest = parse_manifest(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise CheckpointError(f"malformed: {what}", path, "use another step or copy") from error
    check_sizes(folder, manifest)
    return manifest


def parse_manifest(value: dict[str, Any]) -> Manifest:
    """The checked content; ValueError, KeyError or TypeError for anything out of order."""
    expect(set(value) == FIELDS, f"its keys are {', '.join(sorted(value))[:200]!a}")
    expect(isinstance(value["files"], dict) and isinstance(value["tensors"], dict), "files or tensors are no objects")
    expect(isinstance(value["fingerprints"], dict), f"fingerprints is {shown(value['fingerprints'])}")
    files = {}
    for name, entry in value["files"].items():
        expect(FILE_NAME.fullmatch(name) is not None, f"it names a file outside itself: {shown(name)}")
        expect(name in (STATE, CONFIG) or name.endswith(".safetensors"), f"{name} is no file of a checkpoint")
        files[name] = (count(entry, "bytes"), text(entry, "sha256", SHA256))
        expect(len(entry) == 2, f"{name} has more than bytes and sha256")
        expect(name.endswith(".safetensors") or files[name][0] <= JSON_LIMIT, f"{name} is over {JSON_LIMIT >> 20} MiB")
    expect({STATE, CONFIG} <= files.keys(), f"{STATE} or {CONFIG} is not among the files")
    tensors = {name: parse_tensor(name, entry) for name, entry in value["tensors"].items()}
    check_files_used(files, tensors)
    return Manifest(count(value, "step"), text(value, "nanopoe"), text(value, "torch"), count(value, "world_size"),
                    {text({"name": k}, "name"): text(value["fingerprints"], k) for k in value["fingerprints"]},
                    files, tensors)


def parse_tensor(name: str, value: Any) -> Entry:
    matched = TENSOR_NAME.fullmatch(name)
    expect(matched is not None, f"a tensor is named {shown(name)}")
    assert matched is not None
    expect(isinstance(value, dict) and set(value) == {"dtype", "shape", "parts"}, f"{name} is {shown(value)}")
    shape = value["shape"]
    expect(value["dtype"] in DTYPES, f"{name}: dtype is {shown(value['dtype'])}")
    expect(isinstance(shape, list) and len(shape) <= 8 and all(type(n) is int and n >= 0 for n in shape)
           and math.prod(max(n, 1) for n in shape) <= 2**48, f"{name}: shape is {shown(shape)}")
    expect(isinstance(value["parts"], list) and 0 < len(value["parts"]) <= 2**16, f"{name}: it has no parts")
    parts = []
    for item in value["parts"]:
        expect(isinstance(item, dict) and len(item) == 5, f"{name}: a part is {shown(item)}")
        part = Part(text(item, "file", FILE_NAME), text(item, "key"), count(item, "row0"), count(item, "rows"),
                    count(item, "crc32"))
        expect(part.key == (f"{name}::{part.row0}" if matched.group(2) else name), f"{name}: its key is {part.key}")
        parts.append(part)
    entry = Entry(name, value["dtype"], tuple(shape), tuple(sorted(parts, key=lambda part: part.row0)))
    check_rows(entry)
    return entry


def check_rows(entry: Entry) -> None:
    """Every row exactly once."""
    end = 0
    for part in entry.parts:
        expect(part.row0 == end, f"{entry.name}: {rows_text(part.row0, end)} "
                                 f"{'missing' if part.row0 > end else 'there twice'}")
        end += part.rows
        expect(part.rows > 0 or entry.rows == 0, f"{entry.name}: a part has no rows")
    expect(end == entry.rows, f"{entry.name}: {rows_text(end, entry.rows)} "
                              f"{'missing' if end < entry.rows else 'more than there are'}")
    expect(entry.rows > 0 or len(entry.parts) == 1, f"{entry.name}: it has parts without rows")


def rows_text(a: int, b: int) -> str:
    """The rows between two edges, as a subject with its verb."""
    low, high = sorted((a, b))
    return f"row {low} is" if high - low == 1 else f"rows {low} to {high - 1} are"


def check_files_used(files: Mapping[str, tuple[int, str]], tensors: Mapping[str, Entry]) -> None:
    """Every part lies in a file of the list, and has room in it; every safetensors file has parts; no key is twice."""
    held, keys = dict.fromkeys((name for name in files if name.endswith(".safetensors")), -1), set()
    for entry in tensors.values():
        for part in entry.parts:
            expect(part.file in held, f"{entry.name}: its file {part.file} is not in the list")
            expect((part.file, part.key) not in keys, f"{entry.name}: {part.key} is there twice")
            keys.add((part.file, part.key))
            held[part.file] = max(held[part.file], 0) + part.rows * entry.row_bytes
    for name, bytes_held in held.items():
        expect(bytes_held >= 0, f"nothing is in {name}")
        expect(bytes_held < files[name][0], f"{name} of {files[name][0]} bytes cannot hold {bytes_held}")


def check_sizes(folder: Path, manifest: Manifest) -> None:
    for name, (size, _) in manifest.files.items():
        path = folder / name
        found = look(path)
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError("is a link or no file: it lies outside of the checkpoint", path,
                                  "use another step or copy")
        if found.st_size != size:
            raise CheckpointError(f"has {found.st_size} bytes, the manifest says {size}", path,
                                  "the file was cut or changed; use another step or copy")


def look(path: Path) -> os.stat_result:
    """What lies at a path itself, link or not; CheckpointError if nothing does."""
    try:
        return os.lstat(path)
    except FileNotFoundError:
        raise CheckpointError("missing", path, "use another step or copy") from None
    except OSError as error:
        raise unreadable(path, error) from error


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def count(entry: Any, name: str) -> int:
    value = entry[name]
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} is {shown(value)}")
    return value


def text(entry: Any, name: str, pattern: re.Pattern[str] = TEXT) -> str:
    value = entry[name]
    if type(value) is not str or not pattern.fullmatch(value):
        raise ValueError(f"{name} is {shown(value)}")
    return value


def shown(value: object) -> str:
    return ascii(value)[:60]
