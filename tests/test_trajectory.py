"""The record of a checkpoint: one pass, any number of ranks, made once; and the command that makes a trajectory."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.checkpoint.evaluation import evaluation_path, select_steps
from nanopoe.data.shards import CONVERSATION
from nanopoe.data.validation import validation_by_source
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.infer.calibrate import MAX, P99, Observer, calibrate, calibration
from nanopoe.infer.engine import Engine
from nanopoe.infer.probes import probes
from nanopoe.infer.text import ends, question_ids
from nanopoe.infer.weights import Weights
from nanopoe.model import GPT
from nanopoe.model.pool import View
from nanopoe.train import trajectory
from nanopoe.train.evaluate import evaluate
from nanopoe.train.restore import load_cascade
from nanopoe.train.trajectory import TIMES, Request, evaluate_checkpoint, finished, gathered
from tests.commands import Done, call, refused, write_yaml
from tests.models import three_stages
from tests.ranks import experiment_dict, run_ranks
from tests.rows import chat_shards, write
from tests.test_specialist import specialist_dict, train

ROWS = torch.randint(300, (7, 33), generator=torch.Generator().manual_seed(3))
ROWS[2, 20:] = ~ROWS[2, 20:]                                         # some that are no targets


# -- calibration without a pass of its own ----------------------------------------------------------------------------

def observed(model: GPT, rows: torch.Tensor, count: int) -> Observer:
    observer = Observer(model, count)
    for part in rows.split(2):
        ids, targets = torch.where(part < 0, ~part, part)[:, :-1], part[:, 1:].clamp(min=-1)
        with torch.no_grad():
            observer(model.boundary_states(ids), targets)
    return observer


def observed_by_rank(world: World, count: int) -> str:
    first = len(range(world.rank, count, world.size))
    table = gathered(observed(three_stages(), ROWS[world.rank::world.size], first).table(), 32, world)
    return json.dumps(torch.nan_to_num(table, -1.0).tolist())


@pytest.mark.parametrize("count", [7, 5, 1])
def test_ranks_gather_what_one_process_sees(count: int) -> None:
    """Uneven shares, and ranks without any row among them."""
    alone = torch.nan_to_num(observed(three_stages(), ROWS, count).table(), -1.0)
    assert alone.shape == (count, 32, 2 + 2 + 2 + 3 + 6)
    for size in (2, 3):
        for answer in run_ranks(observed_by_rank, size, count):
            assert torch.allclose(torch.tensor(json.loads(answer)), alone, atol=1e-5)
    assert not torch.allclose(alone, alone.flip(0), atol=1e-5) or count == 1                    # control: order counts


def test_observed_rows_are_the_first(model: GPT) -> None:
    found = calibration(observed(model, ROWS, 5).table(), model.config)
    close_to(found, calibrate(model, ROWS[:5].split(2)))
    with pytest.raises(AssertionError):
        close_to(found, calibrate(model, [ROWS]))                                               # control


def test_curves_end_where_they_must(model: GPT) -> None:
    found = calibrate(model, [ROWS])
    wand, routing = found["curves"]["wand"], found["curves"]["routing"]
    assert wand[-1] == {"scale": 1.0, **found["wand"]["p99"]}
    assert found["curves"]["lead"][-1] == {"scale": 1.0, **found["wand"]["lead"]}
    assert wand[0]["exits"] == [1.0, 0.0, 0.0]
    agreement = [point["agreement"] for point in wand]
    assert agreement[0] < agreement[-1] and [p["predicted_speedup"] for p in wand] == sorted(
        (p["predicted_speedup"] for p in wand), reverse=True)
    assert routing[-1]["routed"] == 1.0 and routing[-1]["agreement"] == found["routing"]["agreement"]
    assert routing[0]["routed"] < 0.02 and routing[0]["agreement"] > routing[-1]["agreement"]
    at = found["routing"]["threshold"]
    if at is not None:
        near = [p for p in routing if p["threshold"] >= at]
        assert all(p["routed"] <= found["routing"]["routed"] for p in near)


@pytest.fixture(scope="module")
def model() -> GPT:
    return three_stages()


# -- the record -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """poe/ and bp/ of 8 steps, checkpoints at 4 and 8. Not to be changed."""
    folder = tmp_path_factory.mktemp("trajectory")
    bp = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}
    for name, changes in (("poe", {}), ("bp", bp)):
        experiment = experiment_dict(data, folder / name, **changes,
                                     **{"evaluation.tokens": 128, "checkpoint.every": 4, "checkpoint.keep_last": 9})
        assert call("train", write_yaml(folder / f"{name}.yaml", experiment), folder=folder).code == 0
    return folder


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(runs / "poe", tmp_path / "poe"))


Command = Callable[..., Done]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """scripts.evaluate, in this process."""
    def here(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["scripts.evaluate", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            importlib.import_module("scripts.evaluate").main()
        return Done(left.value.code, *capsys.readouterr())               # type: ignore[arg-type]

    return here


HERE = World(0, 1, torch.device("cpu"))
QUIET = Request(tokens=512, calibration_tokens=256, speed=False)


def timeless(record: dict[str, Any]) -> dict[str, Any]:
    modes = record["modes"] and {k: v for k, v in record["modes"].items() if k != "threads"}
    return {**record, "seconds": None, "modes": modes}


def record_of(world: World, folder: str) -> str:
    return json.dumps(evaluate_checkpoint(folder, 8, QUIET, world))


def test_every_column_from_one_pass(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passed, real = [], GPT.boundary_states

    def counted(self: GPT, ids: torch.Tensor) -> list[torch.Tensor]:
        passed.append(ids.numel())
        return real(self, ids)

    monkeypatch.setattr(GPT, "boundary_states", counted)
    shown: list[tuple[int, int]] = []
    record = evaluate_checkpoint(runs / "poe", None, QUIET, HERE, lambda done, total: shown.append((done, total)))
    assert sum(passed) == 512 == record["tokens"]                        # all views and the calibration
    assert shown[-1] == (16, 16)
    assert record["step"] == 8 and record["calibration"]["tokens"] == 256
    assert len(record["bpb"]["stages"]) == len(record["bpb"]["prefixes"]) == 2 == len(record["accuracy"]["stages"])
    assert set(record["bpb"]["alpha"]) == {"0", "0.25", "0.5", "0.75", "1"}
    assert record["crossover_gap"] == record["bpb"]["full"] - record["bpb"]["stages"][-1]
    assert len(record["calibration"][P99]) == len(record["calibration"][MAX]) == 1
    assert record["calibration"]["routing"]["cap"] == 0.02
    assert [len(p["answers"]) for p in record["probes"]] == [3] * 7
    modes = record["modes"]
    s = modes["speculative"]
    assert (modes["prompts"], modes["tokens"], s["drafts"]) == (7, 60, 4)
    assert s["accepted"] + s["rounds"] == 420 and s["equal"] == 7        # a round adds one token to those accepted
    assert s["acceptance"] == s["accepted"] / s["drafted"] and s["mean_accepted"] == s["accepted"] / s["rounds"]
    for name in ("wand_max", "wand_p99", "wand_lead", "wand_lead_p99", "routed"):
        assert sum(modes[name]["exits"]) == 420 and 0 <= modes[name]["agreement"] <= 1
    assert all(modes[name][time] is None for name in ("speculative", "wand_max", "routed") for time in TIMES)
    json.dumps(record, allow_nan=False)
    for answer in run_ranks(record_of, 2, str(runs / "poe")):
        close_to(timeless(json.loads(answer)), timeless(record))


def close_to(a: Any, b: Any) -> None:
    """Equal but for rounding."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        a, b = list(a.values()), list(b.values())
    if isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close_to(x, y)
    else:
        assert a == (pytest.approx(b, rel=1e-4, abs=1e-5) if isinstance(b, float) else b)


