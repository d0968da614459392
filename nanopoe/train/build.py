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
from nanopoe.checkpoint.cascade import STAGES, Cascade, check_trunk, digest_of, open_cascade, weights_digest
from nanopoe.checkpoint.store import checkpoints_of
from nanopoe.config import Experiment, Plan, config_hash, make_plan
from nanopoe.config.counts import parameter_shapes, scaling_parameters
from nanopoe.config.plan import parameter_homes
from nanopoe.data.audit import AUDIT
from nanopoe.data.loader import Loader, maker, open_sources, train_loader
from nanopoe.data.validation import EvalBatches, eval_batches
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, DataError, everywhere
from nanopoe.model import GPT
from nanopoe.model.gpt import Linear, enter_block
from nanopoe.model.specialist import scale_entry, warm_start
from nanopoe.model.stages import shared_parameters
from nanopoe.model.windows import prepare
from nanopoe.optim import DistMuonAdamW, build_groups
from nanopoe.schedule import Schedule
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.compute import Compute, choose_compute, out_of_memory
from nanopoe.train.pipeline import Pipeline
from nanopoe.train.restore import (
    check_state,
    check_weights,
    find_checkpoint,
    load_weights,
    saved_weights,
    stored,
    take_state,
)
from nanopoe.train.resume import Lineage, began, check_resume, covers
from nanopoe.train.state_cache import StateCache

# What the chat tokens begin as, in the order of their ids: words that mean about the same (SPEC 8).
WARM_WORDS = ("User", "\n", "Assistant", "\n", "```", "```", "Output", "\n")
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
    keep: StateCache | None = None
    pipe: Pipeline | None = None
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
        compute = choose_compute(experiment.runtime, world, int(os.environ.get("LOCAL_WORLD_SIZE", world.size)),
                                 experiment.data.document_mask)
    with dist.agree(world.device):
        start = find_start(experiment, tokenizer, checkpoint)
    check_same(start, world)
    if start is not None and checkpoint is None and experiment.init_from is not None:
        lineage = began(experiment.init_from, start.digest, start.step, start.new)
        if experiment.init_from.optimizer:
            with dist.agree(world.device):
                start.cascade.base.verify(world.rank, world.size)
            start.cascade.base.mark_verified()
        if start.cascade.config.poe_mode == "none" != experiment.model.poe_mode:
            warnings.append("a PoE has no backout: until they are trained on, the BP's weights compute something else")
    column = stage_column(experiment, plan)
    with dist.agree(world.device), out_of_memory(experiment, world.device):
        model = build_model(experiment, world, compute, checkpoint, start)
        optimizer = build_optimizer(experiment, model, world, compute, plan, column)
        if checkpoint is not None:
            check_state(optimizer, checkpoint)
            optimizer.load_state(checkpoint.optimizer_rows, stored(checkpoint, "optimizer_steps", int))
        elif start is not None and experiment.init_from is not None and experiment.init_from.optimizer:
            take_state(optimizer, start.cascade.base)
        loader, lineage = build_loader(experiment, tokenizer, plan, world, checkpoint, lineage)
    saver = build_saver(experiment, tokenizer, model, optimizer, world, checkpoint, start)
    run = Run(experiment, world, plan, Schedule(experiment.schedule.cycles), compute, tokenizer, model, optimizer,
              loader, saver, pipe=Pipeline(plan, world) if plan.stages else None, lineage=lineage,
              resumed_from=checkpoint, warnings=warnings)
    if experiment.specialist is not None and experiment.specialist.cache_states:
        assert start is not None
        below = digest_of([("chat_rows", model.chat_rows)], start.digest)         # all that the states depend on
        how = (f"{compute_of(model)}-{world.device.type}{'-compiled' * compute.compiled}"
               f"{'-documents' * model.document_mask}")
        run.keep = StateCache(run.folder / "cache" / f"{below[:32]}-{how}", experiment.model.n_embd,
                              model.compute_dtype)
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


@dataclass(frozen=True)
class Start:
    """What a run stands on (specialist) or begins with (init_from): the model, its digest and the step it is of;
    `words` are what the chat tokens begin as, if they are to; `new` are the parameters that it lacks."""

    cascade: Cascade
    digest: str
    step: int
    words: list[list[int]] | None
    new: tuple[str, ...] = ()


