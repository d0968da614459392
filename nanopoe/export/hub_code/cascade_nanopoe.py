"""A stage repo put together: the tensors of a specialist with those of the models it stands on.

A stage repo holds delta.safetensors, not a model: new blocks, their head, and in full the embeddings and the two
vectors of lambdas. Its config.json says where the model below it is and which one, by digest. Of the models below,
config.json and safetensors files are read; no code of theirs runs. What a delta repeats of them must be theirs, bit for
bit.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

DELTA, WHOLE = "delta.safetensors", "model.safetensors"
DEEPEST = 64                             # specialists on each other
CHAT_ROWS = 8                            # last tokens of the vocabulary: the embeddings that a delta may change
BLOCK = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
         "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj"}
EMBEDDINGS, VECTORS = "transformer.wte.weight", ("resid_lambdas", "x0_lambdas")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments of `from_pretrained` that say where and how files are read."""
    return {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name) is not None}


def digest(tensors: Iterable[tuple[str, Tensor]], below: str = "") -> str:
    """SHA-256 in hex of a repo: over the digest of the one below it, then of each tensor in the order of names a line
    `name dtype shape`, as in "lm_head.weight bfloat16 32768,1536", and its bytes, little-endian and row by row."""
    found = hashlib.sha256(below.encode())
    for name, tensor in tensors:
        kind, shape = str(tensor.dtype).removeprefix("torch."), ",".join(map(str, tensor.shape))
        found.update(f"{name} {kind} {shape}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def delta_names(first: int, blocks: int) -> dict[str, str]:
    """Name in delta.safetensors -> name in the model, of the blocks `first` and on."""
    names = {f"transformer.h.{i}.{ours}.weight": f"model.layers.{i + 1}.{theirs}.weight"
             for i in range(first, first + blocks) for ours, theirs in BLOCK.items()}
    return {**names, EMBEDDINGS: "model.embed_tokens.weight", **{name: f"model.{name}" for name in VECTORS}}


def file_of(repo: str, name: str, hub: Mapping[str, Any]) -> str:
    """Path of a file of a folder, or of a repo on the Hub. OSError if it is not there."""
    if repo.startswith(os.sep) or os.path.isdir(repo):
        path = os.path.join(repo, name)
        if not os.path.isfile(path):
            raise OSError(f"{repo}: no {name} in it" if os.path.isdir(repo) else f"{repo}: no such folder")
        return path
    from transformers.utils import cached_file  # nanopoe itself reads folders with this file, without transformers

    return str(cached_file(repo, name, **hub))


class Link:
    """A repo of a cascade; `config` is its config.json, `hub` how its files are found."""

    def __init__(self, repo: str, config: dict[str, Any], hub: dict[str, Any]):
        self.repo, self.config, self.hub = repo, config, hub
        self.parent: dict[str, Any] | None = config.get("parent")

    @property
    def place(self) -> tuple[str, str]:
        """What tells it from other repos."""
        return (os.path.realpath(self.repo), "") if os.path.isdir(self.repo) else (
            self.repo, str(self.hub.get("revision", "main")))

    def below(self) -> Link:
        """Its parent. ValueError for a pointer that is none, OSError for a repo that is not there."""
        parent = self.parent
        if not isinstance(parent, dict) or not all(isinstance(parent.get(key), str) for key in ("repo", "digest")):
            raise ValueError(f"{self.repo}: config.json names no parent by `repo` and `digest`: export it again")
        repo, hub = parent["repo"], {k: v for k, v in self.hub.items() if k != "revision"}
        if repo.startswith("."):
            if not os.path.isdir(self.repo):
                raise ValueError(f"{self.repo}: its parent is the folder {repo} beside it: load it from a folder")
            repo = os.path.realpath(os.path.join(self.repo, repo))
        elif not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
            raise ValueError(f"{self.repo}: its parent {repo!r} is no id on the Hub and no relative folder")
        else:
            hub["revision"] = parent.get("revision") or "main"
        try:
            with open(file_of(repo, "config.json", hub), encoding="utf-8") as file:
                config = json.load(file)
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise OSError(f"{self.repo}: its parent is not there ({reason}): put it there") from error
        return Link(repo, config, hub)

    def chain(self) -> list[Link]:
        """Itself and those below it, down to the root. ValueError for a cycle."""
        links = [self]
        while links[-1].parent:
            link = links[-1].below()
            if link.place in [other.place for other in links]:
                raise ValueError(f"{links[-1].repo}: its parent {link.repo} stands on it: a cycle of parents")
            if len(links) > DEEPEST:
                raise ValueError(f"{self.repo}: more than {DEEPEST} models on each other")
            links.append(link)
        return links

    def assembled(self) -> tuple[dict[str, Tensor], str]:
        """All tensors of its model by their names in it, and its digest. Every parent's is compared on the way up."""
        *above, below = self.chain()
        tensors = below.tensors()
        found = digest(sorted(tensors.items()))
        for link in reversed(above):
            parent: Any = link.parent
            if found != parent["digest"]:
                raise ValueError(
                    f"{link.repo}: {below.repo} ({below.name}) is not the model it was trained on "
                    f"({parent.get('name') or 'unnamed'}): its digest begins with {found[:12]}, not with "
                    f"{parent['digest'][:12]}")
            own = link.tensors()
            add(tensors, own, link, len(below.config.get("specialists") or ()))
            found, below = digest(sorted(own.items()), found), link
        return tensors, found

    @property
    def name(self) -> str:
        run = self.config.get("nanopoe_run")
        return str(run.get("name")) if isinstance(run, dict) else "unnamed"

    def tensors(self) -> dict[str, Tensor]:
        """Those of its own files."""
        if self.parent:
            return load_file(file_of(self.repo, DELTA, self.hub))
        files = [WHOLE]
        try:
            index = file_of(self.repo, f"{WHOLE}.index.json", self.hub)
        except OSError:                      # one file has no index
            pass
        else:
            with open(index, encoding="utf-8") as file:
                files = sorted(set(json.load(file)["weight_map"].values()))
        if not all(re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) for name in files):
            raise ValueError(f"{self.repo}: its index names files outside of it")
        found: dict[str, Tensor] = {}
        for name in files:
            found |= load_file(file_of(self.repo, name, self.hub))
        return found


