"""Continual pretraining: a cycle appended, a change of domain, and a run that begins with another's weights."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.checkpoint import list_steps, open_checkpoint
from nanopoe.config import experiment_from_dict, load_experiment
from nanopoe.config.schema import CycleConfig
from nanopoe.data.audit import check_audit
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.schedule import Schedule
from nanopoe.train import trajectory
from nanopoe.train.build import build_run
from tests.commands import ROOT, Done, call, refused
from tests.ranks import experiment_dict, run_ranks, tiny_data, write_shard
from tests.test_train import ALONE, digest, interrupted_at, metrics, train

BP = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}
QUIET = {"evaluation.every": None, "checkpoint.every": 4}
STILL = {f"schedule.cycles.{k}.peak": 1e-9 for k in range(2)}
HEADS = {f"lm_head_stages.{k}.weight" for k in range(2)}

# -- a further cycle of the 3B, at small scale ------------------------------------------------------------------------

SMALL = [
    "model.n_layer=4", "model.poe_stage_layers=[1,1,1,1]", "model.n_embd=32", "model.n_head=2", "model.n_kv_head=1",
    "model.intermediate_size=64", "model.vocab_size=300", "model.sequence_len=32", "data.lanes=12",
    "data.buffer_documents=4", "batch.tokens_per_step=384", "batch.device_batch_size=6",
    "optim.reference_batch_tokens=null", "optim.reference_scaling_params=null", "schedule.cycles.0.steps=8",
    "schedule.cycles.0.warmup_steps=2", "schedule.cycles.0.momentum_warmup_steps=2", "checkpoint.every=1",
    "checkpoint.keep_last=null", "evaluation.every=4", "evaluation.tokens=256", "logging.every=1",
    "logging.audit=true", "runtime.device=cpu", "runtime.compute_dtype=float32", "runtime.threads=1"]
SECOND = ["schedule.cycles.1.steps=5", "schedule.cycles.1.warmup_steps=2"]


def sources(folder: Path, names: list[str]) -> Path:
    """folder/NAME/{train,val} of each source, of words of its own, and a tokenizer."""
    tiny_data(folder / "words")
    shutil.copytree(folder / "words" / "tokenizer", folder / "tokenizer")
    for name in names:
        draw = random.Random(name)
        words = ["".join(draw.choice("aeioubdklmnrst") for _ in range(draw.randint(2, 7))) for _ in range(40)]
        texts = [" ".join(draw.choice(words) for _ in range(draw.randint(4, 60))) + "." for _ in range(60)]
        write_shard(folder / name / "train" / "shard_00000.parquet", texts[:44])
        write_shard(folder / name / "val" / "shard_00000.parquet", texts[44:])
    return folder


def small(config: str, run: Path, data: Path, *more: str) -> list[str]:
    """A file of configs/ at small scale, as arguments of a command."""
    second = SECOND if "cycle2" in config else []
    return [str(ROOT / "configs" / f"{config}.yaml"), f"run_dir={run}", f"data.folder={data}",
            f"tokenizer={data / 'tokenizer'}", *SMALL, *second, *more]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources of frontier_v1, tiny."""
    names = [s.name for s in load_experiment(ROOT / "configs" / "poe_3b.yaml").data.train]
    assert len(names) == 11
    return sources(tmp_path_factory.mktemp("frontier_v1"), names)


@pytest.fixture(scope="module")
def seam(mixture: Path) -> tuple[Path, list[Done]]:
    """The run of poe_3b.yaml, then of poe_3b_cycle2.yaml in the same folder; what the two said."""
    run = mixture / "runs" / "poe_3b"
    done = [call("train", *small(config, run, mixture), folder=mixture) for config in ("poe_3b", "poe_3b_cycle2")]
    assert [d.code for d in done] == [0, 0], done
    return run, done


