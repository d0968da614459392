"""A cascade: a base and the specialists on it, found by following each one's pointer to what it stands on (SPEC 8).

Every model in it has a digest: of a base SHA-256 over its weights (name, dtype, shape, bytes), of a specialist over the
digest of what it stands on and its own weights in fp32. A specialist's run and its delta hold the digest of the model
below and refuse any other. A delta in bfloat16 is another model than the run it was made of and has another digest; it
also carries the run's, its origin, so that what was trained on the run may stand on it. A cascade without specialists
is a base alone, so everything that loads a model loads a cascade.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nanopoe.checkpoint.container import DTYPE_NAMES, raw_chunks
from nanopoe.checkpoint.delta import MANIFEST, Delta, Pointer, local_names, write_delta
from nanopoe.checkpoint.store import Checkpoint, open_checkpoint
from nanopoe.config.layout import layout_of
from nanopoe.config.schema import ModelConfig, SpecialistShape
from nanopoe.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Link:
    """One specialist: its model as it was trained (the last of a chain), and what stands below it."""

    name: str
    path: Path
    step: int
    model: ModelConfig
    parent: Pointer
    source: Checkpoint | Delta

    def read(self, local: str) -> Tensor:
        """An own parameter (h.0.attn.c_q.weight, chat_rows, ..) in fp32."""
        if isinstance(self.source, Delta):
            return self.source.own(local)
        whole = local if local == "chat_rows" else f"specialists.{len(self.model.specialists) - 1}.{local}"
        return self.source.read(whole)

    @property
    def dtype(self) -> torch.dtype:
        """In which its tensors are stored."""
        return self.source.dtype if isinstance(self.source, Delta) else torch.float32

    @property
    def tokenizer(self) -> str | None:
        """Its digest."""
        if isinstance(self.source, Delta):
            return self.source.tokenizer
        return self.source.manifest.fingerprints.get("tokenizer")

    def digest(self, below: str) -> str:
        """Of this specialist on a model whose digest is `below`."""
        rows = {"lm_head_stage.weight": self.model.vocab_size}             # the others only pad
        names = sorted([*local_names(self.model), "chat_rows"])
        return digest_of(((name, self.read(name)[:rows.get(name)]) for name in names), below)

    def origin(self) -> str:
        """The digest that it had when it was trained, on what it was trained on; CheckpointError for a delta in fp32
        whose tensors have another."""
        if not isinstance(self.source, Delta):
            return self.digest(self.parent.digest)
        if self.dtype == torch.float32 and self.digest(self.parent.digest) != self.source.digest:
            raise CheckpointError("holds other tensors than its digest says", self.path, "get the delta again")
        return self.source.digest


@dataclass(frozen=True)
class Cascade:
    """A base and specialists, each behind its parent; `config` is the model they make up, `names`, `digests` and
    `origins` are of the specialists. The last one is that of the folder that was opened."""

    base: Checkpoint
    config: ModelConfig
    links: tuple[Link, ...] = ()
    names: tuple[str, ...] = ()
    base_digest: str = ""
    digests: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def read(self, name: str) -> Tensor:
        """A parameter of the model by its name."""
        if name == "chat_rows":                                  # the same in all, but for the rounding of some
            return min(self.links, key=lambda link: link.dtype == torch.bfloat16).read(name)
        if name.startswith("specialists."):
            _, i, local = name.split(".", 2)
            return self.links[int(i)].read(local)
        return self.base.read(name)

    @property
    def digest(self) -> str:
        """Of its last specialist, or of the base if it has none."""
        return self.digests[-1] if self.links else self.base_digest


def digest_of(tensors: Iterable[tuple[str, Tensor]], below: str = "") -> str:
    """SHA-256 in hex over `below` and each tensor's name, dtype, shape and bytes, in the order given."""
    h = hashlib.sha256(below.encode())
    for name, tensor in tensors:
        h.update(json.dumps([name, DTYPE_NAMES[tensor.dtype], list(tensor.shape)]).encode() + b"\n")
        for chunk in raw_chunks(tensor):
            h.update(chunk)
    return h.hexdigest()


def weights_digest(base: Checkpoint) -> str:
    """The digest of a base: all its weights in the order of their names, verified while read."""
    return digest_of((name, base.read(name)) for name in sorted(base.weights))


# -- opening ----------------------------------------------------------------------------------------------------------

