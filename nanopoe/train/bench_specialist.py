"""What a specialist's step costs beside full fine-tuning of a model as deep: time, and memory of activations."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe.config import Experiment, make_plan
from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ModelConfig, ObjectiveConfig
from nanopoe.dist import World
from nanopoe.errors import ConfigError
from nanopoe.model import GPT
from nanopoe.model.loss import split_rows
from nanopoe.model.specialist import Keep, backward
from nanopoe.train.bench import clock, timing
from nanopoe.train.build import build_model, build_optimizer
from nanopoe.train.compute import choose_compute
from nanopoe.train.state_cache import StateCache


class SavedMemory:
    """Counts the bytes of storages that autograd holds for a backward in its `with` block; `peak` is the most."""

    def __init__(self, model: GPT):
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held: dict[int, tuple[int, int]] = {}               # storage -> (how often it is held, bytes)
        self.now = self.peak = 0
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda held: held.tensor)

    def __enter__(self) -> SavedMemory:
        self.hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.hooks.__exit__(*error)

    def pack(self, tensor: Tensor) -> Held:
        storage = tensor.untyped_storage()
        key = storage.data_ptr()
        if key in self.parameters:
            return Held(tensor, lambda: None)
        times, size = self.held.get(key, (0, storage.nbytes()))
        self.held[key] = (times + 1, size)
        if times == 0:
            self.now += size
            self.peak = max(self.peak, self.now)
        return Held(tensor, lambda: self.release(key))

    def release(self, key: int) -> None:
        times, size = self.held.pop(key)
        if times > 1:
            self.held[key] = (times - 1, size)
        else:
            self.now -= size


class Held:
    """A saved tensor; tells when the graph lets go of it."""

    def __init__(self, tensor: Tensor, released: Callable[[], None]):
        self.tensor, self.released = tensor, released

    def __del__(self) -> None:
        self.released()


def as_deep(experiment: Experiment, poe: bool) -> Experiment:
    """The same experiment as full fine-tuning: a model whose last layers are the specialist's, all trained; by
    backprop, or with the new layers as one more PoE stage."""
    m, layout = experiment.model, layout_of(experiment.model)
    new = sum(m.specialists[i].n_layer for i in layout.chains[-1])
    stages = tuple(len(layout.stage_layers(k)) for k in range(layout.n_stages))
    mode: dict[str, Any] = {"poe_mode": "none", "poe_every": None, "poe_stage_layers": None, "stage_heads": False,
                            "detach_x0": False}
    if poe:
        mode = {"poe_mode": "flat", "poe_every": None, "poe_stage_layers": (*stages, new)}
    model: ModelConfig = m.model_copy(update={
        "n_layer": m.n_layer + new, "specialists": (), "ve_layers": layout.ve_layers,
        "window_sizes": (*layout.window_sizes, *(m.sequence_len,) * new), **mode})
    optim = experiment.optim.model_copy(update={"embedding_lr": 0.1})
    return experiment.model_copy(update={"task": "pretrain", "specialist": None, "model": model, "optim": optim})


def bench_specialist(experiment: Experiment, world: World, steps: int = 5) -> dict[str, Any]:
    """Median seconds of a step, forward to update, of full fine-tuning (BP, and PoE if the base is one), of the
    specialist, and of it with what the frozen part computes read from disk; in turns, on random tokens, one rank.

    {experiment, device, dtype, arms: {name: {seconds, spread, activations (bytes held for the backward of a
    micro-batch, the most at a time), trained (parameters), of_full_time, of_full_activations}}}. The base is as
    initialised: its numbers have no influence on time.
    """
    if experiment.specialist is None:
        raise ConfigError(f"task is {experiment.task}, not specialist", experiment.name,
                          "name the experiment of a specialist, such as configs/stage_tool.yaml")
    compute = choose_compute(experiment.runtime, world, world.size, experiment.data.document_mask)
    plan = make_plan(experiment, world.size)
    shape = (plan.micro_steps, plan.device_batch_size, plan.sequence_len + 1)
    rows = torch.randint(experiment.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    rows = rows.to(world.device)
    with tempfile.TemporaryDirectory() as folder:
        cache = StateCache(Path(folder), experiment.model.n_embd, compute.dtype)
        arms: dict[str, tuple[Experiment, Keep | None]] = {"full, backprop": (as_deep(experiment, poe=False), None)}
        if experiment.model.poe_mode == "flat":
            arms["full, PoE"] = (as_deep(experiment, poe=True), None)
        arms |= {"specialist": (experiment, None), "specialist, cached states": (experiment, cache)}
        runs: dict[str, Callable[[], float]] = {}
        found: dict[str, dict[str, Any]] = {}
        for name, (arm, keep) in arms.items():
            model = build_model(arm, world, compute, None)
            optimizer = build_optimizer(arm, model, world, compute)
            found[name] = {"trained": sum(p.numel() for p in optimizer.params.values()),
                           "activations": activations(model, rows[0], arm.objective, keep)}
            optimizer.discard()
            runs[name] = step_of(model, optimizer, rows, arm.objective, world, keep)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for i in range(steps + 1):
            for name in list(arms) if i % 2 else list(arms)[::-1]:
                took = runs[name]()
                if i:                                            # the first also fills the cache
                    seconds[name].append(took)
    for name, figures in found.items():
        figures |= timing(seconds[name])
    full = found["full, backprop"]
    for figures in found.values():
        figures |= {"of_full_time": figures["seconds"] / full["seconds"],
                    "of_full_activations": figures["activations"] / full["activations"]}
    return {"experiment": experiment.name, "device": f"{world.device} {compute.device_name}",
            "dtype": str(compute.dtype)[6:], "arms": found}


def activations(model: GPT, batch: Tensor, objective: ObjectiveConfig, keep: Keep | None) -> int:
    """Bytes held for the backward of one micro-batch, parameters not counted."""
    with SavedMemory(model) as memory:
        backward(model, *split_rows(batch), objective, 1.0, False, keep)
    return memory.peak


def step_of(model: GPT, optimizer: Any, rows: Tensor, objective: ObjectiveConfig, world: World,
            keep: Keep | None) -> Callable[[], float]:
    def step() -> float:
        start = clock(world)
        for batch in rows.unbind(0):
            backward(model, *split_rows(batch), objective, 1 / rows[..., 1:].numel(), False, keep)
            optimizer.take()
        optimizer.reduce()
        optimizer.update(1.0, 0.95, 1.0)
        return clock(world) - start

    return step
