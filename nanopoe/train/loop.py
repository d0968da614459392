"""The run: steps until the schedule ends, checkpoints and evaluations on the way. One loop for every experiment."""

from __future__ import annotations

import time
from typing import Any

from nanopoe import dist
from nanopoe.checkpoint import run_lock
from nanopoe.checkpoint.lock import life_of
from nanopoe.config import Experiment, config_hash, dump_experiment
from nanopoe.config.counts import count_parameters, flops_per_token
from nanopoe.data.position import merge_positions, summary
from nanopoe.dist import World
from nanopoe.schedule import Schedule
from nanopoe.train.build import Run, build_run, validation
from nanopoe.train.compute import Collector, expand_segments, memory_bytes, out_of_memory
from nanopoe.train.doctor import preflight
from nanopoe.train.drift import compare_ranks
from nanopoe.train.evaluate import evaluate
from nanopoe.train.saves import Saves
from nanopoe.train.signals import Signals
from nanopoe.train.status import Status
from nanopoe.train.step import Losses, train_step
from nanopoe.train.watch import Header, Watch


def train(experiment: Experiment, world: World, signals: Signals | None = None, status: Status | None = None) -> Run:
    """Train to the end of the schedule, from the newest checkpoint on if there is one; returns the run.

    Collective. A run that is already finished says so and changes nothing. When `signals` of any rank ask to stop, all
    ranks save what is not yet saved and leave at the same step; `status` says "preempted" then, else "finished".
    """
    signals, status = signals or Signals(), status or Status(experiment.out, world.rank, world.size)
    dist.mark("build", 0)
    expand_segments(world.device)
    with run_lock(experiment.out, world) as warnings:
        healthy = preflight(experiment, world)
        run = build_run(experiment, world)
        run.warnings += warnings + healthy.warnings
        status.begin(run.step, run.plan.total_steps, dist.gather_json(life_of(run.folder), world.device)[0])
        with run.loader, run.saver, watch_of(run) as watch, out_of_memory(experiment, world.device), \
                Collector() as collector:
            watch.event("doctor", healthy.line)
            go_on(run, watch, signals, status, collector)
    return run


def go_on(run: Run, watch: Watch, signals: Signals, status: Status, collector: Collector) -> None:
    """Steps, saves and evaluations, to the end or until a signal. Collective."""
    experiment, total = run.experiment, run.plan.total_steps
    saves, position = Saves(run, watch, status), None
    stop = step_ends(run, signals, saves)
    greet(run, watch)
    if run.resumed_from is not None:
        stop = stop or not evaluate_if_due(run, watch, signals)            # the run may have died before it
    while not stop and run.step < total:
        tell_cycle(run, watch)
        position = advance(run, watch, warm=position is not None)
        collector.start()
        status.step = run.step
        if run.keep is not None and run.keep.problem:
            watch.event("warning", what=f"states are no longer kept in {run.keep.folder}: {run.keep.take_problem()}")
        stop = step_ends(run, signals, saves)
        last = stop or run.step == total
        if last or due(run.step, experiment.checkpoint.every, total):
            run.optimizer.spread()
            saves.save(position, wait=last)                      # before the evaluation, which could fail
        elif due(run.step, experiment.runtime.compare_every, total):
            run.optimizer.spread()
            compare_ranks(run.optimizer, run.world)
        if due(run.step, experiment.evaluation.every, total):
            tell_data(run, position, watch)
        stop = stop or not evaluate_if_due(run, watch, signals)
        pauses = experiment.checkpoint.every, experiment.runtime.compare_every, experiment.evaluation.every
        if any(due(run.step, every, total) for every in pauses):            # all ranks wait here anyway
            collector.collect()
    saves.finish(position)
    leave(run, watch, signals, status, preempted=stop)