def find_start(experiment: Experiment, tokenizer: Tokenizer, checkpoint: Checkpoint | None) -> Start | None:
    """The base of a specialist, or at the first start the weights of init_from; else null.

    CheckpointError when it is not there, has another shape or tokenizer, or is not what `checkpoint` was trained on.
    """
    known = {} if checkpoint is None else checkpoint.manifest.fingerprints
    if experiment.specialist is not None:
        if checkpoint is not None and "base" not in known:
            raise CheckpointError("does not say what it was trained on", checkpoint.path, "use another step")
        path, wanted = experiment.specialist.base, experiment.specialist.base_step
    elif experiment.init_from is not None and checkpoint is None:
        path, wanted = experiment.init_from.path, experiment.init_from.step
    else:
        return None
    if wanted is None and known.get("base_step", "").isdecimal():
        wanted = int(known["base_step"])
    cascade = open_cascade(path, wanted)
    check_below(experiment, cascade, path, tokenizer)
    digest = cascade.digest or weights_digest(cascade.base)
    if known.get("base", digest) != digest:
        raise CheckpointError(f"is not the base this run was trained on, whose digest begins with {known['base'][:12]}",
                              path, "set specialist.base and base_step to the one it was trained on")
    warm = experiment.specialist is not None and experiment.specialist.warm_start
    there = parameter_shapes(cascade.config)
    return Start(cascade, digest, cascade.links[-1].step if cascade.links else cascade.base.step,
                 [tokenizer.encode(word) for word in WARM_WORDS] if warm else None,
                 tuple(name for name in parameter_shapes(experiment.model) if name not in there))


def check_same(start: Start | None, world: World) -> None:
    """All ranks stand on the same: what is frozen is compared here, once. Collective."""
    found = dist.gather_json("" if start is None else start.digest, world.device)
    if len(set(found)) > 1:
        other = next(rank for rank, digest in enumerate(found) if digest != found[0])
        raise everywhere(CheckpointError(f"rank {other} found another base than rank 0", "specialist.base",
                                         "every rank must see the same folder"))


def check_below(experiment: Experiment, cascade: Cascade, path: str, tokenizer: Tokenizer) -> None:
    """The experiment must describe what stands in `path`, and add at most one specialist to it.

    A pretraining may cut the same blocks into other stages, but not from under heads: each was trained for its place.
    """
    base, free = cascade.base.experiment.model, STAGES if experiment.task == "pretrain" else ()
    check_trunk(base, experiment.model, path, free[:1] if base.stage_heads else free)
    there, here = cascade.config.specialists, experiment.model.specialists[:-1]
    if there != here:
        shown = [[s.n_layer for s in shapes] for shapes in (here, there)]
        raise CheckpointError(f"has specialists of {shown[1]} layers, model.specialists has {shown[0]} below the last",
                              path, "list the ones below, then the new one" if experiment.specialist else
                              f"task {experiment.task} starts from a base: name one")
    if experiment.specialist is not None and experiment.name in cascade.names:
        raise CheckpointError(f"has a specialist named {experiment.name} already", path, "give this run another name")
    if there and cascade.config.sequence_len != experiment.model.sequence_len:
        raise CheckpointError(f"was trained with model.sequence_len {cascade.config.sequence_len}", path,
                              "a specialist on a specialist needs the same")
    if cascade.base.manifest.fingerprints.get("tokenizer") != tokenizer.digest:
        raise CheckpointError("was trained with another tokenizer", path, f"use the one in {path}/tokenizer")


def build_model(experiment: Experiment, world: World, compute: Compute, checkpoint: Checkpoint | None,
                start: Start | None = None) -> GPT:
    """On this rank's device, initialised from the seed, or from what it stands on, or loaded from the checkpoint."""
    with torch.device("meta"):
        model = GPT(experiment.model, compute.dtype)
    if checkpoint is not None:
        check_weights(model, checkpoint)                         # before memory is taken for them
    model.to_empty(device=world.device)
    if checkpoint is None:
        model.init_weights(experiment.seed)
    if start is not None:
        load_below(model, start.cascade)
        if start.words:
            warm_start(model, start.words)
        if checkpoint is None and experiment.specialist is not None and experiment.specialist.scale_entry:
            scale_entry(model, experiment.seed)
    if checkpoint is not None:
        load_weights(model, checkpoint)
    model.recompute, model.document_mask = experiment.runtime.activation_checkpointing, experiment.data.document_mask
    if experiment.runtime.float8:
        use_float8(model)
    if compute.compiled:
        compile_blocks(model, compute, experiment.batch.device_batch_size)
    return model


def use_float8(model: GPT) -> None:
    """In the large matrices of blocks that are trained; gates are too narrow, and heads too sensitive."""
    for name, module in model.named_modules():
        if isinstance(module, Linear) and ".h." in f".{name}" and not name.endswith("gate"):
            module.float8 = module.weight.requires_grad


