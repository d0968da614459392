"""The modes of an exported model against our engine, token for token, and with stock transformers alone."""

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
from nanopoe.export.hub_code import decoding_nanopoe, modes_nanopoe
from nanopoe.export.hub_code.configuration_nanopoe import NanoPoEConfig
from nanopoe.export.hub_code.modeling_nanopoe import NanoPoEForCausalLM
from nanopoe.export.hub_config import model_config as hub_config
from nanopoe.export.names import to_hub
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99, calibrate
from nanopoe.infer.depth import Routed, Wand
from nanopoe.infer.engine import Engine, Mode
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import MOST_DRAFTS, Speculative
from nanopoe.infer.views import Composition
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from tests.models import documents, live_model, run, three_stages
from tests.ranks import model_config
from tests.test_speculative import chi_square_p, two_token_distribution, two_token_distribution_of_stage_0

PROMPTS = [[5, 6, 7], [8], list(range(12)), [9, 9]]
NEW = 24
SPECIAL = {"<|bos|>": 0, "<|assistant_end|>": 1}
DEEP = [1e9, 1e9]


def hub_model(model: GPT, dtype: torch.dtype = torch.float32, attention: str = "sdpa",
              calibration: dict[str, Any] | None = None) -> Any:
    """The exported model without its way through files; no token ends a text by itself."""
    config = NanoPoEConfig(**hub_config(model.config, SPECIAL, "float32", "x", 1, calibration))
    config._attn_implementation = attention
    hub = NanoPoEForCausalLM(config).to(dtype).eval()
    hub.load_state_dict(dict(to_hub(model.config, model.state_dict(), dtype)))
    hub.generation_config.eos_token_id = None
    hub.generation_config.pad_token_id = 0
    return hub


def padded(prompts: list[list[int]]) -> dict[str, Tensor]:
    """Left padding, as of the tokenizer."""
    width = max(map(len, prompts))
    return {"input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
            "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])}


def new_tokens(found: Any, inputs: dict[str, Tensor]) -> list[list[int]]:
    sequences = found if isinstance(found, Tensor) else found.sequences
    assert torch.equal(sequences[:, :inputs["input_ids"].shape[1]], inputs["input_ids"])
    return sequences[:, inputs["input_ids"].shape[1]:].tolist()


def plain(hub: Any, prompts: list[list[int]], tokens: int = NEW, **options: Any) -> list[list[int]]:
    inputs = padded(prompts)
    return new_tokens(hub.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options), inputs)


def assert_same(hub: Any, engine: Engine, mode: Mode, prompts: list[list[int]] = PROMPTS, tokens: int = NEW,
                sampling: Sampling | None = None, **options: Any) -> tuple[list[list[int]], dict[str, Any]]:
    """Tokens, deciding stages and statistics are those of the engine; (tokens, statistics)."""
    stream = engine.stream(prompts, max_new_tokens=tokens, mode=mode, sampling=sampling)
    emitted = list(stream)
    method = {Wand: "generate_wand", Routed: "generate_routed", Speculative: "generate_speculative"}[type(mode)]
    inputs = padded(prompts)
    found = getattr(hub, method)(**inputs, max_new_tokens=tokens, return_dict_in_generate=True, **options)
    answers = new_tokens(found, inputs)
    for row in range(len(prompts)):
        assert answers[row] == [t for r, t, _ in emitted if r == row]
        assert found.stages[row].tolist() == [k for r, _, k in emitted if r == row]
    assert found.statistics == stream.stats.as_dict()
    return answers, found.statistics


def stage_model(heads: bool) -> GPT:
    """3 stages, grouped queries, windows of 9 positions in 4 of 6 layers."""
    return three_stages(stage_heads=heads, sequence_len=128, window_sizes=(9, 9, 9, 128, 9, 128))


@pytest.fixture(scope="module", params=[False, True], ids=["shared", "heads"])
def pair(request: pytest.FixtureRequest) -> tuple[Engine, Any]:
    """Our engine and the exported model."""
    model = stage_model(request.param)
    return Engine(model), hub_model(model)