def test_a_second_cycle_goes_on_where_the_first_stopped(seam: tuple[Path, list[Done]], mixture: Path) -> None:
    """Optimizer, data and schedule: two commands end bit for bit where one run of both cycles ends."""
    run, (first, second) = seam
    at_once = mixture / "runs" / "at_once"
    done = call("train", *small("poe_3b_cycle2", at_once, mixture), folder=mixture)
    assert done.code == 0 and digest(at_once, 13) == digest(run, 13), done
    assert metrics(at_once) == metrics(run)
    said = ("cycle 1, of 5 steps, begins after step 8: lr x0.24 before, x0.25 from here; momentum 0.914 before, 0.970 "
            "from here")
    assert said in done.out and said in second.out and "cycle 1" not in first.out
    assert "resumed checkpoint=" in second.out and "cycle=1 anchor=8" in second.out
    fresh = call("train", *small("poe_3b_cycle2", mixture / "runs" / "seed", mixture, "seed=1"), folder=mixture)
    assert fresh.code == 0 and digest(mixture / "runs" / "seed", 13) != digest(run, 13)              # control


def test_no_document_is_lost_or_read_twice_across_the_seam(seam: tuple[Path, list[Done]], tmp_path: Path) -> None:
    """By the audit of both lives; which sees a seam that lost what waited in the buffers."""
    result = check_audit(seam[0])
    assert result.problems == result.notes == []
    assert result.lives == ["steps 1 to 8 on 1 rank", "steps 9 to 13 on 1 rank"]
    assert (result.steps, result.rows) == (13, 13 * 12) and result.waiting > 0 and len(result.epochs) == 11
    shutil.copytree(seam[0], tmp_path / "run")
    path = tmp_path / "run" / "audit" / "rank_0.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    begin = next(line for line in lines if line.get("begin") == 8)
    for lane in begin["lanes"].values():
        lane["buffer"] = []
    path.write_text("".join(json.dumps(line, separators=(",", ": ")) + "\n" for line in lines))
    assert check_audit(tmp_path / "run").problems                                                    # control


def test_the_rates_around_the_seam_are_the_schedules(seam: tuple[Path, list[Done]]) -> None:
    lines = [line for line in metrics(seam[0]) if line["kind"] == "train"]
    peak, low = [(k + 1) / 2 for k in range(2)], [1 - 0.95 * k / 5 for k in range(5)]
    falls = [0.5 * k / 3 for k in (3, 2, 1)]
    assert [line["lr_scale"] for line in lines] == pytest.approx([*peak, 1, *low, .25, .5, *falls])
    assert [line["step"] for line in lines] == list(range(1, 14))
    assert [line["momentum"] for line in lines[8:10]] == [0.97, 0.97]               # it does not ramp again
    assert lines[8]["weight_decay"] == lines[0]["weight_decay"] > lines[7]["weight_decay"]


def test_a_resume_inside_a_cycle_never_re_anchors(seam: tuple[Path, list[Done]], mixture: Path, tmp_path: Path) -> None:
    """The anchor follows from the sizes stored with the checkpoint, and no allowance moves it."""
    interrupted_at(seam[0], 10, tmp_path / "run")
    again = small("poe_3b_cycle2", tmp_path / "run", mixture)
    moved = ["schedule.cycles.0.steps=7" if word == "schedule.cycles.0.steps=8" else word for word in again]
    for allowed in ([], ["resume.allow=[schedule]"]):
        refused(call("train", *moved, *allowed, folder=tmp_path), 4, "checkpoint",
                "is 2 steps into cycle 1, which began at step 8; schedule.cycles have it begin at 7; leave the cycles")
    refused(call("train", *small("poe_3b", tmp_path / "run", mixture), folder=tmp_path), 4, "checkpoint",
            "is of step 10, schedule.cycles now end at 8")
    done = call("train", *again, folder=tmp_path)
    assert done.code == 0 and "cycle=1 anchor=8" in done.out and "cycle 1, of" not in done.out, done
    assert digest(tmp_path / "run", 13) == digest(seam[0], 13)
    stored = open_checkpoint(tmp_path / "run", 11).experiment.schedule.cycles
    assert Schedule(stored).cycle_at(11) == (1, 3)
    interrupted_at(seam[0], 10, tmp_path / "longer")                        # control: what lies ahead may change
    longer = small("poe_3b_cycle2", tmp_path / "longer", mixture, "resume.allow=[schedule]")
    assert call("train", *longer, "schedule.cycles.1.warmdown_ratio=0.2", folder=tmp_path).code == 0


