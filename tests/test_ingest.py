"""From files to a dataset folder: real documents, a split that nothing moves, nothing lost, nothing half written."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.data.files import Folder
from nanopoe.data.filters import WriteOptions, cut_document
from nanopoe.data.hub import Hub
from nanopoe.data.ingest import Bad, Origin, Raw, Shape, Unit, transcript
from nanopoe.data.shards import open_source
from nanopoe.data.stdlib import documentation_page, stdlib_documents
from nanopoe.data.write import write_dataset
from nanopoe.errors import DataError
from nanopoe.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
STDLIB = Path(sysconfig.get_paths()["stdlib"])


@dataclass(frozen=True)
class Listed:
    """Documents of a test as an origin, `each` of them a unit."""

    documents: list[Raw | Bad]
    each: int = 10**9
    source: ClassVar[dict[str, Any]] = {"kind": "test"}
    label: ClassVar[str] = "test "

    def units(self) -> list[Unit]:
        return [Unit(str(i), None, (str(i),)) for i in range(-(-len(self.documents) // self.each))]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        first = int(unit.name) * self.each
        yield from ((document, 0) for document in self.documents[first:first + self.each][start:])


def some(n: int, words: str = "document") -> Listed:
    return Listed([Raw(f"{words} number {i}\n" * 3, f"row {i}") for i in range(n)])


def rows_of(origin: Origin) -> list[Raw | Bad]:
    return [row for unit in origin.units() for row, _ in origin.read(unit, 0)]


def texts_of(origin: Origin) -> list[str]:
    """Of all rows, which must be documents."""
    rows = rows_of(origin)
    assert all(isinstance(row, Raw) for row in rows), rows
    return [row.text for row in rows if isinstance(row, Raw)]


def read(folder: Path, split: str) -> list[str]:
    return list(open_source(split, folder / split).texts())


def script(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True)


# -- cutting ----------------------------------------------------------------------------------------------------------

@settings(max_examples=200, deadline=None)
@given(st.text("ab \n", max_size=400), st.integers(1, 50))
def test_cuts_lose_nothing(text, limit):
    pieces = list(cut_document(text, limit))
    assert "".join(pieces) == text
    assert all(len(piece) <= limit for piece in pieces)


def test_cuts_prefer_definitions():
    code = "def a():\n    x = 1\n\n    return x\n\n\n" + "def b():\n    y = 2\n\n    return y\n\n\n" * 2
    pieces = list(cut_document(code, 50))
    assert len(pieces) == 3
    assert all(piece.startswith("def ") for piece in pieces)
    assert list(cut_document(code, 10**6)) == [code]                          # control


# -- sources ----------------------------------------------------------------------------------------------------------

def test_stdlib_sources_and_documentation(tmp_path):
    documents = list(stdlib_documents(STDLIB / "json"))
    assert documents == list(stdlib_documents(STDLIB / "json"))
    code = [d for d in documents if "def loads(" in d.text]
    page = [d for d in documents if d.text.startswith("Module __init__") or "loads(s, *, cls=None" in d.text]
    assert code
    assert page
    assert {d.group for d in documents} >= {"decoder.py", "encoder.py"}
    (tmp_path / "test").mkdir()
    (tmp_path / "pydoc_data").mkdir()
    (tmp_path / "test" / "test_x.py").write_text("no = 'tests'\n")
    (tmp_path / "pydoc_data" / "topics.py").write_bytes((STDLIB / "pydoc_data" / "topics.py").read_bytes())
    (tmp_path / "broken.py").write_text("def (:\n")
    topics = list(stdlib_documents(tmp_path))
    assert len(topics) > 50
    assert all("topics.py" in d.where for d in topics)


def test_documentation_page_is_of_public_definitions():
    tree = ast.parse('"""About."""\ndef f(a, b=1):\n    """Adds."""\ndef _g():\n    """Hidden."""\n'
                     'class C(Base):\n    """Kind."""\n    def m(self):\n        """Method."""\n'
                     '    def n(self): pass\n')
    page = documentation_page(tree, "mod")
    for part in ("Module mod\n\nAbout.", "mod.f(a, b=1)\n\nAdds.", "mod.C(Base)\n\nKind.", "mod.C.m(self)\n\nMethod."):
        assert part in page
    assert "Hidden" not in page
    assert "mod.C.n" not in page
    assert documentation_page(ast.parse("x = 1"), "mod") == ""


def test_folder_of_everything(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("plain", encoding="utf-8")
    (tmp_path / "sub" / "b.md").write_text("# mark", encoding="utf-8")
    lines = "".join(json.dumps({"text": f"line {i}", "id": i}) + "\n" for i in range(3))
    (tmp_path / "c.jsonl").write_text("\n" + lines)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    with pa.CompressedOutputStream(str(tmp_path / "e.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    pq.write_table(pa.table({"text": ["from parquet", "too"]}), tmp_path / "f.parquet", row_group_size=1)
    (tmp_path / "g.json").write_text(json.dumps([{"text": "of an"}, {"text": "array"}]))
    (tmp_path / "h.png").write_bytes(b"\x89PNG")
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / "not_mine.py").write_text("import os")
    folder = Folder(tmp_path)
    everything = ["plain", *["line 0", "line 1", "line 2"] * 3, "from parquet", "too", "of an", "array", "# mark"]
    assert texts_of(folder) == everything
    for unit in folder.units():                                               # from any row on, with the bytes read
        whole = list(folder.read(unit, 0))
        assert whole[-1][1] == unit.size
        assert [read for _, read in whole] == sorted(read for _, read in whole)
        for start in range(len(whole) + 1):
            assert list(folder.read(unit, start)) == whole[start:]


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"caf\xe9", r"a.txt: not UTF-8 \(byte 3\)"),
    ("a.txt", b"  \n", "a.txt: empty text"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2: not JSON"),
    ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xff"}\n', "a.jsonl line 3: not UTF-8"),
    ("a.jsonl", b'{"content": "x"}\n', "a.jsonl line 1: no column 'text', there is: content.*--column"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl line 1: null text"),
    ("a.jsonl", b'{"text": 7}\n', "a.jsonl line 1: not a string: column 'text' is int"),
    ("a.jsonl", b'{"text": ""}\n', "a.jsonl line 1: empty text"),
    ("a.jsonl", b'{"text": "\\ud800"}\n', "a.jsonl line 1: has a lone surrogate"),
    ("a.jsonl", b'{"text": "' + b"x" * (65 << 20) + b'"}\n', "a.jsonl line 1: longer than 64 MB"),
    ("a.txt", b"x" * (65 << 20), "a.txt: longer than 64 MB"),
    ("a.jsonl", b"[1]\n", "a.jsonl line 1: no column"),
    ("a.json", b'[{"text": "x"}, {"text": 1}]', "a.json row 1: not a string"),
])
def test_bad_rows_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    good = "".join(json.dumps({"text": f"fine {i}"}) + "\n" for i in range(99))
    (tmp_path / "z.jsonl").write_text(good)
    options = WriteOptions(val_share=0.3)
    with pytest.raises(DataError, match=f"{words}.*--skip-bad") as error:
        write_dataset(Folder(tmp_path), tmp_path / "d", options)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert not (tmp_path / "d.partial").exists()
    manifest = write_dataset(Folder(tmp_path), tmp_path / "d", WriteOptions(val_share=0.3, skip_bad=1))
    assert sum(manifest["counts"]["bad"].values()) == 1
    left_out, = manifest["counts"]["left_out"]
    assert left_out["where"].startswith(name)
    assert str(tmp_path) not in json.dumps(manifest)
    assert {f"fine {i}" for i in range(99)} <= {*read(tmp_path / "d", "train"), *read(tmp_path / "d", "val")}


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-9], "a.jsonl.gz: cannot be read"),
    ("a.jsonl", b"", "a.jsonl: no rows: the file is empty"),
    ("a.jsonl", b"\n\n", "a.jsonl: no rows"),
    ("a.json", b"[]", "a.json: no rows"),
    ("a.json", b'{"text": "x"}', "a.json: not an array but dict"),
    ("a.json", b'[{"text": "x"}', "a.json: not JSON"),
    ("a.parquet", b"PAR1", "a.parquet: cannot be read"),
    ("a.png", b"", "nothing to read"),
])
def test_bad_files_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        rows_of(Folder(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / name).unlink()
    (tmp_path / "good.txt").write_text("fine")
    assert texts_of(Folder(tmp_path)) == ["fine"]                             # control


def test_bad_parquet_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    bytes_as_text = pa.array([b"good", b"\xff\xfe", None, b"fine"]).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": bytes_as_text}), path, row_group_size=3)
    rows = rows_of(Folder(tmp_path))
    assert rows == [Raw("good", "a.parquet row group 0 row 0"),
                    Bad("not UTF-8", "a.parquet row group 0 row 1", " (byte 0)"),
                    Bad("null text", "a.parquet row group 0 row 2"), Raw("fine", "a.parquet row group 1 row 0")]
    for column, words in (({"body": ["x"]}, "no column 'text', there is: body"), ({"text": [1]}, "is int64, not str"),
                          ({"text": pa.array([], pa.string())}, "a.parquet: no rows")):
        pq.write_table(pa.table(column), path)
        with pytest.raises(DataError, match=words):
            rows_of(Folder(tmp_path))


def test_turns_as_a_transcript(tmp_path):
    turns = [{"from": "human", "value": " Hi. "}, {"from": "gpt", "value": "Hello."}]
    same = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert transcript(turns) == transcript(same) == "User: Hi.\n\nAssistant: Hello."
    for bad in ("text", [], ["x"], [{"role": "user"}], None):
        assert transcript(bad) is None
    pq.write_table(pa.table({"messages": [same, []]}), tmp_path / "a.parquet")
    shape = Shape("messages", transcript=True)
    assert rows_of(Folder(tmp_path, shape)) == [
        Raw("User: Hi.\n\nAssistant: Hello.", "a.parquet row group 0 row 0"),
        Bad("not a list of turns", "a.parquet row group 0 row 1", " in column 'messages'")]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_hub_reads_what_datasets_reads(tmp_path, kind):
    """A local folder is a dataset too, so the streaming path runs without a network."""
    for i in range(3):
        rows = [{"text": f"row {i} {j}", "other": j} for j in range(5)]
        if kind == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"train-{i}.parquet")
        else:
            (tmp_path / f"train-{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    hub = Hub(str(tmp_path)).resolved()
    units = hub.units()
    assert [unit.name for unit in units] == ["shard 0 of 3", "shard 1 of 3", "shard 2 of 3"]
    assert texts_of(hub) == [f"row {i} {j}" for i in range(3) for j in range(5)]
    assert [row for row, _ in hub.read(units[1], 3)] == [Raw("row 1 3", "shard 1 of 3 row 3"),
                                                         Raw("row 1 4", "shard 1 of 3 row 4")]
    assert texts_of(Hub(str(tmp_path), files=f"*-2.{kind}")) == [f"row 2 {j}" for j in range(5)]
    if kind == "parquet":                                                     # no other column is even read
        assert list(hub._open().features) == ["text"]
    with pytest.raises(DataError, match=r"no column 'body', there is: text, other.*--column"):
        write_dataset(Hub(str(tmp_path), shape=Shape("body")), tmp_path / "out", WriteOptions())
    with pytest.raises(DataError, match=r"cannot be opened.*--split"):
        Hub(str(tmp_path), split="nowhere").units()
    with pytest.raises(DataError, match="unknown kind of file"):
        Hub(str(tmp_path), files="*.bin").units()


# -- writing ----------------------------------------------------------------------------------------------------------

def test_a_dataset_holds_every_document_once(tmp_path):
    origin = some(30_000)
    manifest = write_dataset(origin, tmp_path / "d", WriteOptions(shard_bytes=600_000))
    train, val = read(tmp_path / "d", "train"), read(tmp_path / "d", "val")
    assert sorted(train + val) == sorted(d.text.strip("\n") for d in origin.documents)
    assert 500 <= len(val) <= 700                                             # 2 % of 30,000
    assert train != sorted(train)                                             # shuffled
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) >= 3
    assert sum(s["rows"] for s in shards) == len(train) == manifest["splits"]["train"]["documents"]
    assert sum(s["text_bytes"] for s in shards) == sum(len(t) for t in train)
    for shard in shards:
        path = tmp_path / "d" / "train" / shard["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        assert path.stat().st_size == shard["bytes"]
        group = pq.ParquetFile(path).metadata.row_group(0)
        assert group.num_rows <= 1024
        assert group.column(0).compression == "ZSTD"
    assert json.loads((tmp_path / "d" / "manifest.json").read_text()) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_the_split_depends_on_the_document_alone(tmp_path):
    def splits(name, origin, seed):
        write_dataset(origin, tmp_path / name, WriteOptions(seed=seed))
        return read(tmp_path / name, "train"), read(tmp_path / name, "val")

    train, val = splits("a", some(1500), 0)
    other_train, other_val = splits("b", some(1500), 1)
    assert set(val) == set(other_val)
    assert train != other_train                                               # control: the seed does shuffle
    assert set(splits("c", some(700), 0)[1]) == {t for t in val if int(t.split()[2]) < 700}
    assert splits("d", some(1500), 0) == (train, val)


def test_a_group_stays_together(tmp_path):
    documents = [Raw(f"part {part} of {group}", "", f"group {group}") for group in range(300) for part in range(3)]
    write_dataset(Listed(documents), tmp_path / "d", WriteOptions(val_share=0.1))
    val = [text.split(" of ")[1] for text in read(tmp_path / "d", "val")]
    assert val
    assert all(val.count(group) == 3 for group in val)


def test_limits(tmp_path):
    manifest = write_dataset(Listed([*some(9).documents, Raw("\n" * 99 + "word", "blank"), *some(500).documents]),
                             tmp_path / "d", WriteOptions(max_bytes=5000, max_chars=30, val_share=0.3))
    texts = read(tmp_path / "d", "train") + read(tmp_path / "d", "val")
    assert 4500 < sum(len(t) for t in texts) <= 5000
    assert max(len(t) for t in texts) <= 30
    assert manifest["counts"]["blank_pieces"] >= 2


def test_filters_count_and_name_what_they_leave_out(tmp_path):
    documents = [*some(300).documents, *some(30).documents, Raw("short", "row 330"), Raw("long " * 99, "row 331")]
    manifest = write_dataset(Listed(documents), tmp_path / "d", WriteOptions(
        val_share=0.1, min_chars=10, skip_over_chars=200, dedup=True))
    counts = manifest["counts"]
    assert counts["skipped"] == {"duplicate": 30, "shorter than 10 characters": 1, "longer than 200 characters": 1}
    assert (counts["rows"], counts["documents"], counts["bad"]) == (332, 300, {})
    assert counts["left_out"] == [{"where": f"row {i}", "reason": "duplicate"} for i in range(20)]
    texts = read(tmp_path / "d", "train") + read(tmp_path / "d", "val")
    assert sorted(texts) == sorted(d.text.strip("\n") for d in some(300).documents)
    again = write_dataset(Listed(documents), tmp_path / "e", WriteOptions(val_share=0.1))        # control: no filter
    assert again["counts"]["skipped"] == {}
    assert again["counts"]["documents"] == 332


def test_bad_rows_up_to_a_number(tmp_path):
    documents: list[Any] = [*some(300).documents, *(Bad("null text", f"row {i}") for i in range(300, 303))]
    with pytest.raises(DataError, match=r"test row 302: null text.*--skip-bad 2 is used up"):
        write_dataset(Listed(documents), tmp_path / "d", WriteOptions(val_share=0.1, skip_bad=2))
    manifest = write_dataset(Listed(documents), tmp_path / "d", WriteOptions(val_share=0.1, skip_bad=3))
    assert manifest["counts"]["bad"] == {"null text": 3}


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    out = tmp_path / "d"
    write_dataset(some(300), out, WriteOptions(val_share=0.1))
    before = read(out, "train")
    with pytest.raises(DataError, match=r"not empty.*--overwrite"):
        write_dataset(some(301, "other"), out, WriteOptions(val_share=0.1, seed=1))
    with pytest.raises(DataError, match="test line 101: broken"):
        write_dataset(Listed([*some(100).documents, Bad("broken", "line 101")]), out,
                      WriteOptions(val_share=0.1, overwrite=True))
    with pytest.raises(DataError, match="no document for val"):
        write_dataset(some(2), out, WriteOptions(val_share=1e-6, overwrite=True))
    assert read(out, "train") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    write_dataset(some(300, "other"), out, WriteOptions(val_share=0.1, overwrite=True))
    assert read(out, "train") != before                                       # control
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match="no dataset and will not be deleted"):
        write_dataset(some(300), foreign, WriteOptions(val_share=0.1, overwrite=True))
    assert (foreign / "thesis.txt").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "home"]


# -- scripts ----------------------------------------------------------------------------------------------------------

def test_scripts_from_folder_to_tokenizer(tmp_path):
    text = (STDLIB / "argparse.py").read_text(encoding="utf-8")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(text, encoding="utf-8")
    data, out = str(tmp_path / "data"), str(tmp_path / "tok")
    done = script("scripts.prepare_data", "folder", str(tmp_path / "in"), "--out", data, "--max-chars", "500",
                  "--val-percent", "10")
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout

    def train(data: str, size: str, out: str, *more: str) -> subprocess.CompletedProcess[str]:
        return script("scripts.train_tokenizer", "--data", data, "--vocab-size", size, "--out", out, *more)

    done = train(data, "500", out)
    assert done.returncode == 0, done.stderr
    assert "500 tokens" in done.stdout
    assert 1.5 < float(done.stdout.rsplit(":", 1)[1]) < 6                     # bytes per token
    for refused, words in ((train(data, "500", out), "is not empty"),
                           (train(str(tmp_path / "none"), "500", out + "2"), "no such folder"),
                           (train(data, "90000", out + "2"), "smaller vocabulary")):
        assert refused.returncode == 3
        assert words in refused.stderr
        assert "Traceback" not in refused.stderr
    assert not Path(out + "2").exists()
    assert train(data, "400", out, "--overwrite").returncode == 0             # control
    assert Tokenizer.load(out).vocab_size == 400


def test_script_says_what_is_wrong(tmp_path):
    done = script("scripts.prepare_data", "hub", "no-such/dataset", "--out", str(tmp_path / "d"))
    assert done.returncode == 3
    assert done.stderr.startswith("error[data] dataset no-such/dataset: cannot be opened")
    assert "Traceback" not in done.stderr
    for wrong in (["--max-mb", "0"], ["--workers", "0"], ["--part", "3/2"], ["--part", "x"], ["--min-chars", "-1"]):
        done = script("scripts.prepare_data", "folder", str(tmp_path), "--out", str(tmp_path / "d"), *wrong)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert not (tmp_path / "d").exists()
