"""The Python installation as a text source: documentation and code of its standard library, with no network."""

from __future__ import annotations

import ast
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from nanopoe.data.ingest import Bad, Raw, Unit

# tests are no prose, tables of code points no language, and the rest was not written for this installation
_SKIP = {"site-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "encodings"}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Stdlib:
    """`stdlib_documents` as an origin: one unit, whose rows are its documents."""

    root: Path | None = None
    license: str | None = "PSF-2.0"

    @property
    def source(self) -> dict[str, Any]:
        return {"kind": "stdlib", "python": platform.python_version(), "license": self.license}

    @property
    def label(self) -> str:
        return "stdlib "

    def units(self) -> list[Unit]:
        return [Unit("stdlib", None, ())]

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        yield from ((document, 0) for document in islice(stdlib_documents(self.root), start, None))


def stdlib_documents(root: Path | None = None) -> Iterator[Raw]:
    """Help topics, a documentation page made of the docstrings, and the source of every standard module.

    No network, no imports of what is read. A page and the source it documents share a group, as they share text.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in _modules(root):
        relative = path.relative_to(root)
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():     # open honours the coding line
                warnings.simplefilter("ignore", SyntaxWarning)
                text = file.read()
                tree = ast.parse(text)
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue                                         # templates and the like are no modules
        name = relative.as_posix()
        if relative.parts[0] == "pydoc_data":
            yield from _topics(tree, name)
            continue
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        page = documentation_page(tree, module)
        if page:
            yield Raw(page, name, name)
        if text.strip():
            yield Raw(text, name, name)


def _modules(folder: Path) -> Iterator[Path]:
    """Python files below `folder`, sorted, without entering what is skipped (site-packages may be huge)."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if path.name not in _SKIP and not path.is_symlink():
                yield from _modules(path)
        elif path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path


def _topics(tree: ast.Module, where: str) -> Iterator[Raw]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            for topic, text in sorted(ast.literal_eval(node.value).items()):
                yield Raw(text, f"{where} {topic}", f"topic {topic}")


def documentation_page(tree: ast.Module, module: str) -> str:
    """What `pydoc` would tell of a module: its docstring and those of its public definitions; "" without any."""
    parts = []
    if doc := ast.get_docstring(tree):
        parts.append(f"Module {module}\n\n{doc}")
    parts += _pages_of(tree, f"{module}.")
    return "\n\n\n".join(parts)


def _pages_of(parent: ast.Module | ast.ClassDef, prefix: str) -> Iterator[str]:
    for node in parent.body:
        if not isinstance(node, _Definition) or node.name.startswith("_"):
            continue
        if isinstance(node, ast.ClassDef):
            signature = ", ".join(ast.unparse(base) for base in node.bases)
        else:
            signature = ast.unparse(node.args)
        if doc := ast.get_docstring(node):
            yield f"{prefix}{node.name}({signature})\n\n{doc}"
        if isinstance(node, ast.ClassDef):
            yield from _pages_of(node, f"{prefix}{node.name}.")