def greet(run: Run, watch: Watch) -> None:
    """What the user should know before the first step."""
    for warning in run.warnings:
        watch.event("warning", what=warning)
    compare_ranks(run.optimizer, run.world)
    if (checkpoint := run.resumed_from) is not None:
        before = Schedule(checkpoint.experiment.schedule.cycles).lr_scale(max(run.step - 1, 0))
        changed = [key for entry in run.lineage if entry["step"] == run.step for key in entry["changed"]]
        cycle, inside = run.schedule.cycle_at(run.step)
        watch.event("resumed", checkpoint=str(checkpoint.path), lr_scale_before=before,
                    lr_scale=run.schedule.lr_scale(run.step), cycle=cycle, anchor=run.step - inside,
                    changed=changed or None, set_aside=run.set_aside or None)
    elif run.lineage:
        begun = run.lineage[0]["changed"]["init_from"][1]
        new = f"; initialised from the seed: {', '.join(begun['initialised'])}" if begun["initialised"] else ""
        watch.event("begun", f"with the weights of {begun['path']}, step {begun['step']}, "
                             f"{'and' if begun['optimizer'] else 'without'} its optimizer's state{new}", **begun)
    if run.step == run.plan.total_steps:
        watch.event("nothing to do", step=run.step)


def tell_cycle(run: Run, watch: Watch) -> None:
    """The seam, if the next update is the first of a further cycle: what changes from the update before it."""
    schedule, step = run.schedule, run.step
    cycle, inside = schedule.cycle_at(step)
    if cycle == 0 or inside:
        return
    before, after = schedule.lr_scale(step - 1), schedule.lr_scale(step)
    momentum = f"{schedule.momentum(step - 1):.3f} before, {schedule.momentum(step):.3f}"
    watch.event("cycle", f"{cycle}, of {schedule.cycles[cycle].steps:,} steps, begins after step {step:,}: "
                         f"lr x{before:.6g} before, x{after:.6g} from here; momentum {momentum} from here",
                cycle=cycle, anchor=step, lr_scale_before=before, lr_scale=after)


def advance(run: Run, watch: Watch, warm: bool) -> dict[str, Any]:
    """Make one update and tell of it; returns the data position after its batch. Collective.

    The first update of a life is not `warm`: kernels and memory are set up in it, which counts as building.
    """
    experiment, step, start = run.experiment, run.step + 1, time.perf_counter()
    dist.mark("data" if warm else "build", step)
    with dist.agree(run.world.device):                           # a bad shard on one rank stops all
        rows, position = next(run.loader)
    waited = time.perf_counter() - start
    dist.mark("forward/backward" if warm else "build", step)
    losses = train_step(run.model, run.optimizer, rows, run.step, experiment.objective, run.schedule, run.plan,
                        run.world, report_pool=step % experiment.logging.pool_every == 0 or step == 1, keep=run.keep,
                        pipe=run.pipe)
    run.tokens += losses.targets
    watch.train(report(run, losses, time.perf_counter() - start, waited))
    run.step = step
    if run.pipe is not None and run.pipe.column > 0:             # the first of its data group tells where that stands
        position = {**position, "lanes": {}}
    return position


def tell_data(run: Run, position: dict[str, Any], watch: Watch) -> None:
    """How the mixture came out and what packing cost, from the first step on (resumes included). Collective."""
    lanes = {number: {key: value for key, value in lane.items() if key != "buffer"}           # large, and told nowhere
             for number, lane in position["lanes"].items()}
    told = summary(merge_positions(dist.gather_json({**position, "lanes": lanes}, run.world.device)))
    sources = ", ".join(f"{name} {100 * s['share']:.2f} % (of {100 * s['weight']:.2f}) epoch {s['epochs']:.2f}"
                        for name, s in told["sources"].items())
    text = f"rows {100 * told['utilisation']:.1f} % full, {100 * told['cropped']:.1f} % of tokens cropped; {sources}"
    if told["truncated"]:
        text += f"; {told['truncated']:,} conversations lost their front, {told['cropped_tokens']:,} tokens"
    if told["passes"] is not None:
        text = f"pass {told['passes']:.2f} over the same rows: {text}"
    watch.event("data", text, **told)


