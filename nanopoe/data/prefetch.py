"""Run an iterator ahead in a thread. Each item already carries its own state, so depth is nobody's state."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
_POLL_S = 0.1                   # how often a full queue looks whether it is still wanted


class Prefetch(Generic[Item]):
    """Iterates `items` in a background thread, `depth` items ahead; what the thread raises, `next` raises."""

    def __init__(self, items: Iterator[Item], depth: int):
        self._queue: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._error: BaseException | None = None
        # the thread must not hold `self`, or an abandoned object would never be collected
        self._thread = threading.Thread(target=_produce, args=(items, self._queue, self._closed),
                                        name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Prefetch[Item]:
        return self

    def __next__(self) -> Item:
        if self._closed.is_set():
            raise StopIteration
        if self._error is None:
            item, self._error = self._queue.get()
            if item is not None:
                return item
        assert self._error is not None
        raise self._error

    def close(self) -> None:
        """Stop the thread and wait for it; idempotent."""
        self._closed.set()
        self._thread.join()

    def __del__(self) -> None:
        self._closed.set()


def _produce(items: Iterator[Item], out: queue.Queue, closed: threading.Event) -> None:
    def put(item: Item | None, error: BaseException | None) -> None:
        waiting = True
        while waiting and not closed.is_set():
            try:
                out.put((item, error), timeout=_POLL_S)
                waiting = False
            except queue.Full:
                pass

    try:
        for item in items:
            put(item, None)
            if closed.is_set():
                return
        put(None, StopIteration())
    except BaseException as error:                            # whatever it is belongs to the consumer
        put(None, error)
