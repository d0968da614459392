"""Parameters, tensors and FLOPs by arithmetic alone: no torch, no model, exact (SPEC 1). Memory: memory.py."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanopoe.config.layout import CHAT_TOKENS, SMEAR_CHANNELS, VE_GATE_CHANNELS, Layout, layout_of
from nanopoe.config.schema import ModelConfig

GROUPS = ("lm_head", "stage_heads", "wte", "value_embeds", "matrices", "scalars")


# -- parameters -------------------------------------------------------------------------------------------------------

def parameter_shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of the model, trained or not; equal to the built model's `named_parameters`."""
    layout = layout_of(m)
    d, kv, vocab = m.n_embd, m.n_kv_head * layout.head_dim, layout.padded_vocab
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (vocab, d)}
    for i in range(m.n_layer):
        shapes |= block_shapes(m, f"transformer.h.{i}", i in layout.ve_layers)
    shapes |= {f"value_embeds.{i}.weight": (vocab, kv) for i in layout.ve_layers}
    shapes["lm_head.weight"] = (vocab, d)
    shapes |= {f"lm_head_stages.{k}.weight": (vocab, d) for k in range(layout.stage_heads)}
    shapes |= {"resid_lambdas": (m.n_layer,), "x0_lambdas": (m.n_layer,),
               "smear_gate.weight": (1, SMEAR_CHANNELS), "smear_lambda": (1,), "backout_lambda": (1,)}
    if m.specialists:
        shapes["chat_rows"] = (CHAT_TOKENS, d)
    for i in range(len(m.specialists)):
        shapes |= specialist_shapes(m, i)
    return shapes


def block_shapes(m: ModelConfig, block: str, ve: bool) -> dict[str, tuple[int, ...]]:
    """Of the block named `block`, with a gate if it has value embeddings."""
    layout = layout_of(m)
    d, kv, attn, mlp = m.n_embd, m.n_kv_head * layout.head_dim, f"{block}.attn", f"{block}.mlp"
    shapes: dict[str, tuple[int, ...]] = {
        f"{attn}.c_q.weight": (d, d), f"{attn}.c_k.weight": (kv, d), f"{attn}.c_v.weight": (kv, d),
        f"{attn}.c_proj.weight": (d, d)}
    if ve:
        shapes[f"{attn}.ve_gate.weight"] = (m.n_kv_head, VE_GATE_CHANNELS)
    return shapes | {f"{mlp}.c_fc.weight": (layout.intermediate, d), f"{mlp}.c_proj.weight": (d, layout.intermediate)}


def specialist_shapes(m: ModelConfig, i: int) -> dict[str, tuple[int, ...]]:
    """Of specialist i, all of which is trained."""
    n, name = m.specialists[i].n_layer, f"specialists.{i}"
    shapes: dict[str, tuple[int, ...]] = {}
    for j in range(n):
        shapes |= block_shapes(m, f"{name}.h.{j}", ve=False)
    return shapes | {f"{name}.lm_head_stage.weight": (layout_of(m).padded_vocab, m.n_embd),
                     f"{name}.resid_lambdas": (n,), f"{name}.x0_lambdas": (n,)}


def trained_shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of what training changes: of a model with specialists the last one, else all that a loss reads."""
    if m.specialists:
        return specialist_shapes(m, len(m.specialists) - 1)
    return {name: shape for name, shape in parameter_shapes(m).items()
            if name != "backout_lambda" or m.poe_mode == "none"}


def group_of(name: str) -> str:
    """The group, one of GROUPS, that a parameter is counted in. ve_gate is a block matrix (SPEC 9)."""
    if name.startswith("transformer.h.") or (name.startswith("specialists.") and ".h." in name):
        return "matrices"
    if name.endswith(".lm_head_stage.weight"):
        return "stage_heads"
    for prefix, group in (("lm_head_stages.", "stage_heads"), ("lm_head.", "lm_head"), ("transformer.wte.", "wte"),
                          ("value_embeds.", "value_embeds"), ("chat_rows", "wte")):
        if name.startswith(prefix):
            return group
    return "scalars"


@dataclass(frozen=True)
class ParameterCounts:
    """Elements; `scaling` is what the weight decay is scaled by: block matrices and lm_head (SPEC 1, 9)."""

    total: int
    tensors: int
    by_group: dict[str, int]

    @property
    def scaling(self) -> int:
        return self.by_group["matrices"] + self.by_group["lm_head"]


def count_parameters(m: ModelConfig) -> ParameterCounts:
    """N = V d (2+H) + L (2d^2 + 2 d kv + 2 d I) + n_ve (V kv + 12 n_kv) + 2L + 26, by group (SPEC 1)."""
    shapes = parameter_shapes(m)
    by_group = dict.fromkeys(GROUPS, 0)
    for name, shape in shapes.items():
        by_group[group_of(name)] += math.prod(shape)
    return ParameterCounts(sum(by_group.values()), len(shapes), by_group)


def scaling_parameters(m: ModelConfig) -> int:
    """Elements of the block matrices and lm_head: 729,810,624 at d24, 110,100,912 at d12 (SPEC 1)."""
    return count_parameters(m).scaling


# -- arithmetic work --------------------------------------------------------------------------------------------------

def forward_flops_per_stage(m: ModelConfig) -> list[int]:
    """K numbers: FLOPs of one token through the blocks of a stage and its head, forward only.

    2 per element of a matmul weight (block matrices with ve_gate; one padded V x d head a stage, since a stage head
    is added to the shared one before the matmul) and 4 H head_dim min(window, T) per layer for the scores and their
    use. Embedding look-ups, norms, smear and softmax are left out, as is usual.
    """
    layout = layout_of(m)
    return [sum(_block_flops(m, layout, i) for i in layout.stage_layers(k)) + 2 * layout.padded_vocab * m.n_embd
            for k in range(layout.n_stages)]


def flops_per_token(m: ModelConfig) -> int:
    """FLOPs of one trained token, forward and backward: three times the forward, i.e. 6 per element of a matmul
    weight and use, and 12 H head_dim min(window, T) of attention per layer (PaLM's appendix B, arXiv 2204.02311).

    Of what is frozen below a specialist a token needs the forward pass, without heads."""
    if not m.specialists:
        return 3 * sum(forward_flops_per_stage(m))
    blocks = [_specialist_flops(m, i) for i in layout_of(m).chains[-1]]
    head = 2 * layout_of(m).padded_vocab * m.n_embd
    below = sum(_block_flops(m, layout_of(m), i) for i in range(m.n_layer)) + sum(blocks[:-1])
    return below + 3 * (blocks[-1] + head)


def _specialist_flops(m: ModelConfig, i: int) -> int:
    """Of one token forward through the blocks of specialist i."""
    return m.specialists[i].n_layer * _dense_block_flops(m, layout_of(m), m.sequence_len)


def _block_flops(m: ModelConfig, layout: Layout, layer: int) -> int:
    gate = 2 * m.n_kv_head * VE_GATE_CHANNELS if layer in layout.ve_layers else 0
    return _dense_block_flops(m, layout, layout.window_sizes[layer]) + gate


def _dense_block_flops(m: ModelConfig, layout: Layout, window: int) -> int:
    kv = m.n_kv_head * layout.head_dim
    elements = 2 * m.n_embd**2 + 2 * m.n_embd * kv + 2 * m.n_embd * layout.intermediate
    return 2 * elements + 4 * m.n_head * layout.head_dim * min(window, m.sequence_len)
