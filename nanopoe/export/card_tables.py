"""Tables of the model card, from the record of an evaluated step; "" for what the record does not hold."""

from __future__ import annotations

from typing import Any

from nanopoe.config.layout import Layout
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99

Record = dict[str, Any]
MODES = {"speculative": "speculative", "speculative_auto": "speculative, drafts as long as it pays",
         "wand_max": "adaptive depth, max", "wand_p99": "adaptive depth, p99", "wand_lead": "adaptive depth, lead",
         "wand_lead_p99": "adaptive depth, lead_p99", "routed": "routing"}


def stage_table(layout: Layout) -> str:
    """The blocks of each stage."""
    heads = "shared head and its own" if layout.stage_heads else "shared head"
    rows = [f"| {k} | {layout.stage_layers(k)[0]} to {layout.stage_layers(k)[-1]} | {heads} |"
            for k in range(layout.n_stages)]
    return "\n".join(["", "## Stages", "", "| stage | blocks | predicts with |", "| --- | --- | --- |", *rows, ""])


def score_table(layout: Layout, record: Record) -> str:
    """Bits per byte (lower is better) and top-1 accuracy of every view that was evaluated."""
    bpb, accuracy = record.get("bpb"), record.get("accuracy") or {}
    if not bpb:
        return ""
    rows = [("all stages" if bpb.get("stages") else "model", bpb["full"], accuracy.get("full"))]
    for kind, label in (("stages", "stage {}"), ("prefixes", "first {}")):
        hits = accuracy.get(kind) or [None] * layout.n_stages
        first = 0 if kind == "stages" else 1
        rows += [(label.format(k + first), score, hit)
                 for k, (score, hit) in enumerate(zip(bpb.get(kind) or [], hits, strict=False))]
    lines = [f"| {label} | {score:.4f} | {'' if hit is None else f'{hit:.4f}'} |" for label, score, hit in rows]
    held_out = f"Held-out text, {record['tokens']:,} tokens. " if record.get("tokens") else ""
    note = held_out + "Weights and arithmetic in float32. Bits per byte: lower is better."
    return "\n".join(["", "## Evaluation", "", note, "",
                      "| prediction of | bits per byte | top-1 accuracy |", "| --- | --- | --- |", *lines, ""])


def bounds_table(record: Record) -> str:
    """What was calibrated: the bounds of adaptive depth and the threshold of routing."""
    found = record.get("calibration")
    if not found:
        return ""
    names = {P99: "all changes, 99 %", MAX: "all changes", LEAD_P99: "lead, 99 %", LEAD_MAX: "lead"}
    lines = [f"| {k} to {k + 1} | " + " | ".join(f"{found[key][k]:.4f}" for key in names) + " |"
             for k in range(len(found[MAX]))]
    r = found["routing"]
    threshold = "no confidence stays under it" if r["threshold"] is None else (
        f"threshold {r['threshold']:.4f}, {r['routed']:.1%} of the tokens routed to stage 0, projected speed-up "
        f"{r['projected_speedup']:.2f}x; stage 0 agrees with the full model on {r['agreement']:.1%} of all tokens")
    note = (f"On {found['tokens']:,} held-out tokens, in float32. Bounds of adaptive depth: of the range of all "
            "changes from a stage to the next, and of what they take of the leading token's margin; of all tokens or "
            "of 99 % of them.")
    return "\n".join(["", "## Calibration", "", note, "", f"| from stage | {' | '.join(names.values())} |",
                      "| --- " * (1 + len(names)) + "|", *lines, "",
                      f"Routing, {r['mode']} at most {r['cap']:g}: {threshold}.", ""])


def modes_table(layout: Layout, record: Record) -> str:
    """What the modes did to the probes, against plain decoding."""
    modes = record.get("modes")
    if not modes:
        return ""
    K, lines = layout.n_stages, []
    for key, name in MODES.items():
        if found := modes.get(key):
            did = f"{found['mean_depth']:.2f} of {K} stages a token" if "mean_depth" in found else (
                f"{found['mean_accepted']:.2f} of {found['drafted'] / max(found['rounds'], 1):.1f} drafts kept a round "
                f"({found['acceptance']:.1%})")
            measured = found.get("measured_speedup")
            lines.append(f"| {name} | {did} | {found['agreement']:.1%} | {found['predicted_speedup']:.2f}x | "
                         f"{'' if measured is None else f'{measured:.2f}x'} |")
    note = (f"Greedy, {modes['prompts']} prompts of {modes['tokens']} new tokens, batch 1, in nanopoe's own engine "
            f"({modes['device']}, {modes['threads']} threads). Predicted: by the weights that are read. Measured times "
            "are of one machine at one moment.")
    return "\n".join(["", "## Modes", "", note, "",
                      "| mode | | tokens as of the full model | predicted speed-up | measured |",
                      "| --- | --- | --- | --- | --- |", *lines, ""])
