"""Specialists' runs as repos by the script, and what their cards say, run as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nanopoe.checkpoint.cascade import open_cascade, save_delta
from nanopoe.data.conversations import conversation_of
from nanopoe.data.render import encode_pieces, pieces
from nanopoe.export import export
from nanopoe.export.stage import export_stage
from nanopoe.model import GPT
from nanopoe.model.loss import IGNORE, split_rows
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.restore import load_cascade
from tests.exports import first_of, gap, load, specialist_model
from tests.ranks import experiment_dict
from tests.test_specialist import ALONE, specialist_dict, stage, train

PARIS = {"name": "get_weather", "arguments": {"city": "Paris"}}


# -- the script -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base <- first <- second, and a cousin of the base."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed in (("base", 1), ("cousin", 2)):
        train(ALONE, experiment_dict(data, folder / name, **{"seed": seed, "checkpoint.every": None, "name": name}))
    train(ALONE, specialist_dict(data, folder / "first", folder / "base"))
    train(ALONE, specialist_dict(data, folder / "second", folder / "first", stage(), stage(1, 0)))
    return folder


def test_script_exports_a_chain(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.export_hf import main
    from scripts.try_export import main as try_main

    monkeypatch.chdir(tmp_path)

    def call(run: str, *arguments: str, script: Any = main) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["script", run, *arguments])
        with pytest.raises(SystemExit) as stop:
            script()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    def exported(run: str, *arguments: str) -> tuple[int, str]:
        return call(str(runs / run), *arguments, "--dtype", "float32")

    assert exported("base", "--out", "base")[0] == exported("cousin", "--out", "cousin")[0] == 0
    assert exported("first", "--out", "first", "--parent", "base")[0] == 0
    assert exported("second", "--out", "second", "--parent", str(tmp_path / "first"))[0] == 0
    assert exported("second", "--out", "whole", "--merged")[0] == 0
    assert sorted(path.name for path in tmp_path.glob("*/*.safetensors")) == ["delta.safetensors"] * 2 + [
        "model.safetensors"] * 3
    config = json.loads(Path("second/config.json").read_text())
    assert (config["parent"]["repo"], config["parent"]["name"]) == ("../first", "first")
    ours, ids = load_cascade(runs / "second", None, ALONE).model, torch.arange(24).view(2, 12)
    second, whole, base = (load(tmp_path / name) for name in ("second", "whole", "base"))
    with torch.no_grad():
        assert gap(second(ids).logits, ours(ids)) <= 1e-5
        assert torch.equal(second(ids).logits, whole(ids).logits)
        assert gap(second(ids, head_mode="base").logits, base(ids).logits) == 0.0
        assert gap(second(ids, specialist="first").logits, second(ids).logits) > 0                # control
    capsys.readouterr()
    code, said = call("second", "--tokens", "3", script=try_main)
    assert code == 0 and re.findall(r"\n\[(.*?)\]", said) == ["specialist first", "specialist second", "base", "dual"]
    for arguments, code, message in (
            (("first", "--out", "x", "--parent", "cousin"), 4,
             "cousin: is cousin, step .*, not the model this specialist stands on"),
            (("first", "--out", "x"), 2, "is a specialist's run; give --parent.* or --merged"),
            (("first", "--out", "x", "--parent", "base", "--merged"), 2, "give --parent.* or --merged"),
            (("base", "--out", "x", "--merged"), 2, "is a base, not a specialist"),
            (("first", "--out", "x", "--parent", "nowhere"), 2, "nowhere: is no folder and no ORG/NAME@REVISION")):
        found, said = exported(*arguments)
        assert found == code and said.count("\n") == 1 and re.search(message, said), said
    assert not Path("x").exists()
    os.rename("base", "moved")
    code, said = call("second", script=try_main)
    assert code == 4 and "its parent is not there" in said and said.count("\n") == 1


def test_a_delta_is_exported_like_its_run(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    from scripts.export_hf import main

    def exported(folder: Path, *arguments: str, dtype: str = "float32") -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["script", str(folder), *arguments, "--dtype", dtype])
        with pytest.raises(SystemExit) as stop:
            main()
        return int(stop.value.code or 0), capsys.readouterr().err

    def differ(one: str, other: str) -> list[str]:
        a, b = (tmp_path / name for name in (one, other))
        assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
        return sorted(p.name for p in a.iterdir() if p.read_bytes() != (b / p.name).read_bytes())

    monkeypatch.chdir(tmp_path)
    for name, run, dtype in (("first", "first", "float32"), ("second", "second", "float32"),
                             ("rounded", "first", "bfloat16")):
        save_delta(open_cascade(runs / run), tmp_path / f"{name}.delta", dtype)
    assert exported(runs / "base", "--out", "base")[0] == 0
    for kind in ("", ".delta"):
        folder, end = tmp_path if kind else runs, f"-of{kind}"
        assert exported(folder / f"first{kind}", "--out", f"first{end}", "--parent", "base")[0] == 0
        assert exported(folder / f"second{kind}", "--out", f"second{end}", "--parent", "first-of")[0] == 0
        assert exported(folder / f"second{kind}", "--out", f"whole{end}", "--merged")[0] == 0
    for name in ("first", "second", "whole"):                # the card tells its own folder's name
        assert differ(f"{name}-of", f"{name}-of.delta") == ["README.md"]
    assert exported(tmp_path / "rounded.delta", "--out", "rounded", "--parent", "base")[0] == 0
    assert differ("rounded", "first-of") == ["README.md", "delta.safetensors"]              # control
    with torch.no_grad():
        ids = torch.arange(24).view(2, 12)
        moved = gap(load(tmp_path / "rounded")(ids).logits, load(tmp_path / "first-of")(ids).logits)
    assert 0 < moved < 0.2
    os.rename(tmp_path / "first.delta", tmp_path / "away")
    shutil.copytree(tmp_path / "away", tmp_path / "far" / "off")
    away = tmp_path / "far" / "off"
    for arguments, code, message in (
            (("--merged",), 4, "its base base cannot be opened.*say with --base where it is"),
            (("--merged", "--base", str(runs / "cousin")), 4, "stands on base, whose digest begins with"),
            (("--parent", "base", "--step", "3"), 2, "is a delta, which holds one step; leave out --step"),
            ((), 2, "is a specialist's delta; give --parent.* or --merged")):
        found, said = exported(away, "--out", "x", *arguments)
        assert found == code and said.count("\n") == 1 and re.search(message, said), said
    assert exported(away, "--out", "x", "--parent", "base", "--base", str(runs / "base"))[0] == 0
    assert differ("x", "first-of") == ["README.md"]
    code, said = exported(runs / "base", "--out", "y", "--base", str(runs / "base"))
    assert code == 2 and "leave out --parent, --merged and --base" in said


# -- the card ---------------------------------------------------------------------------------------------------------

def snippets_of(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)


def taught(tokenizer: Tokenizer, card: str) -> GPT:
    """A specialist that knows one conversation by heart: the card's question, its call, the result, an answer."""
    model, scope = specialist_model("shared", ((2, None),)).requires_grad_(True), {}
    tools = re.search(r"^tools = \[.*?^\}\]", card, flags=re.DOTALL | re.MULTILINE)
    assert tools is not None
    exec(tools[0], scope)
    conversation = conversation_of({"tools": scope["tools"], "messages": [
        {"role": "user", "content": "What is the weather in Paris?"},
        {"role": "assistant", "content": "", "tool_calls": [PARIS]},
        {"role": "tool", "content": '{"celsius": 18}'}, {"role": "assistant", "content": "Mild."}]}, "x")
    row = encode_pieces(tokenizer, pieces(conversation, "x"))
    ids, targets = split_rows(torch.from_numpy(row.astype(np.int64))[None])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        loss = torch.nn.functional.cross_entropy(model(ids)[0], targets[0], ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if float(loss.detach()) < 0.01:
            break
    return model.eval()


def test_the_tool_calling_example_of_the_card_calls(tmp_path: Path, tokenizer: Tokenizer,
                                                    monkeypatch: pytest.MonkeyPatch,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    untaught = specialist_model("shared", ((2, None),))

    def written(model: GPT, name: str) -> str:
        base = first_of(model, 0)
        export(base.config, base.state_dict(), tokenizer, f"{name}-base", step=1, name="base", dtype="float32")
        out = export_stage(model.config, model.state_dict(), tokenizer, name, parent=f"{name}-base", base="base",
                           specialists=("tool",), step=1, name="tool", dtype="float32", tools=True)
        return (out / "README.md").read_text()

    card = written(untaught, "untaught")
    for name, text, calls in (("untaught", card, []), ("taught", written(taught(tokenizer, card), "taught"), [PARIS])):
        _, front, body = text.split("---\n", 2)
        assert yaml.safe_load(front)["tags"] == ["nanopoe", "specialist"] and "# tool, step 1" in body
        assert "## Evaluation" not in body                               # control: none given, none shown
        assert "{" not in re.sub(r"```.*?```", "", body, flags=re.DOTALL)
        assert len(snippets_of(body)) == 3 and f'repo = "{name}"' in body
        scope: dict[str, Any] = {}
        capsys.readouterr()
        for snippet in snippets_of(body):
            exec(compile(snippet, "README.md", "exec"), scope)
        assert scope["calls"] == calls
        assert capsys.readouterr().out.endswith(f"{calls}\nMild.\n") == bool(calls)


def test_a_card_has_no_tool_calling_where_none_was_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = specialist_model("shared", ((1, None), (1, 0)))
    record = {"bpb": {"full": 1.5}, "accuracy": {"full": 0.25}, "targets": 4096, "specialists": {
        "bpb": {"specialist": [9.0, 1.25], "dual": [9.0, 1.375]},
        "accuracy": {"specialist": [0.0, 0.5], "dual": [0.0, 0.375]}}}
    out = export(model.config, model.state_dict(), tokenizer, tmp_path / "math", step=1, name="math", dtype="float32",
                 specialists=("algebra", "math"), evaluation=record)
    card = (out / "README.md").read_text()
    assert "Tool calling" not in card and len(snippets_of(card)) == 2
    for row in ("4,096 targets", "| specialist | 1.2500 | 0.5000 |", "| base | 1.5000 | 0.2500 |",
                "| both (`dual`) | 1.3750 | 0.3750 |"):
        assert row in card
    assert "trained on `algebra`" in card and "one of `algebra`, `math`" in card and "delta.safetensors" not in card
