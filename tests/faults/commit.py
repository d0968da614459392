"""F9, F14, F15, F16: the disk refuses, a bit flips in memory, the saving thread is slow or breaks, old steps go."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from nanopoe.checkpoint import Saver, Target, folder_of, list_steps
from nanopoe.checkpoint.commit import is_whole
from nanopoe.config import experiment_from_dict
from nanopoe.dist import World
from nanopoe.errors import PeerError
from tests.faults import corrupt  # noqa: F401  it registers its fault
from tests.faults.disk import Breaking, Guarded, Record, Refusing, Slow, Stopped, Undeletable, save_of, start
from tests.faults.harness import Life, Report, Room, digest_of, fault, leftovers, losses, torn
from tests.faults.resume import CYCLE
from tests.ranks import run_ranks

# Few parameters, so that a save is some 70 writes.
SMALL = {"model.n_layer": 2, "model.poe_every": 1, "model.window_pattern": "L", "model.stage_heads": False,
         "evaluation.every": None, "evaluation.tokens": 128}
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)


def small(room: Room, name: str, steps: int, **changes: Any) -> dict[str, Any]:
    """A run of `steps` steps with a checkpoint after each."""
    return room.experiment(name, **SMALL, **{"schedule.cycles": [{**CYCLE, "steps": steps}], **changes})


def whole(room: Room, steps: int) -> str:
    """The digest of the same run when nothing happens to it."""
    life = room.start(small(room, "whole", steps))
    assert life.wait() == [0], life.said()
    return digest_of(life.run_dir, steps)


def goes_on(room: Room, report: Report, experiment: dict[str, Any], end: str, what: str) -> None:
    """A later start with nothing in its way ends as the undisturbed run did, and leaves nothing lying about."""
    life = room.start(experiment)
    run_dir, total = life.run_dir, sum(cycle["steps"] for cycle in experiment["schedule"]["cycles"])
    if report.check(life.wait() == [0], f"{what}: the next start ended with {life.said()[-300:]}"):
        report.check(digest_of(run_dir, total) == end, f"{what}: the next start ended otherwise")
        report.check(leftovers(run_dir, ".") == [], f"{what}: the next start left {leftovers(run_dir, '.')}")


# -- F9 --------------------------------------------------------------------------------------------------------------

TOTAL, MAX_FAILED = 4, 2


@fault("F9", "the disk refuses the k-th change of a run: every k once, some for a save, some for ever", short=3,
       full=10_000)
def disk_full(room: Room, trials: int) -> Report:
    """`trials` of the positions times forms that there are, drawn; all, if there are fewer."""
    report, end = Report(), whole(room, TOTAL)
    record = Record(str(room.folder / "calm.calls"))
    experiment = small(room, "calm", TOTAL)
    codes = start(room, experiment, Refusing(experiment["run_dir"], record)).wait()
    report.check(codes == [0] and digest_of(Path(experiment["run_dir"])) == end, "control: counting changed the run")
    calls = [(line["call"], line["path"]) for line in record.read()]
    report.failures += undurable(calls)
    no_fsync = [call for call in calls if not (call[0] == "fsync" and call[1].endswith("manifest.json"))]
    report.check(undurable(no_fsync) != [], "control: a manifest that was never made durable is not seen")
    plan = [(at, "once") for at in range(1, len(calls) + 1)]
    plan += [(at, "save") for at in range(3, len(calls) + 1, 5) if save_of(calls[at - 1][1])]
    plan += [(at, "ever") for at in range(1, len(calls) + 1, 5)]
    if trials < len(plan):
        forms = [[p for p in plan if p[1] == form] for form in ("once", "save", "ever")]
        plan = [room.draw.choice(forms[i % 3]) for i in range(trials)]
    for at, form in plan:
        report.trials += refused(room, report, end, at, form)
    report.note = f"{len(calls)} changes in {TOTAL} saves"
    return report


def undurable(calls: list[tuple[str, str]]) -> list[str]:
    """What was not on the disk for good when its step was shown: each file, then the folder; after it the parent."""
    bad = []
    for i, (call, path) in enumerate(calls):
        if call != "rename" or not save_of(path):
            continue
        before = [c for c in calls[:i] if c[1] == path or c[1].startswith(path + "/")]
        files = {p for c, p in before if c == "open"}
        last = {p: next(c for c, q in reversed(before) if q == p) for p in [*files, path]}
        bad += [f"{p} was not made durable before its step was shown" for p, c in last.items() if c != "fsync"]
        entries = [p for _, p in before if p in files or p == path]
        if len(files) < 4 or entries[-1] != path:
            bad.append(f"{path} was shown before its entries were durable")
        if ("fsync", str(Path(path).parent)) not in calls[i:i + 3]:
            bad.append(f"the rename of {path} was not made durable")
    return bad


def refused(room: Room, report: Report, end: str, at: int, form: str) -> int:
    """One run on a disk that refuses its `at`-th change; how often it did (0 or 1)."""
    code, beside, name = CODES[at % 4], at % 8 < 4, f"{form}{at}"
    experiment = small(room, name, TOTAL, **{"checkpoint.max_failed": MAX_FAILED, "checkpoint.async_save": beside})
    record = Record(str(room.folder / f"{name}.calls"))
    life = start(room, experiment, Refusing(experiment["run_dir"], record, at, code, form))
    (got,), hit = life.wait(), record.read()
    if not hit:                                     # beside training, the last few changes come in another order
        report.check(got == 0 and form == "once", f"{name}: nothing was refused, and it ended with {got}")
        return 0
    run_dir, path = life.run_dir, hit[0]["path"]
    what = f"{errno.errorcode[code]} {form} at change {at} ({hit[0]['call']} {path[len(str(run_dir)):]})"
    said, steps = life.said(), list_steps(run_dir)
    # the first save that failed; one whose folder was shown, but not made durable nor taken back, did too
    shown = hit[0]["call"] == "fsync" and path.endswith("checkpoints")
    failed = int(save_of(path)[-8:]) if save_of(path) else max(steps, default=0) + (not shown)
    if not hit[0]["training"]:                      # before the first step a refusal is told, and nothing is lost
        report.check(got in (0, 7), f"{what}: ended with {got} before it trained: {said[-300:]}")
    elif form == "once":
        report.check(got == 0, f"{what}: ended with {got}: {said[-300:]}")
        report.check(steps == list(range(1, TOTAL + 1)), f"{what}: left the steps {steps}")
    elif form == "save":
        report.check(got == (7 if failed == TOTAL else 0), f"{what}: ended with {got}: {said[-300:]}")
        report.check(steps == [s for s in range(1, TOTAL + 1) if s != failed], f"{what}: left the steps {steps}")
    else:
        report.check(got == (7 if failed <= TOTAL else 0), f"{what}: ended with {got}: {said[-300:]}")
        warned = said.count(f"of {MAX_FAILED} in a row")
        report.check(warned == (MAX_FAILED - 1 if failed < TOTAL else 0), f"{what}: warned {warned} times")
    lines = [line for line in said.splitlines() if line.startswith("error[")]
    report.check(len(lines) == (got != 0) and "Traceback" not in said, f"{what}: said {said[-300:]}")
    report.failures += [f"{what}: {bad}" for bad in torn(run_dir)]
    report.check(leftovers(run_dir, ".tmp-") == [], f"{what}: left {leftovers(run_dir, '.tmp-')}")
    if got == 0:
        report.check(digest_of(run_dir, TOTAL) == end, f"{what}: ended otherwise than the undisturbed run")
    else:
        goes_on(room, report, experiment, end, what)
    return 1


# -- F14 -------------------------------------------------------------------------------------------------------------

EVERY = 3
ALONE = World(0, 1, torch.device("cpu"))


@fault("F14", "a bit of a parameter flips on one of 2 or 3 ranks: found at the next comparison, by name",
       short=2, full=12)
def divergence(room: Room, trials: int) -> Report:
    """Flipped after an update that a comparison or a save follows. An update gives every rank the owner's values, so
    that one is the last chance to see it."""
    report = Report(trials)
    changes = {"runtime.compare_every": EVERY, "checkpoint.every": 4, "data.lanes": 6,
               "batch.tokens_per_step": 32 * 4 * 6}
    for i in range(trials):
        ranks, step = 2 + (i + 1) % 2, (3, 4, 6, 8)[i % 4]
        experiment = room.experiment(str(i), **changes)
        bad, draw = room.draw.randrange(ranks), room.draw.randrange(2**32)
        what = f"{ranks} ranks, flipped on rank {bad} after step {step}"
        told = run_ranks(flipping, ranks, experiment, bad, step, draw)
        report.check(all(t == told[0] for t in told), f"{what}: the ranks were told {told}")
        name, message, trained = told[0]
        pattern = r"error\[peer\] weights: rank (\d) silently holds other values of (\S+) .*owned by rank (\d)\).*"
        found = re.fullmatch(pattern, message)
        if not report.check(found is not None and found[2] == name, f"{what} in {name}: told {message!r}"):
            continue
        assert found is not None
        by_owner = ranks == 2 and int(found[3]) == bad                 # two ranks: the owner's word stands
        report.check(int(found[1]) == bad or by_owner, f"{what} in {name}: blamed rank {found[1]}")
        report.check(trained == step, f"{what}: found after step {trained}")
        steps = list_steps(experiment["run_dir"])
        report.check(steps == [4] * (step > 4) and not torn(Path(experiment["run_dir"])), f"{what}: left {steps}")
    calm = run_ranks(flipping, 2, room.experiment("calm", **changes), 0, 0, 0)
    report.check(calm[0][1:] == ["", 8], f"control: nothing was flipped, and the ranks were told {calm}")
    return report


def flipping(world: World, experiment: dict[str, Any], bad: int, step: int, draw: int) -> list[Any]:
    """Train; after the update of `step` (0: never), one bit changes on rank `bad`. [name, error, steps trained]."""
    from nanopoe.train import loop

    real, found = loop.train_step, {"name": "", "step": 0}

    def hurt(model: Any, optimizer: Any, rows: Any, at: int, *args: Any, **kwargs: Any) -> Any:
        losses = real(model, optimizer, rows, at, *args, **kwargs)
        found["step"] = at + 1
        if at + 1 == step:
            found["name"], param = list(model.named_parameters())[draw % len(list(model.parameters()))]
            if world.rank == bad:
                bits = param.detach().view(-1).view(torch.int32)
                bits[draw % len(bits)] ^= [1 << b for b in range(31)][draw % 31]
        return losses

    loop.train_step = hurt                                                     # type: ignore[assignment]
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            loop.train(experiment_from_dict(experiment, "divergence"), world)
    except PeerError as error:
        return [found["name"], str(error), found["step"]]
    finally:
        loop.train_step = real
    return [found["name"], "", found["step"]]


# -- F15 -------------------------------------------------------------------------------------------------------------

@fault("F15", "saving beside training: a slow disk, killed in flight, a bug in the thread, two at once, time held",
       short=2, full=10)
def beside(room: Room, trials: int) -> Report:
    report, end = Report(trials), whole(room, 6)
    kinds = [killed, broken, killed, broken, queued, killed, broken, held, killed, broken]
    for i, kind in enumerate(kinds[:trials]):
        kind(room, report, end, f"{kind.__name__}{i}")
    return report


def killed(room: Room, report: Report, end: str, name: str) -> None:
    """SIGKILL while the disk is slow: what was shown before is whole, and nothing newer is shown."""
    experiment = small(room, name, 6, **{"checkpoint.every": 2})
    record = Record(str(room.folder / f"{name}.calls"))
    life = start(room, experiment, Slow(experiment["run_dir"], record))
    run_dir = life.run_dir
    until(life, lambda: list_steps(run_dir) == [2] and leftovers(run_dir, ".tmp-step_00000004") != [])
    time.sleep(room.draw.uniform(0.1, 3.5))
    life.send(signal.SIGKILL)
    codes = life.wait()
    report.check(codes == [-signal.SIGKILL] and leftovers(run_dir, ".tmp-step_00000004") != [],
                 f"control: it was not killed in a save: {codes}, {life.said()[-300:]}")
    report.check(list_steps(run_dir) == [2] and torn(run_dir) == [], f"{name}: left {list_steps(run_dir)}")
    goes_on(room, report, experiment, end, name)


def broken(room: Room, report: Report, end: str, name: str) -> None:
    """A bug in the thread ends the run at the step after the one it came in, in one line."""
    experiment = small(room, name, 6, **{"checkpoint.every": 2})
    record = Record(str(room.folder / f"{name}.calls"))
    life = start(room, experiment, Breaking(experiment["run_dir"], record, 2, room.draw.randrange(1, 60)))
    codes, said = life.wait(), life.said()
    lines = [line for line in said.splitlines() if line.startswith("error[")]
    report.check(codes == [1] and len(lines) == 1 and "broken on purpose" in lines[0] and "Traceback" not in said,
                 f"{name}: ended with {codes}, {said[-300:]}")
    (raised,), trained = record.read(), len(losses(life.run_dir))
    report.check(trained <= raised["trained"] + 1, f"{name}: raised in step {raised['trained']}, told in {trained}")
    report.check(list_steps(life.run_dir) == [] and leftovers(life.run_dir, ".") == [], f"{name}: left something")
    goes_on(room, report, experiment, end, name)


def queued(room: Room, report: Report, end: str, name: str) -> None:
    """A save that is due while another is under way waits for it, and both commit."""
    experiment = small(room, name, 6)
    record = Record(str(room.folder / f"{name}.calls"))
    life = start(room, experiment, Slow(experiment["run_dir"], record, 0.3))
    codes = life.wait()
    report.check(codes == [0] and list_steps(life.run_dir) == [1, 2, 3, 4, 5, 6], f"{name}: ended with {codes}")
    report.check(digest_of(life.run_dir) == end and torn(life.run_dir) == [], f"{name}: ended otherwise")
    calls = record.read()
    names = dict.fromkeys(call["save"] for call in calls)
    saves = [[call["time"] for call in calls if call["save"] == save] for save in names]
    early = sum(after[0] < before[-1] for before, after in pairwise(saves))
    report.check(len(saves) == 6 and not early, f"{name}: {len(saves)} saves, {early} began before another ended")
    waits = [float(t) for t in re.findall(r"held=([0-9.]+)", life.said())]
    report.check(waits[0] < 0.3 and min(waits[1:-1]) > 0.3, f"{name}: training was held for {waits} s")


TRIES = 25


def held(room: Room, report: Report, end: str, name: str) -> None:
    """Training is held for a copy: 200 MB, at most 5 % longer than a bare copy of the same tensors. Control: a saver
    that copies a quarter of them twice is found out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    over, of_save = held_over(room, name, again=0)
    slowed, _ = held_over(room, f"{name}slowed", again=3)
    torch.set_num_threads(threads)
    report.check(over <= 0.05, f"{name}: training was held {over:.1%} longer than a copy takes")
    report.check(slowed > 0.05, f"control: a saver that copies a quarter twice seems to hold {slowed:+.1%} longer")
    report.check(of_save < 0.5, f"control: the copy is {of_save:.0%} of a save")
    report.note = f"held {over:+.1%} against a bare copy (slowed on purpose {slowed:+.1%}), {of_save:.0%} of a save"


