"""Silent divergence: do all ranks hold the same weights? A torn gather or a flipped bit trains on without an error."""

from __future__ import annotations

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.dist import World
from nanopoe.errors import PeerError, everywhere
from nanopoe.optim import DistMuonAdamW

CHUNK = 1 << 20


def compare_ranks(optimizer: DistMuonAdamW, world: World) -> None:
    """PeerError on every rank naming the first parameter, rows and ranks that differ. Collective, once in many steps.

    Compared are 64-bit sums over the bits of every piece. The rank that differs is the one without a majority; where
    there is none (two ranks), the one that differs from the piece's owner, whose values the last update gave to all.
    """
    if world.size == 1:
        return
    pieces = [piece for batch in optimizer.parcels for piece in batch.pieces]
    mine = torch.stack([bit_sum(optimizer.params[p.param].detach()[p.low:p.high]) for p in pieces])      # (pieces,)
    everyone = mine.new_zeros(world.size * len(pieces))
    dist.all_gather(everyone, mine).wait()
    sums = everyone.view(world.size, -1).cpu()
    for piece, column in zip(pieces, sums.unbind(1), strict=True):
        if bool((column == column[0]).all()):
            continue
        most = column.mode().values
        if int((column == most).sum()) * 2 <= world.size:
            most = column[piece.owner]
        ranks = ", ".join(str(r) for r in torch.nonzero(column != most).flatten().tolist())
        raise everywhere(PeerError(
            f"rank {ranks} silently holds other values of {piece.param} (rows {piece.low} to {piece.high - 1}, owned "
            f"by rank {piece.owner})", "weights", "go on from a checkpoint before; look for bad memory or links there"))


def bit_sum(tensor: Tensor) -> Tensor:
    """An int64 (): the sum of all 32-bit words, each times an odd number of its place. Any one changed bit shows."""
    words = tensor.contiguous().view(-1).view(torch.int32)
    odd = torch.arange(1, 2 * min(CHUNK, len(words)) + 1, 2, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for chunk in words.split(CHUNK):
        total = total * 1_000_003 + (chunk * odd[: len(chunk)]).sum()       # integers wrap around: exact anywhere
    return total
