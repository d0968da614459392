"""A folder as an origin: text files, jsonl (.gz, .zst), json arrays and parquet, sorted by path."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nanopoe.data.ingest import DOCUMENT_BYTES, TEXT, Bad, Raw, Shape, Unit
from nanopoe.errors import DataError

TEXT_SUFFIXES = (".txt", ".md", ".rst", ".py")
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
KNOWN = (*JSONL_SUFFIXES, ".json", ".parquet")
JSON_BYTES = 1 << 30             # a json array is parsed as a whole
BUNDLE_FILES, BUNDLE_BYTES = 1024, 16 << 20      # text files that are one unit
_BATCH_BYTES = 64 << 20          # decoded rows of parquet, should each be as long as its whole column chunk
_DAMAGED = "the file is damaged: copy or write it again"
_BROKEN = (pa.ArrowException, OSError, ValueError, TypeError, MemoryError, OverflowError, EOFError)


@dataclass(frozen=True)
class Folder:
    """Every .txt .md .rst .py file is a document, every row of the other files is one.

    Files and folders whose name begins with a dot (.git, .venv) are left out. An adapter reads rows only.
    """

    path: Path
    shape: Shape = TEXT
    license: str | None = None

    @property
    def source(self) -> dict[str, Any]:
        return {"kind": "folder", "name": self.path.name, "license": self.license, **self.shape.told}

    @property
    def label(self) -> str:
        return f"{self.path}/"

    def units(self) -> list[Unit]:
        try:
            return self._units()
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", error.filename or self.path, "make it readable") \
                from error

    def _units(self) -> list[Unit]:
        if not self.path.is_dir():
            raise DataError("no such folder", self.path, "name a folder of text, jsonl, json or parquet files")
        known = KNOWN if self.shape.whole_rows else (*TEXT_SUFFIXES, *KNOWN)
        units: list[Unit] = []
        bundle: list[tuple[str, int]] = []
        for path in sorted(self.path.rglob("*")):
            relative = path.relative_to(self.path)
            if any(part.startswith(".") for part in relative.parts) or not path.is_file():
                continue
            if not path.name.lower().endswith(known):
                continue
            is_text, size = path.name.lower().endswith(TEXT_SUFFIXES), path.stat().st_size
            if bundle and (not is_text or len(bundle) == BUNDLE_FILES or sum(s for _, s in bundle) >= BUNDLE_BYTES):
                units.append(_bundled(bundle))
                bundle = []
            if is_text:
                bundle.append((relative.as_posix(), size))
            else:
                units.append(Unit(relative.as_posix(), size, (relative.as_posix(),)))
        units += [_bundled(bundle)] if bundle else []
        if not units:
            raise DataError("nothing to read", self.path, f"known are {' '.join(known)}")
        return units

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        first = self.path / unit.items[0]
        try:
            if first.name.lower().endswith(TEXT_SUFFIXES):
                yield from _texts(self.path, unit, start)
                return
            if first.stat().st_size == 0:
                raise DataError("no rows: the file is empty", first, "remove the file")
            reader = _jsonl if first.name.lower().endswith(JSONL_SUFFIXES) else \
                _json_array if first.name.lower().endswith(".json") else _parquet
            rows = False
            for row in reader(first, unit.items[0], self.shape, start):
                rows = True
                yield row
        except _BROKEN as error:
            raise DataError(f"cannot be read ({_reason(error)})", first, _DAMAGED) from error
        if not rows and start == 0:
            raise DataError("no rows", first, "remove the file")


def _bundled(files: list[tuple[str, int]]) -> Unit:
    name = files[0][0] if len(files) == 1 else f"{files[0][0]} to {files[-1][0]}"
    return Unit(name, sum(size for _, size in files), tuple(file for file, _ in files))


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def _texts(folder: Path, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
    done = 0
    for number, name in enumerate(unit.items):
        path = folder / name
        size = path.stat().st_size
        done += size
        if number < start:
            continue
        if size > DOCUMENT_BYTES:
            yield Bad(f"longer than {DOCUMENT_BYTES >> 20} MB", name, do="cut it in files"), done
            continue
        try:
            yield Raw(path.read_text("utf-8"), name), done
        except UnicodeDecodeError as error:
            yield Bad("not UTF-8", name, f" (byte {error.start})", "convert or remove the file"), done
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", path, "make it readable or remove it") from error


def _jsonl(path: Path, name: str, shape: Shape, start: int) -> Iterator[tuple[Raw | Bad, int]]:
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    with open(path, "rb") as raw:
        stream: Any = raw
        if compression:
            stream = io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw), compression), 1 << 20)
        number = row = 0
        while line := stream.readline(DOCUMENT_BYTES + 1):
            number += 1
            long = len(line) > DOCUMENT_BYTES
            while long and not line.endswith(b"\n") and (line := stream.readline(DOCUMENT_BYTES)):
                pass
            if not long and not line.strip():
                continue
            row += 1
            if row > start:
                where = f"{name} line {number}"
                yield (Bad(f"longer than {DOCUMENT_BYTES >> 20} MB", where) if long else
                       _parsed(line, where, shape)), raw.tell()


def _parsed(line: bytes, where: str, shape: Shape) -> Raw | Bad:
    try:
        return shape.of_row(json.loads(line), where)
    except UnicodeDecodeError as error:
        return Bad("not UTF-8", where, f" (byte {error.start})")
    except (ValueError, RecursionError) as error:
        return Bad("not JSON", where, f" ({_reason(error)})", "correct or remove the line")


def _json_array(path: Path, name: str, shape: Shape, start: int) -> Iterator[tuple[Raw | Bad, int]]:
    size = path.stat().st_size
    if size > JSON_BYTES:
        raise DataError(f"over {JSON_BYTES >> 30} GB of json, which is parsed as a whole", path, "write it as jsonl")
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({_reason(error)})", path, "correct or remove the file") from error
    if not isinstance(rows, list):
        raise DataError(f"not an array but {type(rows).__name__}", path, "write one row a line as jsonl")
    for number in range(start, len(rows)):
        yield shape.of_row(rows[number], f"{name} row {number}"), size * (number + 1) // len(rows)


def _parquet(path: Path, name: str, shape: Shape, start: int) -> Iterator[tuple[Raw | Bad, int]]:
    with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False) as file:
        fields = {field.name: field.type for field in file.schema_arrow}
        if not shape.whole_rows:
            _check_column(path, fields, shape)
        first, size, rows = 0, path.stat().st_size, file.metadata.num_rows
        for group in range(file.metadata.num_row_groups):
            meta = file.metadata.row_group(group)
            if first + meta.num_rows > start:
                before = max(0, start - first)
                for row, document in enumerate(_group_rows(file, group, f"{name} row group {group}", shape)):
                    if row >= before:
                        yield document, size * (first + row + 1) // rows
            first += meta.num_rows


def _check_column(path: Path, fields: dict[str, pa.DataType], shape: Shape) -> None:
    if shape.column not in fields:
        raise DataError(f"no column '{shape.column}', there is: {', '.join(fields)[:200] or 'none'}", path,
                        "name the text column with --column")
    kind = fields[shape.column]
    if not shape.transcript and not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"column '{shape.column}' is {kind}, not string", path, "name the text column with --column")


def _group_rows(file: pq.ParquetFile, group: int, where: str, shape: Shape) -> Iterator[Raw | Bad]:
    """The rows of a row group, decoded a few at a time: a value may be as long as all of it.

    The sizes of single columns are not asked for: on damaged statistics pyarrow then ends the process.
    """
    rows = max(16, min(1024, _BATCH_BYTES // max(1, file.metadata.row_group(group).total_byte_size)))
    columns = None if shape.whole_rows else [shape.column]
    number = 0
    for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        for value in batch.to_pylist() if shape.whole_rows else _values(batch.column(0)):
            at = f"{where} row {number}"
            yield Bad("not UTF-8", at, f" (byte {value.start})") if isinstance(value, UnicodeDecodeError) else \
                shape.document(value, at)
            number += 1


def _values(column: pa.Array) -> list[Any]:
    """Python values; what is not UTF-8 stays as its error."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_value(item) for item in column]


def _value(item: pa.Scalar) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError as error:
        return error
