"""Bounds of adaptive depth and the threshold of routing, from one pass over calibration rows (SPEC 4, 6)."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError, DataError
from nanopoe.infer.depth import check_poe
from nanopoe.infer.weights import cost_share
from nanopoe.model import GPT
from nanopoe.model.loss import IGNORE, split_rows

CAP = 0.020
QUANTILE = 0.99
SCALES = tuple(i / 10 for i in range(11))                             # of the p99 bounds, for the curve
RoutingMode = Literal["target_regression", "agreement", "nll"]
P99, MAX = "poe_wand_p99_bounds_per_stage_head", "poe_wand_max_bounds_per_stage_head"
LEAD_P99, LEAD_MAX = "poe_wand_lead_p99_bounds", "poe_wand_lead_max_bounds"


class Observer:
    """Keeps what calibration needs of every position in the first `rows` rows: F = 4K + 3 numbers for K stages.

    An evaluation shows it the states it has computed anyway, so that calibration costs no pass of its own.
    """

    def __init__(self, model: GPT, rows: int, chunk: int = 512):
        check_poe(model.config, "calibration")
        self.model, self.left, self.chunk = model, rows, chunk
        self.parts: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, states: Sequence[Tensor], targets: Tensor) -> None:
        """Boundary states K x (b, T, D) of the next b rows and their targets (b, T)."""
        rows = min(self.left, targets.size(0))
        self.left -= rows
        if not rows:
            return
        flat, y = [x[:rows].flatten(0, 1) for x in states], targets[:rows].flatten()
        parts = [_look(self.model, [x[i:i + self.chunk] for x in flat], y[i:i + self.chunk])
                 for i in range(0, len(y), self.chunk)]
        self.parts.append(torch.cat(parts).view(rows, targets.size(1), -1).cpu())

    def table(self) -> Tensor:
        """(rows, T, F) fp32 of the rows seen; (0, 0, F) without any."""
        return torch.cat(self.parts) if self.parts else torch.empty(0, 0, sum(columns(self.model.layout.n_stages)))


def calibrate(model: GPT, batches: Iterable[Tensor], *, mode: RoutingMode = "target_regression",
              cap: float = CAP) -> dict[str, Any]:
    """`calibration` of a pass over `batches`, integer rows (b, T+1). Errors as of it and of Observer."""
    device, observer = model.lm_head.weight.device, Observer(model, rows=sys.maxsize)
    for rows in batches:
        ids, targets = split_rows(rows.to(device, torch.int64))
        with torch.no_grad():
            observer(model.boundary_states(ids), targets)
    return calibration(observer.table(), model.config, mode=mode, cap=cap)


def calibration(table: Tensor, config: ModelConfig, *, mode: RoutingMode = "target_regression",
                cap: float = CAP) -> dict[str, Any]:
    """What the modes need of a PoE model, as a JSON-able dict, from an Observer's table (rows, T, F).

    P99 and MAX: K-1 floats, the 99 % quantile and the largest of max_v d - min_v d with d = L_{k+1} - L_k, L_k the
        mean log-probability of the stages up to k; over all targets.
    LEAD_P99 and LEAD_MAX: K-1 floats, `lead_bounds` of the same quantile and of all.
    wand: {p99, max, lead_p99, lead}: {exits [K] shares of the targets, mean_depth, agreement with the full pool's
        top-1, predicted_speedup}, of adaptive depth with these bounds on these targets.
    routing: `route`'s dict. tokens: targets seen.
    curves: {wand: [{scale, ..}], lead: [{scale, ..}], routing: [{threshold, ..}]}, agreement and speed over `scale`
        times the p99 and LEAD_MAX bounds and over thresholds, for a plot.

    ConfigError for an unknown mode, DataError when there are no rows or no targets.
    """
    if mode not in get_args(RoutingMode):
        raise ConfigError(f"unknown mode {mode!r}", "routing", f"use {', '.join(get_args(RoutingMode))}")
    if not table.numel():
        raise DataError("no rows to calibrate on", "validation split", "give it more text")
    K = layout_of(config).n_stages
    whole = table.flatten(0, 1).numpy().astype(np.float64)
    whole = whole[~np.isnan(whole[:, -1])]                           # of a conversation, what the assistant writes
    if not len(whole):
        raise DataError("no targets to calibrate on", "validation split", "give it more text")
    parts = np.split(whole, np.cumsum(columns(K))[:-1], axis=1)
    seen = {name: part if i < 4 else part[:, 0] for i, (name, part) in enumerate(zip(COLUMNS, parts, strict=True))}
    share = [cost_share(config, k + 1) for k in range(K)]
    p99, largest = np.quantile(seen["ranges"], QUANTILE, axis=0), seen["ranges"].max(axis=0)
    lead_p99, lead_max = (lead_bounds(np.quantile(seen["losses"], q, axis=0)) for q in (QUANTILE, 1.0))

    def wand(bounds: np.ndarray) -> dict[str, Any]:
        return predicted_exits(seen["margins"], seen["tops"], bounds, share)

    return {
        "tokens": len(seen["ranges"]), P99: p99.tolist(), MAX: largest.tolist(),
        LEAD_P99: lead_p99.tolist(), LEAD_MAX: lead_max.tolist(),
        "wand": {"p99": wand(p99), "max": wand(largest), "lead_p99": wand(lead_p99), "lead": wand(lead_max)},
        "routing": route(seen, mode, cap, share[0]),
        "curves": {"wand": [{"scale": s, **wand(s * p99)} for s in SCALES],
                   "lead": [{"scale": s, **wand(s * lead_max)} for s in SCALES],
                   "routing": routing_curve(seen, mode, share[0])},
    }


COLUMNS = ("ranges", "margins", "losses", "tops", "confidence", "first_right", "pool_right", "agrees", "first_nats",
           "pool_nats")


def columns(n_stages: int) -> list[int]:
    """Widths of COLUMNS in a table: of the K-1 transitions, the K-1 early exits (twice), the K prefixes, and single
    numbers."""
    return [n_stages - 1, n_stages - 1, n_stages - 1, n_stages] + [1] * 6


def _look(model: GPT, states: list[Tensor], targets: Tensor) -> Tensor:
    """The columns (c, F) of c positions: of the prefixes ranges, margins, what of them is lost at the end, tops; for
    routing the confidence of stage 0, whether stage 0 and the pool are right, and their nats; NaN where there is no
    target."""
    K = len(states)
    ranges, margins, tops = [], [], []
    total = previous = first = torch.empty(0)
    for k, x in enumerate(states):
        z = model.stage_logits(x, k)
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
    best = previous.topk(2, dim=-1)
    tops.append(best.indices[:, 0])
    first_two, losses = best.values.unbind(-1), []
    for margin, top in zip(margins, tops, strict=False):             # what is left of it in the full pool
        rival = torch.where(top == tops[-1], first_two[1], first_two[0])
        losses.append(margin - (previous.gather(-1, top[:, None])[:, 0] - rival))
    masked = targets == IGNORE
    at = targets.masked_fill(masked, 0)[:, None]
    routing = torch.stack([first.amax(-1).exp(), (tops[0] == targets).float(), (tops[-1] == targets).float(),
                           (tops[0] == tops[-1]).float(), -first.gather(-1, at)[:, 0], -pool.gather(-1, at)[:, 0]], -1)
    tokens = torch.stack(tops, -1).float()                           # exact up to 2^24 tokens
    return torch.cat([torch.stack(ranges, -1), torch.stack(margins, -1), torch.stack(losses, -1), tokens,
                      routing.masked_fill(masked[:, None], float("nan"))], -1)


def lead_bounds(losses: np.ndarray) -> np.ndarray:
    """Bounds (K-1,) whose remaining sums are `losses` (K-1,), how much of the lead of prefix k's token over all others
    the later stages take away at most; a later exit is never asked for more than an earlier one.

    The theorem of SPEC 4 holds with them as with ranges, and almost by definition: a token whose margin at stage k
    exceeds what the later stages take is still ahead at the end. The range also counts what happens among tokens that
    could not win, so it is some times larger. Of our own making (runs/LOG.md).
    """
    needed = np.maximum.accumulate(np.maximum(losses, 0.0)[::-1])[::-1]
    return needed - np.append(needed[1:], 0.0)


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
    confidence, loss = _losses(seen, mode)
    agrees = seen["agrees"][~np.isnan(seen["confidence"])]
    threshold = lowest_confidence(confidence, loss, cap)
    routed = float((confidence >= threshold).mean())
    half = len(confidence) // 2
    before = lowest_confidence(confidence[:half], loss[:half], cap) if half else float("inf")
    return {"mode": mode, "cap": cap, "threshold": threshold if np.isfinite(threshold) else None, "routed": routed,
            "share": share, "projected_speedup": projected_speedup(routed, share),
            "agreement": float(agrees.mean()),
            "regression": float((loss * (confidence >= threshold)).mean()),
            "regression_held_out": float((loss[half:] * (confidence[half:] >= before)).mean())}


def routing_curve(seen: dict[str, np.ndarray], mode: RoutingMode, share: float) -> list[dict[str, float]]:
    """At thresholds that route 0, 10, .. 100 % of the targets: threshold, routed, regression, projected_speedup, and
    agreement, the share of targets for which the routed answer is the pool's."""
    confidence, loss = _losses(seen, mode)
    agrees = seen["agrees"][~np.isnan(seen["confidence"])]
    curve = []
    for threshold in np.quantile(confidence, np.arange(11) / 10)[::-1]:
        sent = confidence >= threshold
        curve.append({"threshold": float(threshold), "routed": float(sent.mean()),
                      "agreement": float(np.where(sent, agrees, 1.0).mean()),
                      "regression": float((loss * sent).mean()),
                      "projected_speedup": projected_speedup(float(sent.mean()), share)})
    return curve


def _losses(seen: dict[str, np.ndarray], mode: RoutingMode) -> tuple[np.ndarray, np.ndarray]:
    """Confidence of stage 0 at the targets, and what each loses if stage 0 answers it."""
    kept = ~np.isnan(seen["confidence"])
    if not kept.any():
        raise DataError("no targets to calibrate routing on", "validation split", "give it more text")
    loss = {"target_regression": seen["pool_right"] * (1 - seen["first_right"]), "agreement": 1 - seen["agrees"],
            "nll": seen["first_nats"] - seen["pool_nats"]}[mode]
    return seen["confidence"][kept], loss[kept]


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
