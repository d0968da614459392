"""Moving in: a checkpoint of another trainer becomes the first checkpoint of a run of ours.

The experiment says what model it is; the foreign JSON must agree in all it says, and the tensors with both. Every
tensor of the file and every parameter of the model is accounted for, by name, before anything is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe.checkpoint.commit import Target, save_checkpoint
from nanopoe.checkpoint.files import remove
from nanopoe.checkpoint.foreign import Foreign
from nanopoe.checkpoint.store import sha256_file
from nanopoe.config import Experiment, config_hash, layout_of
from nanopoe.config.counts import parameter_shapes
from nanopoe.config.schema import ModelConfig
from nanopoe.dist import World
from nanopoe.errors import CheckpointError, ConfigError, DataError, StorageError
from nanopoe.model import GPT
from nanopoe.tokenizer import Tokenizer

NEEDED = ("n_layer", "n_embd", "n_head", "n_kv_head", "vocab_size", "sequence_len")
EXACT = (torch.float32, torch.bfloat16, torch.float16)           # every value of these is one of float32
SHOWN = 8                                                        # names of a kind in an error; --dry-run shows them all


@dataclass(frozen=True)
class Row:
    """A tensor and what becomes of it: shape and dtype are the source's, null where it has none. `state` is taken,
    initialised, missing, unknown, or misfit with `wanted`, what the model has."""

    name: str
    shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    state: str
    wanted: str = ""


# -- checks -----------------------------------------------------------------------------------------------------------

def check_told(experiment: Experiment, foreign: Foreign, ignore: Sequence[str] = ()) -> None:
    """ConfigError with a line for each thing in which the experiment and the foreign JSON differ, or that it says and
    we do not know; `ignore` are keys of the latter."""
    m, told = experiment.model, foreign.model
    ours = known(m)
    problems = [f"{key}: not said there, so nothing can be compared" for key in NEEDED if told.get(key) is None]
    problems += [f"--ignore {key}: not said there" for key in ignore if key not in told]
    problems += [f"--ignore {key}: is known, and must agree" for key in ignore if key in ours]
    for key, value in told.items():
        if value is None or key in ignore:
            continue
        theirs = value.upper() if key == "window_pattern" and isinstance(value, str) else value
        shown = json.dumps(theirs)[:60]
        if key not in ours:
            problems.append(f"{ascii(key)[1:-1][:60]}: {shown} there, unknown here; if it does not change what the "
                            f"model computes, --ignore it")
        elif json.dumps(theirs) != json.dumps(ours[key]):
            problems.append(f"{key}: {shown} there, {json.dumps(ours[key])} in the experiment; "
                            f"model.{key}={shown.replace(' ', '')} takes it over")
    if problems:
        raise ConfigError("does not describe the experiment's model", foreign.meta, problems=problems)
    if experiment.task != "pretrain" or experiment.init_from is not None or m.specialists:
        raise ConfigError("an import is a base: task pretrain, without init_from and specialists", experiment.name,
                          "import it under such an experiment, then name its run in init_from or specialist.base")


def known(m: ModelConfig) -> dict[str, Any]:
    """What a model's section can say, derived where the experiment leaves it open."""
    layout = layout_of(m)
    return {**m.model_dump(mode="json", exclude={"specialists"}), "intermediate_size": layout.intermediate,
            "ve_layers": list(layout.ve_layers), "window_sizes": list(layout.window_sizes)}


def unsaid(m: ModelConfig, foreign: Foreign) -> dict[str, Any]:
    """What of the model the foreign JSON leaves to the experiment, but for what follows from the rest."""
    chosen = m.model_dump(mode="json", exclude={"specialists"}, exclude_none=True)
    return {key: value for key, value in chosen.items() if foreign.model.get(key) is None}


def account(m: ModelConfig, tensors: Mapping[str, Tensor], allow_missing: Sequence[str] = ()) -> list[Row]:
    """What becomes of every tensor of the source and of the model. `allow_missing` are names, or patterns of names as
    of files; ConfigError for one under which nothing is missing."""
    shapes, rows = parameter_shapes(m), []
    missing = shapes.keys() - tensors.keys()
    for pattern in allow_missing:
        if not any(fnmatchcase(name, pattern) for name in missing):
            raise ConfigError(f"nothing that is missing is named {pattern!r}", "--allow-missing", "leave it out")
    for name, shape in shapes.items():
        tensor = tensors.get(name)
        wanted = "float32 " + " x ".join(map(str, shape))
        if tensor is None:
            allowed = any(fnmatchcase(name, pattern) for pattern in allow_missing)
            rows.append(Row(name, None, None, "initialised" if allowed else "missing", wanted))
            continue
        fits = tuple(tensor.shape) == shape and tensor.dtype in EXACT
        rows.append(Row(name, tuple(tensor.shape), tensor.dtype, "taken" if fits else "misfit", wanted))
    return rows + [Row(name, tuple(tensor.shape), tensor.dtype, "unknown") for name, tensor in tensors.items()
                   if name not in shapes]


