"""Models for the tests of inference: random ones in which every tensor matters, and one trained for some seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from nanopoe.config.schema import ModelConfig, ObjectiveConfig
from nanopoe.infer.engine import Engine, Generation, Mode
from nanopoe.model import GPT
from nanopoe.model.stages import backward_stages
from nanopoe.tokenizer import Tokenizer
from tests.ranks import model_config


def live_model(config: ModelConfig, seed: int = 0) -> GPT:
    """A model in which every tensor matters: no projection, gate or head left at zero, logits of some spread."""
    model = GPT(config)
    model.init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("c_proj.weight") or name.startswith(("lm_head", "smear")):
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model


def three_stages(**changes: Any) -> GPT:
    return live_model(model_config(**{"n_layer": 6, "stage_heads": True, "n_kv_head": 1, **changes}))


def documents(corpus: Path, shard: int, count: int) -> list[str]:
    """The first documents of a shard."""
    return pq.ParquetFile(corpus / f"shard_{shard:05d}.parquet").read_row_group(0)["text"].to_pylist()[:count]


def trained_model(corpus: Path, steps: int = 100, seed: int = 0) -> tuple[GPT, Tokenizer]:
    """3 stages of 2 layers, d 64, V 512, T 64, on real text: stages agree often, and are sure now and then."""
    texts = documents(corpus, 0, 200)
    tokenizer = Tokenizer.train(texts, 512)
    ids = torch.tensor([i for text in texts for i in [tokenizer.bos_id, *tokenizer.encode(text[:4000])]])
    model = GPT(model_config(n_layer=6, n_embd=64, vocab_size=512, sequence_len=64,
                             window_sizes=(16, 16, 16, 64, 16, 64)))
    model.init_weights(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.8, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        starts = torch.randint(len(ids) - 65, (8,), generator=generator)
        rows = torch.stack([ids[s:s + 65] for s in starts.tolist()])
        backward_stages(model, rows[:, :-1], rows[:, 1:], ObjectiveConfig(kind="ce", alpha=0.0, rho=None), 1 / 512)
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1.0, 2 * (1 - step / steps))
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def answers_of(generation: Generation, rows: int) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in range(rows)]
    for row, token, _ in generation:
        found[row].append(token)
    return found


def run(engine: Engine, prompts: list[list[int]], tokens: int, mode: Mode | None, **options: Any) -> tuple[Any, Any]:
    """(answers, statistics)."""
    generation = engine.stream(prompts, max_new_tokens=tokens, mode=mode, **options)
    return answers_of(generation, len(prompts)), generation.stats
