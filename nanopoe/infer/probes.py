"""The seven probes of SPEC 7: short prompts whose continuations show at a glance what a model has learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanopoe.infer.engine import Engine
from nanopoe.infer.text import prompt_ids
from nanopoe.infer.weights import Weights
from nanopoe.model.pool import View
from nanopoe.tokenizer import Tokenizer

PROBES = (
    "The capital of France is",
    "The chemical symbol of gold is",
    "If yesterday was Friday, then tomorrow will be",
    "The opposite of hot is",
    "The planets of the solar system are:",
    "My favorite color is",
    "If 5*x + 3 = 13, then x is",
)


def probes(weights: Weights, tokenizer: Tokenizer, *, views: Sequence[View] | None = None, max_new_tokens: int = 24,
           prompts: Sequence[str] = PROBES) -> list[dict[str, Any]]:
    """Greedy continuations of `prompts`, BOS first, by each view; null: full and every stage.

    Returns [{"prompt": str, "answers": {"full": str, "stage:0": str, ..}}]; an answer ends early at a new document.
    """
    if views is None:
        poe = weights.config.poe_mode != "none"
        views = [View(), *(View("stage", k) for k in range(weights.n_stages if poe else 0))]
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    rows: list[dict[str, Any]] = [{"prompt": prompt, "answers": {}} for prompt in prompts]
    for view in views:
        answers = Engine(weights, view).generate(ids, max_new_tokens=max_new_tokens, stop={tokenizer.bos_id})
        for row, answer in zip(rows, answers, strict=True):
            row["answers"][str(view)] = tokenizer.decode(answer)
    return rows
