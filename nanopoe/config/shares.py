"""Who owns what: every trainable parameter cut into pieces of rows, each piece with one owner. Integers only.

The owner sums a piece's gradient, holds its optimizer state and updates it. AdamW works element by element, so its
matrices are cut by rows, evenly; Muon needs a whole matrix, and vectors are too small to cut: these go, the largest
first, to the rank that has least. The result depends on shapes, world size and homes alone: with stages on different
ranks (parallel.stages) the parameters of a stage are shared out among the ranks that run it.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from nanopoe.config.layout import Layout

Kind = Literal["muon", "adamw"]
FLIGHT_BYTES = 32 << 20     # whole gradients on their way to their owners at a time, beside the newest


@dataclass(frozen=True)
class Piece:
    """Rows [low, high) of a parameter, owned by rank `owner`."""

    param: str
    low: int
    high: int
    owner: int


def share_out(shapes: Mapping[str, tuple[int, ...]], kinds: Mapping[str, Kind], world_size: int,
              homes: Mapping[str, Sequence[int]] | None = None) -> list[Piece]:
    """Pieces that cover every row of every parameter once: in the order of `shapes`, by rows. A parameter in `homes`
    is owned by these ranks (ascending) alone."""
    load = [0] * world_size                                       # elements of optimizer state
    whole, pieces = [], {}
    ranks_of = {name: (homes or {}).get(name, range(world_size)) for name in shapes}
    for name, shape in shapes.items():
        ranks = ranks_of[name]
        if kinds[name] == "muon" or len(shape) < 2 or shape[0] < len(ranks):
            whole.append(name)
            continue
        edges = [shape[0] * i // len(ranks) for i in range(len(ranks) + 1)]
        pieces[name] = [Piece(name, edges[i], edges[i + 1], r) for i, r in enumerate(ranks)]
        for piece in pieces[name]:
            load[piece.owner] += (piece.high - piece.low) * state_elements("adamw", (1, *shape[1:]))
    for name in sorted(whole, key=lambda n: -state_elements(kinds[n], shapes[n])):      # stable: ties keep their order
        owner = min(ranks_of[name], key=load.__getitem__)
        pieces[name] = [Piece(name, 0, shapes[name][0], owner)]
        load[owner] += state_elements(kinds[name], shapes[name])
    return [piece for name in shapes for piece in pieces[name]]


def state_elements(kind: Kind, shape: tuple[int, ...]) -> int:
    """Muon: a momentum, and a second moment factored to the longer side. AdamW: two moments."""
    return math.prod(shape) + max(shape) if kind == "muon" else 2 * math.prod(shape)


# -- stages on different ranks ----------------------------------------------------------------------------------------

def share_stages(costs: Sequence[int], ranks: int) -> tuple[range, ...]:
    """Stages 0.. of these costs cut into `ranks` runs, none of them empty: the costliest run is as cheap as can be, and
    what is left to choose goes to the earlier ranks."""
    assert 1 <= ranks <= len(costs)
    low, high = max(costs), sum(costs)
    while low < high:
        middle = (low + high) // 2
        if len(_cut(costs, middle, 1)) <= ranks:
            high = middle
        else:
            low = middle + 1
    return _cut(costs, low, ranks)


def _cut(costs: Sequence[int], limit: int, least: int) -> tuple[range, ...]:
    """Runs as long as `limit` allows, at least `least` of them."""
    runs: list[range] = []
    start, load = 0, 0
    for k, cost in enumerate(costs):
        if k > start and (load + cost > limit or len(costs) - k < least - len(runs)):
            runs.append(range(start, k))
            start, load = k, 0
        load += cost
    return (*runs, range(start, len(costs)))


def stage_of(name: str, layout: Layout, detach_x0: bool) -> int | None:
    """The one stage whose loss gives this parameter of a base its gradient; null where several do."""
    part = name.split(".")
    if name.startswith("transformer.h."):
        return bisect_left(layout.boundaries, int(part[2]))
    if name.startswith("value_embeds."):
        return bisect_left(layout.boundaries, int(part[1]))
    if name.startswith("lm_head_stages."):
        return int(part[1])
    return 0 if detach_x0 and name.startswith(("transformer.wte.", "smear_")) else None
