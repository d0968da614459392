"""scripts.data and scripts.prepare_data as commands: what is damaged is named, what is whole is told."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanopoe.data import progress as progress_module
from nanopoe.data.filters import WriteOptions
from nanopoe.data.ingest import Raw
from nanopoe.data.inspect import sample, stats, verify
from nanopoe.data.manifest import check_manifest
from nanopoe.data.shards import open_source
from nanopoe.data.write import write_dataset
from nanopoe.errors import DataError
from nanopoe.tokenizer import Tokenizer
from tests.test_ingest import Listed, some

ROOT = Path(__file__).parents[1]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dataset") / "d"
    write_dataset(some(30_000), out, WriteOptions(shard_bytes=600_000))
    return out


@pytest.fixture
def dataset(whole: Path, tmp_path: Path) -> Path:
    """A dataset that may be damaged; its manifest lists several shards of train and of val."""
    shutil.copytree(whole, tmp_path / "d")
    return tmp_path / "d"


def shard_of(dataset: Path, number: int = 1) -> Path:
    return dataset / "train" / f"shard_{number:05d}.parquet"


# -- verify -----------------------------------------------------------------------------------------------------------

def test_verify_a_whole_dataset(dataset: Path, tmp_path: Path) -> None:
    done = run("scripts.data", "verify", dataset)
    assert (done.returncode, done.stderr) == (0, "")
    assert "shards are as the manifest says, 30,000 documents" in done.stdout
    (tmp_path / "mixture").mkdir()
    shutil.copytree(dataset, tmp_path / "mixture" / "a")
    shutil.copytree(dataset, tmp_path / "mixture" / "b")
    shard_of(tmp_path / "mixture" / "b").unlink()
    done = run("scripts.data", "verify", tmp_path / "mixture", "--json")
    assert done.returncode == 3
    bad = [shard for shard in json.loads(done.stdout) if shard["error"]]
    assert [(b["shard"], b["error"]) for b in bad] == [
        (str(shard_of(tmp_path / "mixture" / "b")), "is in the manifest but not there")]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def rewrite(path: Path, texts: Any) -> None:
    pq.write_table(pa.table({"text": texts}), path)


def relist(path: Path, **changes: object) -> None:
    """Make the manifest vouch for a shard as it is now, but for the changes."""
    manifest_path = path.parent.parent / "manifest.json"
    manifest = json.loads(manifest_path.read_text())
    shard = next(s for s in manifest["splits"][path.parent.name]["shards"] if s["name"] == path.name)
    shard |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **changes}
    manifest_path.write_text(json.dumps(manifest))


BROKEN = {
    "a bit": (flip, "content has SHA-256", False),
    "missing": (Path.unlink, "is in the manifest but not there", True),
    "cut": (lambda path: os.truncate(path, 99), "has 99 bytes, the manifest says", True),
    "empty": (lambda path: os.truncate(path, 0), "has 0 bytes, the manifest says", True),
    "foreign": (lambda path: shutil.copy(path, path.with_name("x.parquet")), "x.parquet: is not in the manifest", True),
    "rows": (lambda path: (rewrite(path, ["a"]), relist(path)), "has 1 rows, the manifest says", True),
    "no parquet": (lambda path: (path.write_bytes(b"x"), relist(path)), "cannot be read as parquet", True),
    "page": (lambda path: (flip(path), relist(path)), "shard_00001.parquet.*cannot be read as parquet|damaged", False),
    "not UTF-8": (lambda path: (rewrite(path, pa.array([b"ok", b"\xff"]).cast(pa.string(), safe=False)),
                                relist(path, rows=2)), "row group 0 row 1: not UTF-8", False),
    "null": (lambda path: (rewrite(path, ["ok", None]), relist(path, rows=2)), "row group 0 row 1: null document",
             False),
    "other texts": (lambda path: (rewrite(path, ["a"]), relist(path, rows=1)), "holds 1 bytes of text, the man", False),
}


@pytest.mark.parametrize("broken", BROKEN)
def test_verify_names_what_is_wrong(dataset: Path, broken: str) -> None:
    damage, words, quickly = BROKEN[broken]
    check_manifest(dataset / "train")                                         # control
    damage(shard_of(dataset))
    errors = [checked.error for checked in verify(dataset) if checked.error is not None]
    assert len(errors) == 1
    with pytest.raises(DataError, match=words) as error:
        raise errors[0]
    assert "\n" not in str(error.value)
    if quickly:                                                               # what sizes and rows can show
        with pytest.raises(DataError, match=words):
            check_manifest(dataset / "train")
    else:
        check_manifest(dataset / "train")
    check_manifest(dataset / "val")


def test_verify_as_a_command(dataset: Path) -> None:
    flip(shard_of(dataset, 0))
    shard_of(dataset, 1).unlink()
    done = run("scripts.data", "verify", dataset)
    assert done.returncode == 3
    lines = done.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("error[data] ") for line in lines)
    assert "shard_00000.parquet: content has SHA-256" in lines[0]


@pytest.mark.parametrize("content, words", [
    (None, "has no manifest.json"), (b"{", "is no manifest"), (b"[]", "is no manifest"), (b"{}", "is no manifest"),
    (b'{"format_version": 1}', "is of format 1, this program reads 2"), (b"\xff", "is no manifest"),
    (b'{"format_version": 2, "column": "text", "splits": {"train": {"shards": [{"name": 7}]}}}', "is no manifest"),
])
def test_bad_manifests(dataset: Path, content: bytes | None, words: str) -> None:
    path = dataset / "manifest.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match=words):
        list(verify(dataset))
    if content is None:
        check_manifest(dataset / "train")                                     # shards of others have none
    else:
        with pytest.raises(DataError, match=words):
            check_manifest(dataset / "train")


# -- stats and sample -------------------------------------------------------------------------------------------------

def test_stats_are_those_of_the_texts(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    rewrite(tmp_path / "shards" / "a.parquet", ["é" * 10, "b" * 20, "c" * 60])
    found = stats(tmp_path / "shards")["."]
    assert (found["documents"], found["text_bytes"]) == (3, 100)
    assert found["characters"] == {"mean": 30, "min": 10, "median": 20, "max": 60, **{
        key: pytest.approx(value) for key, value in (("p5", 11), ("p25", 15), ("p75", 40), ("p95", 56), ("p99", 59.2))}}
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    tokenizer.save(tmp_path / "tokenizer")
    done = run("scripts.data", "stats", tmp_path / "shards", "--tokenizer", tmp_path / "tokenizer", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["."]["tokens"]["sum"] == 100               # a token for each byte
    done = run("scripts.data", "stats", dataset)
    assert "train: 29," in done.stdout
    assert "characters" in done.stdout
    assert "median" in done.stdout


def test_stats_of_conversations_are_of_what_is_trained_on(tmp_path: Path) -> None:
    """A token for each byte and special: BOS, two around the question, two around the answer."""
    texts = [json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * n}]})
             for n in (4, 10, 94)]
    dataset = tmp_path / "d"
    write_dataset(Listed([Raw(text, "", f"{i} {text}") for text in texts for i in range(40)]), dataset,
                  WriteOptions(val_share=0.3, max_chars=None, column="conversation"))
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    tokenizer.save(tmp_path / "tokenizer")
    train = stats(dataset, tokenizer, 99)["train"]["tokens"]
    assert (train["min"], train["median"], train["max"]) == (10, 16, 100)
    longer = {length: sum(split["longer_than_a_row"] for split in stats(dataset, tokenizer, length).values())
              for length in (99, 98, 15, 14, 9, 8)}
    assert longer == {99: 0, 98: 40, 15: 40, 14: 80, 9: 80, 8: 120}
    done = run("scripts.data", "stats", dataset, "--tokenizer", tmp_path / "tokenizer", "--sequence-len", "14")
    told = re.findall(r"(\d+) documents are longer than a row of 14", done.stdout)
    assert sum(map(int, told)) == 80, done.stderr
    done = run("scripts.data", "stats", dataset, "--sequence-len", "14")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    (tmp_path / "text").mkdir()
    rewrite(tmp_path / "text" / "a.parquet", ["a" * 9, "b" * 10])
    assert stats(tmp_path / "text", tokenizer, 9)["."]["longer_than_a_row"] == 1                        # control


def test_samples_depend_on_the_seed(dataset: Path) -> None:
    found = sample(dataset, 5, 0)
    assert found == sample(dataset, 5, 0)
    assert len({where for where, _ in found}) == 5
    assert found != sample(dataset, 5, 1)                                     # control
    assert len(sample(dataset / "val", 10**6, 0)) == json.loads((dataset / "manifest.json").read_text())[
        "splits"]["val"]["documents"]
    done = run("scripts.data", "sample", dataset, "-n", "2", "--seed", "3")
    assert done.returncode == 0
    for where, text in sample(dataset, 2, 3):
        assert f"== {where}, {len(text):,} characters\n{text}\n" in done.stdout


# -- prepare_data -----------------------------------------------------------------------------------------------------

def test_parts_and_merge_as_commands(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"{i}.jsonl").write_text("".join(
            json.dumps({"body": f"document {i} {j} of a folder"}) + "\n" for j in range(300)))
    folder = ["scripts.prepare_data", "folder", tmp_path / "in", "--out", tmp_path / "d", "--column", "body"]
    for part in ("1/2", "2/2"):
        done = run(*folder, "--part", part, "--workers", "2")
        assert done.returncode == 0, done.stderr
    done = run("scripts.prepare_data", "merge", "--out", tmp_path / "d")
    assert (done.returncode, done.stderr) == (0, "")
    done = run("scripts.data", "verify", tmp_path / "d")
    assert "4 of 4 shards are as the manifest says, 1,200 documents" in done.stdout
    done = run("scripts.prepare_data", "merge", "--out", tmp_path / "d")
    assert done.returncode == 3
    assert "has no part-*-of-* folders" in done.stderr


def test_a_mixture_as_a_command(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("".join(f"{name} line {i}\n" for i in range(9000)))
    (tmp_path / "m.yaml").write_text(
        f"name: m\nsources:\n  - {{name: a, weight: 3.0, folder: {tmp_path / 'a'}, license: mit}}\n"
        "  - {name: b, weight: 1.0, hub: some/where, by_hand: fetch it}\n")
    mixture = ["scripts.prepare_data", "mixture", tmp_path / "m.yaml", "--out", tmp_path / "d", "--max-mb", "0.04",
               "--max-chars", "100", "--val-percent", "10"]
    done = run(*mixture)
    assert (done.returncode, done.stderr) == (2, "error[config] mixture m\n  b: fetch it\n")
    for _ in range(2):                                                        # the second time all is there
        done = run(*mixture, "--folder", f"b={tmp_path / 'b'}")
        assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "d" / "a" / "manifest.json").read_text())["source"]["license"] == "mit"
    done = run("scripts.data", "verify", tmp_path / "d")
    assert "4 of 4 shards" in done.stdout


def test_conversations_as_a_command(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"messages": [{"role": "user", "content": f"Hello, what is {i} plus 1?"},
                          {"role": "assistant", "content": f"It is {i + 1}. " + "x" * 9000}]} for i in range(200)]
    bad = {"messages": [{"role": "user", "content": "Nobody answers."}]}
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, bad]))
    chat = ["scripts.prepare_data", "chat", "messages", "--folder", tmp_path / "in", "--val-percent", "10", "--out"]
    done = run(*chat, tmp_path / "d")
    assert done.returncode == 3
    assert "a.jsonl line 201: no conversation" in done.stderr
    done = run(*chat, tmp_path / "d", "--skip-bad", "1")
    assert done.returncode == 0, done.stderr
    plain = {split: list(open_source(split, tmp_path / "d" / split, column="conversation").texts())
             for split in ("train", "val")}
    assert len(plain["train"]) + len(plain["val"]) == 200
    assert all(len(json.loads(text)["messages"][1]["content"]) > 9000 for text in plain["train"])      # never cut
    done = run(*chat, tmp_path / "e", "--skip-bad", "1", "--greeting-copies")
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert manifest["column"] == "conversation"
    assert manifest["splits"]["train"]["documents"] == 2 * len(plain["train"])
    assert manifest["splits"]["val"]["documents"] == len(plain["val"])                                  # control
    assert run("scripts.data", "verify", tmp_path / "e").returncode == 0
    done = run("scripts.prepare_data", "chat", "nothing", "--out", tmp_path / "f")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = run("scripts.prepare_data", "chat", "alpaca", "--out", tmp_path / "f")
    assert "name their folder with --folder" in done.stderr


def test_what_a_long_command_shows(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain lines where there is no terminal: documents, MB, MB/s, share and time left."""
    monkeypatch.setattr(progress_module, "_LINE_S", 0.0)
    with progress_module.progress("ingest", None, 1000) as show:
        show(0, 0, 0)
        time.sleep(0.05)
        show(1200, 5_000_000, 250)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"ingest: 1,200 documents, 5\.0 MB, [\d.]+ MB/s, 25%, \d+ s left", line), line
    assert progress_module.done_share(30, 10, 100, 1000) == 0.3               # the limit of text comes first
    assert progress_module.done_share(30, 10, None, None) == 0


def test_an_audit_that_is_not_there(tmp_path: Path) -> None:
    done = run("scripts.data", "audit", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (3, 1), done.stderr