def test_times_are_of_every_mode(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 6)
    record = evaluate_checkpoint(runs / "poe", 8, Request(tokens=64, calibration_tokens=64), HERE)
    assert all(record["modes"][name][time] > 0 for name in ("speculative", "speculative_auto", "wand_lead", "routed")
               for time in TIMES)


def test_a_model_without_stages_has_no_modes(runs: Path, ask: Command) -> None:
    done = ask(runs / "bp", "--tokens", "128")
    record = json.loads(evaluation_path(runs / "bp", 8).read_text())
    assert done.code == 0 and record["calibration"] is None and record["modes"] is None
    assert record["bpb"]["stages"] is None and len(record["probes"][0]["answers"]) == 1


def test_a_record_is_finished_when_nothing_has_changed(run: Path, ask: Command,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 6)
    assert finished(run, 8, QUIET) is None
    assert ask(run, "--tokens", "512", "--calibration-tokens", "256", "--no-speed").code == 0
    record = finished(run, 8, QUIET)
    assert record is not None and record["step"] == 8
    assert finished(run, 8, Request(512, 256, speed=True)) is None               # times were not taken
    assert finished(run, 8, Request(500, 256, False)) is None
    assert finished(run, 8, Request(512, 128, False)) is None
    assert finished(run, 4, QUIET) is None
    path = evaluation_path(run, 8)
    path.write_text(json.dumps({**record, "request": {**record["request"], "speed": True}}))
    assert finished(run, 8, QUIET) is not None                                   # nobody asked for the times
    for key, value in (("checkpoint", "0" * 64), ("validation", {"tiny": "other"})):
        path.write_text(json.dumps({**record, "request": {**record["request"], key: value}}))
        assert finished(run, 8, QUIET) is None
    del record["request"]
    path.write_text(json.dumps(record))                                          # an older form
    assert finished(run, 8, QUIET) is None


