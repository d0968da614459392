"""Going on with a changed experiment: what may change freely, what only when asked for, and what never.

  free    where things are, how fast it goes, what we see; the cut into micro-batches; appended cycles
  allow   what changes how the weights are learned from here on: needs resume.allow, and is kept in the lineage
  never   what the saved tensors or the data position mean: architecture, tokenizer, lanes, packing
"""

from __future__ import annotations

import re
from typing import Any

from nanopoe.checkpoint import Checkpoint
from nanopoe.checkpoint.compare import leaves
from nanopoe.config import Experiment, dump_experiment
from nanopoe.config.load import NOT_LEARNED
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.tokenizer import Tokenizer

# Contents are compared by digest, so places are free.
FREE = re.compile(rf"({'|'.join(NOT_LEARNED)}|data\.val)(\..*)?|tokenizer|batch\.device_batch_size|"
                  r"data\.train\.\d+\.(path|files)|specialist\.(base|base_step|cache_states)|init_from(\..*)?")
NEVER = re.compile(r"task|specialist|specialist\.(warm_start|scale_entry)|model(\..*)?|"
                   r"data\.(lanes|kind|packing|replay_steps)")
Lineage = list[dict[str, Any]]


def check_resume(experiment: Experiment, checkpoint: Checkpoint, tokenizer: Tokenizer) -> Lineage:
    """Refuse what may not change, or not without resume.allow; returns the lineage of the run that goes on.

    A lineage holds, for every time that the way of learning changed, {"step", "changed": {key: [then, now]}}.
    CheckpointError names the keys, their values and what to do; ConfigError a resume.allow that names no key.
    """
    saved, where = checkpoint.experiment, checkpoint.path
    then, now = (dict(leaves(dump_experiment(e))) for e in (saved, experiment))
    allowed = experiment.resume.allow
    check_allow(allowed, [*then, *now])
    if checkpoint.manifest.fingerprints.get("tokenizer") != tokenizer.digest:
        digest = str(checkpoint.manifest.fingerprints.get("tokenizer"))[:12]
        raise CheckpointError("was trained with another tokenizer", where, f"its sha256 begins with {digest}")
    total = sum(cycle.steps for cycle in experiment.schedule.cycles)
    if total < checkpoint.step:
        raise CheckpointError(f"is of step {checkpoint.step}, schedule.cycles now end at {total}", where,
                              "go back to an earlier one with resume.step, or give it more steps")
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
