"""How fast a trained model writes, one text at a time: plain, every mode, and another way to the same tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from nanopoe.checkpoint.evaluation import read_calibration
from nanopoe.dist import World
from nanopoe.infer.engine import Engine, Mode
from nanopoe.infer.measure import calibrated_modes, compare, decode_speed, in_turns
from nanopoe.infer.probes import PROBES
from nanopoe.infer.text import prompt_ids
from nanopoe.infer.weights import Weights
from nanopoe.train.bench import spread_of
from nanopoe.train.restore import load_trained


class DecodeBench:
    """A run's checkpoint, ready to write `tokens` after each probe, in `rounds` rounds. A result has the medians of the
    rounds, and `spread`, that of tokens_per_s. CheckpointError if a PoE model has no calibration."""

    def __init__(self, run: Path, step: int | None, world: World, tokens: int, rounds: int, dtype: torch.dtype):
        model, tokenizer, checkpoint = load_trained(run, step, world)
        self.modes: dict[str, Mode] = {}
        if model.config.poe_mode != "none" and model.layout.n_stages > 1:
            self.modes = calibrated_modes(read_calibration(run, checkpoint.step, checkpoint.identity))
        self.engine = Engine(Weights(model, dtype))
        self.prompts = [prompt_ids(tokenizer, probe) for probe in PROBES]
        self.step, self.tokens, self.rounds = checkpoint.step, tokens, rounds

    def plain(self) -> dict[str, Any]:
        """The first probe, against the bound of reading all weights for each token (decode_speed)."""
        found = [decode_speed(self.engine, self.prompts[0], self.tokens, 1) for _ in range(self.rounds)]
        return {"name": "plain", **medians(found, "tokens_per_s", "bandwidth", "bound_tokens_per_s", "of_bound")}

    def against(self, name: str, theirs: Callable[[], list[int]]) -> dict[str, Any]:
        """The first probe in turns with another way to write it (in_turns); `spread` has both."""
        def ours() -> list[int]:
            return self.engine.generate(self.prompts[:1], max_new_tokens=self.tokens)[0]

        found = [in_turns(ours, theirs, 1) for _ in range(self.rounds)]
        both = ("tokens_per_s", "their_tokens_per_s")
        return {"name": name, **medians(found, *both, "ratio"), "equal": all(r["equal"] for r in found),
                "spread": {key: spread_of([r[key] for r in found]) for key in both}}

    def every_mode(self) -> list[dict[str, Any]]:
        """All probes in each mode, in turns with plain decoding (compare); nothing of a model that has one stage."""
        if not self.modes:
            return []
        found = [compare(self.engine, self.modes, self.prompts, self.tokens) for _ in range(self.rounds)]
        timed = ("tokens_per_s", "plain_tokens_per_s", "measured_speedup")
        return [{"name": name, **medians([r[name] for r in found], *timed)} for name in self.modes]


def medians(rounds: Sequence[dict[str, Any]], *timed: str) -> dict[str, Any]:
    """Figures of the last round, those of `timed` as medians over the rounds; `spread` is that of the first of them."""
    return {**rounds[-1], **{key: statistics.median(r[key] for r in rounds) for key in timed},
            "spread": spread_of([r[timed[0]] for r in rounds])}
