"""Lanes, loader, validation rows: exactly once, the same for any number of ranks and threads, exact resume."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch

from nanopoe.config import Plan
from nanopoe.config.schema import DataConfig, SourceConfig
from nanopoe.data import loader as loader_module
from nanopoe.data.loader import open_sources, summary, train_loader
from nanopoe.data.packing import PACKINGS
from nanopoe.data.shards import open_source
from nanopoe.errors import ConfigError, DataError
from nanopoe.tokenizer import SPECIALS, Tokenizer
from tests.rows import BOS, TEXT, global_steps, loader, numbered, pieces_in, same, two_sources
from tests.rows import write as write_shards


@pytest.fixture
def mixture(tmp_path):
    return two_sources(tmp_path)


# -- every document once, any number of ranks, exact resume -----------------------------------------------------------

@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("shape, lanes", [([[50]], 12), ([[7, 1, 30], [12]], 12), ([[5] * 9], 6), ([[13], [13]], 1)])
def test_every_document_once_an_epoch(tmp_path, shape, lanes, packing):
    """Documents of 4 tokens, rows of 16: never cut."""
    folder = numbered(tmp_path / "d", shape)
    n = sum(map(sum, shape))
    per_lane: dict[int, list[str]] = {lane: [] for lane in range(lanes)}
    steps = -(-3 * n // (4 * lanes)) + 4
    for rows, _ in global_steps(lambda: [open_source("s", folder)], steps, lanes=lanes, micro_batches=lanes,
                                packing=packing):
        for lane, row in enumerate(rows):
            per_lane[lane] += pieces_in(row)
    epochs = []
    for epoch in range(2):
        epochs.append([])
        for lane, seen in per_lane.items():
            own = len(range(lane, n, lanes))
            epochs[-1] += seen[epoch * own:(epoch + 1) * own]
        assert sorted(epochs[-1]) == [f"{i:03d}" for i in range(n)]
    assert epochs[0] != epochs[1]                              # control: it is shuffled, and anew


def test_a_conversation_comes_as_often_as_its_source_is_repeated(tmp_path):
    """Conversations of 4 tokens, rows of 16."""
    small = numbered(tmp_path / "small", [[9]])
    large = write_shards(tmp_path / "large", [[[f"x{i:02d}" for i in range(30)]]])
    sources = [open_source("small", small, repeat=3), open_source("large", large)]
    seen = [text for rows, _ in global_steps(lambda: sources, 60, packing="bestfit_pad", lanes=1, micro_batches=1)
            for row in rows for text in pieces_in(row)]
    epoch = 9 * 3 + 30
    for start in range(0, len(seen) - epoch + 1, epoch):
        counts = Counter(seen[start:start + epoch])
        assert set(counts.values()) == {1, 3} and len(counts) == 39
        assert all(n == (1 if text[0] == "x" else 3) for text, n in counts.items())
    assert len(seen) >= 4 * epoch and seen[:epoch] != seen[epoch:2 * epoch]


@pytest.mark.parametrize("packing", PACKINGS)
def test_global_batches_do_not_depend_on_who_makes_them(mixture, packing, monkeypatch):
    options = {"packing": packing, "case_aug_prob": 0.5}
    one = global_steps(mixture, 6, **options)
    for world_size in (2, 3, 4, 6, 12):
        assert same(global_steps(mixture, 6, world_size=world_size, threads=world_size % 4 + 1, **options), one)
    for jobs, tokens in ((1, 1), (50, 1 << 10)):
        monkeypatch.setattr("nanopoe.data.lanes.JOB_DOCUMENTS", jobs)
        monkeypatch.setattr(loader_module, "PREFETCH_TOKENS", tokens)
        assert same(global_steps(mixture, 6, world_size=2, threads=3, **options), one)
    assert not same(global_steps(mixture, 6, seed=2, **options), one)         # controls
    assert not same(global_steps(mixture, 6, lanes=6, **options), one)


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_walk_over_world_sizes_is_one_run(mixture, packing):
    """1 > 2 > 3 > 4 > 6 > 1 ranks, through epochs of the smaller source: what 1 rank makes without a stop."""
    options = {"packing": packing, "case_aug_prob": 0.5}
    whole = global_steps(mixture, 18, **options)
    epochs = {lane["cursors"][s][0] for _, p in whole for lane in p["lanes"].values() for s in lane["cursors"]}
    assert max(epochs) >= (2 if packing == "bestfit_pad" else 3)
    step, position = 0, None
    for world_size in (1, 2, 3, 4, 6, 1):
        part = global_steps(mixture, 3, world_size=world_size, start_step=step, position=position, **options)
        assert same(part, whole[step:step + 3])
        step, position = step + 3, part[-1][1]
    for key, value in (("buffer", []), ("rest", None)):        # control: what a resume without it would train on
        damaged = json.loads(json.dumps(whole[8][1]))
        had = [lane[key] for lane in damaged["lanes"].values() if lane[key]]
        for lane in damaged["lanes"].values():
            lane[key] = value
        assert bool(had) != same(global_steps(mixture, 6, start_step=9, position=damaged, **options), whole[9:15])


def test_global_batches_do_not_depend_on_the_device_batch(mixture):
    one = global_steps(mixture, 4, micro_batches=24)
    for micro_batches, world_size in ((12, 1), (12, 3), (6, 2), (2, 2), (1, 1)):
        other = global_steps(mixture, 4, micro_batches=micro_batches, device_batch_size=24 // micro_batches,
                             world_size=world_size)
        assert same(other, one)
    assert not same(global_steps(mixture, 4, micro_batches=12), one[:4])              # control: another global batch


@pytest.mark.parametrize("packing", PACKINGS)
def test_resume_is_exact_at_every_step(mixture, packing):
    whole = global_steps(mixture, 12, packing=packing)
    for k in range(1, 12):
        assert same(global_steps(mixture, 12 - k, packing=packing, start_step=k, position=whole[k - 1][1]), whole[k:])


def test_rows_that_do_not_come_round_to_the_lanes(mixture):
    """5 rows a step on 12 lanes: a row's lane depends on the step."""
    whole = global_steps(mixture, 9, micro_batches=5)
    rest = global_steps(mixture, 5, micro_batches=5, start_step=4, position=whole[3][1])
    assert same(rest, whole[4:])
    assert not np.array_equal(rest[0][0], whole[0][0])


