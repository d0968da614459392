"""Which experts answer, and with what weight: a view of the model or a composition of chosen stages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError
from nanopoe.model.pool import View


@dataclass(frozen=True)
class Composition:
    """A log-opinion pool of chosen stages: log p ~ sum_k w_k l_k. Weights are divided by their sum."""

    weights: tuple[tuple[int, float], ...]

    def __post_init__(self) -> None:
        stages = [k for k, _ in self.weights]
        if not stages or len(set(stages)) < len(stages):
            raise ConfigError("needs stages, each once", f"composition {self}", "write it as 0=1,3=2")
        if not all(math.isfinite(w) and w > 0 for _, w in self.weights):
            raise ConfigError("weights must be above 0", f"composition {self}", "leave out the stages you do not want")

    @classmethod
    def parse(cls, text: str) -> Composition:
        """Read "0=1,3=2.5" (stage=weight); ConfigError on anything else."""
        pairs = []
        for part in text.split(","):
            stage, _, weight = part.partition("=")
            try:
                pairs.append((int(stage), float(weight)))
            except ValueError:
                raise ConfigError(f"{part!r} is not stage=weight", f"composition {text!r}",
                                  "write it as 0=1,3=2") from None
        return cls(tuple(sorted(pairs)))

    def __str__(self) -> str:
        return "compose:" + ",".join(f"{k}={w:g}" for k, w in self.weights)


@dataclass(frozen=True)
class Experts:
    """Stages in order with weights that sum to 1. The model must run up to the last of them."""

    stages: tuple[int, ...]
    weights: tuple[float, ...]

    @property
    def depth(self) -> int:
        return self.stages[-1] + 1

    def pool(self, logits: Sequence[Tensor], gain: float = 1.0) -> Tensor:
        """Capped logits (N, V) of the stages -> gain * sum_k w_k z_k, pooled log-probabilities up to a constant.

        l_k = z_k - log Z_k, and neither an order nor a softmax sees the constants, so none is computed.
        """
        if len(set(self.weights)) == 1:                     # sum first: a prefix is the truncated model, bit for bit
            total = sum(logits[1:], logits[0])
            scale = gain * self.weights[0]
            return total if scale == 1 else total * scale
        return sum((z * (gain * w) for z, w in zip(logits[1:], self.weights[1:], strict=True)),
                   logits[0] * (gain * self.weights[0]))


def experts_of(view: View | Composition, config: ModelConfig, n_stages: int) -> Experts:
    """ConfigError when the model has no such view."""
    if isinstance(view, View):
        stages = tuple(view.stages(n_stages, config.poe_mode))
        return Experts(stages, (1 / len(stages),) * len(stages))
    if config.poe_mode == "none":
        raise ConfigError("this model was trained without stage losses; only full is valid", str(view))
    stages = tuple(k for k, _ in view.weights)
    if not 0 <= stages[0] <= stages[-1] < n_stages:
        raise ConfigError(f"the model has the stages 0 to {n_stages - 1}", str(view))
    total = sum(w for _, w in view.weights)
    return Experts(stages, tuple(w / total for _, w in view.weights))
