"""Silent divergence is found, and the parameter and rank are named."""

from __future__ import annotations

import torch

from nanopoe.dist import World
from nanopoe.errors import PeerError
from nanopoe.optim import DistMuonAdamW
from nanopoe.train.drift import bit_sum, compare_ranks
from tests.ranks import run_ranks
from tests.test_optim import groups, parameters


def flipped(world: World, name: str, bad_rank: int) -> str:
    """What a rank is told after one bit of one parameter changed on one rank."""
    params = parameters()
    optimizer = DistMuonAdamW(params, groups(), world.rank, world.size)
    compare_ranks(optimizer, world)                                      # nothing yet
    if world.rank == bad_rank:
        params[name].detach().view(-1).view(torch.int32)[3] ^= 1
    try:
        compare_ranks(optimizer, world)
    except PeerError as error:
        return str(error)
    return "nothing noticed"


def test_a_flipped_bit_is_found() -> None:
    for name in ("square3", "rows", "vector"):
        messages = run_ranks(flipped, 3, name, 1)
        assert len(set(messages)) == 1, "every rank is told the same"
        assert f"rank 1 silently holds other values of {name} " in messages[0]
    assert run_ranks(flipped, 3, "rows", 7) == ["nothing noticed"] * 3   # control
    owners = {p.param: p.owner for b in DistMuonAdamW(parameters(), groups(), 0, 2).parcels for p in b.pieces}
    for name in ("square0", "square1", "square2", "vector"):             # no majority: the owner's is the right one
        other = 1 - owners[name]
        assert f"rank {other} silently holds other values of {name} " in run_ranks(flipped, 2, name, other)[0]
    assert len({owners[n] for n in ("square0", "square1", "square2", "vector")}) == 2


def test_the_sum_sees_bits_and_places() -> None:
    x = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    for bit in (0, 17, 30, -(2**31)):
        y = x.clone()
        y.view(torch.int32)[2_000_000] ^= bit if bit < 0 else 1 << bit
        assert bit_sum(x) != bit_sum(y)
    swapped = x.clone()
    swapped[[5, 6]] = x[[6, 5]]
    assert bit_sum(x) != bit_sum(swapped)
    assert bit_sum(x) == bit_sum(x.clone().view(1, -1))                  # control
