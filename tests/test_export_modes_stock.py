"""The modes of an exported model take what `generate` takes, refuse the rest, and run with stock transformers alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopoe.errors import DataError
from nanopoe.export import export
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99
from nanopoe.infer.depth import Routed, Wand
from nanopoe.infer.engine import Engine
from nanopoe.infer.speculative import MOST_DRAFTS, Speculative
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from tests.exports import (
    DEEP,
    NEW,
    PROMPTS,
    hub_model,
    new_tokens,
    padded,
    plain,
    stage_model,
)
from tests.models import live_model, run
from tests.ranks import model_config


@pytest.fixture
def hub() -> Any:
    """One that a test may change."""
    return hub_model(stage_model(True))


# -- as of generate ---------------------------------------------------------------------------------------------------

def methods(hub: Any) -> Iterator[Any]:
    """Every mode, so set that its text is that of the full model."""
    yield lambda **kw: hub.generate_wand(bounds=DEEP, **kw)
    yield lambda **kw: hub.generate_routed(threshold=math.inf, **kw)
    yield lambda **kw: hub.generate_speculative(drafts=5, prefix=2, **kw)


def test_stop_tokens_and_padding_are_those_of_generate(hub: Any) -> None:
    inputs, full = padded(PROMPTS), plain(hub, PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": 299}
    stop = [full[0][4], full[3][20]]
    expected = hub.generate(**inputs, do_sample=False, eos_token_id=stop, **options)
    assert 299 in expected[:, 12:]                                  # control: a row ended before the others
    for mode in methods(hub):
        found = mode(**inputs, eos_token_id=stop, **options, return_dict_in_generate=True)
        assert torch.equal(found.sequences, expected)
        assert torch.equal(found.stages < 0, expected[:, 12:] == 299)
    hub.generation_config.eos_token_id = stop[:1]                   # as of generate: the model's own, or none
    ids, end = torch.tensor(PROMPTS[:1]), full[0].index(stop[0]) + 1
    for mode in methods(hub):
        assert mode(input_ids=ids).tolist() == [PROMPTS[0] + full[0][:end]]
        assert mode(input_ids=ids, eos_token_id=[]).tolist() == [PROMPTS[0] + full[0][:20]]


def test_padding_changes_nothing(hub: Any) -> None:
    inputs = padded(PROMPTS)
    for mode in methods(hub):
        alone = [new_tokens(mode(input_ids=torch.tensor([p]), max_new_tokens=12), {"input_ids": torch.tensor([p])})[0]
                 for p in PROMPTS]
        assert new_tokens(mode(**inputs, max_new_tokens=12), inputs) == alone
        right = {name: torch.stack([x.roll(len(p)) for x, p in zip(t, PROMPTS, strict=True)])
                 for name, t in inputs.items()}
        assert new_tokens(mode(**right, max_new_tokens=12), right) == alone
        assert new_tokens(mode(input_ids=inputs["input_ids"], max_new_tokens=12), inputs) != alone   # control: no mask


def test_streamer_sees_what_comes(hub: Any) -> None:
    class Keep:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def put(self, value: Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append("end")

    ids, reference = torch.tensor([PROMPTS[0]]), Keep()
    hub.generate(ids, max_new_tokens=20, do_sample=False, streamer=reference)
    assert len(reference.seen) == 3 + 20 + 1
    for mode in methods(hub):
        keep = Keep()
        mode(input_ids=ids, max_new_tokens=20, streamer=keep)
        assert keep.seen == reference.seen
        with pytest.raises(ValueError, match="one row"):
            mode(**padded(PROMPTS), max_new_tokens=20, streamer=keep)


def test_bfloat16_differs_by_rounding_alone() -> None:
    """Every token is the best of the stages that decided it, but for what rounding makes of log-probabilities."""
    hub = hub_model(stage_model(True), torch.bfloat16)
    inputs = padded(PROMPTS)
    mask = torch.cat([inputs["attention_mask"], torch.ones(4, NEW)], 1)

    def lost(text: Tensor, stages: Tensor) -> float:
        """The most by which a token missed the best log-probability of the pool up to the stage given for it."""
        with torch.no_grad():
            pools = torch.stack([hub(text, attention_mask=mask, prefix=n).logits[:, -NEW - 1:-1] for n in (1, 2, 3)])
        missed = pools.amax(-1) - pools.gather(-1, text[None, :, -NEW:, None].expand(3, -1, -1, -1))[..., 0]
        return float(missed.gather(0, stages[None]).max())

    wand = hub.generate_wand(**inputs, max_new_tokens=NEW, bounds=[0.5, 0.5], return_dict_in_generate=True)
    drafted = hub.generate_speculative(**inputs, max_new_tokens=NEW, return_dict_in_generate=True)
    assert min(wand.statistics["exits"]) > 0 and 0 < drafted.statistics["acceptance"] < 1
    whole = torch.full_like(wand.stages, 2)
    assert max(lost(wand.sequences, wand.stages), lost(drafted.sequences, whole)) < 0.1
    assert lost(wand.sequences, whole) > 1 < lost(drafted.sequences, whole * 0)                        # control


# -- what does not fit ------------------------------------------------------------------------------------------------

def test_bad_requests_are_refused(hub: Any) -> None:
    ids = torch.tensor([[1, 2]])
    wand, routed, speculative = hub.generate_wand, hub.generate_routed, hub.generate_speculative
    for call, options, message in [
            (wand, {}, "no lead bounds.*scripts.calibrate.*export it again"),
            (wand, {"bounds": "p99"}, "no p99 bounds"),
            (wand, {"bounds": "max"}, "no max bounds"),
            (wand, {"bounds": "p95"}, "got 'p95'"),
            (wand, {"bounds": [1.0]}, "1 bounds for 3 stages, which need 2"),
            (wand, {"bounds": [1.0, -1.0]}, "not negative"),
            (wand, {"bounds": [1.0, math.nan]}, "finite"),
            (wand, {"bounds": DEEP, "do_sample": True}, "greedy"),
            (wand, {"bounds": DEEP, "temperature": 0.5}, "temperature.*no such argument"),
            (routed, {}, "no routing threshold.*scripts.calibrate"),
            (routed, {"threshold": 0.5, "do_sample": True}, "greedy"),
            (routed, {"threshold": -1.0}, "0 or more"),
            (routed, {"threshold": math.nan}, "0 or more"),
            (speculative, {"drafts": 0}, "1 to 16"),
            (speculative, {"drafts": MOST_DRAFTS + 1}, "1 to 16"),
            (speculative, {"drafts": "many"}, "auto"),
            (speculative, {"prefix": 3}, "first 1 to 2 can draft"),
            (speculative, {"prefix": 0}, "first 1 to 2 can draft"),
            (speculative, {"num_beams": 2}, "no such argument"),
            (speculative, {"temperature": 0.5}, "`temperature` without do_sample"),
            (speculative, {"do_sample": True, "temperature": 0.0}, "0.0001 or more"),
            (speculative, {"do_sample": True, "top_k": 0}, "top_k"),
            (speculative, {"do_sample": True, "top_p": 1.5}, "top_p"),
            (speculative, {"max_new_tokens": 0}, "1 or more"),
            (speculative, {"input_ids": ids[0]}, "shape"),
            (speculative, {"input_ids": ids + 299}, "outside 0 to 299"),
            (speculative, {"input_ids": ids[:, :0]}, "empty prompt"),
            (speculative, {"input_ids": ids[:0]}, "empty prompt"),
            (speculative, {"attention_mask": ids * 0}, "empty prompt"),
            (speculative, {"attention_mask": ids[0]}, "shape"),
            (speculative, {"input_ids": torch.ones(1, 129, dtype=torch.int64)}, "129 tokens.*trained to see 128"),
            (hub.generate, {"weights": {0: 1.0, 3: 1.0}}, "stage 3: .*stages 0 to 2"),
            (hub.generate, {"weights": {0: -1.0, 1: 1.0}}, "above 0"),
            (hub.generate, {"weights": {}}, "names no stage"),
            (hub.generate, {"weights": {0: 1.0}, "prefix": 2}, "exclude each other")]:
        with pytest.raises(ValueError, match=message):
            call(**{"input_ids": ids, "max_new_tokens": 2, **options})
    hub.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="has no flash_attention_2"):
        speculative(ids)
    hub.config._attn_implementation = "sdpa"
    hub.train().model.gradient_checkpointing = True
    with pytest.raises(ValueError, match="eval"):
        speculative(ids)
    hub.eval().model.gradient_checkpointing = False
    assert speculative(ids, max_new_tokens=2).shape == (1, 4)       # control: nothing was left behind


def test_a_model_without_stage_losses_has_no_modes() -> None:
    bp, ids = hub_model(live_model(model_config(poe_mode="none", poe_every=None))), torch.tensor([[1, 2]])
    for call, view in ((bp.generate_wand, {}), (bp.generate_routed, {}), (bp.generate_speculative, {}),
                       (bp.generate, {"stage": 0}), (bp.generate, {"prefix": 1}), (bp.generate, {"weights": {0: 1.0}})):
        with pytest.raises(ValueError, match="this model was trained without stage losses; only full is valid"):
            call(ids, max_new_tokens=2, **view)
    assert bp.generate(ids, max_new_tokens=2).shape == (1, 4)       # control
    one = hub_model(live_model(model_config(poe_every=4)))
    assert one.generate_wand(ids, bounds=[], max_new_tokens=2).shape == (1, 4)
    with pytest.raises(ValueError, match="model of one stage"):
        one.generate_speculative(ids)


# -- what is exported -------------------------------------------------------------------------------------------------

def test_calibrated_values_are_in_config_json(calibrated: tuple[GPT, list[list[int]], dict[str, Any]],
                                              trained: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = trained
    found = calibrated[2]

    def exported(calibration: Any) -> dict[str, Any]:
        out = export(model.config, model.state_dict(), tokenizer, tmp_path / "out", step=1, name="x", overwrite=True,
                     evaluation={"calibration": calibration})
        return json.loads((out / "config.json").read_text())

    config = exported(found)
    assert {key: config[key] for key in (P99, MAX, LEAD_P99, LEAD_MAX)} == {
        key: found[key] for key in (P99, MAX, LEAD_P99, LEAD_MAX)}
    assert config["poe_routing_threshold"] == found["routing"]["threshold"]
    assert (config["poe_routing_mode"], config["poe_routing_cap"]) == ("target_regression", 0.02)
    assert not [key for key in exported(None) if key.startswith(("poe_wand", "poe_routing"))]          # control
    none = exported({**found, "routing": {**found["routing"], "threshold": None}})
    assert "poe_routing_threshold" not in none and None not in none.values()
    hub = hub_model(model)
    hub.config.poe_routing_mode = none["poe_routing_mode"]          # calibrated, without a threshold: the full model
    assert new_tokens(hub.generate_routed(**padded(PROMPTS), max_new_tokens=9), padded(PROMPTS)) == plain(
        hub, PROMPTS, 9)
    for broken in ({**found, MAX: [1.0]}, {**found, LEAD_MAX: None}, {**found, P99: [1.0, -1.0]}, {**found, P99: "abc"},
                   {k: v for k, v in found.items() if k != MAX}, {**found, "routing": None}):
        with pytest.raises(DataError, match="calibrat"):
            exported(broken)


STOCK = """
import json, logging, sys, warnings
logging.getLogger("transformers").setLevel(logging.ERROR)
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hub_logging
hub_logging.disable_progress_bar()
found = {}
for source in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
    inputs = tokenizer(["<|bos|>The list of", "<|bos|>def f("], return_tensors="pt", padding=True)
    found[source] = {"code": type(model).__module__}
    for name, options in (("wand", {}), ("wand", {"bounds": "max"}), ("routed", {}), ("speculative", {})):
        out = getattr(model, "generate_" + name)(**inputs, max_new_tokens=12, eos_token_id=[],
                                                 return_dict_in_generate=True, **options)
        found[source][name + options.get("bounds", "")] = [out.sequences.tolist(), out.statistics]
