"""Lines appended to a file, in order and none of them torn; what the disk refuses waits in memory."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from nanopoe.errors import StorageError


class Journal:
    """A file that a run appends lines to. StorageError when it cannot be opened; after that no error leaves it.

    A full disk must stop no training: lines that cannot be written are kept, and written before the next one. `pending`
    counts them, `trouble` says why, null when all is on disk. Other writers may append too.
    """

    def __init__(self, path: Path):
        self.path = path
        self.trouble: str | None = None
        self._lines: deque[bytes] = deque()
        self._fd: int | None = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise StorageError(f"cannot open: {error.strerror or error}", path,
                               "check the run folder's rights") from error

    @property
    def pending(self) -> int:
        return len(self._lines)

    def write(self, line: str) -> None:
        """Append `line` and those before it that wait. Nothing after close()."""
        if self._fd is None:
            return
        self._lines.append(line.encode() + b"\n")
        self._flush(self._fd)

    def close(self) -> None:
        """Try a last time to write what waits. May be called twice."""
        if self._fd is None:
            return
        self._flush(self._fd)
        try:
            os.close(self._fd)
        except OSError as error:                                    # a network disk may refuse as late as here
            self.trouble = error.strerror or str(error)
        self._fd = None

    def _flush(self, fd: int) -> None:
        try:
            while self._lines:
                self._append(fd, self._lines[0])
                self._lines.popleft()
            self.trouble = None
        except OSError as error:
            self.trouble = error.strerror or str(error)

    def _append(self, fd: int, line: bytes) -> None:
        """Write all of `line`, or nothing: a part that a full disk took is cut off again."""
        written = 0
        try:
            while written < len(line):
                written += os.write(fd, line[written:])
        except OSError:
            if written:
                self._cut(fd, written, line)
            raise

    def _cut(self, fd: int, written: int, line: bytes) -> None:
        """Remove the `written` bytes of `line` that end the file; what cannot be removed is completed later."""
        try:
            end = os.lseek(fd, 0, os.SEEK_CUR)                      # where our last write ended
            if os.fstat(fd).st_size == end:
                os.ftruncate(fd, end - written)
                return
        except OSError:
            pass
        self._lines[0] = line[written:]
