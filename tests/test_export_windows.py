"""Exports whose layers have windows of several sizes: a specialist that sees further than its base, and any other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nanopoe.config import load_experiment
from nanopoe.config.schema import ModelConfig, SpecialistShape
from nanopoe.export import export
from nanopoe.export.hub_code import masks_nanopoe
from nanopoe.export.hub_config import model_config as hub_config
from nanopoe.export.stage import export_stage
from nanopoe.infer.depth import Routed, Wand
from nanopoe.infer.engine import Engine
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import Speculative
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from tests.exports import (
    DEEP,
    KINDS,
    ROOT,
    SHAPE,
    SPECIAL,
    VOCAB,
    assert_same,
    gap,
    greedy,
    hub_model,
    load,
    padded,
    plain,
    random_model,
    slow_greedy,
    some_ids,
)
from tests.models import three_stages
from tests.ranks import model_config

BASE, LONG, LENGTH = 48, 160, 130                # contexts, and a text far longer than any short window
WINDOWS = (16, 16, 16, BASE)                     # of the base, in its own context and in the longer one
THREE = (9, 20, 9, 128, 14, 128)
TEXTS = [list(range(7, 57)), [8], list(range(200, 212)), [9, 9, 3]]


class Pair:
    """A base and a specialist on it whose context is longer, as repos; `model` is ours of both."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, kind: str, dtype: Any = "float32"):
        long = model_config(**{**SHAPE, **KINDS[kind], "sequence_len": LONG, "window_sizes": WINDOWS},
                            specialists=(SpecialistShape(n_layer=2, parent=None),))
        self.model, self.folder, self.kind = random_model(long), folder, kind
        short = ModelConfig(**{**long.model_dump(), "sequence_len": BASE, "specialists": ()})
        base = GPT(short)
        base.load_state_dict({name: t for name, t in self.model.state_dict().items() if name in base.state_dict()})
        common: dict[str, Any] = {"step": 7, "dtype": dtype}
        export(short, base.state_dict(), tokenizer, folder / "base", name="base", **common)
        export_stage(long, self.model.state_dict(), tokenizer, folder / "far", base="base", specialists=("far",),
                     parent=str(folder / "base"), name="far", **common)
        self.base, self.far = load(folder / "base", dtype="auto"), load(folder / "far", dtype="auto")

    def ours(self, ids: Tensor) -> Tensor:
        """Logits of the specialist."""
        with torch.no_grad():
            return self.model.stage_logits(self.model.boundary_states(ids)[-1], self.model.layout.n_stages)


@pytest.fixture(scope="module", params=["bp", "heads"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), tokenizer, request.param)


def stepwise(model: Any, ids: Tensor, cuts: list[int] | None = None, cache: Any = None, **options: Any) -> Tensor:
    """Logits (B, T, V) with a cache, token by token or in pieces."""
    found = []
    for part in ids.split(cuts or 1, dim=1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True, **options)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1)


def plain_ids(batch: int, length: int, seed: int = 3) -> Tensor:
    """Without chat tokens."""
    return some_ids(batch, length, seed) % (VOCAB - 8)


# -- what is computed -------------------------------------------------------------------------------------------------

def test_what_the_configuration_says(pair: Pair) -> None:
    config = pair.far.config
    assert config.window_sizes == [*WINDOWS, LONG, LONG] and config.sliding_window == BASE + 1
    assert config.layer_types == ["sliding_attention"] * 5 + ["full_attention"] * 2
    assert [layer.self_attn.sliding_window for layer in pair.far.model.layers] == [49, 17, 17, 17, 49, None, None]
    assert masks_nanopoe.mask_names(config)[:2] == ["sliding_attention", "sliding_attention_17"]
    small = pair.base.config                         # control: one size, and nothing has a name of its own
    assert small.sliding_window == 17 and set(masks_nanopoe.mask_names(small)) == set(small.layer_types)
    published = hub_config(load_experiment(ROOT / "configs" / "stage_tool_quickstart.yaml").model, SPECIAL, "float32",
                           "x", 1, specialists=("tool",))
    assert published["sliding_window"] == 257 and published["layer_types"].count("full_attention") == 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_are_ours_beyond_all_windows(pair: Pair, attention: str) -> None:
    from transformers import DynamicCache

    far, ids = load(pair.folder / "far", attn_implementation=attention), some_ids(2, LENGTH)
    expected = pair.ours(ids)
    with torch.no_grad():
        assert gap(far(ids).logits, expected) <= 1e-5
    assert gap(stepwise(far, ids), expected) <= 1e-5
    assert gap(stepwise(far, ids, [1, 20, 2, 60, 1, 46]), expected) <= 1e-5
    assert gap(stepwise(far, ids, [70, 1, 59], DynamicCache()), expected) <= 1e-5            # one that keeps all
    for size in (17, 49):                            # controls: windows of one size, the small one and the large one
        wrong = load(pair.folder / "far", attn_implementation=attention, sliding_window=size,
                     window_sizes=[size - 1] * 4 + [LONG] * 2)
        found = stepwise(wrong, ids, [17, 53, 60])
        assert gap(found[:, :17], expected[:, :17]) <= 1e-5 and gap(found[:, 17:], expected[:, 17:]) > 1e-2


