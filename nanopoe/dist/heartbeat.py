"""The heartbeat: every rank says twice a second that it lives and where it is, and finds out which rank is lost.

A collective that fails says only that some rank is gone, and one that hangs says nothing (NCCL's cannot even be
interrupted). So a thread of each rank writes a record to the store of the rendezvous, on a connection of its own, and
reads those of all others (roll.py has the rules). When a collective fails, `blame` names who is lost. When none fails,
the thread itself tells, keeps the stacks in the rank's log and ends the process with exit code 6. The records also say
how long each rank takes for its part of a step, so that `slow_ranks` (pace.py) costs no collective.

There is no heartbeat on one rank, nor where the ranks meet by a file. torchrun's agent holds the store and outlives its
ranks; without torchrun rank 0 holds it, and its loss is rank 0's. A lost store of an agent stops no run that moves; once
it no longer does, each rank names the host that held the store, and whom it can still look at: those of its machine.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from nanopoe.dist.pace import Pace, Slow, Stopwatch
from nanopoe.dist.roll import BEAT_S, NOTICE_S, Record, Roll, Verdict, machine, process, process_state
from nanopoe.errors import NanopoeError, PeerError, dump_stacks, leave_at_once, report

LEAVE_S = 15.0                   # seconds that a rank which has failed may take to end
ANSWER_S = 5.0                   # in which the store answers
GO_ON = "start again to go on from the last checkpoint"


@dataclass
class Pulse:
    """Where this rank is. Written by the training thread only. A collective sets `entered` first, then `waiting`."""

    step: int = 0
    phase: str = "build"
    moves: int = 0
    entered: int = 0                 # collectives of training's own group
    watch: Stopwatch = field(default_factory=Stopwatch)
    _waiting: bool = False
    _seen: int = 0                   # `entered` when `waiting` was last set

    @property
    def waiting(self) -> bool:
        """Whether it is in a collective with nothing else to do."""
        return self._waiting

    @waiting.setter
    def waiting(self, waits: bool) -> None:
        if waits:
            self.watch.wait(meets=self.entered != self._seen)
        elif self._waiting:
            self.watch.go_on()
        self._waiting, self._seen = waits, self.entered


pulse = Pulse()
_heartbeat: Heartbeat | None = None
_listeners: list[Callable[[PeerError], None]] = []


def mark(phase: str, step: int | None = None) -> None:
    """This rank has come so far: `phase` of `step`, null for the last mark's step. Every call counts as progress."""
    pulse.phase, pulse.step = phase, pulse.step if step is None else step
    pulse.moves += 1
    pulse.watch.mark(phase)


def when_lost(tell: Callable[[PeerError], None]) -> None:
    """Call `tell` before the heartbeat's thread ends this process because a rank is lost; from that thread, once."""
    _listeners.append(tell)


def blame(reason: str) -> PeerError:
    """The error for a collective that failed for `reason`, naming who is lost where a heartbeat tells."""
    if _heartbeat is None:
        return PeerError(f"another rank is gone or hangs: {reason}", f"rank {dist.get_rank()}",
                         f"its own message and log say why; {GO_ON}")
    return _heartbeat.explain(reason)


def slow_ranks() -> tuple[Slow, ...]:
    """Those that have kept the others waiting for a while now; none where there is no heartbeat."""
    return () if _heartbeat is None else _heartbeat.pace.slow


def start(store: dist.Store, rank: int, size: int, timeout_s: float, held_by_rank_0: bool) -> None:
    """Begin to beat: `store` is a connection that nobody else uses. Ended by `stop`."""
    global _heartbeat
    _heartbeat = Heartbeat(store, rank, size, timeout_s, held_by_rank_0)
    _heartbeat.start()


def stop(error: BaseException | None) -> None:
    """This rank leaves, in order or with an error. With an error it must end within LEAVE_S, or it is ended."""
    global _heartbeat
    if _heartbeat is not None:
        _heartbeat.leave(error)
    _heartbeat = None
    _listeners.clear()


