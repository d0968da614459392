"""Strict reading of YAML into pydantic models: every problem at once, as `key.sub: what is wrong`, a line each."""

from __future__ import annotations

import difflib
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from nanopoe.config import yaml_subset
from nanopoe.errors import ConfigError

_EXPECTED = {"int_type": "int", "float_type": "a number", "finite_number": "a finite number",
             "bool_type": "true or false", "string_type": "a string", "tuple_type": "a list",
             "model_type": "a group of keys"}
_LIMITS = {"greater_than": (">", "gt"), "greater_than_equal": (">=", "ge"),
           "less_than": ("<", "lt"), "less_than_equal": ("<=", "le")}
Model = TypeVar("Model", bound=BaseModel)


def read_yaml(path: str | os.PathLike[str], do: str = "name an existing experiment file") -> dict[str, Any]:
    """The mapping in a YAML file of at most 1 MB of UTF-8. Raises ConfigError; `do` is its advice for no file."""
    try:
        with open(path, "rb") as file:
            raw = file.read(yaml_subset.MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot be read: {what}", where=path, do=do) from None
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
                          problems=[f"expected a mapping of keys at the top, got {kind_of(data)}"])
    return data


def validated(model: type[Model], data: Any, where: str | os.PathLike[str], what: str,
              check: Callable[[Model], list[str]]) -> Model:
    """Plain data -> `model`, and the rules between its fields. `where` heads the problems of a ConfigError."""
    problems: list[str] = []
    plain = _plain(data, (), problems)
    if not isinstance(plain, dict):
        problems.append(f"expected a mapping of keys at the top, got {kind_of(data)}")
    if not problems:
        try:
            value = model.model_validate(plain)
            problems = check(value)
        except ValidationError as error:
            problems = [_explain(e, model) for e in error.errors(include_url=False) if not _echo(e)]
    if problems:
        raise ConfigError(what, where=where, problems=problems)
    return value


def _plain(value: Any, path: tuple[str | int, ...], problems: list[str]) -> Any:
    """A copy with tuples for lists (what strict validation wants); anything but plain data becomes a problem."""
    if len(path) > yaml_subset.MAX_DEPTH:
        problems.append(f"{show_path(path[:4])}...: nested deeper than {yaml_subset.MAX_DEPTH}")
    elif isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                problems.append(f"{show_path(path) or 'top'}: a key that is not a string: {show(key)}")
        return {k: _plain(v, (*path, k), problems) for k, v in value.items() if isinstance(k, str)}
    elif isinstance(value, (list, tuple)):
        return tuple(_plain(v, (*path, i), problems) for i, v in enumerate(value))
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        problems.append(f"{show_path(path)}: an integer of over 64 bits")
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{show_path(path)}: expected a finite number, got {value}")
    elif isinstance(value, str) and any(ord(c) < 32 or ord(c) == 127 or 0xD800 <= ord(c) <= 0xDFFF for c in value):
        problems.append(f"{show_path(path)}: control characters in {show(value)}")
    elif value is not None and not isinstance(value, (str, bool, int, float)):
        problems.append(f"{show_path(path)}: cannot be {kind_of(value)}")
    return value


def _echo(error: ErrorDetails) -> bool:
    """pydantic also counts a list with bad items as too short; the items have their own lines."""
    return error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]


def _explain(error: ErrorDetails, root: type[BaseModel]) -> str:
    """One validation error as `key.sub: what is wrong, what to do`."""
    kind, value, ctx = error["type"], error["input"], error.get("ctx", {})
    at = show_path(error["loc"])
    if kind == "missing":
        return f"{at}: missing key"
    if kind == "extra_forbidden":
        return f"{at}: unknown key{_did_you_mean(error['loc'], root)}"
    if kind in _EXPECTED:
        shown = show(value) if isinstance(value, str) else kind_of(value)
        shown += f" {value}" if isinstance(value, float) else ""
        return f"{at}: expected {_EXPECTED[kind]}, got {shown}"
    if kind in _LIMITS:
        sign, name = _LIMITS[kind]
        limit = f"{ctx[name]:g}" if isinstance(ctx[name], float) else ctx[name]
        return f"{at}: must be {sign} {limit}, got {show(value)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", ctx["expected"])
        near = difflib.get_close_matches(value, choices, 1) if isinstance(value, str) else []
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{at}: expected {ctx['expected']}, got {show(value)}{hint}"
    if kind == "too_short":
        return f"{at}: needs at least {ctx['min_length']} item, got {len(value)}"
    if kind == "string_pattern_mismatch":
        return f"{at}: {show(value)} does not match {ctx['pattern']}"
    return f"{at}: {error['msg']}, got {show(value)}"


def _did_you_mean(loc: tuple[str | int, ...], root: type[BaseModel]) -> str:
    """A near key of the same group, else the same key where it does exist."""
    key, siblings = str(loc[-1]), list(_group_at(loc[:-1], root).model_fields)
    near = difflib.get_close_matches(key, siblings, 1)
    if not near:
        leaves = [path for path in _paths(root) if path.split(".")[-1] == key]
        near = leaves[:1]
    return f"; did you mean {near[0]!r}?" if near else f"; the keys here are {', '.join(siblings)}"


def _group_at(loc: Sequence[str | int], root: type[BaseModel]) -> type[BaseModel]:
    """The schema class that describes the group at `loc`."""
    group = root
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


def show(value: Any) -> str:
    """A value as one short ASCII-safe line."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def show_path(path: Sequence[str | int]) -> str:
    return ".".join(str(p) if re.fullmatch(r"[\w.-]{1,60}", str(p), re.ASCII) else show(p) for p in path)


def kind_of(value: Any) -> str:
    names = {dict: "a group of keys", list: "a list", tuple: "a list", type(None): "null"}
    return names.get(type(value), type(value).__name__)
