"""config.json and generation_config.json of an exported repo, as plain dicts (SPEC 10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from nanopoe.config.layout import SMEAR_CHANNELS, VE_GATE_CHANNELS, layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError, DataError
from nanopoe.infer.calibrate import LEAD_MAX, LEAD_P99, MAX, P99
from nanopoe.model.attention import ROPE_BASE
from nanopoe.model.gpt import QK_SCALE, SOFTCAP

AUTO_MAP = {
    "AutoConfig": "configuration_nanopoe.NanoPoEConfig",
    "AutoModel": "modeling_nanopoe.NanoPoEModel",
    "AutoModelForCausalLM": "modeling_nanopoe.NanoPoEForCausalLM",
}


def model_config(m: ModelConfig, special_ids: dict[str, int], dtype: str, name: str, step: int,
                 calibration: dict[str, Any] | None = None, specialists: Sequence[str] = ()) -> dict[str, Any]:
    """The dict of config.json; the layout is written out, so that no reader has to derive it. No null values but the
    parents of specialists on the base. `specialists` are their names."""
    layout = layout_of(m)
    check_lookup(m)
    windows = [*layout.window_sizes, *[m.sequence_len] * sum(shape.n_layer for shape in m.specialists)]
    short = sorted({w for w in windows if w < m.sequence_len})
    kinds = ["sliding_attention" if w in short else "full_attention" for w in windows]
    bos = special_ids["<|bos|>"]
    config: dict[str, Any] = {
        "model_type": "nanopoe",
        "architectures": ["NanoPoEForCausalLM"],
        "auto_map": AUTO_MAP,
        "dtype": dtype,
        "vocab_size": m.vocab_size,
        "hidden_size": m.n_embd,
        "intermediate_size": layout.intermediate,
        "num_hidden_layers": len(windows) + 1,                   # layer 0 looks up the previous token
        "num_attention_heads": m.n_head,
        "num_key_value_heads": m.n_kv_head,
        "head_dim": layout.head_dim,
        "max_position_embeddings": m.sequence_len,
        "layer_types": ["sliding_attention" if short else "full_attention", *kinds],
        "window_sizes": windows,
        "value_embedding_blocks": list(layout.ve_layers),
        "poe_mode": m.poe_mode,
        "stage_boundaries": list(layout.boundaries),
        "stage_heads": layout.stage_heads,
        "smear_channels": SMEAR_CHANNELS,
        "value_gate_channels": VE_GATE_CHANNELS,
        "qk_scale": QK_SCALE,
        "rotary_base": ROPE_BASE,
        "final_logit_softcapping": SOFTCAP,
        "tie_word_embeddings": False,
        "bos_token_id": bos,
        "eos_token_id": eos_ids(special_ids),
        "pad_token_id": bos,
        "nanopoe_run": {"name": name, "step": step},
    }
    if short:
        config["sliding_window"] = short[-1] + 1                 # counts the token itself, our left window does not
    if m.poe_mode == "none":
        config["backout_block"] = m.n_layer // 2
    if m.specialists:
        config["specialists"] = [{"name": called, "blocks": shape.n_layer, "parent": shape.parent}
                                 for called, shape in zip(specialists, m.specialists, strict=True)]
    return config | (calibrated(calibration, layout.n_stages) if calibration else {})


def calibrated(calibration: dict[str, Any], n_stages: int) -> dict[str, Any]:
    """The keys of config.json that `generate_wand` and `generate_routed` read, of what scripts.calibrate found.

    DataError for what it did not write. No threshold beside a mode: no confidence stayed under the cap.
    """
    try:
        bounds = {name: [float(b) for b in calibration[name]] for name in (P99, MAX, LEAD_P99, LEAD_MAX)}
        routing = calibration["routing"]
        found = {"poe_routing_mode": str(routing["mode"]), "poe_routing_cap": float(routing["cap"])}
        if routing["threshold"] is not None:
            found["poe_routing_threshold"] = float(routing["threshold"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"the calibration has no {error}" if isinstance(error, KeyError) else
                        "the calibration cannot be read", "export", "run scripts.calibrate again") from error
    if not all(len(part) == n_stages - 1 and all(math.isfinite(b) and b >= 0 for b in part)
               for part in bounds.values()):
        raise DataError(f"the calibration does not hold {n_stages - 1} bounds, finite and not negative", "export",
                        "run scripts.calibrate again")
    return {**bounds, **found}


def generation_config(special_ids: dict[str, int]) -> dict[str, Any]:
    """The dict of generation_config.json: greedy, stops at the end of a turn or where a new document would begin."""
    bos = special_ids["<|bos|>"]
    return {"bos_token_id": bos, "eos_token_id": eos_ids(special_ids), "pad_token_id": bos}


def eos_ids(special_ids: dict[str, int]) -> list[int]:
    return [special_ids["<|assistant_end|>"], special_ids["<|bos|>"]]


def check_lookup(m: ModelConfig) -> None:
    """The previous-token layer stores a token's bits in a value vector and its position in head_dim/2 angles."""
    head_dim, bits = layout_of(m).head_dim, max(m.vocab_size - 1, 1).bit_length()
    if head_dim % 2 or head_dim < max(16, bits):
        raise ConfigError(f"head dimension {head_dim} (model.n_embd / model.n_head)", "export",
                          f"it has to be even and at least {max(16, bits)} for a vocabulary of {m.vocab_size}")