class Heartbeat(threading.Thread):
    """The thread. Only it and its calls touch the store; who tells of a lost rank holds `_telling`, so that it is told once."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout_s: float, held_by_rank_0: bool):
        super().__init__(name="heartbeat", daemon=True)
        here, mine = machine(), process(os.getpid())
        self.rank, self.timeout_s = rank, timeout_s
        self.roll = Roll(size, timeout_s, lambda record: process_state(record, here))
        self.pace = Pace(size)
        self._store, self._held_by_rank_0 = store, held_by_rank_0
        self._record = Record(0, 0, "build", 0, 0, False, socket.gethostname(), here if mine else "", os.getpid(),
                              mine[1] if mine else "")
        self._known: list[int] = []                     # ranks whose record is in the store
        self._call: Call | None = None                  # the last one to the store
        self._blind = ""                                # why the store cannot be read
        self._blind_at = 0.0                            # since when, of the roll's clock
        self._telling = threading.Lock()
        self._told: PeerError | None = None
        self._wake, self._published = threading.Event(), threading.Event()
        self._left: tuple[str, tuple[int, ...]] | None = None       # last words, and the ranks they blame
        self._end: tuple[float, int] | None = None      # when this process is ended at the latest, and its exit code

    def run(self) -> None:
        last = time.monotonic()
        while True:
            now = time.monotonic()
            self._beat(now - last)
            last = now
            if self._record.left is not None:
                self._published.set()
                if self._end is None:
                    return
            if self._end is not None and now > self._end[0]:
                leave_at_once(self._end[1])
            self._wake.wait(BEAT_S)
            self._wake.clear()

    def _beat(self, seconds: float) -> None:
        """Say where this rank is, hear the others, and judge unless it is leaving already."""
        blind, records = self._blind, self._exchange()
        self.roll.hear({**records, self.rank: self._record}, seconds)
        self._blind_at = self.roll.clock if self._blind and not blind else self._blind_at
        self.pace.hear([peer.record for peer in self.roll.peers], seconds)
        if self._left is None and self._told is None and self._telling.acquire(blocking=False):
            verdict = (self._gone(NOTICE_S) or self._alone()) if self._blind else self.roll.judge()
            if verdict is not None:
                self._tell_and_end(verdict)
            self._telling.release()

    def _exchange(self) -> dict[int, Record]:
        """Records by rank: what the store says, or what was known last while it does not answer."""
        left, blames = self._left or (None, ())
        self._record = replace(
            self._record, beat=self._record.beat + 1, step=pulse.step, phase=pulse.phase, moves=pulse.moves,
            entered=pulse.entered, waiting=pulse.waiting, left=left, blames=blames, parts=pulse.watch.steps,
            part_seconds=pulse.watch.seconds)
        if self._call is None or self._call.settle():
            self._call = Call(self._talk, self._record.encode())
            self._call.join(ANSWER_S)
        if self._call.is_alive():
            self._blind = f"it does not answer for {ANSWER_S:g} s"
        elif self._call.error is not None:
            self._blind = first_line(self._call.error)
        else:
            self._blind = ""
            return self._call.records
        # the processes of this machine can be looked at all the same
        return {r: p.record for r, p in enumerate(self.roll.peers) if p.record is not None}

    def _talk(self, mine: str) -> dict[int, Record]:
        self._store.set(str(self.rank), mine)
        return self._read()

    def _read(self) -> dict[int, Record]:
        if len(self._known) < len(self.roll.peers):
            self._known = [r for r in range(len(self.roll.peers)) if self._store.check([str(r)])]
        texts = self._store.multi_get([str(r) for r in self._known])
        return {r: Record.decode(text) for r, text in zip(self._known, texts, strict=True)}

    def _alone(self) -> Verdict | None:
        """Without the store only this rank's own state is known: it may not wait for ever."""
        mine = self.roll.peers[self.rank]
        if not pulse.waiting or self.roll.clock - mine.moved < self.timeout_s:
            return None
        verdict = self._without_store()
        waits = f"; this rank waits for the others since step {pulse.step} ({pulse.phase})"
        return replace(verdict, what=verdict.what + waits) if verdict.cut_off else verdict

    def _gone(self, notice_s: float = 0.0) -> Verdict | None:
        """Who of this machine was lost before the store: those that left later did so because of it."""
        return self.roll.gone(notice_s, self._blind_at + BEAT_S)

    def _without_store(self) -> Verdict:
        """Rank 0 if it held the store; else what is known: the host that did, and where rank 0 was."""
        zero = self.roll.peers[0]
        if self._held_by_rank_0:
            stopped = self.roll.stopped((0,))
            lost = self.roll.verdict([0], lambda _: "is stopped (State: T)" if stopped else
                                     f"is {'' if zero.state else 'out of reach or '}gone, and the store of the "
                                     "rendezvous with it")
            assert lost is not None
            return lost
        seen = ""
        if zero.record is not None and zero.state is None:          # not of this machine, where it can be looked at
            at = zero.record
            seen = f"; rank 0 was last seen in step {at.step} ({at.phase}, pid {at.pid} on {at.host})"
        return Verdict((), f"the store of the rendezvous on {os.environ['MASTER_ADDR']} is gone ({self._blind}): that "
                           f"host is lost, or the network to it{seen}", cut_off=True)

    def _tell_and_end(self, verdict: Verdict) -> None:
        """Tell that a rank is lost and end this process, from the thread: the training thread cannot be reached."""
        lost = self._error(verdict)
        limit = threading.Timer(LEAVE_S, leave_at_once, [lost.exit_code])      # a disk may hang as well
        limit.daemon = True
        limit.start()
        self._left = last_words(lost)
        self._exchange()
        report(lost)
        dump_stacks(lost.render())
        for tell in _listeners:
            tell(lost)
        for pid in self.roll.stopped(verdict.ranks):       # it is lost anyway: let it say where it is, and end as well
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGCONT)
        leave_at_once(lost.exit_code)

    def _error(self, verdict: Verdict) -> PeerError:
        lost = PeerError(verdict.what, f"rank {self.rank}", GO_ON)
        lost.ranks, lost.cut_off = verdict.ranks, verdict.cut_off
        return lost

    # -- from the other threads ------------------------------------------------------------------------------------

    def explain(self, reason: str) -> PeerError:
        """Who is lost, after a collective failed; waits until the roll shows it, 2.5 s at most."""
        with self._telling:                             # a telling heartbeat never lets go of it: it ends the process
            if self._told is not None:
                return self._told
            verdict, end = None, time.monotonic() + NOTICE_S + 2 * BEAT_S
            while verdict is None and time.monotonic() < end:
                time.sleep(BEAT_S / 5)
                verdict = self._explain_blind() if self._blind else self.roll.explain()
            if verdict is None and self._blind:
                verdict = self._without_store()
            self._told = self._error(verdict or Verdict((), f"another rank is gone or hangs: {reason}"))
            self._end = time.monotonic() + LEAVE_S, self._told.exit_code
            return self._told

    def _explain_blind(self) -> Verdict | None:
        return self._gone() or (self._without_store() if self._held_by_rank_0 else None)

    def leave(self, error: BaseException | None) -> None:
        """Say that this rank leaves. Without an error the thread ends too."""
        if error is not None:
            self._end = time.monotonic() + LEAVE_S, getattr(error, "exit_code", 1)
        self._left = last_words(error)
        self._wake.set()
        self._published.wait(2 * BEAT_S)


class Call(threading.Thread):
    """One exchange with the store, in a thread of its own: a client blocks for as long as a stopped host does."""

    def __init__(self, talk: Callable[[str], dict[int, Record]], mine: str):
        super().__init__(name="heartbeat-call", daemon=True)
        self._talk, self._mine = talk, mine
        self.records: dict[int, Record] = {}
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.records = self._talk(self._mine)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            self.error = error

    def settle(self) -> bool:
        """Whether another call may follow: this one came back, and the connection holds."""
        return not self.is_alive() and self.error is None


def last_words(error: BaseException | None) -> tuple[str, tuple[int, ...]]:
    """What a rank says of why it leaves, empty if in order, and the ranks it blames for it."""
    if error is None:
        return "", ()
    if isinstance(error, PeerError) and error.ranks:
        return error.what, error.ranks
    text = error.render() if isinstance(error, NanopoeError) else f"{type(error).__name__}: {error}"
    return text.partition("\n")[0], ()


def first_line(error: BaseException) -> str:
    """The first sentence of an error of torch, without its source line and rank."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return re.sub(r"^\[[^]]*\] *", "", text).split(". ")[0]