def held_over(room: Room, name: str, again: int) -> tuple[float, float]:
    """By how much save() holds longer than a bare copy into memory that is there, and its share of a whole save.

    The least of always TRIES tries of each in turn: others use the machine, which only adds to a time. To stop as soon
    as the bar is met would let a slow one pass by luck. `again` of 12 tensors are copied once more, for the control.
    """
    weights = {f"w{i}": torch.randn(2048, 2048) for i in range(12)}
    bare = [torch.empty_like(tensor).fill_(0) for tensor in weights.values()]
    experiment = experiment_from_dict(small(room, name, 4, **{"checkpoint.keep_last": 1}), name)
    copied, taken, total = [], [], []
    with Saver(Target(experiment, ALONE, {"config": "c", "tokenizer": "t"}), weights, list) as saver:
        for step in range(1, TRIES + 1):
            copy_into(bare, weights)                                     # the first after a save is slower: not counted
            begin = time.perf_counter()
            copy_into(bare, weights)
            copied.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            copy_into(bare[:again], weights)
            saver.save({"step": step})
            taken.append(time.perf_counter() - begin)
            saver.close()
            outcome = saver.poll()
            assert outcome is not None and outcome.error is None
            total.append(outcome.total_s)
    return min(taken) / min(copied) - 1, min(taken) / min(total)


