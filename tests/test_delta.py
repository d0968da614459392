"""Deltas and cascades: sizes of SPEC 8, nothing moves a base, chains and siblings are put together or refused."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.checkpoint.cascade import open_cascade, save_delta, weights_digest
from nanopoe.checkpoint.container import write_tensors
from nanopoe.checkpoint.delta import MANIFEST, TENSORS, Delta, delta_shapes, delta_tensors
from nanopoe.checkpoint.format import seal
from nanopoe.config import load_experiment
from nanopoe.config.schema import SpecialistShape
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError, NanopoeError
from nanopoe.model import GPT
from nanopoe.train.restore import load_cascade
from tests.ranks import experiment_dict
from tests.test_specialist import ROOT, ids_without_chat, specialist_dict, stage, train

ALONE = World(0, 1, torch.device("cpu"))
SHORT = {"schedule.cycles.0.steps": 3, "schedule.cycles.0.warmdown_ratio": 0.0, "checkpoint.every": None,
         "evaluation.every": None}


@pytest.fixture(scope="session")
def family(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base <- a <- b <- c, and base <- d: runs of some steps in one folder."""
    folder = tmp_path_factory.mktemp("family")
    train(ALONE, experiment_dict(data, folder / "base", name="base", **SHORT))
    rates = {"optim.matrix_lr": 0.1, "optim.unembedding_lr": 0.1, **SHORT}
    train(ALONE, specialist_dict(data, folder / "a", folder / "base", **rates))
    train(ALONE, specialist_dict(data, folder / "b", folder / "a", stage(), stage(1, 0), seed=5, **rates))
    train(ALONE, specialist_dict(data, folder / "c", folder / "b", stage(), stage(1, 0), stage(3, 1), seed=6, **rates))
    train(ALONE, specialist_dict(data, folder / "d", folder / "base", stage(1), seed=8, **rates))
    return folder


@torch.no_grad()
def logits(path: Path, **options: Any) -> torch.Tensor:
    """Of the last specialist (or the base alone), with chat tokens in the text."""
    ids = ids_without_chat()
    ids[:, 5] = 293
    return load_cascade(path, None, ALONE, **options).model(ids)


@pytest.mark.parametrize(("layers", "tensors", "elements"), [(4, 28, 213_909_560), (2, 16, 157_286_452)])
def test_published_deltas_have_the_published_sizes(layers: int, tensors: int, elements: int) -> None:
    """408 and 300 MiB in bfloat16; on the meta device, where the tensors are what the shapes say."""
    base = load_experiment(ROOT / "configs" / "poe_1p3b.yaml").model
    m = base.model_copy(update={"specialists": (SpecialistShape(n_layer=layers, parent=None),)})
    shapes = delta_shapes(m)
    assert (len(shapes), sum(map(math.prod, shapes.values()))) == (tensors, elements)
    with torch.device("meta"):
        made = delta_tensors(m, dict(GPT(m).named_parameters()).__getitem__)
    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == shapes
    assert {"transformer.h.24.attn.c_q.weight", f"transformer.h.{23 + layers}.mlp.c_proj.weight"} < shapes.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_delta_is_its_run_and_leaves_the_base(family: Path, tmp_path: Path, dtype: str) -> None:
    """In fp32 bit for bit, in bfloat16 as rounded; the base's logits differ from the base's own by exactly 0."""
    out = save_delta(open_cascade(family / "a"), tmp_path / "a", dtype)
    whole, of_run = load_cascade(out, None, ALONE), logits(family / "a")
    if dtype == "float32":
        assert torch.equal(logits(out), of_run)
    else:
        assert 0 < (logits(out) - of_run).abs().max() < 0.2
        assert Delta(out).read("resid_lambdas").dtype == torch.bfloat16
    with torch.no_grad():
        ids = ids_without_chat()
        alone = load_cascade(family / "base", None, ALONE).model(ids)
        assert torch.equal(whole.model.base_scores(whole.model.boundary_states(ids)), alone)
        assert not torch.allclose(whole.model(ids).log_softmax(-1), alone.log_softmax(-1), atol=1e-2)     # control
    assert whole.names == ("a",) and (out / TENSORS).stat().st_size < 500_000
    assert open_cascade(out).origins == open_cascade(family / "a").origins
    assert (open_cascade(out).digest == open_cascade(family / "a").digest) == (dtype == "float32")


