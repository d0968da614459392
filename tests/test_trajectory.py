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
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.infer.calibrate import MAX, P99, Observer, calibrate, calibration
from nanopoe.model import GPT
from nanopoe.train import trajectory
from nanopoe.train.trajectory import TIMES, Request, evaluate_checkpoint, finished, gathered
from tests.models import three_stages
from tests.ranks import experiment_dict, run_ranks
from tests.test_cli import Done, call, refused, write_yaml

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
def evaluate(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
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


def test_a_model_without_stages_has_no_modes(runs: Path, evaluate: Command) -> None:
    done = evaluate(runs / "bp", "--tokens", "128")
    record = json.loads(evaluation_path(runs / "bp", 8).read_text())
    assert done.code == 0 and record["calibration"] is None and record["modes"] is None
    assert record["bpb"]["stages"] is None and len(record["probes"][0]["answers"]) == 1


def test_a_record_is_finished_when_nothing_has_changed(run: Path, evaluate: Command) -> None:
    assert finished(run, 8, QUIET) is None
    assert evaluate(run, "--tokens", "512", "--calibration-tokens", "256", "--no-speed").code == 0
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


def test_a_trajectory_goes_on_where_it_stopped(run: Path, evaluate: Command, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert evaluate(run, "--steps", "all", *options).code != 0
    assert made == [4] and evaluation_path(run, 4).exists() and not evaluation_path(run, 8).exists()
    before, stop_after = evaluation_path(run, 4).stat(), None
    done = evaluate(run, "--steps", "all", *options)
    assert made == [4, 8] and done.code == 0
    assert done.out.count("already evaluated") == 1 and done.out.count("bpb") == 2
    assert evaluation_path(run, 4).stat().st_ino == before.st_ino
    lines = evaluate(run, "--steps", "4-8", "--json", *options).out.splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 8] and made == [4, 8]
    assert evaluate(run, "--steps", "4,8", "--again", *options).code == 0
    assert made == [4, 8, 4, 8]
    assert "--again repeats it" in evaluate(run, "--step", "4", *options).out


def test_bad_requests_are_one_line(run: Path, evaluate: Command) -> None:
    refused(evaluate(run, "--steps", "5"), 4, "checkpoint", "no step 5.*steps there: 4, 8")
    refused(evaluate(run, "--steps", "4,x"), 2, "config", "--steps.*expected steps such as 100,200-600")
    refused(evaluate(run, "--calibration-tokens", "0"), 2, "config", "--calibration-tokens")
    assert evaluate(run, "--steps", "all", "--step", "4").code == 2
    evaluation_path(run, 8).parent.mkdir(exist_ok=True)
    evaluation_path(run, 8).write_text("{torn")
    refused(evaluate(run, "--steps", "all", "--tokens", "64"), 3, "data", "not an evaluation of nanopoe")


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
