"""Calibrate, generate and chat as commands; text that comes in pieces; the evaluation record they meet in.

Most commands run in this process, by their `main`: there are many, and a process of its own costs seconds.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nanopoe.checkpoint.evaluation import evaluation_path, read_calibration, save_calibration, save_evaluation
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import CheckpointError
from nanopoe.infer.batch import Emitted
from nanopoe.infer.calibrate import MAX, P99
from nanopoe.infer.depth import Routed
from nanopoe.infer.engine import Engine
from nanopoe.infer.measure import compare, decode_speed
from nanopoe.infer.speculative import Speculative
from nanopoe.infer.text import chat_ids, pieces, prompt_ids
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from nanopoe.train import loop, trajectory
from tests.commands import ROOT, Done, call, refused, write_yaml
from tests.models import three_stages
from tests.ranks import experiment_dict
from tests.test_specialist import specialist_dict

STEPS = 8


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """poe/ (calibrated), raw/ (not) and bp/: finished runs. Not to be changed."""
    folder = tmp_path_factory.mktemp("generate")
    bp = {"model.poe_mode": "none", "model.poe_every": None, "model.stage_heads": False}
    for name, changes in (("raw", {}), ("bp", bp)):
        experiment = experiment_dict(data, folder / name, **changes, **{"evaluation.tokens": 128})
        done = call("train", write_yaml(folder / f"{name}.yaml", experiment), folder=folder)
        assert done.code == 0, done
    shutil.copytree(folder / "raw", folder / "poe")
    done = call("calibrate", folder / "poe", "--tokens", "512", folder=folder)
    assert done.code == 0 and "bounds p99" in done.out and "routing target_regression" in done.out, done
    return folder


Command = Callable[..., Done]


@pytest.fixture
def generate(runs: Path, command: Command) -> Command:
    return lambda run, *arguments: command("generate", runs / run, *arguments)


def told(done: Done) -> dict:
    assert done.code == 0, done
    return json.loads(done.out)


def test_every_mode_writes_text(generate: Command) -> None:
    answers = {mode: told(generate("poe", "badu", "--tokens", "20", "--json", "--mode", mode))
               for mode in ("full", "stage:0", "prefix:1", "compose:0=1,1=2", "wand", "speculative", "routed")}
    for mode, answer in answers.items():
        assert (answer["mode"], answer["step"], answer["prompt"]) == (mode, STEPS, "badu")
        assert 0 < len(answer["tokens"]) == len(answer["stages"]) <= 20
        assert answer["tokens_per_s"] > 0
    tokens = {mode: answer["tokens"] for mode, answer in answers.items()}
    assert tokens["wand"] == tokens["speculative"] == tokens["full"]
    assert tokens["prefix:1"] == tokens["stage:0"]
    assert set(answers["stage:0"]["stages"]) == {0} and set(answers["full"]["stages"]) == {1}
    assert 0 in answers["speculative"]["stages"] and 1 in answers["speculative"]["stages"]
    assert answers["full"]["stats"] is None
    assert answers["speculative"]["stats"]["rounds"] > 0
    assert sum(answers["wand"]["stats"]["exits"]) >= len(tokens["wand"])
    auto = told(generate("poe", "badu", "--tokens", "20", "--json", "--mode", "speculative", "--drafts", "auto"))
    assert auto["tokens"] == tokens["full"]


def test_text_on_stdout_and_speed_on_stderr(generate: Command, runs: Path) -> None:
    done = generate("poe", "badu  \t x", "--tokens", "8")
    answer = told(generate("poe", "badu  \t x", "--tokens", "8", "--json"))
    assert done.out == f"badu  \t x{answer['text']}\n"
    assert "tokens/s" in done.err
    assert "\033" not in done.out
    done = generate("poe", "badu", "--tokens", "8", "--mode", "speculative", "--colour")
    assert "\033[32m" in done.out and "\033[36m" in done.out          # both stages decided something
    assert "drafts accepted" in done.err
    piped = subprocess.run([sys.executable, "-m", "scripts.generate", runs / "poe", "--tokens", "8"], cwd=ROOT,
                           input="badu  \t x\n", capture_output=True, text=True, timeout=120)
    assert (piped.returncode, piped.stdout) == (0, f"badu  \t x{answer['text']}\n")


def test_sampling_options_reach_the_draw(generate: Command) -> None:
    def text(*options: str) -> list[int]:
        return told(generate("poe", "badu", "--tokens", "20", "--json", *options))["tokens"]

    hot = text("--temperature", "2", "--seed", "1")
    assert hot == text("--temperature", "2", "--seed", "1")
    assert hot != text("--temperature", "2", "--seed", "2")
    assert text("--temperature", "2", "--top-k", "1") == text() == text("--temperature", "2", "--top-p", "0.0001")
    assert text("--repetition-penalty", "9") != text()
    assert hot != text("--temperature", "2", "--seed", "1", "--alpha", "2")


def test_an_empty_prompt_is_a_new_document(generate: Command, data: Path) -> None:
    done = told(generate("poe", "", "--tokens", "3", "--json"))
    assert done["prompt"] == "" and len(done["tokens"]) >= 1
    tokenizer = Tokenizer.load(data / "tokenizer")
    assert prompt_ids(tokenizer, "") == [tokenizer.bos_id]


@pytest.mark.parametrize(("run", "options", "code", "kind", "words"), [
    ("raw", ["--mode", "wand"], 4, "checkpoint", "not calibrated; run scripts.evaluate"),
    ("raw", ["--mode", "routed"], 4, "checkpoint", "not calibrated"),
    ("poe", ["--mode", "wand", "--alpha", "0.5"], 2, "config", "not for alpha 0.5"),
    ("poe", ["--mode", "wand", "--temperature", "1"], 2, "config", "greedy"),
    ("bp", ["--mode", "wand"], 2, "config", "trained without stage losses; only full is valid"),
    ("bp", ["--mode", "routed"], 2, "config", "trained without stage losses; only full is valid"),
    ("bp", ["--mode", "speculative"], 2, "config", "trained without stage losses; only full is valid"),
    ("bp", ["--mode", "stage:0"], 2, "config", "trained without stage losses; only full is valid"),
    ("bp", ["--mode", "compose:0=1"], 2, "config", "trained without stage losses; only full is valid"),
    ("poe", ["--mode", "stage:2"], 2, "config", "the model has 2 stages"),
    ("poe", ["--mode", "compose:0=1,7=1"], 2, "config", "stages 0 to 1"),
    ("poe", ["--mode", "turbo"], 2, "config", "unknown mode 'turbo'"),
    ("poe", ["--mode", "speculative", "--drafts", "many"], 2, "config", "number or auto"),
    ("poe", ["--mode", "speculative", "--drafter", "2"], 2, "config", "cannot draft"),
    ("poe", ["--tokens", "0"], 2, "config", "--tokens"),
    ("poe", ["--top-p", "3"], 2, "config", "top_p"),
    ("poe", ["--step", "77"], 4, "checkpoint", "no checkpoint of step 77"),
])
def test_bad_requests_are_one_line(generate: Command, run: str, options: list[str], code: int, kind: str,
                                   words: str) -> None:
    refused(generate(run, "badu", *options), code, kind, words)


def test_a_prompt_longer_than_the_context_is_refused(generate: Command) -> None:
    refused(generate("poe", "x" * 100), 2, "config", "101 tokens, the model was trained to see 32")
    assert generate("poe", "x" * 31, "--tokens", "40").code == 0       # what is written may go beyond


def test_backprop_models_generate_in_full_mode(generate: Command, command: Command, runs: Path) -> None:
    assert len(told(generate("bp", "badu", "--tokens", "5", "--json"))["tokens"]) > 0
    refused(command("calibrate", runs / "bp"), 2, "config", "trained without stage losses")


def test_bench_shows_every_mode(runs: Path, command: Command) -> None:
    options = ("--tokens", "6", "--rounds", "2", "--transformers")
    done = command("bench", "decode", runs / "poe", *options, "--json")
    assert done.code == 0, done
    found = {r["name"]: r for r in map(json.loads, done.out.splitlines())}
    assert list(found) == ["plain", "transformers", "speculative", "speculative_auto", "wand_max", "wand_p99",
                           "wand_lead", "wand_lead_p99", "routed"]
    assert found["transformers"]["equal"] and found["transformers"]["ratio"] > 0
    assert found["speculative"]["agreement"] == found["wand_max"]["agreement"] == 1
    assert all(r["measured_speedup"] > 0 for name, r in found.items() if name not in ("plain", "transformers"))
    assert found["plain"]["bound_tokens_per_s"] > found["plain"]["tokens_per_s"]
    theirs = found.pop("transformers")["spread"]
    assert all(share > 0 for share in (*theirs.values(), *(r["spread"] for r in found.values())))
    done = command("bench", "decode", runs / "bp", "--tokens", "6", "--rounds", "1")       # has no modes
    assert "of the bound" in done.out and "wand" not in done.out
    plain = next(line.split("│") for line in done.out.splitlines() if "of the bound" in line)
    assert float(plain[2]) > 0 and plain[3].strip() == "0%" and "spread" in done.out       # control: of one round
    refused(command("bench", "decode", runs / "raw"), 4, "checkpoint", "not calibrated")
    refused(command("bench", "decode", runs / "poe", "--tokens", "0"), 2, "config", "--tokens")


# -- the record -------------------------------------------------------------------------------------------------------

def test_calibration_lives_in_the_evaluation_record(runs: Path, tmp_path: Path) -> None:
    record = json.loads(evaluation_path(runs / "poe", STEPS).read_text())
    assert record["bpb"]["full"] > 0                                   # it was evaluated on the way
    found = record["calibration"]
    assert len(found[P99]) == len(found[MAX]) == 1
    assert read_calibration(runs / "poe", STEPS, record["request"]["checkpoint"]) == found
    own = record["request"]["checkpoint"]
    for run, step, identity in ((runs / "poe", STEPS, "another"), (runs / "poe", STEPS - 1, own),
                                (runs / "raw", STEPS, own)):
        with pytest.raises(CheckpointError, match="not calibrated"):
            read_calibration(run, step, identity)
    save_evaluation(tmp_path, {**record, "calibration": None}, "")
    with pytest.raises(CheckpointError, match="not calibrated"):
        read_calibration(tmp_path, STEPS, record["request"]["checkpoint"])
    save_calibration(tmp_path, STEPS, found)
    assert read_calibration(tmp_path, STEPS, record["request"]["checkpoint"]) == found
    assert json.loads(evaluation_path(tmp_path, STEPS).read_text()) == record      # the rest stays


def test_calibrate_takes_its_options(runs: Path, command: Command, tmp_path: Path,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(runs / "raw", tmp_path / "run")
    monkeypatch.setattr(trajectory, "MODE_TOKENS", 6)

    def calibrated(*options: str) -> dict:
        return told(command("calibrate", tmp_path / "run", "--tokens", "512", "--json", *options))

    plain, loose = calibrated("--step", "4"), calibrated("--step", "4", "--routing", "agreement", "--cap", "0.5")
    assert plain["routing"]["mode"] == "target_regression" and loose["routing"]["mode"] == "agreement"
    assert plain[P99] == loose[P99] != calibrated("--step", "3")[P99]
    refused(command("calibrate", runs / "raw", "--tokens", "0"), 2, "config", "--tokens")
    refused(command("calibrate", runs / "raw", "--cap", "-1"), 2, "config", "--cap")
    refused(command("calibrate", tmp_path / "none"), 4, "checkpoint", "no checkpoint")


# -- chat -------------------------------------------------------------------------------------------------------------

def test_chat_talks_changes_its_mode_and_goes_on_after_mistakes(runs: Path, command: Command,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    said = "bad\n/mode wand\nbad\n/mode turbo\n/what\n/clear\nbad\n" + "x" * 40 + "\nbad\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    done = command("chat", runs / "poe", "--tokens", "6")
    assert (done.code, done.err) == (0, ""), done
    answers = done.out.split("tokens/s")
    assert len(answers) == 5                                           # three answers and one after the long question
    assert "exits" not in answers[1] and "mean depth" in answers[2]
    for words in ("unknown mode 'turbo'", "unknown command /what", "the model was trained to see 32"):
        assert words in done.out
    refused(command("chat", runs / "raw", "--mode", "wand"), 4, "checkpoint", "not calibrated")


def test_a_conversation_is_laid_out_with_special_tokens(data: Path) -> None:
    tokenizer = Tokenizer.load(data / "tokenizer")
    special, answer = tokenizer.special_ids, tokenizer.encode("ba <|user_end|>")
    ids = chat_ids(tokenizer, [("du", answer), ("da", None)])
    assert ids == [special["<|bos|>"], special["<|user_start|>"], *tokenizer.encode("du"), special["<|user_end|>"],
                   special["<|assistant_start|>"], *answer, special["<|assistant_end|>"],
                   special["<|user_start|>"], *tokenizer.encode("da"), special["<|user_end|>"],
                   special["<|assistant_start|>"]]
    assert ids.count(special["<|user_end|>"]) == 2                     # its name in a text is text


# -- cascades ---------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def cascade(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, and tool/ and mathy/ that stand on it: finished runs. Their context holds a list of functions."""
    folder = tmp_path_factory.mktemp("cascade")
    long = {"model.sequence_len": 256, "batch.tokens_per_step": 256 * 4, "evaluation.tokens": 1024,
            "evaluation.every": None, "checkpoint.every": None}
    alone = World(0, 1, torch.device("cpu"))
    loop.train(experiment_from_dict(experiment_dict(data, folder / "base", **long), "base"), alone)
    for name, seed in (("tool", 3), ("mathy", 4)):
        changes = {**long, "seed": seed, "optim.matrix_lr": 0.05, "optim.unembedding_lr": 0.3}
        experiment = specialist_dict(data, folder / name, folder / "base", **changes)
        loop.train(experiment_from_dict(experiment, name), alone)
    return folder


