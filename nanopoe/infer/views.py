"""Which experts answer, and with what weight: a view of the model or a composition of stages and specialists.

Whatever is asked for, it is a weighted log-opinion pool of stages, of the base's and of specialists (Experts). The
base as one of several has its weight spread evenly over its stages: log p_base = mean_k l_k up to a constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from nanopoe.errors import ConfigError
from nanopoe.infer.weights import Weights
from nanopoe.model.pool import View


@dataclass(frozen=True)
class Composition:
    """A log-opinion pool, log p ~ sum_k w_k l_k, of stages (by number), the "base" and specialists (by name).

    Weights are divided by their sum; the order in which they are given does not matter.
    """

    weights: tuple[tuple[int | str, float], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(sorted(self.weights, key=lambda w: (isinstance(w[0], str), w))))
        given = [k for k, _ in self.weights]
        if not given or len(set(given)) < len(given):
            raise ConfigError("needs stages or names, each once", f"composition {self}",
                              "write it as 0=1,3=2 or base=1,NAME=2")
        if not all(math.isfinite(w) and w > 0 for _, w in self.weights):
            raise ConfigError("weights must be above 0", f"composition {self}", "leave out the stages you do not want")

    @classmethod
    def parse(cls, text: str) -> Composition:
        """Read "0=1,3=2.5" (stage=weight) or "base=1,tool=2"; ConfigError on anything else."""
        pairs: list[tuple[int | str, float]] = []
        for part in text.split(","):
            key, _, weight = part.partition("=")
            try:
                pairs.append((int(key) if key.isdecimal() else key, float(weight)))
            except ValueError:
                key = ""
            if not key:
                raise ConfigError(f"{part!r} is not stage=weight or name=weight", f"composition {text!r}",
                                  "write it as 0=1,3=2 or base=1,NAME=2")
        return cls(tuple(pairs))

    def __str__(self) -> str:
        return "compose:" + ",".join(f"{k}={w:g}" for k, w in self.weights)


@dataclass(frozen=True)
class Experts:
    """Stages in order with weights that sum to 1; `way` are all that must run for them, in order."""

    stages: tuple[int, ...]
    weights: tuple[float, ...]
    way: tuple[int, ...]

    def gain(self, alpha: float) -> float:
        """K'^alpha of the K' stages (SPEC 3)."""
        return float(len(self.stages)) ** alpha

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


def experts_of(view: View | Composition, w: Weights) -> Experts:
    """The experts that `view` asks of a model; ConfigError when it has no such view."""
    stage_weights = _composed(view, w) if isinstance(view, Composition) else _viewed(view, w)
    stages = tuple(sorted(stage_weights))
    return Experts(stages, tuple(stage_weights[k] for k in stages), w.way_to(stages))


def candidates_of(w: Weights) -> dict[str, Experts]:
    """The base and each specialist, alone, by name."""
    views = {"base": View("base")} | {name: View("specialist", name=name) for name in w.names}
    return {name: experts_of(view, w) for name, view in views.items()}


def _viewed(view: View, w: Weights) -> dict[int, float]:
    K, names = w.n_stages, w.names
    if not names or view.kind in ("base", "prefix"):
        return _even(view.stages(K, w.config.poe_mode))
    if view.kind == "stage":
        if view.index >= K + len(names):
            raise ConfigError(f"the model has {K + len(names)} stages", f"view {view}",
                              f"use stage:0 to stage:{K + len(names) - 1}")
        return _even([view.index])
    last = K + _numbered(view.name or names[-1], names, f"view {view}")
    return _even(range(K), 0.5) | {last: 0.5} if view.kind == "dual" else {last: 1.0}


def _composed(view: Composition, w: Weights) -> dict[int, float]:
    if w.config.poe_mode == "none" and not w.names:
        raise ConfigError("this model was trained without stage losses; only full is valid", str(view))
    top, total = w.n_stages + len(w.names) - 1, sum(weight for _, weight in view.weights)
    found: dict[int, float] = {}
    for key, weight in view.weights:
        if isinstance(key, int) and not 0 <= key <= top:
            raise ConfigError(f"the model has the stages 0 to {top}", str(view))
        own = _even(range(w.n_stages)) if key == "base" else \
            {key if isinstance(key, int) else w.n_stages + _numbered(key, w.names, str(view)): 1.0}
        for k, share in own.items():
            found[k] = found.get(k, 0.0) + share * weight / total
    return found


def _even(stages: Sequence[int], weight: float = 1.0) -> dict[int, float]:
    return dict.fromkeys(stages, weight / len(stages))


def _numbered(name: str, names: Sequence[str], where: str) -> int:
    if name not in names:
        raise ConfigError(f"no specialist {name!r}", where,
                          f"use {' or '.join(names)}" if names else "the model has none; load one with it")
    return list(names).index(name)
