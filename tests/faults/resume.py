"""F4 to F7: a run goes on with other ranks, from any step, from files of any number of ranks, and nobody can tell."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nanopoe.checkpoint import Target, digest, list_steps, open_checkpoint, save_checkpoint
from nanopoe.checkpoint.store import folder_of
from nanopoe.config import Plan, experiment_from_dict
from nanopoe.data.loader import train_loader
from nanopoe.dist import World
from nanopoe.optim import DistMuonAdamW, Group
from nanopoe.tokenizer import Tokenizer
from tests.faults.harness import Report, Room, digest_of, fault, lines_of, losses
from tests.ranks import run_ranks

# Twelve micro-batches on twelve lanes: 1, 2, 3, 4, 6 or 12 ranks can share them.
TWELVE = {"batch.device_batch_size": 1, "batch.tokens_per_step": 32 * 12, "data.lanes": 12, "evaluation.every": None,
          "checkpoint.every": None}
CYCLE = {"steps": 20, "peak": 1.0, "warmup_steps": 1, "warmdown_ratio": 0.4, "final_frac": 0.1,
         "momentum_warmup_steps": 2}
WALK = (1, 2, 3, 4, 2, 1)


@fault("F4", "walk over 1>2>3>4>2>1 ranks, 20 steps each, strict: bitwise where one rank ends", short=0, full=6)
def walk(room: Room, trials: int) -> Report:
    """One trial is one leg. Cycles are appended leg by leg, which is how a run is made longer."""
    report, legs = Report(trials), WALK[:trials]
    strict = {**TWELVE, "runtime.numerics": "strict"}
    whole = room.whole("alone", 1, **{**strict, "schedule.cycles": [CYCLE] * len(legs), "checkpoint.every": 20})
    for leg, ranks in enumerate(legs):
        experiment = room.experiment("walk", **{**strict, "schedule.cycles": [CYCLE] * (leg + 1)})
        codes = room.start(experiment, ranks).wait()
        report.check(codes == [0] * ranks, f"leg {leg} on {ranks} ranks ended with {codes}")
        step = 20 * (leg + 1)
        if not report.check(digest_of(whole, step) == digest_of(room.folder / "walk", step),
                            f"step {step}, after a leg on {ranks} ranks, is not the one of one rank"):
            break
    rows = walked_rows(experiment, room.folder / "walk", legs)
    straight = walked_rows(experiment, whole, (1,) * len(legs))
    strange = sum(not np.array_equal(a, b) for a, b in zip(rows, straight, strict=True))
    report.check(strange == 0, f"{strange} of {len(rows)} global batches hold other documents")
    fast = room.whole("fast", 3, **{**TWELVE, "schedule.cycles": [CYCLE]})
    report.check(digest_of(fast, 20) != digest_of(whole, 20), "control: fast numerics on 3 ranks gave the same bits")
    report.note = f"{20 * len(legs)} steps, {sum(map(len, rows))} rows, 0 repeated, 0 skipped" if not strange else ""
    return report


def walked_rows(experiment: dict[str, Any], run_dir: Path, legs: tuple[int, ...]) -> list[np.ndarray]:
    """The global batches (rows, T+1) of every step, read as each leg reads them: from its checkpoint's position on."""
    exp, out = experiment_from_dict(experiment, "walk"), []
    tokenizer = Tokenizer.load(exp.tokenizer)
    for leg, ranks in enumerate(legs):
        step = 20 * leg
        position = open_checkpoint(run_dir, step).state["position"] if step else None
        plan = Plan(ranks, 12, 12, 12 // ranks, 1, 32, 384, 20 * len(legs), 0)
        loaders = [train_loader(exp.data, tokenizer, plan, seed=exp.seed, rank=r, start_step=step, position=position)
                   for r in range(ranks)]
        for _ in range(20):
            parts = torch.stack([next(loader)[0] for loader in loaders], dim=1)      # (micro_step, rank, 1, T+1)
            out.append(parts.flatten(0, 2).numpy().copy())
        for loader in loaders:
            loader.close()
    return out


@fault("F5", "fast numerics: losses on 2, 3 and 4 ranks within 1e-5 of one rank's over 200 steps", short=0, full=3)
def fast(room: Room, trials: int) -> Report:
    """One trial is one number of ranks, at a tenth of the rates: at full rates this tiny model multiplies any rounding.

    Control: one rank with another cut into micro-batches, so the same sums in another order, differs by more.
    """
    slow = {**TWELVE, "schedule.cycles": [{**CYCLE, "steps": 200, "peak": 0.1}]}
    alone, report, worst = losses(room.whole("1", 1, **slow)), Report(trials), 0.0
    for ranks in (2, 3, 4)[:trials]:
        apart = furthest(losses(room.whole(str(ranks), ranks, **slow)), alone)
        worst = max(worst, apart)
        report.check(apart <= 1e-5, f"{ranks} ranks: a loss differs by {apart:.1e}")
    rounded = furthest(losses(room.whole("cut", 1, **{**slow, "batch.device_batch_size": 2})), alone)
    report.check(rounded > 1e-5, f"control: another cut differs by {rounded:.1e} only")
    report.note = f"largest difference {worst:.1e}; of another cut into micro-batches on one rank {rounded:.1e}"
    return report


def furthest(some: dict[int, float], others: dict[int, float]) -> float:
    return max(abs(some[step] - others[step]) for step in others)


SHAPES = {"square": (128, 128), "square2": (128, 128), "square3": (128, 128), "odd": (127, 64), "wide": (64, 127),
          "rows": (50257, 2), "few": (3, 128), "vector": (128,), "scalar": (1,)}
MUON = ("square", "square2", "square3", "odd", "wide")
FROZEN = "frozen"


def parameters() -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = {n: torch.nn.Parameter(torch.randn(s, generator=generator)) for n, s in SHAPES.items()}
    return {**params, FROZEN: torch.nn.Parameter(torch.ones(127, 3), requires_grad=False)}


def reshard_rank(world: World, experiment: dict[str, Any], load: int | None, steps: int, save: bool) -> str:
    """From step `load` (or the start), `steps` strict steps of 48 micro-batches; saves the end. Digest of the files."""
    exp, params = experiment_from_dict(experiment, "reshard"), parameters()
    trained = {n: p for n, p in params.items() if p.requires_grad}
    groups = [Group("matrices", "muon", 0.02, 0.1, MUON),
              Group("rest", "adamw", 0.1, 0.01, tuple(n for n in SHAPES if n not in MUON), (0.8, 0.95))]
    optimizer = DistMuonAdamW(trained, groups, world.rank, world.size, numerics="strict")
    first = 0
    if load is not None:
        checkpoint = open_checkpoint(exp.out, load)
        checkpoint.verify()
        assert set(checkpoint.optimizer_state) == set(optimizer.state_names()), "frozen parameters have no state"
        for name, p in params.items():
            p.data.copy_(checkpoint.read(name))
        optimizer.load_state(checkpoint.optimizer_rows, checkpoint.state["optimizer_steps"])
        first = checkpoint.step
    for step in range(first, first + steps):
        for g in range(world.rank, 48, world.size):
            generator = torch.Generator().manual_seed(1000 * step + g)
            sum((p * torch.randn(p.shape, generator=generator)).sum() for p in trained.values()).backward()
            optimizer.take()
        optimizer.reduce()
        optimizer.update(1.0, 0.9, 1.0)
    if not save:
        return ""
    end, lanes = first + steps, range(world.rank, 48, world.size)
    position = {"fingerprint": {}, "step": end, "lanes": {str(lane): {} for lane in lanes}}
    state = {"step": end, "tokens": 0, "optimizer_steps": optimizer.steps, "lineage": [], "position": position}
    saved = save_checkpoint(Target(exp, world, {}, None, None), params, optimizer.state_parts(), state)
    return "" if saved.path is None else digest(open_checkpoint(exp.out, end))


@fault("F6", "saved by 1, 2, 3, 4, 12 ranks, loaded by 1, 2, 3, 4, 8, 16, then 5 strict steps", short=4, full=30)
def reshard(room: Room, trials: int) -> Report:
    report = Report()
    alone = run_ranks(reshard_rank, 1, room.experiment("alone"), None, 3, True)[0]
    after = run_ranks(reshard_rank, 1, room.experiment("alone"), 3, 5, True)[0]
    pairs = [(w, r) for w in (1, 2, 3, 4, 12) for r in (1, 2, 3, 4, 8, 16)]
    chosen = pairs if trials >= len(pairs) else [(3, 4), (4, 1), (2, 3), (12, 2)][:trials]
    for writers, readers in chosen:
        name = f"by{writers}"
        if not (room.folder / name).exists():
            found = run_ranks(reshard_rank, writers, room.experiment(name), None, 3, True)
            report.check(set(found) == {alone}, f"{writers} ranks saved another digest than one")
        for later in [s for s in list_steps(room.folder / name) if s > 3]:
            shutil.rmtree(folder_of(room.folder / name, later))
        found = run_ranks(reshard_rank, readers, room.experiment(name), 3, 5, True)
        report.trials += 1
        report.check(set(found) == {after}, f"saved by {writers}, loaded by {readers}: other bits after 5 steps")
    report.check(alone != after, "control: 5 steps changed nothing")
    return report


@fault("F7", "resumed from each step of a run that crosses an epoch: bitwise the uninterrupted run", short=2, full=50)
def each_step(room: Room, trials: int) -> Report:
    """Odd trials on two ranks, even on one; strict numerics make these one run. Metrics are compared too."""
    report = Report(trials)
    long = {"batch.tokens_per_step": 32 * 16, "schedule.cycles": [{**CYCLE, "steps": 30}, {**CYCLE, "steps": 21}],
            "checkpoint.every": 1, "evaluation.every": 10, "runtime.numerics": "strict"}
    whole = room.whole("whole", 1, **long)
    end = digest_of(whole, 51)
    lanes = open_checkpoint(whole, 51).state["position"]["lanes"]
    report.check(max(lane["cursors"]["tiny"][0] for lane in lanes.values()) >= 1, "control: the run crosses no epoch")
    steps = range(1, 51) if trials >= 50 else sorted(room.draw.sample(range(1, 51), trials))
    for i, step in enumerate(steps):
        again, ranks = room.folder / "again", 1 + i % 2
        shutil.copytree(whole, again)
        for later in list_steps(again):
            if later > step:
                shutil.rmtree(folder_of(again, later))
        codes = room.start(room.experiment("again", **{**long, "checkpoint.every": None}), ranks).wait()
        report.check(codes == [0] * ranks, f"from step {step} on {ranks} ranks: ended with {codes}")
        report.check(digest_of(again, 51) == end, f"from step {step} on {ranks} ranks: another end")
        report.check(alike(told(again), told(whole)), f"from step {step} on {ranks} ranks: other metrics")
        shutil.rmtree(again)
    return report


def told(run_dir: Path) -> list[dict[str, Any]]:
    """Metrics without timings."""
    timings = ("seconds", "wait_seconds", "tokens_per_s", "mfu", "memory_bytes")
    lines = [line for line in lines_of(run_dir) if line["kind"] != "event"]
    return [{k: v for k, v in line.items() if k not in timings} for line in lines]


def alike(a: Any, b: Any) -> bool:
    """Equal; numbers to 1e-6, since ranks sum losses and norms in other orders than one rank does."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(alike(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(alike, a, b))
    return math.isclose(a, b, rel_tol=1e-6) if isinstance(a, float) and isinstance(b, float) else bool(a == b)
