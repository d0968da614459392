"""A delta: one specialist on disk, apart from the base that it names by digest (SPEC 8).

    DELTA/delta.safetensors   new blocks, lm_head_stage, wte, r and c: the names the assembled model has
    DELTA/delta.json          which base it stands on, the model, size and SHA-256 of the file; sealed

wte, r and c are there in full. A loader takes from them what is new, the chat tokens' rows and the last n entries, and
refuses a delta whose other values are not the base's: so no delta can move a base.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

import nanopoe
from nanopoe.checkpoint.container import DTYPES, Stored, read_header, read_rows, write_tensors
from nanopoe.checkpoint.files import fsync_path, remove
from nanopoe.checkpoint.format import (
    SHA256,
    count,
    expect,
    look,
    parse_json,
    read_limited,
    seal,
    shown,
    text,
    write_json,
)
from nanopoe.checkpoint.store import sha256_file
from nanopoe.config.check import check_model, is_one_chain
from nanopoe.config.counts import specialist_shapes
from nanopoe.config.layout import CHAT_TOKENS, layout_of
from nanopoe.config.schema import ModelConfig
from nanopoe.errors import CheckpointError, ConfigError, StorageError

FORMAT, VERSION = "nanopoe-delta", 1
MANIFEST, TENSORS = "delta.json", "delta.safetensors"
FIELDS = {"format", "version", "name", "step", "digest", "base", "parent", "model", "tokenizer", "bytes",
          "sha256_of_tensors", "nanopoe", "sha256"}
NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")
Read = Callable[[str], Tensor]


# -- the tensors ------------------------------------------------------------------------------------------------------

def first_block(m: ModelConfig) -> int:
    """Number of the last specialist's first block: those of the base and of its chain come before."""
    return m.n_layer + sum(m.specialists[i].n_layer for i in layout_of(m).chains[-1][:-1])


def local_names(m: ModelConfig) -> list[str]:
    """Names of a specialist's own parameters, such as h.0.attn.c_q.weight."""
    prefix = f"specialists.{len(m.specialists) - 1}."
    return [name.removeprefix(prefix) for name in specialist_shapes(m, len(m.specialists) - 1)]


def delta_name(m: ModelConfig, local: str) -> str:
    """h.0.attn.c_q.weight -> transformer.h.24.attn.c_q.weight; the names of all else stay."""
    return re.sub(r"^h\.(\d+)\.", lambda found: f"transformer.h.{first_block(m) + int(found[1])}.", local)


