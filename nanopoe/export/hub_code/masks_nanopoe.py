"""Attention masks of a nanopoe model, whose layers may have sliding windows of several sizes.

transformers knows one `sliding_window` per model: it is the largest, so that every cache keeps what any layer needs.
A layer with a smaller window has a mask of its own, and of the keys in a cache it reads the last ones only: just those
that it would find in the cache of a model in which its window is the largest.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

FULL, SLIDING = "full_attention", "sliding_attention"
HONOURED = ("eager", "sdpa", "flash_attention", "flex_attention")        # they keep to a layer's own window
MASK_ARGUMENTS = frozenset(inspect.signature(create_causal_mask).parameters)     # they differ between versions
ONE_WINDOW = ("this model has sliding windows of several sizes, the attention in use knows one: load the model with "
              "attn_implementation=\"sdpa\"")


def window_of(config: Any, layer: int) -> int | None:
    """The sliding window of a layer, which counts the token itself; None: it sees all."""
    if config.layer_types[layer] != SLIDING:
        return None
    return min(config.window_sizes[layer - 1] + 1, config.sliding_window) if layer else config.sliding_window


def mask_names(config: Any) -> list[str]:
    """The key of each layer's mask: its type, and where its window is smaller than the largest, the window too."""
    windows = [window_of(config, layer) for layer in range(len(config.layer_types))]
    return [kind if window in (None, config.sliding_window) else f"{kind}_{window}"
            for kind, window in zip(config.layer_types, windows, strict=True)]


def attention_masks(config: Any, **arguments: Any) -> dict[str, Any]:
    """A mask under each of `mask_names`; `arguments` are those of the mask functions of any version of transformers.

    ValueError where there are several windows and the attention in use knows one.
    """
    arguments = {name: value for name, value in arguments.items() if name in MASK_ARGUMENTS}
    found = {}
    for layer, name in enumerate(mask_names(config)):
        if name in found:
            continue
        if name == FULL:
            found[name] = create_causal_mask(config=config, **arguments)
        elif name == SLIDING:
            found[name] = create_sliding_window_causal_mask(config=config, **arguments)
        else:
            found[name] = narrow_mask(config, window_of(config, layer), **arguments)
    return found


def narrow_mask(config: Any, window: Any, **arguments: Any) -> Any:
    """The mask of a window below the largest: of the keys in a cache that grows, it has columns for the last alone."""
    if not str(config._attn_implementation).startswith(HONOURED):
        raise ValueError(ONE_WINDOW)
    narrow = copy.copy(config)
    narrow.sliding_window = window
    mask = create_sliding_window_causal_mask(config=narrow, **arguments)
    if not isinstance(mask, Tensor) or mask.ndim < 4 or getattr(arguments["past_key_values"], "is_compileable", False):
        return mask
    return mask[..., -(window - 1 + mask.shape[2]):]


__all__ = ["FULL", "MASK_ARGUMENTS", "ONE_WINDOW", "SLIDING", "attention_masks", "mask_names", "window_of"]
