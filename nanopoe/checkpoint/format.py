"""The files of a checkpoint: safetensors and JSON, every byte accounted for in a manifest written last.

safetensors itself loads most bit-flipped files as wrong numbers, so sizes and SHA-256 are checked before a weight is
used. Optimizer state is keyed `<param>::<slot>::<row0>`: parts of rows that any world size can put together.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nanopoe.errors import CheckpointError, StorageError

FORMAT, VERSION = "nanopoe-checkpoint", 1
MODEL_FILE = "model.safetensors"
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")
JSON_LIMIT = 64 << 20


def fsync_path(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write and fsync a safetensors file; returns its manifest entry. StorageError when the disk is full."""
    try:
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:                       # a full disk comes as this, with no errno
        raise StorageError(str(error), path, "free some space; the run goes on from the last checkpoint") from error
    fsync_path(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write and fsync JSON; returns its manifest entry."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(value, f, indent=1, sort_keys=True, allow_nan=False)
        f.flush()
        os.fsync(f.fileno())
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def read_json(path: Path) -> Any:
    """Parse a JSON object; CheckpointError if it is missing, too large or broken."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"larger than {JSON_LIMIT >> 20} MiB", path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError("missing", path, "use another step") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {error}", path, "use another step") from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", path, "use another step")
    return value


def fields(entry: Any, **kinds: type) -> dict[str, Any]:
    """`entry` if it is an object with fields of these JSON types, integers not below 0; else ValueError."""
    for name, kind in kinds.items():
        value = entry[name]
        if type(value) is not kind or (isinstance(value, int) and value < 0):
            raise ValueError(f"{name} is {str(value)[:40]!r}")
    return dict(entry)


class Manifest:
    """The manifest of one step folder; every file is checked against it before it is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.value = read_json(folder / "manifest.json")
        if self.value.get("format") != FORMAT or self.value.get("version") != VERSION:
            raise CheckpointError(f"format {self.value.get('format')!r} version {self.value.get('version')!r} is not "
                                  f"{FORMAT} version {VERSION}", folder / "manifest.json")
        try:
            self.files = {name: fields(e, bytes=int, sha256=str) for name, e in self.value["files"].items()}
            self.tensors = {name: fields(e, dtype=str, shape=list) for name, e in self.value["tensors"].items()}
            self.parts = {key: [fields(part, file=str, row0=int, rows=int) for part in parts]
                          for key, parts in self.value["optimizer"].items()}
            self.step: int = fields(self.value, step=int, fingerprints=dict)["step"]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"malformed: {error!r}", folder / "manifest.json", "use another step") from error
        self._verified: set[str] = set()
        self._check_sizes()

    def _check_sizes(self) -> None:
        for name, entry in self.files.items():
            path = self.folder / name
            if not SAFE_NAME.fullmatch(name) or name in (".", "..") or path.is_symlink():
                raise CheckpointError(f"names a file outside itself: {name!r}", self.folder / "manifest.json")
            if not path.is_file():
                raise CheckpointError("missing", path, "use another step")
            if path.stat().st_size != entry["bytes"]:
                raise CheckpointError(f"has {path.stat().st_size} bytes, the manifest says {entry['bytes']}", path,
                                      "the file was cut or changed; use another step")

    def verified(self, name: str) -> Path:
        """Path of a file whose content is what the manifest says; hashed once."""
        path = self.folder / name
        if name not in self.files:
            raise CheckpointError("not in the manifest", path, "use another step")
        if name not in self._verified:
            if sha256_file(path) != self.files[name]["sha256"]:
                raise CheckpointError("content does not match its SHA-256", path,
                                      "the file was altered or the disk is bad; use another step")
            self._verified.add(name)
        return path

    def json(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = read_json(self.verified(name))
        return value

    def load_model(self) -> dict[str, Tensor]:
        """All weights by parameter name, fp32, in memory of their own (safetensors maps the file)."""
        path, loaded = self.verified(MODEL_FILE), {}
        with safe_open(path, framework="pt") as f:
            if set(f.keys()) != set(self.tensors):
                odd = sorted(set(f.keys()) ^ set(self.tensors))
                raise CheckpointError(f"tensors do not match the manifest: {', '.join(odd[:5])}", path,
                                      "the file was replaced; use another step")
            for name in self.tensors:
                loaded[name] = f.get_tensor(name).clone()
                if list(loaded[name].shape) != self.tensors[name]["shape"]:
                    raise CheckpointError(f"{name} has shape {list(loaded[name].shape)}, the manifest says "
                                          f"{self.tensors[name]['shape']}", path)
        return loaded

    def optimizer_rows(self, param: str, slot: str, low: int, high: int) -> Tensor:
        """Rows [low, high) of one slot of one parameter's optimizer state, from the parts that hold them."""
        where = f"{self.folder} optimizer state {param}::{slot}"
        parts = sorted(self.parts.get(f"{param}::{slot}", []), key=lambda p: p["row0"])
        end = 0
        for part in parts:
            if part["row0"] != end:
                raise CheckpointError(f"row {end} is {'missing' if part['row0'] > end else 'there twice'}", where)
            end += part["rows"]
        if end < high:
            raise CheckpointError(f"has {end} rows, needs {high}", where, "use another step, or the run's own config")
        pieces = []
        for part in parts:
            first, last = max(low, part["row0"]), min(high, part["row0"] + part["rows"])
            if first < last:
                with safe_open(self.verified(part["file"]), framework="pt") as f:
                    piece = f.get_slice(f"{param}::{slot}::{part['row0']}")
                    pieces.append(piece[first - part["row0"]:last - part["row0"]])
        return torch.cat(pieces) if pieces else torch.empty(0)
