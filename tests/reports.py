"""Folders of runs as a report reads them: metrics, and records of evaluated steps with the keys of scripts.evaluate."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

P99, MAX = "poe_wand_p99_bounds_per_stage_head", "poe_wand_max_bounds_per_stage_head"
LEAD_P99, LEAD_MAX = "poe_wand_lead_p99_bounds", "poe_wand_lead_max_bounds"
PROMPTS = ("The capital of France is", "If 5*x + 3 = 13, then x is")


def record(step: int, stages: int = 4, *, poe: bool = True, level: float = 1.0, calibrated: bool = True,
           modes: bool = True, **changes: Any) -> dict[str, Any]:
    """A complete record: figures that fall with the step, and differ by stage."""
    full = level * (0.7 + 20 / (step + 20))
    own = [full + 0.004 * (stages - k) - 0.002 for k in range(stages)] if poe else []
    prefixes = [full + 0.003 * (stages - n) / stages for n in range(1, stages + 1)] if poe else []
    hits = 0.5 - 0.3 * full
    shares = [hits - 0.001 * (stages - k) for k in range(stages)]
    result = {
        "run": "made-up", "step": step, "config_hash": "0123456789ab", "poe_mode": "flat" if poe else "none",
        "n_stages": stages if poe else 1,
        "bpb": {"full": full, "stages": own or None, "prefixes": prefixes or None,
                "alpha": {f"{a:g}": full * (1 + a * a) for a in (0, .25, .5, .75, 1)} if poe else None,
                "renormalise_false": sum(own) / len(own) if poe else None},
        "accuracy": {"full": hits, "stages": shares if poe else None, "prefixes": shares if poe else None},
        "crossover_gap": full - own[-1] if poe else None,
        "diversity": {"bits_per_byte": sum(own) / stages - full, "nats_per_token": 0.01} if poe else None,
        "tokens": 131072, "targets": 131000, "bytes": 480000, "seconds": 3.5,
        "probes": [{"prompt": p, "answers": {view: f" {view} says {step // 300}" for view in
                                             ("full", *(f"stage:{k}" for k in range(stages if poe else 0)))}}
                   for p in PROMPTS],
        "calibration": calibration(step, stages) if poe and calibrated and stages > 1 else None,
        "modes": measured(step, stages) if poe and modes and stages > 1 else None,
    }
    return {**result, **changes}


def specialist_record(step: int, stages: int = 2, *, poe: bool = True, below: int = 0, level: float = 1.0,
                      sources: Sequence[str] = ("chats",), **changes: Any) -> dict[str, Any]:
    """Of a specialist that falls below its base, which stays; `below` more specialists are between them."""
    base = record(100, stages, poe=poe, calibrated=False, modes=False)
    full, hits = base["bpb"]["full"], base["accuracy"]["full"]
    own = [*(full - 0.01 * (i + 1) for i in range(below)), level * full * 50 / (50 + step)]
    special = {"bpb": {"specialist": own, "dual": [(2 * v + full) / 3 for v in own]},
               "accuracy": {"specialist": [hits + 0.1] * len(own), "dual": [hits + 0.05] * len(own)}}

    def score(bpb: float, accuracy: float) -> dict[str, Any]:
        return {"bpb": bpb, "accuracy": accuracy}

    told = {name: {**score(own[-1] + 0.1 * i, hits + 0.1), "targets": 100, "bytes": 400, "tokens": 900, "truncated": i,
                   "base": score(full + 0.1 * i, hits), "dual": score(special["bpb"]["dual"][-1], hits + 0.05)}
            for i, name in enumerate(sources)}
    probes = [{"prompt": p, "answers": {v: f" {v} says {step}" for v in ("specialist", "dual", "base")}}
              for p in PROMPTS]
    return {**base, "step": step, "specialists": special, "sources": told, "truncated": 3, "asked": "question",
            "probes": probes, **changes}


def tools_record(step: int, checkpoint: str = "c" * 64, *, parse: int = 9, constrained: bool = False,
                 data: str = "chats") -> dict[str, Any]:
    """As scripts.evaluate_tools writes it, of two layouts."""
    def rate(n: int, of: int) -> dict[str, Any]:
        return {"n": n, "of": of, "rate": n / of if of else None}

    one = {"parse": rate(parse, 10), "function": rate(7, 11), "refusal": rate(0, 0)}
    both = {"parse": rate(2 * parse, 20), "function": rate(14, 22), "refusal": rate(0, 0)}
    request = {"checkpoint": checkpoint, "data": {data: "d" * 64}, "limit": None, "layouts": ["one", "compact"],
               "constrained": constrained, "tokens": 64, "dtype": "float32"}
    return {"run": "made-up", "step": step, "request": request, "conversations": 12,
            "metrics": {"parse": "replies that open a call", "function": "references with calls",
                        "refusal": "references without a call"},
            "tools": {"prompts": 24, "too_long": 2, "layouts": {"one": one, "compact": one}, "all": both,
                      "calls": {"opened": 5, "cut": 1} if constrained else None},
            "arithmetic": {"prompts": 4, "too_long": 0, "exact": rate(1, 4), "stop": rate(4, 4)}}


def calibration(step: int, stages: int) -> dict[str, Any]:
    bounds = [4 / (k + 1) + 50 / (step + 50) for k in range(stages - 1)]

    def wand(scale: float) -> dict[str, Any]:
        weights = [math.exp(-scale * (stages - k) / stages) for k in range(stages)]
        exits = [w / sum(weights) for w in weights]
        depth = sum((k + 1) * e for k, e in enumerate(exits))
        return {"exits": exits, "mean_depth": depth, "agreement": 1 - 0.05 * math.exp(-3 * scale),
                "predicted_speedup": stages / depth}

    def sent(routed: float) -> dict[str, Any]:
        return {"threshold": 1 - 0.9 * routed, "routed": routed, "agreement": 1 - 0.03 * routed ** 2,
                "regression": 0.012 * routed ** 2, "projected_speedup": 1 / (routed * 0.4 + 1 - routed)}

    return {"tokens": 131072, P99: bounds, MAX: [1.6 * b for b in bounds],
            LEAD_P99: [0.2 * b for b in bounds], LEAD_MAX: [0.5 * b for b in bounds],
            "wand": {"p99": wand(1.0), "max": wand(1.6), "lead_p99": wand(0.2), "lead": wand(0.5)},
            "routing": {"mode": "target_regression", "cap": 0.02, "threshold": 0.35, "routed": 0.71, "share": 0.4,
                        "projected_speedup": 1.74, "agreement": 0.96, "regression": 0.0061,
                        "regression_held_out": 0.0066},
            "curves": {"wand": [{"scale": s / 10, **wand(s / 10)} for s in range(11)],
                       "lead": [{"scale": s / 10, **wand(s / 20)} for s in range(11)],
                       "routing": [sent(i / 10) for i in range(11)]}}


def measured(step: int, stages: int) -> dict[str, Any]:
    def ran(equal: int, agreement: float, predicted: float, speedup: float) -> dict[str, Any]:
        return {"prompts": 7, "equal": equal, "agreement": agreement, "predicted_speedup": predicted,
                "measured_speedup": speedup, "tokens_per_s": 100 * speedup, "plain_tokens_per_s": 100.0}

    def depth(share: float, *rest: Any) -> dict[str, Any]:
        counts = [round(420 * share / (stages - 1))] * (stages - 1)
        counts.append(420 - sum(counts))
        return {"tokens": 420, "exits": counts, "mean_depth": sum((k + 1) * n for k, n in enumerate(counts)) / 420,
                **ran(*rest)}

    gain = step / (step + 2000)
    return {"prompts": 7, "tokens": 60, "threads": 2, "device": "cpu",
            "speculative": {"drafts": 4, "prefix": 1, "rounds": 90, "accepted": 330, "drafted": 351, "acceptance": 0.9,
                            "mean_accepted": 3.0, **ran(7, 1.0, 1.9, 1 + 0.6 * gain)},
            "speculative_auto": {"drafts": None, "prefix": 1, "rounds": 80, "accepted": 340, "drafted": 360,
                                 **ran(7, 1.0, 2.0, 1 + 0.65 * gain)},
            "wand_lead": depth(0.5, 7, 1.0, 1.4, 1 + 0.35 * gain),
            "wand_lead_p99": depth(0.6, 6, 0.99, 1.6, 1 + 0.45 * gain),
            "wand_max": depth(0.2, 7, 1.0, 1.2, 1 + 0.15 * gain),
            "wand_p99": depth(0.5, 6, 0.991, 1.5, 1 + 0.4 * gain),
            "routed": depth(0.6, 5, 0.964, 1.6, 1 + 0.5 * gain)}


def write_run(folder: Path, stages: int, steps: int = 140, *, evals: Sequence[dict[str, Any]] = (),
              records: Sequence[dict[str, Any]] = (), tokens_per_step: int = 512) -> Path:
    """A run of `steps` steps (no metrics for 0); 1 stage is BP."""
    folder.mkdir(parents=True)
    due = {e["step"]: e for e in evals}
    if steps:
        with open(folder / "metrics.jsonl", "w") as file:
            for s in range(1, steps + 1):
                file.write(json.dumps(train_line(s, stages, tokens_per_step)) + "\n")
                if s in due:
                    file.write(json.dumps({"kind": "eval", **due[s]}) + "\n")
    for one in records:
        (folder / "evaluation").mkdir(exist_ok=True)
        (folder / "evaluation" / f"step_{one['step']:08d}.json").write_text(json.dumps(one))
    return folder


def train_line(step: int, stages: int, tokens_per_step: int) -> dict[str, Any]:
    losses = [2 + 8 / step + 0.1 * (stages - k) for k in range(stages)]
    line = {"kind": "train", "step": step, "tokens": tokens_per_step * step, "loss": sum(losses) / stages,
            "stage_loss": losses, "pool_loss": losses[-1] if stages > 1 and step % 10 == 1 else None,
            "lr_scale": min(1, step / 10)}
    if step == 7:                                                   # a step whose loss was not finite
        line.update(loss=None, stage_loss=[None] * stages, pool_loss=None, nonfinite=["loss"])
    return line
