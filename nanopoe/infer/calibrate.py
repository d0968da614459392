"""Bounds of adaptive depth and the threshold of routing, from one pass over calibration rows (SPEC 4, 6)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nanopoe.errors import ConfigError, DataError
from nanopoe.infer.depth import check_poe
from nanopoe.infer.weights import Weights
from nanopoe.model import GPT
from nanopoe.model.loss import IGNORE, split_rows

CAP = 0.020
QUANTILE = 0.99
RoutingMode = Literal["target_regression", "agreement", "nll"]
P99, MAX = "poe_wand_p99_bounds_per_stage_head", "poe_wand_max_bounds_per_stage_head"


@torch.no_grad()
def calibrate(model: GPT, batches: Iterable[Tensor], *, mode: RoutingMode = "target_regression", cap: float = CAP,
              chunk_rows: int = 512) -> dict[str, Any]:
    """What the modes need of a PoE model, as a JSON-able dict. `batches` yields integer rows (b, T+1).

    P99 and MAX: K-1 floats, the 99 % quantile and the largest of max_v d - min_v d with d = L_{k+1} - L_k, L_k the
        mean log-probability of the stages up to k; over all positions.
    wand: {p99, max}: {exits [K] shares of the positions, mean_depth, agreement with the full pool's top-1,
        predicted_speedup}, of adaptive depth with these bounds on these positions.
    routing: `route`'s dict. tokens: positions read.

    ConfigError for a model without stage losses, DataError when there are no rows or no targets.
    """
    check_poe(model.config, "calibration")
    if mode not in get_args(RoutingMode):
        raise ConfigError(f"unknown mode {mode!r}", "routing", f"use {', '.join(get_args(RoutingMode))}")
    if model.layout.n_stages < 2:
        raise ConfigError("a model of one stage has nothing to leave out", "calibration")
    weights = Weights(model)
    parts: list[dict[str, Tensor]] = []
    for rows in batches:
        ids, targets = split_rows(rows.to(weights.device, torch.int64))
        states = [x.flatten(0, 1) for x in model.boundary_states(ids)]
        for start in range(0, targets.numel(), chunk_rows):
            part = slice(start, start + chunk_rows)
            parts.append(_look(weights, [x[part] for x in states], targets.flatten()[part]))
    if not parts:
        raise DataError("no rows to calibrate on", "validation split", "give it more text")
    seen = {name: torch.cat([p[name] for p in parts]).cpu().numpy() for name in parts[0]}
    share = [weights.share(k + 1) for k in range(weights.n_stages)]
    p99, largest = np.quantile(seen["ranges"], QUANTILE, axis=0), seen["ranges"].max(axis=0)
    return {
        "tokens": len(seen["ranges"]), P99: p99.tolist(), MAX: largest.tolist(),
        "wand": {name: predicted_exits(seen["margins"], seen["tops"], bounds, share)
                 for name, bounds in (("p99", p99), ("max", largest))},
        "routing": route(seen, mode, cap, share[0]),
    }


def _look(weights: Weights, states: list[Tensor], targets: Tensor) -> dict[str, Tensor]:
    """Of each of c positions: ranges (c, K-1), margins (c, K-1) and tops (c, K) of the prefixes, and for routing the
    confidence of stage 0, whether stage 0 and the pool are right, and their nats; NaN where there is no target."""
    K = weights.n_stages
    ranges, margins, tops = [], [], []
    total = previous = first = torch.empty(0)
    for k, x in enumerate(states):
        z = weights.logits([k], [x])[0]
        total = total + z if k else z
        mean = total / (k + 1)                                       # L_k up to a constant, which no range sees
        if k:
            low, high = (mean - previous).aminmax(dim=-1)
            ranges.append(high - low)
        if k < K - 1:
            best = mean.topk(2, dim=-1)
            margins.append(best.values[:, 0] - best.values[:, 1])
            tops.append(best.indices[:, 0])
        previous = mean
        if k == 0:
            first = z.log_softmax(-1)
    pool = previous.log_softmax(-1)
    tops.append(pool.argmax(-1))
    masked = targets == IGNORE
    at = targets.masked_fill(masked, 0)[:, None]
    found = {"confidence": first.amax(-1).exp(), "first_right": (tops[0] == targets).float(),
             "pool_right": (tops[-1] == targets).float(), "agrees": (tops[0] == tops[-1]).float(),
             "first_nats": -first.gather(-1, at)[:, 0], "pool_nats": -pool.gather(-1, at)[:, 0]}
    return {"ranges": torch.stack(ranges, -1), "margins": torch.stack(margins, -1), "tops": torch.stack(tops, -1),
            **{name: value.masked_fill(masked, float("nan")) for name, value in found.items()}}


def predicted_exits(margins: np.ndarray, tops: np.ndarray, bounds: np.ndarray, share: list[float]) -> dict[str, Any]:
    """Adaptive depth on known prefixes: margins (N, K-1), tops (N, K), bounds (K-1,); `share[k]` the cost of leaving
    at stage k relative to the whole model."""
    remaining = np.cumsum(bounds[::-1])[::-1]                        # sum of bounds[k:]
    sure = margins > remaining
    exits = np.where(sure.any(axis=1), sure.argmax(axis=1), tops.shape[1] - 1)
    chosen = np.take_along_axis(tops, exits[:, None], axis=1)[:, 0]
    shares = np.bincount(exits, minlength=tops.shape[1]) / len(exits)
    return {"exits": shares.tolist(), "mean_depth": float((exits + 1).mean()),
            "agreement": float((chosen == tops[:, -1]).mean()),
            "predicted_speedup": float(1 / (shares @ np.asarray(share)))}


# -- routing ----------------------------------------------------------------------------------------------------------

def route(seen: dict[str, np.ndarray], mode: RoutingMode, cap: float, share: float) -> dict[str, Any]:
    """The threshold on stage 0's confidence (SPEC 6) and what it does to the targets it was found on.

    r is what a target loses if stage 0 answers: target_regression 1[pool right, stage 0 wrong], agreement 1[another
    top-1], nll the nats stage 0 costs more. The threshold is the lowest confidence whose isotonic, non-increasing
    estimate of r is at most `cap`; null when there is none. Keys: mode, cap, threshold; routed f, the share of targets
    at or above it; share c, cost of stage 0; projected_speedup 1 / (f c + 1 - f); agreement of stage 0 and pool over
    all targets; regression, sum of r over routed targets per target; regression_held_out, the same on the second half
    with the threshold of the first.
    """
    kept = ~np.isnan(seen["confidence"])
    confidence = seen["confidence"][kept].astype(np.float64)
    if not len(confidence):
        raise DataError("no targets to calibrate routing on", "validation split", "give it more text")
    loss = {"target_regression": seen["pool_right"] * (1 - seen["first_right"]), "agreement": 1 - seen["agrees"],
            "nll": seen["first_nats"] - seen["pool_nats"]}[mode][kept].astype(np.float64)
    threshold = lowest_confidence(confidence, loss, cap)
    routed = float((confidence >= threshold).mean())
    half = len(confidence) // 2
    before = lowest_confidence(confidence[:half], loss[:half], cap) if half else float("inf")
    return {"mode": mode, "cap": cap, "threshold": threshold if np.isfinite(threshold) else None, "routed": routed,
            "share": share, "projected_speedup": projected_speedup(routed, share),
            "agreement": float(seen["agrees"][kept].mean()),
            "regression": float((loss * (confidence >= threshold)).mean()),
            "regression_held_out": float((loss[half:] * (confidence[half:] >= before)).mean())}


def projected_speedup(routed: float, share: float) -> float:
    """1 / (f c + 1 - f): a share f of the tokens costs c of the model."""
    return 1 / (routed * share + 1 - routed)


def lowest_confidence(confidence: np.ndarray, loss: np.ndarray, cap: float) -> float:
    """The lowest confidence whose isotonic estimate of the loss is at most `cap`; infinite if there is none."""
    values, inverse, counts = np.unique(confidence, return_inverse=True, return_counts=True)
    means = np.bincount(inverse, weights=loss) / counts
    below = np.flatnonzero(non_increasing(means, counts) <= cap)
    return float(values[below[0]]) if len(below) else float("inf")


def non_increasing(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The non-increasing sequence nearest to `values` in weighted least squares (pool adjacent violators)."""
    means: list[float] = []
    sizes: list[float] = []
    lengths: list[int] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, size, length = value, weight, 1
        while means and means[-1] < mean:
            last, last_size = means.pop(), sizes.pop()
            mean = (last * last_size + mean * size) / (last_size + size)
            size += last_size
            length += lengths.pop()
        means.append(mean)
        sizes.append(size)
        lengths.append(length)
    return np.repeat(means, lengths)
