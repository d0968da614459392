"""Ranks: the only room that opens a process group (group.py), the collectives, failing together (agreement.py), and who
is lost (heartbeat.py, by the rules of roll.py)."""

from nanopoe.dist.agreement import agree
from nanopoe.dist.collectives import (
    Group,
    Pending,
    all_gather,
    all_reduce_sum_,
    barrier,
    broadcast,
    gather_json,
    gather_to,
    receive,
    reduce_to,
    send,
    size,
    sum_integers,
)
from nanopoe.dist.group import World, choose_device, column_group, environment_world, side_group, world
from nanopoe.dist.heartbeat import mark, when_lost

__all__ = ["Group", "Pending", "World", "agree", "all_gather", "all_reduce_sum_", "barrier", "broadcast",
           "choose_device", "column_group", "environment_world", "gather_json", "gather_to", "mark", "receive",
           "reduce_to", "send", "side_group", "size", "sum_integers", "when_lost", "world"]
