"""Bad data, bad checkpoints, places that cannot be written: one typed line, the documented exit code, nothing lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from nanopoe.checkpoint.format import seal
from tests.commands import Call, contents, refused
from tests.ranks import write_shard

STEPS = 8                                        # of tests.ranks.experiment_dict
WORDS = "a few words of a document that is one of many, number"


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A run that may be damaged."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path / "run"


# -- bad data ---------------------------------------------------------------------------------------------------------

def truncated(path: Path) -> None:
    write_shard(path, [f"{WORDS} {i}" for i in range(99)])
    path.write_bytes(path.read_bytes()[:-50])


def flipped(path: Path) -> None:
    write_shard(path, [f"{WORDS} {i}" for i in range(99)])
    raw = bytearray(path.read_bytes())
    raw[60] ^= 255
    path.write_bytes(raw)


def table(column: str, values: list[Any]) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table({column: values}), path)


BAD_SHARDS: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, r"shard_00000.parquet: cannot be read as parquet.*copy or write it again"),
    "flipped": (flipped, r"shard_00000.parquet row group 0: cannot be read as parquet.*copy or write it again"),
    "column": (table("txt", ["a"] * 50), "no column 'text', there are: txt"),
    "type": (table("text", [1] * 50), "column 'text' is int64, not string"),
    "null": (table("text", ["a b c"] * 20 + [None] + ["d"] * 20), "row group 0 row 20: null document"),
    "empty": (table("text", ["a b c"] * 20 + [""] + ["d"] * 20), "row group 0 row 20: empty document"),
    "rows": (lambda path: pq.write_table(pa.table({"text": pa.array([], pa.string())}), path), "no documents"),
    "none": (lambda path: None, r"no file matches \*.parquet; make shards with scripts.prepare_data"),
}


@pytest.mark.parametrize("bad", BAD_SHARDS)
def test_bad_shards(finished: Path, tmp_path: Path, cli: Call, bad: str) -> None:
    make, words = BAD_SHARDS[bad]
    shards = tmp_path / "shards"
    shards.mkdir()
    make(shards / "shard_00000.parquet")
    run = tmp_path / "run"
    done = cli("train", finished / "tiny.yaml", f"run_dir={run}", f"data.train.0.path={shards}")
    refused(done, 3, "data", words)
    assert "Traceback" in (run / "logs" / "rank_0.log").read_text()
    refused(cli("train_tokenizer", "--data", shards, "--vocab-size", "270", "--out", tmp_path / "t"), 3, "data", words)
    assert not (tmp_path / "t").exists()


def test_bad_data_leaves_a_run_as_it_was(finished: Path, copied: Path, tmp_path: Path, cli: Call) -> None:
    truncated(tmp_path / "bad" / "shard_00000.parquet")
    write_shard(tmp_path / "other" / "shard_00000.parquet", [f"{WORDS} {i}" for i in range(99)])
    before = contents(copied)
    for folder, words in (("bad", "cannot be read as parquet"), ("other", "data position.*resume with the data")):
        done = cli("train", finished / "tiny.yaml", f"run_dir={copied}", f"data.train.0.path={tmp_path / folder}")
        refused(done, 3, "data", words)
    after = contents(copied)
    assert {name for name in after if after[name] != before.get(name)} == {"logs/rank_0.log", ".lock"}


@pytest.mark.parametrize("override, words", [
    ("data.train.0.path={}/none", "none: no such folder"),
    ("data.train.0.files=x*", "no file matches x"),
    ("data.train.0.files='**x'", r"'\*\*x' is no pattern of file names"),
    ("data.lanes=4096", "260 documents cannot feed 4096 lanes.*set data.lanes to at most 260"),
    ("tokenizer={}/none", "none/tokenizer.json: cannot be read.*scripts.train_tokenizer"),
    ("model.vocab_size=400", "has 300 tokens, the model 400; set model.vocab_size to it"),
])
def test_data_that_does_not_fit(finished: Path, tmp_path: Path, cli: Call, override: str, words: str) -> None:
    done = cli("train", finished / "tiny.yaml", f"run_dir={tmp_path / 'run'}", override.format(tmp_path))
    refused(done, 3, "data", words)
    assert not (tmp_path / "run" / "checkpoints").exists()


# -- bad checkpoints --------------------------------------------------------------------------------------------------

def newest(run: Path) -> Path:
    return run / "checkpoints" / f"step_{STEPS:08d}"


MODEL = "model-0001-of-0001.safetensors"


def alter(run: Path) -> None:
    with open(newest(run) / MODEL, "r+b") as file:
        file.seek(20_000)
        byte = file.read(1)
        file.seek(20_000)
        file.write(bytes([byte[0] ^ 1]))


def drop_tensor(run: Path) -> None:
    """Files that are whole and as the manifest says, but lack a tensor."""
    folder = newest(run)
    tensors = load_file(folder / MODEL)
    del tensors["smear_lambda"]
    save_file(tensors, folder / MODEL)
    raw, manifest = (folder / MODEL).read_bytes(), json.loads((folder / "manifest.json").read_text())
    manifest["files"][MODEL] = {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    del manifest["tensors"]["smear_lambda"]
    (folder / "manifest.json").write_text(json.dumps(seal(manifest), sort_keys=True) + "\n")


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "altered": (alter, f"{MODEL}: content does not match its SHA-256, in .* rows .*use another step"),
    "tensor": (drop_tensor, "smear_lambda"),
    "cut": (lambda run: os.truncate(newest(run) / MODEL, 999), "has 999 bytes, the manifest says"),
    "file": (lambda run: (newest(run) / "config.json").unlink(), "config.json: missing.*the one before is step 7"),
    "manifest": (lambda run: (newest(run) / "manifest.json").write_text("{"), "manifest.json: not valid JSON"),
}


@pytest.mark.parametrize("bad", BAD_CHECKPOINTS)
def test_bad_checkpoints(finished: Path, copied: Path, tmp_path: Path, cli: Call, bad: str) -> None:
    damage, words = BAD_CHECKPOINTS[bad]
    damage(copied)
    before = contents(copied / "checkpoints")
    refused(cli("train", finished / "tiny.yaml", f"run_dir={copied}"), 4, "checkpoint", words)
    refused(cli("evaluate", copied), 4, "checkpoint", words)
    refused(cli("export_hf", copied, "--out", tmp_path / "hub"), 4, "checkpoint", words)
    assert contents(copied / "checkpoints") == before
    assert not (tmp_path / "hub").exists()
    assert cli("export_hf", copied, "--step", "7", "--out", tmp_path / "hub").code == 0        # control: the one before


def test_a_step_or_a_run_that_is_not_there(finished: Path, tmp_path: Path, cli: Call) -> None:
    run, hub = finished / "run", tmp_path / "hub"
    for done in (cli("evaluate", run, "--step", "99"), cli("export_hf", run, "--step", "99", "--out", hub),
                 cli("train", finished / "tiny.yaml", "resume.step=99")):
        refused(done, 4, "checkpoint", "no checkpoint of step 99; steps there: 1, 2, 3, 4, 5, 6, 7, 8$")
    for done in (cli("evaluate", tmp_path), cli("export_hf", tmp_path / "none", "--out", hub)):
        refused(done, 4, "checkpoint", "no checkpoint; train first, or check the run folder")
    refused(cli("report", tmp_path, "--out", tmp_path / "r"), 3, "data", "neither metrics.jsonl.*the folder of a run")
    refused(cli("try_export", run), 4, "checkpoint", "no export here; write one with scripts.export_hf")
    assert not hub.exists()
    assert not (tmp_path / "r").exists()


def test_another_config_or_tokenizer_than_the_run(finished: Path, copied: Path, cli: Call) -> None:
    before = contents(finished / "run" / "checkpoints")
    refused(cli("train", finished / "tiny.yaml", "seed=8"), 4, "checkpoint", "trained with .*run_dir for a new run")
    refused(cli("train", finished / "tiny.yaml", "schedule.cycles.1.steps=6"), 4, "checkpoint",
            r"was trained with schedule\.cycles\.1\.steps 3, now 6; .*resume\.allow=\[schedule\.cycles\]")
    refused(cli("train", finished / "tiny.yaml", "schedule.cycles.0.steps=6"), 4, "checkpoint",
            "3 steps into cycle 1, which began at step 5; .*begin at 6")
    assert contents(finished / "run" / "checkpoints") == before
    (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(cli("evaluate", copied), 3, "data", "tokenizer.json: keys must be exactly")
    shutil.rmtree(copied / "tokenizer")
    refused(cli("evaluate", copied), 3, "data", "tokenizer.json: cannot be read.*scripts.train_tokenizer")


# -- places that cannot be written, or must not -----------------------------------------------------------------------

def test_folders_that_cannot_be_made(finished: Path, tmp_path: Path, cli: Call, data: Path) -> None:
    (tmp_path / "file").write_text("mine")
    below, texts = tmp_path / "file" / "x", tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(" ".join(map(str, range(999))))
    for command in (["train", finished / "tiny.yaml", f"run_dir={below}"],
                    ["prepare_data", "folder", texts, "--max-chars", "20", "--val-percent", "50", "--out", below],
                    ["train_tokenizer", "--data", data, "--vocab-size", "270", "--out", below],
                    ["report", finished / "run", "--out", below],
                    ["export_hf", finished / "run", "--out", below]):
        refused(cli(*command), 7, "storage", f"{below}.*(Not a directory|File exists)|Not a directory: '{below}")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_one_elses_folder_is_overwritten(finished: Path, data: Path, tmp_path: Path, cli: Call) -> None:
    mine, hub = tmp_path / "mine", tmp_path / "hub"
    mine.mkdir()
    (mine / "thesis.txt").write_text(" ".join(map(str, range(999))))
    tokenizer = ["train_tokenizer", "--data", data, "--vocab-size", "280", "--out", mine]
    prepare = ["prepare_data", "folder", mine, "--max-chars", "20", "--val-percent", "50", "--out"]
    for more in ([], ["--overwrite"]):
        refused(cli("export_hf", finished / "run", "--out", mine, *more), 2, "config", f"{mine}: is not empty")
        refused(cli(*tokenizer, *more), 3, "data", f"{mine}: is not empty")
        refused(cli(*prepare, mine, *more), 3, "data", f"{mine}: (is not empty|has no manifest)")
    assert contents(mine).keys() == {"thesis.txt"}
    assert cli("export_hf", finished / "run", "--out", hub).code == 0
    refused(cli("export_hf", finished / "run", "--out", hub), 2, "config", "not empty.*or pass --overwrite")
    assert cli("export_hf", finished / "run", "--out", hub, "--overwrite").code == 0    # control: its own it may
    dataset = tmp_path / "dataset"
    assert cli(*prepare, dataset).code == 0
    assert cli(*prepare, dataset, "--overwrite").code == 0                             # control
    shutil.copytree(data / "tokenizer", dataset / "tokenizer")
    refused(cli(*prepare, dataset, "--overwrite"), 3, "data", "also holds tokenizer, which would be lost")
    assert (dataset / "tokenizer" / "tokenizer.json").exists()


def test_an_interrupted_tokenizer_is_made_again(data: Path, tmp_path: Path, cli: Call) -> None:
    """As runs/quickstart.sh needs it: a folder without tokenizer.json is what an interruption has left."""
    out = tmp_path / "tokenizer"
    out.mkdir()
    (out / "ranks.tiktoken").write_text("")
    (out / ".tmp-tokenizer.json").write_text("")
    command = ["train_tokenizer", "--data", data, "--vocab-size", "280", "--out", out]
    assert cli(*command).code == 0
    refused(cli(*command), 3, "data", "is not empty; .*pass --overwrite")              # control: a whole one stays


def test_a_damaged_export_and_wrong_sampling(finished: Path, tmp_path: Path, cli: Call) -> None:
    hub = tmp_path / "hub"
    assert cli("export_hf", finished / "run", "--out", hub).code == 0
    for option in (("--tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan")):
        refused(cli("try_export", hub, *option), 2, "config", "--tokens must be 1 or more, --temperature 0 or more")
    os.truncate(hub / "model.safetensors", 999)
    refused(cli("try_export", hub), 4, "checkpoint", "cannot be loaded .*write it again with scripts.export_hf")
