"""The decoder's state: windows, moves, rollback, rows of different lengths, tokens that wait at a boundary."""

from __future__ import annotations

import random

import pytest
import torch

from nanopoe.infer import cache as cache_module
from nanopoe.infer import decoder as decoder_module
from nanopoe.infer.cache import LayerCache
from nanopoe.infer.decoder import Decoder, rms
from nanopoe.infer.engine import Engine
from nanopoe.infer.weights import Matrix, Weights
from nanopoe.model import GPT
from nanopoe.model.gpt import norm
from tests.models import live_model, three_stages
from tests.ranks import model_config

WINDOWS = (3, 5, 9, 32, 5, 32)


@pytest.fixture(scope="module")
def model() -> GPT:
    return three_stages(window_sizes=WINDOWS)


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that tests of a few tokens move buffers and cut chunks into pieces."""
    monkeypatch.setattr(cache_module, "PIECE", 7)
    monkeypatch.setattr(decoder_module, "PIECE", 7)


def text(n: int, seed: int = 0) -> list[int]:
    return torch.randint(300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def uncached(model: GPT, ids: list[int]) -> list[torch.Tensor]:
    """Boundary states (T, D) of all stages, without a cache."""
    with torch.no_grad():
        return [x[0] for x in model.boundary_states(torch.tensor([ids]))]


def fed(decoder: Decoder, ids: list[int], sizes: list[int], row: int = 0) -> list[torch.Tensor]:
    """Boundary states of all stages of `ids`, fed in chunks of the given sizes."""
    parts: list[list[torch.Tensor]] = []
    with torch.no_grad():
        for n in sizes:
            decoder.feed({row: ids[:n]})
            ids = ids[n:]
            parts.append([decoder.run(k).x for k in decoder.stages])
    return [torch.cat(states) for states in zip(*parts, strict=True)]


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], atol: float = 1e-4) -> bool:
    return all(torch.allclose(a, b, atol=atol, rtol=1e-4) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("sizes", [[60], [1] * 60, [5, 1, 20, 34], [40] + [1] * 20])
def test_cache_equals_no_cache(model: GPT, sizes: list[int]) -> None:
    ids, weights = text(60), Weights(model)
    whole = uncached(model, ids)
    assert close(fed(Decoder(weights, 1, 60), ids, sizes), whole)
    other = fed(Decoder(weights, 1, 60), [ids[0] ^ 1, *ids[1:]], sizes)
    assert not close(other, whole)                                  # the first token still matters at the end ..
    assert not torch.allclose(other[-1][-1], whole[-1][-1], atol=1e-4)


def test_backprop_model_and_grouped_queries_too() -> None:
    for changes in ({"poe_mode": "none", "poe_every": None}, {"n_head": 4, "n_kv_head": 2}, {"poe_mode": "hier"}):
        model = live_model(model_config(window_sizes=(5, 9, 9, 32), **changes))
        assert close(fed(Decoder(Weights(model), 1, 30), text(30), [11, 1, 18]), uncached(model, text(30)))


def test_short_windows_keep_their_window_only(model: GPT) -> None:
    decoder = Decoder(Weights(model), 2, 1000, rollback=4)
    caches = decoder.caches.values()
    assert [c.capacity for c in caches] == [w + 4 + 7 for w in WINDOWS]
    assert all(c.k.shape == c.v.shape == (2, 1, w + 11, 16) for c, w in zip(caches, WINDOWS, strict=True))
    assert LayerCache(1, 1, 4, 500, 4, 20, torch.float32, torch.device("cpu")).capacity == 20


def test_a_layer_cache_shows_each_query_its_window() -> None:
    draw, window, rollback = random.Random(0), 6, 3
    cache = LayerCache(1, 1, 1, window, rollback, 10_000, torch.float32, torch.device("cpu"))
    held: list[float] = []
    moved = 0
    for value in range(300):
        back = draw.randint(0, min(rollback, len(held))) if draw.random() < 0.3 else 0
        held = held[:len(held) - back]
        new = [value + i / 100 for i in range(draw.randint(1, 7))]
        base = cache.base[0]
        start = len(held)
        keys, values = cache.update(0, start, torch.tensor(new).view(1, 1, -1, 1), -torch.tensor(new).view(1, 1, -1, 1))
        held += new
        assert keys.flatten().tolist() == pytest.approx(held[max(0, start - window):])
        assert torch.equal(values, -keys)
        moved += cache.base[0] > base
    assert moved > 50
    with pytest.raises(AssertionError, match="rollback"):
        cache.update(0, cache.base[0] + 2, torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1))


def test_cut_takes_tokens_back(model: GPT) -> None:
    """Keys, positions and the smear's token before: all as if the cut tokens had never been."""
    weights, ids, wrong = Weights(model), text(50), text(4, seed=9)
    for length in (3, 20, 44):                                      # before and after the short windows were moved
        decoder, control = Decoder(weights, 1, 64, rollback=4), Decoder(weights, 1, 64, rollback=4)
        for d in (decoder, control):
            fed(d, ids[:length], [length])
            fed(d, wrong, [1, 3])
        decoder.cut(0, length)
        rest = fed(decoder, ids[length:length + 6], [1, 1, 4])
        assert close(rest, [x[length:length + 6] for x in uncached(model, ids)])
        assert not close(fed(control, ids[length:length + 6], [1, 1, 4]), rest)


