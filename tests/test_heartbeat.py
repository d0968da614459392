"""Lost and hung ranks: the rules on made-up records, then real processes that are killed, hang, or never come.

The test holds the store as torchrun's agent does, so that two ranks cost a fraction of a second.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe import dist, errors
from nanopoe.dist import World, roll
from nanopoe.dist.roll import Record, Roll, State
from nanopoe.errors import PeerError, entrypoint
from nanopoe.train import signals
from tests.ranks import forked

HERE = Record(1, 12, "forward/backward", 5, 40, False, "node", "m", 77, "1")
WAITS = replace(HERE, waiting=True, entered=41)


# -- the rules --------------------------------------------------------------------------------------------------------

def hear(judge: Roll, seconds: float, *records: Record) -> None:
    """Beats for so long, with new beat numbers but nothing else new."""
    for i in range(round(seconds / roll.BEAT_S)):
        judge.hear({r: replace(record, beat=int(judge.clock * 10) + i) for r, record in enumerate(records)},
                   roll.BEAT_S)


def roll_of(size: int, timeout_s: float, *states: State | None) -> Roll:
    """A roll for ranks whose processes are in `states`."""
    return Roll(size, timeout_s, lambda record: states[record.pid - 77])


def test_a_process_that_is_gone() -> None:
    judge = roll_of(2, 600, "alive", "gone")
    hear(judge, 1.0, HERE, replace(HERE, pid=78))
    assert judge.judge() is None, "others may speak first"
    found = judge.explain()
    assert found is not None and found.ranks == (1,)
    assert found.what == "rank 1 is gone, last seen in step 12 (forward/backward, pid 78 on node)"
    hear(judge, 1.5, HERE, replace(HERE, pid=78))
    assert judge.judge() == found
    hear(judge, 5, HERE, replace(HERE, pid=78, left=""))                           # control: it had left in order
    assert judge.judge() is None
    home = judge.explain()
    assert home is not None and home.what.startswith("rank 1 left in order, before the others")


def test_a_rank_that_left_with_an_error_is_quoted() -> None:
    judge = roll_of(3, 600, "alive", "gone", "alive")
    failed = replace(HERE, pid=78, left="error[data] a bad shard")
    repeats = replace(HERE, pid=79, left="x", blames=(1,))
    hear(judge, 2, HERE, failed, repeats)
    found = judge.judge()
    assert found is not None and found.ranks == (1,), "the one that left for it is not to blame"
    assert found.what.endswith("(forward/backward, pid 78 on node): error[data] a bad shard")
    judge = roll_of(3, 600, "alive", None, "alive")
    hear(judge, 2, HERE, replace(HERE, pid=78), repeats)                           # on another machine: no silence yet
    found = judge.judge()
    assert found is not None and (found.ranks, found.what) == ((1,), "x")


@pytest.mark.parametrize("state, phase, limit", [
    (None, "save", 600), (None, "build", 600), (None, "forward/backward", 30), ("stopped", "forward/backward", 30),
    ("stopped", "save", 30), ("alive", "forward/backward", None)])
def test_silence(state: State | None, phase: str, limit: float | None) -> None:
    """Nothing new of rank 1, while rank 0 beats and moves."""
    judge = roll_of(2, 600, "alive", state)
    mute = replace(HERE, pid=78, phase=phase)
    found, ticks = None, 0
    while found is None and ticks < 2 * 700:
        ticks += 1
        judge.hear({0: replace(HERE, beat=ticks, moves=ticks), 1: mute}, roll.BEAT_S)
        found = judge.judge()
    assert (None if found is None else pytest.approx(ticks / 2 - 0.5)) == limit
    if found is not None:
        assert found.ranks == (1,) and ("is stopped (State: T)" in found.what) == (state == "stopped")


def test_a_hang_is_the_rank_that_the_others_wait_for() -> None:
    def verdict(seconds: float, *records: Record) -> roll.Verdict | None:
        judge = Roll(len(records), 10, lambda record: "alive")
        hear(judge, seconds, *records)
        return judge.judge()

    assert verdict(10, WAITS, HERE, WAITS) is None
    found = verdict(11, WAITS, HERE, WAITS)
    assert found is not None and found.ranks == (1,) and found.what.startswith("rank 1 hangs, last seen in step 12")
    assert verdict(1000, HERE, HERE) is None, "nobody waits: they may compute for long"
    found = verdict(11, replace(HERE, entered=41), HERE)                # NCCL: who waits does not say so, but was there
    assert found is not None and found.ranks == (1,)
    assert verdict(500, replace(WAITS, phase="save"), replace(HERE, phase="save")) is None
    assert verdict(601, replace(WAITS, phase="save"), replace(HERE, phase="save")) is not None
    found = verdict(11, WAITS, WAITS)
    assert found is not None and found.ranks == () and found.what.startswith("all ranks wait for each other")


def test_who_no_longer_beats_may_wait_no_more() -> None:
    """Rank 1 said that it waits and then nothing: it may have gone on, so for a while nobody is to blame."""
    judge = Roll(2, 10, lambda record: "alive")
    hear(judge, 1, WAITS, WAITS)
    found, ticks = None, 0
    while found is None and ticks < 200:
        ticks += 1
        judge.hear({0: replace(WAITS, beat=1000 + ticks), 1: replace(WAITS, beat=0)}, roll.BEAT_S)
        found = judge.judge()
    assert found is not None and found.ranks == (1,) and "no longer beats" in found.what
    assert roll.SILENT_S <= ticks * roll.BEAT_S <= roll.SILENT_S + 1


def test_progress_is_no_hang() -> None:
    judge = Roll(2, 10, lambda record: "alive")
    for i in range(100):
        judge.hear({0: replace(WAITS, beat=i), 1: replace(HERE, beat=i, moves=5 + i // 15)}, roll.BEAT_S)
        assert judge.judge() is None
    for i in range(100, 140):
        judge.hear({0: replace(WAITS, beat=i), 1: replace(HERE, beat=i, moves=99)}, roll.BEAT_S)
    assert judge.judge() is not None                                                # control


def test_a_judge_that_stood_still_counts_it_for_nobody() -> None:
    """A machine is suspended for 1000 s: nobody is lost for that, but 30 s of its own time later a mute rank is."""
    judge = roll_of(2, 600, "alive", None)
    for i in range(12):
        judge.hear({0: replace(HERE, beat=i), 1: replace(HERE, pid=78)}, 1000.0 if i == 5 else roll.BEAT_S)
        assert judge.judge() is None
    hear(judge, 30, HERE)
    assert judge.judge() is not None


def test_processes_of_this_machine() -> None:
    here = roll.machine()
    own = roll.process(os.getpid())
    if not here or own is None:
        pytest.skip("needs /proc")
    mine = replace(HERE, machine=here, pid=os.getpid(), born=own[1])
    child = forked().Process(target=time.sleep, args=[60])
    child.start()
    assert child.pid is not None
    theirs = replace(mine, pid=child.pid, born=(roll.process(child.pid) or ("", ""))[1])
    assert [roll.process_state(r, here) for r in (mine, theirs)] == ["alive", "alive"]
    os.kill(child.pid, signal.SIGSTOP)
    until(lambda: roll.process_state(theirs, here) == "stopped")
    child.kill()
    until(lambda: roll.process_state(theirs, here) == "gone")
    child.join()
    assert roll.process_state(replace(mine, born="0"), here) == "gone", "the same number, another process"
    assert roll.process_state(replace(mine, machine="other"), here) is None
    assert Record.decode(mine.encode().encode()) == mine


def until(true: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- real ranks -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Ended:
    code: int | None
    err: str
    log: str
    seconds: float


def _live(function: Callable[..., Any], rank: int, size: int, port: int, agent: bool, timeout_s: int, folder: str,
          args: tuple[Any, ...]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE=str(agent))
    handle = os.open(f"{folder}/{rank}.err", os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 2)
    sys.argv = ["train"]
    errors.set_error_log(Path(folder) / f"{rank}.log")

    @entrypoint
    def main() -> None:
        with dist.world("cpu", timeout_s) as world:
            function(world, *args)

    main()


def live(function: Callable[..., Any], *args: Any, folder: Path, size: int = 2, start: int | None = None,
         timeout_s: int = 60, agent: bool = True) -> list[Ended]:
    """function(world, *args) on the ranks below `start` of `size`, and how each process ended."""
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not agent:
        del store                                                      # rank 0 is to hold it at that port
    context = forked()
    begin = time.monotonic()
    ranks = [context.Process(target=_live, args=(function, r, size, port, agent, timeout_s, str(folder), args))
             for r in range(size if start is None else start)]
    for p in ranks:
        p.start()
    ended = {}
    while len(ended) < len(ranks) and time.monotonic() < begin + 60:
        for r, p in enumerate(ranks):
            if p.exitcode is not None and r not in ended:
                ended[r] = time.monotonic() - begin
        time.sleep(0.01)
    for p in ranks:
        p.kill()
        p.join()

    def text(name: str) -> str:
        """What was written, without torch's own warnings, which scripts.train turns off before it imports torch."""
        noise = re.compile(r"\[(rank\d+\]:\[)?W|frame #|Exception raised|<omitting|\n")
        lines = (folder / name).read_text().splitlines(True) if (folder / name).exists() else []
        return "".join(line for line in lines if not noise.match(line))

    return [Ended(p.exitcode, text(f"{r}.err"), text(f"{r}.log"), ended.get(r, 99)) for r, p in enumerate(ranks)]