def delta_shapes(m: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the last specialist's delta: 28 tensors of 213,909,560 elements for 4 layers on the 1.3B."""
    own, prefix = specialist_shapes(m, len(m.specialists) - 1), f"specialists.{len(m.specialists) - 1}."
    shapes = {delta_name(m, local): own[prefix + local] for local in local_names(m) if not local.endswith("_lambdas")}
    depth = first_block(m) + m.specialists[-1].n_layer
    return shapes | {"lm_head_stage.weight": (m.vocab_size, m.n_embd),
                     "transformer.wte.weight": (m.vocab_size, m.n_embd),
                     "resid_lambdas": (depth,), "x0_lambdas": (depth,)}


def delta_tensors(m: ModelConfig, read: Read) -> dict[str, Tensor]:
    """The last specialist's delta in fp32, from the tensors of its model by our names."""
    i, V = len(m.specialists) - 1, m.vocab_size
    tensors = {delta_name(m, local): read(f"specialists.{i}.{local}")
               for local in local_names(m) if not local.endswith("_lambdas")}
    tensors["lm_head_stage.weight"] = tensors["lm_head_stage.weight"][:V]
    wte = read("transformer.wte.weight")[:V].clone()
    wte[V - CHAT_TOKENS:] = read("chat_rows")
    tensors["transformer.wte.weight"] = wte
    for name in ("resid_lambdas", "x0_lambdas"):
        tensors[name] = torch.cat([read(name), *(read(f"specialists.{j}.{name}") for j in layout_of(m).chains[-1])])
    return tensors


# -- writing ----------------------------------------------------------------------------------------------------------

def write_delta(out: str | os.PathLike[str], m: ModelConfig, read: Read, manifest: Mapping[str, Any],
                dtype: Literal["bfloat16", "float32"]) -> Path:
    """Write the last specialist of `m` to the new folder `out`; `manifest` is name, step, digest, base, parent and
    tokenizer. ConfigError when `out` is in use, StorageError when the disk refuses; either way nothing is left."""
    folder, kind = Path(out), getattr(torch, dtype)
    if os.path.lexists(folder):
        raise ConfigError("exists already", out, "choose another folder, or remove it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        tensors = {name: tensor.to(kind) for name, tensor in delta_tensors(m, read).items()}
        entry, _ = write_tensors(partial / TENSORS, tensors)
        content = {**manifest, "format": FORMAT, "version": VERSION, "nanopoe": nanopoe.__version__,
                   "model": m.model_dump(mode="json"), "bytes": entry["bytes"], "sha256_of_tensors": entry["sha256"]}
        write_json(partial / MANIFEST, seal(content), indent=2)
        fsync_path(partial)
        os.rename(partial, folder)
        fsync_path(folder.parent)
    except OSError as error:
        raise StorageError(f"cannot write the delta: {error.strerror or error}", out,
                           "free space or choose another folder") from error
    finally:
        remove(partial)
    return folder


# -- reading ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Pointer:
    """The model a specialist stands on: its digest (cascade.py), and where it was when the delta was written, if that
    is known."""

    digest: str
    path: str | None
    step: int | None
    name: str


class Delta:
    """A delta opened: manifest and size checked; the content of the file is hashed before a tensor is read."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        raw = read_limited(self.path / MANIFEST)
        value = parse_json(raw, self.path / MANIFEST)
        if value.get("format") != FORMAT or value.get("version") != VERSION:
            found = [str(value.get(key))[:40] for key in ("format", "version")]
            raise CheckpointError(f"format {found[0]!a} version {found[1]} is not {FORMAT} version {VERSION}",
                                  self.path / MANIFEST, "use the nanopoe that wrote it")
        if seal(value) != value:
            raise CheckpointError("does not match its seal", self.path / MANIFEST, "it was altered; get it again")
        try:
            self._parse(value)
        except (KeyError, TypeError, ValueError) as error:       # pydantic's error is a ValueError
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0][:200]
            raise CheckpointError(f"malformed: {what}", self.path / MANIFEST, "get the delta again") from error

    def _parse(self, value: dict[str, Any]) -> None:
        expect(set(value) == FIELDS, f"its keys are {', '.join(sorted(value))[:200]!a}")
        self.name, self.step = text(value, "name", NAME), count(value, "step")
        self.digest, self.tokenizer = text(value, "digest", SHA256), text(value, "tokenizer", SHA256)
        self.base = text(value, "base", SHA256)
        parent = value["parent"]
        expect(isinstance(parent, dict) and set(parent) == {"digest", "path", "step", "name"},
               f"parent is {shown(parent)}")
        self.parent = Pointer(text(parent, "digest", SHA256), None if parent["path"] is None else text(parent, "path"),
                              None if parent["step"] is None else count(parent, "step"), text(parent, "name"))
        self.model = ModelConfig.model_validate_json(json.dumps(value["model"]))
        problems = check_model(self.model)
        expect(not problems, problems[0] if problems else "")
        expect(bool(self.model.specialists) and is_one_chain(self.model), "its model does not end in a specialist")
        self.bytes, self.sha256 = count(value, "bytes"), text(value, "sha256_of_tensors", SHA256)

    @property
    def file(self) -> Path:
        return self.path / TENSORS

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """What the verified file holds: exactly delta_shapes(model), in one float dtype."""
        size = look(self.file).st_size
        if size != self.bytes:
            raise CheckpointError(f"has {size} bytes, the manifest says {self.bytes}", self.file, "get the delta again")
        if sha256_file(self.file) != self.sha256:
            raise CheckpointError("content does not match its SHA-256", self.file, "it was altered; get it again")
        found = read_header(self.file)
        if {name: stored.shape for name, stored in found.items()} != delta_shapes(self.model):
            raise CheckpointError("does not hold the tensors of its model", self.file, "get the delta again")
        if len(kinds := {stored.dtype for stored in found.values()}) > 1 or not kinds <= {"BF16", "F32"}:
            raise CheckpointError(f"holds {', '.join(sorted(kinds))}", self.file, "a delta is bfloat16 or float32")
        return found

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[next(iter(self.tensors.values())).dtype]

    def read(self, name: str) -> Tensor:
        """A tensor by its name in the file, as it is there."""
        stored = self.tensors[name]
        return read_rows(self.file, stored, 0, stored.shape[0])

    def own(self, local: str) -> Tensor:
        """A parameter of the specialist by its own name (h.0.attn.c_q.weight, chat_rows, ..) in fp32."""
        m = self.model
        if local == "chat_rows":
            return self.read("transformer.wte.weight")[-CHAT_TOKENS:].float()
        tensor = self.read(delta_name(m, local)).float()
        if local.endswith("_lambdas"):
            return tensor[-m.specialists[-1].n_layer:]
        if local == "lm_head_stage.weight":
            return torch.nn.functional.pad(tensor, (0, 0, 0, layout_of(m).padded_vocab - m.vocab_size))
        return tensor

    def check_against(self, read: Read) -> None:
        """CheckpointError unless what it repeats of the model it stands on is that model's, rounded as the delta is."""
        m, dtype = self.model, self.dtype
        rows, depth = m.vocab_size - CHAT_TOKENS, first_block(m)
        wanted = {"transformer.wte.weight": read("transformer.wte.weight")[:rows]}
        for name in ("resid_lambdas", "x0_lambdas"):
            below = [read(f"specialists.{j}.{name}") for j in layout_of(m).chains[-1][:-1]]
            wanted[name] = torch.cat([read(name), *below])[:depth]
        for name, tensor in wanted.items():
            if not torch.equal(self.read(name)[:len(tensor)], tensor.to(dtype)):
                raise CheckpointError(f"{name} changes what the base has", self.file,
                                      f"its base is {self.parent.name}, digest {self.parent.digest[:12]}")