def test_a_rollback_beyond_the_cache_is_not_silent(model: GPT) -> None:
    decoder = Decoder(Weights(model), 1, 64, rollback=0)
    fed(decoder, text(40), [40])
    decoder.cut(0, 30)
    with pytest.raises(AssertionError, match="rollback"):
        fed(decoder, [1], [1])


@pytest.mark.parametrize("seed", range(3))
def test_waiting_tokens_change_nothing(model: GPT, seed: int) -> None:
    """Stages run late, in one chunk, at random times: the states at every boundary are the same in the end."""
    draw, ids = random.Random(seed), text(60)
    decoder, found = Decoder(Weights(model), 1, 60), [[], [], []]
    waited = 0
    with torch.no_grad():
        for i, token in enumerate(ids):
            decoder.feed({0: [token]})
            depth = 2 if i == len(ids) - 1 else draw.choice([0, 0, 0, 0, 1, 2])
            for k in range(depth + 1):
                chunk = decoder.run(k)
                found[k].append(chunk.x)
                waited = max(waited, len(chunk.rows))
    assert waited > 7                                               # more than a piece
    assert close([torch.cat(x) for x in found], uncached(model, ids))


def test_rows_of_different_lengths_at_different_speeds(model: GPT) -> None:
    """Three texts in one decoder; each advances when it likes, some stages of some rows are behind."""
    weights, draw = Weights(model), random.Random(1)
    texts = [text(40, seed=s) for s in range(3)]
    decoder, at = Decoder(weights, 3, 40, rollback=4), [0, 0, 0]
    found = {(row, k): [] for row in range(3) for k in range(3)}
    with torch.no_grad():
        while min(at) < 40:
            sizes = {r: draw.randint(1, 9) for r in range(3) if at[r] < 40 and draw.random() < 0.7}
            if not sizes:
                continue
            decoder.feed({r: texts[r][at[r]:at[r] + n] for r, n in sizes.items()})
            for r, n in sizes.items():
                at[r] = min(40, at[r] + n)
            some = {r for r in range(3) if draw.random() < 0.6 or at[r] == 40}
            for k in range(3):
                if k and not any(r in some for c in decoder.waiting[k] for r in c.rows):
                    break
                chunk = decoder.run(k, None if k == 0 else some)
                for i, r in enumerate(chunk.rows):
                    found[r, k].append(chunk.x[i])
        for k in (1, 2):
            if decoder.waiting[k]:
                chunk = decoder.run(k)
                for i, r in enumerate(chunk.rows):
                    found[r, k].append(chunk.x[i])
    for r in range(3):
        assert close([torch.stack(found[r, k]) for k in range(3)], uncached(model, texts[r]))


def test_released_and_cut_tokens_do_not_run(model: GPT) -> None:
    decoder = Decoder(Weights(model), 2, 20)
    with torch.no_grad():
        decoder.feed({0: [1, 2, 3], 1: [4, 5]})
        decoder.run(0)
        decoder.cut(0, 2)
        decoder.release(1)
        assert decoder.run(1).rows == [0, 0]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (33, 32), (7, 32)], ids=str)
def test_any_layout_is_the_same_map(shape: tuple[int, int], threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        weight, x = torch.randn(shape), torch.randn(40, shape[1])
        matrix = Matrix(weight)
        if matrix.panels is None:
            pytest.skip("this build of torch packs nothing")
        assert matrix.weight is None and matrix.nbytes == weight.nbytes
        for n in (1, 2, 3, 5, 40):
            torch.testing.assert_close(matrix(x[:n]), x[:n] @ weight.T, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


def test_norm_by_its_parts_is_the_norm() -> None:
    x = torch.randn(5, 32)
    torch.testing.assert_close(rms(x), norm(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rms(1e-4 * x), norm(1e-4 * x), rtol=1e-6, atol=1e-6)      # where eps matters
    assert not torch.allclose(norm(1e-4 * x), norm(x), rtol=1e-3)


def test_bfloat16_weights_decode_nearly_the_same(model: GPT) -> None:
    exact = Engine(model).next_logps(torch.tensor([text(20)]))
    rounded = Engine(model, dtype=torch.bfloat16).next_logps(torch.tensor([text(20)]))
    assert rounded.dtype == torch.float32
    difference = (exact - rounded).abs().max()
    assert 1e-4 < difference < 0.5
    assert Weights(model, torch.bfloat16).bytes_read(range(3)) * 2 == Weights(model).bytes_read(range(3))


def test_bytes_read_counts_matrices_and_distinct_heads() -> None:
    shared, own = Weights(live_model(model_config())), Weights(live_model(model_config(stage_heads=True)))
    d, gates = 32, 2
    layer, head = 4 * (12 * d * d), 4 * 300 * d
    two_layers = 2 * layer + 4 * gates * d                          # layers 1 and 3 have gates
    assert shared.bytes_read([0]) == two_layers + head
    assert shared.bytes_read([0, 1]) == 2 * two_layers + head
    assert own.bytes_read([0, 1]) == 2 * two_layers + 2 * head
    assert own.bytes_read([1]) == 2 * two_layers + head
    assert 0 < shared.share(1) < shared.share(2) == 1
