"""Functions of the running Python's standard library as tools: name, first sentence of the docstring, parameters.

Signatures and docstrings are read with `inspect`; nothing is called but what PURE lists, on values that are drawn here.
A function is taken if a value can be made up for each parameter it needs, by the parameter's name or PURE.
"""

from __future__ import annotations

import builtins
import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from nanopoe.data.embedded_tasks import NAMES, THINGS, WORDS, Draws
from nanopoe.errors import DataError

# importing these does nothing but define
MODULES = ("bisect", "calendar", "codecs", "compileall", "csv", "difflib", "email.utils", "filecmp", "fileinput",
           "fnmatch", "glob", "gzip", "heapq", "html", "ipaddress", "json", "linecache", "locale", "logging", "math",
           "mimetypes", "operator", "pkgutil", "platform", "posixpath", "py_compile", "re", "secrets", "shlex",
           "shutil", "statistics", "sysconfig", "tarfile", "tempfile", "textwrap", "timeit", "unicodedata",
           "urllib.parse", "urllib.request", "warnings", "xml.etree.ElementTree", "xml.sax.saxutils", "zipfile")
TYPES = ("float", "int", "str")                              # whose methods are taken as functions of the value


@dataclass(frozen=True)
class Kind:
    """A JSON schema and how to make up a value of it."""

    schema: dict[str, Any]
    draw: Callable[[Draws], Any]


def _text(draws: Draws) -> str:
    return " ".join(draws.some(WORDS, draws.integer(2, 6)))


def _path(draws: Draws) -> str:
    return "/" + "/".join(draws.some(WORDS, draws.integer(1, 3))) + draws.one(("", ".txt", ".csv", ".tar.gz", ".py"))


def _url(draws: Draws) -> str:
    return f"https://{draws.one(WORDS)}.example/{draws.one(WORDS)}?{draws.one(WORDS)}={draws.integer(1, 99)}"


def _words(draws: Draws) -> list[str]:
    return draws.some(WORDS, draws.integer(3, 6))


def _numbers(draws: Draws) -> list[int]:
    return [draws.integer(1, 99) for _ in range(draws.integer(3, 7))]


_INT, _STR, _NUMBER = {"type": "integer"}, {"type": "string"}, {"type": "number"}
_INTS = {"type": "array", "items": _INT}
_STRS = {"type": "array", "items": _STR}
KINDS = {
    "text": Kind(_STR, _text),
    "title": Kind(_STR, lambda d: " ".join(w.capitalize() for w in d.some(WORDS, d.integer(2, 4)))),
    "padded": Kind(_STR, lambda d: " " * d.integer(1, 4) + _text(d) + " " * d.integer(1, 4)),
    "lines": Kind(_STR, lambda d: "\n".join(_text(d) for _ in range(d.integer(2, 3)))),
    "indented": Kind(_STR, lambda d: "\n".join("    " + _text(d) for _ in range(d.integer(2, 3)))),
    "tabbed": Kind(_STR, lambda d: "\t".join(d.some(WORDS, 3))),
    "markup": Kind(_STR, lambda d: f"<b>{d.one(WORDS)}</b> & {d.one(WORDS)} \"{d.one(WORDS)}\""),
    "escaped": Kind(_STR, lambda d: f"{d.one(WORDS)} &lt; {d.one(WORDS)} &amp; {d.one(WORDS)}"),
    "percent": Kind(_STR, lambda d: "%20".join(d.some(WORDS, 3))),
    "plus": Kind(_STR, lambda d: "+".join(d.some(WORDS, 3))),
    "command": Kind(_STR, lambda d: f"{d.one(WORDS)} --{d.one(WORDS)} '{_text(d)}' {_path(d)}"),
    "mail": Kind(_STR, lambda d: f"{d.one(NAMES)} <{d.one(WORDS)}@{d.one(WORDS)}.example>"),
    "ip": Kind(_STR, lambda d: f"10.{d.integer(0, 255)}.{d.integer(0, 255)}.{d.integer(1, 254)}"),
    "json": Kind(_STR, lambda d: json.dumps({d.one(WORDS): _numbers(d), "n": d.integer(1, 99)})),
    "object": Kind({"type": "object"}, lambda d: {w: d.integer(1, 99) for w in d.some(WORDS, d.integer(1, 3))}),
    "word": Kind(_STR, lambda d: d.one(WORDS)), "name": Kind(_STR, lambda d: d.one(THINGS)),
    "letter": Kind(_STR, lambda d: d.one("aeglnorst")), "sign": Kind(_STR, lambda d: d.one("éßÑ5½€λЖ→☃")),
    "digits": Kind(_STR, lambda d: str(d.integer(1, 9999))), "prefix": Kind(_STR, lambda d: d.one(("> ", "# ", "- "))),
    "glob": Kind(_STR, lambda d: d.one("abcelmps") + "*"), "pattern": Kind(_STR, lambda d: d.one("aeo") + "[a-z]"),
    "path": Kind(_STR, _path), "url": Kind(_STR, _url), "encoding": Kind(_STR, lambda d: d.one(("utf-8", "latin-1"))),
    "relative": Kind(_STR, lambda d: "/".join(d.some(WORDS, 2))),
    "dotted": Kind(_STR, lambda d: f"/{d.one(WORDS)}/{d.one(WORDS)}/../{d.one(WORDS)}"),
    "int": Kind(_INT, lambda d: d.integer(-999, 999)), "count": Kind(_INT, lambda d: d.integer(1, 60)),
    "small": Kind(_INT, lambda d: d.integer(2, 12)), "width": Kind(_INT, lambda d: d.integer(20, 50)),
    "large": Kind(_INT, lambda d: d.integer(100, 99999)), "few": Kind(_INT, lambda d: d.integer(1, 3)),
    "year": Kind(_INT, lambda d: d.integer(1900, 2100)), "month": Kind(_INT, lambda d: d.integer(1, 12)),
    "day": Kind(_INT, lambda d: d.integer(1, 28)), "bool": Kind({"type": "boolean"}, lambda d: d.integer(0, 1) == 1),
    "number": Kind(_NUMBER, lambda d: d.integer(-9999, 9999) / 100),
    "share": Kind(_NUMBER, lambda d: d.integer(0, 8) / 8),
    "ints": Kind(_INTS, _numbers), "sorted": Kind(_INTS, lambda d: sorted(_numbers(d))),
    "words": Kind(_STRS, _words), "paths": Kind(_STRS, lambda d: [f"/{d.one(WORDS[:4])}{_path(d)}" for _ in range(3)]),
    "parts": Kind(_STRS, lambda d: d.some(WORDS, d.integer(1, 2)))}

