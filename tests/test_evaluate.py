"""The evaluation against naive code on whole tensors, its identities, its independence of chunks and ranks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from nanopoe.checkpoint.evaluation import save_evaluation
from nanopoe.dist import World
from nanopoe.errors import DataError, NumericsError
from nanopoe.infer.engine import Engine
from nanopoe.infer.probes import PROBES, probes
from nanopoe.infer.weights import Weights
from nanopoe.model import GPT
from nanopoe.model.pool import View, aggregate, diversity
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.evaluate import evaluate
from tests.ranks import model_config, run_ranks
from tests.test_engine import live_model, three_stages

V = 300
TOKEN_BYTES = np.concatenate([np.arange(V - 9) % 7 + 1, np.zeros(9)]).astype(np.int64)


def batches(count: int = 4, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(V, (3, 33), generator=generator, dtype=torch.int32) for _ in range(count)]


@pytest.fixture(scope="module")
def poe() -> GPT:
    return three_stages()


@pytest.fixture(scope="module")
def result(poe: GPT) -> dict:
    return evaluate(poe, batches(), TOKEN_BYTES)


@torch.no_grad()
def naive(model: GPT) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(K, N, V) log-probabilities, targets (N,), bytes (N,) of all rows, in one piece."""
    rows = torch.cat(batches()).long()
    logps = torch.stack([model.stage_logits(x, k).log_softmax(-1)
                         for k, x in enumerate(model.boundary_states(rows[:, :-1]))]).flatten(1, 2)
    targets = rows[:, 1:].flatten()
    return logps, targets, torch.from_numpy(TOKEN_BYTES)[targets]


def bpb(logps: torch.Tensor, targets: torch.Tensor, sizes: torch.Tensor) -> float:
    nats = -logps.double().gather(-1, targets[:, None])[:, 0]
    return float(nats[sizes > 0].sum() / (math.log(2) * sizes.sum()))


def test_bpb_and_accuracy_equal_naive_code(poe: GPT, result: dict) -> None:
    logps, y, sizes = naive(poe)
    close = pytest.approx
    assert result["bpb"]["full"] == close(bpb(aggregate(logps), y, sizes), rel=1e-5)
    assert result["bpb"]["stages"] == [close(bpb(l, y, sizes), rel=1e-5) for l in logps]
    assert result["bpb"]["prefixes"] == [close(bpb(aggregate(logps[:n]), y, sizes), rel=1e-5) for n in (1, 2, 3)]
    for alpha in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert result["bpb"]["alpha"][f"{alpha:g}"] == close(bpb(aggregate(logps, alpha), y, sizes), rel=1e-5)
    assert result["bpb"]["renormalise_false"] == close(bpb(aggregate(logps, renormalise=False), y, sizes), rel=1e-5)
    counted = sizes > 0
    assert result["accuracy"]["stages"] == [close(float((l.argmax(-1) == y)[counted].double().mean())) for l in logps]
    assert result["accuracy"]["full"] == close(float((logps.mean(0).argmax(-1) == y)[counted].double().mean()))
    assert result["diversity"]["nats_per_token"] == close(float(diversity(logps)[counted].double().mean()), rel=1e-4)
    assert (result["tokens"], result["targets"], result["bytes"]) == (384, int(counted.sum()), int(sizes.sum()))
    assert result["targets"] < result["tokens"]                     # specials are there, and do not count
    views = [*result["bpb"]["stages"], *result["bpb"]["prefixes"]]
    assert len({round(v, 6) for v in views}) == 5                   # all differ, but stage 0 is prefix 1


def test_identities(result: dict) -> None:
    r = result["bpb"]
    assert r["full"] == pytest.approx(np.mean(r["stages"]) - result["diversity"]["bits_per_byte"], rel=1e-5)
    assert result["diversity"]["bits_per_byte"] > 1e-3
    assert r["prefixes"][0] == r["stages"][0]
    assert r["prefixes"][-1] == r["full"]
    assert r["alpha"]["0"] == pytest.approx(r["full"], rel=1e-9)
    assert r["alpha"]["1"] > r["full"] + 0.01
    assert result["crossover_gap"] == r["full"] - r["stages"][-1]
    assert result["accuracy"]["prefixes"][-1] == result["accuracy"]["full"]


def test_neither_chunks_nor_batches_change_the_result(poe: GPT, result: dict) -> None:
    by_chunk = evaluate(poe, batches(), TOKEN_BYTES, chunk_rows=7)
    in_one = evaluate(poe, [torch.cat(batches())], TOKEN_BYTES)
    for other in (by_chunk, in_one):
        assert other["bpb"]["stages"] == pytest.approx(result["bpb"]["stages"], rel=1e-6)
        assert other["bpb"]["full"] == pytest.approx(result["bpb"]["full"], rel=1e-6)
    fewer = evaluate(poe, batches(3), TOKEN_BYTES)
    assert fewer["bpb"]["full"] != pytest.approx(result["bpb"]["full"], rel=1e-6)


