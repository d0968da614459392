"""The GPT trunk in clustered PoE stages, with nanochat's architecture and parameter names (SPEC 1).

embed -> rmsnorm -> smear -> L blocks in K stages -> (BP: backout) -> rmsnorm -> untied head(s) -> 15*tanh(z/15)

Specialists (SPEC 8) are more stages, K + i for the i-th: each reads the boundary state of the one it stands on, the
last stage of the base or another specialist, and its head is added to those below it. They share all else with the
base, whose tensors, value-embedding layers and windows they leave as they are.

Shape letters: B batch, T time, D width, H heads, V vocabulary, K stages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nanopoe.config.layout import CHAT_TOKENS, SMEAR_CHANNELS, VE_GATE_CHANNELS, Layout, layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.model.attention import Positions, attend, rotary_tables, rotate
from nanopoe.model.float8 import float8_linear
from nanopoe.model.pool import aggregate
from nanopoe.model.windows import find_documents

SOFTCAP = 15.0
QK_SCALE = 1.2           # sharpens attention after QK norm; applied to q and to k


def norm(x: Tensor) -> Tensor:
    """RMS norm without parameters over the last dimension."""
    return F.rms_norm(x, (x.size(-1),))


def capped_logits(x: Tensor, weight: Tensor) -> Tensor:
    """Normed state (..., D) and head (V, D) -> 15 * tanh(z / 15) of shape (..., V) in fp32."""
    z = F.linear(x, weight.to(x.dtype)).float()
    return SOFTCAP * torch.tanh(z / SOFTCAP)


class Linear(nn.Linear):
    """No bias; fp32 master weight cast to the dtype of its input. We use this instead of autocast. With `float8`, set
    from outside, what is trained runs in 8 bits, and what runs without gradient as it did."""

    float8 = False

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.float8 and torch.is_grad_enabled():
            return float8_linear(x, self.weight)
        # contiguous: of a slice torch would choose the kernel, and so the last bits, by whether the weight is trainable
        return F.linear(x.contiguous(), self.weight.to(x.dtype))


class Attention(nn.Module):
    def __init__(self, m: ModelConfig, layout: Layout, window: int, ve: bool):
        super().__init__()
        self.window, self.head_dim = window, layout.head_dim
        self.n_head, self.n_kv_head = m.n_head, m.n_kv_head
        self.c_q = Linear(m.n_embd, m.n_head * self.head_dim)
        self.c_k = Linear(m.n_embd, m.n_kv_head * self.head_dim)
        self.c_v = Linear(m.n_embd, m.n_kv_head * self.head_dim)
        self.c_proj = Linear(m.n_embd, m.n_embd)
        self.ve_gate = Linear(VE_GATE_CHANNELS, m.n_kv_head) if ve else None

    def forward(self, x: Tensor, ve: Tensor | None, places: Positions) -> Tensor:
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        if self.ve_gate is not None:
            assert ve is not None
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., :VE_GATE_CHANNELS]))     # (B, T, Hkv)
            v = v + gate.unsqueeze(-1) * ve.view_as(v)
        q = norm(rotate(q, places.cos, places.sin)) * QK_SCALE                 # rotate first, then QK norm
        k = norm(rotate(k, places.cos, places.sin)) * QK_SCALE
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)         # (B, H, T, D)
        y = attend(q, k, v, self.window, documents=places.documents)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """relu(x)^2 (Primer, arXiv 2109.08668)."""

    def __init__(self, m: ModelConfig, layout: Layout):
        super().__init__()
        self.c_fc = Linear(m.n_embd, layout.intermediate)
        self.c_proj = Linear(layout.intermediate, m.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(ReluSquared.apply(self.c_fc(x)))


class ReluSquared(torch.autograd.Function):
    """relu(x)^2. Keeps of x nothing but the result, which c_proj keeps anyway: its root is relu(x).

    A CPU takes six times as long for the root of 0, which half of them are: 2^-63 is put in its place and taken off.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x).square_()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return ctx.saved_tensors[0].clamp_min(2**-126).sqrt_().sub_(2**-63).mul_(2).mul_(grads[0])


