"""Where documents come from: the Python installation itself, a folder, or a dataset of the hub.

Each function yields `Raw` documents in a deterministic order; `write.write_dataset` cuts, splits and shuffles them.
"""

from __future__ import annotations

import ast
import io
import json
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanopoe.data.shards import COLUMN, open_shard, read_group
from nanopoe.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
LINE_BYTES = 64 << 20            # longest line of a jsonl file
# tests are no prose, tables of code points no language, and the rest was not written for this installation
_SKIP = {"site-packages", "test", "tests", "idle_test", "__pycache__", "_bundled", "encodings"}
_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Raw:
    """A document as found. Documents of one `group` never end up in different splits; None: each by its own text."""

    text: str
    where: str
    group: str | None = None


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


def folder_documents(folder: Path, column: str = COLUMN) -> Iterator[Raw]:
    """Every .txt .md .rst .py file as one document, every row of .jsonl[.gz|.zst] and .parquet; sorted by path.

    Files and folders whose name begins with a dot (.git, .venv) are left out.
    """
    if not folder.is_dir():
        raise DataError("no such folder", folder, "name a folder of text, jsonl or parquet files")
    found = False
    for path in sorted(folder.rglob("*")):
        name = path.name.lower()
        if not path.is_file() or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if name.endswith(TEXT_SUFFIXES):
            yield Raw(_read_text(path), str(path))
        elif name.endswith(JSONL_SUFFIXES):
            yield from _jsonl(path, column)
        elif name.endswith(".parquet"):
            yield from _parquet(path, column)
        else:
            continue
        found = True
    if not found:
        known = " ".join((*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet"))
        raise DataError("nothing to read", folder, f"known are {known}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 (byte {error.start})", path, "convert or remove the file") from error
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", path, "make it readable or remove it") from error


def _jsonl(path: Path, column: str) -> Iterator[Raw]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression=compression)) as file:
            number = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                where = f"{path} line {number}"
                if len(line) > LINE_BYTES:
                    raise DataError(f"longer than {LINE_BYTES:,} bytes", where, "cut the document")
                if line.strip():
                    yield Raw(_text_of(_parsed(line, where), column, where), where)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot be read ({error})", path, "the file is damaged: copy or write it again") from error


def _parsed(line: bytes, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", where, "correct or remove the line") from error


def _parquet(path: Path, column: str) -> Iterator[Raw]:
    shard = open_shard(path, column)
    for group in range(len(shard.group_rows)):
        row = 0
        for batch in read_group(shard, group, column):
            for text in batch.to_pylist():
                yield Raw(text, f"{path} row group {group} row {row}")
                row += 1


def hub_documents(dataset: str, *, revision: str | None = None, split: str = "train", config: str | None = None,
                  column: str = COLUMN) -> Iterator[Raw]:
    """Stream a dataset of the hub (or a local folder `datasets` can read). No code of the dataset is run."""
    import datasets  # slow to import, and only this source needs it

    where = f"dataset {dataset}"
    do = "check the id, --revision, --config and --split, and that the network is there"
    try:
        stream = iter(datasets.load_dataset(dataset, name=config, split=split, revision=revision, streaming=True))
    except Exception as error:                               # its errors have no common base
        raise DataError(f"cannot be opened ({_first_line(error)})", where, do) from error
    number = 0
    while True:
        try:
            row = next(stream, None)
        except Exception as error:
            raise DataError(f"cannot be read ({_first_line(error)})", f"{where} row {number}", do) from error
        if row is None:
            return
        yield Raw(_text_of(row, column, f"{where} row {number}"), f"{where} row {number}")
        number += 1


def _text_of(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise DataError(f"no column '{column}', there is: {keys[:200]}", where, "name the text column with --column")
    if not isinstance(row[column], str):
        raise DataError(f"column '{column}' is {type(row[column]).__name__}, not a string", where,
                        "name the text column with --column")
    return row[column]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__
