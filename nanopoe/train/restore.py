"""From a checkpoint back to a model: found, verified by all ranks together, checked against what is to be filled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe import dist
from nanopoe.checkpoint import Checkpoint, list_steps, open_checkpoint, open_tokenizer, set_bad, step_before
from nanopoe.checkpoint.cascade import is_delta, open_cascade
from nanopoe.checkpoint.container import DTYPE_NAMES
from nanopoe.checkpoint.format import Entry
from nanopoe.checkpoint.store import hinted
from nanopoe.config import Experiment
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, everywhere
from nanopoe.model import GPT
from nanopoe.optim import DistMuonAdamW
from nanopoe.optim.kernels import second_moment_shape
from nanopoe.tokenizer import Tokenizer
from nanopoe.train.compute import keep_freed_memory


def find_checkpoint(experiment: Experiment, world: World, warnings: list[str]) -> Checkpoint | None:
    """What to go on from: resume.step, else the newest, else nothing; verified, every rank its share. Collective.

    A damaged newest one is refused; with resume.fallback it is renamed to bad_*, `warnings` say so, and the one before
    is taken.
    """
    out, wanted = experiment.out, experiment.resume.step
    while True:
        with dist.agree(world.device):
            newest = list_steps(out)[-1:]
        newest = dist.gather_json(newest, world.device)[0]               # what rank 0 sees
        if wanted is None and not newest:
            return None
        step = newest[0] if wanted is None else wanted
        try:
            return open_verified(out, step, world)
        except CheckpointError as error:
            before = dist.gather_json(step_before(out, step) if wanted is None else None, world.device)[0]
            if before is None:
                raise
            if not experiment.resume.fallback:
                do = f"{error.do}; to go on from that one and keep this as bad_*, set resume.fallback=true"
                raise everywhere(CheckpointError(error.what, error.where, do)) from error
            with dist.agree(world.device):
                if world.is_main:
                    bad = set_bad(out, step)
                    warnings.append(f"step {step} is damaged ({error.what}) and now {bad.name}; step {before} is next")


def open_verified(run_dir: str | Path, step: int | None, world: World) -> Checkpoint:
    """Open a checkpoint and hash all of it, every rank its share. Collective."""
    with dist.agree(world.device):
        checkpoint = open_checkpoint(run_dir, step)
        try:
            checkpoint.verify(world.rank, world.size)
        except CheckpointError as error:
            raise hinted(error, run_dir, checkpoint.step) from error
    checkpoint.mark_verified()
    return checkpoint


def saved_weights(model: GPT) -> dict[str, Tensor]:
    """What a checkpoint of this model holds: all parameters, or with specialists the last one and the chat tokens'
    rows, since what it stands on is in another run."""
    last = f"specialists.{len(model.config.specialists) - 1}."
    return {name: p for name, p in model.named_parameters()
            if not model.config.specialists or name.startswith(last) or name == "chat_rows"}


def check_weights(model: GPT, checkpoint: Checkpoint) -> None:
    """CheckpointError naming the parameters that are missing, unknown or of another shape; reads none of them."""
    expected = {name: (DTYPE_NAMES[p.dtype], tuple(p.shape)) for name, p in saved_weights(model).items()}
    check_tensors(expected, checkpoint, "the model")


def load_weights(model: GPT, checkpoint: Checkpoint) -> None:
    """What the checkpoint holds, one after the other; CheckpointError as of check_weights."""
    check_weights(model, checkpoint)
    for name, p in saved_weights(model).items():
        p.data.copy_(checkpoint.read(name))


def check_state(optimizer: DistMuonAdamW, checkpoint: Checkpoint) -> None:
    """CheckpointError naming the optimizer state that is missing, unknown or of another shape."""
    check_tensors(state_shapes(optimizer), checkpoint, "the optimizer")


def take_state(optimizer: DistMuonAdamW, other: Checkpoint) -> None:
    """The moments of another run for all that is trained here, and how many updates they are of.

    State of what is not trained here is left. CheckpointError names what is missing or of another shape: none is made
    up, since a new tensor's moments would be corrected for updates that it has not seen.
    """
    held = other.optimizer_state
    do = "set init_from.optimizer=false to begin with none"
    if not held:
        raise CheckpointError("holds no optimizer state", other.path, do)
    expected = state_shapes(optimizer)
    missing = [name for name in expected if name not in held]
    if missing:
        raise CheckpointError(f"lacks optimizer state of {first_of(missing)}", other.path, do)
    check_shapes(expected, held, other.path, "the optimizer", do)
    optimizer.load_state(other.optimizer_rows, stored(other, "optimizer_steps", int))


def state_shapes(optimizer: DistMuonAdamW) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(safetensors dtype, shape) of the state of all that is trained, by `<param>::<slot>`."""
    expected = {}
    for name in optimizer.state_names():
        param, slot = name.split("::")
        p = optimizer.params[param]
        shape = second_moment_shape(*p.shape) if slot == "second" else tuple(p.shape)
        expected[name] = (DTYPE_NAMES[p.dtype], shape)
    return expected


