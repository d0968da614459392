"""data.document_mask: the documents of a packed row do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nanopoe.config import experiment_from_dict
from nanopoe.config.schema import ObjectiveConfig
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.model import windows
from nanopoe.model.attention import attend
from nanopoe.model.gpt import enter_block
from nanopoe.model.loss import IGNORE
from nanopoe.model.stages import backward_stages
from nanopoe.model.windows import FLEX_BLOCK, find_documents
from nanopoe.train import loop
from nanopoe.train.restore import load_trained
from tests.models import live_model
from tests.ranks import experiment_dict, model_config

BOS = 0                     # of the rows of attention alone
ALONE = World(0, 1, torch.device("cpu"))
CE = ObjectiveConfig(kind="ce", alpha=0.0, rho=None)


def rows(length: int, *begins: tuple[int, ...]) -> Tensor:
    """(B, T) with BOS at the places that are named for each row."""
    ids = torch.ones(len(begins), length, dtype=torch.int64)
    for row, places in zip(ids, begins, strict=True):
        row[list(places)] = BOS
    return ids


def inputs(batch: int, kv_heads: int, length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, h, length, 16, generator=generator).requires_grad_() for h in (4, kv_heads, kv_heads)]


def naive(q: Tensor, k: Tensor, v: Tensor, window: int, ids: Tensor) -> Tensor:
    """By the numbers of documents."""
    number, t = (ids == BOS).cumsum(1), torch.arange(ids.size(1))
    sees = (t <= t[:, None]) & (t >= t[:, None] - window) & (number[:, :, None] == number[:, None, :])
    k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    return (q @ k.mT / 4).masked_fill(~sees[:, None], -torch.inf).softmax(-1) @ v


CASES = [(rows(200, (0, 70, 71, 190), (3,)), 50), (rows(130, (0, 64, 128), (0,)), 130), (rows(90, (), (89,)), 200),
         (rows(65, tuple(range(65)), (1, 2)), 7)]


@pytest.mark.parametrize("form", [windows._in_blocks, windows._sdpa_in_blocks], ids=["blocks", "SDPA"])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_values_and_gradients_are_the_definitions(case: int, kv_heads: int, form: Callable[..., Tensor],
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    ids, window = CASES[case]
    monkeypatch.setattr(windows, "_taken", {("cpu", torch.float32): windows.Kernel("tried", form)})
    documents = find_documents(ids, BOS, [window], torch.float32)
    ours, theirs = (inputs(2, kv_heads, ids.size(1)) for _ in range(2))
    y, expected = attend(*ours, window, documents=documents), naive(*theirs, window, ids)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
    gradients = torch.autograd.grad((y * weights).sum(), ours), torch.autograd.grad((expected * weights).sum(), theirs)
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(y, attend(*ours, window), atol=1e-3)                # control


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_given_the_same_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled, which runs on a CPU without gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    monkeypatch.setattr(windows, "_compiled_flex", lambda: flex_attention)
    monkeypatch.setattr(windows, "_taken", {("cpu", torch.float32): windows.Kernel("flex", windows._flex)})
    for length, window in ((2 * FLEX_BLOCK, 100), (2 * FLEX_BLOCK, 300), (2 * FLEX_BLOCK + 1, 100)):
        ids = rows(length, (0, 70, 200), (1,))
        documents = find_documents(ids, BOS, [window], torch.float32)
        assert bool(documents.masks) == (length % FLEX_BLOCK == 0)
        q, k, v = (x.detach() for x in inputs(2, 2, length))
        torch.testing.assert_close(attend(q, k, v, window, documents=documents), naive(q, k, v, window, ids),
                                   rtol=1e-5, atol=1e-6)


def test_work_does_not_grow_with_the_row() -> None:
    def flops(length: int, document: int) -> int:
        ids = rows(length, tuple(range(0, length, document)))
        documents = find_documents(ids, BOS, [], torch.float32)
        with FlopCounterMode(display=False) as counted:
            attend(*(x.detach() for x in inputs(1, 4, length)), length, documents=documents)
        return counted.get_total_flops()

    assert flops(2048, 128) == 4 * flops(512, 128)
    assert flops(2048, 2048) > 8 * flops(2048, 128)                               # control: one document is more work


def packed(bos: int) -> tuple[Tensor, list[int]]:
    """Two rows of 32 tokens, and where their documents begin, then the end."""
    ids = torch.randint(bos, (2, 32), generator=torch.Generator().manual_seed(1))
    cuts = [0, 5, 6, 20, 32]
    ids[:, cuts[:-1]] = bos
    return ids, cuts


@pytest.mark.parametrize("poe_mode", ["flat", "none"])
def test_a_document_in_a_row_is_the_document_alone(poe_mode: str) -> None:
    """The logits of each are those of a row of its own: attention and smear are cut alike."""
    stages = {"poe_mode": "none", "poe_every": None} if poe_mode == "none" else {}
    model = live_model(model_config(window_sizes=(8, 8, 8, 32), **stages))
    with torch.no_grad():
        model.smear_lambda.fill_(0.7)
        ids, cuts = packed(model.bos)
        alone = torch.cat([model(ids[:, a:b]) for a, b in pairwise(cuts)], dim=1)
        seen = model(ids)
        model.document_mask = True
        torch.testing.assert_close(model(ids), alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[:, :5], alone[:, :5], rtol=1e-4, atol=1e-5)
        for a, b in pairwise(cuts[1:]):                        # control: without it they are seen
            assert (seen[:, a:b] - alone[:, a:b]).abs().max() > 1e-2


def test_no_gradient_crosses_a_document() -> None:
    """Also with activation checkpointing and in a compiled graph."""
    model = live_model(model_config())
    with torch.no_grad():
        model.smear_lambda.fill_(0.7)
    ids = (torch.arange(32) % 50).unsqueeze(0)                  # of tokens that stand in one half alone
    ids[:, 16:] += 60
    ids[:, [0, 16]] = model.bos
    targets = torch.full((1, 32), IGNORE)
    targets[:, 16:] = 1                                         # the loss is of the second document alone

    def gradients(document_mask: bool) -> Tensor:
        model.document_mask = document_mask
        model.zero_grad()
        backward_stages(model, ids, targets, CE, 1.0)
        wte: Any = model.transformer["wte"]
        return wte.weight.grad

    masked = gradients(True)
    assert not masked[ids[0, 1:16]].any() and masked[ids[0, 17:]].any()
    assert gradients(False)[ids[0, 1:16]].any()                 # control
    model.recompute = True
    assert torch.equal(gradients(True), masked)
    torch._dynamo.reset()
    model.compiled, model.compiled_for = torch.compile(enter_block, fullgraph=True, backend="aot_eager"), (1, 32)
    torch.testing.assert_close(gradients(True), masked, rtol=1e-5, atol=1e-7)


def test_a_run_is_trained_evaluated_and_resumed_with_it(data: Path, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> dict[str, Tensor]:
        experiment = experiment_dict(data, tmp_path / name, **{"data.packing": "bestfit_split", **changes})
        return loop.train(experiment_from_dict(experiment, "test"), ALONE).model.state_dict()

    masked, seen = (run(name, **{"data.document_mask": name == "masked"}) for name in ("masked", "seen"))
    assert not torch.equal(masked["transformer.h.0.attn.c_q.weight"], seen["transformer.h.0.attn.c_q.weight"])
    assert load_trained(tmp_path / "masked", None, ALONE)[0].document_mask
    assert not load_trained(tmp_path / "seen", None, ALONE)[0].document_mask
    more = {"schedule.cycles": [cycle | {"steps": 6} for cycle in
                                experiment_dict(data, tmp_path)["schedule"]["cycles"]], "resume": {"step": 5}}
    with pytest.raises(CheckpointError, match=r"data\.document_mask.*resume\.allow"):
        run("seen", **{"data.document_mask": True, **more})
    with pytest.raises(ConfigError, match=r"attention: flash has no masks of documents"):
        run("flash", **{"data.document_mask": True, "runtime.attention": "flash"})