def test_every_view_of_a_cascade_writes_text(cascade: Path, command: Command) -> None:
    def tokens(run: str, *options: str) -> list[int]:
        return told(command("generate", cascade / run, "badu ", "--tokens", "20", "--json", *options))["tokens"]

    beside = ("--with", f"mathy={cascade / 'mathy'}")
    answers = {mode: tokens("tool", *beside, "--mode", mode) for mode in (
        "full", "base", "specialist:tool", "specialist:mathy", "dual", "dual:mathy", "compose:base=1,tool=2,mathy=1",
        "stage:0", "route")}
    assert answers["full"] == answers["specialist:tool"] == tokens("tool")
    assert answers["base"] == tokens("base") == tokens("tool", "--mode", "base", "--base", str(cascade / "base"))
    assert answers["specialist:mathy"] == tokens("mathy") == tokens("base", *beside)
    assert answers["base"] != answers["full"] != answers["specialist:mathy"]
    other = tokens("tool", *beside, "--mode", "compose:mathy=1,tool=2,base=1")
    assert answers["compose:base=1,tool=2,mathy=1"] == other


def test_the_route_says_who_answered(cascade: Path, command: Command) -> None:
    options = ("--with", f"mathy={cascade / 'mathy'}", "--mode", "route", "--tokens", "8")
    found = told(command("generate", cascade / "tool", "badu ", "--json", *options))
    [chosen], [perplexity] = found["stats"]["chosen"], found["stats"]["perplexity"]
    assert list(perplexity) == ["base", "mathy", "tool"] and perplexity[chosen] == min(perplexity.values())
    alone = "base" if chosen == "base" else f"specialist:{chosen}"
    options_alone = (*options[:3], alone, *options[4:])
    assert found["tokens"] == told(command("generate", cascade / "tool", "badu ", "--json", *options_alone))["tokens"]
    done = command("generate", cascade / "tool", "badu ", *options)
    assert f", by {chosen} (perplexity of the prompt: base " in done.err


