"""The commands end to end, each in a process of its own: text in, a model that transformers loads out, and every bad
input as one line on stderr and a documented exit code, with nothing lost.

Most processes are forked from one that has imported torch already (0.1 s instead of 3 s); the shell's own way,
`python -m` and torchrun, is taken where it matters.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import load_file, save_file

from nanopoe.checkpoint.format import seal
from tests.ranks import experiment_dict, write_shard

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem != "__init__")
STEPS = 8                                        # of tests.ranks.experiment_dict
WORDS = "a few words of a document that is one of many, number"


# -- running commands -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Done:
    code: int | None
    out: str
    err: str


def _child(module: str, arguments: list[str], out: str, err: str) -> None:
    for path, fd in ((out, 1), (err, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, fd)
        os.close(handle)
    os.chdir(ROOT)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def call(script: str, *arguments: str | Path, folder: Path) -> Done:
    """`python -m scripts.<script> arguments`, forked from a process that has torch; its output by way of `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "nanopoe.train.loop", "nanopoe.train.evaluate", "nanopoe.export.run",
                                    "nanopoe.report.plots", "transformers"])
    files = str(folder / ".stdout"), str(folder / ".stderr")
    process = context.Process(target=_child, args=(f"scripts.{script}", [str(a) for a in arguments], *files))
    process.start()
    process.join(120)
    assert process.exitcode is not None, "the command hangs"
    return Done(process.exitcode, *(Path(f).read_text("utf-8") for f in files))


Call = Callable[..., Done]


@pytest.fixture
def cli(tmp_path: Path) -> Call:
    return lambda script, *arguments: call(script, *arguments, folder=tmp_path)


def shell(*arguments: str | Path) -> Done:
    """The same, as a user's shell does it."""
    done = subprocess.run([sys.executable, "-m", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    return Done(done.returncode, done.stdout, done.stderr)


def write_yaml(path: Path, experiment: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(experiment, sort_keys=False), encoding="utf-8")
    return path


def refused(done: Done, code: int, kind: str, words: str) -> None:
    """One typed line that says `words` (a pattern), or a head and a line per problem; the exit code; no traceback."""
    assert (done.code, done.err.split(" ")[0]) == (code, f"error[{kind}]"), done
    head, *problems = done.err.splitlines()
    assert not problems or (kind == "config" and all(line.startswith("  ") for line in problems)), done.err
    assert re.search(words, done.err), done.err
    assert "Traceback" not in done.out + done.err
    assert "this is a bug" not in done.err


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file below `folder`."""
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml and its finished run in run/. Not to be changed."""
    folder = tmp_path_factory.mktemp("cli")
    experiment = write_yaml(folder / "tiny.yaml", experiment_dict(data, folder / "run"))
    done = call("train", experiment, folder=folder)
    assert done.code == 0, done
    return folder


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A run that may be damaged."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


# -- what works -------------------------------------------------------------------------------------------------------

def test_from_a_folder_of_text_to_generation(tmp_path: Path, cli: Call) -> None:
    texts, data, run, hub = (tmp_path / name for name in ("texts", "data", "run", "hub"))
    texts.mkdir()
    (texts / "all.jsonl").write_text("".join(json.dumps({"text": f"{WORDS} {i * i}"}) + "\n" for i in range(400)))
    done = cli("prepare_data", "folder", texts, "--out", data, "--val-percent", "10")
    assert done.code == 0 and "documents" in done.out, done
    done = cli("train_tokenizer", "--data", data, "--vocab-size", "300", "--out", data / "tokenizer")
    assert done.code == 0 and "bytes per token" in done.out, done
    experiment = write_yaml(tmp_path / "tiny.yaml", experiment_dict(data, run))
    done = shell("scripts.train", experiment)
    assert (done.code, done.err) == (0, ""), done
    assert "finished step=8" in done.out
    again = cli("train", experiment)
    assert again.code == 0 and "nothing to do" in again.out, again
    done = cli("evaluate", run)
    assert done.code == 0 and "crossover gap" in done.out, done
    assert max(map(len, done.out.splitlines())) <= 80 + len("saved as  and .md") + len(str(run))
    assert cli("evaluate", run, "--step", "4", "--json").code == 0
    scores = json.loads((run / "evaluation" / "step_00000008.json").read_text())
    assert scores["bpb"]["prefixes"][-1] == scores["bpb"]["full"]
    assert scores["bpb"] != json.loads((run / "evaluation" / "step_00000004.json").read_text())["bpb"]      # control
    done = cli("report", run, "--out", tmp_path / "report")
    assert done.code == 0 and "report: report.html, report.md, " in done.out, done
    for name in ("report.md", "report.html"):
        assert f"{scores['bpb']['full']:.6f}" in (tmp_path / "report" / name).read_text("utf-8")
    assert (tmp_path / "report" / "curves.png").read_bytes().startswith(b"\x89PNG")
    done = cli("export_hf", run, "--out", hub)
    assert (done.code, done.out) == (0, f"step 8 exported to {hub}\n"), done
    assert f"{scores['bpb']['full']:.4f}" in (hub / "README.md").read_text()
    done = cli("try_export", hub, "--prompt", "a few", "--tokens", "8")
    assert (done.code, done.err) == (0, ""), done
    assert "[full model] a few" in done.out and "[stage 0 alone] a few" in done.out and "\033" not in done.out


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_examples(script: str, cli: Call) -> None:
    done = cli(script, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"usage: python -m scripts.{script} ")
    assert f"examples:\n  python -m scripts.{script} " in done.out
    assert "--debug" in done.out or "prepare_data" in done.out           # which has it in its sub-commands


def test_two_ranks_of_torchrun(trained: Path, tmp_path: Path) -> None:
    def torchrun(*more: str) -> Done:
        return shell("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.train",
                     trained / "tiny.yaml", f"run_dir={tmp_path / 'two'}", *more)

    done = torchrun()
    assert done.code == 0 and "finished step=8" in done.out, done
    assert done.out.count("finished") == 1, "rank 0 alone speaks"
    one, two = ([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()
                 if '"kind": "train"' in line] for run in (trained / "run", tmp_path / "two"))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(list((tmp_path / "two" / "checkpoints" / "step_00000008").glob("optim-*-of-0002.safetensors"))) == 2


def test_ctrl_c_leaves_a_run_that_goes_on(trained: Path, tmp_path: Path, cli: Call) -> None:
    run, command = tmp_path / "run", ["train", trained / "tiny.yaml", f"run_dir={tmp_path / 'run'}"]
    endless = "schedule.cycles.0.steps=100000"
    process = subprocess.Popen([sys.executable, "-m", f"scripts.{command[0]}", *map(str, command[1:]), endless],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (run / "checkpoints" / "step_00000002").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "SIGINT: stops after this step; once more leaves at once\n")
    kept = sorted(p.name for p in (run / "checkpoints").glob("step_*"))
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", int(kept[-1][5:]))
    assert status["resume"] == f"python -m scripts.train {' '.join(map(str, command[1:]))} {endless}"
    done = cli("evaluate", run, "--json")                               # the newest checkpoint is whole
    assert done.code == 0 and f'"step": {int(kept[-1][5:])},' in done.out, done


def test_a_reader_that_leaves_is_no_error(trained: Path) -> None:
    command = [sys.executable, "-m", "scripts.evaluate", str(trained / "run"), "--json", "--tokens", "64"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()                                              # as `| head` does
    assert (process.stderr.read(), process.wait(60)) == (b"", 0)
    process.stderr.close()


# -- wrong command lines and experiments ------------------------------------------------------------------------------

@pytest.mark.parametrize("overrides, words", [
    (["model.stage_layer=3"], r"model.stage_layer: unknown key; did you mean 'poe_stage_layers'"),
    (["optim.matrixlr=1", "mode.n_layer=3"], r"'matrix_lr'\?\n(.*\n)*.*'model'\?"),
    (["seed=1", "seed=2"], "seed: given twice"),
    (["runtime.device=tpu"], "expected 'auto', 'cpu' or 'cuda', got 'tpu'"),
    (["model.n_layer=x"], "model.n_layer: expected int, got 'x'"),
    (["data.lanes=0", "schedule.cycles.0.warmup_steps=9"], "data.lanes: must be >= 1"),
    (["run_dir=.."], "run_dir: '..' is not a safe folder"),
])
def test_wrong_overrides(trained: Path, cli: Call, overrides: list[str], words: str) -> None:
    for script in ("train", "check_config", "model_info"):
        refused(cli(script, trained / "tiny.yaml", *overrides), 2, "config", words)
        refused(cli(script, trained / "tiny.yaml", "seed"), 2, "config", "key.sub=value|seed: cannot be read")


def test_wrong_experiment_files(trained: Path, tmp_path: Path, cli: Call) -> None:
    refused(cli("train", tmp_path / "none.yaml"), 2, "config", "none.yaml: cannot be read: No such file")
    refused(cli("train", tmp_path), 2, "config", "Is a directory; name an existing experiment file")
    (tmp_path / "double.yaml").write_text((trained / "tiny.yaml").read_text() + "seed: 8\n")
    refused(cli("train", tmp_path / "double.yaml"), 2, "config", "line [0-9]+: duplicate key 'seed'")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused(cli("train", tmp_path / "binary.yaml"), 2, "config", "not UTF-8")
    done = cli("train")
    assert done.code == 2 and "arguments are required: config\n" in done.err


def test_wrong_numbers_on_the_command_line(trained: Path, data: Path, tmp_path: Path, cli: Call) -> None:
    tokenizer = ["train_tokenizer", "--data", data, "--vocab-size", "280", "--out", tmp_path / "t"]
    for command, words in ((["evaluate", trained / "run", "--tokens", "0"], "--tokens: must be 1 or more"),
                           (["bench", "step", trained / "tiny.yaml", "--steps", "0"], "--steps: must be 1 or more"),
                           ([*tokenizer, "--max-mb", "nan"], "--max-mb: must be above 0"),
                           (["model_info", trained / "tiny.yaml", "--world-size", "0"], "0 ranks do not divide"),
                           (["check_config", trained / "tiny.yaml", "--world-size", "3"], "3 ranks do not divide")):
        refused(cli(*command), 2, "config", words)
    assert not (tmp_path / "t").exists()


def test_an_unknown_device(trained: Path, cli: Call) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    refused(cli("train", trained / "tiny.yaml", "runtime.device=cuda"), 2, "config", "no CUDA device.*use 'cpu'")
    refused(cli("evaluate", trained / "run", "--device", "cuda"), 2, "config", "no CUDA device.*use 'cpu'")
    assert cli("evaluate", trained / "run", "--device", "tpu").code == 2


def test_a_world_that_was_only_named(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = shell("scripts.train", trained / "tiny.yaml", f"run_dir={tmp_path / 'x'}")
    refused(done, 2, "config", "lacks RANK.*start with torchrun")
    monkeypatch.setenv("WORLD_SIZE", "3")                               # neither lanes nor micro-batches
    refused(shell("scripts.train", trained / "tiny.yaml"), 2, "config", "3 ranks do not divide.*use 1, 2 ranks")


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
def test_bad_shards(trained: Path, tmp_path: Path, cli: Call, bad: str) -> None:
    make, words = BAD_SHARDS[bad]
    shards = tmp_path / "shards"
    shards.mkdir()
    make(shards / "shard_00000.parquet")
    run = tmp_path / "run"
    done = cli("train", trained / "tiny.yaml", f"run_dir={run}", f"data.train.0.path={shards}")
    refused(done, 3, "data", words)
    assert "Traceback" in (run / "logs" / "rank_0.log").read_text()
    refused(cli("train_tokenizer", "--data", shards, "--vocab-size", "270", "--out", tmp_path / "t"), 3, "data", words)
    assert not (tmp_path / "t").exists()


def test_bad_data_leaves_a_run_as_it_was(trained: Path, copied: Path, tmp_path: Path, cli: Call) -> None:
    truncated(tmp_path / "bad" / "shard_00000.parquet")
    write_shard(tmp_path / "other" / "shard_00000.parquet", [f"{WORDS} {i}" for i in range(99)])
    before = contents(copied)
    for folder, words in (("bad", "cannot be read as parquet"), ("other", "data position.*resume with the data")):
        done = cli("train", trained / "tiny.yaml", f"run_dir={copied}", f"data.train.0.path={tmp_path / folder}")
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
def test_data_that_does_not_fit(trained: Path, tmp_path: Path, cli: Call, override: str, words: str) -> None:
    done = cli("train", trained / "tiny.yaml", f"run_dir={tmp_path / 'run'}", override.format(tmp_path))
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
def test_bad_checkpoints(trained: Path, copied: Path, tmp_path: Path, cli: Call, bad: str) -> None:
    damage, words = BAD_CHECKPOINTS[bad]
    damage(copied)
    before = contents(copied / "checkpoints")
    refused(cli("train", trained / "tiny.yaml", f"run_dir={copied}"), 4, "checkpoint", words)
    refused(cli("evaluate", copied), 4, "checkpoint", words)
    refused(cli("export_hf", copied, "--out", tmp_path / "hub"), 4, "checkpoint", words)
    assert contents(copied / "checkpoints") == before
    assert not (tmp_path / "hub").exists()
    assert cli("evaluate", copied, "--step", "7", "--tokens", "64").code == 0          # control: the one before


def test_a_step_or_a_run_that_is_not_there(trained: Path, tmp_path: Path, cli: Call) -> None:
    run, hub = trained / "run", tmp_path / "hub"
    for done in (cli("evaluate", run, "--step", "99"), cli("export_hf", run, "--step", "99", "--out", hub),
                 cli("train", trained / "tiny.yaml", "resume.step=99")):
        refused(done, 4, "checkpoint", "no checkpoint of step 99; steps there: 1, 2, 3, 4, 5, 6, 7, 8$")
    for done in (cli("evaluate", tmp_path), cli("export_hf", tmp_path / "none", "--out", hub)):
        refused(done, 4, "checkpoint", "no checkpoint; train first, or check the run folder")
    refused(cli("report", tmp_path, "--out", tmp_path / "r"), 3, "data", "neither metrics.jsonl.*the folder of a run")
    refused(cli("try_export", run), 4, "checkpoint", "no export here; write one with scripts.export_hf")
    assert not hub.exists()
    assert not (tmp_path / "r").exists()


def test_another_config_or_tokenizer_than_the_run(trained: Path, copied: Path, cli: Call) -> None:
    before = contents(trained / "run" / "checkpoints")
    refused(cli("train", trained / "tiny.yaml", "seed=8"), 4, "checkpoint", "trained with .*run_dir for a new run")
    refused(cli("train", trained / "tiny.yaml", "schedule.cycles.0.steps=6"), 4, "checkpoint",
            r"was trained with schedule\.cycles\.0\.steps 5, now 6; .*resume\.allow=\[schedule\.cycles\]")
    assert contents(trained / "run" / "checkpoints") == before
    (copied / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(cli("evaluate", copied), 3, "data", "tokenizer.json: keys must be exactly")
    shutil.rmtree(copied / "tokenizer")
    refused(cli("evaluate", copied), 3, "data", "tokenizer.json: cannot be read.*scripts.train_tokenizer")


# -- places that cannot be written, or must not -----------------------------------------------------------------------

def test_folders_that_cannot_be_made(trained: Path, tmp_path: Path, cli: Call, data: Path) -> None:
    (tmp_path / "file").write_text("mine")
    below, texts = tmp_path / "file" / "x", tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(" ".join(map(str, range(999))))
    for command in (["train", trained / "tiny.yaml", f"run_dir={below}"],
                    ["prepare_data", "folder", texts, "--max-chars", "20", "--val-percent", "50", "--out", below],
                    ["train_tokenizer", "--data", data, "--vocab-size", "270", "--out", below],
                    ["report", trained / "run", "--out", below],
                    ["export_hf", trained / "run", "--out", below]):
        refused(cli(*command), 7, "storage", f"{below}.*(Not a directory|File exists)|Not a directory: '{below}")
    assert (tmp_path / "file").read_text() == "mine"


def test_no_one_elses_folder_is_overwritten(trained: Path, data: Path, tmp_path: Path, cli: Call) -> None:
    mine, hub = tmp_path / "mine", tmp_path / "hub"
    mine.mkdir()
    (mine / "thesis.txt").write_text(" ".join(map(str, range(999))))
    tokenizer = ["train_tokenizer", "--data", data, "--vocab-size", "280", "--out", mine]
    prepare = ["prepare_data", "folder", mine, "--max-chars", "20", "--val-percent", "50", "--out"]
    for more in ([], ["--overwrite"]):
        refused(cli("export_hf", trained / "run", "--out", mine, *more), 2, "config", f"{mine}: is not empty")
        refused(cli(*tokenizer, *more), 3, "data", f"{mine}: is not empty")
        refused(cli(*prepare, mine, *more), 3, "data", f"{mine}: (is not empty|has no manifest)")
    assert contents(mine).keys() == {"thesis.txt"}
    assert cli("export_hf", trained / "run", "--out", hub).code == 0
    refused(cli("export_hf", trained / "run", "--out", hub), 2, "config", "not empty.*or pass --overwrite")
    assert cli("export_hf", trained / "run", "--out", hub, "--overwrite").code == 0    # control: its own it may
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


def test_a_damaged_export_and_wrong_sampling(trained: Path, tmp_path: Path, cli: Call) -> None:
    hub = tmp_path / "hub"
    assert cli("export_hf", trained / "run", "--out", hub).code == 0
    for option in (("--tokens", "0"), ("--temperature", "-1"), ("--temperature", "nan")):
        refused(cli("try_export", hub, *option), 2, "config", "--tokens must be 1 or more, --temperature 0 or more")
    os.truncate(hub / "model.safetensors", 999)
    refused(cli("try_export", hub), 4, "checkpoint", "cannot be loaded .*write it again with scripts.export_hf")
