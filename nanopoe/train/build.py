"""Experiment -> Run: everything that a training needs, built once, fresh or from a checkpoint."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanopoe import dist
from nanopoe.checkpoint import Checkpoint, list_steps, open_checkpoint, open_tokenizer
from nanopoe.checkpoint.store import set_aside_after
from nanopoe.config import Experiment, Plan, dump_experiment, make_plan
from nanopoe.config.counts import scaling_parameters
from nanopoe.config.load import NOT_LEARNED
from nanopoe.data.loader import Loader, open_sources, train_loader
from nanopoe.data.validation import EvalBatches, eval_batches
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, DataError
from nanopoe.model import GPT
from nanopoe.optim import DistMuonAdamW, build_groups
from nanopoe.schedule import Schedule
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.compute import Compute, choose_compute, out_of_memory

# What may change when a run goes on, beside NOT_LEARNED: places (their contents are compared by digest), the
# validation split, how a step is cut into micro-batches, and the schedule, for which check_resume has its own rule.
FREE = re.compile(rf"({'|'.join(NOT_LEARNED)}|schedule|data\.val)(\..*)?|tokenizer|batch\.device_batch_size|"
                  r"data\.train\.\d+\.(path|files)")


@dataclass
class Run:
    """What the loop works with. `step` counts completed updates; `set_aside` names the checkpoints a run left behind
    when it went back to an older step."""

    experiment: Experiment
    world: World
    plan: Plan
    schedule: Schedule
    compute: Compute
    tokenizer: Tokenizer
    model: GPT
    optimizer: DistMuonAdamW
    loader: Loader
    step: int
    resumed_from: Checkpoint | None
    set_aside: list[str]

    @property
    def folder(self) -> Path:
        return Path(self.experiment.out)


def build_run(experiment: Experiment, world: World) -> Run:
    """Build model, optimizer and data on this rank, from the newest (or named) checkpoint if there is one. Collective.

    Errors on any rank are raised on all: ConfigError for a world size that does not fit, DataError, CheckpointError
    for a checkpoint that is damaged or of another experiment.
    """
    with dist.agree(world.device):
        plan = make_plan(experiment, world.size)
        tokenizer = load_tokenizer(experiment)
        checkpoint = find_checkpoint(experiment)
        if checkpoint is not None:
            check_resume(experiment, checkpoint, tokenizer)
        open_sources(experiment.data.val)                        # a wrong path must not wait for an evaluation
        compute = choose_compute(experiment.runtime, world, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    with dist.agree(world.device), out_of_memory(experiment, world.device):
        model = build_model(experiment, world, compute, checkpoint)
        optimizer = build_optimizer(experiment, model, world, compute)
        step, position = 0, None
        if checkpoint is not None:
            step, position = checkpoint.step, checkpoint.state["position"]
            optimizer.load_state(checkpoint.optimizer_rows, checkpoint.state["optimizer_steps"])
        loader = train_loader(experiment.data, tokenizer, plan, seed=experiment.seed, rank=world.rank,
                              start_step=step, position=position, threads=torch.get_num_threads())
    set_aside: list[str] = []
    with dist.agree(world.device):
        if world.is_main:
            keep_tokenizer(Path(experiment.tokenizer), Path(experiment.out))
            set_aside = set_aside_after(experiment.out, step)
    return Run(experiment, world, plan, Schedule(experiment.schedule.cycles), compute, tokenizer, model, optimizer,
               loader, step, checkpoint, set_aside)


def load_tokenizer(experiment: Experiment) -> Tokenizer:
    """The experiment's tokenizer; DataError if its vocabulary is not the model's."""
    tokenizer = Tokenizer.load(experiment.tokenizer)
    if tokenizer.vocab_size != experiment.model.vocab_size:
        raise DataError(f"has {tokenizer.vocab_size} tokens, the model {experiment.model.vocab_size}",
                        experiment.tokenizer, "set model.vocab_size to it, or train another tokenizer")
    return tokenizer


def find_checkpoint(experiment: Experiment) -> Checkpoint | None:
    """What to go on from: resume.step, else the newest, else nothing."""
    if experiment.resume.step is None and not list_steps(experiment.out):
        return None
    return open_checkpoint(experiment.out, experiment.resume.step)


def check_resume(experiment: Experiment, checkpoint: Checkpoint, tokenizer: Tokenizer) -> None:
    """Refuse to go on from a checkpoint whose learned weights would have come out otherwise.

    Appending cycles is the one change allowed: it leaves every earlier step as it was.
    """
    saved, where = checkpoint.experiment, checkpoint.path
    old, new = saved.schedule.cycles, experiment.schedule.cycles
    if new[: len(old)] != old:
        raise CheckpointError("was trained with other schedule.cycles", where,
                              "cycles may only be appended; use another run_dir for a new run")
    ended = sum(cycle.steps for cycle in old)
    if len(new) > len(old) and checkpoint.step != ended:
        raise CheckpointError(f"cycles were appended, but this is step {checkpoint.step} of {ended}", where,
                              "finish the cycles before, then append")
    then, now = (dict(leaves(dump_experiment(e))) for e in (saved, experiment))
    changed = [f"{key} {then.get(key)}, now {now.get(key)}" for key in {**then, **now}
               if then.get(key) != now.get(key) and not FREE.fullmatch(key)]
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise CheckpointError(f"was trained with {'; '.join(changed[:4])}{more}", where,
                              "use the saved config.json's values, or another run_dir for a new run")
    digest = checkpoint.manifest.value.get("fingerprints", {}).get("tokenizer")
    if digest != tokenizer.digest:
        raise CheckpointError("was trained with another tokenizer", where, f"its sha256 begins with {str(digest)[:12]}")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """The plain values in nested dicts and lists, by dotted path."""
    if not isinstance(value, dict | list):
        yield path, value
        return
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        yield from leaves(item, f"{path}.{key}" if path else str(key))


def build_model(experiment: Experiment, world: World, compute: Compute, checkpoint: Checkpoint | None) -> GPT:
    """On this rank's device, initialised from the seed or loaded from the checkpoint."""
    with torch.device("meta"):
        model = GPT(experiment.model, compute.dtype)
    model.to_empty(device=world.device)
    if checkpoint is None:
        model.init_weights(experiment.seed)
    else:
        load_weights(model, checkpoint)
    return model


