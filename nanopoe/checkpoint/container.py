"""The safetensors container: 8 bytes of length, a JSON header padded to 8, the tensors' raw little-endian bytes.

Written by ourselves, since the library's writer reports a full disk without an errno and would need a second pass to
hash. Read by ourselves, since a memory map of a file that is cut meanwhile kills the process; and a map would keep a
deleted checkpoint on the disk. What is written here the library reads (tests).
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanopoe.checkpoint.files import CHUNK, DurableFile
from nanopoe.errors import CheckpointError

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
          "BOOL": torch.bool}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 16 << 20
JSON_VALUES = 1 << 21               # a MiB of brackets becomes 20 MiB of Python: bounded before it is parsed


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its safetensors dtype, its shape, and the offset of its first byte in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, int]]:
    """Write `tensors` into a new file and make it durable; its manifest entry, and the CRC-32 of each tensor.

    Holds a chunk of a tensor beside it at most (a copy of it, if it is not contiguous). OSError as the disk gives it.
    """
    order = sorted(tensors, key=lambda key: (-tensors[key].element_size(), key))      # keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key in order:
        tensor = tensors[key]
        begin, end = end, end + tensor.nbytes
        header[key] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    crcs = dict.fromkeys(order, 0)
    with DurableFile(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key in order:
            for chunk in raw_chunks(tensors[key]):
                crcs[key] = zlib.crc32(chunk, crcs[key])
                file.write(chunk)
    return file.entry, crcs


def raw_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor on any device, CHUNK at a time."""
    for piece in tensor.detach().reshape(-1).split(CHUNK // tensor.element_size()):
        yield raw_bytes(piece.cpu())


def raw_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by key, in the order of their bytes; CheckpointError unless they fill it exactly."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(HEADER_LIMIT, size - 8):
                raise ValueError(f"a header of {length} bytes")
            text = file.read(length)
            if values_in(text) > JSON_VALUES:
                raise ValueError(f"over {JSON_VALUES:,} values in its header")
            header = json.loads(text)
        header.pop("__metadata__", None)
        found, at = {}, 8 + length
        for key, value in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            stored = Stored(value["dtype"], tuple(value["shape"]), at)
            if not all(type(n) is int and 0 <= n < 2**48 for n in stored.shape):
                raise ValueError(f"{key} has shape {stored.shape}")
            if value["data_offsets"] != [at - 8 - length, at - 8 - length + stored.bytes]:
                raise ValueError(f"{key} does not begin where the one before ends")
            found[key], at = stored, at + stored.bytes
        if at != size:
            raise ValueError(f"its tensors end at byte {at} of {size}")
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"is no safetensors file: {str(error)[:80]}", path, "use another step or copy") from error
    return found


def values_in(text: bytes) -> int:
    """At least as many values as parsing this JSON would make."""
    return text.count(b",") + text.count(b"[") + text.count(b"{")


def read_rows(path: Path, stored: Stored, low: int, high: int) -> Tensor:
    """Rows [low, high) of a stored tensor, in memory of its own; a scalar is its one row."""
    shape = (high - low, *stored.shape[1:]) if stored.shape else ()
    tensor = torch.empty(shape, dtype=DTYPES[stored.dtype])
    row_bytes = stored.bytes // stored.shape[0] if stored.shape and stored.shape[0] else 0
    view = raw_bytes(tensor)
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(stored.offset + low * row_bytes)
            while len(view):
                count = file.readinto(view)
                if not count:
                    raise CheckpointError("ends too early", path,
                                          "it was cut while it was read; use another step or copy")
                view = view[count:]
    except OSError as error:
        raise unreadable(path, error) from error
    return tensor


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"cannot be read: {error.strerror or error}", path, "check the disk and the rights")
