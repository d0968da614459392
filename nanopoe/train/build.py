"""Experiment -> Run: everything that a training needs, built once, fresh or from a checkpoint."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nanopoe import dist
from nanopoe.checkpoint import Checkpoint, Saver, Target, clean, set_aside_after
from nanopoe.checkpoint.store import checkpoints_of
from nanopoe.config import Experiment, Plan, config_hash, make_plan
from nanopoe.config.counts import scaling_parameters
from nanopoe.data.audit import AUDIT
from nanopoe.data.loader import Loader, maker, open_sources, train_loader
from nanopoe.data.validation import EvalBatches, eval_batches
from nanopoe.dist import World
from nanopoe.errors import DataError
from nanopoe.model import GPT
from nanopoe.model.stages import shared_parameters
from nanopoe.optim import DistMuonAdamW, build_groups
from nanopoe.schedule import Schedule
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.compute import Compute, choose_compute, out_of_memory
from nanopoe.train.restore import check_state, check_weights, find_checkpoint, load_weights, stored
from nanopoe.train.resume import Lineage, check_resume, covers

SAVE_TIMEOUT_S = 600        # of a collective of the saving thread, or runtime.timeout_s if that is longer


@dataclass
class Run:
    """What the loop works with. `step` counts completed updates and `tokens` the targets they read; `set_aside` names
    the checkpoints a run left behind when it went back to an older step; `warnings` are for the user."""

    experiment: Experiment
    world: World
    plan: Plan
    schedule: Schedule
    compute: Compute
    tokenizer: Tokenizer
    model: GPT
    optimizer: DistMuonAdamW
    loader: Loader
    saver: Saver
    step: int = 0
    tokens: int = 0
    lineage: Lineage = field(default_factory=list)
    resumed_from: Checkpoint | None = None
    set_aside: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.experiment.out)


def build_run(experiment: Experiment, world: World) -> Run:
    """Build model, optimizer and data on this rank, from the newest (or named) checkpoint if there is one. Collective.

    The run folder must be locked. Errors on any rank are raised on all: ConfigError for a world size that does not
    fit, DataError, CheckpointError for a checkpoint that is damaged or of another experiment.
    """
    warnings: list[str] = []
    with dist.agree(world.device):
        plan = make_plan(experiment, world.size)
        tokenizer = load_tokenizer(experiment)
        if world.is_main:
            warnings += clean(checkpoints_of(experiment.out))
    checkpoint = find_checkpoint(experiment, world, warnings)
    lineage: Lineage = []
    with dist.agree(world.device):
        if checkpoint is not None:
            lineage = check_resume(experiment, checkpoint, tokenizer)
        open_sources(experiment.data.val, experiment.data.kind)  # a wrong path must not wait for an evaluation
        compute = choose_compute(experiment.runtime, world, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)))
    with dist.agree(world.device), out_of_memory(experiment, world.device):
        model = build_model(experiment, world, compute, checkpoint)
        optimizer = build_optimizer(experiment, model, world, compute)
        if checkpoint is not None:
            check_state(optimizer, checkpoint)
            optimizer.load_state(checkpoint.optimizer_rows, stored(checkpoint, "optimizer_steps", int))
        loader, lineage = build_loader(experiment, tokenizer, plan, world, checkpoint, lineage)
    saver = build_saver(experiment, tokenizer, model, optimizer, world, checkpoint)
    run = Run(experiment, world, plan, Schedule(experiment.schedule.cycles), compute, tokenizer, model, optimizer,
              loader, saver, lineage=lineage, resumed_from=checkpoint, warnings=warnings)
    if checkpoint is not None:
        run.step, run.tokens = checkpoint.step, stored(checkpoint, "tokens", int)
        computed = checkpoint.manifest.fingerprints.get("compute")
        if computed != compute_of(model):
            warnings.append(f"computed in {computed} up to here, from here in {compute_of(model)}")
    with dist.agree(world.device):
        if world.is_main:
            keep_tokenizer(Path(experiment.tokenizer), run.folder)
            run.set_aside = set_aside_after(run.folder, run.step)
    return run


def load_tokenizer(experiment: Experiment) -> Tokenizer:
    """The experiment's tokenizer; DataError if its vocabulary is not the model's."""
    tokenizer = Tokenizer.load(experiment.tokenizer)
    if tokenizer.vocab_size != experiment.model.vocab_size:
        raise DataError(f"has {tokenizer.vocab_size} tokens, the model {experiment.model.vocab_size}",
                        experiment.tokenizer, "set model.vocab_size to it, or train another tokenizer")
    return tokenizer


def build_model(experiment: Experiment, world: World, compute: Compute, checkpoint: Checkpoint | None) -> GPT:
    """On this rank's device, initialised from the seed or loaded from the checkpoint."""
    with torch.device("meta"):
        model = GPT(experiment.model, compute.dtype)
    if checkpoint is not None:
        check_weights(model, checkpoint)                         # before memory is taken for them
    model.to_empty(device=world.device)
    if checkpoint is None:
        model.init_weights(experiment.seed)
    else:
        load_weights(model, checkpoint)
    return model


