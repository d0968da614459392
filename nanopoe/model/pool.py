"""The log-opinion pool of the stages' experts and the views of it a user may ask for (SPEC 2, 3).

Pure tensor functions. All take stage log-probabilities l_k = log_softmax(z_k), fp32, in stage order, as one
(K, ..., V) tensor or as any iterable of (..., V) tensors; an iterable is summed as it comes, so a generator never
holds more than two of them. The sum runs in stage order: a prefix is bitwise what the truncated model computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from torch import Tensor

from nanopoe.errors import ConfigError


@dataclass(frozen=True)
class View:
    """Which experts answer: all pooled (`full`), one alone (`stage`), or the first so many pooled (`prefix`).

    In a model with specialists: the `base` as if nothing stood on it, one `specialist`, or both pooled with equal
    weights (`dual`); `full` is then the last specialist, as it is of the model's own forward pass. `index` is the stage
    number (from 0) or the prefix length (from 1), else 0; `name` is that of the specialist, None for the last one.
    """

    kind: Literal["full", "stage", "prefix", "base", "specialist", "dual"] = "full"
    index: int = 0
    name: str | None = None

    @classmethod
    def parse(cls, text: str) -> View:
        """Read "full", "stage:2", "prefix:3", "base", "specialist", "dual:NAME", ..; ConfigError on anything else."""
        kind, colon, rest = text.partition(":")
        if kind in ("full", "base") and not colon:
            return cls(kind)                                                            # type: ignore[arg-type]
        if kind in ("stage", "prefix") and rest.isascii() and rest.isdecimal():
            return cls(kind, int(rest))                                                 # type: ignore[arg-type]
        if kind in ("specialist", "dual") and bool(colon) == bool(rest):
            return cls(kind, name=rest or None)                                         # type: ignore[arg-type]
        raise ConfigError(f"unknown view {text!r}", do="use full, stage:K (from 0), prefix:N (from 1), base, "
                                                       "specialist[:NAME] or dual[:NAME]")

    def __str__(self) -> str:
        if self.kind in ("stage", "prefix"):
            return f"{self.kind}:{self.index}"
        return self.kind if self.name is None else f"{self.kind}:{self.name}"

    def stages(self, n_stages: int, poe_mode: str = "flat") -> range:
        """The stages of a base whose log-probabilities are pooled; the model must run up to the last of them.

        ConfigError when a base of `n_stages` stages, or one trained without stage losses, has no such view.
        """
        if self.kind in ("full", "base"):
            return range(n_stages)
        if self.kind in ("specialist", "dual"):
            raise ConfigError("the model has no specialists", f"view {self}", "load one with it")
        if poe_mode == "none":
            raise ConfigError("this model was trained without stage losses; only full is valid", f"view {self}")
        first = 1 if self.kind == "prefix" else 0
        if not first <= self.index < n_stages + first:
            raise ConfigError(f"the model has {n_stages} stages", f"view {self}",
                              f"use {self.kind}:{first} to {self.kind}:{n_stages - 1 + first}")
        return range(self.index) if self.kind == "prefix" else range(self.index, self.index + 1)


def aggregate(stage_logps: Tensor | Iterable[Tensor], alpha: float = 0.0, renormalise: bool = True) -> Tensor:
    """Pool the K given experts: K^alpha * mean_k l_k, by default renormalised over V (SPEC 3).

    alpha 0 is the geometric mean, 0.5 the sqrt(K) pool, 1 the pure sum. Without renormalisation the score at
    alpha 0 gives the NLL mean_k CE_k. Returns (..., V); one expert is returned as it is, unchanged to the bit.
    """
    total, count = _sum(stage_logps)
    if count == 1:
        return total
    score = total * (count ** alpha / count)
    return score - score.logsumexp(-1, keepdim=True) if renormalise else score


def view_logps(stage_logps: Tensor | Iterable[Tensor], view: View, n_stages: int, *, poe_mode: str = "flat",
               alpha: float = 0.0, renormalise: bool = True) -> Tensor:
    """The log-probabilities (..., V) of `view`, given those of the stages from 0 on (later ones are not read)."""
    wanted = view.stages(n_stages, poe_mode)
    return aggregate(islice(stage_logps, wanted.start, wanted.stop), alpha, renormalise)


def diversity(stage_logps: Tensor | Iterable[Tensor]) -> Tensor:
    """mean_k KL(pool || p_k) in nats, (...,), pool at alpha 0 (SPEC 2).

    The pool is mean_k l_k - log Z, so the mean divergence is -log Z: CE(y, pool) = mean_k CE(y, p_k) - diversity.
    """
    total, count = _sum(stage_logps)
    return -(total / count).logsumexp(-1)


def _sum(stage_logps: Tensor | Iterable[Tensor]) -> tuple[Tensor, int]:
    """Sum in stage order and the number of stages."""
    total: Tensor | None = None
    count = 0
    for logp in stage_logps:
        total = logp if total is None else total + logp
        count += 1
    assert total is not None, "no stages to pool"
    return total, count
