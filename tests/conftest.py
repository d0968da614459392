"""Shared by all tests: one thread before torch is imported, small models, golden files, ranks on gloo."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[variable] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Code of exports is copied here, by tests and their children: a copy that another run left half-written breaks both.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="nanopoe-modules-")
atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from nanopoe.model import GPT  # noqa: E402
from nanopoe.tokenizer import Tokenizer  # noqa: E402
from tests.models import trained_model  # noqa: E402
from tests.ranks import SHARED, tiny_data  # noqa: E402

torch.set_num_threads(1)


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
