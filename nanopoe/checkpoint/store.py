"""The checkpoints of a run: found, opened, verified, read. RUN/checkpoints/step_00000200/..."""

from __future__ import annotations

import hashlib
import json
import re
import zlib
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe.checkpoint.container import DTYPES, Stored, raw_chunks, read_header, read_rows, unreadable
from nanopoe.checkpoint.format import CONFIG, MANIFEST, STATE, Entry, Part, open_manifest, read_json
from nanopoe.config import Experiment, experiment_from_dict
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.tokenizer import Tokenizer

STEP_FOLDER = re.compile(r"step_(\d{8,18})")
NAMED_FOR_A_STEP = re.compile(r"(?:aside_\d+_|bad_|\.old-)?step_(\d{8,18})(?:_\d+)?")
PIN = "KEEP"


class Checkpoint:
    """One step of a run, opened: manifest and sizes checked; the content of a file is hashed before it is used."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = open_manifest(self.path)
        self.step = self.manifest.step
        self._verified: set[str] = set()
        self._headers: dict[str, dict[str, Stored]] = {}
        named = NAMED_FOR_A_STEP.fullmatch(self.path.name)
        if named and int(named.group(1)) != self.step:
            raise CheckpointError(f"is of step {self.step}", self.path, "it was renamed or replaced; use another step")

    # -- what it holds ------------------------------------------------------------------------------------------

    @cached_property
    def experiment(self) -> Experiment:
        try:
            return experiment_from_dict(self._json(CONFIG), str(self.path / CONFIG))
        except ConfigError as error:
            what = f"holds no experiment: {(error.problems or [error.what])[0][:200]}"
            raise CheckpointError(what, self.path / CONFIG, "use the nanopoe that wrote it, or another step") from error

    @cached_property
    def state(self) -> dict[str, Any]:
        """The train state: step, tokens, optimizer_steps, position (of the last step trained on)."""
        state = self._json(STATE)
        if state.get("step") != self.step:
            raise CheckpointError(f"is of step {str(state.get('step'))[:20]}, the manifest of {self.step}",
                                  self.path / STATE, "use another step")
        return state

    @property
    def identity(self) -> str:
        """SHA-256 over the names, sizes and hashes of its files: other content, another identity."""
        return hashlib.sha256(json.dumps(self.manifest.files, sort_keys=True).encode()).hexdigest()

    @property
    def weights(self) -> dict[str, Entry]:
        """The parameters by name."""
        return {name: entry for name, entry in self.manifest.tensors.items() if "::" not in name}

    @property
    def optimizer_state(self) -> dict[str, Entry]:
        """The optimizer's tensors by `<param>::<slot>`."""
        return {name: entry for name, entry in self.manifest.tensors.items() if "::" in name}

    @property
    def pinned(self) -> bool:
        """Whether a file KEEP in the folder forbids its rotation."""
        return (self.path / PIN).exists()

    # -- contents -----------------------------------------------------------------------------------------------

    def verify(self, rank: int = 0, size: int = 1) -> None:
        """Hash the files that fall to `rank` of `size` (all, for one). CheckpointError names the first damage.

        The small files are for every rank. When all ranks have succeeded (dist.agree), tell each by mark_verified().
        """
        _ = self.state, self.experiment
        by_size = sorted(self.manifest.files, key=lambda name: (-self.manifest.files[name][0], name))
        for name in by_size[rank::size]:
            self._verify(name)
            if name.endswith(".safetensors"):
                self._header(name)

    def mark_verified(self) -> None:
        """All files were verified, by all ranks together."""
        self._verified = set(self.manifest.files)

    def read(self, name: str, low: int = 0, high: int | None = None) -> Tensor:
        """Rows [low, high) of a tensor, in CPU memory of their own; a scalar is its one row."""
        entry = self.manifest.tensors.get(name)
        if entry is None:
            raise CheckpointError(f"lacks {name}", self.path, "use another step, or the run's own config")
        high = entry.rows if high is None else high
        if high > entry.rows:
            raise CheckpointError(f"{name} has {entry.rows} rows, {high} are needed", self.path,
                                  "use another step, or the run's own config")
        pieces = []
        for part in entry.parts:
            first, last = max(low, part.row0), min(high, part.row0 + part.rows)
            if first < last:
                stored = self._header(part.file)[part.key]
                pieces.append(read_rows(self.path / part.file, stored, first - part.row0, last - part.row0))
        if not pieces:
            return torch.empty(0, *entry.shape[1:], dtype=DTYPES[entry.dtype])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def load_model_tensors(self) -> dict[str, Tensor]:
        """All weights by parameter name, verified."""
        return {name: self.read(name) for name in self.weights}

    def optimizer_rows(self, param: str, slot: str, low: int, high: int) -> Tensor:
        return self.read(f"{param}::{slot}", low, high)

    # -- files --------------------------------------------------------------------------------------------------

    def _json(self, name: str) -> dict[str, Any]:
        self._verify(name)
        return read_json(self.path / name)

    def _verify(self, name: str) -> None:
        """Hash a file, once."""
        if name in self._verified:
            return
        path = self.path / name
        if sha256_file(path) != self.manifest.files[name][1]:
            at = self._damage(name) if name.endswith(".safetensors") else ""
            raise CheckpointError(f"content does not match its SHA-256{at}", path,
                                  "the file was altered or the disk is bad; use another step")
        self._verified.add(name)

    def _header(self, name: str) -> dict[str, Stored]:
        """The tensors of a verified file, which are those of the manifest."""
        if name not in self._headers:
            self._verify(name)
            found = read_header(self.path / name)
            wanted = {part.key: (entry.dtype, entry.shape_of(part)) for entry, part in self.manifest.parts_of(name)}
            for key in sorted(found.keys() | wanted.keys()):
                stored = (found[key].dtype, found[key].shape) if key in found else None
                if stored != wanted.get(key):
                    raise CheckpointError(f"{key} is {described(stored)}, the manifest says "
                                          f"{described(wanted.get(key))}", self.path / name,
                                          "the file was replaced; use another step")
            self._headers[name] = found
        return self._headers[name]

    def _damage(self, name: str) -> str:
        """Where in a file whose hash is wrong: the first part whose CRC-32 is."""
        try:
            stored = read_header(self.path / name)
        except CheckpointError:
            return ", in its header"
        parts = {part.key: (entry, part) for entry, part in self.manifest.parts_of(name)}
        for key, place in stored.items():
            entry, part = parts.get(key, (None, None))
            if entry is None or part is None or (place.dtype, place.shape) != (entry.dtype, entry.shape_of(part)):
                return ", in its header"
            if part_crc(self.path / name, place, part) != part.crc32:
                rows = f" rows {part.row0} to {part.row0 + part.rows - 1}" if entry.shape else ""
                return f", in {entry.name}{rows}"
        return ", in its header"