def copy_into(bare: list[torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    for to, tensor in zip(bare, weights.values(), strict=False):         # as many as there is memory for
        to.copy_(tensor)


def until(life: Life, holds: Callable[[], bool]) -> None:
    while life.alive and not holds():
        time.sleep(0.005)


# -- F16 -------------------------------------------------------------------------------------------------------------

@fault("F16", "rotation: killed while it deletes, a file that stays, KEEP, several at once: never without a checkpoint",
       short=3, full=12)
def rotation(room: Room, trials: int) -> Report:
    report, end = Report(trials), whole(room, 8)
    for i in range(trials):
        kind = (killed_deleting, undeletable, many_at_once)[i % 3]
        kind(room, report, end, f"{kind.__name__}{i}")
    return report


def rotated(report: Report, life: Life, record: Record, name: str) -> None:
    """Wait for the end; meanwhile, and after each rename and deletion, some checkpoint must be whole."""
    seen = bare = 0
    while life.alive:
        steps = list_steps(life.run_dir)
        good = any(is_whole(folder_of(life.run_dir, step)) for step in reversed(steps))
        seen += good
        if seen and not good and steps == list_steps(life.run_dir):       # else it was looked for while others came
            bare += 1
        time.sleep(0.001)                                                 # the run needs the core too
    report.check(bare == 0, f"{name}: {bare} times there was no whole checkpoint")
    calls = record.read()
    moments = [line for line in calls if "holds" in line]
    report.check(seen > 0 and len(moments) > 0, f"control: {name} was looked at {seen} and {len(moments)} times")
    report.failures += [f"{name}: no checkpoint after {m['call']} of {m['path']}" for m in moments if not m["holds"]]
    report.failures += [f"{name}: {bad}" for bad in torn(life.run_dir)]


def killed_deleting(room: Room, report: Report, end: str, name: str) -> None:
    experiment = small(room, name, 8, **{"checkpoint.keep_last": room.draw.choice([1, 2])})
    kill = 6 * room.draw.randrange(4) + room.draw.randrange(1, 6)        # five files and a folder: some are left
    record = Record(str(room.folder / f"{name}.calls"))
    life = start(room, experiment, Guarded(experiment["run_dir"], record, kill))
    rotated(report, life, record, name)
    codes, run_dir = life.wait(), life.run_dir
    report.check(codes == [-signal.SIGKILL] and leftovers(run_dir, ".trash-") != [], f"control: {name}: {codes}")
    source = max(list_steps(run_dir), default=0)
    goes_on(room, report, experiment, end, name)
    keep = experiment["checkpoint"]["keep_last"]
    wanted = sorted({source, *range(9 - keep, 9)})
    report.check(list_steps(run_dir) == wanted, f"{name}: keeps {list_steps(run_dir)}, not {wanted}")


def undeletable(room: Room, report: Report, end: str, name: str) -> None:
    experiment = small(room, name, 8, **{"checkpoint.keep_last": 2})
    record = Record(str(room.folder / f"{name}.calls"))
    life = start(room, experiment, Undeletable(experiment["run_dir"], record))
    rotated(report, life, record, name)
    codes, said, run_dir = life.wait(), life.said(), life.run_dir
    report.check(codes == [0] and digest_of(run_dir) == end, f"{name}: ended with {codes}: {said[-300:]}")
    warned = "cannot be deleted: Permission denied" in said and "Traceback" not in said
    report.check(warned and list_steps(run_dir) == [7, 8], f"{name}: keeps {list_steps(run_dir)}, said {said[-300:]}")
    report.check(leftovers(run_dir, ".trash-") != [], f"control: {name}: nothing stayed in the trash")
    goes_on(room, report, experiment, end, name)


def many_at_once(room: Room, report: Report, end: str, name: str) -> None:
    """Five steps are there, one of them pinned, when the run goes on with keep_last 2: two of them go together."""
    experiment = small(room, name, 8)
    life = start(room, experiment, Stopped(experiment["run_dir"], 5))
    run_dir, codes = life.run_dir, life.wait()
    report.check(codes == [-signal.SIGKILL] and list_steps(run_dir) == [1, 2, 3, 4, 5], f"control: {name}: {codes}")
    pinned = room.draw.choice([1, 2])
    (folder_of(run_dir, pinned) / "KEEP").touch()
    experiment = small(room, name, 8, **{"checkpoint.keep_last": 2, "checkpoint.keep_every": 3})
    record = Record(str(room.folder / f"{name}.calls"))
    life = start(room, experiment, Guarded(experiment["run_dir"], record))
    rotated(report, life, record, name)
    report.check(life.wait() == [0] and digest_of(run_dir) == end, f"{name}: ended otherwise: {life.said()[-300:]}")
    wanted = [pinned, 3, 5, 6, 7, 8]                  # pinned, multiples of 3, where it went on from, the last two
    report.check(list_steps(run_dir) == wanted, f"{name}: keeps {list_steps(run_dir)}, not {wanted}")