def test_a_chain_of_three_from_runs_and_from_deltas(family: Path, tmp_path: Path) -> None:
    """Each delta points to the one below, relative to itself: the folder of all can move."""
    before = logits(family / "c")
    for name, below in (("a", "base"), ("b", "a"), ("c", "b")):
        out = save_delta(open_cascade(family / name), tmp_path / "x" / name, "float32")
        manifest = json.loads((out / MANIFEST).read_text())
        assert manifest["parent"]["name"] == below and not Path(manifest["parent"]["path"]).is_absolute()
        manifest["parent"]["path"] = f"../{below}"                              # from runs to the deltas beside it
        (out / MANIFEST).write_text(json.dumps(seal(manifest)))
    shutil.copytree(family / "base", tmp_path / "x" / "base")
    (tmp_path / "x").rename(tmp_path / "moved")
    cascade = open_cascade(tmp_path / "moved" / "c")
    assert cascade.names == ("a", "b", "c") and [s.parent for s in cascade.config.specialists] == [None, 0, 1]
    assert all(link.path.is_relative_to(tmp_path / "moved") for link in cascade.links)
    assert torch.equal(logits(tmp_path / "moved" / "c"), before)
    assert len({tuple(logits(family / name)[0, 0, :3].tolist()) for name in "abc"}) == 3               # control


def test_siblings_share_a_base_and_keep_their_logits(family: Path) -> None:
    """Whatever their order; what two chains share is there once."""
    for path, siblings in (("d", {"first": "c"}), ("c", {"first": "d"}), ("base", {"x": "d", "y": "a", "z": "b"})):
        loaded = load_cascade(family / path, None, ALONE, siblings={n: family / p for n, p in siblings.items()})
        ids = ids_without_chat()
        ids[:, 5] = 293
        with torch.no_grad():
            states = loaded.model.boundary_states(ids)
            for given, run in {**siblings, **({path: path} if path != "base" else {})}.items():
                k = loaded.model.layout.n_stages + loaded.names.index(given)
                assert torch.equal(loaded.model.stage_logits(states[k], k), logits(family / run)), (path, given)
    assert loaded.names == ("x", "y", "z") and [s.parent for s in loaded.model.config.specialists] == [None, None, 1]


def test_a_rounded_delta_stands_on_what_is_not_rounded(family: Path, tmp_path: Path) -> None:
    """bfloat16 of b on the run a, beside the run d: a and d keep their bits, chat tokens included."""
    out = save_delta(open_cascade(family / "b"), tmp_path / "b", "bfloat16")
    loaded = load_cascade(out, None, ALONE, siblings={"d": family / "d"}, base=family / "base")
    ids = ids_without_chat()
    ids[:, 5] = 293
    with torch.no_grad():
        states = loaded.model.boundary_states(ids)
        for name in ("a", "d"):
            k = loaded.model.layout.n_stages + loaded.names.index(name)
            assert torch.equal(loaded.model.stage_logits(states[k], k), logits(family / name)), name
    assert (loaded.model(ids) - logits(family / "b")).abs().max() > 0          # control: b itself is rounded


def test_what_stands_above_the_one_opened_does_not_answer_for_it(family: Path) -> None:
    with pytest.raises(ConfigError, match=r"b stands on it; open that one"):
        open_cascade(family / "a", siblings={"q": family / "b"})
    both = open_cascade(family / "b", siblings={"q": family / "a"})
    assert both.names == ("q", "b") and both.digest == open_cascade(family / "b").digest
    assert open_cascade(family / "base", siblings={"x": family / "b", "y": family / "a"}).names == ("y", "x")
    with pytest.raises(ConfigError, match="x and y are the same specialist"):
        open_cascade(family / "base", siblings={"x": family / "a", "y": family / "a"})


