"""Models, exports and requests that the tests of exports share."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe.config.schema import ModelConfig, SpecialistShape
from nanopoe.export import export
from nanopoe.export.hub_config import model_config as hub_config
from nanopoe.export.names import to_hub
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99, calibrate
from nanopoe.infer.depth import Routed, Wand
from nanopoe.infer.engine import Engine, Mode
from nanopoe.infer.sampling import Sampling
from nanopoe.infer.speculative import Speculative
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer
from tests.models import documents, three_stages
from tests.ranks import model_config

ROOT = Path(__file__).parents[1]
VOCAB = 420                                          # not a multiple of 64: rows are cropped
SHAPE = dict(vocab_size=VOCAB, sequence_len=512, n_embd=64, n_head=4, n_kv_head=4)     # S is 128 tokens
KINDS: dict[str, dict[str, Any]] = {
    "bp": dict(poe_mode="none", poe_every=None),
    "shared": dict(poe_mode="flat", poe_every=2),
    "heads": dict(poe_mode="flat", poe_every=None, poe_stage_layers=(2, 1, 1), stage_heads=True, n_kv_head=2),
    "hier": dict(poe_mode="hier", poe_every=1, window_pattern="L", n_layer=3, n_kv_head=1),
}
POE = [kind for kind in KINDS if kind != "bp"]


def config_of(kind: str) -> ModelConfig:
    return model_config(**{**SHAPE, **KINDS[kind]})


def random_model(m: ModelConfig, seed: int = 0) -> GPT:
    """Weights under which every tensor matters, and text does not fall into a loop."""
    model = GPT(m)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = {"lm_head": 0.15, "lm_head_stages": 0.1, "smear_gate": 0.5}.get(name.split(".")[0], 0.08)
            p.add_(scale * torch.randn(p.shape, generator=generator))
        model.smear_lambda.fill_(0.7)
        model.backout_lambda.fill_(0.3)
    return model.eval()


def source_tokenizer() -> Tokenizer:
    """Of our own source."""
    return Tokenizer.train([path.read_text(encoding="utf-8") for path in sorted((ROOT / "nanopoe").rglob("*.py"))],
                           VOCAB)


class Exports:
    """Exports each kind once and loads it with stock transformers."""

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        self.loaded: dict[str, tuple[GPT, Any, Path]] = {}

    @cached_property
    def hub_tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self("bp")[2], trust_remote_code=True)

    def __call__(self, kind: str) -> tuple[GPT, Any, Path]:
        """(our model, theirs, the repo), all fp32."""
        if kind not in self.loaded:
            model = random_model(config_of(kind))
            out = export(model.config, model.state_dict(), self.tokenizer, self.folder / kind, step=7, name=kind,
                         dtype="float32")
            self.loaded[kind] = (model, load(out), out)
        return self.loaded[kind]


def load(folder: Path, **kwargs: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **kwargs).eval()


def specialist_model(kind: str = "heads", shapes: tuple[tuple[int, int | None], ...] = ((1, None), (2, 0), (1, 1)),
                     seed: int = 0) -> GPT:
    """Specialists of (blocks, parent) on a model of that kind; every tensor of them is random."""
    specialists = tuple(SpecialistShape(n_layer=n, parent=parent) for n, parent in shapes)
    return random_model(model_config(**{**SHAPE, **KINDS[kind]}, specialists=specialists), seed)


def first_of(model: GPT, count: int) -> GPT:
    """The same base with its first specialists alone."""
    part = GPT(model.config.model_copy(update={"specialists": model.config.specialists[:count]}))
    part.load_state_dict({name: t for name, t in model.state_dict().items() if name in part.state_dict()})
    return part.eval()


def some_ids(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


def greedy(model: Any, ids: Tensor, n: int = 24, **kwargs: Any) -> Tensor:
    """(B, n) new tokens; nothing stops early, so that lengths are equal."""
    out = model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, **kwargs)
    return out[:, ids.shape[1]:]


def slow_greedy(logits_of: Callable[[Tensor], Tensor], ids: Tensor, n: int, never: list[int]) -> Tensor:
    """The same by a full forward of our model for every token."""
    for _ in range(n):
        with torch.no_grad():
            logits = logits_of(ids)[:, -1].clone()
        logits[:, never] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, -n:]


# -- records of an evaluation, for cards -------------------------------------------------------------------------------

SCORES = {"bpb": {"full": 1.25, "stages": [1.5, 1.375, 1.3125], "prefixes": [1.5, 1.40625, 1.25]},
          "accuracy": {"full": 0.5, "stages": [0.25, 0.375, 0.4375], "prefixes": [0.25, 0.3125, 0.5]}, "tokens": 4096}
EXITS = {"exits": [0.25, 0.25, 0.5], "mean_depth": 2.25, "agreement": 1.0, "predicted_speedup": 1.25}
CALIBRATION = {
    "tokens": 2048, P99: [2.5, 1.25], MAX: [4.0, 2.0], LEAD_P99: [0.5, 0.25], LEAD_MAX: [1.0, 0.75],
    "wand": {"p99": EXITS, "max": EXITS, "lead_p99": EXITS, "lead": EXITS},
    "routing": {"mode": "target_regression", "cap": 0.02, "threshold": 0.625, "routed": 0.75, "share": 0.5,
                "projected_speedup": 1.6, "agreement": 0.875, "regression": 0.01, "regression_held_out": 0.01}}
SPEED = {"prompts": 7, "equal": 7, "agreement": 0.985, "predicted_speedup": 1.5, "measured_speedup": 1.375,
         "tokens_per_s": 30.0, "plain_tokens_per_s": 20.0}
DEPTH = {**SPEED, "tokens": 420, "exits": [100, 100, 220], "mean_depth": 2.2857}
MODES = {"prompts": 7, "tokens": 60, "threads": 2, "device": "cpu", "wand_max": DEPTH, "wand_p99": DEPTH,
         "routed": {**DEPTH, "measured_speedup": None},
         "speculative": {**SPEED, "drafts": 4, "prefix": 1, "rounds": 100, "accepted": 320, "drafted": 380,
                         "acceptance": 0.842, "mean_accepted": 3.2}}


# -- modes ------------------------------------------------------------------------------------------------------------

PROMPTS = [[5, 6, 7], [8], list(range(12)), [9, 9]]
NEW = 24
SPECIAL = {"<|bos|>": 0, "<|assistant_end|>": 1}
DEEP = [1e9, 1e9]


def hub_model(model: GPT, dtype: torch.dtype = torch.float32, attention: str = "sdpa",
              calibration: dict[str, Any] | None = None) -> Any:
    """The exported model without its way through files; no token ends a text by itself."""
    from nanopoe.export.hub_code.configuration_nanopoe import NanoPoEConfig
    from nanopoe.export.hub_code.modeling_nanopoe import NanoPoEForCausalLM

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


def calibrated_text(model: GPT, tokenizer: Tokenizer, corpus: Path) -> tuple[GPT, list[list[int]], dict[str, Any]]:
    *some, c, d, e = documents(corpus, 6, 63)
    ids = torch.tensor([i for d in some for i in [tokenizer.bos_id, *tokenizer.encode(d[:2000])]])
    prompts = [[tokenizer.bos_id, *tokenizer.encode(d[:90])][:n] for d, n in ((c, 1), (d, 12), (e, 30), (c, 22))]
    return model, prompts, calibrate(model, [ids[:64 * 65].view(64, 65)])