assert not [name for name in sys.modules if name.split(".")[0] == "nanopoe"]
print(json.dumps(found))
"""


def test_stock_transformers_with_remote_code(calibrated: tuple[GPT, list[list[int]], dict[str, Any]],
                                             trained: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    """From a folder, and by its name from the cache of the Hub, which brings every file by itself."""
    model, tokenizer = trained
    found = calibrated[2]
    out = export(model.config, model.state_dict(), tokenizer, tmp_path / "repo", step=1, name="x", dtype="float32",
                 evaluation={"calibration": found})
    cached = tmp_path / "home" / "hub" / "models--me--poe"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots").mkdir()
    out.rename(cached / "snapshots" / ("0" * 40))
    (tmp_path / "repo").symlink_to(cached / "snapshots" / ("0" * 40))
    engine = Engine(model)
    prompts = [[tokenizer.bos_id, *tokenizer.encode(t)] for t in ("The list of", "def f(")]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
                   "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    sources = [str(tmp_path / "repo"), "me/poe"]
    done = subprocess.run([sys.executable, "-c", STOCK, *sources], cwd=tmp_path, env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert len({said[source].pop("code") for source in sources}) == 2               # each with a copy of the code
    for name, mode in (("wand", Wand(found[LEAD_MAX], True)), ("wandmax", Wand(found[MAX])),
                       ("speculative", Speculative()), ("routed", Routed(found["routing"]["threshold"] or math.inf))):
        answers, stats = run(engine, prompts, 12, mode)
        for source in sources:
            sequences, statistics = said[source][name]
            assert ([row[-12:] for row in sequences], statistics) == (answers, stats.as_dict()), (source, name)