def test_a_rounded_base_is_another_base(data: Path, family: Path, tmp_path: Path) -> None:
    """A run on a goes on upon a's delta in fp32, not upon the one in bfloat16; its own delta stands on either."""
    for dtype in ("float32", "bfloat16"):
        save_delta(open_cascade(family / "a"), tmp_path / dtype, dtype)
    shutil.copytree(family / "b", tmp_path / "b")

    def go_on(base: Path) -> None:
        train(ALONE, specialist_dict(data, tmp_path / "b", base, stage(), stage(1, 0), seed=5,
                                     **{"optim.matrix_lr": 0.1, "optim.unembedding_lr": 0.1, **SHORT}))

    with pytest.raises(CheckpointError, match="is not the base this run was trained on"):
        go_on(tmp_path / "bfloat16")
    go_on(tmp_path / "float32")
    out = save_delta(open_cascade(family / "b"), tmp_path / "x")
    point(out, path="../bfloat16")
    assert open_cascade(out).origins == open_cascade(family / "b").origins
    assert open_cascade(out).digest != open_cascade(family / "b").digest


def test_an_impostor_and_strange_models_are_refused(family: Path, tmp_path: Path) -> None:
    """All hashes right, but other tensors than the digest says; or a model that is none."""
    out = save_delta(open_cascade(family / "a"), tmp_path / "a", "float32")
    altered(out, "lm_head_stage.weight", 0)
    with pytest.raises(CheckpointError, match="holds other tensors than its digest says"):
        open_cascade(out)
    good = json.loads((out / MANIFEST).read_text())
    for changes in ({"specialists": [stage(2, 5)]}, {"specialists": [stage(2, 0)]}, {"specialists": []},
                    {"poe_every": None}, {"n_head": 5}, {"specialists": [stage(), stage()]}):
        (out / MANIFEST).write_text(json.dumps(seal({**good, "model": {**good["model"], **changes}})))
        with pytest.raises(CheckpointError, match="malformed"):
            open_cascade(out)
    (out / MANIFEST).write_text(json.dumps(seal({**good, "base": "0" * 64})))
    with pytest.raises(CheckpointError, match="names another base"):
        open_cascade(out)
    (out / MANIFEST).write_text(json.dumps(seal({**good, "bytes": 1})))
    with pytest.raises(CheckpointError, match="the manifest says 1"):
        open_cascade(out)


def test_a_delta_is_saved_through_a_link(family: Path, tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "er")
    assert open_cascade(save_delta(open_cascade(family / "a"), tmp_path / "link" / "a")).names == ("a",)


def test_a_moved_base_is_opened_at_the_step_that_was_used(data: Path, tmp_path: Path) -> None:
    train(ALONE, experiment_dict(data, tmp_path / "base", name="base"))
    train(ALONE, specialist_dict(data, tmp_path / "a", tmp_path / "base", **{"specialist.base_step": 3}, **SHORT))
    (tmp_path / "base").rename(tmp_path / "moved")
    assert open_cascade(tmp_path / "a", base=tmp_path / "moved").base.step == 3
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step_00000003")
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 3; steps there: 1, 2, 4"):
        open_cascade(tmp_path / "a", base=tmp_path / "moved")


def test_a_specialist_of_another_base_is_refused(data: Path, family: Path, tmp_path: Path) -> None:
    train(ALONE, experiment_dict(data, tmp_path / "other", name="other", seed=99, **SHORT))
    train(ALONE, specialist_dict(data, tmp_path / "e", tmp_path / "other", **SHORT))
    out = save_delta(open_cascade(family / "a"), tmp_path / "a", "float32")
    for path, options in ((out, {"base": tmp_path / "other"}), (family / "a", {"siblings": {"e": tmp_path / "e"}}),
                          (family / "base", {"siblings": {"e": tmp_path / "e"}})):
        with pytest.raises(CheckpointError, match=r"stands on (base|other), whose digest begins with .*, not on"):
            open_cascade(path, **options)
    with pytest.raises(CheckpointError, match="is no specialist"):
        open_cascade(family / "base", siblings={"x": family / "base"})
    with pytest.raises(ConfigError, match="two specialists are named a"):
        open_cascade(family / "a", siblings={"a": family / "d"})
    digest = weights_digest(open_cascade(family / "base").base)
    assert digest != weights_digest(open_cascade(tmp_path / "other").base)


def test_siblings_with_other_chat_tokens_are_refused(data: Path, family: Path, tmp_path: Path) -> None:
    cold = tmp_path / "cold"
    train(ALONE, specialist_dict(data, cold, family / "base", **{"specialist.warm_start": False}, **SHORT))
    with pytest.raises(CheckpointError, match="its chat tokens have other embeddings than those of"):
        open_cascade(cold, siblings={"a": family / "a"})
    assert open_cascade(family / "d", siblings={"a": family / "a"}).names == ("a", "d")                # control


