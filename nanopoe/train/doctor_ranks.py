"""The doctor's look at the ranks: are they the world they should be, of one code, on one time, and do they add up?"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import nanopoe
from nanopoe import dist
from nanopoe.checkpoint.compare import leaves
from nanopoe.config import Experiment, config_hash, dump_experiment, make_plan
from nanopoe.config.load import NOT_LEARNED
from nanopoe.errors import ConfigError, PeerError
from nanopoe.train.doctor_exam import Exam, Found, Trouble, clock, count, told

PACKAGE = Path(nanopoe.__file__).parent
CLOCK_S = 1.0                # seconds between clocks at which times in logs mislead
NODE_LOST_S = 15.0           # torchrun's: a node whose clock is so far behind counts as gone (three beats of 5 s)
SMALL, LARGE = 1 << 16, 1 << 24      # elements of all-reduces, fp32
REDUCE_S = 0.05              # of one of them
ROUNDS = 5

# Where contents are. They are compared by digest: tokenizer and data in check_data and by the loader, a base or a start
# when it is read.
PLACE = re.compile(r"tokenizer|data\.(train|val)\.\d+\.(path|files)|specialist\.(base|base_step)|"
                   r"init_from\.(path|step)")
# What else decides which collectives a rank enters, and with what: ranks that differ would wait for each other.
TOGETHER = re.compile(r"(parallel|checkpoint|evaluation|resume)\..*|logging\.pool_every|"
                      r"runtime\.(compute_dtype|numerics|compare_every)")


def check_world(exam: Exam) -> Found:
    """The plan fits the ranks; the environment says what the group is; no two ranks share a GPU."""
    experiment, world = exam.experiment, exam.world
    grid = exam.ask(lambda: make_plan(experiment, world.size).grid())[0]
    names = "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"
    ranks = exam.ask(lambda: {"host": socket.gethostname(), "device": device_of(world.device), "members": dist.size(),
                              **{name: os.environ.get(name) for name in names}})
    for rank, seen in enumerate(ranks):
        said = seen["RANK"] or str(rank), seen["WORLD_SIZE"] or str(world.size), str(seen["members"])
        if said != (str(rank), str(world.size), str(world.size)):
            raise Trouble(f"rank {rank} of {world.size}: the environment says RANK={said[0]}, WORLD_SIZE={said[1]}, "
                          f"its group has {said[2]}", "start all ranks with one torchrun", PeerError, "the world")
    hosts: dict[str, list[int]] = {}
    for rank, seen in enumerate(ranks):
        hosts.setdefault(seen["host"], []).append(rank)
    gpus = [(seen["host"], seen["device"]) for seen in ranks if seen["device"] != "cpu"]
    shared = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    if shared is not None:
        both = [rank for rank, seen in enumerate(ranks) if (seen["host"], seen["device"]) == shared]
        raise Trouble(f"{told(both)} on {shared[0]} share one GPU", "start one torchrun on a host, or show each its "
                      "own GPUs (CUDA_VISIBLE_DEVICES)", ConfigError, "the world")
    text = f"{count(world.size, 'rank')} on {count(len(hosts), 'host')}"
    if len(hosts) > 1:
        text += f" ({', '.join(f'{host}: {len(r)}' for host, r in list(hosts.items())[:8])})"
    text += f", {world.device.type}" + (f", {grid}" if grid else "")
    crowded = [f"{len(here)} ranks are on {host}, LOCAL_WORLD_SIZE says {ranks[here[0]]['LOCAL_WORLD_SIZE']}"
               for host, here in hosts.items() if ranks[here[0]]["LOCAL_WORLD_SIZE"] not in (None, str(len(here)))]
    if crowded and world.device.type == "cpu" and experiment.runtime.threads is None:
        return Found(f"{text}; {crowded[0]}", "each torchrun gives its ranks all cores: set runtime.threads")
    return Found(text)


def device_of(device: torch.device) -> str:
    """What tells GPUs of a host apart, also when each rank is shown one alone."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"


def check_same(exam: Exam) -> Found:
    """One experiment, one code and one torch on all ranks; else the first ranks that differ, and in what.

    Hosts may have the same contents at different places, so places are not compared here: the contents are where they
    are read, and the run folder by check_folder. What only one rank does or sees, as of logs, may differ.
    """
    ranks = exam.ask(lambda: identity(exam.experiment))
    for key, first in ranks[0].items():
        others = [rank for rank, seen in enumerate(ranks) if seen[key] != first]
        if not others:
            continue
        theirs = ranks[others[0]][key]
        if key in PARTS:
            parts = exam.ask(partial(PARTS[key], exam.experiment))
            names = [name for name in {**parts[0], **parts[others[0]]}
                     if parts[0].get(name) != parts[others[0]].get(name)]
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            theirs, first = (", ".join(f"{name} {part.get(name)}" for name in names[:3]) + more
                             for part in (parts[others[0]], parts[0]))
        text = f"{told(others)} {'has' if len(others) == 1 else 'have'} another {key} than rank 0: {theirs}; rank 0: " \
               f"{first}"
        raise Trouble(text, "give every host the same files and environment", ConfigError, told(others))
    seen, config = ranks[0], exam.ask_first(lambda: config_hash(exam.experiment))        # places enter it
    return Found(f"config {config}, code {seen['code'][:12]}, nanopoe {seen['nanopoe']}, torch "
                 f"{seen['torch']}, Python {seen['Python']}")


