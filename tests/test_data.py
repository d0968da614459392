"""Shards, order, packing, lanes, loader, validation rows: exactly once, the same for any world size, exact resume."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.config import Plan
from nanopoe.config.schema import DataConfig, SourceConfig
from nanopoe.data.lanes import recase
from nanopoe.data.loader import Loader, merge_positions, open_sources, train_loader
from nanopoe.data.order import ShuffledOrder, key64, permutation, splitmix64, unit
from nanopoe.data.packing import Buffer, Document, fill_row
from nanopoe.data.prefetch import Prefetch
from nanopoe.data.shards import Source, open_source
from nanopoe.data.validation import eval_batches
from nanopoe.errors import ConfigError, DataError
from nanopoe.tokenizer import Tokenizer

BOS = 0


def encode_bytes(texts, threads=1):
    """A byte-level encoder: ids 1..256, so that a row can be read back."""
    return [[byte + 1 for byte in text.encode()] for text in texts]


def write(folder: Path, shards: list[list[list[str]]]) -> Path:
    """Shards of row groups of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, groups in enumerate(shards):
        with pq.ParquetWriter(folder / f"s{i}.parquet", pa.schema([("text", pa.string())]), compression="zstd",
                              write_page_checksum=True) as writer:
            for group in groups:
                writer.write_table(pa.table({"text": pa.array(group, pa.string())}))
    return folder


def numbered(folder: Path, shape: list[list[int]], length=lambda n: 3) -> Path:
    """Documents "000", "001", ... padded with their last digit to `length(n)` characters."""
    number = iter(range(10**6))

    def text() -> str:
        n = next(number)
        return f"{n:03d}".ljust(length(n), f"{n % 10}")
    return write(folder, [[[text() for _ in range(rows)] for rows in groups] for groups in shape])


def documents_in(row: np.ndarray) -> list[str]:
    """The pieces of a row as text."""
    assert row[0] == BOS
    return [bytes((np.array(part) - 1).astype(np.uint8)).decode()
            for part in np.split(row, np.flatnonzero(row == BOS)[1:]) for part in [part[1:]]]


def loader(sources, *, world_size=1, rank=0, lanes=12, buffer_documents=4, sequence_len=15, micro_batches=12,
           device_batch_size=1, seed=1, **more) -> Loader:
    return Loader(sources, encode_bytes, BOS, seed=seed, lanes=lanes, buffer_documents=buffer_documents,
                  sequence_len=sequence_len, rows_per_step=micro_batches * device_batch_size,
                  micro_batches=micro_batches, device_batch_size=device_batch_size, rank=rank, world_size=world_size,
                  **{"case_aug_prob": 0.0, **more})


def global_steps(make_sources, steps: int, *, world_size=1, **options):
    """[(rows (B, T+1) in global order, merged position)] of `steps` steps on `world_size` loaders."""
    ranks = [loader(make_sources(), world_size=world_size, rank=rank, **options) for rank in range(world_size)]
    out = []
    try:
        for _ in range(steps):
            parts, positions = zip(*(next(r) for r in ranks), strict=True)
            rows = torch.stack(parts, dim=1)                     # (micro_step, rank, slot, T+1): g = micro*W + rank
            rows = rows.flatten(0, 1).transpose(0, 1).flatten(0, 1)       # (slot, g) -> j = slot*M + g
            out.append((rows.numpy().copy(), json.loads(json.dumps(merge_positions(positions)))))
    finally:
        for r in ranks:
            r.close()
    return out


def same(a, b) -> bool:
    return all(np.array_equal(x[0], y[0]) and x[1] == y[1] for x, y in zip(a, b, strict=True))


# -- order ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum), st.integers(0, 2**70), st.integers(0, 5))
def test_an_epoch_is_a_permutation(group_rows, seed, epoch):
    order = ShuffledOrder(seed, "s", group_rows)
    seen = [order.document(epoch, p) for p in range(len(order))]
    assert sorted(seen) == list(range(sum(group_rows)))


