"""The weights that decoding reads, made once from a model: converted, fused and folded.

Queries, keys, values and the gates of value embeddings are one matrix, so a token costs one product instead of four.
Shared and stage head are added up once. On a CPU every matrix is laid out anew, twice (Matrix), so let go of the model;
elsewhere what needs no change shares its memory with it. What is copied does not follow later updates of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopoe.config.layout import VE_GATE_CHANNELS, layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.model.gpt import GPT, QK_SCALE, SOFTCAP, Attention, Block, norm

PANEL = 16               # outputs side by side: the product with one vector reads weights at the speed of the memory
PACKED_FROM = 3          # vectors from which oneDNN's packed product is faster


class Matrix:
    """A weight (O, I) of a linear map, laid out for few vectors: what counts is how fast it is read.

    On a CPU, in fp32, that is twice: as panels (O/16, I, 16) for one or two vectors, a batched product that all threads
    share, and packed by oneDNN for more, so that a chunk of a few tokens costs about what one token costs. The plain
    matrix-vector product runs on one thread at a third to a half of the speed (runs/LOG.md). All are the same sums in
    another order. Elsewhere the weight stays as it is and shares its memory with the model.
    """

    def __init__(self, weight: Tensor):
        self.out_features, self.in_features = weight.shape
        self.nbytes = weight.nbytes
        self.weight: Tensor | None = weight
        self.panels: Tensor | None = None
        self.packed: Tensor | None = None
        if weight.device.type == "cpu" and weight.dtype == torch.float32 and _can_pack():
            rows = F.pad(weight, (0, 0, 0, -self.out_features % PANEL))
            self.panels = rows.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()        # (O/16, I, 16)
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
            self.weight = None

    def __call__(self, x: Tensor) -> Tensor:
        """(N, I) -> (N, O)."""
        if self.weight is not None:
            return F.linear(x, self.weight)
        if x.size(0) >= PACKED_FROM:
            return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")
        assert self.panels is not None
        y = torch.bmm(x.expand(self.panels.size(0), -1, -1), self.panels)                    # (O/16, N, 16)
        return y.transpose(0, 1).reshape(x.size(0), -1)[:, :self.out_features]


def _can_pack() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@dataclass(frozen=True)
class LayerWeights:
    """One block. `qkv` (H*D + 2*Hkv*D, d), with Hkv more rows where there are value embeddings: their gates."""

    qkv: Matrix
    out: Matrix                  # (d, d)
    fc: Matrix                   # (I, d)
    proj: Matrix                 # (d, I)
    values: Tensor | None        # (V', Hkv*D) value embeddings
    window: int
    resid: float                 # r_i of SPEC 1
    heads: int                   # query heads
    widths: list[int]            # columns of qkv's product: queries and keys, values, gates

    @property
    def bytes(self) -> int:
        """Read for a token, but for the one row of `values`."""
        return sum(m.nbytes for m in self.matrices)

    @property
    def matrices(self) -> tuple[Matrix, ...]:
        return self.qkv, self.out, self.fc, self.proj


class Weights:
    """A model as the decoder reads it, in `dtype` (None: the model's compute dtype)."""

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype | None = None):
        self.config, self.layout = model.config, model.layout
        self.dtype = dtype or model.compute_dtype
        self.device = model.lm_head.weight.device
        self.embedding = cast(nn.Embedding, model.transformer["wte"]).weight
        self.smear_gate = model.smear_gate.weight.to(self.dtype)
        self.smear_lambda = self._scalar(model.smear_lambda[0])
        self.backout = self._scalar(model.backout_lambda[0]) if model.config.poe_mode == "none" else None
        blocks = cast(nn.ModuleList, model.transformer["h"])
        self.layers = [self._layer(model, cast(Block, block), i) for i, block in enumerate(blocks)]
        self.inject = [model.x0_lambdas[self.layout.stage_layers(k)].to(self.dtype)[:, None, None].clone()
                       for k in range(self.n_stages)]                                  # c_i of the layers of a stage
        self.shared_head = not self.layout.stage_heads
        folded = [Matrix(model.head_weight(k).to(self.dtype)) for k in range(1 if self.shared_head else self.n_stages)]
        self.heads = folded * (self.n_stages if self.shared_head else 1)               # (V, d) each
        self.attention_scale = QK_SCALE * QK_SCALE / self.layout.head_dim ** 0.5

    @property
    def n_stages(self) -> int:
        return self.layout.n_stages

    def _scalar(self, value: Tensor) -> float:
        """Rounded to the compute dtype, as the model does."""
        return float(value.to(self.dtype))

    def _layer(self, model: GPT, block: Block, i: int) -> LayerWeights:
        attn: Attention = block.attn
        rows = [attn.c_q.weight, attn.c_k.weight, attn.c_v.weight]
        values = None
        if attn.ve_gate is not None:
            rows.append(F.pad(attn.ve_gate.weight, (0, self.config.n_embd - VE_GATE_CHANNELS)))
            values = cast(nn.Embedding, model.value_embeds[str(i)]).weight
        kv = self.config.n_kv_head * attn.head_dim
        widths = [attn.n_head * attn.head_dim + kv, kv] + [attn.n_kv_head] * (values is not None)
        return LayerWeights(
            heads=self.config.n_head, widths=widths, qkv=Matrix(torch.cat(rows).to(self.dtype)),
            out=Matrix(attn.c_proj.weight.to(self.dtype)),
            fc=Matrix(block.mlp.c_fc.weight.to(self.dtype)), proj=Matrix(block.mlp.c_proj.weight.to(self.dtype)),
            values=values,
            window=self.layout.window_sizes[i], resid=self._scalar(model.resid_lambdas[i]))

    # -- heads ----------------------------------------------------------------------------------------------------

    def logits(self, stages: Sequence[int], states: list[Tensor]) -> list[Tensor]:
        """Boundary states (N, D) of `stages` -> their capped logits (N, V) + 15, fp32; a shared head is read once.

        15 tanh(z/15) + 15 is 30 sigmoid(2z/15), which a CPU has in a sixth of the time. Everything that reads
        these is blind to a constant.
        """
        if self.shared_head and len(states) > 1:
            return list(self._capped(torch.cat(states), self.heads[0]).split(states[0].size(0)))
        return [self._capped(x, self.heads[k]) for k, x in zip(stages, states, strict=True)]

    def _capped(self, x: Tensor, head: Matrix) -> Tensor:
        return head(norm(x)).float().mul_(2 / SOFTCAP).sigmoid_().mul_(2 * SOFTCAP)

    # -- what a token costs ---------------------------------------------------------------------------------------

    def bytes_read(self, depth: int, heads: int | None = None) -> int:
        """Bytes of weights that a token reads which runs the first `depth` stages and `heads` of their heads (all)."""
        layers = sum(layer.bytes for layer in self.layers[:self.layout.boundaries[depth - 1] + 1])
        distinct = min(depth if heads is None else heads, 1 if self.shared_head else depth)
        return layers + distinct * self.heads[0].nbytes

    def share(self, depth: int) -> float:
        """Cost of a token of the first `depth` stages, with all their heads, relative to the whole model."""
        return cost_share(self.config, depth)


def cost_share(config: ModelConfig, depth: int) -> float:
    """What a token costs that runs the first `depth` stages and all their heads, relative to the whole model: by the
    elements of the matrices it reads, a shared head once. Gates are too small to count."""
    layout = layout_of(config)
    d, kv = config.n_embd, config.n_kv_head * layout.head_dim
    layer = 2 * d * d + 2 * d * kv + 2 * d * layout.intermediate

    def cost(stages: int) -> int:
        heads = stages if layout.stage_heads else 1
        return (layout.boundaries[stages - 1] + 1) * layer + heads * config.vocab_size * d

    return cost(depth) / cost(layout.n_stages)
