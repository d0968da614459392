"""Threads of the loader: errors arrive, nothing is left behind, what is made ahead changes nothing. Validation rows."""

from __future__ import annotations

import gc
import itertools
import threading
import time
import weakref

import pytest
import torch

from nanopoe.data.lanes import Tokenize
from nanopoe.data.loader import summary
from nanopoe.data.packing import PACKINGS
from nanopoe.data.prefetch import Prefetch
from nanopoe.data.shards import open_source
from nanopoe.data.validation import eval_batches
from nanopoe.errors import DataError
from tests.rows import BOS, converse, encode_bytes, global_steps, loader, numbered, pieces_in, same, two_sources
from tests.rows import write as write_shards


@pytest.fixture
def mixture(tmp_path):
    return two_sources(tmp_path)


# -- prefetch and threads ---------------------------------------------------------------------------------------------

def names() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("prefetch", "documents"))]


def test_an_error_in_a_thread_reaches_the_consumer(tmp_path):
    folder = write_shards(tmp_path / "d", [[["good text"] * 30, ["fine"] * 20 + [None]]])
    told = pytest.raises(DataError, match=r"s0.*row group 1 row 20")
    with loader([open_source("s", folder)], threads=3) as batches, told:
        list(itertools.islice(batches, 20))
    clean = write_shards(tmp_path / "clean", [[["good text"] * 30, ["fine"] * 21]])
    with loader([open_source("s", clean)], threads=3) as batches:             # control
        for _ in range(20):
            next(batches)
        assert len(names()) == 4
    with pytest.raises(StopIteration):
        next(batches)
    assert not names()


def test_an_abandoned_loader_ends_its_threads(mixture):
    batches = loader(mixture(), threads=2)
    next(batches)
    gone = weakref.ref(batches)
    assert names()
    del batches
    gc.collect()
    assert gone() is None
    for _ in range(100):
        if not names():
            return
        time.sleep(0.05)
    raise AssertionError(names())


def test_prefetch_runs_ahead_but_not_away():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    ahead = Prefetch(items(), 2)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    assert 5 <= len(made) <= 7
    short = Prefetch((i for i in [7]), 2)
    assert list(short) == [7]
    assert list(short) == []


def test_a_lane_that_takes_much_at_once_is_read_further_ahead(tmp_path):
    """Documents of 2 tokens in rows of 400: far more than are made ahead at first; the last of an epoch, too."""
    folder = numbered(tmp_path / "d", [[900]])
    steps = global_steps(lambda: [open_source("s", folder)], 12, packing="concat", sequence_len=399, lanes=2,
                         micro_batches=2, threads=2)
    assert summary(steps[-1][1])["documents"] >= 2 * 900
    assert same(steps, global_steps(lambda: [open_source("s", folder)], 12, packing="concat", sequence_len=399, lanes=2,
                                    micro_batches=2, threads=1, world_size=2))


# -- validation rows --------------------------------------------------------------------------------------------------

def validation(folder, tokens=150, sequence_len=15, packing="bestfit_crop", **more):
    options = {"device_batch_size": 3, "buffer_documents": 4, **more}
    most = None if PACKINGS[packing].keeps_rest else sequence_len + 1
    make = converse if packing == "bestfit_pad" else Tokenize(encode_bytes, BOS, most, 0, 0.0)
    return eval_batches([open_source("v", folder)], make, BOS, packing=packing, tokens=tokens,
                        sequence_len=sequence_len, **options)


@pytest.mark.parametrize("packing", PACKINGS)
def test_validation_rows_are_the_same_for_any_world_size(tmp_path, packing):
    folder = numbered(tmp_path / "v", [[40, 40]], lambda n: 3 + n * 7 % 29)
    one = torch.cat(list(validation(folder, packing=packing)))
    assert one.dtype == torch.int32
    assert one.shape == (10, 16)
    for world_size in (2, 3, 4, 12):
        for device_batch in (1, 3):
            ranks = [validation(folder, rank=r, world_size=world_size, device_batch_size=device_batch, packing=packing,
                                threads=1 + r % 2) for r in range(world_size)]
            rows = torch.empty_like(one)
            for rank, part in enumerate(ranks):
                assert (part.rows, part.complete) == (10, True)
                assert all(len(batch) <= device_batch for batch in part)
                if part.batches:
                    rows[rank::world_size] = torch.cat(list(part))
            assert torch.equal(rows, one)
    longer = torch.cat(list(validation(folder, tokens=151, packing=packing)))
    assert torch.equal(longer[:10], one)
    assert len(longer) == 11                                                  # control


@pytest.mark.parametrize("packing", PACKINGS)
def test_validation_is_in_file_order_and_read_once(tmp_path, packing):
    folder = numbered(tmp_path / "v", [[9, 30], [11]])                        # 50 documents of 4 tokens
    part = validation(folder, tokens=10**6, packing=packing)
    seen = [text for batch in part for row in batch.numpy() for text in pieces_in(row)]
    n, rows = (50, 13) if packing == "bestfit_pad" else (48, 12)              # of text the last half row is dropped
    assert seen == [f"{i:03d}" for i in range(n)]
    assert (part.rows, part.complete) == (rows, False)
    assert part.rows_wanted == -(-10**6 // 15)
    if packing != "bestfit_pad":
        with pytest.raises(DataError, match="does not fill one row"):
            validation(folder, sequence_len=300, packing=packing)
