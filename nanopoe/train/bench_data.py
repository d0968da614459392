"""What the data loader gives: tokens/s of ready batches beside the rate of pure encoding, and how long `next` waits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

import numpy as np

from nanopoe.data.lanes import JOB_DOCUMENTS, Tokenize
from nanopoe.data.loader import Loader, Position, Sizes, summary
from nanopoe.data.packing import PACKINGS, Buffer, Document
from nanopoe.data.shards import Source
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.bench import spread_of

SAMPLE = 4000                   # documents that are encoded and packed for comparison
STALL_S = 0.005


@dataclass(frozen=True)
class DataBench:
    """What is measured: batches of `rows` rows of `seq` targets; `rounds` times `seconds` of each of the two arms."""

    rows: int
    seq: int
    packing: str = "bestfit_split"
    lanes: int = 48
    buffer_documents: int = 128
    threads: int = 2
    seconds: float = 2.0
    rounds: int = 3


def bench_data(open_all: Callable[[], Sequence[Source]], tokenizer: Tokenizer, what: DataBench) -> dict[str, Any]:
    """Measure one loader on one rank; rates in tokens/s, times in seconds.

    tokens_per_s and encode_per_s alternate, each with the same threads; `ratio` is the median of the pairs; `spread`
    has that of each.
    packing_share: CPU time of the packing function alone over the loader's; thread_share: of the thread that packs,
    with mixing, bookkeeping, positions and handing over. wait: the longest `next` once warm with a consumer at half the
    loader's rate; stalls: those over STALL_S; late: the longest that this consumer itself woke up late, which is the
    machine's doing; ready_share: the fewest steps that were ready when one was asked for, of those that are kept.
    buffered_length: mean length of the documents in the buffers over that of all that were read.
    """
    start = time.perf_counter()
    sources = list(open_all())
    sizes = Sizes(what.lanes, what.buffer_documents, what.seq, what.rows, 1, what.rows)
    most = None if PACKINGS[what.packing].keeps_rest else what.seq + 1
    make = Tokenize(tokenizer.encode_array, tokenizer.bos_id, most, 0, 0.0)
    tokens = what.rows * what.seq
    with Loader(sources, make, tokenizer.bos_id, sizes, packing=what.packing, seed=0, threads=what.threads) as loader:
        next(loader)
        first = time.perf_counter() - start
        texts = sample(sources)
        documents = [document for source in sources
                     for document in make(source, [(0, i) for i in spread(source, SAMPLE // len(sources))])]
        warm(loader, what)
        rates, encode_rates, cpu, thread_cpu, loaded = [], [], 0.0, 0.0, 0
        for _ in range(what.rounds):
            settle(loader)
            encode_rates.append(encode_rate(tokenizer, texts, what.threads, what.seconds))
            rate, cpu_s, thread_s, n = load_rate(loader, tokens, what.seconds)
            rates.append(rate)
            cpu, thread_cpu, loaded = cpu + cpu_s, thread_cpu + thread_s, loaded + n
        rate = statistics.median(rates)
        waits, late, ready = paced(loader, 2 * tokens / rate, 2 * what.seconds)
        position = next(loader)[1]
    told = summary(position)
    ratios = [a / b for a, b in zip(rates, encode_rates, strict=True)]
    return {
        "rows": what.rows, "seq": what.seq, "packing": what.packing, "threads": what.threads, "tokens_per_s": rate,
        "encode_per_s": statistics.median(encode_rates),
        "ratio": statistics.median(ratios), "first_batch": first,
        "spread": {"tokens_per_s": spread_of(rates), "encode_per_s": spread_of(encode_rates),
                   "ratio": spread_of(ratios)},
        "packing_share": packing_cost(what, tokenizer.bos_id, documents) / (cpu / loaded),
        "thread_share": thread_cpu / cpu, "wait": max(waits), "late": late, "ready_share": ready,
        "stalls": sum(wait > STALL_S for wait in waits), "steps_paced": len(waits),
        "cropped": told["cropped"], "utilisation": told["utilisation"],
        "epochs": max(source["epochs"] for source in told["sources"].values()),
        "buffered_length": buffered_length(position, sources, make)}


def spread(source: Source, n: int) -> list[int]:
    """At most n ordinals, evenly over a source."""
    return np.linspace(0, source.n_documents - 1, min(n, source.n_documents)).astype(int).tolist()


def sample(sources: Sequence[Source]) -> list[str]:
    return [source.text(i) for source in sources for i in spread(source, SAMPLE // len(sources))]


def warm(loader: Loader, what: DataBench) -> None:
    """Until all buffers are full."""
    while min(lane["counts"]["rows"] for lane in next(loader)[1]["lanes"].values()) < what.buffer_documents:
        pass


def settle(loader: Loader) -> None:
    """Until the loader has made all that it may make ahead, and sleeps."""
    busy = True
    while busy:
        before = thread_seconds(loader)
        time.sleep(0.1)
        busy = thread_seconds(loader) > before


def thread_seconds(loader: Loader) -> float:
    """CPU time of the thread that packs."""
    assert loader.thread is not None
    return time.clock_gettime(time.pthread_getcpuclockid(loader.thread))


def encode_rate(tokenizer: Tokenizer, texts: Sequence[str], threads: int, seconds: float) -> float:
    """Tokens/s of encoding texts that are in memory, for about so many seconds."""
    parts: Iterator[list[str]] = cycle([list(texts[i:i + JOB_DOCUMENTS]) for i in range(0, len(texts), JOB_DOCUMENTS)])
    end = time.perf_counter() + seconds

    def work(parts: list[list[str]]) -> int:
        done = 0
        for part in parts:
            if time.perf_counter() >= end:
                break
            done += sum(len(tokenizer.encode_array(text)) + 1 for text in part)
        return done

    start, tokens = time.perf_counter(), 0
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() < end:
            tokens += sum(pool.map(work, [list(islice(parts, 50)) for _ in range(threads)]))
    return tokens / (time.perf_counter() - start)


def load_rate(loader: Loader, tokens: int, seconds: float) -> tuple[float, float, float, int]:
    """(tokens/s of batches, CPU seconds of the process, those of the packing thread, tokens); first what is ready is
    taken, which was made before."""
    for _ in range(loader.ahead + 1):
        next(loader)
    start, cpu, thread_cpu, made = time.perf_counter(), time.process_time(), thread_seconds(loader), 0
    while time.perf_counter() - start < seconds:
        next(loader)
        made += tokens
    return (made / (time.perf_counter() - start), time.process_time() - cpu, thread_seconds(loader) - thread_cpu, made)


def paced(loader: Loader, interval: float, seconds: float) -> tuple[list[float], float, float]:
    """How long every `next` took with one due every `interval` seconds, how late the latest was asked for, and the
    smallest share of the steps kept ready that was ready when one was asked for."""
    settle(loader)
    waits, late, ready, step = [], 0.0, loader.ahead, None
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        due += interval
        time.sleep(max(0.0, due - time.perf_counter()))
        ready = min(ready, loader.ready)
        del step                                             # freeing a tensor lets go of the interpreter lock
        start = time.perf_counter()
        step = next(loader)
        waits.append(time.perf_counter() - start)
        late = max(late, start - due)
        due = max(due, start)                                # late is late: nothing is caught up in a burst
    return waits, late, ready / loader.ahead


def packing_cost(what: DataBench, bos_id: int, documents: Sequence[Document], rows: int = 4000) -> float:
    """CPU seconds per token of filling rows with documents that are there."""
    fill, buffer, coming = PACKINGS[what.packing].fill, Buffer(), cycle(documents)
    target = what.buffer_documents if PACKINGS[what.packing].chooses else 1

    def refill() -> None:
        while len(buffer) < target:
            buffer.add(next(coming))

    row = np.empty(what.seq + 1, dtype=np.int32)
    fill(row, buffer, refill, bos_id)
    start = time.thread_time()
    for _ in range(rows):
        fill(row, buffer, refill, bos_id)
    return (time.thread_time() - start) / (rows * what.seq)


def buffered_length(position: Position, sources: Sequence[Source], make: Tokenize) -> float:
    """Mean whole length of the documents in the buffers over that of all documents read; 1 if none is."""
    by_name = {source.name: source for source in sources}
    lanes = position["lanes"].values()
    waiting = [ref for lane in lanes for ref in lane["buffer"]]
    lengths = [document.length for name, source in by_name.items()
               for document in make(source, [(epoch, n) for s, epoch, n in waiting if s == name])]
    read = sum(lane["counts"]["read"] for lane in lanes)
    documents = sum(lane["counts"]["documents"] for lane in lanes) + len(waiting)
    return statistics.fmean(lengths) / (read / documents) if lengths else 1.0