def test_a_trajectory_goes_on_where_it_stopped(run: Path, ask: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 6)
    made, real = [], trajectory.evaluate_checkpoint

    def counted(run_dir: Path, step: int, *rest: Any) -> dict[str, Any]:
        if made == stop_after:
            raise KeyboardInterrupt
        made.append(step)
        return real(run_dir, step, *rest)

    monkeypatch.setattr(trajectory, "evaluate_checkpoint", counted)
    options = ("--tokens", "64", "--calibration-tokens", "64", "--no-speed")
    stop_after: list[int] | None = [4]
    assert ask(run, "--steps", "all", *options).code != 0
    assert made == [4] and evaluation_path(run, 4).exists() and not evaluation_path(run, 8).exists()
    before, stop_after = evaluation_path(run, 4).stat(), None
    done = ask(run, "--steps", "all", *options)
    assert made == [4, 8] and done.code == 0
    assert done.out.count("already evaluated") == 1 and done.out.count("bpb") == 2
    assert evaluation_path(run, 4).stat().st_ino == before.st_ino
    lines = ask(run, "--steps", "4-8", "--json", *options).out.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8] and made == [4, 8]
    assert ask(run, "--steps", "4,8", "--again", *options).code == 0
    assert made == [4, 8, 4, 8]
    assert "--again repeats it" in ask(run, "--step", "4", *options).out


def test_bad_requests_are_one_line(run: Path, ask: Command) -> None:
    refused(ask(run, "--steps", "5"), 4, "checkpoint", "no step 5.*steps there: 4, 8")
    refused(ask(run, "--steps", "4,x"), 2, "config", "--steps.*expected steps such as 100,200-600")
    refused(ask(run, "--calibration-tokens", "0"), 2, "config", "--calibration-tokens")
    assert ask(run, "--steps", "all", "--step", "4").code == 2
    evaluation_path(run, 8).parent.mkdir(exist_ok=True)
    evaluation_path(run, 8).write_text("{torn")
    refused(ask(run, "--steps", "all", "--tokens", "64"), 3, "data", "not an evaluation of nanopoe")


