"""An ingest that is killed, or shared by processes or machines: the same bytes as of one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanopoe.data import partial as partial_module
from nanopoe.data.files import Folder
from nanopoe.data.filters import WriteOptions
from nanopoe.data.ingest import Part
from nanopoe.data.parallel import LANES
from nanopoe.data.partial import JOURNAL, partial_of
from nanopoe.data.parts import merge_all, merge_parts, part_folder
from nanopoe.data.write import write_dataset
from nanopoe.errors import ConfigError, DataError, StorageError
from tests.ranks import forked

OPTIONS = WriteOptions(val_share=0.1, max_chars=300, min_chars=20, dedup=True, shard_bytes=60_000, skip_bad=99)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of every kind, more than there are lanes, 4 MB of text; with duplicates and bad rows."""
    folder, draw = tmp_path_factory.mktemp("inputs"), random.Random(0)
    words = ["".join(draw.choice("aeioubdklmnrst") for _ in range(draw.randint(2, 7))) for _ in range(300)]

    def rows(n: int) -> list[dict[str, Any]]:
        texts = [" ".join(draw.choice(words) for _ in range(draw.randint(1, 120))) for _ in range(n)]
        return [{"text": text} for text in [*texts, *texts[:5]]]

    for i in range(LANES + 5):
        lines = "".join(json.dumps(row) + "\n" for row in [*rows(400), {"text": None}])
        (folder / f"{i:02}.jsonl").write_text(lines)
    pq.write_table(pa.Table.from_pylist(rows(1500)), folder / "big.parquet", row_group_size=200)
    with pa.CompressedOutputStream(str(folder / "more.jsonl.zst"), "zstd") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows(1500)).encode())
    for i in range(40):
        (folder / f"text_{i:02}.txt").write_text(rows(1)[0]["text"] * 30)
    return folder


