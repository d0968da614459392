"""Requests to stop: a signal sets a flag, the loop looks at it and saves. No torch here: it is up before torch is.

SIGTERM, SIGINT and SIGUSR1 (SLURM's --signal=USR1@300) are one and the same request. SIGUSR2 dumps the stacks of all
threads into the rank's log and changes nothing. A request again within 2 s is still the first one: after a Ctrl-C,
which every process of a terminal gets, torchrun sends its ranks a signal too. A later one leaves at once, unsaved.

The signals are taken by a thread, so they are taken too while the main thread waits in a collective.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from nanopoe.errors import leave_at_once

REQUESTS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SAME_S = 2.0


class Signals:
    """Context manager, for the main thread. `name` is the signal that asked to stop, null while none has."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._at = 0.0
        self._before: dict[signal.Signals, Any] = {}
        self._settled = False
        self._stacks: IO[str] | None = None

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.name is not None

    def __enter__(self) -> Self:
        out, self._in = os.pipe()
        os.set_blocking(self._in, False)
        threading.Thread(target=self._listen, args=[out], name="signals", daemon=True).start()
        for number in REQUESTS:
            self._before[number] = signal.signal(number, lambda *_: None)
        self._wakeup = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)     # the numbers go into the pipe
        faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 trace: TracebackType | None) -> None:
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._in, b"\0")                                                     # ends the thread
        os.close(self._in)
        if not self._settled:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            faulthandler.unregister(signal.SIGUSR2)

    def stacks_to(self, log: Path) -> None:
        """SIGUSR2 writes into `log` from now on; where it cannot be opened, on to stderr."""
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            self._stacks = open(log, "a", encoding="utf-8")  # noqa: SIM115  faulthandler needs it open
        except OSError:
            return
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=True)

    def settle(self) -> None:
        """What was to be done is done: requests are ignored to the end of the process, so that its exit code counts."""
        self._settled = True
        for number in REQUESTS:
            signal.signal(number, signal.SIG_IGN)

    def _listen(self, out: int) -> None:
        while (got := os.read(out, 1)) not in (b"", b"\0"):
            if got[0] in REQUESTS and not self._settled:
                self._take(signal.Signals(got[0]))
        os.close(out)

    def _take(self, request: signal.Signals) -> None:
        now = time.monotonic()
        if self.name is None:
            self.name, self._at = request.name, now
            if os.environ.get("LOCAL_RANK", "0") == "0":
                print(f"{request.name}: stops after this step; once more leaves at once", file=sys.stderr, flush=True)
        elif now - self._at > SAME_S:
            print(f"{request.name} after {self.name}: left at once, nothing was saved after the last checkpoint",
                  file=sys.stderr, flush=True)
            leave_at_once(128 + request)
