"""Order and packing: an epoch is a permutation, every packing keeps its promise on every token."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.data.lanes import recase
from nanopoe.data.order import (
    ALL_SOURCES,
    FullOrder,
    Part,
    ShuffledOrder,
    key64,
    permutation,
    splitmix64,
    training_order,
    unit,
)
from nanopoe.data.packing import CANDIDATES, PACKINGS, Buffer, Document, Piece, document_ids
from tests.rows import BOS

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=120)


# -- order ------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(sum), st.integers(0, 2**70), st.integers(0, 5))
def test_an_epoch_is_a_permutation(group_rows, seed, epoch):
    for order in (ShuffledOrder(seed, "s", group_rows), FullOrder(seed, "s", sum(group_rows))):
        seen = [order.document(epoch, p) for p in range(len(order))]
        assert sorted(seen) == list(range(sum(group_rows)))


@pytest.mark.parametrize("kind", [lambda *a: ShuffledOrder(*a, [100] * 5), lambda *a: FullOrder(*a, 500)])
def test_order_depends_on_what_it_should(kind):
    def sequence(seed=1, source="a", epoch=0):
        order = kind(seed, source)
        return [order.document(epoch, p) for p in range(500)]

    assert sequence() == sequence()
    for other in (sequence(seed=2), sequence(source="b"), sequence(epoch=1), list(range(500))):
        assert other != sequence()


def test_near_positions_share_a_row_group_of_text_only():
    def groups(order):
        found = [order.document(0, p) // 100 for p in range(500)]
        return [len(set(found[i:i + 100])) for i in range(0, 500, 100)]

    assert groups(ShuffledOrder(1, "a", [100] * 5)) == [1] * 5
    assert groups(FullOrder(1, "a", 500)) == [5] * 5


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 4)), min_size=1, max_size=4), st.integers(0, 3))
def test_the_union_holds_every_conversation_as_often_as_asked(parts, epoch):
    order = training_order(3, ALL_SOURCES, [Part(f"s{i}", [n], repeat) for i, (n, repeat) in enumerate(parts)])
    seen = sorted(order.find(epoch, p) for p in range(len(order)))
    assert seen == [(f"s{i}", epoch * repeat + copy, ordinal) for i, (n, repeat) in enumerate(parts)
                    for copy in range(repeat) for ordinal in range(n)]


def test_the_sources_of_the_union_end_together():
    order = training_order(3, ALL_SOURCES, [Part("large", [300]), Part("small", [20], 5)])
    thirds = [[order.find(0, p)[0] for p in range(i, i + 100)].count("small") for i in range(0, 400, 100)]
    assert sum(thirds) == 100
    assert all(12 <= n <= 38 for n in thirds)                                 # control: one after the other is 0 or 100


def test_hashes_are_frozen():
    """A change here silently re-orders the data of every run that resumes."""
    state = np.array([0, 0x9E3779B97F4A7C15], dtype=np.uint64)                # SplitMix64 from seed 0, as published
    assert [int(v) for v in splitmix64(state)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert key64(1, "documents", "s", 0, 2) == 9107767785342831610        # as of packer version 1
    assert permutation(7, 8) == [3, 4, 0, 7, 5, 1, 2, 6]
    assert unit(7, 3) == 0.033311053770689214
    keys = np.array([0, 5, 2**63, 2**64 - 1], dtype=np.uint64)
    for counter in (0, 1, 10**6):                                            # the one number's form, and the array's
        words = splitmix64(keys + np.uint64(counter))
        assert [unit(int(key), counter) for key in keys] == [int(word >> np.uint64(11)) / 2**53 for word in words]


def test_hash_is_uniform():
    draws = np.array([unit(key64(3, "u"), i) for i in range(4000)])
    assert abs(draws.mean() - 0.5) < 0.02
    assert np.histogram(draws, 10, (0, 1))[0].min() > 320
    assert abs(np.corrcoef(draws[1:], draws[:-1])[0, 1]) < 0.05


# -- packing ----------------------------------------------------------------------------------------------------------

def documents_of(lengths: list[int], row_len: int | None = None) -> list[Document]:
    """Document n is BOS and then n + 1, with its place in the document above: any token tells where it is from."""
    return [Document(np.array([BOS, *(1 + n + 1000 * i for i in range(1, length))], np.int32)[:row_len], length,
                     ("s", 0, n)) for n, length in enumerate(lengths)]


def pack(packing: str, documents: list[Document], row_len: int, buffered: int) -> list[tuple[np.ndarray, list[Piece]]]:
    """All rows that the documents fill, with their pieces."""
    waiting, buffer, rows = list(documents), Buffer(), []

    def refill() -> None:
        while len(buffer) < (buffered if PACKINGS[packing].chooses else 1) and waiting:
            buffer.add(waiting.pop(0))

    while True:
        row = np.full(row_len, 10**9, np.int32)
        pieces = PACKINGS[packing].fill(row, buffer, refill, BOS)
        if pieces is None:
            return rows
        assert (row != 10**9).all()
        rows.append((row, pieces))


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 33), st.integers(1, 20))
def test_crop_takes_prefixes_and_crops_the_last(lengths, row_len, buffered):
    taken_docs = []
    for row, pieces in pack("bestfit_crop", documents_of(lengths, row_len), row_len, buffered):
        assert row[0] == BOS and sum(taken for _, _, taken in pieces) == row_len
        at = 0
        for i, (document, offset, taken) in enumerate(pieces):
            assert offset == 0 and np.array_equal(row[at:at + taken], document.ids[:taken])
            assert taken == document.length or i == len(pieces) - 1
            at += taken
            taken_docs.append(document.ref)
    assert len(set(taken_docs)) == len(taken_docs)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(2, 33), st.integers(1, 20))
def test_split_places_every_token_once(lengths, row_len, buffered):
    documents, parts = documents_of(lengths), {}
    rows = pack("bestfit_split", documents, row_len, buffered)
    for row, pieces in rows:
        at = 0
        for i, (document, offset, taken) in enumerate(pieces):
            assert row[at] == BOS and (offset == 0 or i == 0)                 # a rest comes first, behind a BOS
            at += offset > 0
            assert np.array_equal(row[at:at + taken], document.ids[offset:offset + taken]) and taken > 0
            assert offset == sum(n for _, n in parts.get(document.ref, []))   # in order, nothing twice, no hole
            parts.setdefault(document.ref, []).append((offset, taken))
            at += taken
        assert at == row_len
    for before, after in pairwise(rows):                                      # what is cut goes on at once
        document, offset, taken = before[1][-1]
        if offset + taken < document.length:
            assert after[1][0][:2] == (document, offset + taken)
    placed = sum(n for pieces in parts.values() for _, n in pieces)
    again = sum(piece.offset > 0 for _, pieces in rows for piece in pieces)
    assert placed + again == len(rows) * row_len                              # nothing is padded
    unplaced = sum(lengths) - placed                # a partly filled last row is dropped; all else is in some row
    assert unplaced < row_len


@settings(max_examples=100, deadline=None)
@given(LENGTHS, st.integers(2, 33))
def test_concat_is_one_stream(lengths, row_len):
    documents = documents_of(lengths)
    rows = pack("concat", documents, row_len, 1)
    stream = np.concatenate([document.ids for document in documents])
    assert len(rows) == len(stream) // row_len
    if rows:
        assert np.array_equal(np.concatenate([row for row, _ in rows]), stream[:len(rows) * row_len])
    assert all(sum(piece.taken for piece in pieces) == row_len for _, pieces in rows)


@settings(max_examples=150, deadline=None)
@given(LENGTHS, st.integers(2, 33), st.integers(1, 20))
def test_pad_keeps_conversations_whole(lengths, row_len, buffered):
    documents, seen = documents_of(lengths, row_len), []
    for row, pieces in pack("bestfit_pad", documents, row_len, buffered):
        at = 0
        for document, offset, taken in pieces:
            assert offset == 0 and taken == min(document.length, row_len)
            assert np.array_equal(row[at:at + taken], document.ids)
            at += taken
            seen.append(document.ref[2])
        assert (row[at:] == ~BOS).all()
    assert sorted(seen) == list(range(len(lengths)))                          # all of them: the last row is padded


@pytest.mark.parametrize("packing", PACKINGS)
def test_rows_depend_on_the_order_of_documents_alone(packing):
    lengths = [2 + 7 * n % 29 for n in range(80)]

    def rows(lengths):
        return [row.tolist() for row, _ in pack(packing, documents_of(lengths), 16, 8)]

    assert rows(lengths) == rows(lengths)
    assert rows(lengths) != rows(lengths[::-1])                               # control


def test_pad_fills_with_the_largest_that_fits():
    rows = pack("bestfit_pad", documents_of([5, 9, 4, 7, 3, 12], 12), 12, 6)
    assert [[piece.document.length for piece in pieces] for _, pieces in rows] == [[5, 7], [9, 3], [4], [12]]


# -- the buffer -------------------------------------------------------------------------------------------------------

def naive(lengths: list[int], space: int, of: int) -> int | None:
    """Index by arrival of the largest of the oldest `of` that fits; the oldest of equals."""
    fitting = [n for n in lengths[:of] if n <= space]
    return lengths.index(max(fitting)) if fitting else None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=40), st.lists(st.integers(1, 12), min_size=40, max_size=40),
       st.sampled_from(["take_largest", "take_largest_of_old"]))
def test_the_buffer_chooses_like_the_naive_rule(lengths, spaces, rule):
    buffer, mirror = Buffer(), []
    for document in documents_of(lengths):
        buffer.add(document)
        mirror.append(document)
    for i, space in enumerate(spaces[:len(lengths)]):
        of = len(mirror) if rule == "take_largest" else max(1, len(mirror) // CANDIDATES)
        expected = naive([d.length for d in mirror], space, of)
        taken = getattr(buffer, rule)(space)
        if expected is None:
            assert taken is None
            shortest = min(range(len(mirror)), key=lambda n: mirror[n].length)
            at, taken = (0, buffer.take_oldest()) if i % 2 else (shortest, buffer.take_shortest())
            assert taken is mirror.pop(at)
        else:
            assert taken is mirror.pop(expected)
        assert list(buffer) == mirror and len(buffer) == len(mirror)
        assert buffer.refs() == [document.ref for document in mirror]


def buffered_mean(lengths: np.ndarray, row_len: int) -> float:
    """Mean whole length in a buffer of 128 over the rows of bestfit_split, over that of all documents."""
    buffer, documents, means = Buffer(), iter(documents_of(lengths.tolist())), []

    def refill() -> None:
        while len(buffer) < 128:
            buffer.add(next(documents))

    row = np.empty(row_len, np.int32)
    for _ in range(int(lengths.sum() * 0.8) // row_len):
        PACKINGS["bestfit_split"].fill(row, buffer, refill, BOS)
        means.append(np.mean([document.length for document in buffer]))
    return float(np.mean(means[len(means) // 5:]) / lengths.mean())


@pytest.mark.parametrize("row_len", [257, 513])
def test_long_documents_do_not_pile_up(row_len, monkeypatch):
    draw = np.random.default_rng(0)
    lengths = np.clip(np.exp(draw.normal(5.5, 1, 3000)), 2, 4000).astype(int)
    assert abs(buffered_mean(lengths, row_len) - 1) < 0.1
    monkeypatch.setattr("nanopoe.data.packing.CANDIDATES", 1)
    assert buffered_mean(lengths, row_len) > 1.3             # control: what choosing among all would do


# -- boundaries -------------------------------------------------------------------------------------------------------

def test_document_ids_number_the_pieces():
    inputs = torch.tensor([[BOS, 5, 6, BOS, 7, BOS, BOS], [8, 9, BOS, 4, 4, 4, BOS], [3, 3, 3, 3, 3, 3, 3]])
    assert document_ids(inputs, BOS).tolist() == [[0, 0, 0, 1, 1, 2, 3], [0, 0, 1, 1, 1, 1, 2], [0] * 7]


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(2, 33), st.sampled_from(list(PACKINGS)))
def test_document_ids_agree_with_the_pieces(lengths, row_len, packing):
    limit = None if PACKINGS[packing].keeps_rest else row_len
    for row, pieces in pack(packing, documents_of(lengths, limit), row_len, 6):
        ids = torch.from_numpy(np.where(row < 0, ~row, row))[None]
        again = packing == "bestfit_split"
        sizes = [piece.taken + (again and piece.offset > 0) for piece in pieces]
        expected = np.repeat(np.arange(len(sizes)), sizes)
        padding = np.arange(len(sizes), len(sizes) + row_len - len(expected))       # each by itself
        assert document_ids(ids, BOS)[0].tolist() == [*expected, *padding]


# -- case augmentation ------------------------------------------------------------------------------------------------

def test_case_shares():
    kinds = [recase("ab Cd", unit(9, i), 0.3) for i in range(6000)]
    for text, share in (("ab Cd", 0.7), ("ab cd", 0.18), ("AB CD", 0.06), ("Ab Cd", 0.06)):
        assert kinds.count(text) / 6000 == pytest.approx(share, abs=0.02 if share > 0.1 else 0.01)
    assert {recase("ab Cd", unit(9, i), 0.0) for i in range(100)} == {"ab Cd"}
