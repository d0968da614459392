"""An ingest shared by machines: part i of n writes OUT/part-0000i-of-0000n; the merge makes one dataset of them.

The merge renames shards, so it costs no copy; stopped at any moment, it goes on when started again. Exact duplicates
are removed within a part, not between parts.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from nanopoe.data.manifest import MANIFEST, SPLITS, read_manifest
from nanopoe.data.partial import fsync_folder, write_durable
from nanopoe.errors import DataError

_NAME = re.compile(r"part-(\d{5})-of-(\d{5})")


def part_folder(out: Path, index: int, of: int) -> Path:
    return out / f"part-{index:05d}-of-{of:05d}"


def merge_all(out: Path) -> dict[Path, dict[str, Any]]:
    """`merge_parts` of `out`, or of each of its folders that has parts (a mixture's sources): manifests by folder."""
    if any(out.glob("part-*-of-*")):
        return {out: merge_parts(out)}
    folders = sorted({path.parent for path in out.glob("*/part-*-of-*")})
    if not folders:
        raise DataError("has no part-*-of-* folders", out, "ingest each part with --part i/n first")
    return {folder: merge_parts(folder) for folder in folders}


def merge_parts(out: Path) -> dict[str, Any]:
    """Make OUT/train and OUT/val of all parts in OUT; the manifest. DataError if one is missing or differs."""
    parts = _parts(out)
    manifests = [read_manifest(part) for part in parts]
    _check_alike(parts, manifests)
    merged = _merged(manifests)
    for number, (part, manifest) in enumerate(zip(parts, manifests, strict=True), 1):
        for split in SPLITS:
            (out / split).mkdir(exist_ok=True)
            for shard in manifest["splits"][split]["shards"]:
                _move(part / split / shard["name"], out / split / _name(number, shard["name"]), shard["bytes"])
            fsync_folder(out / split)
    write_durable(out / MANIFEST, (json.dumps(merged, indent=2) + "\n").encode())
    fsync_folder(out)
    for part in parts:
        shutil.rmtree(part)
    return merged


def _parts(out: Path) -> list[Path]:
    """The folders of all parts, in order; none is missing."""
    found = {path: match for path in sorted(out.glob("part-*")) if (match := _NAME.fullmatch(path.name))}
    counts = sorted({int(match[2]) for match in found.values()})
    if len(counts) > 1:
        raise DataError(f"has parts of {' and of '.join(map(str, counts))}", out, "remove the folders of one of them")
    parts = [part_folder(out, i, counts[0]) for i in range(1, counts[0] + 1)]
    missing = [part.name for part in parts if not (part / MANIFEST).is_file()]
    if missing and not (out / MANIFEST).is_file():
        raise DataError(f"{', '.join(missing[:5])} not finished", out, "ingest it with --part i/n")
    if missing:                                              # an earlier merge was stopped while it tidied up
        for part in found:
            shutil.rmtree(part)
        raise DataError("was merged before", out, "nothing is left to do")
    return parts


def _check_alike(parts: list[Path], manifests: list[dict[str, Any]]) -> None:
    first = manifests[0]
    for part, manifest in zip(parts, manifests, strict=True):
        for key in ("source", "options"):
            one, other = ({k: v for k, v in m[key].items() if k != "part"} for m in (first, manifest))
            if one != other:
                name = next(k for k in {**one, **other} if one.get(k) != other.get(k))
                raise DataError(f"{name} is {other.get(name)!r}, of part 1 it is {one.get(name)!r}", part,
                                "ingest it as the others")


def _merged(manifests: list[dict[str, Any]]) -> dict[str, Any]:
    first = manifests[0]
    source = {key: value for key, value in first["source"].items() if key != "part"}
    counts: dict[str, Any] = {key: sum(m["counts"][key] for m in manifests)
                              for key in ("rows", "documents", "blank_pieces")}
    for key in ("skipped", "bad"):
        reasons = sorted({reason for m in manifests for reason in m["counts"][key]})
        counts[key] = {reason: sum(m["counts"][key].get(reason, 0) for m in manifests) for reason in reasons}
    counts["left_out"] = [row for m in manifests for row in m["counts"]["left_out"]]
    splits = {}
    for split in SPLITS:
        shards = [{**shard, "name": _name(number, shard["name"])} for number, m in enumerate(manifests, 1)
                  for shard in m["splits"][split]["shards"]]
        splits[split] = {**{key: sum(m["splits"][split][key] for m in manifests)
                            for key in ("documents", "text_bytes", "bytes")}, "shards": shards}
    return {**first, "source": source, "inputs": [m["inputs"] for m in manifests], "counts": counts, "splits": splits}


def _name(part: int, shard: str) -> str:
    return f"part_{part:05d}_{shard}"


def _move(old: Path, new: Path, size: int) -> None:
    if old.is_file():
        old.rename(new)
    elif not new.is_file() or new.stat().st_size != size:
        raise DataError("is not there", old, "ingest that part again")
