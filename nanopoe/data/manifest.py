"""The manifest of a dataset folder, and whether the shards beside it are those it lists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanopoe.errors import DataError

FORMAT_VERSION = 2
MANIFEST, SPLITS = "manifest.json", ("train", "val")
_AGAIN = "copy the folder again, or write it again with scripts.prepare_data"


def read_manifest(folder: Path) -> dict[str, Any]:
    """`folder`/manifest.json. DataError if it is missing, no manifest, or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(f"is of format {version}, this program reads {FORMAT_VERSION}", path, _AGAIN)
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                if not isinstance(shard["name"], str) or not isinstance(shard["sha256"], str) or \
                        any(type(shard[key]) is not int for key in ("rows", "bytes", "text_bytes")):
                    raise TypeError(f"shard {str(shard)[:60]}")
        if not isinstance(manifest["column"], str):
            raise TypeError("column")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", path, _AGAIN) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"is no manifest ({type(error).__name__}: {str(error)[:80]})", path, _AGAIN) from error
    return manifest


def check_manifest(folder: Path | str) -> None:
    """Check one split (DATASET/train) against the manifest above it by names, sizes and rows; nothing is hashed.

    Nothing to check where there is no manifest, or where it does not list this folder. DataError names the shard.
    """
    folder = Path(folder)
    if not (folder.parent / MANIFEST).is_file():
        return
    split = read_manifest(folder.parent)["splits"].get(folder.name)
    if split is None:
        return
    for error in listing_errors(folder, split["shards"]):
        raise error
    for shard in split["shards"]:
        wrong = rows_error(folder / shard["name"], shard["rows"])
        if wrong is not None:
            raise wrong


def listing_errors(folder: Path, shards: list[dict[str, Any]]) -> Iterator[DataError]:
    """Shards that are missing, of another size, or not in the list."""
    there = {path.name: path.stat().st_size for path in folder.glob("*.parquet")} if folder.is_dir() else {}
    for shard in shards:
        size = there.pop(shard["name"], None)
        if size is None:
            yield DataError("is in the manifest but not there", folder / shard["name"], _AGAIN)
        elif size != shard["bytes"]:
            yield DataError(f"has {size:,} bytes, the manifest says {shard['bytes']:,}", folder / shard["name"],
                            _AGAIN)
    for name in sorted(there):
        yield DataError("is not in the manifest", folder / name, "remove it, or read it from a folder of its own")


def rows_error(path: Path, rows: int) -> DataError | None:
    try:
        found = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        return DataError(f"cannot be read as parquet ({str(error).splitlines()[0][:200]})", path, _AGAIN)
    if found != rows:
        return DataError(f"has {found:,} rows, the manifest says {rows:,}", path, _AGAIN)
    return None


def hash_error(path: Path, sha256: str) -> DataError | None:
    try:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return DataError(f"cannot be read ({error.strerror})", path, _AGAIN)
    if found != sha256:
        return DataError(f"content has SHA-256 {found[:12]}..., the manifest says {sha256[:12]}...", path, _AGAIN)
    return None


def datasets_in(folder: Path) -> list[Path]:
    """`folder` itself if it has a manifest, else those of its folders that have one (a mixture, parts)."""
    if (folder / MANIFEST).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    if not found:
        raise DataError(f"has no {MANIFEST}", folder, "name a folder written by scripts.prepare_data")
    return found
