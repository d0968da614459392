"""Our tensor names <-> those of the Hugging Face repo, one to one, and the shapes there (SPEC 1, 10).

Block i is layer i + 1 there: layer 0 is the parameter-free lookup of the previous token. The rows that pad the
vocabulary are cropped, so a head is exactly (vocab_size, width). Specialists are flat there: their blocks are counted
on from the base's, their lambdas stand behind the base's, and the rows of the chat tokens are in the embeddings.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from nanopoe.config.counts import block_shapes, parameter_shapes
from nanopoe.config.layout import CHAT_TOKENS, layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import CheckpointError

ATTENTION = {"c_q": "q_proj", "c_k": "k_proj", "c_v": "v_proj", "c_proj": "o_proj"}
MLP = {"c_fc": "up_proj", "c_proj": "down_proj"}
HEADS = "lm_head_specialists"
LAMBDAS = ("resid_lambdas", "x0_lambdas")
VECTORS = ("resid_lambdas", "x0_lambdas", "smear_lambda", "backout_lambda")


def hub_names(m: ModelConfig) -> dict[str, str]:
    """Our name -> repo name of every tensor of a model, its specialists flat (`flattened`)."""
    layout = layout_of(m)
    names = {"transformer.wte.weight": "model.embed_tokens.weight"}
    for i in range(depth_of(m)):
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
    names |= {f"{HEADS}.{i}.weight": f"{HEADS}.{i}.weight" for i in range(len(m.specialists))}
    return names


def depth_of(m: ModelConfig) -> int:
    """Blocks of the base and all specialists."""
    return m.n_layer + sum(shape.n_layer for shape in m.specialists)


def first_block(m: ModelConfig, i: int) -> int:
    """Of specialist i."""
    return m.n_layer + sum(shape.n_layer for shape in m.specialists[:i])


def flattened(m: ModelConfig, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The same model with its specialists flat; as it is without any."""
    if not m.specialists:
        return tensors
    flat = {name: tensor for name, tensor in tensors.items() if not name.startswith(("specialists.", "chat_rows"))}
    for i, shape in enumerate(m.specialists):
        for j in range(shape.n_layer):
            block = f"transformer.h.{first_block(m, i) + j}"
            flat |= {name: tensors[f"specialists.{i}.h.{j}{name.removeprefix(block)}"]
                     for name in block_shapes(m, block, ve=False)}
        flat[f"{HEADS}.{i}.weight"] = tensors[f"specialists.{i}.lm_head_stage.weight"]
    for name in LAMBDAS:
        flat[name] = torch.cat([tensors[name],
                                *(tensors[f"specialists.{i}.{name}"] for i in range(len(m.specialists)))])
    wte = tensors["transformer.wte.weight"].clone()
    wte[m.vocab_size - CHAT_TOKENS:m.vocab_size] = tensors["chat_rows"].to(wte)
    return flat | {"transformer.wte.weight": wte}


def chain_alone(m: ModelConfig, tensors: Mapping[str, Tensor], names: Sequence[str]
                ) -> tuple[ModelConfig, dict[str, Tensor], list[str]]:
    """Config, tensors and specialists' names without those that the last specialist does not stand on."""
    chain = layout_of(m).chains[-1]
    shapes = tuple(m.specialists[i].model_copy(update={"parent": n - 1 if n else None}) for n, i in enumerate(chain))
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("specialists.")}
    for n, i in enumerate(chain):
        prefix = f"specialists.{i}."
        kept |= {f"specialists.{n}.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()
                 if name.startswith(prefix)}
    return m.model_copy(update={"specialists": shapes}), kept, [names[i] for i in chain]


def flat_shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our names of a flat model -> shapes."""
    shapes = {name: shape for name, shape in parameter_shapes(m).items()
              if not name.startswith(("specialists.", "chat_rows"))}
    for i in range(m.n_layer, depth_of(m)):
        shapes |= block_shapes(m, f"transformer.h.{i}", ve=False)
    shapes |= {f"{HEADS}.{i}.weight": shapes["lm_head.weight"] for i in range(len(m.specialists))}
    return shapes | {name: (depth_of(m),) for name in LAMBDAS}


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
    ours = flat_shapes(m)
    return {theirs: (m.vocab_size, *ours[name][1:]) if has_vocab_rows(name) else ours[name]
            for name, theirs in hub_names(m).items()}


def to_hub(m: ModelConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, ordered: bool = False
           ) -> Iterator[tuple[str, Tensor]]:
    """(repo name, cropped contiguous tensor in `dtype`) of each tensor; one at a time, to keep memory low. `ordered`:
    by their names there."""
    tensors, names = flattened(m, tensors), hub_names(m)
    for ours in sorted(names, key=names.__getitem__) if ordered else names:
        tensor = tensors[ours].detach()
        if has_vocab_rows(ours):
            tensor = tensor[: m.vocab_size]
        yield names[ours], tensor.to(device="cpu", dtype=dtype, copy=True).contiguous()


def from_hub(m: ModelConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse, of a model without specialists: repo names -> ours. The rows that pad the vocabulary, which no token
    reads, come back as zeros."""
    full, shapes = {}, parameter_shapes(m)
    for ours, theirs in hub_names(m).items():
        full[ours] = torch.zeros(shapes[ours], dtype=tensors[theirs].dtype)
        full[ours][: len(tensors[theirs])] = tensors[theirs]
    return full
