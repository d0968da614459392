"""What nanochat wrote, opened: model_000123.pt with meta_000123.json beside it, or a state dict in its names (SPEC 1).

This is the one module that opens a pickle. With weights_only torch rebuilds tensors and plain containers and calls
nothing that the file names; a file that asks for more is refused. Tensors stay mapped from the file until they are
used. Nothing here believes the file or its JSON: importing.py compares both with the experiment.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe.checkpoint.container import JSON_VALUES, read_header, read_rows, unreadable, values_in
from nanopoe.checkpoint.format import TENSOR_NAME, read_limited
from nanopoe.errors import CheckpointError

MODEL_FILE = re.compile(r"model_(\d{1,18})\.pt")
COMPILED = "_orig_mod."                 # what torch.compile puts before the names of what it wraps
PICKLE_LIMIT = 64 << 20                 # of the part of a .pt that is no tensor: 3 billion parameters need 50 KiB
NAME_IT = "name the folder with model_*.pt, or a .pt or .safetensors file of weights"


@dataclass(frozen=True)
class Foreign:
    """A checkpoint of another trainer. `model` is the model's section of its JSON, `tensors` what the file holds by
    name without `_orig_mod.`; `optimizer` names optimizer files beside it, which are not read."""

    file: Path
    meta: Path
    step: int
    model: dict[str, Any]
    tensors: dict[str, Tensor]
    optimizer: tuple[str, ...]


def open_foreign(path: Path, step: int | None = None, meta: Path | None = None) -> Foreign:
    """The checkpoint in a folder (of `step`, or the newest), or in a file of weights; `meta` is its JSON, if that is
    not beside it. CheckpointError for whatever is no checkpoint."""
    file = find_file(path, step)
    named = MODEL_FILE.fullmatch(file.name)
    if meta is None:
        meta = file.with_name(f"meta_{named[1]}.json" if named else "config.json")
        if not os.path.lexists(meta):
            raise CheckpointError("missing", meta, "say with --meta where the JSON of this model is")
        check_place(meta, file.parent)
    told = read_meta(meta)
    model = told.get("model_config", told.get("model"))
    if not isinstance(model, dict):
        raise CheckpointError("has no model_config", meta, "name the meta_*.json of these weights with --meta")
    steps = {"--step": step, "the name of the file": int(named[1]) if named else None, meta.name: told.get("step")}
    return Foreign(file, meta, agreed_step(steps, file), model, read_weights(file),
                   tuple(sorted(p.name for p in file.parent.glob(f"optim_{named[1]}*.pt"))) if named else ())


def agreed_step(told: dict[str, Any], file: Path) -> int:
    """The step that all who say one agree on; 0 if none does."""
    said = {where: step for where, step in told.items() if step is not None}
    if any(type(step) is not int or not 0 <= step < 10**15 for step in said.values()) or len(set(said.values())) > 1:
        shown = ", ".join(f"{ascii(step)[:20]} by {where}" for where, step in said.items())
        raise CheckpointError(f"is of step {shown}", file, "these are not the files of one checkpoint")
    return next(iter(said.values()), 0)


# -- files ------------------------------------------------------------------------------------------------------------

def find_file(path: Path, step: int | None) -> Path:
    """The file of weights that `path` names, or that is in it."""
    if not path.is_dir():
        if path.suffix not in (".pt", ".safetensors") or not os.path.lexists(path):
            raise CheckpointError("is no checkpoint" if os.path.lexists(path) else "missing", path, NAME_IT)
        return check_place(path, path.parent)
    try:
        found = {int(m[1]): p for p in sorted(path.iterdir()) if (m := MODEL_FILE.fullmatch(p.name))}
    except OSError as error:
        raise unreadable(path, error) from error
    if not found:
        raise CheckpointError("holds no model_*.pt", path, NAME_IT)
    if step is not None and step not in found:
        raise CheckpointError(f"no model of step {step}", path, f"steps there: {', '.join(map(str, sorted(found)))}")
    return check_place(found[max(found) if step is None else step], path)


def check_place(file: Path, folder: Path) -> Path:
    """`file`, if it is a file and does not lead out of `folder`."""
    real, home = os.path.realpath(file), os.path.realpath(folder)
    if os.path.commonpath([real, home]) != home:
        raise CheckpointError("is a link out of its folder", file, "name the file that is meant")
    try:
        regular = stat.S_ISREG(os.stat(file).st_mode)
    except OSError as error:
        raise unreadable(file, error) from error
    if not regular:
        raise CheckpointError("is no file", file, NAME_IT)
    return file


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON beside the weights. Its losses may be Infinity, as nanochat writes them; only sizes are read of it."""
    raw = read_limited(path)
    try:
        if values_in(raw) > JSON_VALUES:
            raise ValueError(f"over {JSON_VALUES:,} values")
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"not valid JSON: {str(error)[:80]}", path, "copy it again") from error
    if not isinstance(value, dict):
        raise CheckpointError("not a JSON object", path, "name the meta_*.json of these weights with --meta")
    return value


# -- tensors ----------------------------------------------------------------------------------------------------------

def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name, without `_orig_mod.`; CheckpointError for anything in it that is none."""
    if path.suffix == ".safetensors":
        held: Any = {key: read_rows(path, stored, 0, stored.shape[0] if stored.shape else 1)
                     for key, stored in read_header(path).items()}
    else:
        held = unpickled(path)
    if not isinstance(held, dict) or not held:
        raise CheckpointError(f"holds {'nothing' if held == {} else f'one {type(held).__name__}'}, not tensors by name",
                              path, "save the model's state_dict()")
    tensors: dict[str, Tensor] = {}
    for key, value in held.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{ascii(key)[:60]} is no tensor but {type(value).__name__}", path,
                                  "save the model's state_dict() alone")
        if value.layout != torch.strided or value.device.type != "cpu":
            raise CheckpointError(f"{ascii(key)[:60]} is {value.layout} on {value.device.type}, no plain tensor", path,
                                  "save dense tensors")
        name = key.replace(COMPILED, "") if isinstance(key, str) else ""
        if not TENSOR_NAME.fullmatch(name) or "::" in name:
            raise CheckpointError(f"a tensor is named {ascii(key)[:60]}", path, "save the model's state_dict()")
        if name in tensors:
            raise CheckpointError(f"{name} is there twice, with and without {COMPILED}", path, "save it once")
        tensors[name] = value.detach()
    return tensors


def unpickled(path: Path) -> Any:
    """What torch.save wrote; CheckpointError for another file, a damaged one, or one with more than tensors."""
    check_archive(path)
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:                          # a hostile file can raise anything here
        asked = re.search(r"GLOBAL ([\w.]{1,60})", str(error))
        what = f"asks for {asked[1]} to be called" if asked else f"cannot be read: {str(error)[:80]!a}"
        raise CheckpointError(f"{what}; only tensors are taken", path,
                              "copy it again, or save the model's state_dict() alone") from error


def check_archive(path: Path) -> None:
    """A .pt is an uncompressed zip with one small pickle: nothing else gets to torch, and nothing can unpack to more
    than it is."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except OSError as error:
        raise unreadable(path, error) from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError("is no file of torch.save, or was cut", path, "copy it again") from error
    pickles = [entry for entry in entries if entry.filename.endswith("data.pkl")]
    if (len(pickles) != 1 or pickles[0].file_size > PICKLE_LIMIT
            or any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)):
        raise CheckpointError("is an archive, but not as torch.save writes it", path, "copy it again")
