"""A YAML file and `key.sub=value` overrides -> a frozen Experiment, or every problem at once, a line each (STYLE 3)."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nanopoe.config import yaml_subset
from nanopoe.config.check import check
from nanopoe.config.schema import Experiment
from nanopoe.errors import ConfigError

# What may differ between two runs that learn the same weights: where, how fast and what we see.
NOT_LEARNED = ("name", "run_dir", "runtime", "checkpoint", "evaluation", "logging", "resume")

_EXPECTED = {"int_type": "int", "float_type": "a number", "finite_number": "a finite number",
             "bool_type": "true or false", "string_type": "a string", "tuple_type": "a list",
             "model_type": "a group of keys"}
_LIMITS = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge"),
           "less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}


def load_experiment(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Experiment:
    """Read, override, validate, cross-check. Raises ConfigError with one line per problem; touches nothing else."""
    data = read_yaml(path)
    problems = apply_overrides(data, overrides)
    try:
        exp = experiment_from_dict(data, path)
    except ConfigError as error:
        raise ConfigError(error.what, where=path, problems=problems + error.problems) from None
    if problems:
        raise ConfigError("the overrides are wrong", where=path, problems=problems)
    return exp


def experiment_from_dict(data: Any, where: str | os.PathLike[str]) -> Experiment:
    """Plain data (of YAML or config.json) -> Experiment. `where` heads the list of problems of a ConfigError."""
    problems: list[str] = []
    plain = _plain(data, (), problems)
    if not isinstance(plain, dict):
        problems.append(f"expected a mapping of keys at the top, got {_kind(data)}")
    if not problems:
        try:
            exp = Experiment.model_validate(plain)
            problems = check(exp)
        except ValidationError as error:
            problems = [_explain(e) for e in error.errors(include_url=False) if not _echo(e)]
    if problems:
        raise ConfigError("the experiment is not valid", where=where, problems=problems)
    return exp


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MB of UTF-8. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            raw = file.read(yaml_subset.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot be read: {what}", where=path, do="name an existing experiment file") from None
    if len(raw) > yaml_subset.MAX_BYTES:
        raise ConfigError("the file is over 1 MB, too large for an experiment", where=path)
    try:
        data = yaml_subset.parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError("not UTF-8", where=path, problems=[f"line {line}: a byte that is not UTF-8"]) from None
    except yaml_subset.Refused as refused:
        raise ConfigError("not readable", where=path, problems=refused.problems) from None
    if not isinstance(data, dict):
        raise ConfigError("no mapping", where=path,
                          problems=[f"expected a mapping of keys at the top, got {_kind(data)}"])
    return data


# -- overrides ------------------------------------------------------------------------------------------------------

def apply_overrides(data: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Set each `key.sub=value` in `data` (in place); list items go by index. Returns the problems."""
    problems: list[str] = []
    seen: set[str] = set()
    for text in overrides:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals or not key or not value.strip():
            problems.append(f"{_show(text)}: an override is key.sub=value (null for nothing)")
        elif key in seen:
            problems.append(f"{_show_path([key])}: given twice on the command line")
        else:
            try:
                problems += _set(data, key.split("."), yaml_subset.parse(value))
            except yaml_subset.Refused as refused:
                problems += [f"{_show_path([key])}: {p.removeprefix('line 1: ')}" for p in refused.problems]
        seen.add(key)
    return problems


def _set(data: dict[str, Any], path: list[str], value: Any) -> list[str]:
    """Put `value` at `path` below `data`; returns the problem if there is no such place."""
    here: Any = data
    for depth, part in enumerate(path):
        at, last = _show_path(path[: depth + 1]), depth == len(path) - 1
        if isinstance(here, list):
            if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) >= len(here):
                return [f"{at}: no item {_show(part)}; the list has {len(here)}, counted from 0"]
            key: Any = int(part)
        elif isinstance(here, dict):
            key = part
        else:
            return [f"{at}: cannot be set; {_show_path(path[:depth])} is {_kind(here)}, not a group of keys"]
        if last:
            here[key] = value
        elif isinstance(here, dict) and key not in here:
            here[key] = {}                                    # a group left to its defaults, or an unknown key
        here = here[key]
    return []


# -- problems as lines ----------------------------------------------------------------------------------------------

