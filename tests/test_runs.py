"""The stories of runs/: each parses and names only what there is; those for SLURM run, on stand-ins of its commands."""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanopoe.checkpoint import list_steps
from nanopoe.config import load_experiment, make_plan
from nanopoe.train.status import read_status
from tests.commands import write_yaml
from tests.faults.harness import ROOT, Room, digest_of, lines_of
from tests.faults.moments import last_step
from tests.faults.resume import CYCLE

RUNS = ROOT / "runs"
SHELL = sorted([*RUNS.glob("*.sh"), *RUNS.glob("*.sbatch")])
PARTS = ("slurm.sh", "slurm_node.sh")                            # no stories of their own
VALUES = {"$CONFIG": "configs/poe_1p3b.yaml", "$config": "configs/small_poe.yaml"}


def name(path: Path) -> str:
    return path.name


# -- what they say ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("story", SHELL, ids=name)
def test_a_story_parses(story: Path) -> None:
    done = subprocess.run(["bash", "-n", str(story)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("story", [s for s in [*SHELL, RUNS / "skypilot.yaml"] if s.name not in PARTS], ids=name)
def test_a_story_begins_with_what_it_does_needs_and_costs(story: Path) -> None:
    head = story.read_text().partition("\nset -")[0].partition("\nname:")[0]
    assert re.search(r"(?m)^# What it does  .*\n(#.*\n)+# What it needs .*\n(#.*\n)*# What it costs ", head), head


@pytest.mark.parametrize("story", [*SHELL, RUNS / "skypilot.yaml"], ids=name)
def test_a_story_names_no_place_or_account(story: Path) -> None:
    """Comments may show where to put an account; nothing is set to one."""
    text = "\n".join(line for line in story.read_text().splitlines() if not re.match(r"#(?!SBATCH)", line))
    assert not re.search(r"--(account|partition|qos|mail-user|reservation)\b", text)
    assert re.findall(r"(?<![\w.$}\"/:])/(?!usr/bin/env|shared\b|dev/null)\w+", text) == []
    assert not re.search(r"/(home|scratch|lustre|gpfs|mnt)\b|(?<!\w)~/", text)


def commands(story: Path) -> Iterator[tuple[str, list[str]]]:
    """(script, arguments) of every `-m scripts.x ..` in a story, its comments included; variables stand as they are."""
    text = re.sub(r"\\\n#?\s*", "", story.read_text())
    for match in re.finditer(r"-m scripts\.(\w+)([^\n]*)", text):
        yield match[1], split(match[2])


def split(text: str) -> list[str]:
    """Words of a command up to a redirection, a pipe, an `&` or a bracket, or to the remark behind it."""
    text = re.split(r" {3,}", text)[0]
    found = re.findall(r"""((?:"[^"]*"|'[^']*'|[^\s"'|&;<>()`])+)|([|&;<>()`])""", text)
    words = [re.sub("[\"']", "", word) for word, _ in itertools.takewhile(lambda pair: not pair[1], found)]
    return [VALUES.get(word, word) for word in words]


class Accepted(SystemExit):
    """The command line was understood."""


def parse(script: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The arguments as the script's own parser takes them; nothing else of it runs."""
    main = importlib.import_module(f"scripts.{script}").main
    found: list[argparse.Namespace] = []

    def taking(original: Callable[..., argparse.Namespace]) -> Callable[..., argparse.Namespace]:
        def take(*args: Any, **kwargs: Any) -> argparse.Namespace:
            found.append(original(*args, **kwargs))
            raise Accepted
        return take

    numbers = ["8" if re.fullmatch(r"\$(GPUS|TEXT_MB|WORKERS|\(.*)", w) else w for w in words]
    with monkeypatch.context() as patch:
        for method in ("parse_args", "parse_intermixed_args"):
            patch.setattr(argparse.ArgumentParser, method, taking(getattr(argparse.ArgumentParser, method)))
        patch.setattr(sys, "argv", [f"scripts.{script}", *numbers])
        with pytest.raises(SystemExit):
            main()
    assert found, f"scripts.{script} does not take {words}"
    return found[0]


@pytest.mark.parametrize("story", [*SHELL, RUNS / "skypilot.yaml"], ids=name)
def test_every_command_of_a_story_is_taken(story: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["configs/poe_1p3b.yaml"] if story.name in PARTS else []            # what "$@" stands for
    for script, words in commands(story):
        parse(script, [w for word in words for w in (given if word == "$@" else [word])], monkeypatch)


def test_a_command_that_is_not_taken_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control."""
    assert parse("report", ["out/x", "--out", "y"], monkeypatch).out is not None
    with pytest.raises(AssertionError, match="does not take"):
        parse("report", ["out/x", "--output", "y"], monkeypatch)
    with pytest.raises(ModuleNotFoundError):
        parse("reports", ["out/x"], monkeypatch)


@pytest.mark.parametrize("story", [*SHELL, RUNS / "skypilot.yaml"], ids=name)
def test_every_file_a_story_names_is_there(story: Path) -> None:
    named = set(re.findall(r"\b(?:configs|runs)/[\w./]+\.(?:yaml|sh|sbatch)\b", story.read_text()))
    assert named and {file for file in named if not (ROOT / file).exists()} == set()


def overrides(text: str) -> list[str]:
    """`key.sub=value` words in a text that are overrides of an experiment."""
    words = re.findall(r"(?<![\w$-])((?:\w+\.)+[a-z_]+=[\w.]+)", text)
    return [word for word in words if "." in word.partition("=")[0]]


@pytest.mark.parametrize("story", [*SHELL, RUNS / "skypilot.yaml"], ids=name)
def test_every_config_and_override_of_a_story_is_valid(story: Path) -> None:
    text = story.read_text()
    for config in set(re.findall(r"\bconfigs/\w+\.yaml\b", text)):
        load_experiment(config)
    base = "configs/small_poe.yaml" if story.name == "three_arms.sh" else "configs/poe_1p3b.yaml"
    for override in overrides(text):
        if not override.startswith("objective."):                # those come together, see below
            load_experiment(base, [override])


def test_the_arms_are_what_they_are_called() -> None:
    arms = [split(words) for words in re.findall(r"(?m)^arm (.*)$", (RUNS / "three_arms.sh").read_text())]
    bp, poe, logop = [load_experiment(config, [o for o in changes if o != "$@"]) for _, config, *changes in arms]
    assert (bp.model.poe_mode, poe.model.poe_mode) == ("none", "flat")
    assert (poe.objective.kind, poe.objective.alpha, logop.objective.kind) == ("ce", 0.0, "residual_logop")
    assert bp.data == poe.data == logop.data and bp.schedule == poe.schedule == logop.schedule
    assert bp.seed == poe.seed == logop.seed and bp.batch == poe.batch == logop.batch


def directives(story: Path) -> dict[str, str]:
    """The #SBATCH lines, as SLURM reads them: those before the first command."""
    found = {}
    for line in story.read_text().splitlines()[1:]:
        if not line.startswith("#"):
            break
        if line.startswith("#SBATCH --"):
            key, _, value = line.removeprefix("#SBATCH --").partition("=")
            found[key] = value
    return found


@pytest.mark.parametrize("story", sorted(RUNS.glob("*.sbatch")), ids=name)
def test_a_job_asks_for_what_its_config_can_use(story: Path) -> None:
    asked = directives(story)
    assert asked["ntasks-per-node"] == "1" and asked["signal"] == "B:USR1@120" and "requeue" in asked
    assert asked["open-mode"] == "append", "a requeued job must not overwrite what the first one said"
    config = re.search(r"CONFIG:-([\w/.]+)", story.read_text())
    rows = re.search(r"batch\.device_batch_size=\"\$\{ROWS:-(\d+)\}\"", story.read_text())
    assert config is not None and rows is not None
    experiment = load_experiment(config[1], [f"batch.device_batch_size={rows[1]}"])
    make_plan(experiment, int(asked["nodes"]) * int(asked["gpus-per-node"]))


def test_skypilot(monkeypatch: pytest.MonkeyPatch) -> None:
    task = yaml.safe_load((RUNS / "skypilot.yaml").read_text())
    assert set(task) == {"name", "num_nodes", "workdir", "resources", "envs", "volumes", "setup", "run"}
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n"], input=task[part], text=True).returncode == 0
    ranks = task["num_nodes"] * int(task["resources"]["accelerators"].rpartition(":")[2])
    make_plan(load_experiment(task["envs"]["CONFIG"], task["envs"]["OVERRIDES"].split()), ranks)


# -- SLURM ------------------------------------------------------------------------------------------------------------

SRUN = """#!{python}
# srun: starts the command once per node, in a session of its own, and forwards signals to these tasks alone; or to all
# processes of a task, torchrun among them, as a SLURM may.
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = [subprocess.Popen(words, start_new_session=True, env={{**os.environ, "SLURM_NODEID": str(node)}})
         for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))]
for number in (signal.SIGUSR1, signal.SIGTERM):
    send = os.killpg if "EVERYONE" in os.environ else os.kill
    signal.signal(number, lambda n, _: [send(task.pid, n) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
# scontrol: all nodes are this machine; what is to be requeued is written down.
case $1 in
  show) echo 127.0.0.1; echo 127.0.0.1 ;;
  requeue) echo "$2" >> "$REQUEUED" ;;
  *) exit 1 ;;
esac
"""
STEPS = 100             # a busy machine hands a signal on from shell to shell for seconds
EXPERIMENT: dict[str, Any] = {
    "batch.device_batch_size": 2, "runtime.numerics": "strict", "schedule.cycles": [{**CYCLE, "steps": STEPS}],
    "checkpoint.every": None, "evaluation.every": None, "logging.pool_every": 100}


class Cluster:
    """What a job sees of SLURM, and a job that runs on it."""

    def __init__(self, folder: Path):
        self.folder, self.log, self.requeued = folder, folder / "job.log", folder / "requeued"
        self.room = Room(folder)
        for command, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
            (folder / "bin").mkdir(exist_ok=True)
            (folder / "bin" / command).write_text(text)
            (folder / "bin" / command).chmod(stat.S_IRWXU)

    def submit(self, story: str, config: Path, *words: str, nodes: int, start: int = 0,
               **more: str) -> subprocess.Popen[bytes]:
        """The batch shell of a job with one "GPU" per node; SLURM runs a copy of the script, from any folder."""
        spooled = self.folder / "slurm_script"
        spooled.write_bytes((RUNS / story).read_bytes())
        variables = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
                     "SLURM_JOB_ID": str(10000 + os.getpid()), "SLURM_JOB_NUM_NODES": str(nodes),
                     "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1",
                     "SLURM_RESTART_COUNT": str(start), "REQUEUED": str(self.requeued), "CONFIG": str(config),
                     "ROWS": "2", "OMP_NUM_THREADS": "1", **more}
        with open(self.log, "a") as out:
            return subprocess.Popen(["bash", str(spooled), *words], cwd=self.folder, env={**os.environ, **variables},
                                    stdout=out, stderr=subprocess.STDOUT)

    def times_requeued(self) -> int:
        return len(self.requeued.read_text().splitlines()) if self.requeued.exists() else 0


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def preempted_and_requeued(cluster: Cluster, story: str, nodes: tuple[int, int], number: signal.Signals,
                           **more: str) -> None:
    whole = cluster.room.whole("whole", 1, **EXPERIMENT)
    run = cluster.folder / "run"
    config = write_yaml(cluster.folder / "run.yaml", cluster.room.experiment("run", **EXPERIMENT))
    job = cluster.submit(story, config, nodes=nodes[0], **more)
    end = time.monotonic() + 60
    while not (run / "metrics.jsonl").exists() or last_step(run) < 3:
        assert time.monotonic() < end and job.poll() is None, cluster.log.read_text()
        time.sleep(0.02)
    job.send_signal(number)                                                    # to the batch shell alone
    assert job.wait(60) == 0, cluster.log.read_text()
    status = read_status(run) or {}
    assert (status["state"], status["exit_code"]) == ("preempted", 75), cluster.log.read_text()
    assert list_steps(run) == [status["step"]] and 3 <= status["step"] < STEPS, "saved for the signal alone"
    assert cluster.times_requeued() == 1, cluster.log.read_text()
    assert cluster.submit(story, config, nodes=nodes[1], start=1).wait(90) == 0, cluster.log.read_text()
    assert [line["step"] for line in lines_of(run) if line.get("event") == "resumed"] == [status["step"]]
    assert cluster.times_requeued() == 1, "a finished run goes into no queue"
    assert digest_of(run) == digest_of(whole) != digest_of(run, status["step"])


def test_a_job_saves_at_the_signal_requeues_itself_and_ends_as_if_nothing_had_been(cluster: Cluster) -> None:
    preempted_and_requeued(cluster, "pretrain_3b.sbatch", (1, 1), signal.SIGUSR1)


@pytest.mark.slow
@pytest.mark.parametrize("story, nodes, number", [
    ("pretrain_3b.sbatch", (2, 1), signal.SIGUSR1), ("continual_3b.sbatch", (2, 2), signal.SIGUSR1),
    ("pretrain_3b.sbatch", (1, 2), signal.SIGTERM)])
def test_so_it_does_on_several_nodes(cluster: Cluster, story: str, nodes: tuple[int, int],
                                     number: signal.Signals) -> None:
    """As many nodes as before and after, or other ones."""
    preempted_and_requeued(cluster, story, nodes, number)


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_step_is_the_same(cluster: Cluster) -> None:
    """torchrun has no handler for SIGUSR1: it must not die of it and take the ranks along, unsaved."""
    preempted_and_requeued(cluster, "pretrain_3b.sbatch", (2, 2), signal.SIGUSR1, EVERYONE="1")


def test_a_job_that_cannot_go_on_is_not_requeued(cluster: Cluster) -> None:
    """A start that is refused writes no status: what the last life left there must not put it into the queue."""
    config = write_yaml(cluster.folder / "run.yaml", cluster.room.experiment("run", **EXPERIMENT))
    (cluster.folder / "run").mkdir()
    left = '{"state": "preempted", "exit_code": 75, "host": "n0", "pid": 7, "time": "2026-01-01T00:00:00Z"}'
    (cluster.folder / "run" / "status.json").write_text(left)
    assert cluster.submit("pretrain_3b.sbatch", config, "batch.device_batch_sise=2", nodes=1).wait(60) == 2
    assert "did you mean" in cluster.log.read_text()                              # before any node was asked
    write_yaml(config, cluster.room.experiment("run", **EXPERIMENT, **{"data.train.0.path": str(cluster.folder)}))
    assert cluster.submit("pretrain_3b.sbatch", config, nodes=1).wait(60) == 1    # by the ranks, of torchrun
    assert "error[data]" in cluster.log.read_text() and "not requeued" in cluster.log.read_text()
    assert cluster.times_requeued() == 0


@pytest.mark.parametrize("state, code, restarts, requeued, ends", [
    ("preempted", 75, 3, 1, 0), ("failed", 6, 3, 1, 0), ("failed", 6, 10, 0, 6), ("failed", 5, 0, 0, 5),
    ("finished", 0, 0, 0, 0), ("running", None, 0, 1, 0), ("running", None, 10, 0, 1)])
def test_what_becomes_of_a_job(cluster: Cluster, state: str, code: int | None, restarts: int, requeued: int,
                               ends: int) -> None:
    """The end of a job by what its run said last; srun's own code is torchrun's 1 in all these cases."""
    (cluster.folder / "run").mkdir()
    status = {"state": state, "exit_code": code, "host": "n0", "pid": 7, "time": "now"}
    (cluster.folder / "run" / "status.json").write_text(json.dumps(status))
    script = f'source runs/slurm.sh; leave "{cluster.folder}/run" "an older life" 1 USR1'
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, capture_output=True, text=True, env={
        **os.environ, "PATH": f"{cluster.folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "5",
        "SLURM_RESTART_COUNT": str(restarts), "REQUEUED": str(cluster.requeued)})
    assert (done.returncode, cluster.times_requeued()) == (ends, requeued), done
