"""Configuration of a nanopoe language model for transformers."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig


class NanoPoEConfig(PretrainedConfig):
    """Shape and layout of a nanopoe model; every fact about the layout is an explicit list, none is re-derived.

    Layer 0 of the model is the parameter-free lookup of the previous token, so block i of the trained network is
    layer i + 1 and `num_hidden_layers` is the number of blocks + 1.

    In layers (length num_hidden_layers): `layer_types`. In blocks (0 is the first trained block):
    `stage_boundaries`, the last block of each stage; `value_embedding_blocks`; `window_sizes`, the left window of
    each block in tokens (`sliding_window` counts the token itself and is one more; where there are several sizes, it is
    that of the largest but those that see all).

    `poe_mode` "none" is a model with one loss at its end: one stage, `backout_block` set, logits = capped logits.
    "flat" and "hier" have one expert per stage, and logits are the log-probabilities of their normalised
    log-opinion pool. `stage_heads` is the number of additive heads beside the shared `lm_head`, 0 or one per stage.

    Of a checkpoint that was calibrated, what `generate_wand` and `generate_routed` read: the bounds of each transition
    from a stage to the next, and the confidence from which stage 0 may answer, with the mode and the cap it was found
    by. A mode without a threshold: no confidence stayed under the cap.

    `specialists` [{blocks, parent, name}] stand behind the base: their blocks are counted on from the base's in this
    order, `parent` is the number of the one they read, null for the base. `parent` of a stage repo is where the model
    below it is: {repo, revision, digest, name}; `repo` is a folder as seen from this one (it begins with a dot) or an
    id on the Hub. A loaded model has all of it and no parent.
    """

    model_type = "nanopoe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 512,
        hidden_size: int = 64,
        intermediate_size: int = 256,
        num_hidden_layers: int = 3,
        num_attention_heads: int = 2,
        num_key_value_heads: int = 2,
        head_dim: int = 32,
        max_position_embeddings: int = 512,
        layer_types: list[str] | None = None,
        sliding_window: int | None = None,
        window_sizes: list[int] | None = None,
        value_embedding_blocks: list[int] | None = None,
        poe_mode: str = "none",
        stage_boundaries: list[int] | None = None,
        stage_heads: int = 0,
        backout_block: int | None = None,
        poe_wand_p99_bounds_per_stage_head: list[float] | None = None,
        poe_wand_max_bounds_per_stage_head: list[float] | None = None,
        poe_wand_lead_p99_bounds: list[float] | None = None,
        poe_wand_lead_max_bounds: list[float] | None = None,
        poe_routing_threshold: float | None = None,
        poe_routing_mode: str | None = None,
        poe_routing_cap: float | None = None,
        specialists: list[dict[str, Any]] | None = None,
        parent: dict[str, Any] | None = None,
        smear_channels: int = 24,
        value_gate_channels: int = 12,
        qk_scale: float = 1.2,
        rotary_base: float = 100000.0,
        final_logit_softcapping: float = 15.0,
        initializer_range: float = 0.02,
        use_cache: bool = True,
        **kwargs: Any,
    ):
        blocks = num_hidden_layers - 1
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.layer_types = layer_types or ["full_attention"] * num_hidden_layers
        self.sliding_window = sliding_window
        self.window_sizes = window_sizes or [max_position_embeddings] * blocks
        self.value_embedding_blocks = value_embedding_blocks or []
        self.poe_mode = poe_mode
        self.stage_boundaries = stage_boundaries or [blocks - 1]
        self.stage_heads = stage_heads
        self.backout_block = backout_block
        self.poe_wand_p99_bounds_per_stage_head = poe_wand_p99_bounds_per_stage_head
        self.poe_wand_max_bounds_per_stage_head = poe_wand_max_bounds_per_stage_head
        self.poe_wand_lead_p99_bounds = poe_wand_lead_p99_bounds
        self.poe_wand_lead_max_bounds = poe_wand_lead_max_bounds
        self.poe_routing_threshold = poe_routing_threshold
        self.poe_routing_mode = poe_routing_mode
        self.poe_routing_cap = poe_routing_cap
        self.specialists = specialists or []
        self.parent = parent
        self.smear_channels = smear_channels
        self.value_gate_channels = value_gate_channels
        self.qk_scale = qk_scale
        self.rotary_base = rotary_base
        self.final_logit_softcapping = final_logit_softcapping
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)

    def chain_of(self, i: int) -> tuple[int, ...]:
        """Specialist i and those below it, from the base up."""
        below = self.specialists[i]["parent"]
        return (*(() if below is None else self.chain_of(below)), i)

    def blocks_of(self, i: int) -> range:
        """Blocks of specialist i."""
        counts = [one["blocks"] for one in self.specialists[: i + 1]]
        end = self.stage_boundaries[-1] + 1 + sum(counts)
        return range(end - counts[-1], end)
