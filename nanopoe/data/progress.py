"""How far a long command is: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_LINE_S = 10.0                  # seconds between plain lines


class Show(Protocol):
    def __call__(self, documents: int, size: int, read: int = 0) -> None:
        """Totals so far: documents, bytes of text, bytes of input."""
        ...


@contextmanager
def progress(label: str, text_bytes: int | None = None, input_bytes: int | None = None) -> Iterator[Show]:
    """Yields the function that shows the totals. The time left follows from what is to come: of text, or of input."""
    if sys.stderr.isatty():
        with _bar(label, text_bytes, input_bytes) as show:
            yield show
        return
    start = last = time.monotonic()
    before: tuple[int, float] | None = None              # text and share when it began: an ingest may go on

    def line(documents: int, size: int, read: int = 0) -> None:
        nonlocal last, before
        now, share = time.monotonic(), done_share(size, read, text_bytes, input_bytes)
        before = before or (size, share)
        if now - last < _LINE_S:
            return
        last = now
        rate = (size - before[0]) / 1e6 / (now - start)
        text = f"{label}: {documents:,} documents, {size / 1e6:.1f} MB, {rate:.1f} MB/s"
        if share > before[1]:
            left = (1 - share) * (now - start) / (share - before[1])
            text += f", {share:.0%}, {left / 60:.0f} min left" if left >= 90 else f", {share:.0%}, {left:.0f} s left"
        print(text, file=sys.stderr, flush=True)

    yield line


def done_share(size: int, read: int, text_bytes: int | None, input_bytes: int | None) -> float:
    """0..1: whichever of the two ends comes first; 0 when neither is known."""
    shares = [done / total for done, total in ((size, text_bytes), (read, input_bytes)) if total]
    return min(1.0, max(shares, default=0.0))


@contextmanager
def _bar(label: str, text_bytes: int | None, input_bytes: int | None) -> Iterator[Show]:
    from rich import progress as rich
    from rich.console import Console

    columns = (rich.TextColumn("{task.description}"), rich.BarColumn(), rich.TaskProgressColumn(),
               rich.TextColumn("{task.fields[size]} {task.fields[rate]} {task.fields[documents]:,} documents"),
               rich.TimeElapsedColumn(), rich.TextColumn("left"), rich.TimeRemainingColumn())
    start, before = time.monotonic(), -1
    known = bool(text_bytes or input_bytes)
    with rich.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=1.0 if known else None, documents=0, size="", rate="")

        def show(documents: int, size: int, read: int = 0) -> None:
            nonlocal before
            before = size if before < 0 else before
            rate = (size - before) / 1e6 / max(1e-9, time.monotonic() - start)
            bar.update(task, completed=done_share(size, read, text_bytes, input_bytes), documents=documents,
                       size=f"{size / 1e6:.1f} MB", rate=f"{rate:.1f} MB/s")

        yield show