def dies(world: World, how: str, victim: int) -> None:
    """Steps of one all-reduce each; at the fifth, rank `victim` goes."""
    for step in range(1, 9):
        dist.mark("reduce", step)
        if world.rank == victim and step == 5:
            time.sleep(1.1)                                            # a beat tells of it
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "fails":
                raise ValueError("no such thing")
        dist.all_reduce_sum_(torch.ones(2))


@pytest.mark.parametrize("how, victim, agent, words", [
    ("killed", 1, True, r"rank 1 is gone, last seen in step 5 \(reduce, pid "),
    ("killed", 0, True, r"rank 0 is gone, last seen in step 5 \(reduce, pid "),
    ("killed", 0, False, r"rank 0 is gone, .*last seen in step 5 "),
    ("fails", 1, True, r"rank 1 left, last seen in step 5 \(reduce, .*: ValueError: no such thing"),
    ("nothing", 1, True, ""), ("nothing", 0, False, "")])
def test_a_lost_rank_is_named(tmp_path: Path, how: str, victim: int, agent: bool, words: str) -> None:
    ranks = live(dies, how, victim, folder=tmp_path, agent=agent)
    left = ranks[1 - victim]
    if how == "nothing":
        assert [(r.code, r.err) for r in ranks] == [(0, "")] * 2                                    # control
        return
    assert left.code == 6, ranks
    assert left.err.count("\n") == 1 and left.err.startswith(f"error[peer] rank {1 - victim}: rank {victim} "), ranks
    assert re.search(words, left.err), ranks
    assert left.seconds - ranks[victim].seconds < 4


