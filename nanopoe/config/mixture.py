"""A mixture: sources of text by name, weight and origin, in a YAML file of its own (configs/data).

`scripts.prepare_data mixture` ingests them into FOLDER/<name>/; an experiment that says `data.mixture` and
`data.folder` instead of `data.train` and `data.val` reads them from there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from nanopoe.config.schema import Rate, Strict
from nanopoe.config.strict import read_yaml, show, validated
from nanopoe.errors import ConfigError


class MixtureSource(Strict):
    """One source; it is of the hub, or a folder of files here, or the standard library of this Python."""

    name: str = Field(pattern="^[A-Za-z0-9_-][A-Za-z0-9._-]*$", description="of its folder and in every log")
    weight: Rate = Field(description="share of the tokens, relative to the other sources")
    hub: str | None = Field(default=None, description="id of a dataset")
    folder: str | None = Field(default=None, description="folder of txt, md, py, jsonl, json or parquet files")
    stdlib: bool = False
    config: str | None = Field(default=None, description="of the dataset; null means its default")
    revision: str | None = Field(default=None, description="commit or branch; null means the newest")
    split: str = "train"
    files: str | None = Field(default=None, description="pattern of files in the dataset, read without its config")
    column: str = Field(default="text", description="where the text is")
    transcript: bool = Field(default=False, description="the column is a list of turns, written as a transcript")
    license: str | None = Field(default=None, description="as its page states it")
    code: bool = Field(default=False, description="program text: never case-augmented")
    by_hand: str | None = Field(default=None, description="why it cannot be ingested as it is, and what to do")


class Mixture(Strict):
    name: str = Field(pattern="^[A-Za-z0-9._-]+$")
    sources: tuple[MixtureSource, ...] = Field(min_length=1)

    @property
    def shares(self) -> dict[str, float]:
        """Of the tokens, by name; they sum to 1 whatever the weights sum to."""
        total = sum(source.weight for source in self.sources)
        return {source.name: source.weight / total for source in self.sources}


def load_mixture(path: str | os.PathLike[str]) -> Mixture:
    """Read and check a mixture file. Raises ConfigError with one line per problem."""
    data = read_yaml(path, do="name a mixture file, such as configs/data/stdlib.yaml")
    return validated(Mixture, data, path, "the mixture is not valid", lambda mixture: list(_check(mixture)))


def resolve_mixture(data: dict[str, Any]) -> list[str]:
    """Put lists of sources in place of data.mixture and data.folder in the raw `data`; returns the problems."""
    group = data.get("data")
    if not isinstance(group, dict) or not {"mixture", "folder"} & group.keys():
        return []
    path, folder = group.pop("mixture", None), group.pop("folder", None)
    problems = [f"data.{key}: expected a {what}, got {show(value)}; data.mixture and data.folder go together"
                for key, value, what in (("mixture", path, "file"), ("folder", folder, "folder"))
                if not isinstance(value, str) or not value]
    problems += [f"data.{key}: comes from data.mixture, which is also given; remove one of the two"
                 for key in ("train", "val") if key in group]
    if not problems:
        try:
            mixture = load_mixture(path)
        except ConfigError as error:
            problems = [f"data.mixture: {path}: {problem}" for problem in error.problems or [_one_line(error)]]
        else:
            for split in ("train", "val"):
                group[split] = [{"name": s.name, "path": f"{folder.rstrip('/') or '/'}/{s.name}/{split}",
                                 "weight": s.weight, "code": s.code} for s in mixture.sources]
    return problems


def _one_line(error: ConfigError) -> str:
    return error.what + (f"; {error.do}" if error.do else "")


def _check(mixture: Mixture) -> Iterator[str]:
    for name, count in Counter(source.name for source in mixture.sources).items():
        if count > 1:
            yield f"sources: {count} are named {name!r}; names are keys"
    for i, source in enumerate(mixture.sources):
        at, where = f"sources.{i}", [key for key in ("hub", "folder", "stdlib") if getattr(source, key)]
        if len(where) != 1:
            yield f"{at}: {source.name} needs one of hub, folder and stdlib, got {' and '.join(where) or 'none'}"
        if not source.hub:
            for key in ("config", "revision", "files", "by_hand"):
                if getattr(source, key) is not None:
                    yield f"{at}.{key}: only of a source of the hub"
        if source.files is not None and source.config is not None:
            yield f"{at}.config: must be null with files, which are read without it"
