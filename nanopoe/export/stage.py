"""Write a stage repo: a specialist's delta, and which model it stands on (SPEC 8); hub_code/cascade_nanopoe.py reads
it.

Its parent is a repo of the same dtype: what the delta repeats of it, most of the embeddings and lambdas, is compared
bit for bit. The digest of the parent is that of the export of the run's own base, so it is known without the parent's
files; where they are there, they must have it.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nanopoe.checkpoint.delta import delta_shapes, delta_tensors
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import CheckpointError, ConfigError
from nanopoe.export.card_specialist import specialist_card
from nanopoe.export.hub_code.cascade_nanopoe import DELTA, Link, digest
from nanopoe.export.hub_config import model_config
from nanopoe.export.names import chain_alone, check_tensors, to_hub
from nanopoe.export.repo import DTYPES, Dtype, check_request, write_file, write_repo
from nanopoe.tokenizer import Tokenizer

HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)@([\w.-]+)")


@dataclass(frozen=True)
class Parent:
    """Where a stage repo finds the model below it: a folder, or an id on the Hub and a revision."""

    repo: str                              # of a folder: as seen from the stage repo
    revision: str | None
    folder: Path | None


def export_stage(m: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer,
                 out_dir: str | os.PathLike[str], *, parent: str, base: str, specialists: Sequence[str], step: int,
                 name: str, dtype: Dtype = "bfloat16", tools: bool = False,
                 evaluation: dict[str, Any] | None = None, overwrite: bool = False) -> Path:
    """Write the last specialist of a model as a stage repo and return its folder.

    `parent` is the folder of the export it stands on, or ORG/NAME@REVISION on the Hub; `base` the name of the base's
    run, `specialists` those of the model's. The rest and the errors are as of `export`; CheckpointError also for a
    parent that is another model.
    """
    m, tensors, names = chain_alone(m, tensors, specialists)
    check_request(m, tokenizer, out_dir, dtype, overwrite)
    found = find_parent(parent, out_dir)
    check_tensors(m, tensors)
    below = parent_digest(m, tensors, dtype)
    if found.folder is not None:
        check_parent(found.folder, below, dtype)
    called = names[-2] if len(names) > 1 else base
    pointer: dict[str, Any] = {"repo": found.repo, "digest": below, "name": called}
    if found.revision is not None:
        pointer["revision"] = found.revision
    config = model_config(m, tokenizer.special_ids, dtype, name, step, specialists=names) | {"parent": pointer}
    readme = specialist_card(m, names=names, parent=pointer, tools=tools, evaluation=evaluation, name=name, step=step,
                             repo=Path(os.path.abspath(out_dir)).name, dtype=dtype,
                             parameters=sum(math.prod(shape) for shape in delta_shapes(m).values()))
    delta = stage_tensors(m, tensors, dtype)
    return write_repo(m, tokenizer, out_dir, config, readme, lambda folder: write_file(delta, folder, DELTA))


def stage_tensors(m: ModelConfig, tensors: Mapping[str, Tensor], dtype: Dtype) -> dict[str, Tensor]:
    """The delta of the last specialist in `dtype`, by the names of SPEC 8, in their order."""
    found = delta_tensors(m, tensors.__getitem__)
    return {name: found[name].detach().to(device="cpu", dtype=DTYPES[dtype]).contiguous() for name in sorted(found)}


def parent_digest(m: ModelConfig, tensors: Mapping[str, Tensor], dtype: Dtype) -> str:
    """The digest of the repo that the last specialist of a chain stands on, were it exported in `dtype`."""
    found = digest(to_hub(m.base, tensors, DTYPES[dtype], ordered=True))
    for n in range(1, len(m.specialists)):
        part = m.model_copy(update={"specialists": m.specialists[:n]})
        found = digest(stage_tensors(part, tensors, dtype).items(), found)
    return found


def find_parent(parent: str, out_dir: str | os.PathLike[str]) -> Parent:
    """ConfigError for what is neither a folder nor ORG/NAME@REVISION."""
    if os.path.isdir(parent):
        relative = os.path.relpath(os.path.realpath(parent), os.path.realpath(out_dir))
        if not relative.startswith(".."):                        # it would be replaced, or taken for an id of the hub
            raise ConfigError("--parent is --out or a folder in it", out_dir, "choose another --out")
        return Parent(relative, None, Path(parent))
    if match := HUB_ID.fullmatch(parent):
        return Parent(match[1], match[2], None)
    raise ConfigError("is no folder and no ORG/NAME@REVISION", parent,
                      "export what the specialist stands on first, and give that folder as --parent")


def check_parent(folder: Path, expected: str, dtype: Dtype) -> None:
    """CheckpointError unless the export in `folder` has the digest `expected` and everything that it stands on."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("model_type") != "nanopoe":
            raise ValueError("its config.json is not of nanopoe")
        _, found = Link(os.path.realpath(folder), config, {}).assembled()
    except Exception as error:             # what damaged files make the readers raise has no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot be read as an export ({reason[:200]})", folder,
                              "write it with scripts.export_hf") from error
    if config.get("dtype") != dtype:
        raise ConfigError(f"is in {config.get('dtype')}, this export in {dtype}", folder,
                          f"give --dtype {config.get('dtype')}: a specialist and its parent have one dtype")
    if found != expected:
        run = config.get("nanopoe_run") or {}
        raise CheckpointError(
            f"is {run.get('name')}, step {run.get('step')}, not the model this specialist stands on: its digest begins "
            f"with {found[:12]}, not {expected[:12]}", folder, "export that model and give its folder as --parent")