def compile_blocks(model: GPT, compute: Compute, rows: int) -> None:
    """Run blocks compiled on batches of `rows` whole rows; other shapes, as of evaluations and prompts, run as before.

    One graph serves all blocks of a kind, so depth adds no time to compile: what tells kinds apart is the window,
    value embeddings, whether there are gradients and whether the input wants one. No module is wrapped.
    """
    import torch._dynamo as dynamo  # takes a second, and only this needs it

    layout = model.layout
    kinds = {(window, i in layout.ve_layers) for i, window in enumerate(layout.window_sizes)}
    prepare(compute.attention, model.config.sequence_len, {window for window, _ in kinds}, model.lm_head.weight.device)
    limits = dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 6 * (len(kinds) + 1))
    model.compiled = torch.compile(enter_block, dynamic=False, fullgraph=compute.attention.whole)
    model.compiled_for = (rows, model.config.sequence_len)


def load_below(model: GPT, cascade: Cascade) -> None:
    """All parameters that stand in the cascade; the chat tokens are those of the specialist below, or the base's."""
    there = parameter_shapes(cascade.config)
    for name, p in model.named_parameters():
        if name in there:
            p.data.copy_(cascade.read(name))
    if model.config.specialists and not cascade.links:
        model.chat_rows.data.copy_(model.base_chat_rows())


def stage_column(experiment: Experiment, plan: Plan) -> dist.Group | None:
    """The group of the ranks that train the same stages as this one; null without parallel.stages. Collective."""
    columns = [plan.column(c) for c in range(len(plan.stages))]
    return dist.column_group(columns, max(SAVE_TIMEOUT_S, experiment.runtime.timeout_s)) if columns else None


def build_optimizer(experiment: Experiment, model: GPT, world: World, compute: Compute, plan: Plan | None = None,
                    column: dist.Group | None = None) -> DistMuonAdamW:
    """Of all that is trained; a `plan` with stages on different ranks says which of them train what."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = build_groups(params, experiment.optim, experiment.model.n_embd, experiment.batch.tokens_per_step,
                          scaling_parameters(experiment.model))
    return DistMuonAdamW(params, groups, world.rank, world.size, compute.dtype, experiment.runtime.numerics,
                         shared_parameters(model), None if plan is None else parameter_homes(experiment.model, plan),
                         column)


def build_loader(experiment: Experiment, tokenizer: Tokenizer, plan: Plan, world: World, checkpoint: Checkpoint | None,
                 lineage: Lineage) -> tuple[Loader, Lineage]:
    """The loader at the checkpoint's position, and the lineage with what resume.allow let change in the documents."""
    step, position, (group, stage_rank) = 0, None, plan.place(world.rank)
    if checkpoint is not None:
        step, position = checkpoint.step, stored(checkpoint, "position", dict)
    allowed = experiment.resume.allow
    may_change = [name for name, key in (("sources", "data.train"), ("seed", "seed")) if covers(allowed, key)]
    mixed_anew = any(key.startswith("data.train") for entry in lineage if entry["step"] == step
                     for key in entry["changed"])
    loader = train_loader(experiment.data, tokenizer, plan, seed=experiment.seed, rank=group, start_step=step,
                          position=position, threads=torch.get_num_threads(), may_change=may_change, recount=mixed_anew,
                          audit=Path(experiment.out) / AUDIT if experiment.logging.audit and not stage_rank else None,
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
                checkpoint: Checkpoint | None, start: Start | None) -> Saver:
    """Collective: the saving thread has a process group of its own."""
    group = dist.side_group(max(SAVE_TIMEOUT_S, experiment.runtime.timeout_s))
    with dist.agree(world.device), out_of_memory(experiment, world.device):
        fingerprints = {"config": config_hash(experiment), "tokenizer": tokenizer.digest, "compute": compute_of(model)}
        if start is not None:
            fingerprints |= {"base": start.digest, "base_step": str(start.step)}
        elif checkpoint is not None:                             # of an sft that goes on: what it once began with
            fingerprints |= {key: value for key, value in checkpoint.manifest.fingerprints.items()
                             if key in ("base", "base_step")}
        target = Target(experiment, world, fingerprints, None if checkpoint is None else checkpoint.step, group)
        return Saver(target, saved_weights(model), optimizer.state_parts)


def compute_of(model: GPT) -> str:
    """How blocks compute, as recorded with a checkpoint: "float32", "bfloat16+float8"."""
    eight = any(module.float8 for module in model.modules() if isinstance(module, Linear))
    return str(model.compute_dtype).removeprefix("torch.") + "+float8" * eight


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