# parameters of functions that are not called, by their name; a bool, an int or a float is also known by its default
BY_NAME = {name: kind for kind, names in {
    "text": "s string text msg message str doc prompt content line sep description", "word": "word key prefix",
    "path": "path p pathname filename file src dst dir f1 f2 root dirname output_dir cache_file",
    "url": "url base", "encoding": "encoding", "name": "name module typename tag group field fullname",
    "pattern": "pattern", "glob": "pat", "mail": "addr email",
    "count": "n k num number count length size nbytes level maxlen limit", "width": "width columns",
    "year": "year", "month": "month", "day": "day", "ip": "address", "letter": "chr ch c char",
    "words": "names words args paths files",
    "bool": "verbose recursive follow_symlinks", "number": "x y timeout seconds", "small": "i j"}.items()
    for name in names.split()}
# of these the names mislead, or two values would have to go together
SKIP = {"heapq.merge", "ipaddress.v4_int_to_packed", "ipaddress.v6_int_to_packed", "locale.atof", "locale.atoi",
        "pkgutil.extend_path", "posixpath.isdir", "statistics.correlation", "statistics.covariance",
        "statistics.linear_regression", "unicodedata.lookup", "xml.etree.ElementTree.XML",
        "xml.etree.ElementTree.XMLID"}
NEVER = {"flags", "format", "buffering", "optimize", "quiet", "stacklevel"}      # numbers that stand for something else

