"""Measurements of the bench: the memory of ranks as planned, the two optimizers equal, the loader's figures; tables of
medians and spreads; which commands take several ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.config import experiment_from_dict
from nanopoe.config.memory import memory_per_rank
from nanopoe.dist import World
from nanopoe.train import bench
from nanopoe.train.bench import bench_memory, bench_optimizer, bench_step, spread_of, timing
from nanopoe.train.bench_decode import medians
from nanopoe.train.bench_tables import show
from tests.commands import Done, call, refused, write_yaml
from tests.faults.harness import free_port
from tests.ranks import experiment_dict, run_ranks
from tests.test_specialist import specialist_dict


def memory(world: World, experiment: dict[str, Any]) -> dict[str, Any]:
    return bench_memory(experiment_from_dict(experiment, "test"), world)


WIDE = {"model.n_embd": 64, "model.sequence_len": 256, "model.vocab_size": 300, "batch.tokens_per_step": 4 * 256,
        "batch.device_batch_size": 2}
BP = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}


@pytest.mark.parametrize("changes", [
    {}, {"runtime.compute_dtype": "bfloat16", "model.n_head": 4},
    BP, {**BP, "batch.device_batch_size": 4, "runtime.activation_checkpointing": True},
    {"model.poe_mode": "hier", "batch.device_batch_size": 1},
    {"objective.kind": "residual_logop", "objective.rho": 0.5, "model.intermediate_size": 512},
], ids=["poe", "poe bf16 gqa", "bp", "bp run again", "hier", "residual_logop"])
def test_the_plan_is_within_a_tenth_of_the_measured(changes: dict[str, Any], data: Any, tmp_path: Any) -> None:
    experiment = experiment_dict(data, tmp_path, **{**WIDE, **changes})
    alone = World(0, 1, torch.device("cpu"))
    found = memory(alone, experiment)
    assert found["weights"] == found["weights_formula"] and found["optimizer"] == found["optimizer_formula"]
    assert 0.9 < found["ratio"] < 1.1
    doubled = experiment_dict(data, tmp_path, **{**WIDE, **changes, "model.intermediate_size": 1024})      # control
    planned = memory_per_rank(experiment_from_dict(doubled, "test"), 1).total
    assert not 0.9 < planned / found["measured"] < 1.1


def test_the_memory_of_ranks_is_the_plans(data: Any, tmp_path: Any) -> None:
    alone = memory(World(0, 1, torch.device("cpu")), experiment_dict(data, tmp_path, **WIDE))
    for changes in ({}, {"runtime.numerics": "strict"}, {"parallel.stages": 2, "batch.device_batch_size": 2}):
        two = run_ranks(memory, 2, experiment_dict(data, tmp_path, **{**WIDE, **changes}))[0]
        assert two["weights"] == two["weights_formula"] == alone["weights"]
        assert two["optimizer"] == pytest.approx(two["optimizer_formula"], rel=0.05)     # of the rank that has most
        assert two["optimizer"] < 0.7 * alone["optimizer"]
        assert 0.9 < two["ratio"] < 1.1
        assert two["measured"] < 0.95 * alone["measured"]


def test_both_forms_of_the_optimizer_are_one(data: Any, tmp_path: Any) -> None:
    found = bench_optimizer(experiment_from_dict(experiment_dict(data, tmp_path), "test"),
                            World(0, 1, torch.device("cpu")), steps=2)
    assert found["difference"] < 1e-5 and found["ratio"] == pytest.approx(found["sharded"] / found["plain"])


def test_the_bench_of_data_tells_what_a_packing_loses(data: Any) -> None:
    """Documents of 4 to 60 words in rows of 33: crop loses some, split nothing."""
    command = [sys.executable, "-m", "scripts.bench", "data", "--data", str(data / "train"), "--tokenizer",
               str(data / "tokenizer"), "--rows", "2", "--seq", "32", "--lanes", "4", "--buffer", "16",
               "--seconds", "0.2"]
    done = subprocess.run([*command, "--packing", "bestfit_split", "bestfit_crop", "--json"], capture_output=True,
                          text=True, check=True)
    split, crop = map(json.loads, done.stdout.splitlines())
    assert split["cropped"] == 0 < crop["cropped"] < 1
    for found in (split, crop):
        assert found["utilisation"] == 1 and found["epochs"] > 1
        assert found["tokens_per_s"] > 0 < found["encode_per_s"] and 0 < found["ratio"] < 10
        assert 0 < found["packing_share"] < found["thread_share"] < 1
        assert 0 < found["wait"] and found["steps_paced"] > 10 and 0 <= found["ready_share"] <= 1
    assert 0.7 < split["buffered_length"] < 1.4 < crop["buffered_length"]     # crop: the long ones pile up
    done = subprocess.run([*command[:4], "--data", str(data / "nowhere")], capture_output=True, text=True)
    assert done.returncode == 2 and "no such folder" in done.stderr and "Traceback" not in done.stderr


# -- the table of each command -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tiny(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with poe.yaml and stage.yaml, an experiment and one of a specialist."""
    folder = tmp_path_factory.mktemp("bench")
    write_yaml(folder / "poe.yaml", experiment_dict(data, folder / "poe"))
    write_yaml(folder / "stage.yaml", specialist_dict(data, folder / "stage", folder / "poe"))
    return folder


