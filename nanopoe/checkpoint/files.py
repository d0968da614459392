"""Small files of a run, written so that a reader finds the old one or the new one, never a part."""

from __future__ import annotations

import os
from pathlib import Path

from nanopoe.errors import StorageError


def replace_file(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, make it durable, and rename it over; StorageError when the disk refuses."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise StorageError(f"cannot write: {error.strerror or error}", path,
                           "free some space or check the rights") from error
