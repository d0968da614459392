"""A nanopoe language model for transformers: `NanoPoEForCausalLM` and its trunk `NanoPoEModel`.

    ids -> embed -> rmsnorm -> smear -> blocks, in stages -> (one-loss models: backout) -> rmsnorm -> head(s) -> cap

A Product-of-Experts model predicts the next token at the end of every stage; its `logits` are the log-probabilities
of the normalised log-opinion pool of these experts. `stage=k` asks for one expert, `prefix=n` for the pool of the
first n, `weights={k: w, ..}` for that of chosen ones, p ~ prod_k p_k^w with the weights divided by their sum. All work
in `forward` and in `generate` and skip the blocks that are not needed. `generate_wand`, `generate_speculative` and
`generate_routed` (generation_nanopoe.py) write with as many stages as a token needs.

Layer 0 has no parameters: it looks up the previous token by attention, so that smear's memory of one token lives in
whatever key/value cache is in use. Shape letters: B batch, T time, D width, H heads, V vocabulary, K stages.
"""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple

from .configuration_nanopoe import NanoPoEConfig
from .decoding_nanopoe import norm  # transformers 4 copies what this very file imports, no more
from .generation_nanopoe import NanoPoEModes
from .modes_nanopoe import NO_STAGES

LOOKUP_SHARPNESS = 160.0                 # peak score of the previous-token lookup is half of this
_MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)