def test_a_constrained_answer_is_to_a_question_with_functions(cascade: Path, command: Command, tmp_path: Path) -> None:
    path = tmp_path / "functions.json"
    path.write_text(json.dumps([{"name": "add", "parameters": {"type": "object", "properties": {
        "a": {"type": "integer"}}, "required": ["a"]}}]))
    options = ("--constrained", path, "--json", "--tokens", "150", "--temperature", "50")
    calls = []
    for seed in range(12):
        found = told(command("generate", cascade / "tool", "What is 2?", *options, "--seed", seed))
        calls.append(found["calls"]["opened"])
        assert found["calls"]["closed"] == calls[-1] and found["calls"]["cut"] == 0
        if calls[-1]:
            break
    assert any(calls), "nothing was constrained"
    assert told(command("generate", cascade / "tool", "What is 2?", *options[2:]))["calls"] is None
    for text, words in (("{", "not JSON"), ("[]", "tools"), ('[{"name": "a"}]', "parameters")):
        path.write_text(text)
        refused(command("generate", cascade / "tool", "x", *options), 3, "data", words)
    refused(command("generate", cascade / "tool", "x", "--constrained", tmp_path / "none"), 3, "data", "cannot be read")
    path.write_text('[{"name": "a", "parameters": {}}]')
    refused(command("generate", cascade / "tool", " ", *options), 3, "data", "empty user message")


