"""Shared by all tests: one thread before torch is imported, small models, golden files, ranks on gloo."""

from __future__ import annotations

import atexit
import importlib
import os
import shutil
import sys
import tempfile

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Code of exports is copied here, by tests and their children: a copy that another run left half-written breaks both.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="nanopoe-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

from functools import partial  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from nanopoe.data.embedded import embedded_conversations  # noqa: E402
from nanopoe.data.ingest import Raw  # noqa: E402
from nanopoe.model import GPT  # noqa: E402
from nanopoe.tokenizer import Tokenizer  # noqa: E402
from nanopoe.train import compute  # noqa: E402
from tests.commands import Call, Done, call, write_yaml  # noqa: E402
from tests.models import trained_model  # noqa: E402
from tests.ranks import SHARED, experiment_dict, tiny_data  # noqa: E402

torch.set_num_threads(1)
compute.PEAK_S = 0.0         # else a start multiplies matrices for 0.3 s, to tell its MFU: a quarter of a tiny run


# Fixtures that cost seconds are shared by the tests of these modules, so one worker runs them all.
TOGETHER = {"embedded": ("test_embedded", "test_constrain", "test_split", "test_tools"),
            "exports": ("test_export", "test_export_modes", "test_export_modes_stock", "test_export_generation",
                        "test_export_repo", "test_export_tokenizer"),
            "trained": ("test_routing", "test_speculative", "test_wand")}
GROUP = {module: group for group, modules in TOGETHER.items() for module in modules}
# Tests of these need nothing of each other, and many are long: each goes where there is time.
APART = ("test_faults", "test_train", "test_cli", "test_signals", "test_bench", "test_cli_refusals")
# What is longest comes first, that no worker waits for the other at the end; all else as it is found.
FIRST = (*APART, "embedded", "exports", "test_specialist", "test_trajectory", "test_generate", "test_resume",
         "test_stage_parallel", "test_heartbeat", "test_ingest_resume", "test_export_stage_run", "test_delta")


def unit_of(nodeid: str) -> str:
    """What must run on one worker with this test: it alone, its module, or modules that share fixtures."""
    module = Path(nodeid.partition("::")[0]).stem
    return nodeid if module in APART else GROUP.get(module, module)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {unit: i for i, unit in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(GROUP.get(item.path.stem, item.path.stem), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadscope` by units. xdist's own groups are lost with pytest 9.2 (pytest-xdist issue 1386)."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit_of(nodeid)

    return Units(config, log) if config.getoption("dist") == "loadscope" else None


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the reference trainer's tiny model; skips where it is not beside the project."""
    folder = SHARED / "golden" / "mha_d4"
    if not folder.is_dir():
        pytest.skip("needs ../shared/golden, which does not come with a clone")
    return folder


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Folder of real text in parquet; skips where it is not beside the project."""
    folder = SHARED / "corpus"
    if not folder.is_dir():
        pytest.skip("needs ../shared/corpus, which does not come with a clone")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and tokenizer of a few hundred made-up documents."""
    return tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def trained(corpus: Path) -> tuple[GPT, Tokenizer]:
    """A PoE of 3 stages that has seen some seconds of real text, and its tokenizer."""
    return trained_model(corpus)


@pytest.fixture(scope="session")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Small models of each kind, exported and loaded once (tests.exports.Exports)."""
    from tests.exports import Exports, source_tokenizer

    return Exports(tmp_path_factory.mktemp("exports"), source_tokenizer())


@pytest.fixture(scope="session")
def tokenizer(exports: Any) -> Tokenizer:
    """That of the exports."""
    return exports.tokenizer


@pytest.fixture(scope="session")
def calibrated(trained: tuple[GPT, Tokenizer], corpus: Path) -> tuple[GPT, list[list[int]], dict[str, Any]]:
    """The trained model, prompts of real text, and its calibration on other text."""
    from tests.exports import calibrated_text

    return calibrated_text(*trained, corpus)


@pytest.fixture(scope="session")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.yaml, the experiment of tests.ranks, and its finished run in run/. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    done = call("train", write_yaml(folder / "tiny.yaml", experiment_dict(data, folder / "run")), folder=folder)
    assert done.code == 0, done
    return folder


@pytest.fixture(scope="session")
def embedded() -> list[Raw]:
    """The conversations made of this Python, seed 0: seconds to make, so not once in each module."""
    return list(embedded_conversations())


@pytest.fixture
def cli(tmp_path: Path) -> Call:
    """cli(script, *arguments): the script in a process of its own (tests.commands.call)."""
    return partial(call, folder=tmp_path)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """command(script, *arguments): the script's main in this process, as what tests.commands.call gives of a child."""
    def here(script: str, *arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", [f"scripts.{script}", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            importlib.import_module(f"scripts.{script}").main()
        return Done(left.value.code, *capsys.readouterr())               # type: ignore[arg-type]

    return here