def _plain(value: Any, path: tuple[str | int, ...], problems: list[str]) -> Any:
    """A copy with tuples for lists (what strict validation wants); anything but plain data becomes a problem."""
    if len(path) > yaml_subset.MAX_DEPTH:
        problems.append(f"{_show_path(path[:4])}...: nested deeper than {yaml_subset.MAX_DEPTH}")
    elif isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                problems.append(f"{_show_path(path) or 'top'}: a key that is not a string: {_show(key)}")
        return {k: _plain(v, (*path, k), problems) for k, v in value.items() if isinstance(k, str)}
    elif isinstance(value, (list, tuple)):
        return tuple(_plain(v, (*path, i), problems) for i, v in enumerate(value))
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        problems.append(f"{_show_path(path)}: an integer of over 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{_show_path(path)}: expected a finite number, got {value}")
    elif isinstance(value, str) and any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in value):
        problems.append(f"{_show_path(path)}: control characters in {_show(value)}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        problems.append(f"{_show_path(path)}: cannot be {_kind(value)}")
    return value


def _echo(error: ErrorDetails) -> bool:
    """pydantic also counts a list with bad items as too short; the items have their own lines."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _explain(error: ErrorDetails) -> str:
    """One validation error as `key.sub: what is wrong, what to do`."""
    kind, value, ctx = error["type"], error["input"], error.get("ctx", {})
    at = _show_path(error["loc"])
    if kind == "missing":
        return f"{at}: missing key"
    if kind == "extra_forbidden":
        return f"{at}: unknown key{_did_you_mean(error['loc'])}"
    if kind in _EXPECTED:
        shown = _show(value) if isinstance(value, str) else _kind(value)
        shown += f" {value}" if isinstance(value, float) else ""
        return f"{at}: expected {_EXPECTED[kind]}, got {shown}"
    if kind in _LIMITS:
        sign, name = _LIMITS[kind]
        limit = f"{ctx[name]:g}" if isinstance(ctx[name], float) else ctx[name]
        return f"{at}: must be {sign} {limit}, got {_show(value)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", ctx["expected"])
        near = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{at}: expected {ctx['expected']}, got {_show(value)}{hint}"
    if kind == "too_short":
        return f"{at}: needs at least {ctx['min_length']} item, got {len(value)}"
    if kind == "string_pattern_mismatch":
        return f"{at}: {_show(value)} does not match {ctx['pattern']}"
    return f"{at}: {error['msg']}, got {_show(value)}"


def _did_you_mean(loc: tuple[str | int, ...]) -> str:
    """A near key of the same group, else the same key where it does exist."""
    key, siblings = str(loc[-1]), list(_group_at(loc[:-1]).model_fields)
    near = difflib.get_close_matches(key, siblings, 1)
    if not near:
        leaves = [path for path in _paths(Experiment) if path.split(".")[-1] == key]
        near = leaves[:1]
    return f"; did you mean {near[0]!r}?" if near else f"; the keys here are {', '.join(siblings)}"


def _group_at(loc: Sequence[str | int]) -> type[BaseModel]:
    """The schema class that describes the group at `loc`."""
    group: type[BaseModel] = Experiment
    for part in loc:
        if isinstance(part, str):
            group = next(iter(_groups_in(group.model_fields[part].annotation)))
    return group


def _groups_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [g for a in typing.get_args(annotation) for g in _groups_in(a)]


def _paths(group: type[BaseModel]) -> Iterator[str]:
    """Dotted paths of all keys below `group`; items of a list as 0."""
    for name, field in group.model_fields.items():
        yield name
        for inner in _groups_in(field.annotation):
            item = "" if inner is field.annotation else "0."
            yield from (f"{name}.{item}{path}" for path in _paths(inner))


def _show(value: Any) -> str:
    """A value as one short ASCII-safe line."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _show_path(path: Sequence[str | int]) -> str:
    return ".".join(str(p) if re.fullmatch(r"[\w.-]{1,60}", str(p), re.ASCII) else _show(p) for p in path)


def _kind(value: Any) -> str:
    names = {dict: "a group of keys", list: "a list", tuple: "a list", type(None): "null"}
    return names.get(type(value), type(value).__name__)


# -- the resolved experiment ----------------------------------------------------------------------------------------

def dump_experiment(exp: Experiment) -> dict[str, Any]:
    """Every key with its value, defaults included, as JSON-able data; `experiment_from_dict` reads it back."""
    return exp.model_dump(mode="json")


def config_hash(exp: Experiment) -> str:
    """12 hex digits of SHA-256 over the canonical JSON of everything that changes the learned weights."""
    learned = {k: v for k, v in dump_experiment(exp).items() if k not in NOT_LEARNED}
    canonical = json.dumps(learned, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]
