"""What a run on conversations tells of its data: each validation source alone, and what was truncated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.config import Experiment, experiment_from_dict
from nanopoe.data.validation import EvalBatches, validation_by_source
from nanopoe.dist import World
from nanopoe.errors import DataError
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.build import validation
from nanopoe.train.loop import train
from tests.ranks import experiment_dict
from tests.rows import write


@pytest.fixture
def chats(data: Path, tmp_path: Path) -> Experiment:
    """Two sources of conversations, one says a, the other b; every fifth of the second is longer than a row."""
    def chat(letter: str, n: int) -> str:
        return json.dumps({"messages": [{"role": "user", "content": f"{n}?"},
                                        {"role": "assistant", "content": letter * n}]}, separators=(",", ":"))

    for split in ("train", "val"):
        write(tmp_path / split / "a", [[[chat("a", 1 + i % 7) for i in range(30)]]], "conversation")
        write(tmp_path / split / "b", [[[chat("b", 99 if i % 5 == 0 else 3) for i in range(20)]]], "conversation")
    sources, val = ([{"name": name, "path": str(tmp_path / split / name)} for name in "ab"]
                    for split in ("train", "val"))
    return experiment_from_dict(experiment_dict(data, tmp_path / "run", **{
        "data.kind": "conversations", "data.train": sources, "data.val": val, "data.packing": "bestfit_pad",
        "data.json_layout_prob": 0.0, "data.case_aug_prob": 0.0}), "test")


def test_a_training_tells_what_was_truncated(chats: Experiment) -> None:
    def told(sources: list[Any], name: str) -> dict[str, Any]:
        plain = chats.model_dump(mode="json")
        plain["data"]["train"], plain["run_dir"] = [source.model_dump() for source in sources], f"{chats.out}_{name}"
        train(experiment_from_dict(plain, "test"), alone())
        lines = map(json.loads, Path(plain["run_dir"], "metrics.jsonl").read_text().splitlines())
        return [line for line in lines if line.get("event") == "data"][-1]

    both = told([*chats.data.train], "both")
    assert 0 < both["truncated"] < both["documents"]
    assert both["cropped_tokens"] >= both["truncated"]
    only = told([chats.data.train[0]], "short")
    assert only["truncated"] == only["cropped_tokens"] == 0 < only["documents"]                  # control


def alone(rank: int = 0, size: int = 1) -> World:
    return World(rank, size, torch.device("cpu"))


def said(tokenizer: Tokenizer, batches: EvalBatches) -> set[str]:
    """The letters of the targets."""
    ids = torch.cat(list(batches)).flatten()
    return set(tokenizer.decode([i for i in ids[ids >= 0].tolist() if i not in tokenizer.special_ids.values()]))


def test_each_source_alone(chats: Experiment) -> None:
    tokenizer = Tokenizer.load(chats.tokenizer)
    found = validation_by_source(chats, tokenizer, alone())
    assert {name: said(tokenizer, batches) for name, batches in found.items()} == {"a": {"a"}, "b": {"b"}}
    mixed = validation(chats, tokenizer, alone())
    assert said(tokenizer, mixed) == {"a", "b"}                               # control
    assert all(batches.rows <= batches.rows_wanted == 8 for batches in found.values())
    assert validation_by_source(chats, tokenizer, alone(), 32)["a"].rows == 1
    whole = validation_by_source(chats, tokenizer, alone(), 10**6)
    assert {name: batches.truncated for name, batches in whole.items()} == {"a": 0, "b": 4}
    for name, batches in found.items():                                       # as if it were the only one
        only = [s.model_dump() for s in chats.data.val if s.name == name]
        single: dict[str, Any] = {**chats.model_dump(mode="json"), "data": {**chats.data.model_dump(mode="json"),
                                                                           "val": only}}
        assert torch.equal(torch.cat(list(validation(experiment_from_dict(single, "test"), tokenizer, alone()))),
                           torch.cat(list(batches)))


def test_each_source_on_several_ranks(chats: Experiment) -> None:
    tokenizer = Tokenizer.load(chats.tokenizer)
    one = validation_by_source(chats, tokenizer, alone())
    ranks = [validation_by_source(chats, tokenizer, alone(rank, 3)) for rank in range(3)]
    for name, batches in one.items():
        rows = torch.cat(list(batches))
        for rank, part in enumerate(ranks):
            assert (part[name].rows, part[name].truncated) == (batches.rows, batches.truncated)
            assert torch.equal(torch.cat(list(part[name])), rows[rank::3])


def test_a_source_that_fills_no_row_is_named(data: Path, tmp_path: Path) -> None:
    write(tmp_path / "small", [[["short"]]])
    sources = [{"name": "tiny", "path": str(data / "val")}, {"name": "small", "path": str(tmp_path / "small")}]
    experiment = experiment_from_dict(experiment_dict(data, tmp_path / "run", **{"data.val": sources}), "test")
    tokenizer = Tokenizer.load(experiment.tokenizer)
    validation(experiment, tokenizer, alone())                                # control: the mixture does
    with pytest.raises(DataError, match=r"small: the validation split does not fill one row"):
        validation_by_source(experiment, tokenizer, alone())
