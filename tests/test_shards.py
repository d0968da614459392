"""Shards (F11): what a damaged, hostile or replaced file does to a source. Right, or refused by name; never wrong."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanopoe.data.files import Folder
from nanopoe.data.filters import WriteOptions
from nanopoe.data.shards import Source, open_source
from nanopoe.data.write import write_dataset
from nanopoe.errors import DataError
from tests.rows import loader, write

# -- bad files --------------------------------------------------------------------------------------------------------

def _table(folder: Path, array, column="text", **options) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({column: array}), folder / "s0.parquet", **options)


def _truncate(folder: Path) -> None:
    path = folder / "s0.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def _invalid_utf8(folder: Path) -> None:
    raw = pa.array([b"good", b"bad \xff\xfe", b"good"], pa.binary())
    _table(folder, pa.Array.from_buffers(pa.string(), 3, raw.buffers()))


BAD = {
    "missing folder": (lambda f: (f / "s0.parquet").unlink() or f.rmdir(), "no such folder"),
    "empty folder": (lambda f: (f / "s0.parquet").unlink(), r"no file matches \*.parquet"),
    "truncated": (_truncate, "s0.parquet.*cannot be read as parquet"),
    "no parquet": (lambda f: (f / "s0.parquet").write_bytes(b"hello"), "s0.parquet.*cannot be read as parquet"),
    "empty file": (lambda f: (f / "s0.parquet").write_bytes(b""), "s0.parquet.*cannot be read as parquet"),
    "wrong column": (lambda f: _table(f, pa.array(["a"]), "content"), "s0.parquet.*no column 'text'.*content"),
    "numbers": (lambda f: _table(f, pa.array([1, 2])), "s0.parquet.*int64, not string"),
    "binary": (lambda f: _table(f, pa.array([b"a"])), "s0.parquet.*binary, not string"),
    "no rows": (lambda f: _table(f, pa.array([], pa.string())), "s0.parquet.*no documents"),
    "no row groups": (lambda f: pq.ParquetWriter(f / "s0.parquet", pa.schema([("text", pa.string())])).close(),
                      "s0.parquet.*no documents"),
    "null": (lambda f: _table(f, pa.array(["a", "b", None])), "s0.parquet row group 0 row 2: null document"),
    "empty document": (lambda f: _table(f, pa.array(["a", ""])), "s0.parquet row group 0 row 1: empty document"),
    "second group": (lambda f: _table(f, pa.array(["a"] * 5 + [None]), row_group_size=2), "row group 2 row 1: null"),
    "invalid UTF-8": (_invalid_utf8, "s0.parquet row group 0 row 1: not UTF-8 .byte 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    folder = write(tmp_path / "d", [[["good"] * 3]])
    assert list(open_source("s", folder).texts()) == ["good"] * 3             # control
    damage, words = BAD[name]
    damage(folder)
    for read in (lambda s: list(s.texts()), lambda s: [s.text(i) for i in range(s.n_documents)]):
        with pytest.raises(DataError, match=words) as error:
            read(open_source("s", folder))
        assert "\n" not in str(error.value)


def test_a_file_changed_under_a_run(tmp_path):
    folder = write(tmp_path / "d", [[["one"] * 3], [["two"] * 3]])
    source, digest = open_source("s", folder), open_source("s", folder).digest
    assert source.text(0) == "one"                                            # control
    _table(folder, pa.array(["three"] * 500))
    (folder / "s0.parquet").rename(folder / "s1.parquet")
    with pytest.raises(DataError, match=r"s1.parquet row group 0: changed since it was opened"):
        source.text(4)
    assert open_source("s", folder).digest != digest


def test_a_file_replaced_in_mid_run_by_one_of_the_same_size(tmp_path, monkeypatch):
    """Same name, bytes, rows and time of change; only the text differs. The loader stops with the row group's name."""
    folder, other = (write(tmp_path / name, [[[f"{letter}{i:04d}" for i in range(64)]] * 8])
                     for name, letter in (("d", "a"), ("other", "b")))
    path, new = folder / "s0.parquet", other / "s0.parquet"
    assert path.stat().st_size == new.stat().st_size, "means something only if the size does not tell"
    monkeypatch.setattr("nanopoe.data.loader.PREFETCH_TOKENS", 1)
    source = open_source("s", folder)
    source._cache_bytes = 1                                   # every row group is read when it is wanted
    with loader([source], sequence_len=31, threads=2) as batches:
        next(batches)
        os.utime(new, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
        new.replace(path)
        seen: list[bool] = []
        with pytest.raises(DataError, match=r"s0.parquet row group \d: changed since it was opened"):
            seen.extend(bool((rows == 1 + ord("b")).any()) for rows, _ in itertools.islice(batches, 400))
        assert not any(seen)
    assert open_source("s", folder).digest != source.digest
    assert open_source("s", folder).text(0) == "b0000"        # control: it is a good file


# -- mutated files ----------------------------------------------------------------------------------------------------

def mutate(whole: bytes, draw: random.Random) -> bytes:
    """One of: flipped bits, other bytes, zeros, a cut, a repeat, a swap, more at the end."""
    at, size = draw.randrange(len(whole)), draw.choice((1, 8, 64, 500))
    kind = draw.randrange(7)
    if kind == 0:
        return whole[:at] + bytes([whole[at] ^ 1 << draw.randrange(8)]) + whole[at + 1:]
    if kind == 1:
        return whole[:at] + draw.randbytes(size) + whole[at + size:]
    if kind == 2:
        return whole[:at] + bytes(size) + whole[at + size:]
    if kind == 3:
        return whole[:at]
    if kind == 4:
        return whole[:at] + whole[at:at + size] + whole[at:]
    if kind == 5:
        to = draw.randrange(len(whole))
        return whole[:at] + whole[to:to + size] + whole[at + size:]
    return whole + draw.randbytes(size)


def outcomes(folder: Path, texts: list[str], checksum: bool, trials: int, seed: int) -> Counter:
    """What becomes of mutated files: "right", "wrong" or "refused"; how many errors name the shard, the row group."""
    folder.mkdir(exist_ok=True)
    _table(folder, pa.array(texts), row_group_size=100, compression="zstd", use_dictionary=seed % 2 == 0,
           write_page_checksum=checksum)
    path = folder / "s0.parquet"
    whole, draw, outcome = path.read_bytes(), random.Random(seed), Counter()
    for _ in range(trials):
        path.write_bytes(mutate(whole, draw))
        opened = False
        try:
            source = open_source("s", folder)
            opened = True
            found = [source.text(i) for i in range(source.n_documents)]
            outcome["right" if found == texts else "wrong"] += 1
        except DataError as error:
            outcome["refused"] += 1
            outcome["named"] += "s0.parquet" in str(error) and (not opened or "row group" in str(error))
            outcome["named"] -= "\n" in str(error)
    return outcome


def random_texts(n: int) -> list[str]:
    draw = random.Random(2)
    return ["".join(draw.choices("abcdefgh \n", k=draw.randrange(20, 200))) for _ in range(n)]


@pytest.mark.parametrize("seed", [1, 2])
def test_mutated_files_are_right_or_refused(tmp_path, seed):
    found = outcomes(tmp_path / "a", random_texts(300), True, 250, seed)
    assert found["wrong"] == 0
    assert found["right"] + found["refused"] == 250
    assert found["named"] == found["refused"] > 200


def test_what_the_checksums_are_for(tmp_path):
    """Control: without them some mutants are read as other text."""
    assert sum(outcomes(tmp_path / "b", random_texts(300), False, 150, seed)["wrong"] for seed in (1, 3)) > 0


# -- memory -----------------------------------------------------------------------------------------------------------

PEAK = """
import re, sys
from pathlib import Path
from nanopoe.data.shards import Source, open_shard
from nanopoe.errors import DataError
import pyarrow as pa, pyarrow.parquet as pq
def peak():                                      # not ru_maxrss, which begins with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) >> 10
before, refused = peak(), 0
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        if sys.argv[2] == "plain":
            pq.ParquetFile(path).read_row_group(0)
        else:
            source = Source("s", [open_shard(path)], group_bytes=32 << 20, cache_bytes=64 << 20)
            for i in range(source.n_documents):
                source.text(i)
    except DataError as error:
        assert path.name in str(error), error
        refused += 1
print(peak() - before, refused)
"""


def peak_mb(folder: Path, how: str = "guarded") -> tuple[int, int]:
    """(MB that reading all files of a folder takes at its peak, files refused), in a process of its own."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), how], capture_output=True, text=True, check=True)
    grown, refused = map(int, done.stdout.split())
    return grown, refused


def bomb(folder: Path, rows: int, size: int) -> None:
    """A file of a few hundred bytes with `rows` equal strings of `size` bytes behind one dictionary entry."""
    folder.mkdir()
    big = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array(["x" * size]))
    pq.write_table(pa.table({"text": big}), folder / "bomb.parquet", compression="zstd", store_schema=False)


def test_a_dictionary_bomb_takes_no_memory(tmp_path):
    bomb(tmp_path / "large", 2000, 1_000_000)                                 # 2 GB
    assert (tmp_path / "large" / "bomb.parquet").stat().st_size < 1000
    grown, refused = peak_mb(tmp_path / "large")
    assert grown < 32 + 200 and refused == 1
    bomb(tmp_path / "small", 500, 1_000_000)
    assert peak_mb(tmp_path / "small", "plain")[0] > 400                      # control: it is a bomb


def test_mutated_files_take_no_memory(tmp_path):
    """Sizes, counts and offsets that a mutated file claims are not believed."""
    _table(tmp_path / "whole", pa.array(random_texts(300)), row_group_size=100, compression="zstd",
           write_page_checksum=True)
    whole, draw = (tmp_path / "whole" / "s0.parquet").read_bytes(), random.Random(5)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    (tmp_path / "mutants").mkdir()
    for i in range(300):                                     # most of them in the footer, where sizes are
        at = draw.randrange(footer, len(whole)) if i % 3 else draw.randrange(len(whole))
        (tmp_path / "mutants" / f"m{i:03d}.parquet").write_bytes(
            whole[:at] + draw.choice((b"\xff" * 4, b"\x7f", draw.randbytes(3))) + whole[at + draw.choice((1, 3, 4)):])
    grown, refused = peak_mb(tmp_path / "mutants")
    assert grown < 32 + 200 and refused > 200


def test_the_cache_of_row_groups_is_bounded(tmp_path):
    folder = write(tmp_path / "d", [[[chr(97 + g) * 1000] * 10 for g in range(8)]])
    shards = open_source("s", folder).shards
    small = Source("s", shards, cache_bytes=25_000)                           # two groups of about 10 kB
    order = random.Random(2).choices(range(80), k=200)
    assert [small.text(i)[0] for i in order] == [chr(97 + i // 10) for i in order]
    assert len(small._cache) == 2
    large = Source("s", shards)
    _ = [large.text(i) for i in order]
    assert len(large._cache) == 8                                             # control


def test_corpus_loads(corpus):
    source = open_source("c", corpus, "shard_0000[0-5].parquet")
    assert source.n_documents == sum(s.rows for s in source.shards) > 10_000
    assert len(source.text(source.n_documents - 1)) >= 200


def test_a_source_is_read_from_several_threads(tmp_path):
    folder = write(tmp_path / "d", [[[chr(97 + g) * 50] * 10 for g in range(8)]])
    source = Source("s", open_source("s", folder).shards, cache_bytes=1200)   # two groups: they come and go
    wrong: list[int] = []

    def read(seed: int) -> None:
        order = random.Random(seed).choices(range(80), k=300)
        wrong.extend(i for i in order if source.text(i) != chr(97 + i // 10) * 50)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == [] and len(source._cache) == 2


@pytest.mark.parametrize("hurt, words", [
    (lambda folder: (folder / "shard_00000.parquet").unlink(), "is in the manifest but not there"),
    (lambda folder: (folder / "more.parquet").write_bytes((folder / "shard_00000.parquet").read_bytes()),
     "is not in the manifest"),
    (lambda folder: _table(folder, ["another", "text"]) or (folder / "s0.parquet").rename(
        folder / "shard_00000.parquet"), r"bytes, the manifest says")])
def test_shards_that_are_not_the_manifests(tmp_path, hurt, words):
    options = WriteOptions(val_share=0.3, shard_bytes=64)
    (tmp_path / "texts").mkdir()
    for i in range(20):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"document {i}")
    write_dataset(Folder(tmp_path / "texts"), tmp_path / "data", options)
    folder = tmp_path / "data" / "train"
    assert open_source("made", folder).n_documents > 1                                                  # control
    hurt(folder)
    with pytest.raises(DataError, match=words):
        open_source("made", folder)
