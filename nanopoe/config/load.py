"""A YAML file and `key.sub=value` overrides -> a frozen Experiment, or every problem at once, a line each (STYLE 3)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from typing import Any

from nanopoe.config import yaml_subset
from nanopoe.config.check import check
from nanopoe.config.mixture import resolve_mixture
from nanopoe.config.schema import Experiment
from nanopoe.config.strict import kind_of, read_yaml, show, show_path, validated
from nanopoe.errors import ConfigError

# What may differ between two runs that learn the same weights: where, how fast and what we see.
NOT_LEARNED = ("name", "run_dir", "runtime", "parallel", "checkpoint", "evaluation", "logging", "resume")

_OF_MIXTURE = ("data.mixture", "data.folder")


def load_experiment(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment:
    """Read, override, validate, cross-check. Raises ConfigError with one line per problem; reads no other file but the
    mixture that `data.mixture` names, in whose place the experiment has its sources then. Other overrides come after.
    """
    data = read_yaml(path)
    of_mixture = [text for text in overrides if text.partition("=")[0].strip() in _OF_MIXTURE]
    problems = apply_overrides(data, of_mixture)
    if not problems:
        problems += resolve_mixture(data)
    problems += apply_overrides(data, [text for text in overrides if text not in of_mixture])
    try:
        exp = experiment_from_dict(data, path)
    except ConfigError as error:
        raise ConfigError(error.what, where=path, problems=problems + error.problems) from None
    if problems:
        raise ConfigError("the overrides are wrong", where=path, problems=problems)
    return exp


def experiment_from_dict(data: Any, where: str | os.PathLike[str]) -> Experiment:
    """Plain data (of YAML or config.json) -> Experiment. `where` heads the list of problems of a ConfigError."""
    return validated(Experiment, data, where, "the experiment is not valid", check)


# -- overrides ------------------------------------------------------------------------------------------------------

def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set each `key.sub=value` in `data` (in place); list items go by index. Returns the problems."""
    problems: list[str] = []
    seen: set[str] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or not value.strip():
            problems.append(f"{show(text)}: an override is key.sub=value (null for nothing)")
        elif key in seen:
            problems.append(f"{show_path([key])}: given twice on the command line")
        else:
            try:
                problems += _set(data, key.split("."), yaml_subset.parse(value))
            except yaml_subset.Refused as refused:
                problems += [f"{show_path([key])}: {p.removeprefix('line 1: ')}" for p in refused.problems]
        seen.add(key)
    return problems


def _set(data: dict[str, Any], path: list[str], value: Any) -> list[str]:
    """Put `value` at `path` below `data`; returns the problem if there is no such place."""
    here: Any = data
    for depth, part in enumerate(path):
        at, last = show_path(path[: depth + 1]), depth == len(path) - 1
        if isinstance(here, list):
            if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) >= len(here):
                return [f"{at}: no item {show(part)}; the list has {len(here)}, counted from 0"]
            key: Any = int(part)
        elif isinstance(here, dict):
            key = part
        else:
            return [f"{at}: cannot be set; {show_path(path[:depth])} is {kind_of(here)}, not a group of keys"]
        if last:
            here[key] = value
        elif isinstance(here, dict) and key not in here:
            here[key] = {}                                    # a group left to its defaults, or an unknown key
        here = here[key]
    return []


# -- the resolved experiment ----------------------------------------------------------------------------------------

def dump_experiment(exp: Experiment) -> dict[str, Any]:
    """Every key with its value, defaults included, as JSON-able data; `experiment_from_dict` reads it back."""
    return exp.model_dump(mode="json")


def config_hash(exp: Experiment) -> str:
    """12 hex digits of SHA-256 over the canonical JSON of everything that changes the learned weights."""
    learned = {k: v for k, v in dump_experiment(exp).items() if k not in NOT_LEARNED}
    canonical = json.dumps(learned, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