@pytest.fixture
def hub() -> Any:
    """One that a test may change."""
    return hub_model(stage_model(True))


@pytest.fixture(scope="module")
def text(trained: tuple[GPT, Tokenizer], corpus: Path) -> tuple[GPT, list[list[int]], dict[str, Any]]:
    """The trained model, prompts of real text, and its calibration on other text."""
    model, tokenizer = trained
    *some, c, d, e = documents(corpus, 6, 63)
    ids = torch.tensor([i for d in some for i in [tokenizer.bos_id, *tokenizer.encode(d[:2000])]])
    prompts = [[tokenizer.bos_id, *tokenizer.encode(d[:90])][:n] for d, n in ((c, 1), (d, 12), (e, 30), (c, 22))]
    return model, prompts, calibrate(model, [ids[:64 * 65].view(64, 65)])


# -- adaptive depth and routing ---------------------------------------------------------------------------------------

def test_wand_is_that_of_the_engine(pair: tuple[Engine, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, hub = pair
    full = plain(hub, PROMPTS)
    assert full == engine.generate(PROMPTS, max_new_tokens=NEW)
    answers, stats = assert_same(hub, engine, Wand(DEEP), bounds=DEEP)
    assert answers == full and stats["exits"] == [0, 0, 4 * NEW]
    for bounds in ([0.5, 0.5], [1.0, 0.2]):
        answers, stats = assert_same(hub, engine, Wand(bounds), bounds=bounds)
        assert min(stats["exits"]) > 0 and answers != full          # it left at every stage, wrongly now and then
    monkeypatch.setattr(decoding_nanopoe, "PIECE", 7)               # buffers that grow many times
    assert_same(hub, engine, Wand(bounds), bounds=bounds)
    attention = hub.model.layers[1].self_attn                       # control: the windows count
    monkeypatch.setattr(attention, "sliding_window", attention.sliding_window - 1)
    assert new_tokens(hub.generate_wand(**padded(PROMPTS), bounds=bounds, max_new_tokens=NEW),
                      padded(PROMPTS)) != answers


def test_looks_are_put_off_as_in_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 stages: what stage 0 leaves open, stage 1 cannot settle within these bounds, but stage 2 can."""
    model, bounds = live_model(model_config(n_layer=4, poe_every=1, stage_heads=True)), [0.1, 1.0, 0.6]
    engine, hub = Engine(model), hub_model(model)
    _, stats = assert_same(hub, engine, Wand(bounds), PROMPTS[:1], bounds=bounds)
    assert stats["exits"][2] > 0 and stats["exits"][3] > 0
    hub.config.poe_wand_lead_max_bounds = hub.config.poe_wand_lead_p99_bounds = bounds
    for name in ("lead", "lead_p99"):                               # and never, with bounds of the lead
        assert assert_same(hub, engine, Wand(bounds, lead=True), PROMPTS[:1], bounds=name)[1] != stats

    def forgetful(self: Any, k: int, rows: list[int]) -> bool:      # control: what a stage may add is forgotten
        return any(self.reach[row] > sum(self.bounds[k:]) for row in rows)

    for wrong in (forgetful, lambda *_: True):
        monkeypatch.setattr(modes_nanopoe.Wand, "looks", wrong)
        found = hub.generate_wand(torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, bounds=bounds,
                                  return_dict_in_generate=True)
        assert found.statistics != stats


def test_calibrated_bounds_give_the_text_of_generate(text: tuple[GPT, list[list[int]], dict[str, Any]]) -> None:
    model, prompts, found = text
    engine, hub = Engine(model), hub_model(model, calibration=found)
    full, depths = plain(hub, prompts), []
    for name, mode in (("max", Wand(found[MAX])), ("lead", Wand(found[LEAD_MAX], lead=True)),
                       ("p99", Wand(found[P99])), ("lead_p99", Wand(found[LEAD_P99], lead=True))):
        answers, stats = assert_same(hub, engine, mode, prompts, bounds=name)
        assert answers == full or name.endswith("p99")
        assert min(stats["exits"]) > 0
        depths.append(stats["mean_depth"])
    assert depths[0] > depths[1] and depths[2] > depths[3]
    assert torch.equal(hub.generate_wand(**padded(prompts)), hub.generate_wand(**padded(prompts), bounds="lead"))
    careless, _ = assert_same(hub, engine, Wand([0.0, 0.0]), prompts, bounds=[0.0, 0.0])
    assert careless != full                                         # control: bounds that do not hold
    assert careless == plain(hub, prompts, stage=0)


def test_routing_is_that_of_the_engine(pair: tuple[Engine, Any]) -> None:
    engine, hub = pair
    answers, stats = assert_same(hub, engine, Routed(0.2), threshold=0.2)
    assert stats["exits"][0] > 0 == stats["exits"][1] and stats["exits"][2] > 0
    assert answers != plain(hub, PROMPTS)
    assert assert_same(hub, engine, Routed(0.0), threshold=0.0)[0] == plain(hub, PROMPTS, stage=0)


def test_layers_run_no_more_than_needed(hub: Any) -> None:
    """Stage k runs once per token that goes so far, over it and what was put off; nothing runs twice."""
    ran: dict[int, list[int]] = {}
    hooks = [layer.register_forward_hook(lambda _, args, out, i=i: ran.setdefault(i, []).append(out[0].shape[1]))
             for i, layer in enumerate(hub.model.layers)]
    try:
        found = hub.generate_wand(torch.tensor([PROMPTS[2]]), max_new_tokens=40, bounds=[0.5, 0.5],
                                  return_dict_in_generate=True)
        wand, ran = ran, {}
        drafted = hub.generate_speculative(torch.tensor([PROMPTS[2]]), max_new_tokens=40, return_dict_in_generate=True)
    finally:
        for hook in hooks:
            hook.remove()
    exits, last = found.statistics["exits"], found.stages[0].tolist()
    assert set(wand) == set(range(1, 7)) and min(exits) > 0         # not layer 0, the lookup: decoding knows the token
    for layer, lengths in wand.items():
        k = (layer - 1) // 2
        deepest = max(i for i, stage in enumerate(last) if stage >= k)
        assert len(lengths) == sum(exits[k:])
        assert sum(lengths) == 12 + deepest                         # each position once, up to the last that went deep
        assert (max(lengths[1:]) > 1) == (k > 0)                    # put off and caught up
    s = drafted.statistics
    assert {layer: len(lengths) for layer, lengths in ran.items()} == {
        layer: s["drafted"] + s["rounds"] if layer <= 2 else s["rounds"] for layer in range(1, 7)}
    assert max(ran[1][1:]) == 1 and max(ran[3][1:]) == 5            # drafts one by one, verified in one chunk


# -- speculation ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("drafts, prefix", [(4, 1), (7, 2), (None, 1), (None, 2)])
def test_greedy_speculation_is_the_text_of_generate(pair: tuple[Engine, Any], drafts: int | None, prefix: int) -> None:
    engine, hub = pair
    answers, stats = assert_same(hub, engine, Speculative(drafts, prefix), drafts=drafts or "auto", prefix=prefix)
    assert answers == plain(hub, PROMPTS) != plain(hub, PROMPTS, prefix=prefix)
    assert 0 < stats["accepted"] < stats["drafted"]                 # both paths were taken
    assert stats["accepted"] + stats["rounds"] == 4 * NEW


def test_speculation_on_text(text: tuple[GPT, list[list[int]], dict[str, Any]]) -> None:
    model, prompts, _ = text
    hub = hub_model(model, attention="eager")
    answers, stats = assert_same(hub, Engine(model), Speculative(), prompts)
    assert answers == plain(hub, prompts)
    assert 0.5 < stats["acceptance"] < 1
    assert assert_same(hub, Engine(model), Speculative(None), prompts, drafts="auto")[1] != stats


def test_sampling_draws_what_the_engine_draws(pair: tuple[Engine, Any]) -> None:
    engine, hub = pair
    sampling = Sampling(0.9, top_k=40, top_p=0.9, seed=3)
    options = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k,
               "top_p": sampling.top_p, "seed": sampling.seed}
    assert_same(hub, engine, Speculative(None, 2), sampling=sampling, drafts="auto", prefix=2, **options)
    answers, stats = assert_same(hub, engine, Speculative(), sampling=sampling, **options)
    assert 0 < stats["accepted"] < stats["drafted"]
    for other in (Sampling(0.9, top_k=40, seed=3), Sampling(0.9, top_p=0.9, seed=3), Sampling(0.9, 40, 4, 0.9)):
        assert answers != run(engine, PROMPTS, NEW, Speculative(), sampling=other)[0]                  # control


def test_without_a_seed_torch_decides(hub: Any) -> None:

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return hub.generate_speculative(torch.tensor([[5, 6], [5, 6]]), max_new_tokens=10, do_sample=True).tolist()

    assert sample(1) == sample(1) != sample(2)
    assert len(set(map(tuple, sample(1)))) == 2


def test_sampled_text_has_the_distribution_of_the_full_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square over two tokens; wrong rules of acceptance do not pass it."""
    V, draws, prompt = 8, 1500, [1, 2, 3]
    toy = live_model(model_config(vocab_size=V, stage_heads=True, n_layer=2, poe_every=1), seed=1)
    with torch.no_grad():
        for head in toy.lm_head_stages:
            head.weight.mul_(0.7)
    exact, hub = two_token_distribution(toy, prompt, 2.0), hub_model(toy)
    assert 0.5 * (exact - two_token_distribution_of_stage_0(toy, prompt, 2.0)).abs().sum() > 0.1

    def counts() -> Tensor:
        ids = torch.tensor([prompt]).expand(draws, -1)
        out = hub.generate_speculative(ids, max_new_tokens=3, drafts=2, do_sample=True, temperature=2.0, seed=11)
        return torch.bincount(out[:, 3] * V + out[:, 4], minlength=V * V)

    assert chi_square_p(counts(), exact) > 0.001
    right = decoding_nanopoe.Sampling.accept

    def always(self: Any, row: int, p: Tensor, q: Tensor, token: int) -> tuple[bool, int]:
        return True, token

    def from_p(self: Any, row: int, p: Tensor, q: Tensor, token: int) -> tuple[bool, int]:
        kept, other = right(self, row, p, q, token)
        return (True, token) if kept else (False, self.draw(row, p))

    for wrong in (always, from_p):
        monkeypatch.setattr(decoding_nanopoe.Sampling, "accept", wrong)
        assert chi_square_p(counts(), exact) < 1e-4


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


@pytest.mark.parametrize("weights", [{0: 1.0, 2: 3.0}, {1: 2.0}, {0: 1.0, 1: 1.0, 2: 1.0}], ids=str)
def test_composition_of_chosen_stages(pair: tuple[Engine, Any], weights: dict[int, float]) -> None:
    engine, hub = pair
    ours = engine.seen_as(Composition(tuple(sorted(weights.items()))))
    assert plain(hub, PROMPTS, 20, weights=weights) == ours.generate(PROMPTS, max_new_tokens=20)
    assert (plain(hub, PROMPTS, 20, weights=weights) == plain(hub, PROMPTS, 20)) == (len(weights) == 3)
    ids = torch.tensor([PROMPTS[2]])
    with torch.no_grad():
        torch.testing.assert_close(hub(ids, weights=weights).logits[:, -1], ours.next_logps(ids), rtol=0, atol=1e-4)
        other = hub(ids, weights={0: 3.0, 2: 1.0}).logits[:, -1]
        assert float((other - ours.next_logps(ids)).abs().max()) > 1e-2                                # control


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

def test_calibrated_values_are_in_config_json(text: tuple[GPT, list[list[int]], dict[str, Any]],
                                              trained: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    model, tokenizer = trained
    found = text[2]

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


def test_stock_transformers_with_remote_code(text: tuple[GPT, list[list[int]], dict[str, Any]],
                                             trained: tuple[GPT, Tokenizer], tmp_path: Path) -> None:
    """From a folder, and by its name from the cache of the Hub, which brings every file by itself."""
    model, tokenizer = trained
    found = text[2]
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