def check_tensors(expected: dict[str, tuple[str, tuple[int, ...]]], checkpoint: Checkpoint, whose: str) -> None:
    found = checkpoint.weights if whose == "the model" else checkpoint.optimizer_state
    missing, unknown = expected.keys() - found.keys(), found.keys() - expected.keys()
    for problem, names in (("lacks", missing), ("has unknown", unknown)):
        if names:
            raise CheckpointError(f"{problem} {first_of(sorted(names))}", checkpoint.path, "use the run's own config")
    check_shapes(expected, found, checkpoint.path, whose, "use the run's own config")


def check_shapes(expected: Mapping[str, tuple[str, tuple[int, ...]]], found: Mapping[str, Entry], where: Path,
                 whose: str, do: str) -> None:
    for name, (dtype, shape) in expected.items():
        if (found[name].dtype, found[name].shape) != (dtype, shape):
            raise CheckpointError(f"{name} is {found[name].dtype} {list(found[name].shape)}, {whose} has {dtype} "
                                  f"{list(shape)}", where, do)


def first_of(names: Sequence[str]) -> str:
    """The first names as text."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def stored(checkpoint: Checkpoint, key: str, kind: type) -> Any:
    """A field of the train state; CheckpointError if it is not there, or is an integer that is no count."""
    value = checkpoint.state.get(key)
    if type(value) is not kind or (isinstance(value, int) and not 0 <= value < 2**63):
        raise CheckpointError(f"state.json has no {key}", checkpoint.path, "it cannot be trained on; use another step")
    return value


@dataclass(frozen=True)
class Loaded:
    """A trained model in eval mode, fp32 arithmetic. `names` are its specialists'; `checkpoint` is the one opened, or
    of a delta its base's."""

    model: GPT
    tokenizer: Tokenizer
    checkpoint: Checkpoint
    names: tuple[str, ...]


def load_cascade(run_dir: str | Path, step: int | None, world: World, siblings: Mapping[str, Path] | None = None,
                 base: Path | None = None) -> Loaded:
    """A run's model, or a delta's, with all it stands on and more specialists by name; see open_cascade. Collective."""
    keep_freed_memory()
    checkpoint = None if is_delta(run_dir) else open_verified(run_dir, step, world)
    with dist.agree(world.device):
        cascade = open_cascade(run_dir, step if checkpoint is None else checkpoint.step, base=base, siblings=siblings)
        checkpoint = checkpoint or cascade.base
        tokenizer = open_tokenizer(checkpoint.path.parents[1], checkpoint)
        with torch.device("meta"):
            model = GPT(cascade.config)
        expected = {name: (DTYPE_NAMES[p.dtype], tuple(p.shape)) for name, p in model.named_parameters()
                    if name != "chat_rows" and not name.startswith("specialists.")}
        check_tensors(expected, cascade.base, "the model")
        model.to_empty(device=world.device)
        for name, p in model.named_parameters():
            p.data.copy_(cascade.read(name))
    model.document_mask = checkpoint.experiment.data.document_mask                    # of the validation's rows
    return Loaded(model.eval(), tokenizer, checkpoint, cascade.names)


def load_trained(run_dir: str | Path, step: int | None, world: World) -> tuple[GPT, Tokenizer, Checkpoint]:
    """A trained model with its tokenizer, to evaluate, generate or export; fp32 arithmetic. Collective."""
    loaded = load_cascade(run_dir, step, world)
    return loaded.model, loaded.tokenizer, loaded.checkpoint