# functions that are called, all pure: the kinds of their first parameters
PURE = {name: kinds.split() for name, kinds in {
    "math.ceil": "number", "math.floor": "number", "math.trunc": "number", "math.fabs": "number",
    "math.factorial": "small", "math.gcd": "ints", "math.lcm": "ints", "math.comb": "count small",
    "math.perm": "small few", "math.isqrt": "large", "math.prod": "ints", "math.fsum": "ints",
    "statistics.mean": "ints", "statistics.median": "ints", "statistics.median_low": "ints",
    "statistics.median_high": "ints", "statistics.mode": "ints", "statistics.multimode": "ints",
    "statistics.fmean": "ints", "statistics.pvariance": "ints", "statistics.variance": "ints",
    "statistics.pstdev": "ints", "statistics.stdev": "ints", "statistics.harmonic_mean": "ints",
    "operator.add": "int int", "operator.sub": "int int", "operator.mul": "int int", "operator.floordiv": "int small",
    "operator.mod": "int small", "operator.neg": "int", "operator.abs": "int", "operator.lt": "int int",
    "operator.le": "int int", "operator.eq": "int int", "operator.ne": "int int", "operator.gt": "int int",
    "operator.ge": "int int", "operator.and_": "count count", "operator.or_": "count count",
    "operator.xor": "count count", "operator.lshift": "count few", "operator.rshift": "large few",
    "operator.concat": "word word", "operator.contains": "ints count", "operator.countOf": "ints count",
    "textwrap.shorten": "lines width", "textwrap.dedent": "indented",
    "textwrap.indent": "lines prefix", "textwrap.fill": "lines width", "textwrap.wrap": "lines width",
    "html.escape": "markup", "html.unescape": "escaped", "shlex.quote": "text", "shlex.split": "command",
    "shlex.join": "words", "posixpath.basename": "path", "posixpath.dirname": "path", "posixpath.split": "path",
    "posixpath.splitext": "path", "posixpath.join": "path parts", "posixpath.normpath": "dotted",
    "posixpath.isabs": "relative", "posixpath.normcase": "path", "posixpath.commonpath": "paths",
    "posixpath.commonprefix": "paths", "fnmatch.fnmatchcase": "word glob", "fnmatch.filter": "words glob",
    "fnmatch.translate": "glob", "calendar.isleap": "year", "calendar.leapdays": "year year",
    "calendar.weekday": "year month day", "calendar.monthrange": "year month",
    "difflib.get_close_matches": "word words", "difflib.ndiff": "words words", "bisect.bisect_left": "sorted count",
    "bisect.bisect_right": "sorted count", "heapq.nlargest": "few ints", "heapq.nsmallest": "few ints",
    "urllib.parse.quote_plus": "text", "urllib.parse.unquote": "percent",
    "urllib.parse.unquote_plus": "plus", "urllib.parse.urljoin": "url relative",
    "urllib.parse.parse_qs": "plus", "unicodedata.category": "sign",
    "unicodedata.bidirectional": "sign", "unicodedata.combining": "sign", "email.utils.parseaddr": "mail",
    "re.escape": "path", "re.findall": "pattern text", "re.sub": "pattern letter text", "re.split": "pattern text",
    "json.dumps": "object", "json.loads": "json", "xml.sax.saxutils.escape": "markup",
    "xml.sax.saxutils.unescape": "escaped", "xml.sax.saxutils.quoteattr": "markup",
    "int.bit_count": "large", "int.bit_length": "large", "float.is_integer": "number",
    "float.as_integer_ratio": "share", "str.capitalize": "text", "str.casefold": "title", "str.center": "word width",
    "str.expandtabs": "tabbed", "str.isalpha": "word", "str.isdigit": "digits", "str.isidentifier": "text",
    "str.islower": "title", "str.istitle": "title", "str.isupper": "word", "str.ljust": "word width",
    "str.lower": "title", "str.lstrip": "padded", "str.partition": "text letter", "str.removeprefix": "word letter",
    "str.removesuffix": "word letter", "str.replace": "text letter letter", "str.rjust": "word width",
    "str.rpartition": "text letter", "str.rsplit": "text letter", "str.rstrip": "padded", "str.split": "text letter",
    "str.splitlines": "lines", "str.strip": "padded", "str.swapcase": "title", "str.title": "text",
    "str.upper": "text", "str.zfill": "digits small"}.items()}

_PAST_SIGNATURE = re.compile(r"->|^\w+\(")
_FIRST_SENTENCE = re.compile(r".*?(?<!e\.g)(?<!i\.e)(?<!etc)[.!?](?=\s|$)|.*")
_LONGEST = 200                                               # characters of a first sentence that is taken


