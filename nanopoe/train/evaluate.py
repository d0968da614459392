"""Evaluation of a model on held-out rows: bits per byte and accuracy of every view (SPEC 7).

One forward pass gives everything. Rows are read in chunks, stage by stage, with a running sum of log-probabilities,
so a few (chunk, V) tensors are live, never (B*T, V) and never (K, chunk, V). Sums are fp64; with several ranks each
sums its own rows and one all-reduce adds them, so the result does not depend on how rows are spread over ranks
beyond rounding in fp64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.errors import DataError, NumericsError, everywhere
from nanopoe.model import GPT
from nanopoe.model.loss import IGNORE, split_rows

ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@torch.no_grad()
def evaluate(model: GPT, batches: Iterable[Tensor], token_bytes: np.ndarray | Tensor, *,
             alphas: Sequence[float] = ALPHAS, chunk_rows: int = 1024,
             stop: Callable[[], bool] = lambda: False,
             observe: Callable[[list[Tensor], Tensor], None] | None = None) -> dict[str, Any]:
    """Bits per byte and top-1 accuracy of the full pool, every stage and every prefix (SPEC 7), as a JSON-able dict.

    `batches` yields this rank's integer rows (b, T+1), ~id where an entry is no target; `token_bytes` (V,) holds the
    bytes of a token, 0 for specials. Targets of 0 bytes count nowhere. Every rank must call this, also one without
    rows. Keys of the result:

    bpb: {full, stages [K], prefixes [K], alpha {"0": .., ..}, renormalise_false}; bits per byte. The last is the
        un-normalised pool's, i.e. the mean of the stages'.
    accuracy: {full, stages [K], prefixes [K]}; share of targets that are the most probable token.
    crossover_gap: bpb.full - bpb.stages[-1]. diversity: {bits_per_byte, nats_per_token}; bpb.full = mean(bpb.stages)
        - diversity.bits_per_byte. n_stages, poe_mode, tokens (targets read), targets (counted), bytes, seconds.
    specialists: null, or of a model with S specialists {bpb: {specialist [S], dual [S]}, accuracy: likewise}; dual is
        the pool of base and specialist with equal weights. All else is the base's, as it reads these texts.

    A model trained without stage losses (BP) has only `full`; the rest is null. DataError when there is nothing to
    evaluate or the tokenizer does not fit the model, NumericsError when a sum is not finite: on every rank alike.
    A rank whose `stop` becomes true reads no further batch; the result is empty then, on every rank. `observe` is
    shown the boundary states K x (b, T, D) and targets (b, T) of every batch: more may be wanted of the one pass.
    """
    began = time.perf_counter()
    device = next(model.parameters()).device
    sizes = torch.as_tensor(token_bytes, dtype=torch.int64).to(device)
    if sizes.numel() != model.config.vocab_size:
        raise everywhere(DataError(f"the tokenizer has {sizes.numel()} tokens and the model {model.config.vocab_size}",
                                   "evaluation", "use the tokenizer the model was trained with"))
    sums = _zero_sums(model.layout.n_stages, len(model.config.specialists), len(alphas), device)
    for rows in batches:
        dist.mark("evaluate")
        if stop():
            sums["stopped"] += 1
            break
        ids, targets = split_rows(rows.to(device, torch.int64))
        boundary = model.boundary_states(ids)                                       # K x (b, T, D)
        if observe is not None:
            observe(boundary, targets)
        sums["tokens"] += targets.numel()
        counted = (targets != IGNORE) & (sizes[targets.clamp(min=0)] > 0)           # (b, T): no other needs a head
        for part in counted.flatten().nonzero().flatten().split(chunk_rows):
            _add_chunk(sums, model, [x.flatten(0, 1)[part] for x in boundary], targets.flatten()[part], sizes, alphas)
    _reduce(sums)
    if sums["stopped"].item():
        return {}
    return _result(sums, model, alphas, time.perf_counter() - began)


def _zero_sums(n_stages: int, n_specialists: int, n_alphas: int, device: torch.device) -> dict[str, Tensor]:
    """What is summed over targets, fp64: nats and hits per view, diversity, and the counts; and ranks that stopped."""
    lengths = {"stage_nats": n_stages, "prefix_nats": n_stages, "alpha_nats": n_alphas, "stage_hits": n_stages,
               "prefix_hits": n_stages, "specialist_nats": n_specialists, "specialist_hits": n_specialists,
               "dual_nats": n_specialists, "dual_hits": n_specialists, "diversity": 1, "tokens": 1, "targets": 1,
               "bytes": 1, "stopped": 1}
    return {name: torch.zeros(n, dtype=torch.float64, device=device) for name, n in lengths.items()}


def _add_chunk(sums: dict[str, Tensor], model: GPT, states: list[Tensor], targets: Tensor, sizes: Tensor,
               alphas: Sequence[float]) -> None:
    """Add the targets (c,) with the boundary states K x (c, D) before them to the sums."""
    def add(name: str, index: int, per_target: Tensor) -> None:
        sums[name][index] += per_target.to(torch.float64).sum()

    total = mean = torch.empty(0)
    log_z = torch.zeros_like(targets, dtype=torch.float64)
    K = model.layout.n_stages
    for k, x in enumerate(states[:K]):
        logp = model.stage_logits(x, k).log_softmax(-1)                    # (c, V)
        total = total + logp if k else logp                                # sum of l_j, j <= k
        add("stage_nats", k, -_pick(logp, targets))
        add("stage_hits", k, logp.argmax(-1) == targets)
        mean = total / (k + 1)
        log_z = mean.logsumexp(-1) if k else log_z                         # one expert is normalised already
        add("prefix_nats", k, log_z - _pick(mean, targets))
        add("prefix_hits", k, total.argmax(-1) == targets)
    for i, x in enumerate(states[K:]):
        logp = model.stage_logits(x, K + i).log_softmax(-1)
        add("specialist_nats", i, -_pick(logp, targets))
        add("specialist_hits", i, logp.argmax(-1) == targets)
        dual = (mean - log_z[:, None] + logp) / 2
        add("dual_nats", i, dual.logsumexp(-1) - _pick(dual, targets))
        add("dual_hits", i, dual.argmax(-1) == targets)
    for a, alpha in enumerate(alphas):
        score = mean * K ** alpha
        add("alpha_nats", a, score.logsumexp(-1) - _pick(score, targets))
    add("diversity", 0, -log_z)                                            # nanopoe.model.pool.diversity
    sums["targets"] += targets.numel()
    sums["bytes"] += sizes[targets].sum()


def _pick(scores: Tensor, targets: Tensor) -> Tensor:
    """scores (c, V) at targets (c,)."""
    return scores.gather(-1, targets[:, None])[:, 0]


def _reduce(sums: dict[str, Tensor]) -> None:
    """Add the sums of all ranks in one collective."""
    flat = torch.cat(list(sums.values()))
    dist.all_reduce_sum_(flat)
    for value, reduced in zip(sums.values(), flat.split([v.numel() for v in sums.values()]), strict=True):
        value.copy_(reduced)


def _result(sums: dict[str, Tensor], model: GPT, alphas: Sequence[float], seconds: float) -> dict[str, Any]:
    """The reduced sums as the documented dict."""
    s = {name: value.tolist() for name, value in sums.items()}
    if not s["bytes"][0]:
        raise everywhere(DataError("no target with bytes to evaluate on", "validation split", "give it more text"))
    if not all(math.isfinite(v) for values in s.values() for v in values):
        raise everywhere(NumericsError("the model's loss is not finite", "evaluation",
                                       "go back to an earlier checkpoint"))
    per_byte = 1 / (math.log(2) * s["bytes"][0])
    targets = s["targets"][0]
    poe = model.config.poe_mode != "none"
    stages = [v * per_byte for v in s["stage_nats"]]
    prefixes = [v * per_byte for v in s["prefix_nats"]]
    full, hits = prefixes[-1], [v / targets for v in s["prefix_hits"]]
    return {
        "poe_mode": model.config.poe_mode,
        "n_stages": model.layout.n_stages,
        "bpb": {
            "full": full,
            "stages": stages if poe else None,
            "prefixes": prefixes if poe else None,
            "alpha": {f"{a:g}": v * per_byte for a, v in zip(alphas, s["alpha_nats"], strict=True)} if poe else None,
            "renormalise_false": sum(stages) / len(stages) if poe else None,
        },
        "accuracy": {
            "full": hits[-1],
            "stages": [v / targets for v in s["stage_hits"]] if poe else None,
            "prefixes": hits if poe else None,
        },
        "specialists": {
            "bpb": {view: [v * per_byte for v in s[f"{view}_nats"]] for view in ("specialist", "dual")},
            "accuracy": {view: [v / targets for v in s[f"{view}_hits"]] for view in ("specialist", "dual")},
        } if model.config.specialists else None,
        "crossover_gap": full - stages[-1] if poe else None,
        "diversity": {"bits_per_byte": s["diversity"][0] * per_byte,
                      "nats_per_token": s["diversity"][0] / targets} if poe else None,
        "tokens": int(s["tokens"][0]), "targets": int(targets), "bytes": int(s["bytes"][0]),
        "seconds": seconds,
    }
