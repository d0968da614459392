"""How far a long command is: a rich bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE_S = 10.0                  # seconds between plain lines


@contextmanager
def progress(label: str, total_bytes: int | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yields `show(documents, bytes)`, to be called with the totals so far."""
    if sys.stderr.isatty():
        with _bar(label, total_bytes) as show:
            yield show
        return
    last = time.monotonic()

    def line(documents: int, size: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_S:
            last = time.monotonic()
            print(f"{label}: {documents:,} documents, {size / 1e6:.1f} MB", file=sys.stderr, flush=True)

    yield line


@contextmanager
def _bar(label: str, total_bytes: int | None) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
               TextColumn("{task.fields[documents]:,} documents"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=total_bytes, documents=0)
        yield lambda documents, size: bar.update(task, completed=size, documents=documents)