@dataclass(frozen=True)
class Tool:
    """A function as a tool. `kinds`: of the parameters that get values; the first `needed` always, the rest at will."""

    path: str                                                # math.gcd
    sentence: str
    schema: dict[str, Any]                                   # {"name", "description", "parameters"}
    kinds: dict[str, str]
    needed: int

    @property
    def name(self) -> str:
        return self.schema["name"]

    @property
    def pure(self) -> bool:
        return self.path in PURE

    def arguments(self, draws: Draws) -> dict[str, Any]:
        """Made-up arguments by name; of those that may be left out, some, but none of a function that is called."""
        names = list(self.kinds)
        chosen = names[:self.needed] + [name for name in names[self.needed:] if draws.integer(0, 2) == 0]
        return {name: KINDS[self.kinds[name]].draw(draws) for name in chosen}

    def call(self, arguments: dict[str, Any]) -> Any:
        """What the function returns, as JSON can hold it. ValueError for one that is not in PURE."""
        if not self.pure:                                    # no assert, which -O would leave out
            raise ValueError(f"{self.path} is not among the functions that may be called")
        function = _resolve(self.path)
        spread = [p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values()]
        values: list[Any] = []
        for value, several in zip(arguments.values(), spread, strict=False):
            values += value if several else [value]
        return _plain(function(*values))


def _plain(value: Any) -> Any:
    """Tuples and generators as lists, enumerations as numbers."""
    if isinstance(value, (tuple, list)) or inspect.isgenerator(value):
        return [_plain(entry) for entry in value]
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _resolve(path: str) -> Callable[..., Any]:
    owner, _, name = path.rpartition(".")
    return getattr(getattr(builtins, owner) if owner in TYPES else importlib.import_module(owner), name)


def standard_tools() -> list[Tool]:
    """All of them, sorted by path, so that those of one module are neighbours. DataError without docstrings."""
    if sys.flags.optimize > 1:
        raise DataError("has no docstrings", "this Python", "run it without -OO")
    found = [_tool(path, function) for path, function in sorted(_functions()) if path not in SKIP]
    return [tool for tool in found if tool is not None]


def _functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in MODULES:
        own = {name, f"_{name}", "genericpath"}              # where C and shared parts of a module say they are from
        module = importlib.import_module(name)
        public = getattr(module, "__all__", [attribute for attribute in vars(module) if not attribute.startswith("_")])
        for attribute, function in vars(module).items():
            if ((inspect.isfunction(function) or inspect.isbuiltin(function)) and attribute in public
                    and function.__name__ == attribute and function.__module__ in own):
                yield f"{name}.{attribute}", function
    for name in TYPES:
        for attribute, function in vars(getattr(builtins, name)).items():
            if inspect.ismethoddescriptor(function) and not attribute.startswith("_"):
                yield f"{name}.{attribute}", function


def _tool(path: str, function: Callable[..., Any]) -> Tool | None:
    """None if there is no signature, no plain first sentence, or a parameter that no value is known for."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):
        return None
    sentence = _sentence(inspect.getdoc(function) or "")
    if sentence is None or not parameters:
        return None
    owner = path.rpartition(".")[0]
    properties: dict[str, Any] = {}
    kinds: dict[str, str] = {}
    later: dict[str, str] = {}
    for i, parameter in enumerate(parameters):
        name = owner if parameter.name == "self" else parameter.name
        kind, needed = _kind(path, parameter, i)
        if kind is None and needed:
            return None
        properties[name] = _property(parameter, kind)
        if kind is not None:
            (kinds if needed else later)[name] = kind
    schema = {"name": path.replace(".", "_"), "description": sentence,
              "parameters": {"type": "object", "properties": properties, "required": list(kinds)}}
    return Tool(path, sentence, schema, kinds | later, len(kinds))


def _kind(path: str, parameter: inspect.Parameter, i: int) -> tuple[str | None, bool]:
    """(kind or None if unknown, whether it gets a value always)."""
    if path in PURE:
        given = i < len(PURE[path])
        return (PURE[path][i] if given else None), given
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return None, False
    needed = parameter.default is parameter.empty
    if parameter.name in NEVER:
        return None, needed
    by_default = {bool: "bool", int: "count", float: "number"}.get(type(parameter.default))
    return by_default or BY_NAME.get(parameter.name), needed


def _property(parameter: inspect.Parameter, kind: str | None) -> dict[str, Any]:
    """Schema of one parameter; nothing is said of the type of one that no value is known for."""
    found: dict[str, Any] = {} if kind is None else dict(KINDS[kind].schema)
    if type(parameter.default) in (bool, int, float, str):
        found["default"] = parameter.default
    return found


def _sentence(doc: str) -> str | None:
    first = re.split(r"\n\s*\n", doc.strip(), maxsplit=1)[0]
    match = _FIRST_SENTENCE.match(" ".join(first.split()))
    sentence = match[0].rstrip(".:") if match else ""
    if not 5 <= len(sentence) <= _LONGEST or _PAST_SIGNATURE.search(sentence):
        return None
    return f"{sentence}."