@pytest.mark.parametrize(("options", "words"), [
    (["--mode", "specialist:nobody"], "no specialist 'nobody'.*use tool"),
    (["--mode", "compose:base=1,nobody=1"], "no specialist 'nobody'"),
    (["--mode", "wand"], "wand is of a base alone"),
    (["--mode", "speculative"], "speculative is of a base alone"),
    (["--mode", "prefix:9"], "the model has 2 stages"),
    (["--with", "mathy"], "expected NAME=PATH"),
])
def test_bad_requests_of_a_cascade_are_one_line(cascade: Path, command: Command, options: list[str],
                                                words: str) -> None:
    refused(command("generate", cascade / "tool", "badu", *options), 2, "config", words)


def test_what_is_no_cascade_is_refused(cascade: Path, command: Command) -> None:
    for mode, words in (("route", "no specialists to choose from"), ("dual", "has no specialists")):
        refused(command("generate", cascade / "base", "badu", "--mode", mode), 2, "config", words)
    refused(command("generate", cascade / "tool", "", "--mode", "route"), 2, "config", "of one token")
    reserved = ("--with", f"base={cascade / 'mathy'}")
    refused(command("generate", cascade / "tool", "badu", *reserved), 2, "config", "'base' cannot name a specialist")


def test_chat_changes_who_answers(cascade: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ("/with", "/specialist mathy", "/with", "bad", "/specialist nobody", "/specialist base", "bad",
             "/specialist route", "bad", "/mode dual:tool", "bad", "/quit")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    done = command("chat", cascade / "tool", "--with", f"mathy={cascade / 'mathy'}", "--tokens", "5")
    assert (done.code, done.err) == (0, ""), done
    assert "base, mathy, tool; full answers" in done.out and "specialist:mathy answers" in done.out
    assert "no specialist 'nobody'" in done.out and done.out.count("tokens/s") == 4
    assert done.out.count("perplexity of the prompt") == 1


# -- pieces -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["plain", "é", "日本語 🙂!", "a🙂", "\ufffd"])
def test_characters_of_several_tokens_come_whole(data: Path, text: str) -> None:
    tokenizer = Tokenizer.load(data / "tokenizer")
    tokens = [Emitted(0, token, i % 3) for i, token in enumerate(tokenizer.encode(text))]
    found = list(pieces(tokens, tokenizer))
    assert "".join(part for part, _ in found) == text
    assert all("\ufffd" not in part for part, _ in found) or "\ufffd" in text
    if text == "é":
        assert (len(tokens), found) == (2, [("é", 1)])
    broken = [Emitted(0, tokenizer.encode("é")[0], 0), *(Emitted(0, token, 1) for token in tokenizer.encode("abcdef"))]
    assert "".join(part for part, _ in pieces(broken, tokenizer)).endswith("bcdef")     # nothing is held for ever


def test_comparison_adds_up(runs: Path) -> None:
    engine: Engine = Engine(model := three_stages())
    assert isinstance(model, GPT)
    both = compare(engine, {"two": Speculative(2), "exits": Routed(0.0)}, [[1, 2], [3]], 10)
    assert both["exits"]["exits"] == [20, 0, 0] and both["exits"]["agreement"] < 1
    found = both["two"]
    assert found["rounds"] + found["accepted"] == 20
    assert (found["prompts"], found["equal"], found["agreement"]) == (2, 2, 1.0)
    assert found["measured_speedup"] == pytest.approx(found["tokens_per_s"] / found["plain_tokens_per_s"])
    speed = decode_speed(engine, [1, 2], 5, repeats=1)
    assert speed["of_bound"] == pytest.approx(speed["tokens_per_s"] / speed["bound_tokens_per_s"])