def part_crc(path: Path, place: Stored, part: Part) -> int:
    crc = 0
    for low, high in row_ranges(part.rows, place.bytes):
        for chunk in raw_chunks(read_rows(path, place, low, high)):
            crc = zlib.crc32(chunk, crc)
    return crc


def row_ranges(rows: int, size: int, limit: int = 64 << 20) -> list[tuple[int, int]]:
    """`rows` rows of `size` bytes together, cut into [low, high) of at most `limit` bytes (or one row)."""
    step = max(1, rows * limit // max(size, 1))
    return [(low, min(low + step, rows)) for low in range(0, rows, step)]


def described(stored: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if stored is None else f"{stored[0]} {list(stored[1])}"


def sha256_file(path: Path) -> str:
    try:
        with open(path, "rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except FileNotFoundError:
        raise CheckpointError("missing", path, "use another step") from None
    except OSError as error:
        raise unreadable(path, error) from error


# -- finding ---------------------------------------------------------------------------------------------------------

def checkpoints_of(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def folder_of(run_dir: str | Path, step: int) -> Path:
    return checkpoints_of(run_dir) / f"step_{step:08d}"


def list_steps(run_dir: str | Path) -> list[int]:
    """Steps with a committed folder, ascending. A folder is committed by its rename, so every one counts."""
    folder = checkpoints_of(run_dir)
    if not folder.is_dir():
        return []
    matches = (STEP_FOLDER.fullmatch(p.name) for p in folder.iterdir() if p.is_dir() or p.is_symlink())
    return sorted({int(m.group(1)) for m in matches if m and folder_of(run_dir, int(m.group(1))).name == m.group()})


def opens(path: Path) -> bool:
    """Whether a checkpoint is there whose manifest is in order and whose files have their sizes."""
    try:
        Checkpoint(path)
    except CheckpointError:
        return False
    return True


def open_checkpoint(run_dir: str | Path, step: int | None = None) -> Checkpoint:
    """The checkpoint of `step`, or the newest. CheckpointError if there is none or it is damaged.

    A damaged newest one is never passed over in silence: the error names the last one before it that opens.
    """
    steps = list_steps(run_dir)
    if not steps:
        raise CheckpointError("no checkpoint", checkpoints_of(run_dir), "train first, or check the run folder")
    if step is not None and step not in steps:
        raise CheckpointError(f"no checkpoint of step {step}", checkpoints_of(run_dir),
                              f"steps there: {', '.join(map(str, steps))}")
    chosen = steps[-1] if step is None else step
    try:
        return Checkpoint(folder_of(run_dir, chosen))
    except CheckpointError as error:
        raise hinted(error, run_dir, chosen) from error


def step_before(run_dir: str | Path, step: int) -> int | None:
    """The last step before `step` whose checkpoint opens."""
    return next((s for s in reversed(list_steps(run_dir)) if s < step and opens(folder_of(run_dir, s))), None)


def hinted(error: CheckpointError, run_dir: str | Path, step: int) -> CheckpointError:
    """The same error, which also tells of the checkpoint before the damaged one of `step`."""
    before = step_before(run_dir, step)
    if before is None:
        return error
    do = error.do or "use another step"
    return CheckpointError(error.what, error.where, f"{do}; the one before is step {before}")


def open_path(path: str | Path, step: int | None = None) -> Checkpoint:
    """The checkpoint in a step folder, or of `step` (the newest) of a run folder."""
    path = Path(path)
    if (path / MANIFEST).exists() or NAMED_FOR_A_STEP.fullmatch(path.absolute().name):
        return Checkpoint(path)
    return open_checkpoint(path, step)


def open_tokenizer(run_dir: str | Path, checkpoint: Checkpoint) -> Tokenizer:
    """The tokenizer kept in the run folder; CheckpointError if it is not the one the checkpoint was trained with."""
    folder = Path(run_dir) / "tokenizer"
    tokenizer = Tokenizer.load(folder)
    digest = checkpoint.manifest.fingerprints.get("tokenizer")
    if digest != tokenizer.digest:
        raise CheckpointError("was trained with another tokenizer", checkpoint.path,
                              f"put the one whose sha256 begins with {str(digest)[:12]} in {folder}")
    return tokenizer
