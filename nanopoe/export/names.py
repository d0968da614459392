"""Our tensor names <-> those of the Hugging Face repo, one to one, and the shapes there (SPEC 1, 10).

Block i is layer i + 1 there: layer 0 is the parameter-free lookup of the previous token. The rows that pad the
vocabulary are cropped, so a head is exactly (vocab_size, width).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from nanopoe.config.counts import parameter_shapes
from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import CheckpointError

ATTENTION = {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj"}
MLP = {"c_fc": "up_proj", "c_proj": "down_proj"}
VECTORS = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")


def hub_names(m: ModelConfig) -> dict[str, str]:
    """Our name -> repo name of every tensor of a model."""
    layout = layout_of(m)
    names = {"transformer.wte.weight": "model.embed_tokens.weight"}
    for i in range(m.n_layer):
        ours, theirs = f"transformer.h.{i}", f"model.layers.{i + 1}"
        names |= {f"{ours}.attn.{a}.weight": f"{theirs}.self_attn.{b}.weight" for a, b in ATTENTION.items()}
        if i in layout.ve_layers:
            names[f"{ours}.attn.ve_gate.weight"] = f"{theirs}.self_attn.ve_gate.weight"
            names[f"value_embeds.{i}.weight"] = f"{theirs}.self_attn.value_embed.weight"
        names |= {f"{ours}.mlp.{a}.weight": f"{theirs}.mlp.{b}.weight" for a, b in MLP.items()}
    names["smear_gate.weight"] = "model.smear_gate.weight"
    names |= {name: f"model.{name}" for name in VECTORS}
    names["lm_head.weight"] = "lm_head.weight"
    names |= {f"lm_head_stages.{k}.weight": f"lm_head_stages.{k}.weight" for k in range(layout.stage_heads)}
    return names


def has_vocab_rows(name: str) -> bool:
    """True for the tensors whose rows are tokens."""
    return name.startswith(("transformer.wte.", "value_embeds.", "lm_head"))


def check_tensors(m: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """CheckpointError unless `tensors` are exactly those of the model, in shape, and finite."""
    expected = parameter_shapes(m)
    missing, foreign = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or foreign:
        raise CheckpointError(f"{len(missing)} tensors missing {missing[:3]}, {len(foreign)} unknown {foreign[:3]}",
                              "export", "give the model section of the experiment this checkpoint was trained with")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise CheckpointError(f"shape {tuple(tensors[name].shape)}, the model has {shape}", name,
                                  "give the model section of the experiment this checkpoint was trained with")
        if not torch.isfinite(tensors[name]).all():
            raise CheckpointError("holds values that are not finite", name, "export an earlier step")


def hub_shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Repo name -> shape in the repo (vocabulary cropped), in the order `to_hub` yields."""
    ours = parameter_shapes(m)
    return {theirs: (m.vocab_size, *ours[name][1:]) if has_vocab_rows(name) else ours[name]
            for name, theirs in hub_names(m).items()}


def to_hub(m: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """(repo name, cropped contiguous tensor in `dtype`) of each tensor; one at a time, to keep memory low."""
    for ours, theirs in hub_names(m).items():
        tensor = tensors[ours].detach()
        if has_vocab_rows(ours):
            tensor = tensor[: m.vocab_size]
        yield theirs, tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()


def from_hub(m: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse: repo names -> ours. The rows that pad the vocabulary, which no token reads, come back as zeros."""
    full, shapes = {}, parameter_shapes(m)
    for ours, theirs in hub_names(m).items():
        full[ours] = torch.zeros(shapes[ours], dtype=tensors[theirs].dtype)
        full[ours][: len(tensors[theirs])] = tensors[theirs]
    return full