class Block(nn.Module):
    def __init__(self, m: ModelConfig, layout: Layout, window: int, ve: bool):
        super().__init__()
        self.attn = Attention(m, layout, window, ve)
        self.mlp = MLP(m, layout)

    def forward(self, x: Tensor, ve: Tensor | None, places: Positions) -> Tensor:
        x = x + self.attn(norm(x), ve, places)
        return x + self.mlp(norm(x))


def enter_block(block: Block, r: Tensor, c: Tensor, x: Tensor, x0: Tensor, ve: Tensor | None,
                places: Positions) -> Tensor:
    """Residual stream x (B, T, D) behind a block that reads r x + c x0. What is compiled (train/build.py)."""
    return block(r.to(x.dtype) * x + c.to(x.dtype) * x0, ve, places)


def run_layer(enter: Callable[..., Tensor], block: Block, table: nn.Module | None, r: Tensor, c: Tensor, x: Tensor,
              x0: Tensor, ids: Tensor, places: Positions) -> Tensor:
    """enter_block with value embeddings of `ids` (B, T) from `table`, if there is one. What is run again in a backward
    with activation checkpointing. The look-up is not compiled: Inductor would add its gradient with atomics on a GPU.
    """
    return enter(block, r, c, x, x0, None if table is None else table(ids).to(x.dtype), places)


Layer = Callable[..., Tensor]        # run_layer but for its first argument