def check_rows(rows: Sequence[Row], file: Path) -> None:
    """CheckpointError that lists all that is missing, unknown or of another shape."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row.state == "misfit":
            found.setdefault("has other shapes or dtypes", []).append(
                f"{row.name} ({kind_of(row)}, the model has {row.wanted})")
        elif row.state in ("missing", "unknown"):
            found.setdefault("lacks" if row.state == "missing" else "has unknown", []).append(row.name)
    if not found:
        return
    parts = []
    for problem, names in found.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        parts.append(f"{problem}: {', '.join(names[:SHOWN])}{more}")
    new = ", or name in --allow-missing what may be initialised anew" if "lacks" in found else ""
    raise CheckpointError("; ".join(parts), file,
                          f"let the experiment describe these weights{new}; --dry-run shows all tensors")


def kind_of(row: Row) -> str:
    """The source's tensor in words: "bfloat16 512 x 128"."""
    if row.shape is None:
        return "-"
    return f"{str(row.dtype).removeprefix('torch.')} {' x '.join(map(str, row.shape)) or 'scalar'}"


def load_tokenizer(experiment: Experiment) -> Tokenizer:
    """The experiment's; DataError if it has another vocabulary than the model."""
    tokenizer = Tokenizer.load(experiment.tokenizer)
    if tokenizer.vocab_size != experiment.model.vocab_size:
        raise DataError(f"has {tokenizer.vocab_size} tokens, the model {experiment.model.vocab_size}",
                        experiment.tokenizer, "bring the one these weights were trained with")
    return tokenizer


def check_out(experiment: Experiment) -> Path:
    """The run folder, which must not be there."""
    out = Path(experiment.out)
    if os.path.lexists(out):
        raise ConfigError("exists already", out, "choose another run_dir; an import has a run folder of its own")
    return out


# -- the import -------------------------------------------------------------------------------------------------------

def import_foreign(experiment: Experiment, foreign: Foreign, rows: Sequence[Row], tokenizer: Tokenizer) -> Path:
    """Write the run folder of `experiment` with one checkpoint: all weights in fp32, no optimizer state. Its path.

    `rows` are those of `account`, without problems. CheckpointError for a weight that is not finite, StorageError when
    the disk refuses; either way no folder is left.
    """
    check_rows(rows, foreign.file)
    out, m = check_out(experiment), experiment.model
    new = [row.name for row in rows if row.state == "initialised"]
    weights = {row.name: exact(row.name, foreign) for row in rows if row.state == "taken"}
    weights |= fresh(m, experiment.seed, new)
    origin = sha256_file(foreign.file)
    state = {"step": foreign.step, "imported": {"file": foreign.file.name, "sha256": origin, "initialised": new}}
    fingerprints = {"config": config_hash(experiment), "tokenizer": tokenizer.digest, "imported": origin}
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise StorageError(f"cannot be made: {error.strerror or error}", out, "choose another run_dir") from error
    try:
        tokenizer.save(out / "tokenizer")
        target = Target(experiment, World(0, 1, torch.device("cpu")), fingerprints)
        return save_checkpoint(target, weights, [], state).path
    except BaseException:
        remove(out)
        raise


def exact(name: str, foreign: Foreign) -> Tensor:
    """A tensor of the source in fp32; CheckpointError for one with numbers that are none."""
    tensor = foreign.tensors[name]
    if not torch.isfinite(tensor).all():
        raise CheckpointError(f"{name} holds numbers that are not finite", foreign.file, "import an earlier step")
    return tensor.float()


def fresh(m: ModelConfig, seed: int, names: Sequence[str]) -> dict[str, Tensor]:
    """Parameters as a new model of that seed has them."""
    if not names:
        return {}
    model = GPT(m)
    model.init_weights(seed)
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in names}