def test_text_is_that_of_the_engine_with_every_cache(pair: Pair) -> None:
    ids, never = some_ids(2, 40), pair.far.generation_config.eos_token_id
    expected = slow_greedy(pair.ours, ids, 24, never)
    assert len(set(expected[0].tolist())) > 8                                    # control: no loop
    for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(greedy(pair.far, ids, **options), expected), options
    beams = greedy(pair.far, ids, n=10, num_beams=3)
    assert torch.equal(beams, greedy(pair.far, ids, n=10, num_beams=3, use_cache=False))
    engine = Engine(pair.model)
    texts = engine.generate(ids.tolist(), max_new_tokens=60)
    found = pair.far.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=-1)
    assert found[:, 40:].tolist() == texts
    assert found[:, 40:].tolist() != engine.generate(ids.flip(0).tolist(), max_new_tokens=60)    # control


def test_left_padding_changes_nothing(pair: Pair) -> None:
    lengths = [90, 9, 45]
    rows = [some_ids(1, n, seed=n) for n in lengths]
    inputs = padded([row[0].tolist() for row in rows])
    alone = torch.cat([greedy(pair.far, row, n=12) for row in rows])
    mask = inputs["attention_mask"]
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(greedy(pair.far, inputs["input_ids"], n=12, attention_mask=mask, **options), alone)
    assert not torch.equal(greedy(pair.far, inputs["input_ids"], n=12), alone)               # control: no mask
    with torch.no_grad():
        together = pair.far(**inputs).logits
    for row, ids in enumerate(rows):
        assert gap(together[row, -ids.shape[1]:], pair.ours(ids)[0]) <= 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_within_its_context_the_base_is_bit_for_bit_the_base(pair: Pair, tmp_path: Path, tokenizer: Tokenizer,
                                                             dtype: str) -> None:
    if dtype != "float32":
        pair = Pair(tmp_path, tokenizer, pair.kind, dtype)
    base, far, view = pair.base, pair.far, {"head_mode": "base"}
    assert {p.dtype for p in far.parameters()} == {getattr(torch, dtype)}
    with torch.no_grad():
        for length in (1, 15, 16, 17, 18, 33, BASE):
            ids = plain_ids(2, length)
            assert gap(base(ids).logits, far(ids, **view).logits) == 0.0
            assert gap(base(ids).logits, far(ids).logits) > 1e-2                 # control: the specialist
        for cuts in (None, [1, 15, 1, 2, 20, 9], [30, 1, 17]):
            assert gap(stepwise(base, ids, cuts), stepwise(far, ids, cuts, **view)) == 0.0
        inputs = padded([plain_ids(1, n)[0].tolist() for n in (BASE, 5, 20)])
        assert gap(base(**inputs).logits, far(**inputs, **view).logits) == 0.0
        assert torch.equal(base.generate(**padded([[5, 6], [7] * 30]), max_new_tokens=18, do_sample=False),
                           far.generate(**padded([[5, 6], [7] * 30]), max_new_tokens=18, do_sample=False, **view))
        ids = plain_ids(2, LENGTH)                   # control: beyond it the base's last layer would see all
        later = (base(ids).logits - far(ids, **view).logits)[:, BASE + 1:]
        assert float(later.abs().max()) > 1e-2


