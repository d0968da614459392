"""From what a user names to what is read and where it is written: sources of a mixture, conversations, parts."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from nanopoe.config.mixture import Mixture, MixtureSource
from nanopoe.data.files import Folder
from nanopoe.data.filters import WriteOptions
from nanopoe.data.hub import Hub
from nanopoe.data.ingest import Bad, Origin, Part, Raw, Shape, Unit
from nanopoe.data.partial import started_source
from nanopoe.data.parts import part_folder
from nanopoe.data.stdlib import Stdlib
from nanopoe.errors import ConfigError

Share = tuple[int, int]                      # part i of n, from 1


@dataclass(frozen=True)
class Job:
    """One ingest: `write_dataset(job.origin, job.out, job.options)`."""

    name: str
    origin: Origin
    out: Path
    options: WriteOptions


def job_of(name: str, origin: Origin, out: Path, options: WriteOptions, part: Share | None) -> Job:
    """The job of this machine; a dataset of the hub is pinned to a commit, that of an ingest under way if there is one.

    A part gets an equal share of the byte limit.
    """
    if part is not None:
        out = part_folder(out, *part)
        if options.max_bytes is not None:
            options = replace(options, max_bytes=options.max_bytes // part[1])
    if isinstance(origin, Hub):
        origin = origin.resolved(None if options.overwrite else started_source(out))
    return Job(name, origin if part is None else Part(origin, *part), out, options)


def mixture_jobs(mixture: Mixture, folders: dict[str, Path], out: Path, options: WriteOptions,
                 part: Share | None) -> list[Job]:
    """A job for each source, in `out`/<name>, with its share of the byte limit; `folders` replace sources by name.

    ConfigError, before anything is read, for an unknown name or a source that must be fetched by hand.
    """
    shares = mixture.shares
    problems = [f"--folder {name}: no such source; there are {', '.join(shares)}" for name in folders
                if name not in shares]
    problems += [f"{s.name}: {s.by_hand}" for s in mixture.sources if s.by_hand and s.name not in folders]
    if problems:
        raise ConfigError("not all sources can be ingested", where=f"mixture {mixture.name}", problems=problems)
    jobs = []
    for source in mixture.sources:
        limit = None if options.max_bytes is None else int(options.max_bytes * shares[source.name])
        jobs.append(job_of(source.name, origin_of(source, folders.get(source.name)), out / source.name,
                           replace(options, max_bytes=limit), part))
    return jobs


def origin_of(source: MixtureSource, folder: Path | None = None) -> Origin:
    """What a source of a mixture reads; `folder`: from there instead."""
    shape = Shape(source.column, source.transcript)
    if folder is not None or source.folder is not None:
        return Folder(folder or Path(source.folder or ""), shape, source.license)
    if source.stdlib:
        return Stdlib(license=source.license)
    assert source.hub is not None, "checked by the mixture"
    return Hub(source.hub, source.revision, source.config, source.split, source.files, shape, source.license)


@dataclass(frozen=True)
class Embedded:
    """The conversations generated from this Python: one unit, no network."""

    @property
    def source(self) -> dict[str, Any]:
        return {"kind": "embedded", "python": platform.python_version(), "license": "PSF-2.0"}

    @property
    def label(self) -> str:
        return ""

    def units(self) -> list[Unit]:
        return [Unit("embedded", None, ())]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        from nanopoe.data.embedded import embedded_conversations

        yield from ((document, 0) for document in islice(embedded_conversations(), start, None))


def chat_origin(name: str, folder: Path | None, revision: str | None) -> Origin:
    """Conversations by the adapter `name`: from `folder`, or from the dataset of the hub it was made for.

    The name `embedded` stands for those generated from this Python.
    """
    from nanopoe.data.adapters import adapter

    if name == "embedded":
        if folder is not None or revision is not None:
            raise ConfigError("'embedded' is made here, from no files", "command line", "drop --folder and --revision")
        return Embedded()
    known, shape = adapter(name), Shape(adapter=name)
    if folder is not None:
        return Folder(folder, shape, known.license)
    if known.hub_id is None:
        raise ConfigError(f"'{name}' reads files of yours", "command line", "name their folder with --folder")
    return Hub(known.hub_id, revision, known.config, known.split, None, shape, known.license)
