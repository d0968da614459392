"""Methods that a model of stages has beside `generate`: adaptive depth, self-speculation and routing.

Shape letters: R rows of a batch, P tokens of a prompt, T new tokens, V vocabulary, K stages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .decoding_nanopoe import Decoder, Texts, sampling_of
from .modes_nanopoe import MOST_DRAFTS, NO_STAGES, Routed, Wand, adaptive, speculate

BOUNDS = {                               # name of `bounds` -> key of config.json
    "lead": "poe_wand_lead_max_bounds", "lead_p99": "poe_wand_lead_p99_bounds",
    "max": "poe_wand_max_bounds_per_stage_head", "p99": "poe_wand_p99_bounds_per_stage_head",
}


@dataclass
class NanoPoEGenerateOutput(ModelOutput):
    """What the modes return with `return_dict_in_generate=True`.

    `sequences` (R, P + T) are prompts and new tokens, as of `generate`. `stages` (R, T) is the stage that decided each
    new token, -1 behind the end of a row. `statistics`: of adaptive depth and routing {tokens, exits: tokens decided at
    each stage, mean_depth: stages a token needed}, of speculation {rounds, accepted, drafted, acceptance,
    mean_accepted}; over all rows.
    """

    sequences: Tensor | None = None
    stages: Tensor | None = None
    statistics: dict[str, Any] | None = None


class NanoPoEModes:
    """Methods of NanoPoEForCausalLM.

    Beside their own arguments all take `input_ids` (R, P), `attention_mask` (padding on the left, as of the tokenizer),
    and by name `max_new_tokens`, `eos_token_id` (one, a list, or [] for none), `pad_token_id`, `streamer` and
    `return_dict_in_generate` (a NanoPoEGenerateOutput), with the meaning and the defaults that they have in `generate`.
    They return what `generate` returns. ValueError for whatever does not fit.
    """

    config: Any
    generation_config: Any
    model: Any
    training: bool

    def generate_wand(self, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                      bounds: str | Sequence[float] = "lead", **kwargs: Any) -> Any:
        """Adaptive depth, greedy: a token leaves as soon as the later stages cannot change it.

        `bounds` of the calibration in config.json: "lead" is the most that later stages took of a leading token's
        margin, "max" the range of all that they changed, on all tokens of the calibration; "lead_p99" and "p99" on 99 %
        of them: sooner, and less sure. Or K - 1 numbers, that bound the range of what each transition changes.
        """
        self._check_stages()
        rule = Wand(self._bounds(bounds), lead=isinstance(bounds, str) and bounds.startswith("lead"))
        return self._write(lambda d, t: adaptive(d, t, rule), input_ids, attention_mask, **kwargs)

    def generate_routed(self, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                        threshold: float | None = None, **kwargs: Any) -> Any:
        """Routing, greedy: stage 0 answers where its largest probability reaches `threshold`, else all stages do.

        None is the calibrated threshold of config.json. Tokens may differ from those of the full model.
        """
        self._check_stages()
        rule = Routed(self._threshold(threshold))
        return self._write(lambda d, t: adaptive(d, t, rule), input_ids, attention_mask, **kwargs)

    def generate_speculative(self, input_ids: Tensor, attention_mask: Tensor | None = None, *,
                             drafts: int | str = 4, prefix: int = 1, do_sample: bool = False,
                             temperature: float | None = None, top_k: int | None = None, top_p: float | None = None,
                             seed: int | None = None, **kwargs: Any) -> Any:
        """Self-speculation: the first `prefix` stages draft `drafts` tokens ("auto": while it pays), the full model
        verifies them.

        Greedy, the text is that of `generate`. With `do_sample` it has the distribution of the full model at
        `temperature` (1.0), cut by `top_k` and `top_p` (not cut). A row's random numbers depend on (seed, row) alone;
        without a `seed` one is drawn from torch's own generator.
        """
        self._check_stages()
        K = len(self.config.stage_boundaries)
        if not 1 <= prefix < K:
            can = f"of {K} stages, the first 1 to {K - 1} can draft" if K > 1 else "a model of one stage cannot draft"
            raise ValueError(f"`prefix` {prefix}: {can}")
        if drafts != "auto" and not (isinstance(drafts, int) and 1 <= drafts <= MOST_DRAFTS):
            raise ValueError(f"`drafts` must be 1 to {MOST_DRAFTS} or \"auto\", got {drafts!r}")
        sampling = sampling_of(do_sample, temperature, top_k, top_p, seed)
        most = None if drafts == "auto" else int(drafts)
        return self._write(lambda d, t: speculate(d, t, most, prefix, sampling), input_ids, attention_mask, **kwargs)

    @torch.no_grad()
    def _write(self, mode: Callable[[Decoder, Texts], dict[str, Any]], input_ids: Tensor,
               attention_mask: Tensor | None = None, *, max_new_tokens: int | None = None,
               eos_token_id: int | Sequence[int] | None = None, pad_token_id: int | None = None, streamer: Any = None,
               return_dict_in_generate: bool = False, do_sample: bool = False, **unknown: Any) -> Any:
        if unknown:
            raise ValueError(f"{sorted(unknown)}: this mode takes no such argument")
        if do_sample:
            raise ValueError("this mode is greedy, an early exit keeps the most probable token and not the "
                             "distribution: leave out `do_sample` or use generate_speculative")
        self._check_running(streamer, input_ids)
        most = max_new_tokens if max_new_tokens is not None else self.generation_config.max_new_tokens or 20
        if most < 1:
            raise ValueError(f"`max_new_tokens` must be 1 or more, got {most}")
        eos = self.generation_config.eos_token_id if eos_token_id is None else eos_token_id
        stop = [] if eos is None else torch.as_tensor(eos).flatten().tolist()
        texts = Texts(self._prompts(input_ids, attention_mask), most, set(map(int, stop)), streamer)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        statistics = mode(Decoder(self, len(input_ids)), texts)
        if streamer is not None:
            streamer.end()
        pads = [pad_token_id, self.generation_config.pad_token_id, *stop, 0]
        new = _padded(texts.answers, next(int(p) for p in pads if p is not None), input_ids)
        sequences = torch.cat([input_ids, new], dim=1)
        if not return_dict_in_generate:
            return sequences
        return NanoPoEGenerateOutput(sequences=sequences, stages=_padded(texts.stages, -1, input_ids),
                                     statistics=statistics)

    def _prompts(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
        """The tokens of each row without its padding."""
        V, context = self.config.vocab_size, self.config.max_position_embeddings
        if input_ids.ndim != 2:
            raise ValueError(f"`input_ids` must have the shape (rows, tokens), got {tuple(input_ids.shape)}")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(f"`attention_mask` has the shape {tuple(attention_mask.shape)}, `input_ids` "
                             f"{tuple(input_ids.shape)}")
        kept = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [ids[on].tolist() for ids, on in zip(input_ids, kept.bool(), strict=True)]
        if not prompts or not all(prompts):
            raise ValueError("an empty prompt: begin it with the <|bos|> token")
        if not all(0 <= token < V for prompt in prompts for token in prompt):
            raise ValueError(f"a token id outside 0 to {V - 1}: use the tokenizer of this model")
        if (longest := max(map(len, prompts))) > context:
            raise ValueError(f"a prompt of {longest} tokens, the model was trained to see {context}")
        return prompts

    # -- what does not fit --------------------------------------------------------------------------------------------

    def _check_stages(self) -> None:
        if self.config.poe_mode == "none":
            raise ValueError(NO_STAGES)

    def _check_running(self, streamer: Any, input_ids: Tensor) -> None:
        if self.config._attn_implementation not in ("sdpa", "eager"):
            raise ValueError(f"this mode has no {self.config._attn_implementation}: load the model with "
                             "attn_implementation=\"sdpa\"")
        if self.training and self.model.gradient_checkpointing:
            raise ValueError("gradient checkpointing drops the cache: call model.eval() first")
        if streamer is not None and len(input_ids) > 1:
            raise ValueError("`streamer` takes one row; rows advance at different paces here")

    def _bounds(self, bounds: str | Sequence[float]) -> list[float]:
        K = len(self.config.stage_boundaries)
        if isinstance(bounds, str):
            if bounds not in BOUNDS:
                raise ValueError(f"`bounds` must be one of {', '.join(BOUNDS)} or {K - 1} numbers, got {bounds!r}")
            found = getattr(self.config, BOUNDS[bounds])
            if found is None:
                raise ValueError(f"config.json has no {bounds} bounds: run nanopoe's scripts.calibrate on this "
                                 f"checkpoint and export it again, or give {K - 1} numbers as `bounds`")
            bounds = found
        values = [float(b) for b in bounds]
        if len(values) != K - 1:
            raise ValueError(f"{len(values)} bounds for {K} stages, which need {K - 1}")
        if not all(math.isfinite(b) and b >= 0 for b in values):
            raise ValueError(f"bounds must be finite and not negative, got {values}")
        return values

    def _threshold(self, threshold: float | None) -> float:
        if threshold is None:
            threshold = self.config.poe_routing_threshold
            if threshold is None and self.config.poe_routing_mode is not None:
                return math.inf          # calibrated, and no confidence is worth it: the full model answers
            if threshold is None:
                raise ValueError("config.json has no routing threshold: run nanopoe's scripts.calibrate on this "
                                 "checkpoint and export it again, or give a `threshold`")
        if not threshold >= 0:
            raise ValueError(f"`threshold` must be 0 or more, got {threshold}")
        return float(threshold)


def _padded(rows: list[list[int]], value: int, like: Tensor) -> Tensor:
    """(R, longest row), filled up with `value`, where `like` lives."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows]).to(like)


__all__ = ["NanoPoEGenerateOutput", "NanoPoEModes"]
