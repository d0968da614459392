"""What a frozen base computed for a row, kept on the disk for when the row comes again (specialist.cache_states).

A row is found by its own content, so nothing here knows of steps, ranks or resumes, and a missing, torn or deleted file
is computed anew. A pass over rows that a run has seen (data.replay_steps) then skips the base.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from nanopoe.checkpoint.container import raw_bytes

CRC_BYTES = 4


class StateCache:
    """States (T, D) in `dtype` of rows of T ids, a file each: a CRC-32 and the raw bytes. `folder` must be of one base.

    `read` and `computed` count rows. When the disk refuses, `problem` says why, `full` is set and no more is written.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype):
        self.folder, self.width, self.dtype, self.problem = folder, width, dtype, ""
        self.read = self.computed = 0
        self.full = False

    def __call__(self, ids: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """compute() of `ids` (B, T), which is (B, T, D); read instead, if all rows are there. Not row by row: a row's
        last bits may depend on the rows computed with it."""
        paths = [self._path(row) for row in ids.cpu()]
        states = torch.empty(*ids.shape, self.width, dtype=self.dtype)
        if all(self._fill(state, path) for state, path in zip(states, paths, strict=True)):
            self.read += len(paths)
            return states.to(ids.device, non_blocking=True)
        x = compute()
        self.computed += len(paths)
        for path, state in zip(paths, x.cpu(), strict=True):
            if not self.full:
                self._write(path, state)
        return x

    def take_problem(self) -> str:
        """The problem, once."""
        problem, self.problem = self.problem, ""
        return problem

    def _path(self, row: Tensor) -> Path:
        name = hashlib.sha256(row.contiguous().numpy().tobytes()).hexdigest()
        return self.folder / name[:2] / name[2:]

    def _fill(self, state: Tensor, path: Path) -> bool:
        """Read a file into `state` (T, D); whether it was there and whole."""
        view = raw_bytes(state)
        try:
            with open(path, "rb") as file:
                crc = file.read(CRC_BYTES)
                whole = file.readinto(view) == len(view) and not file.read(1)
        except OSError:
            return False
        return whole and int.from_bytes(crc, "little") == zlib.crc32(view)

    def _write(self, path: Path, state: Tensor) -> None:
        """Through a rename, so that another rank never reads half of it. Not made durable: it can be computed again."""
        content = raw_bytes(state.contiguous())
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(beside, "wb") as file:
                file.write(zlib.crc32(content).to_bytes(CRC_BYTES, "little"))
                file.write(content)
            os.replace(beside, path)
        except OSError as error:
            self.problem, self.full = error.strerror or str(error), True
            with suppress(OSError):
                beside.unlink()