@pytest.mark.parametrize("packing", TEXT)
@pytest.mark.parametrize("weights, share", [((3.0, 1.0), 0.75), ((1.0, 1.0), 0.5), ((1.0, 9.0), 0.1)])
def test_the_mixture_holds_for_the_tokens_trained_on(tmp_path, weights, share, packing):
    a = write_shards(tmp_path / "a", [[["a" * (3 + n * 7 % 60) for n in range(40)]]])
    b = write_shards(tmp_path / "b", [[["b" * (3 + n * 5 % 9) for n in range(40)]]])
    names = [open_source(name, folder, weight=w) for name, folder, w in zip("ab", (a, b), weights, strict=True)]
    steps = global_steps(lambda: names, 150, packing=packing)
    text = Counter("".join(piece for rows, _ in steps for row in rows for piece in pieces_in(row)))
    told = summary(steps[-1][1])["sources"]
    assert text["a"] / text.total() == pytest.approx(share, abs=0.05)         # without BOS, of which b has more
    assert told["a"]["share"] == pytest.approx(share, abs=0.02)
    assert told["a"]["weight"] == pytest.approx(share) and told["a"]["weight"] + told["b"]["weight"] == 1


# -- what a position tells --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("packing", PACKINGS)
def test_counts_add_up_and_survive_a_resume(mixture, packing):
    steps = global_steps(mixture, 20, packing=packing)
    part = global_steps(mixture, 10, packing=packing, start_step=10, position=steps[9][1], world_size=3)
    assert summary(part[-1][1]) == summary(steps[-1][1]) != summary(steps[9][1])
    rows = np.concatenate([rows for rows, _ in steps])
    lanes = steps[-1][1]["lanes"].values()
    counts = {key: sum(lane["counts"][key] for lane in lanes) for key in next(iter(lanes))["counts"]}
    told = summary(steps[-1][1])
    assert counts["rows"] == told["rows"] == len(rows) == 240
    chats = packing == "bestfit_pad"
    padded = int((rows == ~BOS).sum()) - counts["documents"] if chats else 0
    assert counts["padded"] == padded and (padded > 0) == chats
    assert told["utilisation"] == pytest.approx(1 - padded / rows.size)
    starts = counts["documents"] if packing == "concat" else counts["pieces"]
    assert int((np.where(rows < 0, ~rows, rows) == BOS).sum()) == starts + padded
    again = starts - counts["documents"]
    assert counts["placed"] == rows.size - padded - again
    assert counts["placed"] == sum(n for lane in lanes for n in lane["placed"].values())
    assert (told["cropped"] > 0) == (counts["cropped"] > 0) == (packing in ("bestfit_crop", "bestfit_pad"))
    sources = {source.name: source for source in mixture()}
    waiting = [ref for lane in lanes for ref in lane["buffer"]]
    lengths = sum(len(sources[name].text(n)) + 1 for name, _, n in waiting)
    rests = [lane["rest"] for lane in lanes if lane["rest"]]
    lengths += sum(len(sources[name].text(n)) + 1 - placed for name, _, n, placed in rests)
    assert counts["read"] == counts["placed"] + counts["cropped"] + lengths