def load_weights(model: GPT, checkpoint: Checkpoint) -> None:
    """Every parameter from the checkpoint; CheckpointError naming what is missing, unknown or of another shape."""
    tensors, params = checkpoint.load_model_tensors(), dict(model.named_parameters())
    missing, unknown = params.keys() - tensors.keys(), tensors.keys() - params.keys()
    for problem, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise CheckpointError(f"{problem} {', '.join(sorted(names)[:3])}", checkpoint.path,
                                  "use the run's own config")
    for name, p in params.items():
        if tensors[name].shape != p.shape:
            raise CheckpointError(f"{name} has shape {list(tensors[name].shape)}, the model {list(p.shape)}",
                                  checkpoint.path, "use the run's own config")
        p.data.copy_(tensors[name])


def build_optimizer(experiment: Experiment, model: GPT, world: World, compute: Compute) -> DistMuonAdamW:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = build_groups(params, experiment.optim, experiment.model.n_embd, experiment.batch.tokens_per_step,
                          scaling_parameters(experiment.model))
    return DistMuonAdamW(params, groups, world.rank, world.size, compute.dtype)


def keep_tokenizer(source: Path, run: Path) -> None:
    """Copy the tokenizer into the run folder, so that the run can be evaluated and exported on its own."""
    if not (run / "tokenizer").exists():
        run.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, run / ".tmp-tokenizer", dirs_exist_ok=True)
        (run / ".tmp-tokenizer").rename(run / "tokenizer")


def validation(experiment: Experiment, tokenizer: Tokenizer, world: World, tokens: int | None = None) -> EvalBatches:
    """This rank's rows of the first `tokens` of the validation split (evaluation.tokens by default)."""
    return eval_batches(
        open_sources(experiment.data.val), tokenizer.encode_batch, tokenizer.bos_id,
        tokens=tokens or experiment.evaluation.tokens, sequence_len=experiment.model.sequence_len,
        device_batch_size=experiment.batch.device_batch_size, buffer_documents=experiment.data.buffer_documents,
        rank=world.rank, world_size=world.size, threads=torch.get_num_threads())


def load_trained(run_dir: str | Path, step: int | None, world: World) -> tuple[GPT, Tokenizer, Checkpoint]:
    """A trained model with its tokenizer, to evaluate, generate or export; fp32 arithmetic. Collective."""
    with dist.agree(world.device):
        checkpoint = open_checkpoint(run_dir, step)
        tokenizer = open_tokenizer(run_dir, checkpoint)
        with torch.device("meta"):
            model = GPT(checkpoint.experiment.model)
        model.to_empty(device=world.device)
        load_weights(model, checkpoint)
    return model.eval(), tokenizer, checkpoint