def test_one_report_has_both_cycles_and_the_seam(seam: tuple[Path, list[Done]], tmp_path: Path) -> None:
    done = call("report", seam[0], "--out", tmp_path / "report", folder=tmp_path)
    text = (tmp_path / "report" / "report.md").read_text()
    assert done.code == 0 and "Step 13 of 13" in text, done
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    evals = {line["step"]: line["bpb"]["full"] for line in metrics(seam[0]) if line["kind"] == "eval"}
    assert ["8", "cycle 1", "0.24", "0.25", f"{evals[8]:.6f} at 8", f"{evals[13]:.6f} at 13", "-"] in rows
    assert [row[:3] for row in rows if row[2:3] == [f"{evals[8]:.6f}"]] == [["8", "0", f"{evals[8]:.6f}"]]
    assert [row[:2] for row in rows if row[2:3] == [f"{evals[12]:.6f}"]] == [["12", "1"]]
    assert ["1", "8 to 13", "2", "3", "0.5", "0", f"{evals[13]:.6f} at 13"] in rows
    interrupted_at(seam[0], 8, tmp_path / "first")                                  # control: no seam, no column
    shutil.rmtree(tmp_path / "first" / "evaluation", ignore_errors=True)
    kept = [line for line in (seam[0] / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] <= 8]
    (tmp_path / "first" / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    assert call("report", tmp_path / "first", folder=tmp_path).code == 0
    text = (tmp_path / "first" / "report" / "report.md").read_text()
    assert "Seams" not in text and "| step | full |" in text


# -- another domain ---------------------------------------------------------------------------------------------------

def test_another_domain_is_a_further_cycle(tmp_path: Path, command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """configs/quickstart_domain.yaml at small scale: asked for, kept in the lineage, and both sides told of."""
    data, run = sources(tmp_path / "data", ["stdlib", "own"]), tmp_path / "run"
    val = f"data.val=[{{name: stdlib, path: {data / 'stdlib/val'}}}, {{name: own, path: {data / 'own/val'}}}]"
    scale = [f"run_dir={run}", f"tokenizer={data / 'tokenizer'}", val, f"data.train.0.path={data / 'stdlib/train'}",
             "model.n_layer=4", "model.n_embd=32", "model.n_head=2", "model.n_kv_head=2", "model.vocab_size=300",
             "model.sequence_len=32", "data.buffer_documents=4", "batch.tokens_per_step=384",
             "batch.device_batch_size=6", "schedule.cycles.0.steps=8", "schedule.cycles.0.warmup_steps=2",
             "schedule.cycles.0.momentum_warmup_steps=2", "checkpoint.every=4", "checkpoint.keep_last=null",
             "evaluation.every=4", "evaluation.tokens=128", "logging.every=1", "logging.audit=true",
             "runtime.threads=1"]
    second = [ROOT / "configs" / "quickstart_domain.yaml", *scale, f"data.train.1.path={data / 'own/train'}",
              "schedule.cycles.1.steps=6", "schedule.cycles.1.warmup_steps=2"]
    assert call("train", ROOT / "configs" / "quickstart.yaml", *scale, folder=tmp_path).code == 0
    refused(call("train", *second, "resume.allow=[]", folder=tmp_path), 4, "checkpoint",
            r"was trained with data\.train\.1\..* resume\.allow=\[data\.train\] if it is meant")
    done = call("train", *second, folder=tmp_path)
    assert done.code == 0 and "cycle 1, of 6 steps, begins after step 8" in done.out, done
    entry, = open_checkpoint(run).state["lineage"]
    assert entry["step"] == 8 and all(key.startswith("data.train") for key in entry["changed"])
    audited = check_audit(run)
    assert audited.problems == [] and set(audited.epochs) == {"stdlib", "own"}, audited.report()
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 2)
    assert command("evaluate", run, "--steps", "8,14", "--no-speed", "--calibration-tokens", "64").code == 0
    assert call("report", run, folder=tmp_path).code == 0
    text = (run / "report" / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    told = {step: json.loads((run / "evaluation" / f"step_{step:08d}.json").read_text()) for step in (8, 14)}
    for step, cycle in ((8, "0"), (14, "1")):
        own = told[step]["sources"]
        assert [str(step), cycle, f"{own['stdlib']['bpb']:.6f}", f"{own['own']['bpb']:.6f}"] in rows
        assert own["own"]["bpb"] != own["stdlib"]["bpb"] and own["own"]["tokens"] == own["stdlib"]["tokens"] == 64
    row, = (row for row in rows if row[:2] == ["8", "cycle 1"])
    assert row[2:6] == ["0.24", "0.25", *(f"{told[step]['bpb']['full']:.6f} at {step}" for step in (8, 14))]
    assert "data.train.1.name null to own" in row[6]


# -- a run that begins with another's weights -------------------------------------------------------------------------

@pytest.fixture(scope="module")
def bp(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("sources") / "bp"
    train(ALONE, experiment_dict(data, run, **BP, **QUIET))
    return run


@pytest.fixture(scope="module")
def poe(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With stage heads."""
    run = tmp_path_factory.mktemp("sources") / "poe"
    train(ALONE, experiment_dict(data, run, **QUIET))
    return run


def from_run(path: Path, optimizer: bool = False, step: int | None = None) -> dict[str, Any]:
    return {"init_from": {"path": str(path), "step": step, "optimizer": optimizer}}


def told_at_start(run: Path) -> str:
    return (run / "logs" / "rank_0.log").read_text()


@pytest.mark.parametrize(("stages", "new"), [(BP, set()), ({"model.stage_heads": False}, set()), ({}, HEADS)],
                         ids=["as BP", "as PoE", "as PoE with heads"])
def test_weights_go_on_as_bp_or_as_poe(data: Path, bp: Path, tmp_path: Path, stages: dict[str, Any],
                                       new: set[str]) -> None:
    train(ALONE, experiment_dict(data, tmp_path / "on", **stages, **QUIET, **STILL, **from_run(bp)))
    start, on = open_checkpoint(bp), open_checkpoint(tmp_path / "on")
    fresh = tmp_path / "fresh"
    train(ALONE, experiment_dict(data, fresh, **stages, **QUIET, **STILL))
    assert on.weights.keys() - start.weights.keys() == new
    for name in start.weights:                                  # with rates of nearly 0 they are where they began
        assert (on.read(name) - start.read(name)).abs().max() < 1e-6, name
    name = "transformer.h.2.attn.c_q.weight"
    assert (open_checkpoint(fresh).read(name) - start.read(name)).abs().max() > 1e-3                 # control
    for name in new:
        assert torch.allclose(on.read(name), open_checkpoint(fresh).read(name), atol=1e-6)
    assert on.step == 8 and on.state["tokens"] == 8 * 256       # of its own schedule and data
    assert on.state["position"]["step"] == 8
    begun = {"path": str(bp), "step": 8, "digest": on.manifest.fingerprints["base"], "optimizer": False,
             "initialised": sorted(new)}
    assert on.state["lineage"] == [{"step": 0, "changed": {"init_from": [None, begun]}}]
    assert open_checkpoint(fresh).state["lineage"] == []
    said = told_at_start(tmp_path / "on")
    assert f"begun with the weights of {bp}, step 8, without its optimizer's state" in said
    assert ("initialised from the seed: lm_head_stages.0.weight, lm_head_stages.1.weight" in said) == bool(new)
    assert ("has no backout" in said) == (stages is not BP)


CONSTANT = {"schedule.cycles": [{"steps": 4, "warmup_steps": 0, "warmdown_ratio": 0.0, "peak": 1.0, "final_frac": 1.0,
                                 "momentum_warmup_steps": 0}], "optim.weight_decay": 0.0, "data.replay_steps": 4,
            "evaluation.every": None, "checkpoint.every": 4, "runtime.numerics": "strict"}




@pytest.mark.parametrize("size", [1, 2])
def test_the_optimizer_comes_along(data: Path, tmp_path: Path, size: int) -> None:
    """With one rate for all steps and the same rows every 4, a run that begins with another's step 4 makes the very
    updates that the other makes from there; without the moments it does not."""
    eight = {**CONSTANT, "schedule.cycles": [{**CONSTANT["schedule.cycles"][0], "steps": 8}]}       # type: ignore[index]
    train(ALONE, experiment_dict(data, tmp_path / "whole", **eight))
    states = {}
    for optimizer in (True, False):
        experiment = experiment_dict(data, tmp_path / str(optimizer), **CONSTANT,
                                     **from_run(tmp_path / "whole", optimizer, 4))
        assert run_ranks(train, size, experiment) == [4] * size
        states[optimizer] = open_checkpoint(tmp_path / str(optimizer))
    whole = open_checkpoint(tmp_path / "whole", 8)

    def same(name: str, other: bool) -> bool:
        return torch.equal(states[other].read(name), whole.read(name))

    assert all(same(name, True) for name in whole.manifest.tensors) and not same("transformer.wte.weight", False)
    assert [states[kind].state["optimizer_steps"] for kind in (True, False)] == [8, 4]
    assert "and its optimizer's state" in told_at_start(tmp_path / "True")
    interrupted_at(tmp_path / "True", 4, tmp_path / "again")                        # a resume needs the source no more
    shutil.rmtree(tmp_path / "whole")
    longer = experiment_dict(data, tmp_path / "again", **eight, **from_run(tmp_path / "whole", True, 4))
    assert train(ALONE, {**longer, "resume": {"allow": ["schedule"]}}) == 8
    lineage = open_checkpoint(tmp_path / "again").state["lineage"]
    assert [entry["step"] for entry in lineage] == [0, 4]


def test_moments_are_taken_whole_or_not_at_all(data: Path, bp: Path, poe: Path, tmp_path: Path) -> None:
    heads = experiment_dict(data, tmp_path / "heads", **QUIET, **from_run(bp, True))
    with pytest.raises(CheckpointError, match=r"lacks optimizer state of lm_head_stages\.0\.weight::exp_avg, .* and 1 "
                                              r"more; set init_from\.optimizer=false"):
        train(ALONE, heads)
    assert not list_steps(tmp_path / "heads")
    flat = {**QUIET, "model.stage_heads": False}
    train(ALONE, experiment_dict(data, tmp_path / "flat", **from_run(bp, True), **flat))
    taken = open_checkpoint(tmp_path / "flat")                  # BP trains its backout; what is not trained is left
    assert taken.state["optimizer_steps"] == 16 and "backout_lambda::exp_avg" not in taken.optimizer_state
    assert "backout_lambda::exp_avg" in open_checkpoint(bp).optimizer_state


@pytest.mark.parametrize(("changes", "words"), [
    ({"model.stage_heads": False}, r"model\.stage_heads is False, its base has True"),
    ({"model.poe_every": None, "model.poe_stage_layers": [3, 1]}, r"the stages' last layers is \(2, 3\), its base has"),
    (BP, r"model\.stage_heads is False, its base has True"),
    ({"model.n_embd": 64}, r"model\.n_embd is 64, its base has 32")])
def test_heads_stay_where_they_were_trained(data: Path, poe: Path, tmp_path: Path, changes: dict[str, Any],
                                            words: str) -> None:
    experiment = experiment_dict(data, tmp_path / "run", **QUIET, **from_run(poe), **changes)
    with pytest.raises(CheckpointError, match=words):
        build_run(experiment_from_dict(experiment, "test"), ALONE)
    assert build_run(experiment_from_dict(experiment_dict(                                           # control
        data, tmp_path / "hier", **QUIET, **from_run(poe), **{"model.poe_mode": "hier"}), "test"), ALONE).step == 0


def test_a_run_goes_on_from_what_it_holds(data: Path, bp: Path, tmp_path: Path) -> None:
    """init_from and resume are two things: a folder with checkpoints does not begin anew, and no start is forgotten."""
    interrupted_at(bp, 4, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"is of a run that began without init_from; .* name another run_dir"):
        train(ALONE, experiment_dict(data, tmp_path / "run", **BP, **QUIET, **from_run(bp)))
    assert train(ALONE, experiment_dict(data, tmp_path / "run", **BP, **QUIET)) == 8                 # control
    train(ALONE, experiment_dict(data, tmp_path / "on", **BP, **QUIET, **from_run(bp)))
    interrupted_at(tmp_path / "on", 4, tmp_path / "half")
    with pytest.raises(CheckpointError, match="is of a run that began with init_from"):
        train(ALONE, experiment_dict(data, tmp_path / "half", **BP, **QUIET))
    with pytest.raises(CheckpointError, match=r"init_from\.optimizer False, now True"):
        train(ALONE, experiment_dict(data, tmp_path / "half", **BP, **QUIET, **from_run(bp, True)))
    moved = {"init_from": {"path": "moved", "step": 8, "optimizer": False}}
    assert train(ALONE, experiment_dict(data, tmp_path / "half", **BP, **QUIET, **moved)) == 8
    assert digest(tmp_path / "half", 8) == digest(tmp_path / "on", 8)


@pytest.mark.parametrize(("changes", "line"), [
    ({"init_from": {"path": "x", "step": None}}, "init_from.optimizer: needed with task pretrain, true or false"),
    ({"init_from": {"path": "x", "step": None, "optimizer": True}, "task": "sft"},
     "init_from.optimizer: must be null with task sft, which begins with an optimizer of its own"),
    ({"init_from": {"path": "out/run", "step": None, "optimizer": True}},
     "run_dir: 'out/run' is also read from; a run needs a folder of its own")])
def test_what_a_start_must_say(data: Path, changes: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment_from_dict(experiment_dict(data, Path("out/run"), **changes), "test")
    assert line in caught.value.problems
    experiment_from_dict(experiment_dict(data, Path("out/run"), **from_run(Path("x"))), "test")      # control


def test_it_is_called_what_it_is(data: Path, bp: Path, tmp_path: Path) -> None:
    from scripts.check_config import task_of

    run = tmp_path / "on"
    experiment = experiment_dict(data, run, **BP, **QUIET, **from_run(bp, True, 4))
    assert task_of(experiment_from_dict(experiment, "test")) == f"pretrain from {bp}, with its optimizer"
    train(ALONE, experiment)
    assert call("report", run, folder=tmp_path).code == 0
    text = (run / "report" / "report.md").read_text().replace("\\", "")
    assert "Pretraining that begins with the weights of bp, step 4, and its optimizer's state." in text


def test_the_published_cycle_by_its_own_file() -> None:
    """SPEC 9, of configs/poe_3b_cycle2.yaml itself."""
    cycles: tuple[CycleConfig, ...] = load_experiment(ROOT / "configs" / "poe_3b_cycle2.yaml").schedule.cycles
    schedule = Schedule(cycles)
    for rel, value in {0: 0.0005, 77: 0.039, 999: 0.5, 22_860: 0.5, 22_861: 0.5 * 27_939 / 27_940, 50_800: 0.0}.items():
        assert schedule.lr_scale(83_923 + rel) == pytest.approx(value, abs=1e-15), rel