def sleeps(world: World, phase: str, seconds: float, beats: int) -> None:
    """In step 3 rank 1 sleeps while rank 0 waits for it."""
    for step in range(1, 5):
        dist.mark(phase, step)
        if world.rank == 1 and step == 3:
            for _ in range(beats):
                time.sleep(seconds / beats)
                dist.mark(phase)
        dist.all_reduce_sum_(torch.ones(2))


def test_a_hung_rank_is_named_and_all_end(tmp_path: Path) -> None:
    ranks = live(sleeps, "data", 60.0, 1, folder=tmp_path, timeout_s=2)
    for rank, ended in enumerate(ranks):
        assert ended.code == 6 and ended.seconds < 40, ranks
        assert ended.err.startswith(f"error[peer] rank {rank}: rank 1 hangs, last seen in step 3 (data, pid "), ranks
        assert ended.err.count("\n") == 1
    assert "in sleeps" in ranks[1].log and "in all_reduce" in ranks[0].log, "the stacks of both"
    assert "in all_reduce" not in ranks[1].log


@pytest.mark.parametrize("phase, beats", [("data", 7), ("save", 1)])
def test_what_takes_long_is_no_hang(tmp_path: Path, phase: str, beats: int) -> None:
    """3.5 s with a timeout of 2 s: with progress in between, or in a phase that may take long."""
    ranks = live(sleeps, phase, 3.5, beats, folder=tmp_path, timeout_s=2)
    assert [(r.code, r.err) for r in ranks] == [(0, "")] * 2


def stops(world: World, victim: int) -> None:
    for step in range(1, 5):
        dist.mark("data", step)
        if world.rank == victim and step == 3:
            time.sleep(1.1)                                            # a beat tells of it
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.all_reduce_sum_(torch.ones(2))


@pytest.mark.parametrize("victim, agent", [(1, True), (0, False)])
def test_a_stopped_rank_is_named_and_woken(tmp_path: Path, victim: int, agent: bool) -> None:
    """Without an agent rank 0 holds the store, and a client of a stopped store blocks."""
    ranks = live(stops, victim, folder=tmp_path, timeout_s=3, agent=agent)
    other = ranks[1 - victim]
    assert other.code == 6 and other.seconds < 40, ranks
    assert f"rank {victim} is stopped (State: T)" in other.err, ranks
    assert ranks[victim].seconds < 60, "it does not stay behind"


def asked_twice(world: World) -> None:
    """Rank 0 waits in a collective, where no handler of Python's runs, and is asked to stop a second time."""
    signals.SAME_S = 0.2
    with signals.Signals() as asked:
        dist.mark("data", 3)
        if world.rank == 1:
            time.sleep(30)
        threading.Thread(target=lambda: [os.kill(os.getpid(), signal.SIGTERM) or time.sleep(1) for _ in range(2)],
                         daemon=True).start()
        dist.all_reduce_sum_(torch.ones(2))
        assert not asked.asked


def test_a_second_signal_reaches_a_rank_that_waits(tmp_path: Path) -> None:
    ranks = live(asked_twice, folder=tmp_path)
    assert ranks[0].code == 128 + signal.SIGTERM and ranks[0].seconds < 10, ranks
    assert "left at once" in ranks[0].err
    assert ranks[1].code == 6 and ranks[1].seconds - ranks[0].seconds < 4, "told while it waits in no collective"
    assert ranks[1].err.startswith("error[peer] rank 1: rank 0 is gone, last seen in step 3 (data, pid "), ranks


def test_who_does_not_come_is_named(tmp_path: Path) -> None:
    (alone,) = live(dies, "nothing", 0, folder=tmp_path, size=2, start=1, timeout_s=2)
    assert alone.code == 6 and alone.seconds < 8, alone
    assert "rank 1 did not come to 127.0.0.1:" in alone.err and "within 2 s" in alone.err
    assert alone.err.count("\n") == 1, alone


def test_a_rendezvous_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for key, value in dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(store.port)).items():
        monkeypatch.setenv(key, value)
    del store
    start = time.monotonic()
    with pytest.raises(PeerError, match=r"no store of a rendezvous at 127\.0\.0\.1"), dist.world("cpu", 2):
        pass
    assert time.monotonic() - start < 8
