"""The world: this process among all, its device, and the process group it joins and leaves."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nanopoe.dist import heartbeat
from nanopoe.dist.collectives import Group
from nanopoe.dist.roll import LONG_S
from nanopoe.errors import ConfigError, PeerError, report


@dataclass(frozen=True)
class World:
    """This process among all: global rank, size, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(name: str, local_rank: int) -> torch.device:
    """"auto" | "cpu" | "cuda" -> the device of this rank; ConfigError if it is not there."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError("no CUDA device is visible", "runtime.device", "use 'cpu' or 'auto'")
    if name == "cpu" or not available:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(f"rank {local_rank} of this host has no GPU: {torch.cuda.device_count()} visible",
                          "torchrun --nproc_per_node", "start at most one rank per GPU")
    return torch.device("cuda", local_rank)


def environment_world() -> tuple[int, int, int]:
    """(rank, local rank, world size) from torchrun's environment; (0, 0, 1) where there is none."""
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return 0, 0, 1
    missing = [v for v in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise ConfigError(f"the environment names a world but lacks {', '.join(missing)}", "environment",
                          "start with torchrun, or unset RANK and WORLD_SIZE")
    numbers = {v: os.environ[v] for v in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    wrong = [f"{v}={text!r}" for v, text in numbers.items() if not (text.isascii() and text.isdecimal())]
    if wrong or not int(numbers["RANK"]) < int(numbers["WORLD_SIZE"]):
        shown = wrong or [f"{v}={numbers[v]}" for v in ("RANK", "WORLD_SIZE")]
        raise ConfigError(f"the environment names no rank of a world: {', '.join(shown)}", "environment",
                          "start with torchrun, or unset RANK and WORLD_SIZE")
    return int(numbers["RANK"]), int(numbers["LOCAL_RANK"]), int(numbers["WORLD_SIZE"])


@contextmanager
def world(device: str = "auto", timeout_s: int = 600, rank: int | None = None, size: int | None = None,
          init_method: str | None = None) -> Iterator[World]:
    """Join the process group (gloo on CPU, NCCL on CUDA) and leave it at the end.

    Rank and size come from torchrun's environment unless given (tests pass them, with a file as init_method).
    `timeout_s`: seconds without progress after which a rank counts as lost (roll.py), and in which all must have come.
    PeerError when the group does not come together in time or has another size than the environment says.

    The heartbeat ends what hangs, and knows phases that take long. So where there is one, a collective itself may take
    LONG_S at least: the ranks that wait for one which saves must not lose patience.
    """
    if rank is None or size is None:
        rank, local_rank, size = environment_world()
    else:
        local_rank = rank
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        store = meet(rank, size, timeout_s) if init_method is None else None
        patience = timeout_s if store is None else max(timeout_s, int(LONG_S))
        if store is not None:                   # now: a rank may also be lost while the group comes together
            heartbeat.start(connect("heartbeat", HEARTBEAT_TIMEOUT_S), rank, size, timeout_s, not agent_holds_store())
        try:
            dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", init_method=init_method, store=store,
                                    rank=rank, world_size=size, timeout=datetime.timedelta(seconds=patience))
        except (RuntimeError, ValueError) as error:
            apart = PeerError(f"the {size} ranks did not meet: {heartbeat.first_line(error)}", f"rank {rank}",
                              "check MASTER_ADDR, MASTER_PORT and that every rank was started")
            heartbeat.stop(apart)
            raise apart from error
        if dist.get_world_size() != size:
            raise PeerError(f"the group has {dist.get_world_size()} ranks, the environment says {size}", f"rank {rank}")
    failure: BaseException | None = None
    try:
        yield World(rank, size, chosen)
    except BaseException as error:
        failure = error
        heartbeat.stop(error)
        if size > 1 and isinstance(error, Exception):
            report(error)           # before the others see this rank gone: torchrun ends all when the first one exits
        raise
    finally:
        if failure is None:
            heartbeat.stop(None)
        if size > 1 and dist.is_initialized():
            dist.destroy_process_group()


HEARTBEAT_TIMEOUT_S = 10


def agent_holds_store() -> bool:
    """Whether torchrun's agent holds the store of the rendezvous, as it says itself; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def connect(space: str, timeout_s: int, serve: bool = False) -> dist.Store:
    """A connection of its own to the store at MASTER_ADDR:MASTER_PORT, or the store itself (`serve`)."""
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=serve,
                          timeout=datetime.timedelta(seconds=timeout_s), wait_for_workers=False)
    return dist.PrefixStore(f"nanopoe/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{space}", store)


def meet(rank: int, size: int, timeout_s: int) -> dist.Store:
    """The store in which all ranks have met; PeerError naming the ranks that did not come within timeout_s."""
    where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = connect("group", timeout_s, serve=rank == 0 and not agent_holds_store())
        store.set(f"here/{rank}", "")
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise PeerError(f"no store of a rendezvous at {where}: {heartbeat.first_line(error)}", f"rank {rank}",
                        "check MASTER_ADDR, MASTER_PORT and that rank 0 was started") from error
    try:
        store.wait([f"here/{r}" for r in range(size)], datetime.timedelta(seconds=timeout_s))
        return store
    except RuntimeError as error:
        raise PeerError(f"{absent(store, size)} did not come to {where} within {timeout_s} s", f"rank {rank}",
                        "its own message and log say why; check that every rank was started") from error


def absent(store: dist.Store, size: int) -> str:
    try:
        ranks = [r for r in range(size) if not store.check([f"here/{r}"])]
    except RuntimeError:
        ranks = [0]                                                     # it held the store
    return f"rank {', '.join(map(str, ranks))}"


def column_group(columns: Sequence[Sequence[int]], timeout_s: int) -> Group | None:
    """The group of this rank's column, of ranks that train the same stages; None where it is alone. Collective."""
    mine = None
    for ranks in columns if len(columns[0]) > 1 else ():
        group = dist.new_group(list(ranks), timeout=datetime.timedelta(seconds=timeout_s))
        if dist.get_rank() in ranks:
            mine = group
    return mine


def side_group(timeout_s: int) -> Group | None:
    """A second gloo group of all ranks, for a thread whose collectives must not mix with training's; None on one rank.

    Collective.
    """
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))
