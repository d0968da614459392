"""Who owns what: every trainable parameter cut into pieces of rows, each piece with one owner. Integers only.

The owner sums a piece's gradient, holds its optimizer state and updates it. AdamW works element by element, so its
matrices are cut by rows, evenly; Muon needs a whole matrix, and vectors are too small to cut: these go, the largest
first, to the rank that has least. The result depends on shapes and world size alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal["muon", "adamw"]
FLIGHT_BYTES = 32 << 20     # whole gradients on their way to their owners at a time, beside the newest


@dataclass(frozen=True)
class Piece:
    """Rows [low, high) of a parameter, owned by rank `owner`."""

    param: str
    low: int
    high: int
    owner: int


def share_out(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, Kind], world_size: int) -> list[Piece]:
    """Pieces that cover every row of every parameter once: in the order of `shapes`, by rows."""
    load = [0] * world_size                                       # elements of optimizer state
    whole, pieces = [], {}
    for name, shape in shapes.items():
        if kinds[name] == "muon" or len(shape) < 2 or shape[0] < world_size:
            whole.append(name)
            continue
        edges = [shape[0] * r // world_size for r in range(world_size + 1)]
        pieces[name] = [Piece(name, edges[r], edges[r + 1], r) for r in range(world_size)]
        for r in range(world_size):
            load[r] += (edges[r + 1] - edges[r]) * state_elements("adamw", (1, *shape[1:]))
    for name in sorted(whole, key=lambda n: -state_elements(kinds[n], shapes[n])):      # stable: ties keep their order
        owner = load.index(min(load))
        pieces[name] = [Piece(name, 0, shapes[name][0], owner)]
        load[owner] += state_elements(kinds[name], shapes[name])
    return [piece for name in shapes for piece in pieces[name]]


def state_elements(kind: Kind, shape: tuple[int, ...]) -> int:
    """Muon: a momentum, and a second moment factored to the longer side. AdamW: two moments."""
    return math.prod(shape) + max(shape) if kind == "muon" else 2 * math.prod(shape)