@dataclass
class NanoPoEModelOutput(BaseModelOutputWithPast):
    """`boundary_states`: the un-normed residual stream (B, T, D) at each stage boundary that was run."""

    boundary_states: tuple[Tensor, ...] | None = None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate (B, T, H, d) by minus the angle, halves of d as pairs; cos and sin are (B or 1, T, 1, d/2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1)


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """(B, Hkv, T, d) -> (B, Hkv * times, T, d)."""
    return x if times == 1 else x.repeat_interleave(times, dim=1)


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float, dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out: (B, H, Tq, d) and (B, Hkv, Tk, d) -> (B, Tq, H, d) and the weights."""
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_heads(key, groups), repeat_heads(value, groups)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask[..., : key.shape[-2]]
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class NanoPoEAttention(nn.Module):
    """Rotary positions, then QK norm, then `qk_scale` on both sides (inside `scaling`); gated value embeddings."""

    def __init__(self, config: NanoPoEConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.is_causal = True
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.qk_scale**2 / math.sqrt(config.head_dim)
        sliding = config.layer_types[layer_idx] == "sliding_attention"
        self.sliding_window = config.sliding_window if sliding else None
        self.build()

    def build(self) -> None:
        config, kv_width = self.config, self.config.num_key_value_heads * self.head_dim
        width = config.num_attention_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.has_value_embedding = self.layer_idx - 1 in config.value_embedding_blocks
        if self.has_value_embedding:
            self.value_embed = nn.Embedding(config.vocab_size, kv_width)
            self.ve_gate = nn.Linear(config.value_gate_channels, config.num_key_value_heads, bias=False)

    def project(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed x (B, T, D) -> q (B, H, T, d), k and v (B, Hkv, T, d)."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (p(x).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        if self.has_value_embedding:
            gate = 3 * torch.sigmoid(self.ve_gate(x[..., : self.config.value_gate_channels]))
            v = v + gate.unsqueeze(-1) * self.value_embed(input_ids).view_as(v).to(v.dtype)
        q, k = norm(rotate(q, *rotary)), norm(rotate(k, *rotary))
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)

    def read(self, out: Tensor) -> Tensor:
        """Attention output (B, T, H, d) -> (B, T, D)."""
        return self.o_proj(out.reshape(*out.shape[:2], -1))

    def forward(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None, past_key_values: Cache | None = None,
        cache_position: Tensor | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = self.project(x, input_ids, position_ids, rotary)
        if past_key_values is not None:      # transformers 4 static caches write where cache_position says
            k, v = past_key_values.update(k, v, self.layer_idx, {"cache_position": cache_position})
        if hasattr(ALL_ATTENTION_FUNCTIONS, "get_interface"):
            attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward)
        elif self.config._attn_implementation == "eager":
            attention_interface = eager_attention_forward
        else:
            attention_interface = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, weights = attention_interface(
            self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, sliding_window=self.sliding_window,
            position_ids=position_ids, **kwargs)
        return self.read(out), weights


class NanoPoEPreviousToken(NanoPoEAttention):
    """Looks up the id of the token before each position. No parameters.

    Keys encode positions on the unit circle at head_dim/2 incommensurable frequencies and queries the position
    before, so scores depend on the lag alone and peak, sharply, at lag 1. Values are the id's bits. At a first
    position the answer is the token itself; the caller ignores it there.
    """

    def build(self) -> None:
        self.scaling = LOOKUP_SHARPNESS / self.head_dim
        self.bits = max(self.config.vocab_size - 1, 1).bit_length()
        if self.head_dim % 2 or self.head_dim < max(16, self.bits):
            raise ValueError(f"head_dim {self.head_dim} cannot encode a vocabulary of {self.config.vocab_size} tokens; "
                             f"it has to be even and at least {max(16, self.bits)}")

    def encode(self, position: Tensor, dtype: torch.dtype) -> Tensor:
        """Positions (B, T) -> (B, 1, T, d)."""
        m = torch.arange(self.head_dim // 2, device=position.device, dtype=torch.float32)
        frequency = math.pi * (m + 0.5 + 0.37 * torch.sin(12.9898 * (m + 1))) / (self.head_dim // 2)
        angle = position[..., None].float() * frequency
        return torch.cat((angle.cos(), angle.sin()), dim=-1).to(dtype).unsqueeze(1)

    def project(
        self, x: Tensor, input_ids: Tensor, position_ids: Tensor, rotary: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, (B, T) = self.config, input_ids.shape
        bit = torch.arange(self.bits, device=input_ids.device)
        v = F.pad((input_ids[..., None] >> bit) & 1, (0, self.head_dim - self.bits)).to(x.dtype).unsqueeze(1)
        q, k = self.encode(position_ids - 1, x.dtype), self.encode(position_ids, x.dtype)
        kv_heads = config.num_key_value_heads
        return (q.expand(B, config.num_attention_heads, T, -1), k.expand(B, kv_heads, T, -1),
                v.expand(B, kv_heads, T, -1))

    def read(self, out: Tensor) -> Tensor:
        """Attention output (B, T, H, d) -> ids (B, T); clamped, because engines warm up on unfilled outputs."""
        bit = torch.arange(self.bits, device=out.device)
        return ((out[..., 0, : self.bits] > 0.5).long() << bit).sum(-1).clamp_max(self.config.vocab_size - 1)


class NanoPoELookupLayer(nn.Module):
    """Layer 0."""

    def __init__(self, config: NanoPoEConfig):
        super().__init__()
        self.self_attn = NanoPoEPreviousToken(config, 0)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        return self.self_attn(x, *args, **kwargs)


class NanoPoEMLP(nn.Module):
    """relu squared (Primer, arXiv 2109.08668)."""

    def __init__(self, config: NanoPoEConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NanoPoEDecoderLayer(GradientCheckpointingLayer):
    """One trained block: mix in x0, attention, MLP."""

    def __init__(self, config: NanoPoEConfig, layer_idx: int):
        super().__init__()
        self.self_attn = NanoPoEAttention(config, layer_idx)
        self.mlp = NanoPoEMLP(config)

    def forward(self, x: Tensor, x0: Tensor, r: Tensor, c: Tensor, *args: Any, **kwargs: Any
                ) -> tuple[Tensor, Tensor | None]:
        x = r * x + c * x0
        out, weights = self.self_attn(norm(x), *args, **kwargs)
        x = x + out
        return x + self.mlp(norm(x)), weights


class NanoPoEPreTrainedModel(PreTrainedModel):
    config_class = NanoPoEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NanoPoEDecoderLayer"]                  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]            # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """For tensors that no file provides. The functions of torch.nn.init leave loaded tensors alone."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            torch.nn.init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, NanoPoEModel):
            torch.nn.init.constant_(module.resid_lambdas, 1.0)
            torch.nn.init.constant_(module.x0_lambdas, 0.0)
            torch.nn.init.constant_(module.smear_lambda, 0.0)
            torch.nn.init.constant_(module.backout_lambda, 0.0)