def test_epochs_count_what_was_read(tmp_path):
    """24 documents of 4 tokens in rows of 16 on 12 lanes: with concat half an epoch is in 3 documents a lane."""
    folder = numbered(tmp_path / "d", [[48]])
    steps = global_steps(lambda: [open_source("s", folder)], 3, packing="concat")
    assert [summary(p)["sources"]["s"]["epochs"] for _, p in steps] == [1, 2, 3]
    chats = [open_source("s", folder, repeat=2)]
    told = summary(global_steps(lambda: chats, 1, packing="bestfit_pad", buffer_documents=4)[0][1])["sources"]["s"]
    assert told["epochs"] == pytest.approx((4 + 3) * 12 / 48) and told["weight"] == told["share"] == 1


def test_position_of_other_data_is_refused(mixture, tmp_path):
    position = global_steps(mixture, 2)[1][1]
    global_steps(mixture, 1, start_step=2, position=position)                 # control
    cases = [({"seed": 2}, "seed"), ({"lanes": 6, "micro_batches": 6}, "lanes"), ({"sequence_len": 16}, "sequence_len"),
             ({"start_step": 3}, "step"), ({"packing": "concat"}, "packing")]
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
    position = global_steps(mixture, 2, packing="concat")[1][1]
    lane = next(lane for lane in position["lanes"].values() if lane["rest"])
    lane["rest"][3] = 10**6
    with pytest.raises(DataError, match="longer than its document"):
        global_steps(mixture, 1, packing="concat", start_step=2, position=position)
    lane["rest"][3] = 0
    with pytest.raises(DataError, match="no count"):
        global_steps(mixture, 1, packing="concat", start_step=2, position=position)


@pytest.mark.parametrize("packing", TEXT)
def test_data_changed_on_purpose_goes_on_where_it_can(mixture, tmp_path, packing):
    """A kept source continues exactly, a new one begins, documents of a dropped one are gone, shares count anew."""
    def code_waits(position):
        return any(ref[0] == "code" for lane in position["lanes"].values()
                   for ref in [*lane["buffer"], *filter(None, [lane["rest"]])])

    position = next(p for _, p in global_steps(mixture, 12, packing=packing) if p["step"] > 4 and code_waits(p))
    step = position["step"]
    other = open_source("other", write_shards(tmp_path / "other", [[["z" * (5 + n % 9) for n in range(60)]]]))

    def changed():
        return [mixture()[0], other]

    def go_on(steps, sources=mixture, position=position, start_step=step, **more):
        return global_steps(sources, steps, start_step=start_step, position=position, packing=packing, **more)

    rest = go_on(12, changed, may_change=["sources"])
    assert any("z" in piece for rows, _ in rest for row in rows for piece in pieces_in(row))
    for lane in rest[-1][1]["lanes"].values():
        assert set(lane["cursors"]) == {"prose", "other"} == set(lane["placed"])
    assert not code_waits(rest[0][1])
    for number, lane in position["lanes"].items():
        before, after = lane["cursors"]["prose"], rest[0][1]["lanes"][number]["cursors"]["prose"]
        assert before <= after <= [before[0] + 1, 99]                        # it goes on, it does not begin again
    last = {"position": rest[-1][1], "start_step": step + 12}
    assert same(go_on(4, changed, may_change=["sources"], **last), go_on(4, changed, **last))     # then it is exact
    assert same(go_on(2, may_change=["sources", "seed"]), go_on(2))                           # control: nothing changed
    with pytest.raises(DataError, match="sources"):
        go_on(1, changed, may_change=["seed"])
    recounted = go_on(1, recount=True)
    sums = [sum(lane["placed"].values()) for p in (position, recounted[0][1]) for lane in p["lanes"].values()]
    assert max(sums[12:]) < min(sums[:12])
    go_on(1, position=recounted[0][1], start_step=step + 1)                   # and can be gone on from
    assert go_on(2, seed=9, may_change=["seed"])[0][1]["fingerprint"]["seed"] == 9