def test_order_depends_on_what_it_should():
    def sequence(seed=1, source="a", epoch=0):
        order = ShuffledOrder(seed, source, [100] * 5)
        return [order.document(epoch, p) for p in range(500)]

    assert sequence() == sequence()
    for other in (sequence(seed=2), sequence(source="b"), sequence(epoch=1), list(range(500))):
        assert other != sequence()
    groups = [[d // 100 for d in sequence()[i:i + 100]] for i in range(0, 500, 100)]
    assert all(len(set(group)) == 1 for group in groups)                     # near positions share a row group


def test_hashes_are_frozen():
    """A change here silently re-orders the data of every run that resumes."""
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)                # SplitMix64 from seed 0, as published
    assert [int(v) for v in splitmix64(state)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert key64(1, "documents", "s", 0, 2) == 9107767785342831610        # as of packer version 1
    assert permutation(7, 8) == [3, 4, 0, 7, 5, 1, 2, 6]
    assert unit(7, 3) == 0.033311053770689214


def test_hash_is_uniform():
    draws = np.array([unit(key64(3, "u"), i) for i in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert np.histogram(draws, 10, (0, 1))[0].min() > 320
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.05


# -- packing ----------------------------------------------------------------------------------------------------------

def naive_choice(lengths: list[int], space: int) -> int:
    """Index by arrival of the largest that fits, else of the shortest; the oldest of equals."""
    fitting = [n for n in lengths if n <= space]
    return lengths.index(max(fitting) if fitting else min(lengths))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=30, max_size=120), st.integers(2, 33), st.integers(1, 20))
def test_rows_are_full_and_pieces_are_prefixes(lengths, row_len, buffered):
    waiting = [Document(np.array([BOS, *[n + 1] * (length - 1)][:row_len], np.int32), length, ["s", 0, n])
               for n, length in enumerate(lengths)]
    buffer, mirror, taken_docs = Buffer(), [], []

    def refill():
        while len(buffer) < buffered and waiting:
            mirror.append(waiting[0])
            buffer.add(waiting.pop(0))

    while True:
        row = np.full(row_len, -1, np.int32)
        pieces = fill_row(row, buffer, refill)
        if pieces is None:
            break
        assert row[0] == BOS
        assert (row >= 0).all()
        assert sum(taken for _, taken in pieces) == row_len
        at = 0
        for i, (document, taken) in enumerate(pieces):
            assert np.array_equal(row[at:at + taken], document.ids[:taken])
            assert taken == document.length or i == len(pieces) - 1           # only the last piece is cropped
            at += taken
            taken_docs.append(document.ref[2])
    assert len(set(taken_docs)) == len(taken_docs)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.lists(st.integers(1, 12), min_size=20, max_size=20))
def test_the_buffer_chooses_like_the_naive_rule(lengths, spaces):
    buffer, mirror = Buffer(), []
    for n, length in enumerate(lengths):
        document = Document(np.zeros(1, np.int32), length, ["s", 0, n])
        buffer.add(document)
        mirror.append(document)
    for space in spaces[:len(lengths)]:
        expected = mirror.pop(naive_choice([d.length for d in mirror], space))
        assert buffer.take(space) is expected
        assert list(buffer) == mirror
    first_in = Buffer()                                                       # control: not simply first in, first out
    for n, length in enumerate((2, 5, 4)):
        first_in.add(Document(np.zeros(1, np.int32), length, ["s", 0, n]))
    assert first_in.take(4).length == 4


# -- every document once, any number of ranks, exact resume -----------------------------------------------------------

@pytest.mark.parametrize("shape, lanes", [([[50]], 12), ([[7, 1, 30], [12]], 12), ([[5] * 9], 6), ([[13], [13]], 1)])
def test_every_document_once_an_epoch(tmp_path, shape, lanes):
    folder = numbered(tmp_path / "d", shape)
    n = sum(map(sum, shape))
    per_lane: dict[int, list[str]] = {lane: [] for lane in range(lanes)}
    steps = -(-3 * n // (4 * lanes)) + 3                       # documents of 4 tokens, rows of 16: never cropped
    for rows, _ in global_steps(lambda: [open_source("s", folder)], steps, lanes=lanes, micro_batches=lanes):
        for lane, row in enumerate(rows):
            per_lane[lane] += documents_in(row)
    epochs = []
    for epoch in range(2):
        epochs.append([])
        for lane, seen in per_lane.items():
            own = len(range(lane, n, lanes))
            epochs[-1] += seen[epoch * own:(epoch + 1) * own]
        assert sorted(epochs[-1]) == [f"{i:03d}" for i in range(n)]
    assert epochs[0] != epochs[1]                              # control: it is shuffled, and anew


@pytest.fixture
def mixture(tmp_path):
    """Two sources of documents of all lengths, one of them code."""
    prose = numbered(tmp_path / "prose", [[20, 9], [14]], lambda n: 3 + n * 7 % 29)
    code = numbered(tmp_path / "code", [[6, 6, 3]], lambda n: 3 + n * 5 % 17)
    return lambda: [open_source("prose", prose, weight=2.0), open_source("code", code, weight=1.0, code=True)]


def test_global_batches_do_not_depend_on_the_world_size(mixture):
    one = global_steps(mixture, 6, case_aug_prob=0.5)
    for world_size in (2, 3, 4, 6, 12):
        assert same(global_steps(mixture, 6, world_size=world_size, case_aug_prob=0.5), one)
    assert not same(global_steps(mixture, 6, seed=2, case_aug_prob=0.5), one)         # controls
    assert not same(global_steps(mixture, 6, lanes=6, case_aug_prob=0.5), one)


def test_global_batches_do_not_depend_on_the_device_batch(mixture):
    one = global_steps(mixture, 4, micro_batches=24)
    for micro_batches, world_size in ((12, 1), (12, 3), (6, 2), (2, 2), (1, 1)):
        other = global_steps(mixture, 4, micro_batches=micro_batches, device_batch_size=24 // micro_batches,
                             world_size=world_size)
        assert same(other, one)
    assert not same(global_steps(mixture, 4, micro_batches=12), one[:4])              # control: another global batch


def test_resume_is_exact_at_every_step_for_any_world_size(mixture):
    steps = 14                                                 # code has 15 documents: many of its epochs go by
    whole = global_steps(mixture, steps, case_aug_prob=0.5, micro_batches=12)
    epochs = {c["cursors"]["code"][0] for _, p in whole for c in p["lanes"].values()}
    assert max(epochs) >= 3
    for k, world_size in ((1, 1), (3, 2), (5, 3), (8, 4), (11, 6), (12, 12)):
        rest = global_steps(mixture, steps - k, world_size=world_size, case_aug_prob=0.5, start_step=k,
                            position=whole[k - 1][1])
        assert same(rest, whole[k:])
    damaged = json.loads(json.dumps(whole[4][1]))
    for lane in damaged["lanes"].values():
        lane["buffer"] = []                                    # control: what a resume without buffers would train on
    assert not same(global_steps(mixture, 3, case_aug_prob=0.5, start_step=5, position=damaged), whole[5:8])


def test_rows_that_do_not_come_round_to_the_lanes(mixture):
    """5 rows a step on 12 lanes: a row's lane depends on the step."""
    whole = global_steps(mixture, 9, micro_batches=5)
    rest = global_steps(mixture, 5, micro_batches=5, start_step=4, position=whole[3][1])
    assert same(rest, whole[4:])
    assert not np.array_equal(rest[0][0], whole[0][0])


@pytest.mark.parametrize("weights, share", [((3.0, 1.0), 0.75), ((1.0, 1.0), 0.5), ((1.0, 9.0), 0.1)])
def test_the_mixture_holds_for_the_tokens_trained_on(tmp_path, weights, share):
    a = write(tmp_path / "a", [[["a" * (3 + n * 7 % 60) for n in range(40)]]])
    b = write(tmp_path / "b", [[["b" * (3 + n * 5 % 9) for n in range(40)]]])
    names = [open_source(name, folder, weight=w) for name, folder, w in zip("ab", (a, b), weights, strict=True)]
    text = Counter()
    for rows, _ in global_steps(lambda: names, 150):
        for row in rows:
            for piece in documents_in(row):
                if piece:                                      # a piece of BOS alone says not whose it is
                    text[piece[0]] += len(piece) + 1
    assert text["a"] / text.total() == pytest.approx(share, abs=0.02)


def test_position_of_other_data_is_refused(mixture, tmp_path):
    position = global_steps(mixture, 2)[1][1]
    global_steps(mixture, 1, start_step=2, position=position)                 # control
    cases = [({"seed": 2}, "seed"), ({"lanes": 6, "micro_batches": 6}, "lanes"), ({"sequence_len": 16}, "sequence_len"),
             ({"start_step": 3}, "step")]
    for change, word in cases:
        with pytest.raises(DataError, match=word):
            global_steps(mixture, 1, **{"start_step": 2, "position": position, **change})
    with pytest.raises(DataError, match="sources"):
        global_steps(lambda: mixture()[:1], 1, start_step=2, position=position)
    with pytest.raises(DataError, match="no data position"):
        global_steps(mixture, 1, start_step=2)
    for damage in ({}, {"lanes": 3}, {"lanes": {}}, {"lanes": {str(i): {"cursors": 1} for i in range(12)}}):
        with pytest.raises(DataError, match="data position"):
            global_steps(mixture, 1, start_step=2, position={**position, **damage} if damage else {})
    position["lanes"]["3"]["buffer"][0][2] = 10**9
    with pytest.raises(DataError, match="no count"):
        global_steps(mixture, 1, start_step=2, position=position)


def test_data_changed_on_purpose_goes_on_where_it_can(mixture, tmp_path):
    """A kept source continues exactly, a new one begins, documents of a dropped one are gone, shares count anew."""
    whole = global_steps(mixture, 5)
    position = whole[4][1]
    other = open_source("other", write(tmp_path / "other", [[["z" * (5 + n % 9) for n in range(60)]]]), weight=1.0)

    def changed():
        return [mixture()[0], other]

    rest = global_steps(changed, 12, start_step=5, position=position, may_change=["sources"])
    letters = Counter(piece[0] for rows, _ in rest for row in rows for piece in documents_in(row) if piece)
    code_then = {ref[2] for lane in position["lanes"].values() for ref in lane["buffer"] if ref[0] == "code"}
    assert code_then, "the test means something only with documents of the dropped source in the buffers"
    assert letters["z"] > 0
    for lane in rest[-1][1]["lanes"].values():
        assert set(lane["cursors"]) == {"prose", "other"} and not any(ref[0] == "code" for ref in lane["buffer"])
    for number, lane in position["lanes"].items():
        before, after = lane["cursors"]["prose"], rest[0][1]["lanes"][number]["cursors"]["prose"]
        assert before <= after <= [before[0] + 1, 99]                        # it goes on, it does not begin again
    again = global_steps(changed, 4, start_step=17, position=rest[-1][1], may_change=["sources"])
    assert same(again, global_steps(changed, 4, start_step=17, position=rest[-1][1]))     # once changed, it is exact
    assert same(global_steps(mixture, 2, start_step=5, position=position, may_change=["sources", "seed"]),
                global_steps(mixture, 2, start_step=5, position=position))                # control: nothing changed
    with pytest.raises(DataError, match="sources"):
        global_steps(changed, 1, start_step=5, position=position, may_change=["seed"])
    recounted = global_steps(mixture, 1, start_step=5, position=position, recount=True)
    sums = [sum(lane["tokens"].values()) for p in (position, recounted[0][1]) for lane in p["lanes"].values()]
    assert max(sums[12:]) < min(sums[:12])
    other_seed = global_steps(mixture, 2, start_step=5, position=position, seed=9, may_change=["seed"])
    assert other_seed[0][1]["fingerprint"]["seed"] == 9


def test_sizes_that_do_not_divide_are_refused(mixture):
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6, 12"):
        loader(mixture(), world_size=5)
    with pytest.raises(DataError, match="15 documents cannot feed 16 lanes"):
        loader(mixture(), lanes=16, micro_batches=16)
    loader(mixture(), lanes=15, micro_batches=15).close()                     # control


def test_train_loader_of_an_experiment(mixture, tmp_path):
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    sources = tuple(SourceConfig(name=name, path=str(tmp_path / name)) for name in ("prose", "code"))
    data = DataConfig(train=sources, val=sources, packing="bestfit_crop", lanes=6, buffer_documents=4,
                      case_aug_prob=0.0)
    plan = Plan(world_size=2, rows_per_step=12, micro_batches=6, micro_steps=3, device_batch_size=2, sequence_len=15,
                tokens_per_step=180, total_steps=10, total_tokens=1800)
    parts = []
    for rank in range(2):
        with train_loader(data, tokenizer, plan, seed=3, rank=rank, threads=2) as batches:
            rows, position = next(batches)
        assert rows.shape == (3, 2, 16)
        assert rows.dtype == torch.int32
        assert (rows[..., 0] == tokenizer.bos_id).all()
        assert position["fingerprint"]["tokenizer"] == tokenizer.digest
        parts.append(rows)
    assert not torch.equal(*parts)                                            # control: ranks read other lanes
    with pytest.raises(DataError, match="same name"):
        open_sources([sources[0], sources[0]])


# -- prefetch ---------------------------------------------------------------------------------------------------------

def test_an_error_in_the_thread_reaches_the_consumer(tmp_path):
    folder = write(tmp_path / "d", [[["good text"] * 30, ["fine"] * 20 + [None]]])
    with loader([open_source("s", folder)]) as batches, pytest.raises(DataError, match=r"s0.*row group 1 row 20"):
        list(itertools.islice(batches, 20))
    clean = write(tmp_path / "clean", [[["good text"] * 30, ["fine"] * 21]])
    with loader([open_source("s", clean)]) as batches:                        # control
        for _ in range(20):
            next(batches)
        assert any(t.name == "prefetch" for t in threading.enumerate())
    with pytest.raises(StopIteration):
        next(batches)
    assert not any(t.name == "prefetch" for t in threading.enumerate())


def test_prefetch_runs_ahead_but_not_away():
    made = []

    def items():
        for i in range(100):
            made.append(i)
            yield i

    ahead = Prefetch(items(), 2)
    assert [next(ahead) for _ in range(5)] == [0, 1, 2, 3, 4]
    ahead.close()
    assert 5 <= len(made) <= 9
    short = Prefetch(iter([7]), 2)
    assert list(short) == [7]
    assert list(short) == []


# -- case augmentation ------------------------------------------------------------------------------------------------

def test_case_shares():
    kinds = Counter(recase("ab Cd", unit(9, i), 0.3) for i in range(6000))
    share = {text: n / 6000 for text, n in kinds.items()}
    assert share["ab Cd"] == pytest.approx(0.7, abs=0.02)
    assert share["ab cd"] == pytest.approx(0.18, abs=0.02)
    assert share["AB CD"] == pytest.approx(0.06, abs=0.01)
    assert share["Ab Cd"] == pytest.approx(0.06, abs=0.01)
    assert {recase("ab Cd", unit(9, i), 0.0) for i in range(100)} == {"ab Cd"}


def test_case_augmentation_is_of_prose_and_deterministic(tmp_path):
    folder = write(tmp_path / "d", [[["xY Zw"] * 200]])

    def cased(prob, seed=1, code=False):
        steps = global_steps(lambda: [open_source("s", folder, code=code)], 5, case_aug_prob=prob, sequence_len=11,
                             seed=seed)
        return [text for rows, _ in steps for row in rows for text in documents_in(row)]

    assert cased(0.5) == cased(0.5)
    assert cased(0.5) != cased(0.5, seed=2)
    assert sum(text != "xY Zw" for text in cased(0.5)) / len(cased(0.5)) == pytest.approx(0.5, abs=0.15)
    assert set(cased(0.0)) == {"xY Zw"}
    assert set(cased(1.0, code=True)) == {"xY Zw"}
    assert "xY Zw" not in cased(1.0)                                          # control for the line above


# -- validation rows --------------------------------------------------------------------------------------------------

def validation(folder, tokens=150, sequence_len=15, **more):
    options = {"device_batch_size": 3, "buffer_documents": 4, **more}
    return eval_batches([open_source("v", folder)], encode_bytes, BOS, tokens=tokens, sequence_len=sequence_len,
                        **options)


def test_validation_rows_are_the_same_for_any_world_size(tmp_path):
    folder = numbered(tmp_path / "v", [[40, 40]], lambda n: 3 + n * 7 % 29)
    one = torch.cat(list(validation(folder)))
    assert one.dtype == torch.int32
    assert one.shape == (10, 16)
    for world_size in (2, 3, 4, 12):
        for device_batch in (1, 3):
            ranks = [validation(folder, rank=r, world_size=world_size, device_batch_size=device_batch)
                     for r in range(world_size)]
            rows = torch.empty_like(one)
            for rank, part in enumerate(ranks):
                assert (part.rows, part.complete) == (10, True)
                assert all(len(batch) <= device_batch for batch in part)
                if part.batches:
                    rows[rank::world_size] = torch.cat(list(part))
            assert torch.equal(rows, one)
    longer = torch.cat(list(validation(folder, tokens=151)))
    assert torch.equal(longer[:10], one)
    assert len(longer) == 11                                                  # control


def test_validation_is_in_file_order_and_read_once(tmp_path):
    folder = numbered(tmp_path / "v", [[9, 30], [11]])                        # 50 documents of 4 tokens
    part = validation(folder, tokens=10**6)
    seen = [text for batch in part for row in batch.numpy() for text in documents_in(row)]
    assert seen == [f"{i:03d}" for i in range(48)]                            # the last half row is not padded
    assert (part.rows, part.complete) == (12, False)
    assert part.rows_wanted == -(-10**6 // 15)
    with pytest.raises(DataError, match="does not fill one row"):
        validation(folder, sequence_len=300)


# -- bad files --------------------------------------------------------------------------------------------------------

def _table(folder: Path, array, column="text", **options) -> None:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({column: array}), folder / "s0.parquet", **options)


def _truncate(folder: Path) -> None:
    path = folder / "s0.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def _invalid_utf8(folder: Path) -> None:
    raw = pa.array([b"good", b"bad \xff\xfe", b"good"], pa.binary())
    _table(folder, pa.Array.from_buffers(pa.string(), 3, raw.buffers()))


BAD = {
    "missing folder": (lambda f: (f / "s0.parquet").unlink() or f.rmdir(), "no such folder"),
    "empty folder": (lambda f: (f / "s0.parquet").unlink(), r"no file matches \*.parquet"),
    "truncated": (_truncate, "s0.parquet.*cannot be read as parquet"),
    "no parquet": (lambda f: (f / "s0.parquet").write_bytes(b"hello"), "s0.parquet.*cannot be read as parquet"),
    "empty file": (lambda f: (f / "s0.parquet").write_bytes(b""), "s0.parquet.*cannot be read as parquet"),
    "wrong column": (lambda f: _table(f, pa.array(["a"]), "content"), "s0.parquet.*no column 'text'.*content"),
    "numbers": (lambda f: _table(f, pa.array([1, 2])), "s0.parquet.*int64, not string"),
    "binary": (lambda f: _table(f, pa.array([b"a"])), "s0.parquet.*binary, not string"),
    "no rows": (lambda f: _table(f, pa.array([], pa.string())), "s0.parquet.*no documents"),
    "null": (lambda f: _table(f, pa.array(["a", "b", None])), "s0.parquet row group 0 row 2: null document"),
    "empty document": (lambda f: _table(f, pa.array(["a", ""])), "s0.parquet row group 0 row 1: empty document"),
    "second group": (lambda f: _table(f, pa.array(["a"] * 5 + [None]), row_group_size=2), "row group 2 row 1: null"),
    "invalid UTF-8": (_invalid_utf8, "s0.parquet row group 0 row 1: not UTF-8 .byte 4"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    folder = write(tmp_path / "d", [[["good"] * 3]])
    assert list(open_source("s", folder).texts()) == ["good"] * 3             # control
    damage, words = BAD[name]
    damage(folder)
    for read in (lambda s: list(s.texts()), lambda s: [s.text(i) for i in range(s.n_documents)]):
        with pytest.raises(DataError, match=words) as error:
            read(open_source("s", folder))
        assert "\n" not in str(error.value)


def test_a_file_changed_under_a_run(tmp_path):
    folder = write(tmp_path / "d", [[["one"] * 3], [["two"] * 3]])
    source, digest = open_source("s", folder), open_source("s", folder).digest
    assert source.text(0) == "one"                                            # control
    _table(folder, pa.array(["three"] * 500))
    (folder / "s0.parquet").rename(folder / "s1.parquet")
    with pytest.raises(DataError, match=r"s1.parquet row group 0: changed since it was opened"):
        source.text(4)
    assert open_source("s", folder).digest != digest


def mutants(folder: Path, texts: list[str], checksum: bool) -> Counter:
    """What becomes of 150 files with one flipped bit: "right", "wrong" or "refused"."""
    folder.mkdir()
    _table(folder, pa.array(texts), row_group_size=100, compression="zstd", use_dictionary=False,
           write_page_checksum=checksum)
    path = folder / "s0.parquet"
    whole, draw, outcome = path.read_bytes(), random.Random(1), Counter()
    for _ in range(150):
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1:])
        try:
            outcome["right" if list(open_source("s", folder).texts()) == texts else "wrong"] += 1
        except DataError as error:
            outcome["refused"] += 1
            outcome["named"] += "s0.parquet" in str(error)
    return outcome


def test_mutated_files_are_right_or_refused(tmp_path):
    draw = random.Random(2)
    texts = ["".join(draw.choices("abcdefgh \n", k=100)) for _ in range(200)]
    with_checksum = mutants(tmp_path / "a", texts, checksum=True)
    assert with_checksum["wrong"] == 0
    assert with_checksum["named"] == with_checksum["refused"] > 100
    assert mutants(tmp_path / "b", texts, checksum=False)["wrong"] > 0         # control: what the checksum is for


BOMB = """
import sys, pyarrow as pa, pyarrow.parquet as pq
from nanopoe.data.shards import Source, open_shard
from nanopoe.errors import DataError
from pathlib import Path
path = Path(sys.argv[1])
if sys.argv[2] == "guarded":
    try:
        Source("s", [open_shard(path)], group_bytes=32 << 20).text(0)
    except DataError as error:
        assert "decodes to more than 32 MB" in str(error), error
    else:
        raise SystemExit("not refused")
else:
    pq.ParquetFile(path).read_row_group(0)
print(pa.default_memory_pool().max_memory() >> 20)
"""


def test_a_dictionary_bomb_takes_no_memory(tmp_path):
    path = tmp_path / "bomb.parquet"
    big = pa.DictionaryArray.from_arrays(pa.array([0] * 500, pa.int32()), pa.array(["x" * 1_000_000]))
    pq.write_table(pa.table({"text": big}), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 2000

    def peak_mb(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", BOMB, str(path), how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak_mb("guarded") < 3 * 32
    assert peak_mb("plain") > 400                                             # control: it is a bomb


def test_the_cache_of_row_groups_is_bounded(tmp_path):
    folder = write(tmp_path / "d", [[[chr(97 + g) * 1000] * 10 for g in range(8)]])
    shards = open_source("s", folder).shards
    small = Source("s", shards, cache_bytes=25_000)                           # two groups of about 10 kB
    order = random.Random(2).choices(range(80), k=200)
    assert [small.text(i)[0] for i in order] == [chr(97 + i // 10) for i in order]
    assert len(small._cache) == 2
    large = Source("s", shards)
    _ = [large.text(i) for i in order]
    assert len(large._cache) == 8                                             # control


def test_corpus_loads(corpus):
    source = open_source("c", corpus, "shard_0000[0-5].parquet")
    assert source.n_documents == sum(s.rows for s in source.shards) > 10_000
    assert len(source.text(source.n_documents - 1)) >= 200
