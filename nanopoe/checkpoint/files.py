"""Files of a run, written so that a reader finds the old one or the new one, never a part; and their removal.

Everything that changes the disk goes through os.open, os.write, os.fsync, os.mkdir, os.rename and os.replace: what the
disk refuses is an OSError with an errno and the file's name, and a test can refuse in its place.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

from nanopoe.errors import StorageError

CHUNK = 16 << 20


class DurableFile:
    """A new file, written unbuffered and hashed on the way; durable when its `with` block ends without an error."""

    def __init__(self, path: Path):
        self.path, self.bytes, self._hash = path, 0, hashlib.sha256()
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            chunk = view[start:start + CHUNK]
            self._hash.update(chunk)
            self.bytes += len(chunk)
            try:
                write_all(self._handle, chunk)
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(self.path)) from error     # os.write knows no name

    @property
    def entry(self) -> dict[str, Any]:
        """Its line in a manifest."""
        return {"bytes": self.bytes, "sha256": self._hash.hexdigest()}

    def __enter__(self) -> DurableFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._handle)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        finally:
            os.close(self._handle)


def write_all(handle: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[os.write(handle, rest):]


def fsync_path(path: Path) -> None:
    """Make a file or a folder's entries durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, make it durable, and rename it over; StorageError when the disk refuses."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        os.makedirs(path.parent, exist_ok=True)
        beside.unlink(missing_ok=True)                      # of an earlier life, killed in between
        with DurableFile(beside) as file:
            file.write(content)
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", path,
                           "free some space or check the rights") from error


def remove(path: Path) -> list[str]:
    """Delete a folder with all in it, or a file or link. Never raises: what cannot be deleted is told in a line."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError as error:
        return [f"{path} cannot be deleted: {error.strerror or error}; remove it by hand"]
    return []