def test_conversations_of_other_sources_begin_anew(mixture):
    position = global_steps(mixture, 5, packing="bestfit_pad")[4][1]
    for changed in (lambda: mixture()[:1], lambda: [mixture()[0], open_source(
            "code", mixture()[1].shards[0].path.parent, repeat=2)]):
        with pytest.raises(DataError, match="sources"):
            global_steps(changed, 1, packing="bestfit_pad", start_step=5, position=position)
        rest = global_steps(changed, 3, packing="bestfit_pad", start_step=5, position=position, may_change=["sources"])
        assert {tuple(c) for lane in rest[0][1]["lanes"].values() for c in lane["cursors"].values()} < {
            (0, i) for i in range(40)}


def test_sizes_that_do_not_divide_are_refused(mixture):
    with pytest.raises(ConfigError, match="1, 2, 3, 4, 6, 12"):
        loader(mixture(), world_size=5)
    with pytest.raises(DataError, match="15 documents cannot feed 16 lanes"):
        loader(mixture(), lanes=16, micro_batches=16)
    loader(mixture(), lanes=15, micro_batches=15).close()                     # control


@pytest.mark.parametrize("packing", TEXT)
def test_train_loader_of_an_experiment(mixture, tmp_path, packing):
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    sources = tuple(SourceConfig(name=name, path=str(tmp_path / name)) for name in ("prose", "code"))
    data = DataConfig(train=sources, val=sources, packing=packing, lanes=6, buffer_documents=4, case_aug_prob=0.0)
    parts = []
    for rank in range(2):
        with train_loader(data, tokenizer, PLAN, seed=3, rank=rank, threads=2) as batches:
            rows, position = next(batches)
        assert rows.shape == (3, 2, 16) and rows.is_contiguous() and rows.dtype == torch.int32
        assert (rows[0, 0, 0] == tokenizer.bos_id).all()
        assert position["fingerprint"]["tokenizer"] == tokenizer.digest
        parts.append(rows)
    assert not torch.equal(*parts)                                            # control: ranks read other lanes
    with pytest.raises(DataError, match="same name"):
        open_sources([sources[0], sources[0]])


PLAN = Plan(world_size=2, rows_per_step=12, micro_batches=6, micro_steps=3, device_batch_size=2, sequence_len=15,
            tokens_per_step=180, total_steps=10, total_tokens=1800)


def test_train_loader_of_conversations(tmp_path):
    tokenizer = Tokenizer({bytes([i]): i for i in range(256)})
    lines = [json.dumps({"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]})
             for i in range(40)]
    write_shards(tmp_path / "chat", [[lines]], "conversation")
    sources = (SourceConfig(name="chat", path=str(tmp_path / "chat"), repeat=2),)
    data = DataConfig(kind="conversations", train=sources, val=sources, packing="bestfit_pad", lanes=6,
                      buffer_documents=4, case_aug_prob=0.0, json_layout_prob=0.5)
    with train_loader(data, tokenizer, PLAN, seed=3, rank=0, threads=2) as batches:
        rows, position = next(batches)
    assert (rows[..., 0] == ~tokenizer.bos_id).all() and (rows >= 0).any()
    ids = rows[0, 0]
    targets = bytes(int(i) for i in ids if 0 <= i < 256).decode()
    assert targets.count("!") >= 1 and "?" not in targets                     # the assistant's words, not the user's
    assert (ids == tokenizer.special_ids[SPECIALS[4]]).sum() == targets.count("!")
    assert summary(position)["padded"] > 0
    with pytest.raises(DataError, match="no column 'text'"):                  # control: it is another column
        open_sources(sources)


def test_case_augmentation_is_of_prose_and_deterministic(tmp_path):
    folder = write_shards(tmp_path / "d", [[["xY Zw"] * 200]])

    def cased(prob, seed=1, code=False):
        steps = global_steps(lambda: [open_source("s", folder, code=code)], 5, case_aug_prob=prob, sequence_len=11,
                             seed=seed)
        return [text for rows, _ in steps for row in rows for text in pieces_in(row)]

    assert cased(0.5) == cased(0.5)
    assert cased(0.5) != cased(0.5, seed=2)
    assert sum(text != "xY Zw" for text in cased(0.5)) / len(cased(0.5)) == pytest.approx(0.5, abs=0.15)
    assert set(cased(0.0)) == {"xY Zw"}
    assert set(cased(1.0, code=True)) == {"xY Zw"}
    assert "xY Zw" not in cased(1.0)                                          # control for the line above
