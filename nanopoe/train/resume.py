"""Going on with a changed experiment: what may change freely, what only when asked for, and what never.

  free    where things are, how fast it goes, what we see; the cut into micro-batches; appended cycles
  allow   what changes how the weights are learned from here on: needs resume.allow, and is kept in the lineage
  never   what the saved tensors or the data position mean: architecture, tokenizer, lanes, packing; where the cycle
          that the run is in began; what the run itself began with

A cycle's anchor, the step it begins at, is the sum of the steps of the cycles before it. Their sizes are stored in
config.json with every checkpoint, so the anchor is too, and a resume inside the cycle is held to it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from nanopoe.checkpoint import Checkpoint
from nanopoe.checkpoint.compare import leaves
from nanopoe.config import Experiment, dump_experiment
from nanopoe.config.load import NOT_LEARNED
from nanopoe.config.schema import StartConfig
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.schedule import Schedule
from nanopoe.tokenizer import Tokenizer

# Contents are compared by digest, so places are free.
FREE = re.compile(rf"({'|'.join(NOT_LEARNED)}|data\.val)(\..*)?|tokenizer|batch\.device_batch_size|"
                  r"data\.train\.\d+\.(path|files)|specialist\.(base|base_step|cache_states)|init_from\.(path|step)")
NEVER = re.compile(r"task|specialist|specialist\.(warm_start|scale_entry)|init_from(\..*)?|model(\..*)?|"
                   r"data\.(lanes|kind|packing|replay_steps)")
Lineage = list[dict[str, Any]]


def check_resume(experiment: Experiment, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Lineage:
    """Refuse what may not change, or not without resume.allow; returns the lineage of the run that goes on.

    A lineage holds, for every time that the way of learning changed, {"step", "changed": {key: [then, now]}}; that of a
    run with init_from begins with what it began with (`began`).
    CheckpointError names the keys, their values and what to do; ConfigError a resume.allow that names no key.
    """
    saved, where = checkpoint.experiment, checkpoint.path
    then, now = (dict(leaves(dump_experiment(e))) for e in (saved, experiment))
    allowed = experiment.resume.allow
    check_begin(experiment, checkpoint)
    check_allow(allowed, [*then, *now])
    if checkpoint.manifest.fingerprints.get("tokenizer") != tokenizer.digest:
        digest = str(checkpoint.manifest.fingerprints.get("tokenizer"))[:12]
        raise CheckpointError("was trained with another tokenizer", where, f"its sha256 begins with {digest}")
    total = sum(cycle.steps for cycle in experiment.schedule.cycles)
    if total < checkpoint.step:
        raise CheckpointError(f"is of step {checkpoint.step}, schedule.cycles now end at {total}", where,
                              "go back to an earlier one with resume.step, or give it more steps")
    check_anchor(experiment, checkpoint)
    appended = cycles_appended(experiment, checkpoint)
    changed = {key: [then.get(key), now.get(key)] for key in {**then, **now}
               if then.get(key) != now.get(key) and not FREE.fullmatch(key)
               and not (appended and key.startswith("schedule."))}
    fixed = {key: change for key, change in changed.items() if NEVER.fullmatch(key)}
    if fixed:
        raise CheckpointError(f"was trained with {told(fixed)}", where,
                              "this can never change in a run; use the saved config.json's values, or another run_dir")
    unasked = {key: change for key, change in changed.items() if not covers(allowed, key)}
    if unasked:
        groups = ",".join(dict.fromkeys(askable(key) for key in unasked))
        raise CheckpointError(f"was trained with {told(unasked)}", where,
                              f"use the saved config.json's values, or resume.allow=[{groups}] if it is meant, or "
                              "another run_dir for a new run")
    lineage = checkpoint.state.get("lineage")
    if not (isinstance(lineage, list) and all(isinstance(entry, dict) and entry.keys() == {"step", "changed"}
                                              and isinstance(entry["changed"], dict) for entry in lineage)):
        raise CheckpointError("state.json has no lineage", where, "it cannot be trained on; use another step")
    return [*lineage, {"step": checkpoint.step, "changed": changed}] if changed else lineage


def began(start: StartConfig, digest: str, step: int, new: Sequence[str]) -> Lineage:
    """The lineage of a run that begins with the weights of `start`: which they are, by digest, and what is `new`."""
    told = {"path": start.path, "step": step, "digest": digest, "optimizer": bool(start.optimizer),
            "initialised": list(new)}
    return [{"step": 0, "changed": {"init_from": [None, told]}}]


def check_begin(experiment: Experiment, checkpoint: Checkpoint) -> None:
    """A run goes on from what it holds, and init_from is for the first start of another."""
    if "imported" in checkpoint.state:
        raise CheckpointError("holds imported weights alone", checkpoint.path, "name this run in init_from of another")
    before, now = checkpoint.experiment.init_from, experiment.init_from
    if (before is None) != (now is None):
        raise CheckpointError(f"is of a run that began with{'out' * (before is None)} init_from", checkpoint.path,
                              "to go on from here, leave init_from as it was; for a new run, name another run_dir")


def check_anchor(experiment: Experiment, checkpoint: Checkpoint) -> None:
    """The cycle that the checkpoint is in begins where it began, whatever resume.allow says."""
    index, rel = Schedule(checkpoint.experiment.schedule.cycles).cycle_at(checkpoint.step)
    anchor, now = checkpoint.step - rel, Schedule(experiment.schedule.cycles).starts[:-1]
    if rel and anchor != (found := now[min(index, len(now) - 1)]):
        raise CheckpointError(f"is {rel} steps into cycle {index}, which began at step {anchor}; schedule.cycles have "
                              f"it begin at {found}", checkpoint.path, "leave the cycles before it as they were")


def cycles_appended(experiment: Experiment, checkpoint: Checkpoint) -> bool:
    """Whether cycles were added behind those there were when these had ended, which changes no step that was made."""
    old, new = checkpoint.experiment.schedule.cycles, experiment.schedule.cycles
    if len(new) <= len(old) or new[: len(old)] != old:
        return False
    ended = sum(cycle.steps for cycle in old)
    if checkpoint.step != ended and not covers(experiment.resume.allow, "schedule.cycles"):
        raise CheckpointError(f"cycles were appended, but this is step {checkpoint.step} of {ended}", checkpoint.path,
                              "finish the cycles before, then append; or resume.allow=[schedule.cycles] if it is meant")
    return checkpoint.step == ended


def check_allow(allowed: tuple[str, ...], keys: list[str]) -> None:
    """ConfigError for an entry that names neither a key nor a group, or one that may never change."""
    for entry in allowed:
        if not any(covers((entry,), key) for key in keys):
            raise ConfigError(f"no key {entry!r}", "resume.allow", "name a key of the experiment, or a group of keys")
        if NEVER.fullmatch(entry):
            raise ConfigError(f"{entry} can never change in a run", "resume.allow", "use another run_dir")


def covers(allowed: tuple[str, ...], key: str) -> bool:
    """Whether `key` is one of the allowed keys or in one of the allowed groups."""
    return any(key == entry or key.startswith(entry + ".") for entry in allowed)


def askable(key: str) -> str:
    """What to put into resume.allow for a key: lists are allowed as a whole."""
    return re.sub(r"\.\d+(\..*)?$", "", key)


def told(changes: dict[str, list[Any]]) -> str:
    """The first changes as text."""
    texts = [f"{key} {old}, now {new}" for key, (old, new) in changes.items()]
    more = f" and {len(texts) - 4} more" if len(texts) > 4 else ""
    return "; ".join(texts[:4]) + more