def build_optimizer(experiment: Experiment, model: GPT, world: World, compute: Compute) -> DistMuonAdamW:
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = build_groups(params, experiment.optim, experiment.model.n_embd, experiment.batch.tokens_per_step,
                          scaling_parameters(experiment.model))
    return DistMuonAdamW(params, groups, world.rank, world.size, compute.dtype, experiment.runtime.numerics,
                         shared_parameters(model))


def build_loader(experiment: Experiment, tokenizer: Tokenizer, plan: Plan, world: World, checkpoint: Checkpoint | None,
                 lineage: Lineage) -> tuple[Loader, Lineage]:
    """The loader at the checkpoint's position, and the lineage with what resume.allow let change in the documents."""
    step, position = 0, None
    if checkpoint is not None:
        step, position = checkpoint.step, stored(checkpoint, "position", dict)
    allowed = experiment.resume.allow
    may_change = [name for name, key in (("sources", "data.train"), ("seed", "seed")) if covers(allowed, key)]
    mixed_anew = any(key.startswith("data.train") for entry in lineage if entry["step"] == step
                     for key in entry["changed"])
    loader = train_loader(experiment.data, tokenizer, plan, seed=experiment.seed, rank=world.rank, start_step=step,
                          position=position, threads=torch.get_num_threads(), may_change=may_change, recount=mixed_anew,
                          audit=Path(experiment.out) / AUDIT if experiment.logging.audit else None,
                          pinned=world.device.type == "cuda")
    if position is None:
        return loader, lineage
    then, now = position["fingerprint"]["sources"], loader.fingerprint["sources"]
    if then != now:
        earlier = [entry for entry in lineage if entry["step"] != step]
        asked: dict[str, Any] = next((entry["changed"] for entry in lineage if entry["step"] == step), {})
        lineage = [*earlier, {"step": step, "changed": {**asked, "data.train contents": [then, now]}}]
    return loader, lineage


def build_saver(experiment: Experiment, tokenizer: Tokenizer, model: GPT, optimizer: DistMuonAdamW, world: World,
                checkpoint: Checkpoint | None) -> Saver:
    """Collective: the saving thread has a process group of its own."""
    group = dist.side_group(max(SAVE_TIMEOUT_S, experiment.runtime.timeout_s))
    with dist.agree(world.device), out_of_memory(experiment, world.device):
        fingerprints = {"config": config_hash(experiment), "tokenizer": tokenizer.digest, "compute": compute_of(model)}
        target = Target(experiment, world, fingerprints, None if checkpoint is None else checkpoint.step, group)
        return Saver(target, dict(model.named_parameters()), optimizer.state_parts)


def compute_of(model: GPT) -> str:
    """The dtype of activations as recorded with a checkpoint: "float32"."""
    return str(model.compute_dtype).removeprefix("torch.")


def keep_tokenizer(source: Path, run: Path) -> None:
    """Copy the tokenizer into the run folder, so that the run can be evaluated and exported on its own."""
    if not (run / "tokenizer").exists():
        run.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, run / ".tmp-tokenizer", dirs_exist_ok=True)
        (run / ".tmp-tokenizer").rename(run / "tokenizer")


def validation(experiment: Experiment, tokenizer: Tokenizer, world: World, tokens: int | None = None) -> EvalBatches:
    """This rank's rows of the first `tokens` of the validation split (evaluation.tokens by default)."""
    data, sequence_len = experiment.data, experiment.model.sequence_len
    return eval_batches(
        open_sources(data.val, data.kind), maker(data, tokenizer, sequence_len), tokenizer.bos_id,
        packing=data.packing, tokens=tokens or experiment.evaluation.tokens, sequence_len=sequence_len,
        device_batch_size=experiment.batch.device_batch_size, buffer_documents=data.buffer_documents,
        rank=world.rank, world_size=world.size, threads=torch.get_num_threads())