@pytest.mark.parametrize("text,steps", [("all", [1, 5, 10, 20]), ("5", [5]), ("20,1", [1, 20]), ("2-10", [5, 10]),
                                        ("5-99, 1", [1, 5, 10, 20])])
def test_steps_are_chosen_by_number_and_range(text: str, steps: list[int]) -> None:
    assert select_steps(text, [1, 5, 10, 20], Path("run")) == steps


@pytest.mark.parametrize("text", ["", "a", "1-", "-3", "1--3", "١", "1,,5", "3.0", "9" * 5000, "5-1"])
def test_steps_are_digits(text: str) -> None:
    with pytest.raises(ConfigError, match="expected steps such as"):
        select_steps(text, [1, 5], Path("run"))
    with pytest.raises(CheckpointError, match="no step from 2 to 4"):
        select_steps("2-4", [1, 5], Path("run"))


# -- conversations: specialists and full fine-tuning ------------------------------------------------------------------

@pytest.fixture(scope="module")
def chats(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/ (text), stage/ on it and sft/ from it; both on conversations: stage/ of two sources, of which `long` has
    some longer than a row. Not to be changed."""
    folder = tmp_path_factory.mktemp("chats")
    chat_shards(folder / "short", val=8)
    for split, first in (("train", 0), ("val", 100)):
        texts = [json.dumps({"messages": [{"role": "user", "content": f"{n} {'ab' * (n % 3) * 20}"},
                                          {"role": "assistant", "content": f"x{n}"}]})
                 for n in range(first, first + 12)]
        write(folder / "long" / split, [[texts]], CONVERSATION)

    def conversations(*names: str) -> dict[str, Any]:
        sources = {f"data.{split}": [{"name": name, "path": str(folder / name / split)} for name in names]
                   for split in ("train", "val")}
        return {"data.kind": "conversations", **sources, "data.packing": "bestfit_pad", "data.case_aug_prob": 0.0,
                "data.json_layout_prob": 0.0}

    T64 = {"model.sequence_len": 64, "model.window_sizes": [32] * 4, "batch.device_batch_size": 4,
           "batch.tokens_per_step": 256, "evaluation.tokens": 4096}
    base, last = folder / "base", {"checkpoint.every": None}
    train(HERE, experiment_dict(data, base, **last))
    train(HERE, specialist_dict(data, folder / "stage", base, **{**T64, **conversations("short", "long"),
                                                                 "checkpoint.every": 4}))
    sft = {"name": "sft", "task": "sft", "init_from": {"path": str(base), "step": None}}
    train(HERE, experiment_dict(data, folder / "sft", **{**T64, **conversations("short"), **last, **sft}))
    return folder


CHAT = Request(calibration_tokens=256, speed=False)


def chat_record(world: World, folder: str) -> str:
    return json.dumps(evaluate_checkpoint(folder, 8, CHAT, world))


def test_a_specialist_is_evaluated_by_source_against_its_base(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 2)
    record = evaluate_checkpoint(chats / "stage", 8, CHAT, HERE)
    loaded = load_cascade(chats / "stage", 8, HERE)
    alone = validation_by_source(loaded.checkpoint.experiment, loaded.tokenizer, HERE)
    assert list(record["sources"]) == ["short", "long"]
    for name, found in record["sources"].items():
        own = evaluate(loaded.model, alone[name], loaded.tokenizer.token_bytes)
        special = own["specialists"]
        for key in ("bpb", "accuracy"):
            assert found[key] == special[key]["specialist"][0] and found["dual"][key] == special[key]["dual"][0]
            assert found["base"][key] == own[key]["full"]
        assert found["bpb"] != found["base"]["bpb"] != found["dual"]["bpb"]                  # control: it has learned
        assert (found["targets"], found["bytes"]) == (own["targets"], own["bytes"])
    assert record["sources"]["short"]["bpb"] != record["sources"]["long"]["bpb"]
    assert record["sources"]["long"]["truncated"] == record["truncated"] > 0 == record["sources"]["short"]["truncated"]
    assert record["calibration"] is None and record["modes"] is None
    assert evaluate_checkpoint(chats / "base", 8, QUIET, HERE)["modes"] is not None          # control: the base's own
    assert [list(p["answers"]) for p in record["probes"]] == [["specialist", "dual", "base"]] * 7
    for answer in run_ranks(chat_record, 2, str(chats / "stage")):
        close_to(json.loads(answer)["sources"], record["sources"])


def test_full_fine_tuning_is_evaluated_by_source(chats: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One source: the pass over all is its own. It has stages of its own, so it is calibrated."""
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 2)
    record = evaluate_checkpoint(chats / "sft", 8, CHAT, HERE)
    loaded = load_cascade(chats / "sft", 8, HERE)
    alone = validation_by_source(loaded.checkpoint.experiment, loaded.tokenizer, HERE)["short"]
    own, found = evaluate(loaded.model, alone, loaded.tokenizer.token_bytes), record["sources"]["short"]
    assert (found["bpb"], found["accuracy"], found["bytes"]) == (own["bpb"]["full"], own["accuracy"]["full"],
                                                                 own["bytes"])
    assert found["base"] is found["dual"] is None and record["truncated"] == 0
    assert record["calibration"] is not None and record["modes"]["prompts"] == 7
    text = evaluate_checkpoint(chats / "base", 8, QUIET, HERE)
    assert text["sources"] is None and (text["asked"], record["asked"]) == ("text", "question")