def open_cascade(path: str | os.PathLike[str], step: int | None = None, *, base: str | os.PathLike[str] | None = None,
                 siblings: Mapping[str, Path] | None = None) -> Cascade:
    """The model in `path`, a run (its checkpoint of `step`, or the newest) or a delta, with all that it stands on.

    `base` says where the base is, instead of where the specialists say. `siblings` are more specialists by name, on the
    same base; the one of `path` comes last. CheckpointError for a missing or foreign parent, a cycle, or specialists
    that do not go together; ConfigError for names given twice, and for a sibling that stands on the one of `path`.
    """
    root, chain = follow(Path(path), step, None if base is None else Path(base))
    chains = [chain]
    for sibling in (siblings or {}).values():
        _, links = follow(sibling, None, None if base is None else Path(base))
        if not links:
            raise CheckpointError("is no specialist", sibling, "give the folder of a specialist's run, or of a delta")
        chains.append(links)
    given = [None, *(siblings or {})]
    order = [*range(1, len(chains)), *([0] if chain else [])]
    return assemble(root, [(given[i], chains[i]) for i in order])


def follow(path: Path, step: int | None, base: Path | None) -> tuple[Checkpoint, list[Link]]:
    """The root below `path`, and the specialists from it up. Pointers are followed before a tensor is read."""
    source, seen = open_source(path, step), [place(path)]
    links: list[Link] = []
    while True:
        link = link_of(source)
        if link is None:
            assert isinstance(source, Checkpoint)
            return source, links[::-1]
        links.append(link)
        below = base if base is not None and len(link.model.specialists) == 1 else parent_path(link)
        if place(below) in seen:
            raise CheckpointError("stands on itself: a cycle of parents", link.path, f"it names {below}")
        seen.append(place(below))
        try:
            source = open_source(below, link.parent.step)
        except CheckpointError as error:
            what = f"its base {link.parent.name} cannot be opened: {error.where}: {error.what}"
            lowest = len(link.model.specialists) == 1
            do = f"{error.do}, or put the base there" if below == base else \
                "put it there" + (", or say with --base where it is" if lowest else "")
            raise CheckpointError(what, link.path, do) from error


def open_source(path: Path, step: int | None) -> Checkpoint | Delta:
    return Delta(path) if is_delta(path) else open_checkpoint(path, step)


def is_delta(path: str | os.PathLike[str]) -> bool:
    return (Path(path) / MANIFEST).exists()


def place(path: Path) -> str:
    return os.path.realpath(path)


def link_of(source: Checkpoint | Delta) -> Link | None:
    """None of a base."""
    if isinstance(source, Delta):
        return Link(source.name, source.path, source.step, source.model, source.parent, source)
    experiment = source.experiment
    if experiment.specialist is None:
        return None
    fingerprints = source.manifest.fingerprints
    wanted = experiment.specialist
    step = fingerprints.get("base_step", "")
    pointer = Pointer(fingerprints.get("base", ""), wanted.base, int(step) if step.isdecimal() else wanted.base_step,
                      os.path.basename(os.path.normpath(wanted.base)))
    return Link(experiment.name, source.path, source.step, experiment.model, pointer, source)


def parent_path(link: Link) -> Path:
    """Of a delta relative to its folder, of a run as its experiment has it."""
    if link.parent.path is None:
        raise CheckpointError(f"does not say where its base {link.parent.name} is", link.path, "say it with --base")
    return link.path / link.parent.path if isinstance(link.source, Delta) else Path(link.parent.path)


# -- putting together -------------------------------------------------------------------------------------------------

def assemble(root: Checkpoint, chains: list[tuple[str | None, list[Link]]]) -> Cascade:
    """Digests are compared here, from the base up; what several chains share is there once."""
    base_digest = weights_digest(root) if chains else ""
    config = root.experiment.model
    links: list[Link] = []
    shapes: list[SpecialistShape] = []
    digests: list[str] = []
    origins: list[str] = []
    names: dict[str, str | None] = {}                            # digest -> the name it was given, if any
    for given, chain in chains:
        below: int | None = None
        for at, link in enumerate(chain):
            check_link(root, link, at)
            accepted = (base_digest,) if below is None else (digests[below], origins[below])
            if link.parent.digest not in accepted:
                raise CheckpointError(
                    f"stands on {link.parent.name}, whose digest begins with {link.parent.digest[:12]}, not on "
                    f"{root.experiment.name if below is None else links[below].name} ({accepted[0][:12]})", link.path,
                    "use the base it was trained on")
            if isinstance(link.source, Delta) and link.source.base != base_digest:
                raise CheckpointError(f"names another base, {link.source.base[:12]}, than what it stands on", link.path,
                                      "get the delta again")
            digest = link.digest(accepted[0])
            if digest not in digests:
                links.append(link)
                digests.append(digest)
                origins.append(link.origin())
                shapes.append(SpecialistShape(n_layer=link.model.specialists[-1].n_layer, parent=below))
                if isinstance(link.source, Delta):
                    link.source.check_against(Cascade(root, link.model, tuple(chain[:at])).read)
            below = digests.index(digest)
            if link is chain[-1] and given is not None:
                if names.get(digest):
                    raise ConfigError(f"{names[digest]} and {given} are the same specialist", link.path)
                names[digest] = given
        config = chain[-1].model
        if given is None and below != len(links) - 1:            # the one opened is the last, or it is not what answers
            raise ConfigError(f"{links[-1].name} stands on it", chain[-1].path, "open that one, which has both")
    called = [names.get(digest) or link.name for digest, link in zip(digests, links, strict=True)]
    twice = {name for name in called if called.count(name) > 1}
    if twice:
        raise ConfigError(f"two specialists are named {', '.join(sorted(twice))}", do="rename one: NAME=PATH")
    check_siblings(links)
    return Cascade(root, config.model_copy(update={"specialists": tuple(shapes)}), tuple(links), tuple(called),
                   base_digest, tuple(digests), tuple(origins))