def words_of(what: str, tiny: Path, data: Path, times: int) -> list[str | Path]:
    """The command line that measures little, `times` times."""
    if what == "attention":
        return ["--length", "64", "--window", "16", "--device", "cpu", "--rounds", str(times)]
    if what == "data":
        return ["--data", data / "train", "--tokenizer", data / "tokenizer", "--rows", "2", "--seq", "32", "--lanes",
                "4", "--buffer", "16", "--seconds", "0.1"]
    return [tiny / ("stage.yaml" if what == "specialist" else "poe.yaml"), "--steps", str(times)]


def spreads(result: dict[str, Any]) -> list[float]:
    """Of everything timed, in the order of the table."""
    if "arms" in result:
        return [arm["spread"] for arm in result["arms"].values()]
    return list(result["spread"].values()) if isinstance(result["spread"], dict) else [result["spread"]]


def table(out: str) -> list[list[str]]:
    """The cells of a printed table, heads first."""
    lines = [line for line in out.splitlines() if line[:1] in "┃│"]
    return [[cell.strip() for cell in line[1:-1].replace("┃", "│").split("│")] for line in lines]


def shown(what: str, result: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The table of one result; heads first also where they are the first column."""
    show(what, [result])
    return heads_first(what, capsys.readouterr().out)


def heads_first(what: str, out: str) -> list[list[str]]:
    return [list(line) for line in zip(*table(out), strict=True)] if what == "data" else table(out)


@pytest.mark.parametrize("what, key, head", [
    ("step", "seconds", "s / step"), ("step", "first_step", "first step s"), ("optimizer", "plain", "plain ms"),
    ("memory", "measured", "measured"), ("head", "arms.materialised.seconds", "held s"),
    ("attention", "windowed", "windowed ms"), ("specialist", "arms.specialist.seconds", "s / step"),
    ("data", "tokens_per_s", "million tokens/s of ready batches")], ids=lambda word: word)
def test_a_table_has_medians_and_spreads(what: str, key: str, head: str, tiny: Path, data: Path,
                                         command: Callable[..., Done], capsys: pytest.CaptureFixture[str]) -> None:
    done = command("bench", what, *words_of(what, tiny, data, 3), "--json")
    assert done.code == 0, done
    result, = map(json.loads, done.out.splitlines())
    lines = shown(what, result, capsys)
    found, digits = spreads(result), 1 if what == "memory" else 0
    at, = (i for i, name in enumerate(lines[0]) if name.startswith("spread"))
    assert " ".join(line[at] for line in lines[1:]) == " ".join(f"{share:.{digits}%}" for share in found)
    assert all(share > 0 for share in found) or what == "memory"     # which may be the same in each step

    *path, last = key.split(".")
    part = result
    for name in path:
        part = part[name]
    part[last] = 1000 * part[last]                                   # a figure shows in its column, and in one line
    changed = [line[lines[0].index(head)] for line in shown(what, result, capsys)]
    assert sum(line[lines[0].index(head)] != cell for line, cell in zip(lines, changed, strict=True)) == 1

    done = command("bench", what, *words_of(what, tiny, data, 1))
    assert done.code == 0, done
    once = heads_first(what, done.out)
    assert once[0] == lines[0]
    if what != "data":                                               # control: what is timed once has no spread
        assert all(float(share[:-1]) == 0 for line in once[1:] for share in line[at].split())


def test_the_figures_of_several_times() -> None:
    assert timing([4.0, 1.0, 2.0]) == {"seconds": 2.0, "spread": 1.5} and spread_of([3.0]) == 0
    rounds = [{"tokens_per_s": rate, "ratio": 1 / rate, "exits": [1, 2]} for rate in (4.0, 1.0, 2.0)]
    assert medians(rounds, "tokens_per_s", "ratio") == {"tokens_per_s": 2.0, "ratio": 0.5, "exits": [1, 2],
                                                        "spread": 1.5}
    assert medians(rounds, "ratio", "tokens_per_s")["spread"] == 1.5 and medians(rounds[:1], "ratio")["spread"] == 0


def test_the_first_step_has_what_only_it_waits_for(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a compiler takes, once; the steps that are timed know nothing of it."""
    experiment, alone = experiment_from_dict(experiment_dict(data, tmp_path), "test"), World(0, 1, torch.device("cpu"))
    without = bench_step(experiment, alone, 2)                       # control
    assert without["seconds"] / 2 < without["first_step"] < 1
    slow, real = [1.0], bench.backward

    def late(*args: Any) -> Any:
        time.sleep(slow.pop() if slow else 0)
        return real(*args)

    monkeypatch.setattr(bench, "backward", late)
    found = bench_step(experiment, alone, 2)
    assert found["first_step"] > 1 > found["seconds"] and not slow


# -- ranks -------------------------------------------------------------------------------------------------------------

def two_ranks(*words: str | Path, folder: Path) -> list[Done]:
    """scripts.bench on both ranks of a world, as torchrun starts them."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}

    def rank(r: int) -> Done:
        (folder / str(r)).mkdir(parents=True)
        return call("bench", *words, folder=folder / str(r), RANK=str(r), LOCAL_RANK=str(r), **group)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(rank, range(2)))


@pytest.mark.parametrize("what", ["step", "specialist", "attention", "data", "decode"])
def test_what_measures_one_rank_refuses_two(what: str, tiny: Path, data: Path, tmp_path: Path) -> None:
    words = [tiny / "poe", "--device", "cpu"] if what == "decode" else words_of(what, tiny, data, 1)
    done = two_ranks(what, *words, folder=tmp_path)
    assert [d.code for d in done] == [2, 2] and not any(d.out for d in done)
    for d in done:
        refused(d, 2, "config", f"bench {what} measures one rank, not 2")


def test_what_measures_all_ranks_speaks_once(tiny: Path, data: Path, tmp_path: Path) -> None:
    """The control: the memory and the stages of two ranks, told by the first."""
    for what, more in (("memory", []), ("stages", ["--set", "parallel.stages=2"])):
        words = [what, *words_of(what, tiny, data, 2), *more]
        first, other = two_ranks(*words, folder=tmp_path / what)
        assert first.code == other.code == 0 and other.out == "", (first, other)
        heads, cells = table(first.out)
        line = dict(zip(heads, cells, strict=True))
        assert line["ranks"].startswith("2")
        assert len(line["spread"].split()) == {"memory": 1, "stages": 2}[what]