def test_probes_of_a_conversation_are_questions(chats: Path) -> None:
    loaded = load_cascade(chats / "stage", 8, HERE)
    weights, tokenizer = Weights(loaded.model), loaded.tokenizer
    prompt = "The capital of France is"
    asked, said = (probes(weights, tokenizer, prompts=[prompt], asked=how)[0]["answers"]
                   for how in ("question", "text"))
    ids = question_ids(tokenizer, prompt)
    for view in ("specialist", "dual", "base"):
        answer = Engine(weights, View(view)).generate([ids], max_new_tokens=24, stop=ends(tokenizer))[0]  # type: ignore[arg-type]
        assert asked[view] == tokenizer.decode(answer)
    assert asked != said                                                                         # control


def test_what_lost_its_front_is_said(chats: Path, ask: Command, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """By the command, and in metrics.jsonl by training; of short conversations nothing."""
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 2)
    run = Path(shutil.copytree(chats / "stage", tmp_path / "stage"))
    options = ("--no-speed", "--calibration-tokens", "64")
    done = ask(run, *options)
    lost = json.loads(evaluation_path(run, 8).read_text())["truncated"]
    assert done.code == 0 and f"{lost} conversations lost their front" in done.err, done
    assert "specialist" in done.out and "By source" in done.out and "against base" in done.out
    assert "stage 0" not in done.out and "crossover" not in done.out                             # they are the base's
    markdown = evaluation_path(run, 8).with_suffix(".md").read_text()
    assert "## By source" in markdown and "stage 0" not in markdown
    several = ask(run, "--steps", "all", *options)
    assert several.out.count("(base ") == 2 and "already evaluated" in several.out
    warned = {name: [line for line in events(chats / name) if "lost their front" in line.get("what", "")]
              for name in ("stage", "sft")}
    assert len(warned["stage"]) == 2 and warned["sft"] == []
    evals = [line for line in lines_of(chats / "stage") if line["kind"] == "eval"]
    assert [line["truncated"] for line in evals] == [lost, lost]
    sft = Path(shutil.copytree(chats / "sft", tmp_path / "sft"))
    done = ask(sft, *options)
    assert done.code == 0 and "lost their front" not in done.err and "stage 0" in done.out       # control


def lines_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> list[dict[str, Any]]:
    return [line for line in lines_of(run) if line["kind"] == "event"]
