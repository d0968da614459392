"""Where things sit in a model: stage boundaries, windows, value embeddings. Pure arithmetic on ModelConfig (SPEC 1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nanopoe.config.schema import ModelConfig

VOCAB_MULTIPLE = 64      # rows of wte and heads are padded to this; logits are cropped
SMEAR_CHANNELS = 24      # channels of x that open the smear gate
CHAT_TOKENS = 8          # the last ids of the vocabulary: all special tokens but <|bos|>
VE_GATE_CHANNELS = 12    # channels of norm(x) that open a value-embedding gate
CHUNK_ELEMENTS = 1 << 24     # rows x vocabulary of one chunk of logits in training: 64 MiB in fp32


@dataclass(frozen=True)
class Layout:
    """Derived structure of a model. `boundaries` are the last layers of the stages; BP has the one at L-1."""

    boundaries: tuple[int, ...]
    window_sizes: tuple[int, ...]      # left window in tokens: position t sees t-w..t; full context = sequence_len
    ve_layers: tuple[int, ...]
    head_dim: int
    intermediate: int
    padded_vocab: int
    stage_heads: int                   # additive heads beside the shared one, 0 or K
    chains: tuple[tuple[int, ...], ...]     # of each specialist: those it stands on from the base up, and itself

    @property
    def n_stages(self) -> int:
        """Stages of the base. Specialist i is stage n_stages + i wherever stages are counted on."""
        return len(self.boundaries)

    def input_of(self, k: int) -> int:
        """The stage whose boundary state stage k reads; -1 is the embedding."""
        if k < self.n_stages:
            return k - 1
        below = self.chains[k - self.n_stages][:-1]
        return self.n_stages + below[-1] if below else self.n_stages - 1

    def stage_layers(self, k: int) -> range:
        """Layers of stage k."""
        return range(self.boundaries[k - 1] + 1 if k else 0, self.boundaries[k] + 1)


def layout_of(m: ModelConfig) -> Layout:
    """Derive the layout; the schema and `check` in load.py have already refused what does not fit."""
    if m.poe_mode == "none":
        boundaries: tuple[int, ...] = (m.n_layer - 1,)
    elif m.poe_stage_layers is not None:
        boundaries = tuple(sum(m.poe_stage_layers[: k + 1]) - 1 for k in range(len(m.poe_stage_layers)))
    else:
        assert m.poe_every is not None
        boundaries = tuple(range(m.poe_every - 1, m.n_layer, m.poe_every))
    ve_layers, windows = m.ve_layers, m.window_sizes
    if ve_layers is None:
        ve_layers = tuple(i for i in range(m.n_layer) if i % 2 == (m.n_layer - 1) % 2)
    if windows is None:
        windows = derived_windows(m)
    return Layout(
        boundaries=boundaries,
        window_sizes=windows,
        ve_layers=ve_layers,
        head_dim=m.n_embd // m.n_head,
        intermediate=m.intermediate_size or 4 * m.n_embd,
        padded_vocab=math.ceil(m.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        stage_heads=len(boundaries) if m.stage_heads else 0,
        chains=specialist_chains(m),
    )


def specialist_chains(m: ModelConfig) -> tuple[tuple[int, ...], ...]:
    """Of each specialist the way from the base to it; parents come before their children."""
    chains: list[tuple[int, ...]] = []
    for i, shape in enumerate(m.specialists):
        chains.append((i,) if shape.parent is None else (*chains[shape.parent], i))
    return tuple(chains)


def derived_windows(m: ModelConfig) -> tuple[int, ...]:
    """The pattern tiled over the layers, the last one always L; S is a quarter of T rounded up to 128."""
    short = math.ceil(m.sequence_len / 4 / 128) * 128
    pattern = [m.window_pattern[i % len(m.window_pattern)] for i in range(m.n_layer - 1)] + ["L"]
    return tuple(min(short, m.sequence_len) if c == "S" else m.sequence_len for c in pattern)