class NanoPoEModel(NanoPoEPreTrainedModel):
    """The trunk. `last_hidden_state` is the normed state at the last boundary that was run."""

    def __init__(self, config: NanoPoEConfig):
        super().__init__(config)
        blocks = config.num_hidden_layers - 1
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [NanoPoELookupLayer(config), *(NanoPoEDecoderLayer(config, i + 1) for i in range(blocks))])
        self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.resid_lambdas = nn.Parameter(torch.ones(blocks))
        self.x0_lambdas = nn.Parameter(torch.zeros(blocks))
        self.backout_lambda = nn.Parameter(torch.zeros(1))       # read only where config.backout_block is set
        self.gradient_checkpointing = False
        self.post_init()

    def rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B or 1, T, 1, d/2) of integer positions; angles in fp32."""
        d = self.config.head_dim
        channel = torch.arange(0, d, 2, dtype=torch.float32, device=position_ids.device)
        angle = position_ids[..., None].float() * (1.0 / self.config.rotary_base ** (channel / d))
        return angle.cos().to(dtype).unsqueeze(2), angle.sin().to(dtype).unsqueeze(2)

    def smear(self, x: Tensor, previous: Tensor, position_ids: Tensor) -> Tensor:
        """Add a gated copy of the previous token's embedding to x (B, T, D); nothing comes before position 0."""
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(self.smear_gate(x[..., : self.config.smear_channels]))
        return x + gate * norm(self.embed_tokens(previous)) * (position_ids > 0).to(x.dtype).unsqueeze(-1)

    def masks(self, x: Tensor, attention_mask: Any, past_key_values: Cache | None, position_ids: Tensor,
              cache_position: Tensor | None) -> dict[str, Any]:
        """One attention mask for each layer type; a dict was prepared by `generate`."""
        if isinstance(attention_mask, dict):
            return attention_mask
        arguments = {"config": self.config, "attention_mask": attention_mask, "past_key_values": past_key_values,
                     "position_ids": position_ids, "inputs_embeds": x, "input_embeds": x,
                     "cache_position": cache_position}
        arguments = {k: v for k, v in arguments.items() if k in _MASK_ARGUMENTS}     # they differ between versions
        make = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
        return {kind: make[kind](**arguments) for kind in sorted(set(self.config.layer_types))}

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        prefix: int | None = None,
        output_boundaries: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> NanoPoEModelOutput:
        """ids (B, T) -> states (B, T, D). `prefix`: run only the first so many stages."""
        config = self.config
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("NanoPoE needs input_ids: smear and value embeddings are functions of the token")
        if self.gradient_checkpointing and self.training:
            use_cache = False
        elif use_cache is None:
            use_cache = config.use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=config)
        cache_position = kwargs.pop("cache_position", None)      # of transformers 4; naming it makes 5 warn
        if cache_position is None and "cache_position" in _MASK_ARGUMENTS:
            cache_position = _arange(input_ids, past_key_values)
        boundaries = self._boundaries(prefix)
        _check_depth(past_key_values, boundaries[-1] + 1)
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, past_key_values)

        x = norm(self.embed_tokens(input_ids))                   # (B, T, D)
        hidden, attentions = [x], []
        masks = self.masks(x, attention_mask, past_key_values, position_ids, cache_position)
        shared = (input_ids, position_ids, self.rotary(position_ids, x.dtype))
        rest = {"past_key_values": past_key_values, "cache_position": cache_position, **kwargs}

        previous, weights = self.layers[0](x, *shared, attention_mask=masks[config.layer_types[0]], **rest)
        attentions.append(weights)
        x = x0 = self.smear(x, previous.to(input_ids.device), position_ids)

        states, middle = [], None
        for i in range(boundaries[-1] + 1):
            hidden.append(x)
            r, c = self.resid_lambdas[i].to(x.dtype), self.x0_lambdas[i].to(x.dtype)
            x, weights = self.layers[i + 1](
                x, x0, r, c, *shared, attention_mask=masks[config.layer_types[i + 1]], **rest)
            attentions.append(weights)
            if i == config.backout_block:
                middle = x
            if i in boundaries:
                states.append(x)
        if middle is not None:
            states[-1] = x - self.backout_lambda.to(x.device, x.dtype) * middle.to(x.device)
        last = norm(states[-1])
        keep_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = config.output_attentions if output_attentions is None else output_attentions
        return NanoPoEModelOutput(
            last_hidden_state=last,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden, last) if keep_hidden else None,
            attentions=tuple(attentions) if keep_weights else None,
            boundary_states=tuple(states) if output_boundaries else None,
        )

    def _boundaries(self, prefix: int | None) -> list[int]:
        """Boundaries to run to. Early-exit drafting lowers num_hidden_layers; a cut inside a stage ends it there."""
        blocks = max(self.config.num_hidden_layers - 1, 1)
        boundaries = self.config.stage_boundaries[:prefix]
        return [b for b in boundaries if b < blocks] or [min(blocks - 1, boundaries[0])]