class Specialist(nn.Module):
    """Blocks behind a frozen model, and a head that is added to its (SPEC 8); as initialised it changes nothing.

    They see all of the context and have no value embeddings: those of the base keep their layers. A BP base is left
    behind its backout, at the state its head reads; the reference applies the base's backout after the new blocks.
    """

    def __init__(self, m: ModelConfig, layout: Layout, n_layer: int):
        super().__init__()
        self.h = nn.ModuleList(Block(m, layout, m.sequence_len, ve=False) for _ in range(n_layer))
        self.lm_head_stage = Linear(m.n_embd, layout.padded_vocab)
        self.resid_lambdas = nn.Parameter(torch.empty(n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(n_layer))

    def forward(self, x: Tensor, x0: Tensor, ids: Tensor, places: Positions, layer: Layer) -> Tensor:
        for block, r, c in zip(self.h, self.resid_lambdas, self.x0_lambdas, strict=True):
            x = layer(block, None, r, c, x, x0, ids, places)
        return x


class GPT(nn.Module):
    """The whole model; `run_stage` and `stage_logits` are what training, evaluation and inference are made of.

    Build on any device (also "meta"), then `to_empty` and `init_weights` or load a state dict. `compute_dtype` is
    the dtype of activations; the weights stay fp32. With specialists only the last of them is trainable.

    How it is run is set from outside and no part of the state dict: with `document_mask` no position of a packed row
    reads from another document than its own, `recompute` keeps of each block that is trained its input alone, and
    `compiled` is a compiled enter_block for batches of shape `compiled_for`, (B, T).
    """

    document_mask = False
    recompute = False
    compiled: Callable[..., Tensor] | None = None
    compiled_for: tuple[int, int] | None = None

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.layout, self.compute_dtype = config, layout_of(config), compute_dtype
        m, layout = config, self.layout
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(layout.padded_vocab, m.n_embd),
            "h": nn.ModuleList(Block(m, layout, window, i in layout.ve_layers)
                               for i, window in enumerate(layout.window_sizes)),
        })
        kv_dim = m.n_kv_head * layout.head_dim
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(layout.padded_vocab, kv_dim) for i in layout.ve_layers})
        self.lm_head = Linear(m.n_embd, layout.padded_vocab)
        if layout.stage_heads:
            self.lm_head_stages = nn.ModuleList(Linear(m.n_embd, layout.padded_vocab) for _ in layout.boundaries)
        self.resid_lambdas = nn.Parameter(torch.empty(m.n_layer))
        self.x0_lambdas = nn.Parameter(torch.empty(m.n_layer))
        self.smear_gate = Linear(SMEAR_CHANNELS, 1)
        self.smear_lambda = nn.Parameter(torch.empty(1))
        # No PoE loss reads the backout, so there it keeps its place in the state dict but is not trained (SPEC 1).
        self.backout_lambda = nn.Parameter(torch.empty(1), requires_grad=config.poe_mode == "none")
        if m.specialists:
            # The chat tokens' rows of wte, apart: the base's own stay what they were, and siblings share the rest.
            self.chat_rows = nn.Parameter(torch.empty(CHAT_TOKENS, m.n_embd))
            self.specialists = nn.ModuleList(Specialist(m, layout, shape.n_layer) for shape in m.specialists)
            self.requires_grad_(False)
            self.specialists[-1].requires_grad_(True)

    # -- initialisation ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Draw every parameter from a generator keyed by (seed, name) (values: SPEC 1).

        So the draw depends neither on the order of construction nor on what else is in the model: BP and PoE with
        one seed start from the same trunk.
        """
        L, d = self.config.n_layer, self.config.n_embd
        bound = math.sqrt(3 / d)                                    # uniform with the standard deviation 1/sqrt(d)
        for name, p in self.named_parameters():
            key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1
            generator = torch.Generator(p.device).manual_seed(key)
            if name == "transformer.wte.weight":
                p.normal_(0.0, 0.8, generator=generator)
            elif name == "lm_head.weight":
                p.normal_(0.0, 0.001, generator=generator)
            elif name.startswith("value_embeds.") or name.endswith(("c_q.weight", "c_k.weight", "c_v.weight")):
                p.uniform_(-bound, bound, generator=generator)
            elif name.endswith("c_fc.weight"):
                p.uniform_(-0.4 * bound, 0.4 * bound, generator=generator)
            elif name.endswith(("ve_gate.weight", "smear_gate.weight")):
                p.uniform_(0.0, 0.02, generator=generator)
            elif name.endswith(("c_proj.weight", "lm_head_stage.weight")) or name.startswith("lm_head_stages."):
                p.zero_()
            elif name.startswith("specialists."):
                p.fill_(1.0 if name.endswith("resid_lambdas") else 0.0)
            elif name == "smear_lambda":
                p.zero_()
            elif name == "chat_rows":
                continue                                            # when wte is there
            elif name in ("resid_lambdas", "x0_lambdas"):
                depth = torch.arange(L, dtype=torch.float32, device=p.device) / max(L - 1, 1)
                p.copy_(1.15 - 0.10 * depth if name == "resid_lambdas" else 0.20 - 0.15 * depth)
            else:
                assert name == "backout_lambda", name
                p.fill_(0.2)
        if self.config.specialists:
            self.chat_rows.copy_(self.base_chat_rows())

    def base_chat_rows(self) -> Tensor:
        """(8, D): the chat tokens' embeddings as the base has them."""
        wte = cast(nn.Embedding, self.transformer["wte"]).weight
        return wte[self.config.vocab_size - CHAT_TOKENS:self.config.vocab_size]

    # -- the pieces -------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> x0 (B, T, D): embedding, norm, smear (each position adds a gated copy of the one before)."""
        x = self.transformer["wte"](ids)
        if self.config.specialists:
            first = self.config.vocab_size - CHAT_TOKENS
            x = torch.where((ids >= first).unsqueeze(-1), self.chat_rows[(ids - first).clamp(min=0)], x)
        x = norm(x.to(self.compute_dtype))
        # lambda * gate(x_t) * x_{t-1}, with the *pre-smear* x_{t-1}; nothing comes before the first position
        now, before = x[:, 1:], x[:, :-1]
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(now[..., :SMEAR_CHANNELS]))
        if self.document_mask:
            gate = gate.masked_fill((ids[:, 1:] == self.bos).unsqueeze(-1), 0.0)
        return torch.cat([x[:, :1], now + gate * before], dim=1)

    @property
    def bos(self) -> int:
        return self.config.vocab_size - CHAT_TOKENS - 1

    def positions(self, ids: Tensor) -> Positions:
        """What blocks know of the places of `ids` (B, T). Rotary angles count from the row's beginning: attention reads
        differences alone."""
        tables = rotary_tables(torch.arange(ids.size(1), device=ids.device), self.layout.head_dim, self.compute_dtype)
        if not self.document_mask:
            return Positions(*tables)
        windows = (*self.layout.window_sizes, self.config.sequence_len)
        return Positions(*tables, find_documents(ids, self.bos, windows, self.compute_dtype))

    def layer(self, ids: Tensor) -> Layer:
        """How a block is run on a batch of `ids` (B, T), now."""
        compiled = self.compiled if ids.shape == self.compiled_for else None
        layer = partial(run_layer, compiled or enter_block)
        if self.recompute and torch.is_grad_enabled():
            return partial(checkpoint, layer, use_reentrant=False, preserve_rng_state=False)      # nothing is random
        return layer

    def run_stage(self, k: int, x: Tensor, x0: Tensor, ids: Tensor, places: Positions) -> Tensor:
        """The blocks of stage k: residual stream x (B, T, D) at its entry -> at its boundary."""
        layer = self.layer(ids)
        if k >= self.layout.n_stages:
            return cast(Tensor, self.specialists[k - self.layout.n_stages](x, x0, ids, places, layer))
        middle, blocks = None, cast(nn.ModuleList, self.transformer["h"])
        for i in self.layout.stage_layers(k):
            table = self.value_embeds[str(i)] if i in self.layout.ve_layers else None
            x = layer(blocks[i], table, self.resid_lambdas[i], self.x0_lambdas[i], x, x0, ids, places)
            if i == self.config.n_layer // 2:
                middle = x
        if self.config.poe_mode == "none":                           # backout: BP's only stage holds layer L//2
            assert middle is not None
            x = x - self.backout_lambda.to(x.dtype) * middle
        return x

    def head_weight(self, k: int) -> Tensor:
        """(V, D) fp32 of stage k: shared head plus stage head, since W_sh x + W_k x = (W_sh + W_k) x; cropped to V.

        Of a specialist: the head of the base's last stage plus those of its chain.
        """
        weight, last = self.lm_head.weight, self.layout.n_stages - 1
        if self.layout.stage_heads:
            weight = weight + cast(Linear, self.lm_head_stages[min(k, last)]).weight
        for i in self.layout.chains[k - last - 1] if k > last else ():
            weight = weight + cast(Specialist, self.specialists[i]).lm_head_stage.weight
        # a slice of all rows would send the gradient through another (V, D)
        return weight if len(weight) == self.config.vocab_size else weight[: self.config.vocab_size]

    def stage_logits(self, x: Tensor, k: int) -> Tensor:
        """Boundary state (..., D) of stage k -> logits (..., V), fp32, softcapped."""
        return capped_logits(norm(x), self.head_weight(k))

    # -- the whole ---------------------------------------------------------------------------------------------

    def boundary_states(self, ids: Tensor) -> list[Tensor]:
        """ids (B, T) -> the un-normed residual stream (B, T, D) at every boundary, then behind every specialist.

        Without gradients cut: training does that in stages.py.
        """
        x0, places = self.embed(ids), self.positions(ids)
        x, states = x0, []
        for k in range(self.layout.n_stages):
            x = self.run_stage(k, x, x0, ids, places)
            states.append(x)
        for i in range(len(self.config.specialists)):
            k = self.layout.n_stages + i
            states.append(self.run_stage(k, states[self.layout.input_of(k)], x0, ids, places))
        return states

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, T) -> (B, T, V) fp32: capped logits of a BP model or of the last specialist, pooled
        log-probabilities of a PoE model."""
        states = self.boundary_states(ids)
        if self.config.poe_mode == "none" or self.config.specialists:
            return self.stage_logits(states[-1], len(states) - 1)
        return self.base_scores(states)

    def base_scores(self, states: list[Tensor]) -> Tensor:
        """Boundary states -> (..., V) fp32 of the base alone, whatever stands on it."""
        if self.config.poe_mode == "none":
            return self.stage_logits(states[0], 0)
        return aggregate([self.stage_logits(x, k).log_softmax(-1)
                          for k, x in enumerate(states[:self.layout.n_stages])])