def identity(experiment: Experiment) -> dict[str, str]:
    """What must be the same on all ranks."""
    return {"nanopoe": nanopoe.__version__, "torch": torch.__version__, "Python": platform.python_version(),
            **{key: digest_of(part(experiment)) for key, part in PARTS.items()}}


def learned(experiment: Experiment) -> dict[str, Any]:
    """Values of the experiment that change the weights, places left out."""
    return {key: value for key, value in leaves(dump_experiment(experiment))
            if key.split(".")[0] not in NOT_LEARNED and not PLACE.fullmatch(key)}


def cadence(experiment: Experiment) -> dict[str, Any]:
    """Values that change no weights and yet decide what the ranks do together, and when."""
    return {key: value for key, value in leaves(dump_experiment(experiment)) if TOGETHER.fullmatch(key)}


def files_of(package: Path) -> dict[str, str]:
    """The first digits of each source file's SHA-256, "absent" of none, in the order of their names."""
    return {path.relative_to(package).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            for path in sorted(package.rglob("*.py"))}


PARTS: dict[str, Callable[[Experiment], dict[str, Any]]] = {
    "experiment": learned, "cadence": cadence, "code": lambda _: files_of(PACKAGE)}     # whose values tell what differs


def digest_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def check_clocks(exam: Exam) -> Found:
    """How far the ranks' clocks are apart, read when all leave a barrier.

    nanopoe itself measures time by clocks that nobody sets, and its heartbeat compares none across ranks. torchrun's
    c10d rendezvous does: it writes and compares times of nodes, and drops one that is NODE_LOST_S behind.
    """
    dist.barrier()
    now = time.time()
    clocks = exam.ask(lambda: [socket.gethostname(), now])
    times = [at for _, at in clocks]
    spread, slow, fast = max(times) - min(times), times.index(min(times)), times.index(max(times))
    if len({host for host, _ in clocks}) == 1 and spread < CLOCK_S:
        return Found("one host, one clock")
    text = f"{spread:.3f} s apart" + (f", rank {slow} behind rank {fast}" if spread >= CLOCK_S else "")
    if spread >= NODE_LOST_S:
        raise Trouble(f"{text}; torchrun's c10d rendezvous takes a node that is {NODE_LOST_S:.0f} s behind for lost",
                      "set the clocks of the hosts (chrony, ntpd)")
    warning = "times in logs do not line up: set the clocks of the hosts (chrony, ntpd)"
    return Found(text, warning if spread >= CLOCK_S else "")


def check_reduce(exam: Exam) -> Found:
    """An all-reduce gives the exact sum on every rank; how fast, unless a training is about to start."""
    world = exam.world
    if world.size == 1:
        return Found("one rank: nothing is sent")
    seconds = reduce_known(exam, SMALL, 1)
    if exam.at_start:
        return Found("exact")
    seconds = reduce_known(exam, SMALL, ROUNDS)
    elements = max(SMALL, min(LARGE, int(SMALL * REDUCE_S / seconds)))
    seconds = reduce_known(exam, elements, ROUNDS)
    moved = 4 * elements * 2 * (world.size - 1) / world.size                  # bytes that a rank sends, at least
    return Found(f"exact; {moved / seconds / 1e9:.2f} GB/s a rank, {4 * elements / 2**20:.1f} MiB in "
                 f"{1e3 * seconds:.1f} ms")


def reduce_known(exam: Exam, elements: int, rounds: int) -> float:
    """Sum integers of known sum over ranks; median seconds of the slowest rank. Trouble where a sum is not exact."""
    world = exam.world
    tensors: list[torch.Tensor] = []

    def prepare() -> None:
        pattern = torch.arange(elements, device=world.device).remainder_(7).add_(1).float()
        tensors[:] = [pattern, torch.empty_like(pattern)]

    exam.ask(prepare)
    pattern, tensor = tensors
    total, times, wrong = world.size * (world.size + 1) // 2, [], 0
    for _ in range(rounds):
        tensor.copy_(pattern).mul_(world.rank + 1)
        dist.barrier()
        start = clock(world)
        dist.all_reduce_sum_(tensor)
        times.append(clock(world) - start)
        wrong += int((tensor != pattern * total).sum())
    found = exam.ask(lambda: [sorted(times)[rounds // 2], wrong])
    bad = [rank for rank, (_, errors) in enumerate(found) if errors]
    if bad:
        raise Trouble(f"{told(bad)}: {found[bad[0]][1]} of {rounds * elements} sums are wrong",
                      "look for bad memory or links there (nccl-tests)", PeerError, told(bad))
    return max(seconds for seconds, _ in found)