def test_modes_are_those_of_the_engine() -> None:
    model = three_stages(sequence_len=128, window_sizes=THREE)
    engine, hub = Engine(model), hub_model(model)
    full = plain(hub, TEXTS)
    assert full == engine.generate(TEXTS, max_new_tokens=24)
    assert assert_same(hub, engine, Wand(DEEP), TEXTS, bounds=DEEP)[0] == full
    _, stats = assert_same(hub, engine, Wand([0.5, 0.5]), TEXTS, bounds=[0.5, 0.5])
    assert min(stats["exits"]) > 0
    assert assert_same(hub, engine, Routed(0.2), TEXTS, threshold=0.2)[1]["exits"][0] > 0
    answers, stats = assert_same(hub, engine, Speculative(drafts=4), TEXTS, drafts=4)
    assert answers == full and 0 < stats["acceptance"] < 1
    assert_same(hub, engine, Speculative(drafts=3, prefix=2), TEXTS, sampling=Sampling(1.0, seed=3), drafts=3,
                prefix=2, do_sample=True, seed=3)
    for sizes in ((20, 20, 20, 128, 20, 128), (9, 9, 9, 128, 9, 128)):           # controls: one size
        other = hub_model(GPT(model.config.model_copy(update={"window_sizes": sizes})))
        other.load_state_dict(hub.state_dict())
        assert plain(other, TEXTS) != full
        assert plain(other, TEXTS[1:2], tokens=8) == plain(hub, TEXTS[1:2], tokens=8)


def test_modes_of_the_base_below_a_specialist(pair: Pair) -> None:
    if pair.kind == "bp":
        pytest.skip("has no stages")
    ids = plain_ids(2, 60)
    expected = greedy(pair.far, ids, head_mode="base", eos_token_id=-1)
    for method, options in (("generate_speculative", {}), ("generate_wand", {"bounds": DEEP})):
        found = getattr(pair.far, method)(ids, max_new_tokens=24, eos_token_id=[], **options)
        assert torch.equal(found[:, 60:], expected)
    assert not torch.equal(greedy(pair.far, ids, eos_token_id=-1), expected)     # control


# -- the rest of transformers -----------------------------------------------------------------------------------------

def test_gradients_and_checkpointing(pair: Pair) -> None:
    model, ids = load(pair.folder / "far").train(), some_ids(1, LENGTH)
    model(ids, labels=ids).loss.backward()
    plain_grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    assert all(gap(p.grad, plain_grads[name]) <= 1e-5 for name, p in model.named_parameters() if p.grad is not None)
    assert max(float(g.abs().max()) for g in plain_grads.values()) > 1e-3                    # control


def test_what_knows_one_window_is_refused(pair: Pair) -> None:
    from transformers.masking_utils import create_masks_for_generate

    ids = some_ids(1, 20)
    for model, refused in ((pair.far, True), (pair.base, False)):
        arguments = dict(inputs_embeds=torch.zeros(1, 20, 1), attention_mask=None, past_key_values=None)
        foreign = create_masks_for_generate(model.config, **arguments)           # type: ignore[arg-type]
        own = model.create_masks_for_generate(model.config, **arguments)
        with torch.no_grad():
            assert gap(model(ids, attention_mask=own).logits, model(ids).logits) == 0.0
            if refused:
                with pytest.raises(ValueError, match=r"windows of several sizes.*attn_implementation=\"sdpa\""):
                    model(ids, attention_mask=foreign)
            else:                                                                # control
                assert gap(model(ids, attention_mask=foreign).logits, model(ids).logits) == 0.0


@pytest.mark.slow
def test_compiled_graph_and_drafting(pair: Pair) -> None:
    ids, far = some_ids(1, LENGTH), pair.far
    with torch.no_grad():
        compiled = torch.compile(far, fullgraph=True, backend="aot_eager")
        assert gap(compiled(ids, use_cache=False).logits, far(ids).logits) <= 1e-4
        assert gap(compiled(ids, use_cache=False).logits, far(ids.flip(1)).logits) > 1e-2    # control
    options: dict[str, Any] = dict(max_new_tokens=24, do_sample=False)
    expected = far.generate(ids, **options)
    assert torch.equal(far.generate(ids, prompt_lookup_num_tokens=3, **options), expected)
    assert torch.equal(far.generate(ids, assistant_early_exit=3, **options), expected)