def contents(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def whole(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an ingest that nothing disturbs writes."""
    out = tmp_path_factory.mktemp("whole") / "d"
    write_dataset(Folder(inputs), out, OPTIONS)
    found = contents(out)
    assert len(found) > 100                                                   # many moments to be killed at
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["counts"]["skipped"]["duplicate"] >= 5 * (LANES + 5)
    assert manifest["counts"]["bad"] == {"null text": LANES + 5}
    return found


def _ingest(inputs: Path, out: Path, workers: int) -> None:
    write_dataset(Folder(inputs), out, OPTIONS, workers=workers)


def started(inputs: Path, out: Path, workers: int = 1) -> Any:
    process = forked().Process(target=_ingest, args=(inputs, out, workers))
    process.start()
    return process


def children_of(pid: int) -> list[int]:
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# -- killed -----------------------------------------------------------------------------------------------------------

def test_killed_at_random_moments(inputs: Path, whole: dict[str, str], tmp_path: Path) -> None:
    """kill -9, again and again, until it is done: at least 20 kills in several ingests."""
    draw, kills, kept, rounds, end = random.Random(1), 0, 0, 0, time.monotonic() + 180
    while kills < 20:
        out, longest = tmp_path / f"d{rounds}", 0.25
        rounds += 1
        while not (out / "manifest.json").is_file():
            assert time.monotonic() < end, "no progress between the kills"
            journal = partial_of(out) / JOURNAL
            before = contents(partial_of(out)) if journal.is_file() else {}
            vouched = journal.read_bytes().count(b"\n") - 1 if before else 0
            process = started(inputs, out)
            process.join(draw.uniform(0.02, longest))
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
                process.join()
                kills += 1
                now = contents(partial_of(out)) if partial_of(out).is_dir() else contents(out)
                finished = {name: sha for name, sha in before.items() if name.endswith(".parquet")}
                longest *= 1 if len(now) > len(before) else 1.5               # a machine that is busy
                kept += sum(now.get(name) == sha for name, sha in finished.items())
                assert sum(now.get(name) == sha for name, sha in finished.items()) >= vouched     # not written again
            else:
                assert process.exitcode == 0
        assert contents(out) == whole
        assert {p.name for p in tmp_path.iterdir()} == {f"d{i}" for i in range(rounds)}       # nothing left behind
    assert kept > 50                                                          # control: there was something to keep


def test_finished_shards_are_not_written_again(inputs: Path, whole: dict[str, str], tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before every single change of the disk in turn, each of which may be the last."""
    real, written = partial_module.write_durable, []
    stop_at = 0

    def counting(path: Path, content: bytes) -> None:
        if len(written) == stop_at:
            raise KeyboardInterrupt
        written.append(path.relative_to(path.parent.parent).as_posix())
        real(path, content)

    monkeypatch.setattr(partial_module, "write_durable", counting)
    out = tmp_path / "d"
    while not out.exists():
        stop_at = len(written) + 3
        try:
            write_dataset(Folder(inputs), out, OPTIONS)
        except KeyboardInterrupt:
            assert partial_of(out).is_dir()
    assert contents(out) == whole
    again = [name for name in set(written) if written.count(name) > 1]
    assert len(again) < len(set(written)) / 2                                 # only those of a commit that was cut
    assert all(written.count(name) == 2 for name in again)


def test_a_torn_journal_line_is_written_again(inputs: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "d"
    stop_after(inputs, out, 4)
    journal = partial_of(out) / JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) > 3
    os.truncate(journal, sum(map(len, lines[:-1])) + 5)
    (partial_of(out) / "train" / ".shard_00099.parquet.tmp").write_bytes(b"half")
    stop_after(inputs, out, 2)                                                # what follows the torn line is whole
    write_dataset(Folder(inputs), out, OPTIONS)
    assert contents(out) == whole
    damaged = tmp_path / "e"
    stop_after(inputs, damaged, 4)
    (partial_of(damaged) / JOURNAL).write_bytes(lines[0] + b"{}\n" + lines[2])
    with pytest.raises(DataError, match=r"the journal is damaged.*remove .*e.partial"):
        write_dataset(Folder(inputs), damaged, OPTIONS)
    (partial_of(damaged) / JOURNAL).write_bytes(b"".join(lines[:3]))
    shard = next((partial_of(damaged) / "train").glob("*.parquet"))
    os.truncate(shard, 99)
    with pytest.raises(DataError, match=rf"{shard.name}: is not as the journal says"):
        write_dataset(Folder(inputs), damaged, OPTIONS)


def stop_after(inputs: Path, out: Path, commits: int) -> None:
    """Interrupt an ingest after so many commits."""
    real, count = partial_module.Partial.commit, 0

    def commit(self: Any, *args: Any) -> None:
        nonlocal count
        real(self, *args)
        count += 1
        if count == commits:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial_module.Partial, "commit", commit)
        with pytest.raises(KeyboardInterrupt):
            write_dataset(Folder(inputs), out, OPTIONS)
    assert partial_of(out).is_dir()


@pytest.mark.parametrize("changes, words", [
    ({"seed": 1}, "seed 0, now it is 1"), ({"max_chars": 200}, "max_chars 300, now it is 200"),
    ({"dedup": False}, "dedup True"), ({"max_bytes": 10**6}, "max_bytes None"), ({"val_share": 0.2}, "val_share"),
])
def test_other_options_are_refused(inputs: Path, whole: dict[str, str], tmp_path: Path, changes: dict[str, Any],
                                   words: str) -> None:
    out = tmp_path / "d"
    stop_after(inputs, out, 2)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=rf"d\.partial: was begun with {words}.*remove the folder"):
        write_dataset(Folder(inputs), out, WriteOptions(**{**OPTIONS.__dict__, **changes}))
    assert contents(tmp_path) == before
    write_dataset(Folder(inputs), out, WriteOptions(**{**OPTIONS.__dict__, "skip_bad": 100}))       # control
    assert contents(out) == whole


def test_other_inputs_are_refused(inputs: Path, tmp_path: Path) -> None:
    mine, out = tmp_path / "inputs", tmp_path / "d"
    shutil.copytree(inputs, mine)
    stop_after(mine, out, 2)
    with open(mine / "00.jsonl", "a") as file:
        file.write('{"text": "one more document that is long enough"}\n')
    with pytest.raises(ConfigError, match=r"d\.partial: was begun with (bytes|digest)"):
        write_dataset(Folder(mine), out, OPTIONS)


def test_two_processes_do_not_write_one_dataset(inputs: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "d"
    process = started(inputs, out)
    try:
        while not (partial_of(out) / JOURNAL).is_file():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGSTOP)
        with pytest.raises(DataError, match=r"d\.partial: another process is writing it"):
            write_dataset(Folder(inputs), out, OPTIONS)
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join()
    assert contents(out) == whole


def test_a_finished_ingest_is_not_done_again(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    manifest = write_dataset(Folder(inputs), out, OPTIONS)
    stamps = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    assert write_dataset(Folder(inputs), out, OPTIONS) == manifest
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == stamps
    write_dataset(Folder(inputs), out, WriteOptions(**{**OPTIONS.__dict__, "overwrite": True}))     # control
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} != stamps


