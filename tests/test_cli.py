"""The commands end to end, each in a process of its own: text in, a model that transformers loads out; wrong command
lines are one line on stderr and a documented exit code."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import ROOT, Call, Done, refused, shell, write_yaml
from tests.ranks import experiment_dict

SCRIPTS = sorted(p.stem for p in (ROOT / "scripts").glob("*.py") if p.stem != "__init__")
WORDS = "a few words of a document that is one of many, number"


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
    done = cli("evaluate", run, "--no-speed")
    assert done.code == 0 and "crossover gap" in done.out, done
    assert max(map(len, done.out.splitlines())) <= 80 + len("saved as  and .md") + len(str(run))
    assert cli("evaluate", run, "--step", "4", "--json", "--no-speed").code == 0
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


def test_two_ranks_of_torchrun(finished: Path, tmp_path: Path) -> None:
    def torchrun(*more: str) -> Done:
        return shell("torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.train",
                     finished / "tiny.yaml", f"run_dir={tmp_path / 'two'}", *more)

    done = torchrun()
    assert done.code == 0 and "finished step=8" in done.out, done
    assert done.out.count("finished") == 1, "rank 0 alone speaks"
    one, two = ([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()
                 if '"kind": "train"' in line] for run in (finished / "run", tmp_path / "two"))
    assert two == pytest.approx(one, rel=1e-4)
    assert len(list((tmp_path / "two" / "checkpoints" / "step_00000008").glob("optim-*-of-0002.safetensors"))) == 2


def test_ctrl_c_leaves_a_run_that_goes_on(finished: Path, tmp_path: Path, cli: Call) -> None:
    run, command = tmp_path / "run", ["train", finished / "tiny.yaml", f"run_dir={tmp_path / 'run'}"]
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
    done = cli("generate", run, "a", "--tokens", "2", "--json")           # the newest checkpoint is whole
    assert done.code == 0 and f'"step": {int(kept[-1][5:])},' in done.out, done


@pytest.mark.parametrize("command", [["model_info", "tiny.yaml"], ["model_info", "tiny.yaml", "--json"],
                                     ["generate", "run", "a", "--tokens", "9"]],
                         ids=["a table", "at the end", "while it speaks"])
def test_a_reader_that_leaves_is_no_error(finished: Path, command: list[str]) -> None:
    script, of, *more = command
    process = subprocess.Popen([sys.executable, "-m", f"scripts.{script}", str(finished / of), *more], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
def test_wrong_overrides(finished: Path, cli: Call, overrides: list[str], words: str) -> None:
    for script in ("train", "check_config", "model_info"):
        refused(cli(script, finished / "tiny.yaml", *overrides), 2, "config", words)
        refused(cli(script, finished / "tiny.yaml", "seed"), 2, "config", "key.sub=value|seed: cannot be read")


def test_wrong_experiment_files(finished: Path, tmp_path: Path, cli: Call) -> None:
    refused(cli("train", tmp_path / "none.yaml"), 2, "config", "none.yaml: cannot be read: No such file")
    refused(cli("train", tmp_path), 2, "config", "Is a directory; name an existing experiment file")
    (tmp_path / "double.yaml").write_text((finished / "tiny.yaml").read_text() + "seed: 8\n")
    refused(cli("train", tmp_path / "double.yaml"), 2, "config", "line [0-9]+: duplicate key 'seed'")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused(cli("train", tmp_path / "binary.yaml"), 2, "config", "not UTF-8")
    done = cli("train")
    assert done.code == 2 and "arguments are required: config\n" in done.err


def test_wrong_numbers_on_the_command_line(finished: Path, data: Path, tmp_path: Path, cli: Call) -> None:
    tokenizer = ["train_tokenizer", "--data", data, "--vocab-size", "280", "--out", tmp_path / "t"]
    for command, words in ((["evaluate", finished / "run", "--tokens", "0"], "--tokens: must be 1 or more"),
                           (["bench", "step", finished / "tiny.yaml", "--steps", "0"], "--steps: must be 1 or more"),
                           ([*tokenizer, "--max-mb", "nan"], "--max-mb: must be above 0"),
                           (["model_info", finished / "tiny.yaml", "--world-size", "0"], "0 ranks do not divide"),
                           (["check_config", finished / "tiny.yaml", "--world-size", "3"], "3 ranks do not divide")):
        refused(cli(*command), 2, "config", words)
    assert not (tmp_path / "t").exists()


def test_an_unknown_device(finished: Path, cli: Call) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    refused(cli("train", finished / "tiny.yaml", "runtime.device=cuda"), 2, "config", "no CUDA device.*use 'cpu'")
    refused(cli("evaluate", finished / "run", "--device", "cuda"), 2, "config", "no CUDA device.*use 'cpu'")
    assert cli("evaluate", finished / "run", "--device", "tpu").code == 2


def test_a_world_that_was_only_named(finished: Path, tmp_path: Path, cli: Call) -> None:
    done = cli("train", finished / "tiny.yaml", f"run_dir={tmp_path / 'x'}", WORLD_SIZE="2")
    refused(done, 2, "config", "lacks RANK.*start with torchrun")
    refused(cli("train", finished / "tiny.yaml", WORLD_SIZE="3"), 2, "config",         # neither lanes nor micro-batches
            "3 ranks do not divide.*use 1, 2 ranks")
