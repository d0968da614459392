"""From files to a dataset folder: real documents, a split that nothing moves, nothing lost, nothing half written."""

from __future__ import annotations

import ast
import gzip
import hashlib
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.data.ingest import Raw, documentation_page, folder_documents, hub_documents, stdlib_documents
from nanopoe.data.shards import open_source
from nanopoe.data.write import WriteOptions, cut_document, write_dataset
from nanopoe.errors import DataError
from nanopoe.tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
STDLIB = Path(sysconfig.get_paths()["stdlib"])


def some(n: int, words: str = "document") -> list[Raw]:
    return [Raw(f"{words} number {i}\n" * 3, f"test {i}") for i in range(n)]


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
    (tmp_path / "c.jsonl").write_text(lines + "\n")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    with pa.CompressedOutputStream(str(tmp_path / "e.jsonl.zst"), "zstd") as file:
        file.write(lines.encode())
    pq.write_table(pa.table({"text": ["from parquet"]}), tmp_path / "f.parquet")
    (tmp_path / "g.png").write_bytes(b"\x89PNG")
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / "not_mine.py").write_text("import os")
    texts = [d.text for d in folder_documents(tmp_path)]
    assert texts == ["plain", *["line 0", "line 1", "line 2"] * 3, "from parquet", "# mark"]


@pytest.mark.parametrize("name, content, words", [
    ("a.txt", b"caf\xe9", "a.txt: not UTF-8"),
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl line 2: not JSON"),
    ("a.jsonl", b'{"content": "x"}\n', "a.jsonl line 1: no column 'text', there is: content.*--column"),
    ("a.jsonl", b'{"text": null}\n', "a.jsonl line 1: column 'text' is NoneType"),
    ("a.jsonl", b"[1]\n", "a.jsonl line 1: no column"),
    ("a.jsonl.gz", b"no gzip", "a.jsonl.gz.*cannot be read"),
    ("a.parquet", b"PAR1", "a.parquet.*cannot be read as parquet"),
    ("a.png", b"", "nothing to read"),
])
def test_bad_folders_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words) as error:
        list(folder_documents(tmp_path))
    assert "\n" not in str(error.value)
    (tmp_path / name).unlink()
    (tmp_path / "good.txt").write_text("fine")
    assert [d.text for d in folder_documents(tmp_path)] == ["fine"]           # control


def test_hub_reads_what_datasets_reads(tmp_path):
    """A local folder is a dataset too, so the streaming path runs without a network."""
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"text": [f"row {i}" for i in range(5)]}), data / "train-00000.parquet")
    assert [d.text for d in hub_documents(str(data))] == [f"row {i}" for i in range(5)]
    with pytest.raises(DataError, match=r"no column 'body', there is: text.*--column"):
        list(hub_documents(str(data), column="body"))
    with pytest.raises(DataError, match=r"cannot be opened.*--split"):
        list(hub_documents(str(data), split="nowhere"))


# -- writing ----------------------------------------------------------------------------------------------------------

def test_a_dataset_holds_every_document_once(tmp_path):
    documents = some(3000)
    manifest = write_dataset(documents, tmp_path / "d", {"kind": "test"}, WriteOptions(shard_bytes=60_000))
    train, val = read(tmp_path / "d", "train"), read(tmp_path / "d", "val")
    assert sorted(train + val) == sorted(d.text.strip("\n") for d in documents)
    assert 30 <= len(val) <= 90                                               # 2 % of 3000
    assert train != sorted(train)                                             # shuffled
    shards = manifest["splits"]["train"]["shards"]
    assert len(shards) >= 2
    assert sum(s["rows"] for s in shards) == len(train)
    for shard in shards:
        path = tmp_path / "d" / "train" / shard["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard["sha256"]
        group = pq.ParquetFile(path).metadata.row_group(0)
        assert group.num_rows <= 1024
        assert group.column(0).compression == "ZSTD"
    assert json.loads((tmp_path / "d" / "manifest.json").read_text()) == manifest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_the_split_depends_on_the_document_alone(tmp_path):
    def splits(name, documents, seed):
        write_dataset(documents, tmp_path / name, {}, WriteOptions(seed=seed))
        return read(tmp_path / name, "train"), read(tmp_path / name, "val")

    train, val = splits("a", some(1500), 0)
    other_train, other_val = splits("b", some(1500), 1)
    assert set(val) == set(other_val)
    assert train != other_train                                               # control: the seed does shuffle
    assert set(splits("c", some(700), 0)[1]) == {t for t in val if int(t.split()[2]) < 700}
    assert splits("d", some(1500), 0) == (train, val)


def test_a_group_stays_together(tmp_path):
    documents = [Raw(f"part {part} of {group}", "", f"group {group}") for group in range(300) for part in range(3)]
    write_dataset(documents, tmp_path / "d", {}, WriteOptions(val_share=0.1))
    val = [text.split(" of ")[1] for text in read(tmp_path / "d", "val")]
    assert val
    assert all(val.count(group) == 3 for group in val)


def test_limits(tmp_path):
    write_dataset(some(500) + [Raw(" \n\t", "blank")], tmp_path / "d", {},
                  WriteOptions(max_bytes=5000, max_chars=30, val_share=0.3))
    texts = read(tmp_path / "d", "train") + read(tmp_path / "d", "val")
    assert 4500 < sum(len(t) for t in texts) <= 5000
    assert max(len(t) for t in texts) <= 30


def test_nothing_is_overwritten_or_left_behind(tmp_path):
    out = tmp_path / "d"
    write_dataset(some(300), out, {}, WriteOptions(val_share=0.1))
    before = read(out, "train")
    with pytest.raises(DataError, match=r"not empty.*--overwrite"):
        write_dataset(some(300, "other"), out, {}, WriteOptions(val_share=0.1))

    def failing():
        yield from some(100)
        raise DataError("broken", "line 101")

    with pytest.raises(DataError, match="line 101"):
        write_dataset(failing(), out, {}, WriteOptions(val_share=0.1, overwrite=True))
    with pytest.raises(DataError, match="no document for val"):
        write_dataset(some(2), out, {}, WriteOptions(val_share=1e-6, overwrite=True))
    with pytest.raises(DataError, match="x 7: has a lone surrogate"):
        write_dataset([*some(9), Raw("\ud800", "x 7")], out, {}, WriteOptions(val_share=0.1, overwrite=True))
    assert read(out, "train") == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]
    write_dataset(some(300, "other"), out, {}, WriteOptions(val_share=0.1, overwrite=True))
    assert read(out, "train") != before                                       # control
    foreign = tmp_path / "home"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    with pytest.raises(DataError, match="no dataset and will not be deleted"):
        write_dataset(some(300), foreign, {}, WriteOptions(val_share=0.1, overwrite=True))
    assert (foreign / "thesis.txt").exists()


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
    done = script("scripts.prepare_data", "folder", str(tmp_path), "--out", str(tmp_path / "d"), "--max-mb", "0")
    assert done.returncode == 2
    assert not (tmp_path / "d").exists()