class NanoPoEForCausalLM(NanoPoEPreTrainedModel, NanoPoEModes, GenerationMixin):
    """Next-token prediction by the whole model, one stage (`stage=k`), the first n stages (`prefix=n`) or chosen ones
    (`weights={k: w, ..}`)."""

    def __init__(self, config: NanoPoEConfig):
        super().__init__(config)
        self.model = NanoPoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.stage_heads:
            self.lm_head_stages = nn.ModuleList(
                nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(config.stage_heads))
        self.post_init()

    def stage_logits(self, state: Tensor, k: int) -> Tensor:
        """Boundary state (..., D) of stage k -> its logits (..., V), fp32, capped after shared and stage head."""
        x = norm(state)
        z = self.lm_head(x).float()
        if self.config.stage_heads:
            z = z + self.lm_head_stages[k](x).float()
        cap = self.config.final_logit_softcapping
        return cap * torch.tanh(z / cap)

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Without an attention mask every token counts, also a <|bos|> that is the pad token."""
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        if kwargs.get("attention_mask") is None and ids is not None:
            kwargs["attention_mask"] = torch.ones_like(ids)
        return super().generate(inputs, *args, **kwargs)         # type: ignore[misc]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        stage: int | None = None,
        prefix: int | None = None,
        weights: dict[int, float] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """ids (B, T) -> logits (B, T, V) fp32: log-probabilities of a pool or stage, capped logits without stages.

        A cache belongs to the view it was filled with: a view that runs deeper refuses it.
        """
        experts = self._experts(stage, prefix, weights)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            prefix=max(experts) + 1, output_boundaries=True, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep    # 0 keeps all
        states = [x[:, keep] for x in outputs.boundary_states]
        if self.config.poe_mode == "none":
            logits = self.stage_logits(states[0], 0)
        else:                                # fewer states than asked for happens in early-exit drafting only
            chosen = {k: w for k, w in experts.items() if k < len(states)} or {len(states) - 1: 1.0}
            logits = torch.zeros((), device=states[0].device)
            for k, w in chosen.items():
                logits = logits + w * self.stage_logits(states[k], k).log_softmax(-1).to(logits.device)
            if len(chosen) > 1:              # normalised geometric mean
                logits = (logits / sum(chosen.values())).log_softmax(-1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _experts(self, stage: int | None, prefix: int | None, weights: dict[int, float] | None) -> dict[int, float]:
        """The weight of each stage whose expert is pooled. ValueError when there is no such view."""
        K = len(self.config.stage_boundaries)
        given = [name for name, value in (("stage", stage), ("prefix", prefix), ("weights", weights))
                 if value is not None]
        if given and self.config.poe_mode == "none":
            raise ValueError(f"{NO_STAGES}: leave out `{given[0]}`")
        if len(given) > 1:
            raise ValueError(f"`{given[0]}` and `{given[1]}` exclude each other: give one of them")
        if stage is not None:
            weights = {stage: 1.0}
        elif prefix is not None:
            if not 1 <= prefix <= K:
                raise ValueError(f"prefix {prefix}: this model has prefixes of 1 to {K} stages")
            weights = dict.fromkeys(range(prefix), 1.0)
        elif weights is None:
            weights = dict.fromkeys(range(K), 1.0)
        for k, w in weights.items():
            if k not in range(K):
                raise ValueError(f"stage {k!r}: this model has the stages 0 to {K - 1}")
            if not 0 < w < math.inf:
                raise ValueError(f"weight {w} of stage {k}: weights must be above 0, leave out the others")
        if not weights:
            raise ValueError("`weights` names no stage")
        # a lone expert needs no weight
        return weights if len(weights) > 1 else dict.fromkeys(weights, 1.0)


def _positions(input_ids: Tensor, attention_mask: Any, past_key_values: Cache | None) -> Tensor:
    """Positions (B or 1, T): counted over the unmasked tokens, so padding on the left changes nothing."""
    T = input_ids.shape[1]
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -T:]
    return _arange(input_ids, past_key_values).unsqueeze(0)


def _arange(input_ids: Tensor, past_key_values: Cache | None) -> Tensor:
    """(T,) slots of the new tokens in the cache."""
    past = past_key_values.get_seq_length() if past_key_values is not None else 0
    return torch.arange(input_ids.shape[1], device=input_ids.device) + past


def _check_depth(cache: Cache | None, layer: int) -> None:
    """A cache filled by a shallower view lacks keys in the deeper layers; using it would give wrong text silently."""
    if cache is None or getattr(cache, "is_compileable", False):
        return                               # static caches count on the device: reading would break the graph
    held, deepest = cache.get_seq_length(), cache.get_seq_length(layer)
    if held != deepest:
        raise ValueError(f"this cache holds {held} tokens in its first layer and {deepest} in layer {layer}: it was "
                         "filled with a smaller `stage` or `prefix`; start with a new cache")


__all__ = ["NanoPoEConfig", "NanoPoEForCausalLM", "NanoPoEModel", "NanoPoEPreTrainedModel"]
