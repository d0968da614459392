"""What an export writes and refuses: card, folder, script."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import nanopoe.export.repo as repo_module
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import CheckpointError, ConfigError, StorageError
from nanopoe.export import export
from nanopoe.export.card import card
from nanopoe.export.names import hub_shapes
from nanopoe.infer.calibrate import MAX
from nanopoe.tokenizer import Tokenizer
from tests.exports import (
    CALIBRATION,
    MODES,
    ROOT,
    SCORES,
    SHAPE,
    VOCAB,
    Exports,
    config_of,
    gap,
    load,
    random_model,
    some_ids,
)
from tests.ranks import model_config

# -- card ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["bp", "heads"])
def test_card(exports: Exports, tmp_path: Path, tokenizer: Tokenizer, kind: str,
              monkeypatch: pytest.MonkeyPatch) -> None:
    ours, *_ = exports(kind)
    scores = {**SCORES, "calibration": CALIBRATION, "modes": MODES}
    if kind == "bp":
        scores = {"bpb": {"full": 1.25, "stages": None, "prefixes": None}, "calibration": None, "modes": None,
                  "accuracy": {"full": 0.5, "stages": None, "prefixes": None}}
    out = export(ours.config, ours.state_dict(), tokenizer, tmp_path / "card", step=1234, name="my-run",
                 evaluation=scores)
    text = (out / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    head = yaml.safe_load(front)
    assert (head["library_name"], head["pipeline_tag"], head["license"]) == (
        "transformers", "text-generation", "apache-2.0")
    assert None not in head.values()
    assert "# my-run, step 1,234" in body and "{" not in re.sub(r"```.*?```", "", body, flags=re.S)
    assert f"{sum(math.prod(s) for s in hub_shapes(ours.config).values()):,}" in body
    assert ("| first 2 | 1.4062 | 0.3125 |" in body) == (kind == "heads") and "| 1.2500 | 0.5000 |" in body
    assert ("| 0 | 0 to 1 | shared head and its own |" in body) == (kind == "heads")
    assert "## Evaluation" not in (exports(kind)[2] / "README.md").read_text()   # control: none given, none shown
    snippets = re.findall(r"```python\n(.*?)```", body, flags=re.S)
    assert len(snippets) == (7 if kind == "heads" else 2)
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["output"].shape[1] > scope["inputs"]["input_ids"].shape[1]


def test_card_has_the_tables_of_the_modes() -> None:
    m = config_of("heads")

    def text(record: dict[str, Any], config: ModelConfig = m) -> str:
        return card(config, name="x", step=1, repo="x", dtype="float32", parameters=1, evaluation=record)

    full = text({**SCORES, "calibration": CALIBRATION, "modes": MODES})
    for line in ("| 0 to 1 | 2.5000 | 4.0000 | 0.5000 | 1.0000 |", "| 1 to 2 | 1.2500 | 2.0000 | 0.2500 | 0.7500 |",
                 "threshold 0.6250, 75.0% of the",
                 "| speculative | 3.20 of 3.8 drafts kept a round (84.2%) | 98.5% | 1.50x | 1.38x |",
                 "| adaptive depth, p99 | 2.29 of 3 stages a token | 98.5% | 1.50x | 1.38x |",
                 "| routing | 2.29 of 3 stages a token | 98.5% | 1.50x |  |", "generate_wand", "generate_routed"):
        assert line in full
    calibrated = text({"calibration": {**CALIBRATION, "routing": {**CALIBRATION["routing"], "threshold": None}}})
    assert "no confidence stays under it" in calibrated and "## Modes" not in calibrated
    bare, bp = text({}), text({}, config_of("bp"))               # control: what was not measured is not shown
    assert "generate_speculative" in bare
    assert not re.search("generate_wand|generate_routed|## (Modes|Calibration)", bare)
    assert not re.search("generate_(wand|routed|speculative)|weights=", bp)
    assert "generate_speculative" not in text({}, config_of("shared").model_copy(update={"poe_every": 4}))


# -- refusals -----------------------------------------------------------------------------------------------------

def test_what_does_not_fit_is_refused(exports: Exports, tmp_path: Path, tokenizer: Tokenizer) -> None:
    ours, *_ = exports("shared")
    m, tensors = ours.config, ours.state_dict()

    def attempt(config: ModelConfig = m, changes: dict[str, Tensor | None] = {}, **kwargs: Any) -> None:  # noqa: B006
        state = {k: v for k, v in {**tensors, **changes}.items() if v is not None}
        try:
            export(config, state, tokenizer, tmp_path / "out", step=1, name="x", **kwargs)
        finally:
            leftovers = [path for path in tmp_path.iterdir() if path.name != "out"]
            assert leftovers == []

    with pytest.raises(CheckpointError, match="1 tensors missing"):
        attempt(changes={"smear_lambda": None})
    with pytest.raises(CheckpointError, match="1 unknown"):
        attempt(changes={"lm_head_stages.0.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"resid_lambdas.*shape"):
        attempt(changes={"resid_lambdas": torch.zeros(3)})
    with pytest.raises(CheckpointError, match="not finite"):
        attempt(changes={"x0_lambdas": torch.full((4,), torch.nan)})
    with pytest.raises(ConfigError, match="tokenizer has 420"):
        attempt(config=model_config(**{**SHAPE, "vocab_size": 300}))
    with pytest.raises(ConfigError, match="dtype"):
        attempt(dtype="float16")
    narrow = model_config(**{**SHAPE, "n_head": 8, "n_kv_head": 8})
    with pytest.raises(ConfigError, match="head dimension 8"):
        export(narrow, random_model(narrow).state_dict(), tokenizer, tmp_path / "narrow", step=1, name="x")
    assert not (tmp_path / "out").exists()
    attempt()                                        # control: unchanged, it is written
    assert (tmp_path / "out" / "config.json").exists()


def test_only_an_earlier_export_is_overwritten(exports: Exports, tmp_path: Path, tokenizer: Tokenizer,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    ours, *_ = exports("shared")

    def attempt(out: Path, step: int, **kwargs: Any) -> Path:
        return export(ours.config, ours.state_dict(), tokenizer, out, step=step, name="x", **kwargs)

    out = tmp_path / "out"
    out.mkdir()
    attempt(out, 1)                                  # an empty folder is fine
    before = (out / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"not empty.*--overwrite"):
        attempt(out, 2)
    with monkeypatch.context() as patch:             # a full disk in the middle of an overwrite
        def full(*_: Any, **__: Any) -> None:
            raise OSError(28, "No space left on device")
        patch.setattr(repo_module, "save_file", full)
        with pytest.raises(StorageError, match="No space left"):
            attempt(out, 2, overwrite=True)
    assert (out / "config.json").read_bytes() == before
    attempt(out, 2, overwrite=True)
    assert json.loads((out / "config.json").read_text())["nanopoe_run"] == {"name": "x", "step": 2}
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("words")
    with pytest.raises(ConfigError, match="not an earlier export"):
        attempt(precious, 1, overwrite=True)
    assert (precious / "thesis.tex").read_text() == "words"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a folder"):
        attempt(tmp_path / "file", 1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out", "precious"]


# -- the script ---------------------------------------------------------------------------------------------------

def test_script_exports_a_checkpoint(exports: Exports, tmp_path: Path, tokenizer: Tokenizer,
                                     monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from nanopoe.checkpoint import Target, open_checkpoint, save_checkpoint
    from nanopoe.config import load_experiment
    from nanopoe.dist import World
    from scripts.export_hf import main
    from scripts.try_export import main as try_main

    ours, *_ = exports("heads")
    capsys.readouterr()                                             # of loading it, where no test did before
    run, world = tmp_path / "run", World(0, 1, torch.device("cpu"))
    experiment = load_experiment(ROOT / "configs" / "quickstart.yaml", [f"run_dir={run}"])
    experiment = experiment.model_copy(update={"model": ours.config})
    for step in (5, 10):
        state = {k: v if step == 10 else v * 0 for k, v in ours.state_dict().items()}
        save_checkpoint(Target(experiment, world, {"tokenizer": tokenizer.digest}), state, [], {"step": step})
    tokenizer.save(run / "tokenizer")
    (run / "evaluation").mkdir()
    record = run / "evaluation" / "step_00000010.json"
    scores = {**SCORES, "calibration": CALIBRATION, "request": {"checkpoint": open_checkpoint(run, 10).identity}}
    record.write_text(json.dumps(scores))

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["export_hf", str(run), *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out + captured.err

    def tried(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["try_export", str(tmp_path / "a"), *arguments])
        with pytest.raises(SystemExit) as stop:
            try_main()
        assert not stop.value.code
        return capsys.readouterr().out

    assert call("--out", str(tmp_path / "a"), "--dtype", "float32") == (0, f"step 10 exported to {tmp_path / 'a'}\n")
    ids = some_ids(1, 30)
    with torch.no_grad():
        assert gap(load(tmp_path / "a")(ids).logits, ours(ids)) <= 1e-4
    assert "# quickstart, step 10" in (tmp_path / "a" / "README.md").read_text()
    assert "1.4062" in (tmp_path / "a" / "README.md").read_text()
    assert call("--out", str(tmp_path / "b"), "--step", "5")[0] == 0             # control: the other step
    assert "1.4062" not in (tmp_path / "b" / "README.md").read_text()
    assert json.loads((tmp_path / "a" / "config.json").read_text())[MAX] == [4.0, 2.0]
    assert MAX not in json.loads((tmp_path / "b" / "config.json").read_text())
    assert json.loads((tmp_path / "b" / "config.json").read_text())["dtype"] == "bfloat16"
    said = tried("--tokens", "3")
    for way in ("full model", "stage 0 alone", "speculative, mean acc", "adaptive depth, mean depth ", "routed, mean"):
        assert f"\n[{way}" in said, said
    said = tried("--tokens", "3", "--temperature", "0.5")            # control: those that draw
    assert "[speculative" in said and "[adaptive" not in said and "[routed" not in said
    code, said = call("--out", str(tmp_path / "a"))
    assert code == 2 and said.startswith("error[config]") and said.count("\n") == 1
    assert call("--out", str(tmp_path / "a"), "--overwrite")[0] == 0
    assert call("--out", str(tmp_path / "c"), "--step", "6")[0] == 4
    own = scores["request"]["checkpoint"]
    for calibration, identity, expected in (  # control first: not calibrated, and of another checkpoint
            (None, "x", 0), (CALIBRATION, "x", 4), ({**CALIBRATION, MAX: [1.0]}, own, 3)):
        record.write_text(json.dumps({**SCORES, "calibration": calibration, "request": {"checkpoint": identity}}))
        code, said = call("--out", str(tmp_path / "c"), "--overwrite")
        assert code == expected and ("run scripts." in said) == (code > 0)
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
    record.write_text("{}")
    assert call("--out", str(tmp_path / "c"))[0] == 3
    record.unlink()
    Tokenizer.train([path.read_text() for path in sorted((ROOT / "tests").glob("*.py"))], VOCAB).save(run / "tokenizer")
    code, said = call("--out", str(tmp_path / "c"))
    assert code == 4 and "another tokenizer" in said and not (tmp_path / "c").exists()
