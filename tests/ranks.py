"""Small things tests share: model configs, and functions run on several gloo ranks with a file as rendezvous."""

from __future__ import annotations

import multiprocessing
import queue
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from nanopoe.config.schema import ModelConfig

SHARED = Path(__file__).parents[2] / "shared"


def model_config(**changes: Any) -> ModelConfig:
    """A tiny PoE model: 4 layers in 2 stages, d 32, two heads, V 300, T 32."""
    base: dict[str, Any] = dict(
        n_layer=4, n_embd=32, n_head=2, n_kv_head=2, intermediate_size=None, vocab_size=300, sequence_len=32,
        window_pattern="SSSL", poe_mode="flat", poe_every=2, poe_stage_layers=None, stage_heads=False, detach_x0=False)
    base.update(changes)
    return ModelConfig(**base)


def _worker(function: Callable[..., Any], rank: int, size: int, init: str, results: Any, args: tuple[Any, ...]) -> None:
    import torch

    from nanopoe import dist

    torch.set_num_threads(1)
    try:
        with dist.world("cpu", 60, rank, size, init) as world:
            value = function(world, *args)
            results.put((rank, None, value))
            dist.barrier()
    except BaseException:
        results.put((rank, traceback.format_exc(), None))


def forked() -> ForkServerContext:
    """Processes that are forked from one with all heavy modules imported: a child starts in 0.1 s, not in 4.

    The one way to start them: a test process has one fork server, and whoever starts it chooses what it has imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    return context


def run_ranks(function: Callable[..., Any], size: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """function(world, *args) on `size` ranks; what each returned (no tensors: lists, numbers, bytes), in rank order."""
    context = forked()
    with tempfile.TemporaryDirectory() as folder:
        results = context.Queue()
        init = f"file://{folder}/rendezvous"
        ranks = [context.Process(target=_worker, args=(function, r, size, init, results, args)) for r in range(size)]
        for p in ranks:
            p.start()
        values: dict[int, Any] = {}
        try:
            for _ in range(size):
                rank, failure, value = results.get(timeout=timeout)
                if failure is not None:
                    raise AssertionError(f"rank {rank} failed:\n{failure}")
                values[rank] = value
            for p in ranks:
                p.join(timeout)
        except queue.Empty:
            raise AssertionError(f"ranks {sorted(set(range(size)) - set(values))} did not answer") from None
        finally:
            for p in ranks:
                if p.is_alive():
                    p.kill()
        return [values[r] for r in range(size)]


def write_shard(path: Path, documents: list[str], group: int = 32) -> None:
    """A parquet shard with row groups of `group` documents."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": documents}), path, row_group_size=group, compression="zstd")


def tiny_data(folder: Path) -> Path:
    """folder/{train,val,tokenizer}: a few hundred documents of made-up sentences and a tokenizer of 300 for them."""
    import random

    from nanopoe.tokenizer import Tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choice("aeioubdklmnrst") for _ in range(draw.randint(2, 7))) for _ in range(60)]
    documents = [" ".join(draw.choice(words) for _ in range(draw.randint(4, 60))) + "." for _ in range(300)]
    write_shard(folder / "train" / "shard_00000.parquet", documents[:130])
    write_shard(folder / "train" / "shard_00001.parquet", documents[130:260])
    write_shard(folder / "val" / "shard_00000.parquet", documents[260:])
    Tokenizer.train(documents, 300).save(folder / "tokenizer")
    return folder


def experiment_dict(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A tiny experiment on `tiny_data`: two cycles of 5 and 3 steps, 2 micro-batches; `changes` as dotted keys."""
    cycle = {"warmup_steps": 1, "warmdown_ratio": 0.4, "final_frac": 0.1, "momentum_warmup_steps": 2}
    base: dict[str, Any] = {
        "name": "tiny", "run_dir": str(run_dir), "seed": 7, "tokenizer": str(data / "tokenizer"),
        "model": {**model_config().model_dump(mode="json"), "stage_heads": True},
        "objective": {"kind": "ce", "alpha": 0.0, "rho": None},
        "data": {"train": [{"name": "tiny", "path": str(data / "train")}],
                 "val": [{"name": "tiny", "path": str(data / "val")}],
                 "packing": "bestfit_crop", "lanes": 4, "buffer_documents": 8, "case_aug_prob": 0.1},
        "batch": {"tokens_per_step": 32 * 4 * 2, "device_batch_size": 4}, "parallel": {"stages": 1},
        "schedule": {"cycles": [{"steps": 5, "peak": 1.0, **cycle},
                                {"steps": 3, "peak": 0.5, **cycle, "momentum_warmup_steps": 0}]},
        "optim": {"matrix_lr": 0.02, "embedding_lr": 0.1, "unembedding_lr": 0.01, "scalar_lr": 0.1, "weight_decay": 0.1,
                  "reference_batch_tokens": None, "reference_scaling_params": None},
        "runtime": {"device": "cpu", "compute_dtype": "float32", "threads": 1, "timeout_s": 60},
        "checkpoint": {"every": 1}, "evaluation": {"every": 4, "tokens": 256}, "logging": {"every": 1, "pool_every": 2},
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        target = base
        for part in path:
            target = target[int(part)] if isinstance(target, list) else target[part]
        target[last] = value
    return base