def assemble(repo: str, config: dict[str, Any], hub: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors of the model of a stage repo by their names in it."""
    return Link(repo, config, hub).assembled()[0]


def add(tensors: dict[str, Tensor], own: dict[str, Tensor], link: Link, number: int) -> None:
    """Put the delta `own` of specialist `number` on top of `tensors`. ValueError if it holds anything but what is new,
    or changes what is there."""
    first = len(tensors["model.resid_lambdas"])
    shape = (link.config.get("specialists") or [{}])[-1]
    below = number - 1 if number else None
    if len(link.config.get("specialists") or ()) != number + 1 or shape.get("parent") != below:
        raise ValueError(f"{link.repo}: it is not the next specialist on its parent, which has {number}")
    names = {**delta_names(first, shape["blocks"]), "lm_head_stage.weight": f"lm_head_specialists.{number}.weight"}
    if foreign := sorted(own.keys() ^ names.keys()):
        raise ValueError(f"{link.repo}: {DELTA} does not hold the tensors of a specialist of {shape['blocks']} blocks "
                         f"behind block {first - 1}: {', '.join(foreign[:3])}")
    for name in (EMBEDDINGS, *VECTORS):
        there = tensors[names[name]]
        kept = len(there) - CHAT_ROWS if name == EMBEDDINGS else first
        length = len(there) if name == EMBEDDINGS else first + shape["blocks"]
        if len(own[name]) != length or not torch.equal(own[name][:kept], there[:kept]):
            raise ValueError(f"{link.repo}: {name} changes what belongs to its parent")
    tensors.update({names[name]: tensor for name, tensor in own.items()})


__all__ = ["CHAT_ROWS", "DELTA", "Link", "assemble", "delta_names", "digest", "hub_options"]