def step_ends(run: Run, signals: Signals, saves: Saves) -> bool:
    """The small all-reduce of a step's end: takes the outcome of a save that all ranks have; whether a signal asks any
    rank to stop. Collective."""
    asked, finished = dist.sum_integers([signals.asked, run.saver.finished], run.world.device)
    saves.take(finished)
    return asked > 0


def leave(run: Run, watch: Watch, signals: Signals, status: Status, preempted: bool) -> None:
    """The last words of a run that ends in order. Collective."""
    dist.mark("end", run.step)
    if not preempted:
        watch.event("finished", step=run.step, folder=str(run.folder))
        status.tell("finished", run.step)
        return
    signals.settle()                                             # all is saved: no signal may spoil the exit code
    names = dist.gather_json(signals.name, run.world.device)
    reason = ", ".join(f"{name} on rank {rank}" for rank, name in enumerate(names) if name)
    watch.event("preempted", step=run.step, reason=reason)
    status.tell("preempted", run.step, reason)


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
        grid=run.plan.grid(), poe_mode=m.poe_mode, new_layers=m.specialists[-1].n_layer if m.specialists else 0)
    return Watch(run.folder, header, run.world, start_step=run.step, every=log.every, wandb_mode=log.wandb,
                 wandb_project=log.wandb_project, config=dump_experiment(run.experiment))


def report(run: Run, losses: Losses, seconds: float, waited: float) -> dict[str, Any]:
    """The train line of metrics.jsonl for the step just made (run.step is still the one before). Of `seconds`, rank 0
    and those it agrees with `waited` for rows."""
    tokens_per_s = run.plan.tokens_per_step / seconds
    flops = tokens_per_s * flops_per_token(run.experiment.model)
    muon_decay = next((b.group.weight_decay for b in run.optimizer.parcels if b.group.kind == "muon"), 0.0)
    line = {
        "step": run.step + 1, "tokens": run.tokens, "loss": losses.loss,
        "stage_loss": losses.stage_loss, "pool_loss": losses.pool_loss, "lr_scale": run.schedule.lr_scale(run.step),
        "momentum": run.schedule.momentum(run.step),
        "weight_decay": muon_decay * run.schedule.weight_decay_scale(run.step), "grad_norm": losses.grad_norm,
        "seconds": seconds, "wait_seconds": waited, "tokens_per_s": tokens_per_s,
        "mfu": flops / (run.compute.peak_flops * run.world.size), "memory_bytes": memory_bytes(run.world.device),
    }
    if losses.idle is not None:
        line["idle"] = [idle / seconds for idle in losses.idle]                   # of each rank, shares of the step
    return line


def evaluate_if_due(run: Run, watch: Watch, signals: Signals) -> bool:
    """Bits per byte and accuracy of every view on evaluation.tokens of the validation split, once a step.

    Collective. False when a signal on any rank cut it short: it is dropped, and made up for when the run goes on.
    """
    every = run.experiment.evaluation.every
    if not due(run.step, every, run.plan.total_steps) or run.step in watch.evaluated:
        return True
    dist.mark("evaluate", run.step)
    run.optimizer.spread()
    with dist.agree(run.world.device):
        batches = validation(run.experiment, run.tokenizer, run.world)
    result = evaluate(run.model, batches, run.tokenizer.token_bytes, stop=lambda: signals.asked)
    if not result:
        return False
    if not batches.complete:
        watch.event("warning", what=f"the validation split fills {batches.rows} of {batches.rows_wanted} rows wanted")
    if batches.truncated:
        watch.event("warning", what=f"{batches.truncated:,} conversations of the validation lost their front")
    watch.eval({**result, "truncated": batches.truncated}, run.step)
    return True
