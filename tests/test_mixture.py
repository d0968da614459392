"""Mixtures: strict files, sources ingested by their share, and experiments that name a mixture instead of lists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from nanopoe.config import config_hash, dump_experiment, experiment_from_dict, load_experiment
from nanopoe.config.mixture import load_mixture
from nanopoe.config.strict import read_yaml
from nanopoe.data.files import Folder
from nanopoe.data.filters import WriteOptions
from nanopoe.data.hub import Hub
from nanopoe.data.ingest import Part
from nanopoe.data.origins import mixture_jobs
from nanopoe.data.stdlib import Stdlib
from nanopoe.data.write import write_dataset
from nanopoe.errors import ConfigError

ROOT = Path(__file__).parents[1]
MIXTURES = sorted((ROOT / "configs" / "data").glob("*.yaml"))
FRONTIER = {"fineweb-edu": 33.5, "dclm-baseline": 24, "stack-v2": 16, "wikipedia": 5, "culturax": 5, "proofpile-2": 4,
            "openwebmath": 4, "gutenberg": 4, "pg-19": 2, "ultrachat": 1, "openhermes-2.5": 0.6}


def write(path: Path, mixture: Any) -> Path:
    path.write_text(yaml.safe_dump(mixture, sort_keys=False), encoding="utf-8")
    return path


def one(**changes: Any) -> dict[str, Any]:
    """A mixture of one source of the hub, with changes; None removes a key."""
    source = {"name": "a", "weight": 1.0, "hub": "some/where", **changes}
    return {"name": "m", "sources": [{key: value for key, value in source.items() if value is not None}]}


# -- files ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", MIXTURES, ids=lambda p: p.stem)
def test_every_mixture_file_is_valid(path: Path) -> None:
    mixture = load_mixture(path)
    assert mixture.name == path.stem
    assert path.read_text("utf-8").startswith("# "), "a mixture file begins by saying what it is"
    assert sum(mixture.shares.values()) == pytest.approx(1)


def test_frontier_v1_is_as_published() -> None:
    mixture = load_mixture(ROOT / "configs/data/frontier_v1.yaml")
    assert {s.name: s.weight for s in mixture.sources} == FRONTIER
    assert sum(FRONTIER.values()) == pytest.approx(99.1)
    assert mixture.shares["fineweb-edu"] == pytest.approx(33.5 / 99.1)
    assert [s.name for s in mixture.sources if s.code] == ["stack-v2"]
    assert {s.name for s in mixture.sources if s.by_hand} == {"stack-v2"}
    assert "99.1" in (ROOT / "configs/data/frontier_v1.yaml").read_text()


@pytest.mark.parametrize("mixture, words", [
    (one(weigth=2.0), "sources.0.weigth: unknown key; did you mean 'weight'"),
    (one(weight=0.0), "sources.0.weight: must be > 0, got 0.0"),
    (one(weight=-1.0), "sources.0.weight: must be > 0"),
    (one(weight="a lot"), "sources.0.weight: expected a number, got 'a lot'"),
    (one(weight=None), "sources.0.weight: missing key"),
    (one(name="../a"), r"sources.0.name: '../a' does not match"),
    (one(hub=None), "sources.0: a needs one of hub, folder and stdlib, got none"),
    (one(folder="x"), "sources.0: a needs one of hub, folder and stdlib, got hub and folder"),
    (one(hub=None, stdlib=True, revision="x"), "sources.0.revision: only of a source of the hub"),
    (one(config="c", files="*.parquet"), "sources.0.config: must be null with files"),
    ({"name": "m", "sources": []}, "sources: needs at least 1 item, got 0"),
    ({"name": "m", "sources": [*one()["sources"], *one()["sources"]]}, "sources: 2 are named 'a'; names are keys"),
    ({"sources": one()["sources"]}, "name: missing key"),
])
def test_wrong_mixtures_are_one_line_each(tmp_path: Path, mixture: Any, words: str) -> None:
    path = write(tmp_path / "m.yaml", mixture)
    with pytest.raises(ConfigError, match=words) as error:
        load_mixture(path)
    assert len(error.value.problems) == 1
    assert str(path) in error.value.render()
    assert load_mixture(write(tmp_path / "good.yaml", one())).shares == {"a": 1.0}         # control


# -- experiments ------------------------------------------------------------------------------------------------------

def experiment(tmp_path: Path, **data: Any) -> Path:
    """small_poe with another data group, as a file."""
    plain = read_yaml(ROOT / "configs" / "small_poe.yaml")
    plain["data"] = {key: value for key, value in plain["data"].items() if key not in ("train", "val")} | data
    return write(tmp_path / "x.yaml", plain)


def two(tmp_path: Path) -> Path:
    sources = [{"name": "prose", "weight": 3.0, "hub": "a/b"},
               {"name": "code", "weight": 1.0, "folder": "c", "code": True}]
    return write(tmp_path / "m.yaml", {"name": "m", "sources": sources})


def test_an_experiment_resolves_its_mixture(tmp_path: Path) -> None:
    exp = load_experiment(experiment(tmp_path, mixture=str(two(tmp_path)), folder="data/m"))
    for split in ("train", "val"):
        assert [(s.name, s.path, s.weight, s.code) for s in getattr(exp.data, split)] == [
            ("prose", f"data/m/prose/{split}", 3.0, False), ("code", f"data/m/code/{split}", 1.0, True)]
    plain = dump_experiment(exp)
    assert "mixture" not in plain["data"]
    assert "folder" not in plain["data"]
    assert experiment_from_dict(plain, "again") == exp
    by_hand = experiment(tmp_path, train=[s.model_dump() for s in exp.data.train],
                         val=[s.model_dump() for s in exp.data.val])
    assert config_hash(load_experiment(by_hand)) == config_hash(exp)


def test_overrides_of_a_mixture(tmp_path: Path) -> None:
    path = experiment(tmp_path, mixture=str(two(tmp_path)), folder="data/m")
    exp = load_experiment(path, ["data.train.1.weight=9.0", "data.folder=elsewhere", "seed=7"])
    assert [s.path for s in exp.data.train] == ["elsewhere/prose/train", "elsewhere/code/train"]
    assert [s.weight for s in exp.data.train] == [3.0, 9.0]
    assert [s.weight for s in exp.data.val] == [3.0, 1.0]
    other = write(tmp_path / "other.yaml", one())
    assert [s.name for s in load_experiment(path, [f"data.mixture={other}"]).data.train] == ["a"]
    small = load_experiment(ROOT / "configs/small_poe.yaml")                                # control: lists stay lists
    assert [s.name for s in small.data.train] == ["stdlib"]


@pytest.mark.parametrize("data, words", [
    ({"mixture": "none.yaml", "folder": "d"}, r"data.mixture: none.yaml: cannot be read: No such file.*name a mixture"),
    ({"mixture": "BAD", "folder": "d"}, r"data.mixture: .*bad.yaml: sources.0.weigth: unknown key"),
    ({"mixture": "GOOD"}, "data.folder: expected a folder, got None; data.mixture and data.folder go together"),
    ({"folder": "d"}, "data.mixture: expected a file, got None; data.mixture and data.folder go together"),
    ({"mixture": 7, "folder": "d"}, "data.mixture: expected a file, got 7"),
    ({"mixture": "GOOD", "folder": "d", "train": []}, "data.train: comes from data.mixture, which is also given"),
])
def test_wrong_uses_of_a_mixture(tmp_path: Path, data: dict[str, Any], words: str) -> None:
    files = {"GOOD": str(two(tmp_path)), "BAD": str(write(tmp_path / "bad.yaml", one(weigth=1)))}
    data = {key: files.get(value, value) if isinstance(value, str) else value for key, value in data.items()}
    with pytest.raises(ConfigError, match=words) as error:
        load_experiment(experiment(tmp_path, **data))
    assert all("\n" not in problem for problem in error.value.problems)


def test_the_published_runs_read_their_mixtures() -> None:
    for name in ("poe_3b", "poe_3b_cycle2"):
        exp = load_experiment(ROOT / "configs" / f"{name}.yaml")
        assert {s.name: s.weight for s in exp.data.train} == {s.name: s.weight for s in exp.data.val} == FRONTIER
        assert exp.data.train[2].path == "data/frontier_v1/stack-v2/train"
    for name in ("bp_1p3b", "poe_1p3b", "poe_1p5b"):
        exp = load_experiment(ROOT / "configs" / f"{name}.yaml")
        assert [s.path for s in exp.data.train] == ["data/climbmix/climbmix/train"]


# -- ingest -----------------------------------------------------------------------------------------------------------

def texts(folder: Path, word: str, n: int = 600) -> Path:
    folder.mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": f"{word} {i} " * 20}) + "\n" for i in range(n)))
    return folder


def test_sources_get_their_share_of_the_bytes(tmp_path: Path) -> None:
    mixture = load_mixture(write(tmp_path / "m.yaml", {"name": "m", "sources": [
        {"name": name, "weight": weight, "folder": str(texts(tmp_path / name, name)), "column": "body"}
        for name, weight in (("long", 6.0), ("short", 2.0))]}))
    options = WriteOptions(val_share=0.1, max_bytes=80_000)
    sizes = {}
    for job in mixture_jobs(mixture, {}, tmp_path / "out", options, None):
        manifest = write_dataset(job.origin, job.out, job.options)
        sizes[job.name] = sum(split["text_bytes"] for split in manifest["splits"].values())
    assert sizes["long"] == pytest.approx(60_000, abs=300)
    assert sizes["short"] == pytest.approx(20_000, abs=300)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["long", "short"]


def test_jobs_of_the_published_mixture(tmp_path: Path) -> None:
    frontier = load_mixture(ROOT / "configs/data/frontier_v1.yaml")
    with pytest.raises(ConfigError, match=r"stack-v2: holds ids and no text.*--folder stack-v2=PATH"):
        mixture_jobs(frontier, {}, tmp_path, WriteOptions(), None)
    with pytest.raises(ConfigError, match="--folder stack: no such source; there are fineweb-edu, "):
        mixture_jobs(frontier, {"stack": tmp_path}, tmp_path, WriteOptions(), None)
    here = dict.fromkeys(FRONTIER, tmp_path)
    jobs = mixture_jobs(frontier, here, tmp_path / "o", WriteOptions(max_bytes=991_000), (2, 3))
    assert {job.name: job.options.max_bytes for job in jobs} == {
        name: int(weight * 10_000) // 3 for name, weight in FRONTIER.items()}
    for job in jobs:
        assert isinstance(job.origin, Part)
        assert isinstance(job.origin.whole, Folder)
        assert job.out == tmp_path / "o" / job.name / "part-00002-of-00003"
    columns = {job.name: job.origin.whole.shape for job in jobs}
    assert (columns["gutenberg"].column, columns["ultrachat"].transcript) == ("TEXT", True)
    job, = mixture_jobs(load_mixture(ROOT / "configs/data/stdlib.yaml"), {}, tmp_path, WriteOptions(), None)
    assert job.origin == Stdlib()


def test_an_ingest_that_goes_on_stays_at_its_revision() -> None:
    """No network here: what is known from before is not asked for again."""
    before = {"dataset": "some/where", "revision": "a" * 40, "license": "mit"}
    assert Hub("some/where").resolved(before) == Hub("some/where", revision="a" * 40, license="mit")