def test_untrained_model_knows_nothing() -> None:
    model = GPT(model_config())
    model.init_weights(0)
    r = evaluate(model, batches(), TOKEN_BYTES)
    uniform = math.log2(V) * r["targets"] / r["bytes"]
    assert r["bpb"]["full"] == pytest.approx(uniform, rel=0.01)
    assert r["diversity"]["bits_per_byte"] < 1e-3


def test_bp_model_has_only_the_full_view() -> None:
    bp = live_model(model_config(poe_mode="none", poe_every=None))
    r = evaluate(bp, batches(), TOKEN_BYTES)
    rows = torch.cat(batches()).long()
    with torch.no_grad():
        logps = bp(rows[:, :-1]).log_softmax(-1).flatten(0, 1)
    y = rows[:, 1:].flatten()
    assert r["bpb"]["full"] == pytest.approx(bpb(logps, y, torch.from_numpy(TOKEN_BYTES)[y]), rel=1e-5)
    assert r["accuracy"]["full"] > 0
    for absent in (*(r["bpb"][key] for key in ("stages", "prefixes", "alpha")), r["crossover_gap"], r["diversity"]):
        assert absent is None
    assert json.loads(json.dumps(r)) == r


def rank_result(world: World, spread: list[int]) -> str:
    mine = [b for b, rank in zip(batches(), spread, strict=True) if rank == world.rank]
    return json.dumps(evaluate(three_stages(), mine, TOKEN_BYTES))


@pytest.mark.parametrize("spread", [[0, 1, 0, 1], [1, 1, 1, 1]])
def test_two_ranks_equal_one_also_when_one_has_no_rows(result: dict, spread: list[int]) -> None:
    first, second = (json.loads(text) for text in run_ranks(rank_result, 2, spread))
    for key in ("bpb", "accuracy", "tokens", "targets", "bytes", "diversity"):
        assert first[key] == second[key]                            # every rank knows the result, bitwise
    assert first["bpb"]["stages"] == pytest.approx(result["bpb"]["stages"], rel=1e-12)
    assert (first["tokens"], first["bytes"]) == (result["tokens"], result["bytes"])


def test_bad_input_is_refused(poe: GPT) -> None:
    with pytest.raises(DataError, match="no target"):
        evaluate(poe, [], TOKEN_BYTES)
    with pytest.raises(DataError, match="tokenizer has 299 tokens and the model 300"):
        evaluate(poe, batches(), TOKEN_BYTES[1:])
    broken = three_stages()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match="not finite"):
        evaluate(broken, batches(), TOKEN_BYTES)
    assert math.isfinite(evaluate(poe, batches(1), TOKEN_BYTES)["bpb"]["full"])


def test_probes_are_greedy_and_begin_with_bos(poe: GPT) -> None:
    tokenizer = Tokenizer.train([" ".join(PROBES), "a quick brown fox jumps over the lazy dog"], V)
    rows = probes(Weights(poe), tokenizer, max_new_tokens=6)
    assert [row["prompt"] for row in rows] == list(PROBES)
    assert len(PROBES) == 7
    assert [list(row["answers"]) for row in rows] == [["full", "stage:0", "stage:1", "stage:2"]] * 7
    ids = tokenizer.encode(PROBES[3])
    engine = Engine(poe, View("stage", 1))
    with_bos, without = (engine.generate([p], max_new_tokens=6)[0] for p in ([tokenizer.bos_id, *ids], ids))
    assert with_bos != without
    assert rows[3]["answers"]["stage:1"] == tokenizer.decode(with_bos)


def test_saved_evaluation_is_replaced_whole(result: dict, tmp_path: Path) -> None:
    saved = {"step": 200, **result, "probes": [{"prompt": "é", "answers": {"full": "\ud7ff|"}}]}
    path = save_evaluation(tmp_path, {**saved, "step": 200, "seconds": 0.0}, "old")
    before = path.stat().st_ino
    assert save_evaluation(tmp_path, saved, "# new") == path == tmp_path / "evaluation" / "step_00000200.json"
    assert json.loads(path.read_text(encoding="utf-8")) == saved
    assert path.with_suffix(".md").read_text() == "# new"
    assert path.stat().st_ino != before                             # renamed over, never written in place
    assert sorted(p.name for p in path.parent.iterdir()) == ["step_00000200.json", "step_00000200.md"]
