"""An ingest under way: a visible folder OUT.partial with the shards finished so far and the journal that says so.

The journal's first line says what is ingested and how; each other line holds what one commit has added, and where
reading goes on. A shard is durable before its line is. What a kill leaves without a line is written again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from nanopoe.data.manifest import MANIFEST, SPLITS, read_manifest
from nanopoe.errors import ConfigError, DataError

JOURNAL, HASHES = "journal.jsonl", "documents.blake2b"
HASH_BYTES = 16
HEADER = ("format_version", "source", "options", "inputs")
Record = dict[str, Any]


def partial_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.partial")


def started_source(out: Path) -> dict[str, Any] | None:
    """The source of the ingest into `out` that is under way or done; None without one."""
    try:
        if (partial_of(out) / JOURNAL).is_file():
            with open(partial_of(out) / JOURNAL, "rb") as file:
                return json.loads(file.readline())["source"]
        return read_manifest(out)["source"] if (out / MANIFEST).is_file() else None
    except (OSError, ValueError, KeyError, DataError):
        return None                                          # refused by name where it is opened


class Partial:
    """Opened for one process. `records`: the commits so far; `done`: all is written but the last rename.

    ConfigError if it was begun with other options or inputs, DataError if another process writes it or it is damaged.
    """

    def __init__(self, out: Path, header: Record):
        self.out, self.folder = out, partial_of(out)
        self.records: list[Record] = []
        self._header, self._journal = header, -1
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise DataError("another process is writing it", self.folder, "wait for it, or choose another --out") \
                from None
        try:
            self.done = (self.folder / MANIFEST).is_file()
            if self.done:
                self._same(read_manifest(self.folder))
            else:
                self._recover()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it. A folder in which nothing is finished is removed."""
        if self._lock < 0:
            return
        if self._journal >= 0:
            os.close(self._journal)
            if not self.records:
                shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)
        self._lock = self._journal = -1

    def __enter__(self) -> Partial:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def commit(self, shards: dict[str, tuple[Record, bytes]], hashes: bytes, record: Record) -> None:
        """Make the shards (split -> its line in the manifest, content) and the hashes durable, then the record."""
        for split, (line, content) in shards.items():
            (self.folder / split).mkdir(exist_ok=True)
            write_durable(self.folder / split / line["name"], content)
            fsync_folder(self.folder / split)
        if hashes:
            with open(self.folder / HASHES, "ab") as file:
                file.write(hashes)
                file.flush()
                os.fsync(file.fileno())
        fsync_folder(self.folder)
        self._append({**record, "shards": {split: line for split, (line, _) in shards.items()}})

    def hashes(self) -> set[bytes]:
        """Those of all documents kept so far."""
        path = self.folder / HASHES
        data = path.read_bytes() if path.is_file() else b""
        return {data[i:i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)}

    def finish(self, manifest: Record) -> None:
        """Write the manifest and put the folder where `out` is or was."""
        if not self.done:
            write_durable(self.folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
            fsync_folder(self.folder)
            self.done = True
        for name in (JOURNAL, HASHES):
            (self.folder / name).unlink(missing_ok=True)
        if self.out.exists():
            trash = Path(tempfile.mkdtemp(prefix=f".trash-{self.out.name}-", dir=self.out.parent))
            self.out.rename(trash / self.out.name)
        self.folder.rename(self.out)
        fsync_folder(self.out.parent)
        for old in self.out.parent.glob(f".trash-{self.out.name}-*"):        # an earlier one may have been killed here
            shutil.rmtree(old, ignore_errors=True)

    def _recover(self) -> None:
        """Read the journal, and remove what it does not vouch for; begin one if there is none."""
        path = self.folder / JOURNAL
        content = path.read_bytes() if path.is_file() else b""
        whole = content[:content.rfind(b"\n") + 1]           # a line that a kill has torn has no end
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
            if lines:
                self._same(lines[0])
            self.records = lines[1:]
            self._remove_strays()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"the journal is damaged ({type(error).__name__})", path,
                            f"remove {self.folder} to begin anew") from error
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._journal, len(whole))
        if not lines:
            self._append(self._header, keep=False)

    def _same(self, other: Record) -> None:
        """ConfigError unless the ingest that was begun is the one that is wanted."""
        for key in HEADER:
            then, now = other.get(key), self._header[key]
            if then == now:
                continue
            if isinstance(then, dict) and isinstance(now, dict):
                key = next(k for k in {**then, **now} if then.get(k) != now.get(k))
                then, now = then.get(key), now.get(key)
            raise ConfigError(f"was begun with {key} {then!r:.60}, now it is {now!r:.60}", self.folder,
                              "start it as it was begun, or remove the folder to begin anew")

    def _remove_strays(self) -> None:
        for split in SPLITS:
            known = {r["shards"][split]["name"]: r["shards"][split]["bytes"] for r in self.records
                     if split in r["shards"]}
            for path in (self.folder / split).glob("*"):
                if path.name not in known:
                    path.unlink()
            for name, size in known.items():
                path = self.folder / split / name
                if not path.is_file() or path.stat().st_size != size:
                    raise DataError("is not as the journal says", path, f"remove {self.folder} to begin anew")
        wanted = HASH_BYTES * (self.records[-1]["hashes"] if self.records else 0)
        path = self.folder / HASHES
        if path.is_file():
            os.truncate(path, min(wanted, path.stat().st_size))
        if wanted and path.stat().st_size != wanted:
            raise DataError("is shorter than the journal says", path, f"remove {self.folder} to begin anew")

    def _append(self, record: Record, keep: bool = True) -> None:
        line = json.dumps(record, separators=(",", ":")).encode() + b"\n"
        while line:
            line = line[os.write(self._journal, line):]
        os.fsync(self._journal)
        if keep:
            self.records.append(record)


def write_durable(path: Path, content: bytes) -> None:
    """Write `content` beside `path`, make it durable, and rename it there."""
    beside = path.with_name(f".{path.name}.tmp")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
