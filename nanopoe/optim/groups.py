"""Which parameter is trained how: name -> group, each trainable parameter exactly once (SPEC 9)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

from nanopoe.config.schema import OptimConfig
from nanopoe.config.shares import Kind


@dataclass(frozen=True)
class Group:
    """Hyper-parameters of some parameters, scaled to this run and before the schedule."""

    name: str
    kind: Kind
    lr: float
    weight_decay: float
    params: tuple[str, ...]
    betas: tuple[float, float] = (0.0, 0.0)    # adamw
    beta2: float = 0.9                         # muon: decay of NorMuon's second moment
    eps: float = 1e-10


def group_name(parameter: str) -> str:
    """The group a parameter belongs to, from its name; those of a specialist are as those of a base."""
    parameter = re.sub(r"^specialists\.\d+\.", "", parameter)
    if parameter.startswith(("lm_head.", "lm_head_stages.", "lm_head_stage.")):
        return "heads"
    if parameter.startswith(("transformer.h.", "h.")):
        return "matrices"
    for prefix, group in (("transformer.wte.", "wte"), ("value_embeds.", "value_embeds"),
                          ("resid_lambdas", "resid_lambdas"), ("x0_lambdas", "x0_lambdas"),
                          ("smear_", "smear_backout"), ("backout_lambda", "smear_backout")):
        if parameter.startswith(prefix):
            return group
    raise AssertionError(f"no optimizer group for {parameter}")


def build_groups(trainable: Iterable[str], optim: OptimConfig, n_embd: int, tokens_per_step: int,
                 scaling_params: int) -> list[Group]:
    """Groups of the given parameter names, rates scaled to width, batch and size.

    AdamW rates of heads and embeddings go with sqrt(768 / n_embd); all rates but smear's and backout's with
    sqrt(batch / reference batch); Muon's decay with the latter and with reference size / size, since at a fixed
    number of tokens per parameter D_ref / D is the ratio of the sizes.
    """
    batch = sqrt(tokens_per_step / optim.reference_batch_tokens) if optim.reference_batch_tokens else 1.0
    size = optim.reference_scaling_params / scaling_params if optim.reference_scaling_params else 1.0
    width = sqrt(768 / n_embd)
    embedding_lr = optim.embedding_lr or 0.0                      # null where no embedding is trained
    table: dict[str, tuple[Kind, float, tuple[float, float], float]] = {      # kind, rate, betas, weight decay
        "heads": ("adamw", optim.unembedding_lr * width * batch, (0.8, 0.96), 0.01),
        "wte": ("adamw", embedding_lr * width * batch, (0.8, 0.995), 0.001),
        "value_embeds": ("adamw", 0.5 * embedding_lr * width * batch, (0.8, 0.995), 0.01),
        "resid_lambdas": ("adamw", 0.01 * optim.scalar_lr * batch, (0.8, 0.95), 0.05),
        "x0_lambdas": ("adamw", optim.scalar_lr * batch, (0.96, 0.95), 0.0),
        "smear_backout": ("adamw", 0.2, (0.8, 0.95), 0.0),
        "matrices": ("muon", optim.matrix_lr * batch, (0.0, 0.0), optim.weight_decay * batch * size),
    }
    members: dict[str, list[str]] = {name: [] for name in table}
    for parameter in trainable:
        members[group_name(parameter)].append(parameter)
    return [Group(name, kind, lr, weight_decay, tuple(members[name]), betas)
            for name, (kind, lr, betas, weight_decay) in table.items() if members[name]]