def check_link(root: Checkpoint, link: Link, at: int) -> None:
    """What must hold of a specialist that stands `at` specialists above the base, whatever is between."""
    if len(link.model.specialists) != at + 1:
        raise CheckpointError(f"its model has {len(link.model.specialists)} specialists, its chain {at + 1}", link.path,
                              "use what it was trained on")
    check_trunk(root.experiment.model, link.model, link.path)
    if link.tokenizer != root.manifest.fingerprints.get("tokenizer"):
        raise CheckpointError("was trained with another tokenizer than its base", link.path, "use its own base")


STAGES = ("model.poe_mode", "model.stage_heads", "the stages' last layers")      # of `differences`


def check_trunk(base: ModelConfig, mine: ModelConfig, where: str | os.PathLike[str],
                free: Collection[str] = ()) -> None:
    """Nothing may have moved in the base: its stages, windows and value embeddings are where they were. Its context may
    have grown, with the windows written out, which else would grow with it. `free` may differ all the same."""
    if mine.sequence_len < base.sequence_len:
        raise CheckpointError(f"model.sequence_len {mine.sequence_len} is below its base's {base.sequence_len}", where,
                              "give it the base's, or more")
    for what, there, here in differences(base, mine):
        if what in free:
            continue
        raise CheckpointError(f"{what} is {here}, its base has {there}", where, "write the base's into its config")


def differences(base: ModelConfig, mine: ModelConfig) -> list[tuple[str, Any, Any]]:
    """(key, the base's value, this one's) of everything about the frozen part that is not the same."""
    one, other = layout_of(base), layout_of(mine)
    pairs = [(f"model.{key}", getattr(base, key), getattr(mine, key)) for key in
             ("n_layer", "n_embd", "n_head", "n_kv_head", "vocab_size", "poe_mode", "stage_heads")]
    pairs += [("model.intermediate_size", one.intermediate, other.intermediate),
              ("the stages' last layers", one.boundaries, other.boundaries),
              ("model.ve_layers", one.ve_layers, other.ve_layers),
              ("model.window_sizes", one.window_sizes, other.window_sizes)]
    return [pair for pair in pairs if pair[1] != pair[2]]


def check_siblings(links: list[Link]) -> None:
    """What is there once for all of them must be the same for all: the context, and the chat tokens' rows as the
    coarsest of them stores them."""
    dtype = torch.bfloat16 if any(link.dtype == torch.bfloat16 for link in links) else torch.float32
    for link in links[1:]:
        if link.model.sequence_len != links[0].model.sequence_len:
            raise CheckpointError(f"model.sequence_len is {link.model.sequence_len}, of {links[0].name} "
                                  f"{links[0].model.sequence_len}", link.path, "load them one at a time")
        if not torch.equal(*(each.read("chat_rows").to(dtype) for each in (link, links[0]))):
            raise CheckpointError(f"its chat tokens have other embeddings than those of {links[0].name}", link.path,
                                  "load them one at a time")


# -- deltas of runs ---------------------------------------------------------------------------------------------------

def save_delta(cascade: Cascade, out: str | os.PathLike[str],
               dtype: Literal["bfloat16", "float32"] = "bfloat16") -> Path:
    """Write the last specialist of a cascade as a delta; errors as of write_delta, ConfigError for a base alone.

    The pointer to its base is relative to `out`, so that the two can move together.
    """
    if not cascade.links:
        raise ConfigError(f"{cascade.base.experiment.name} is a base, not a specialist", out, "name a specialist's run")
    link = cascade.links[-1]
    pointer = {"digest": link.parent.digest, "name": link.parent.name, "step": link.parent.step,
               "path": os.path.relpath(place(parent_path(link)), place(Path(out)))}
    manifest = {"name": link.name, "step": link.step, "digest": cascade.origins[-1], "base": cascade.base_digest,
                "parent": pointer, "tokenizer": link.tokenizer}
    return write_delta(out, link.model, cascade.read, manifest, dtype)

