"""The weights that decoding reads, made once from a model: converted, fused and folded.

Queries, keys, values and the gates of value embeddings are one matrix, so a token costs one product instead of four.
The heads that an expert adds up are one matrix, added in fp32: shared and stage head, and of a specialist all of its
chain. Specialists (SPEC 8) are stages behind those of the base, n_stages + i, each a branch of a tree.

On a CPU every matrix is laid out anew, twice (Matrix), so let go of the model; elsewhere what needs no change shares
its memory with it. What is copied does not follow later updates of the model.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanopoe.config.layout import CHAT_TOKENS, VE_GATE_CHANNELS, layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError
from nanopoe.model.gpt import GPT, QK_SCALE, SOFTCAP, Attention, Block, Specialist, norm

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
    """A model as the decoder reads it, in `dtype` (None: the model's compute dtype).

    `names` are those of its specialists, in the model's order; none: "0", "1" and so on. ConfigError for a wrong number
    of names, or one that could not be told from something else.
    """

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype | None = None, names: Sequence[str] = ()):
        self.config, self.layout = model.config, model.layout
        self.names = checked_names(names, len(model.config.specialists))
        self.dtype = dtype or model.compute_dtype
        self.device = model.lm_head.weight.device
        self.embedding = self._embedding(model)
        self.smear_gate = model.smear_gate.weight.to(self.dtype)
        self.smear_lambda = self._scalar(model.smear_lambda[0])
        self.backout = self._scalar(model.backout_lambda[0]) if model.config.poe_mode == "none" else None
        blocks = cast(nn.ModuleList, model.transformer["h"])
        self.layers = [self._layer(model, cast(Block, block), i, model.resid_lambdas[i])
                       for i, block in enumerate(blocks)]
        self.stage_layers = [self.layout.stage_layers(k) for k in range(self.n_stages)]    # their places in `layers`
        inject = [model.x0_lambdas[layers] for layers in self.stage_layers]
        for added in cast("Sequence[Specialist]", model.specialists if self.names else ()):
            self.stage_layers.append(range(len(self.layers), len(self.layers) + len(added.h)))
            self.layers += [self._layer(model, cast(Block, block), None, resid)
                            for block, resid in zip(added.h, added.resid_lambdas, strict=True)]
            inject.append(added.x0_lambdas)
        self.inject = [c.to(self.dtype)[:, None, None].clone() for c in inject]        # c_i of the layers of a stage
        shared = not self.layout.stage_heads
        folded = [Matrix(model.head_weight(k).to(self.dtype)) for k in range(1 if shared else self.n_stages)]
        self.heads = folded * (self.n_stages if shared else 1)                         # (V, d) each
        self.heads += [Matrix(model.head_weight(self.n_stages + i).to(self.dtype)) for i in range(len(self.names))]
        self.attention_scale = QK_SCALE * QK_SCALE / self.layout.head_dim ** 0.5

    @property
    def n_stages(self) -> int:
        """Stages of the base; specialist i is stage n_stages + i."""
        return self.layout.n_stages

    def way_to(self, stages: Collection[int]) -> tuple[int, ...]:
        """The stages that must run so that the states of `stages` are there, in an order in which they can."""
        way: set[int] = set()
        for k in stages:
            while k >= 0 and k not in way:
                way.add(k)
                k = self.layout.input_of(k)
        return tuple(sorted(way))

    def _embedding(self, model: GPT) -> Tensor:
        """(V', d); with specialists a copy in which the chat tokens have their rows."""
        wte = cast(nn.Embedding, model.transformer["wte"]).weight
        if not self.names:
            return wte
        wte = wte.detach().clone()
        wte[self.config.vocab_size - CHAT_TOKENS:self.config.vocab_size] = model.chat_rows
        return wte

    def _scalar(self, value: Tensor) -> float:
        """Rounded to the compute dtype, as the model does."""
        return float(value.to(self.dtype))

    def _layer(self, model: GPT, block: Block, i: int | None, resid: Tensor) -> LayerWeights:
        """Block i of the base, or one of a specialist (None)."""
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
            window=attn.window, resid=self._scalar(resid))

    # -- heads ----------------------------------------------------------------------------------------------------

    def logits(self, stages: Sequence[int], states: list[Tensor]) -> list[Tensor]:
        """Boundary states (N, D) of `stages` (rising) -> their capped logits (N, V) + 15, fp32; a shared head is read
        once.

        15 tanh(z/15) + 15 is 30 sigmoid(2z/15), which a CPU has in a sixth of the time. Everything that reads
        these is blind to a constant.
        """
        found: list[Tensor] = []
        for _, group in groupby(zip(stages, states, strict=True), key=lambda pair: id(self.heads[pair[0]])):
            which, xs = zip(*group, strict=True)
            x = torch.cat(xs) if len(xs) > 1 else xs[0]
            found += self._capped(x, self.heads[which[0]]).split([len(x) for x in xs])
        return found

    def _capped(self, x: Tensor, head: Matrix) -> Tensor:
        return head(norm(x)).float().mul_(2 / SOFTCAP).sigmoid_().mul_(2 * SOFTCAP)

    # -- what a token costs ---------------------------------------------------------------------------------------

    def bytes_read(self, stages: Collection[int]) -> int:
        """Bytes of weights that a token reads which asks the experts of `stages`: the layers on the way to them and
        their heads."""
        heads = {id(self.heads[k]): self.heads[k].nbytes for k in stages}
        layers = [self.layers[i] for k in self.way_to(stages) for i in self.stage_layers[k]]
        return sum(layer.bytes for layer in layers) + sum(heads.values())

    def share(self, depth: int) -> float:
        """Cost of a token of the first `depth` stages, with all their heads, relative to the whole base."""
        return cost_share(self.config, depth)


def checked_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    """The names of `count` specialists; none given: their numbers."""
    if not names:
        return tuple(map(str, range(count)))
    if len(names) != count:
        raise ConfigError(f"{len(names)} names for {count} specialists", "names of specialists", "name each, once")
    for i, name in enumerate(names):
        if name == "base" or not name or name.isdecimal() or set(name) & set("=,:") or name in names[:i]:
            raise ConfigError(f"{name!r} cannot name a specialist", "names of specialists",
                              "use another for each, not base, not a number, without '=', ',' and ':'")
    return tuple(names)


def cost_share(config: ModelConfig, depth: int) -> float:
    """What a token costs that runs the first `depth` stages and all their heads, relative to the whole base: by the
    elements of the matrices it reads, a shared head once. Gates are too small to count."""
    layout = layout_of(config)
    d, kv = config.n_embd, config.n_kv_head * layout.head_dim
    layer = 2 * d * d + 2 * d * kv + 2 * d * layout.intermediate

    def cost(stages: int) -> int:
        heads = stages if layout.stage_heads else 1
        return (layout.boundaries[stages - 1] + 1) * layer + heads * config.vocab_size * d

    return cost(depth) / cost(layout.n_stages)
