"""The run: steps until the schedule ends, checkpoints and evaluations on the way. One loop for every experiment."""

from __future__ import annotations

import time
from typing import Any

from nanopoe import dist
from nanopoe.checkpoint import save_checkpoint
from nanopoe.config import Experiment, config_hash, dump_experiment
from nanopoe.config.counts import count_parameters, flops_per_token
from nanopoe.data.loader import merge_positions
from nanopoe.dist import World
from nanopoe.train.build import Run, build_run, validation
from nanopoe.train.compute import memory_bytes, out_of_memory
from nanopoe.train.evaluate import evaluate
from nanopoe.train.step import Losses, train_step
from nanopoe.train.watch import Header, Watch


def train(experiment: Experiment, world: World) -> Run:
    """Train to the end of the schedule, from the newest checkpoint on if there is one; returns the finished run.

    Collective. A run that is already finished says so and changes nothing.
    """
    run = build_run(experiment, world)
    with run.loader, watch_of(run) as watch, out_of_memory(experiment, world.device):
        if run.resumed_from is not None:
            watch.event("resumed", checkpoint=str(run.resumed_from.path), lr_scale=run.schedule.lr_scale(run.step),
                        set_aside=run.set_aside or None)
            evaluate_if_due(run, watch)                          # the run may have died before it
        if run.step == run.plan.total_steps:
            watch.event("nothing to do", step=run.step)
        while run.step < run.plan.total_steps:
            start = time.perf_counter()
            with dist.agree(world.device):                       # a bad shard on one rank stops all
                rows, position = next(run.loader)
            pool = run.experiment.logging.pool_every
            losses = train_step(run.model, run.optimizer, rows, run.step, experiment.objective, run.schedule, run.plan,
                                world, report_pool=(run.step + 1) % pool == 0 or run.step == 0)
            watch.train(report(run, losses, time.perf_counter() - start))
            run.step += 1
            if due(run.step, experiment.checkpoint.every, run.plan.total_steps):
                save(run, position, watch)                       # before the evaluation, which could fail
            evaluate_if_due(run, watch)
        watch.event("finished", step=run.step, folder=str(run.folder))
    return run


def due(step: int, every: int | None, total: int) -> bool:
    """Whether something that happens `every` so many steps, and at the end, happens after `step` updates."""
    return step == total or (every is not None and step % every == 0)


def watch_of(run: Run) -> Watch:
    log, m = run.experiment.logging, run.experiment.model
    header = Header(
        name=run.experiment.name, parameters=count_parameters(m).total,
        device=f"{run.world.device} {run.compute.device_name}",
        dtype=str(run.compute.dtype).removeprefix("torch."), dtype_reason=run.compute.reason, world_size=run.world.size,
        config_hash=config_hash(run.experiment), n_stages=run.model.layout.n_stages, total_steps=run.plan.total_steps,
        poe_mode=m.poe_mode)
    return Watch(run.folder, header, run.world, start_step=run.step, every=log.every, wandb_mode=log.wandb,
                 wandb_project=log.wandb_project, config=dump_experiment(run.experiment))


def report(run: Run, losses: Losses, seconds: float) -> dict[str, Any]:
    """The train line of metrics.jsonl for the step just made (run.step is still the one before)."""
    tokens_per_s = run.plan.tokens_per_step / seconds
    flops = tokens_per_s * flops_per_token(run.experiment.model)
    muon_decay = next((b.group.weight_decay for b in run.optimizer.buckets if b.is_muon), 0.0)
    return {
        "step": run.step + 1, "tokens": (run.step + 1) * run.plan.tokens_per_step, "loss": losses.loss,
        "stage_loss": losses.stage_loss, "pool_loss": losses.pool_loss, "lr_scale": run.schedule.lr_scale(run.step),
        "momentum": run.schedule.momentum(run.step),
        "weight_decay": muon_decay * run.schedule.weight_decay_scale(run.step), "grad_norm": losses.grad_norm,
        "seconds": seconds, "tokens_per_s": tokens_per_s, "mfu": flops / (run.compute.peak_flops * run.world.size),
        "memory_bytes": memory_bytes(run.world.device),
    }


def save(run: Run, position: dict[str, Any], watch: Watch) -> None:
    """Commit a checkpoint of the present step, with the data position after the last batch trained on. Collective."""
    start = time.perf_counter()
    state = {"step": run.step, "tokens": run.step * run.plan.tokens_per_step, "optimizer_steps": run.optimizer.steps,
             "position": merge_positions(dist.gather_json(position, run.world.device))}
    fingerprints = {"config": config_hash(run.experiment), "tokenizer": run.tokenizer.digest}
    path = save_checkpoint(run.folder, run.experiment, run.world, dict(run.model.named_parameters()),
                           run.optimizer.state_parts(), state, fingerprints, run.experiment.checkpoint.keep_last,
                           None if run.resumed_from is None else run.resumed_from.step)
    watch.event("checkpoint", path=str(path), seconds=round(time.perf_counter() - start, 2))


def evaluate_if_due(run: Run, watch: Watch) -> None:
    """Bits per byte and accuracy of every view on evaluation.tokens of the validation split, once a step.

    Collective.
    """
    every = run.experiment.evaluation.every
    if not due(run.step, every, run.plan.total_steps) or run.step in watch.evaluated:
        return
    with dist.agree(run.world.device):
        batches = validation(run.experiment, run.tokenizer, run.world)
    if not batches.complete:
        watch.event("warning", what=f"the validation split fills {batches.rows} of {batches.rows_wanted} rows wanted")
    watch.eval(evaluate(run.model, batches, run.tokenizer.token_bytes), run.step)