def test_a_missing_parent_and_a_cycle_are_one_line(family: Path, tmp_path: Path) -> None:
    one, two = (save_delta(open_cascade(family / "a"), tmp_path / name) for name in ("one", "two"))
    with pytest.raises(ConfigError, match="exists already"):
        save_delta(open_cascade(family / "a"), one)
    with pytest.raises(ConfigError, match="is a base, not a specialist"):
        save_delta(open_cascade(family / "base"), tmp_path / "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]
    for delta, parent in ((one, "../two"), (two, "../one")):
        point(delta, path=parent)
    with pytest.raises(CheckpointError, match="stands on itself: a cycle of parents"):
        open_cascade(one)
    point(one, path="../gone")
    with pytest.raises(CheckpointError, match=r"its base base cannot be opened: .*no checkpoint.*--base"):
        open_cascade(one)
    point(one, path=None)
    with pytest.raises(CheckpointError, match=r"does not say where its base base is.*--base"):
        open_cascade(one)
    assert open_cascade(one, base=family / "base").names == ("a",)


def point(delta: Path, **changes: Any) -> None:
    """Write another pointer into a delta's manifest, and seal it."""
    manifest = json.loads((delta / MANIFEST).read_text())
    manifest["parent"] |= changes
    (delta / MANIFEST).write_text(json.dumps(seal(manifest)))


def altered(delta: Path, name: str, row: int) -> None:
    """A well-formed delta, all hashes right, with another value in one row of a tensor."""
    opened = Delta(delta)
    tensors = {key: opened.read(key) for key in opened.tensors}
    tensors[name][row] += 1
    (delta / TENSORS).unlink()
    entry, _ = write_tensors(delta / TENSORS, tensors)
    manifest = json.loads((delta / MANIFEST).read_text())
    manifest |= {"bytes": entry["bytes"], "sha256_of_tensors": entry["sha256"]}
    (delta / MANIFEST).write_text(json.dumps(seal(manifest)))


@pytest.mark.parametrize(("name", "row", "moves_base"), [
    ("transformer.wte.weight", 0, True), ("transformer.wte.weight", 291, True), ("transformer.wte.weight", 292, False),
    ("resid_lambdas", 3, True), ("resid_lambdas", 4, False), ("x0_lambdas", 0, True),
    ("lm_head_stage.weight", 0, False),
])
def test_a_delta_that_would_move_the_base_is_refused(family: Path, tmp_path: Path, name: str, row: int,
                                                     moves_base: bool) -> None:
    out = save_delta(open_cascade(family / "a"), tmp_path / "a")
    altered(out, name, row)
    if moves_base:
        with pytest.raises(CheckpointError, match=f"{name} changes what the base has"):
            open_cascade(out)
    else:
        open_cascade(out)


def test_a_damaged_delta_is_refused(family: Path, tmp_path: Path) -> None:
    def damaged(change: Any) -> Path:
        out = save_delta(open_cascade(family / "a"), tmp_path / f"a{len(list(tmp_path.iterdir()))}")
        change(out)
        return out

    def flip(out: Path) -> None:
        content = bytearray((out / TENSORS).read_bytes())
        content[-3] ^= 1
        (out / TENSORS).write_bytes(content)

    def rename(out: Path) -> None:
        (out / MANIFEST).write_text((out / MANIFEST).read_text().replace('"a"', '"q"', 1))

    def reseal(**changes: Any) -> Any:
        def write(out: Path) -> None:
            manifest = json.loads((out / MANIFEST).read_text())
            (out / MANIFEST).write_text(json.dumps(seal({**manifest, **changes})))
        return write

    cases = [(flip, "content does not match its SHA-256"), (lambda out: (out / TENSORS).unlink(), "missing"),
             (lambda out: (out / MANIFEST).write_text("{"), "not valid JSON"),
             (rename, "its seal"), (reseal(version=9), "version 9 is not"), (reseal(extra=1), "its keys are"),
             (reseal(model={}), "malformed"), (reseal(step=-1), "malformed: step is -1"),
             (reseal(tokenizer="0" * 64), "another tokenizer than its base")]
    for change, words in cases:
        with pytest.raises(NanopoeError, match=words):
            logits(damaged(change))
    assert logits(damaged(lambda out: None)).isfinite().all()                                          # control
