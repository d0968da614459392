"""A nanopoe language model for transformers: `NanoPoEForCausalLM` and its trunk `NanoPoEModel`.

    ids -> embed -> rmsnorm -> smear -> blocks, in stages -> (one-loss models: backout) -> rmsnorm -> head(s) -> cap

A Product-of-Experts model predicts the next token at the end of every stage; its `logits` are the log-probabilities
of the normalised log-opinion pool of these experts. `stage=k` asks for one expert, `prefix=n` for the pool of the
first n, `weights={k: w, ..}` for that of chosen ones, p ~ prod_k p_k^w with the weights divided by their sum. All work
in `forward` and in `generate` and skip the blocks that are not needed. `generate_wand`, `generate_speculative` and
`generate_routed` (generation_nanopoe.py) write with as many stages as a token needs.

Specialists are more blocks behind the frozen base, or behind each other, each with a head that is added to those below.
A model with specialists predicts with the last one; `specialist=` (a name or its number) asks for another,
`head_mode="base"` for the base, whose logits no specialist changes, `head_mode="dual"` for the pool of both, equally
weighted. `stage`, `prefix`, `weights` and the modes mean the stages of the base.

Layer 0 has no parameters: it looks up the previous token by attention, so that smear's memory of one token lives in
whatever key/value cache is in use. Shape letters: B batch, T time, D width, H heads, V vocabulary, K stages.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .cascade_nanopoe import assemble, hub_options  # transformers 4 copies what this very file imports, no more
from .configuration_nanopoe import NanoPoEConfig
from .decoding_nanopoe import norm
from .generation_nanopoe import NanoPoEModes
from .layers_nanopoe import LOOKUP_SHARPNESS, NanoPoEDecoderLayer, NanoPoELookupLayer, NanoPoEPreviousToken
from .masks_nanopoe import MASK_ARGUMENTS, ONE_WINDOW, attention_masks, mask_names
from .modes_nanopoe import NO_STAGES

HEAD_MODES = ("base", "specialist", "dual")


@dataclass
class NanoPoEModelOutput(BaseModelOutputWithPast):
    """`boundary_states`: the un-normed residual stream (B, T, D) at each stage boundary of the base that was run,
    `specialist_states`: behind each specialist of the chain."""

    boundary_states: tuple[Tensor, ...] | None = None
    specialist_states: tuple[Tensor, ...] | None = None


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

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None,
                        state_dict: Any = None, **kwargs: Any) -> Any:
        """As in transformers. Of a stage repo, which holds a specialist alone, the models below are read first; the
        result has all tensors and no parent, so `save_pretrained` writes a repo that stands alone.

        OSError for a parent that is not there, ValueError for one that is not the model the specialist was trained on.
        """
        name, hub = pretrained_model_name_or_path, hub_options(kwargs)
        if name is None or state_dict is not None:
            return super().from_pretrained(name, *model_args, config=config, state_dict=state_dict, **kwargs)
        own = config
        if not isinstance(own, PretrainedConfig):
            own = cls.config_class.from_pretrained(config or name, **hub)
        if not own.parent:
            return super().from_pretrained(name, *model_args, config=config, **kwargs)
        own = copy.deepcopy(own)
        tensors = assemble(str(name), own.to_dict(), hub)
        own.parent = None
        model = super().from_pretrained(None, *model_args, config=own, state_dict=tensors, **kwargs)
        whole = model[0] if isinstance(model, tuple) else model          # with output_loading_info
        whole.name_or_path = own.name_or_path = str(name)                # both lost without a name
        if whole.can_generate():
            whole.generation_config = GenerationConfig.from_pretrained(name, **hub)
        return model

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
        """One attention mask for each of `mask_names`; a dict was prepared by `generate`."""
        if isinstance(attention_mask, dict):
            if not attention_mask.keys() >= set(mask_names(self.config)):
                raise ValueError(ONE_WINDOW)
            return attention_mask
        return attention_masks(
            self.config, attention_mask=attention_mask, past_key_values=past_key_values, position_ids=position_ids,
            inputs_embeds=x, input_embeds=x, cache_position=cache_position)

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
        chain: Sequence[int] | None = None,
        output_boundaries: bool = False,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> NanoPoEModelOutput:
        """ids (B, T) -> states (B, T, D). `prefix`: run only the first so many stages. `chain`: the specialists to run
        behind them, each on the one before; without either, those up to the last one."""
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
        if cache_position is None and "cache_position" in MASK_ARGUMENTS:
            cache_position = _arange(input_ids, past_key_values)
        boundaries, chain = self._boundaries(prefix), self._chain(prefix, chain)
        _check_depth(past_key_values, (config.blocks_of(chain[-1])[-1] if chain else boundaries[-1]) + 1)
        if position_ids is None:
            position_ids = _positions(input_ids, attention_mask, past_key_values)

        x = norm(self.embed_tokens(input_ids))                   # (B, T, D)
        hidden, attentions = [x], []
        masks, names = self.masks(x, attention_mask, past_key_values, position_ids, cache_position), mask_names(config)
        shared = (input_ids, position_ids, self.rotary(position_ids, x.dtype))
        rest = {"past_key_values": past_key_values, "cache_position": cache_position, **kwargs}

        previous, weights = self.layers[0](x, *shared, attention_mask=masks[names[0]], **rest)
        attentions.append(weights)
        x = x0 = self.smear(x, previous.to(input_ids.device), position_ids)

        def block(i: int, x: Tensor) -> Tensor:
            hidden.append(x)
            r, c = self.resid_lambdas[i].to(x.dtype), self.x0_lambdas[i].to(x.dtype)
            x, weights = self.layers[i + 1](x, x0, r, c, *shared, attention_mask=masks[names[i + 1]], **rest)
            attentions.append(weights)
            return x

        states, middle = [], None
        for i in range(boundaries[-1] + 1):
            x = block(i, x)
            if i == config.backout_block:
                middle = x
            if i == boundaries[-1] and middle is not None:
                x = x - self.backout_lambda.to(x.device, x.dtype) * middle.to(x.device)
            if i in boundaries:
                states.append(x)
        behind = []
        for specialist in chain:
            for i in config.blocks_of(specialist):
                x = block(i, x)
            behind.append(x)
        last = norm(x)
        keep_hidden = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        keep_weights = config.output_attentions if output_attentions is None else output_attentions
        return NanoPoEModelOutput(
            last_hidden_state=last,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden, last) if keep_hidden else None,
            attentions=tuple(attentions) if keep_weights else None,
            boundary_states=tuple(states) if output_boundaries else None,
            specialist_states=tuple(behind) if output_boundaries else None,
        )

    def _boundaries(self, prefix: int | None) -> list[int]:
        """Boundaries to run to. Early-exit drafting lowers num_hidden_layers; a cut inside a stage ends it there."""
        blocks = max(self.config.num_hidden_layers - 1, 1)
        boundaries = self.config.stage_boundaries[:prefix]
        return [b for b in boundaries if b < blocks] or [min(blocks - 1, boundaries[0])]

    def _chain(self, prefix: int | None, chain: Sequence[int] | None) -> list[int]:
        """Specialists to run, without those that early-exit drafting cuts off."""
        config = self.config
        if chain is None:
            chain = config.chain_of(len(config.specialists) - 1) if config.specialists and prefix is None else ()
        return [i for i in chain if config.blocks_of(i)[-1] < config.num_hidden_layers - 1]


class NanoPoEForCausalLM(NanoPoEPreTrainedModel, NanoPoEModes, GenerationMixin):
    """Next-token prediction by the whole model, one stage (`stage=k`), the first n stages (`prefix=n`) or chosen ones
    (`weights={k: w, ..}`), a specialist, or the base without them (`head_mode`, `specialist`)."""

    create_masks_for_generate = staticmethod(attention_masks)    # `generate` asks for it with static caches

    def __init__(self, config: NanoPoEConfig):
        super().__init__(config)
        self.model = NanoPoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.stage_heads:
            self.lm_head_stages = nn.ModuleList(
                nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in range(config.stage_heads))
        if config.specialists:
            self.lm_head_specialists = nn.ModuleList(
                nn.Linear(config.hidden_size, config.vocab_size, bias=False) for _ in config.specialists)
        self.post_init()

    def stage_logits(self, state: Tensor, k: int, chain: Sequence[int] = ()) -> Tensor:
        """Boundary state (..., D) of stage k -> its logits (..., V), fp32, capped after the sum of the heads: the
        shared one, that of the stage, and, of a state behind specialists, theirs."""
        x = norm(state)
        z = self.lm_head(x).float()
        if self.config.stage_heads:
            z = z + self.lm_head_stages[k](x).float()
        for i in chain:
            z = z + self.lm_head_specialists[i](x).float()
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
        head_mode: str | None = None,
        specialist: int | str | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """ids (B, T) -> logits (B, T, V) fp32: log-probabilities of a pool or stage, capped logits of a specialist or
        without stages.

        A cache belongs to the view it was filled with: a view that runs deeper refuses it.
        """
        experts, chain = self._view(stage, prefix, weights, head_mode, specialist)
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            prefix=None if chain else max(experts) + 1, chain=chain, output_boundaries=True, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep    # 0 keeps all
        states = [x[:, keep] for x in outputs.boundary_states]
        logits = None
        if experts or not outputs.specialist_states:
            logits = self._base_logits(states, experts)
        if outputs.specialist_states:        # none where early-exit drafting stops before them
            n = len(outputs.specialist_states)
            special = self.stage_logits(outputs.specialist_states[-1][:, keep], len(states) - 1, chain[:n])
            if logits is None:
                logits = special
            else:                            # dual: the geometric mean of both
                logits = ((logits.log_softmax(-1) + special.log_softmax(-1).to(logits.device)) / 2).log_softmax(-1)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions)

    def _base_logits(self, states: list[Tensor], experts: dict[int, float]) -> Tensor:
        """Boundary states (B, T, D) of the base -> the pool of the chosen stages, or the logits of its one head."""
        if self.config.poe_mode == "none":
            return self.stage_logits(states[0], 0)
        # fewer states than asked for happens in early-exit drafting only
        chosen = {k: w for k, w in experts.items() if k < len(states)} or {len(states) - 1: 1.0}
        logits = torch.zeros((), device=states[0].device)
        for k, w in chosen.items():
            logits = logits + w * self.stage_logits(states[k], k).log_softmax(-1).to(logits.device)
        return (logits / sum(chosen.values())).log_softmax(-1) if len(chosen) > 1 else logits

    def _view(self, stage: int | None, prefix: int | None, weights: dict[int, float] | None, head_mode: str | None,
              specialist: int | str | None) -> tuple[dict[int, float], tuple[int, ...]]:
        """The weights of the base's stages that are pooled, and the chain of specialists; either may be empty."""
        config, asked = self.config, stage is not None or prefix is not None or weights is not None
        if head_mode is None:
            special = specialist is not None or (bool(config.specialists) and not asked)
            head_mode = "specialist" if special else "base"
        if head_mode not in HEAD_MODES:
            raise ValueError(f"`head_mode` must be one of {', '.join(HEAD_MODES)}, got {head_mode!r}")
        if head_mode == "base":
            if specialist is not None:
                raise ValueError("`specialist` and head_mode=\"base\" exclude each other: give one of them")
            return self._experts(stage, prefix, weights), ()
        if asked:
            raise ValueError("`stage`, `prefix` and `weights` are of the base: leave them out, or the specialist")
        chain = config.chain_of(self._specialist(specialist))
        return (self._experts(None, None, None) if head_mode == "dual" else {}), chain

    def _specialist(self, wanted: int | str | None) -> int:
        """The number of a specialist; the last one by default."""
        names = [one["name"] for one in self.config.specialists]
        if not names:
            raise ValueError("this model has no specialists; only head_mode=\"base\" is valid")
        if wanted is None:
            return len(names) - 1
        if isinstance(wanted, str) and names.count(wanted) == 1:
            return names.index(wanted)
        if isinstance(wanted, int) and 0 <= wanted < len(names):
            return wanted
        raise ValueError(f"specialist {wanted!r}: this model has {', '.join(names)}, by name or 0 to {len(names) - 1}")

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
        raise ValueError(f"this cache holds {held} tokens in its first layer and {deepest} in layer {layer}: another "
                         "view has filled it, a smaller `stage` or `prefix` or another specialist; start with a new "
                         "cache")


__all__ = ["LOOKUP_SHARPNESS", "NanoPoEConfig", "NanoPoEForCausalLM", "NanoPoEModel", "NanoPoEPreTrainedModel",
           "NanoPoEPreviousToken"]
