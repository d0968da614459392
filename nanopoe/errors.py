"""Errors of people: what went wrong, where, and what to do, shown as one line and turned into an exit code.

`assert` is for our own bugs; everything that a user, a file or a machine can cause is one of these.
Exit codes: 0 done, 2 config, 3 data, 4 checkpoint, 5 numerics, 6 lost peer, 7 storage, 1 a bug of ours. Interrupted:
75 of scripts.train, which has saved and goes on when it is started again, or 128 + the signal's number when a second
signal made it leave without a save; 130 of every other script.
"""

from __future__ import annotations

import faulthandler
import functools
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

PREEMPTED = 75               # sysexits.h: "temporary failure, try again"


class NanopoeError(Exception):
    """Base of the tree. `what` happened, `where` (file, key, tensor, rank), and what to `do` about it.

    `everywhere` is set when every rank raises this error alike, so that one of them can tell it for all.
    """

    kind = "internal"
    exit_code = 1
    everywhere = False

    def __init__(self, what: str, where: str | os.PathLike[str] | None = None, do: str | None = None):
        self.what, self.where, self.do = what, None if where is None else str(where), do
        super().__init__(self.render())

    def render(self) -> str:
        where = f" {self.where}:" if self.where else ""
        do = f"; {self.do}" if self.do else ""
        return one_line(f"error[{self.kind}]{where} {self.what}{do}")


class ConfigError(NanopoeError):
    """A wrong experiment file or command line; `problems` lists every one found, a line each."""

    kind, exit_code = "config", 2

    def __init__(self, what: str, where: str | os.PathLike[str] | None = None, do: str | None = None,
                 problems: Sequence[str] = ()):
        self.problems = list(problems)
        super().__init__(what, where, do)

    def render(self) -> str:
        if not self.problems:
            return super().render()
        head = f"error[{self.kind}] {self.where or self.what}"
        return "\n".join(map(one_line, [head, *(f"  {p}" for p in self.problems)]))


class DataError(NanopoeError):
    """A shard, a document or a tokenizer that cannot be trained on."""

    kind, exit_code = "data", 3


class CheckpointError(NanopoeError):
    """A missing, torn, altered or foreign checkpoint."""

    kind, exit_code = "checkpoint", 4


class NumericsError(NanopoeError):
    """A loss or gradient that is not finite; weights are as before the step."""

    kind, exit_code = "numerics", 5


class PeerError(NanopoeError):
    """Another rank failed, hung or disagrees; `ranks` are those that are known to be lost. `cut_off` is set where the
    store of the rendezvous is gone, so that this rank hears of no other."""

    kind, exit_code = "peer", 6
    ranks: tuple[int, ...] = ()
    cut_off = False


class StorageError(NanopoeError):
    """The disk refused: full, read-only, broken."""

    kind, exit_code = "storage", 7


def typed(error: BaseException) -> NanopoeError | None:
    """`error` as one of ours: itself, or what the system refused; null for a bug."""
    if isinstance(error, OSError):
        return StorageError(error.strerror or str(error), error.filename, "free some space or check the rights")
    return error if isinstance(error, NanopoeError) else None


# What would begin a line, move the cursor, or cannot be written as UTF-8: names of files may hold any of it.
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(text: str) -> str:
    """`text` with line breaks and other control characters as escapes."""
    return CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


Error = TypeVar("Error", bound=NanopoeError)


def everywhere(error: Error) -> Error:
    """Mark `error` as one that every rank raises alike."""
    error.everywhere = True
    return error


def entrypoint(main: Callable[[], int | None]) -> Callable[[], None]:
    """Wrap a script's main: typed errors become one message and their exit code, never a traceback.

    The traceback goes to the file named by `set_error_log` (the rank's log) if there is one; `--debug` on the
    command line shows it as well.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            code = main() or 0
        except NanopoeError as error:
            report(error)
            code = error.exit_code
            if isinstance(error, PeerError):        # the interpreter's end would wait for collectives that never end
                sys.stdout.flush()
                leave_at_once(code)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            code = 130
        except (BrokenPipeError, SystemExit) as left:
            if not isinstance(left, BrokenPipeError) and not isinstance(left.__context__, BrokenPipeError):
                raise                               # of argparse
            # the reader of our output has gone, as in `... | head`; rich makes an exit with 1 of that
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = 0
        except Exception as error:                  # of the system, or a bug of ours: one line, and keep the trace
            report(error)
            ours = typed(error)
            code = 1 if ours is None else ours.exit_code
        sys.stdout.flush()
        sys.exit(code)

    return wrapped


PATIENCE_S = 2.0

_error_log: Path | None = None
_reported: BaseException | None = None


def set_error_log(path: Path | None) -> None:
    """Tracebacks of this process are appended to `path` from now on."""
    global _error_log
    _error_log = path


def report(error: BaseException) -> None:
    """Print `error` as a user should see it (stderr) and keep its traceback in the error log; once for one error.

    What every rank raises is told by the first rank of a host. The others wait: torchrun ends them when the first one
    exits, and who is not ended has an error of its own to tell.
    """
    global _reported
    if error is _reported:
        return
    _reported = error
    trace = "".join(traceback.format_exception(error))
    debug = "--debug" in sys.argv
    hint = "run again with --debug to see the traceback"
    if _error_log is not None:
        try:
            _error_log.parent.mkdir(parents=True, exist_ok=True)
            with open(_error_log, "a", encoding="utf-8", errors="backslashreplace") as log:
                log.write(trace)
            hint = f"traceback in {_error_log}"
        except OSError:
            pass                                    # a full disk must not hide the first error
    if getattr(error, "everywhere", False) and os.environ.get("LOCAL_RANK", "0") != "0":
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)       # torchrun may end us now, without a word
        time.sleep(PATIENCE_S)
    if (ours := typed(error)) is not None:
        line = ours.render()
    else:
        line = one_line(f"error[internal] {type(error).__name__}: {error}; this is a bug, {hint}")
    print(trace if debug else line, file=sys.stderr, flush=True)


def dump_stacks(why: str) -> None:
    """Append the stacks of all threads of this process to the error log, under the line `why`."""
    if _error_log is None:
        return
    try:
        with open(_error_log, "a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"{why}\n")
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)
    except OSError:
        pass                                        # as in report()


def leave_at_once(code: int) -> NoReturn:
    """End this process from any thread, whatever the others wait in; nothing is cleaned up but the terminal."""
    if sys.stdout.isatty():
        os.write(sys.stdout.fileno(), b"\x1b[?25h")             # a live display hides the cursor
    os._exit(code)