def test_a_full_disk_is_told_and_survived(inputs: Path, whole: dict[str, str], tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, left = tmp_path / "d", os.fsync, 9

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left on device.*start again to go on"):
            write_dataset(Folder(inputs), out, OPTIONS)
    assert (partial_of(out) / JOURNAL).is_file()
    write_dataset(Folder(inputs), out, OPTIONS)
    assert contents(out) == whole


# -- shared -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_nothing(inputs: Path, whole: dict[str, str], tmp_path: Path,
                                               workers: int) -> None:
    stop_after(inputs, tmp_path / "d", 5)                                     # and may change when it goes on
    for name in ("d", "e"):
        write_dataset(Folder(inputs), tmp_path / name, OPTIONS, workers=workers)
        assert contents(tmp_path / name) == whole


def test_workers_end_with_the_one_they_read_for(inputs: Path, whole: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "d"
    process = started(inputs, out, workers=2)
    end = time.monotonic() + 30
    while not (partial_of(out) / JOURNAL).is_file() or len(readers := children_of(process.pid)) < 2:
        assert time.monotonic() < end
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while any(Path(f"/proc/{pid}").exists() for pid in readers):
        assert time.monotonic() < end, "a reader outlives the ingest"
        time.sleep(0.02)
    write_dataset(Folder(inputs), out, OPTIONS)
    assert contents(out) == whole


def test_a_reader_that_dies_and_one_that_finds_a_bad_row(inputs: Path, whole: dict[str, str], tmp_path: Path) -> None:
    bad = WriteOptions(**{**OPTIONS.__dict__, "skip_bad": 3})
    errors = []
    for workers in (1, 3):
        with pytest.raises(DataError, match=r"jsonl line 406: null text") as error:
            write_dataset(Folder(inputs), tmp_path / f"d{workers}", bad, workers=workers)
        errors.append(str(error.value))
    assert errors[0] == errors[1]
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.jsonl").write_text('{"text": "good enough for a document"}\n')
    os.truncate(tmp_path / "broken" / "2.jsonl", 0)
    with pytest.raises(DataError, match=r"2\.jsonl: no rows"):
        write_dataset(Folder(tmp_path / "broken"), tmp_path / "e", OPTIONS, workers=2)


def test_parts_of_machines_are_merged(inputs: Path, tmp_path: Path) -> None:
    options = WriteOptions(**{**OPTIONS.__dict__, "dedup": False})
    write_dataset(Folder(inputs), tmp_path / "one", options)
    out = tmp_path / "d"
    for i in (3, 1, 2):
        if i == 2:
            with pytest.raises(DataError, match="part-00002-of-00003 not finished"):
                merge_parts(out)
        write_dataset(Part(Folder(inputs), i, 3), part_folder(out, i, 3), options)
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    manifest, = merge_all(out).values()
    assert sorted(p.name for p in out.iterdir()) == ["manifest.json", "train", "val"]
    for split in ("train", "val"):
        texts = [sorted(t for p in (folder / split).glob("*.parquet") for t in pq.read_table(p)["text"].to_pylist())
                 for folder in (tmp_path / "one", out)]
        assert texts[0] == texts[1]
        listed = manifest["splits"][split]["shards"]
        assert {s["name"]: s["sha256"] for s in listed} == {
            p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (out / split).iterdir()}
        assert sum(s["rows"] for s in listed) == manifest["splits"][split]["documents"] == len(texts[0])
    first = part_folder(copy, 1, 3)                                           # a merge that was stopped half way
    (copy / "train").mkdir()
    shard = next((first / "train").iterdir())
    shard.rename(copy / "train" / f"part_00001_{shard.name}")
    merge_parts(copy)
    assert contents(copy) == contents(out)
    with pytest.raises(DataError, match="has no part-"):
        merge_all(copy)


def test_parts_that_do_not_fit_are_refused(inputs: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    write_dataset(Part(Folder(inputs), 1, 2), part_folder(out, 1, 2), OPTIONS)
    write_dataset(Part(Folder(inputs), 2, 2), part_folder(out, 2, 2),
                  WriteOptions(**{**OPTIONS.__dict__, "seed": 5}))
    with pytest.raises(DataError, match=r"part-00002-of-00002: seed is 5, of part 1 it is 0"):
        merge_parts(out)
    with pytest.raises(DataError, match="cannot be shared by 99"):
        Part(Folder(inputs), 1, 99).units()
