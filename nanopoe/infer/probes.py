"""The seven probes of SPEC 7: short prompts whose continuations show at a glance what a model has learned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nanopoe.infer.engine import Engine
from nanopoe.infer.text import ends, prompt_ids, question_ids
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
           prompts: Sequence[str] = PROBES, asked: str = "text") -> list[dict[str, Any]]:
    """Greedy continuations of `prompts`, BOS first, by each view; null: `probed_views`.

    `asked` as of probe_ids. Returns [{"prompt": str, "answers": {"full": str, "stage:0": str, ..}}]; an answer ends
    early at a new document or at the end of its turn.
    """
    ids = probe_ids(tokenizer, asked, prompts)
    stop = {tokenizer.bos_id} if asked == "text" else ends(tokenizer)
    rows: list[dict[str, Any]] = [{"prompt": prompt, "answers": {}} for prompt in prompts]
    for view in probed_views(weights) if views is None else views:
        answers = Engine(weights, view).generate(ids, max_new_tokens=max_new_tokens, stop=stop)
        for row, answer in zip(rows, answers, strict=True):
            row["answers"][str(view)] = tokenizer.decode(answer)
    return rows


def probed_views(weights: Weights) -> list[View]:
    """Full and every stage; of a model with specialists the last of them, its pool with the base, and the base."""
    if weights.names:
        return [View("specialist"), View("dual"), View("base")]
    poe = weights.config.poe_mode != "none"
    return [View(), *(View("stage", k) for k in range(weights.n_stages if poe else 0))]


def probe_ids(tokenizer: Tokenizer, asked: str = "text", prompts: Sequence[str] = PROBES) -> list[list[int]]:
    """The prompts as tokens: "text" to go on with, or each the "question" of a conversation."""
    assert asked in ("text", "question"), asked
    return [question_ids(tokenizer, prompt) if asked == "question" else prompt_ids(tokenizer, prompt)
            for prompt in prompts]
