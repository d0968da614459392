"""Run an iterator ahead in a thread. Each item already carries its own state, so depth is nobody's state."""

from __future__ import annotations

import threading
from collections.abc import Generator
from queue import SimpleQueue
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Iterates `items` in a background thread, `depth` items ahead; what the thread raises, `next` raises.

    Two queues without locks in Python, ready items one way and leave to make another the other way: `next` never waits
    for the thread when an item is ready.
    """

    def __init__(self, items: Generator[Item, None, None], depth: int):
        self._ready: SimpleQueue[tuple[Item | None, BaseException | None]] = SimpleQueue()
        self._leave: SimpleQueue[None] = SimpleQueue()
        self._closed = threading.Event()
        self._error: BaseException | None = None
        for _ in range(depth):
            self._leave.put(None)
        # the thread must not hold `self`, or an abandoned object would never be collected
        self.thread = threading.Thread(target=_produce, name="prefetch", daemon=True,
                                       args=(items, self._ready, self._leave, self._closed))
        self.thread.start()

    def __iter__(self) -> Prefetch[Item]:
        return self

    def __next__(self) -> Item:
        if self._closed.is_set():
            raise StopIteration
        if self._error is None:
            item, self._error = self._ready.get()
            if item is not None:
                self._leave.put(None)
                return item
        assert self._error is not None
        raise self._error

    @property
    def ready(self) -> int:
        """Items that `next` would give at once."""
        return self._ready.qsize()

    def close(self) -> None:
        """Stop the thread and wait for it; idempotent."""
        self._end()
        self.thread.join()

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        self._closed.set()
        self._leave.put(None)


def _produce(items: Generator[Item, None, None], ready: SimpleQueue, leave: SimpleQueue,
             closed: threading.Event) -> None:
    try:
        while leave.get() is None and not closed.is_set():
            ready.put((next(items), None))
    except BaseException as error:                            # whatever it is belongs to the consumer
        ready.put((None, error))
    finally:
        items.close()                                         # here, so that what it holds is gone when the thread is
