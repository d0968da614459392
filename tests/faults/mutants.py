"""The kinds of damage of F10: each changes a step folder of a real run, and says what an error must name.

Those under `sealed` make the manifest believe in the change (sizes, SHA-256, seal), so that hashing alone passes.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nanopoe.checkpoint.container import read_header
from nanopoe.checkpoint.format import seal
from nanopoe.checkpoint.store import sha256_file

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Damage:
    """What was done, and what the error must name: one of `files`, and the tensor if it can be known. `late` damage
    shows only when the model is there."""

    what: str
    files: tuple[str, ...]
    tensor: str = ""
    late: bool = False
    kinds: tuple[str, ...] = ("checkpoint",)


class Victim:
    """A step folder to damage; `sibling` is another step of the run, `foreign` the same step of another run."""

    def __init__(self, folder: Path, sibling: Path, foreign: Path, draw: random.Random):
        self.folder, self.sibling, self.foreign, self.draw = folder, sibling, foreign, draw
        self.names = sorted(p.name for p in folder.iterdir())
        self.tensor_files = [n for n in self.names if n.endswith(".safetensors")]

    def manifest(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.folder / MANIFEST).read_text())
        return value

    def reseal(self, manifest: dict[str, Any]) -> None:
        (self.folder / MANIFEST).write_text(json.dumps(seal(manifest), sort_keys=True) + "\n")

    def rewrite(self, name: str, raw: bytes | bytearray, sealed: bool) -> None:
        path = self.folder / name
        path.unlink()
        path.write_bytes(raw)
        if sealed:
            manifest = self.manifest()
            manifest["files"][name] = {"bytes": len(raw), "sha256": sha256_file(path)}
            self.reseal(manifest)

    def tensor(self, optimizer: bool | None = None) -> str:
        """A tensor's name; only one that has rows."""
        found = [name for name, entry in self.manifest()["tensors"].items()
                 if entry["shape"] and (optimizer is None or ("::" in name) == optimizer)]
        return self.draw.choice(found)

    def owner(self, name: str, at: int) -> str:
        """The tensor whose bytes include byte `at` of a file; "" in the header."""
        for key, stored in read_header(self.folder / name).items():
            if stored.offset <= at < stored.offset + stored.bytes:
                return "::".join(key.split("::")[:2])
        return ""


KINDS: dict[str, Callable[[Victim], Damage]] = {}


def kind(function: Callable[[Victim], Damage]) -> Callable[[Victim], Damage]:
    KINDS[function.__name__] = function
    return function


# -- bytes -----------------------------------------------------------------------------------------------------------

@kind
def truncate(v: Victim) -> Damage:
    name = v.draw.choice(v.names)
    raw = (v.folder / name).read_bytes()
    end = v.draw.choice([0, len(raw) - 1, v.draw.randrange(len(raw))])
    v.rewrite(name, raw[:end], sealed=False)
    return Damage(f"{name} cut to {end} bytes", (name,))


@kind
def flip(v: Victim) -> Damage:
    name = v.draw.choice(v.names)
    raw = bytearray((v.folder / name).read_bytes())
    at = v.draw.randrange(len(raw))
    tensor = v.owner(name, at) if name in v.tensor_files else ""
    raw[at] ^= 1 << v.draw.randrange(8)
    v.rewrite(name, raw, sealed=False)
    return Damage(f"byte {at} of {name}", (name,), tensor)


@kind
def zero_block(v: Victim) -> Damage:
    """Only where there is something but zeros. The first damaged tensor in the file's order is the one to name."""
    name = v.draw.choice(v.tensor_files)
    raw = bytearray((v.folder / name).read_bytes())
    size = v.draw.choice([16, 512, 4096])
    at = next(a for a in iter(lambda: v.draw.randrange(len(raw) - size), -1) if any(raw[a:a + size]))
    first = next(i for i in range(at, at + size) if raw[i])
    tensor = v.owner(name, first)
    raw[at:at + size] = bytes(size)
    v.rewrite(name, raw, sealed=False)
    return Damage(f"{size} zeros at {at} of {name}", (name,), tensor)


@kind
def append(v: Victim) -> Damage:
    name = v.draw.choice(v.names)
    more = v.draw.choice([b"\n", b"\0", v.draw.randbytes(1000)])
    v.rewrite(name, (v.folder / name).read_bytes() + more, sealed=False)
    return Damage(f"{len(more)} bytes after {name}", (name,))


@kind
def noise(v: Victim) -> Damage:
    name = v.draw.choice(v.names)
    v.rewrite(name, v.draw.randbytes((v.folder / name).stat().st_size), sealed=False)
    return Damage(f"noise for {name}", (name,))


@kind
def edited_manifest(v: Victim) -> Damage:
    """A digit for another, in place: still JSON, mostly."""
    raw = bytearray((v.folder / MANIFEST).read_bytes())
    at = v.draw.choice([i for i, byte in enumerate(raw) if chr(byte).isdigit()])
    raw[at] = ord(v.draw.choice([d for d in "0123456789" if d != chr(raw[at])]))
    v.rewrite(MANIFEST, raw, sealed=False)
    return Damage(f"digit {at} of the manifest", (MANIFEST,))


@kind
def swap(v: Victim) -> Damage:
    """A file of another step or run; the config is the same in all steps."""
    name = v.draw.choice([n for n in v.names if n not in ("config.json", MANIFEST)])
    source = v.draw.choice([v.sibling, v.foreign])
    v.rewrite(name, (source / name).read_bytes(), sealed=False)
    return Damage(f"{name} of {source.parent.parent.name} {source.name}", (name,))


@kind
def foreign_manifest(v: Victim) -> Damage:
    source = v.draw.choice([v.sibling, v.foreign])
    v.rewrite(MANIFEST, (source / MANIFEST).read_bytes(), sealed=False)
    return Damage(f"the manifest of {source.parent.parent.name} {source.name}", (v.folder.name,))


@kind
def foreign_folder(v: Victim) -> Damage:
    shutil.rmtree(v.folder)
    shutil.copytree(v.sibling, v.folder)
    return Damage("the folder of another step", (v.folder.name,))


# -- what lies there -------------------------------------------------------------------------------------------------

@kind
def delete(v: Victim) -> Damage:
    name = v.draw.choice(v.names)
    (v.folder / name).unlink()
    return Damage(f"{name} deleted", (name,))


@kind
def symlink(v: Victim) -> Damage:
    """To the very same bytes, so that only the link is wrong; or to nowhere, to itself, to a device."""
    name = v.draw.choice([*v.names, ""])
    path = v.folder / name
    outside = v.folder.parent.parent / f"outside-{name}"
    path.rename(outside)
    target = v.draw.choice([outside, outside, v.folder.parent / "nowhere", path, Path("/dev/zero")])
    path.symlink_to(target)
    return Damage(f"{name or 'the folder'} is a link to {target.name}", (path.name,))


@kind
def no_file(v: Victim) -> Damage:
    name = v.draw.choice(v.names)
    (v.folder / name).unlink()
    make = v.draw.choice([os.mkdir, os.mkfifo])
    make(v.folder / name)
    return Damage(f"{make.__name__} for {name}", (name,))


# -- sealed manifests ------------------------------------------------------------------------------------------------

NUMBERS: tuple[Any, ...] = (-1, 2**63, 10**400, True, None, "12", 1.5, 1e300, [], {}, float("inf"), float("nan"))


@kind
def sealed_path(v: Victim) -> Damage:
    """A name that leads out of the folder, for a file or for the file of a part."""
    name = v.draw.choice(["../../outside.safetensors", "/etc/passwd", "a/b.safetensors", "", ".", "..", MANIFEST,
                          "x\0.safetensors", ".hidden.safetensors", "x" * 300 + ".safetensors", "é.safetensors",
                          "a\nb.safetensors", "C:\\x.safetensors", "~/x.safetensors"])
    manifest, file = v.manifest(), v.draw.choice(v.tensor_files)
    shutil.copy(v.folder / file, v.folder.parent.parent / "outside.safetensors")       # it is there, and it is right
    if v.draw.random() < 0.7:
        manifest["files"][name] = manifest["files"].pop(file)
    for entry in manifest["tensors"].values():
        for part in entry["parts"]:
            part["file"] = name if part["file"] == file else part["file"]
    v.reseal(manifest)
    return Damage(f"{file} is called {name!r}", (MANIFEST,))


@kind
def sealed_rows(v: Victim) -> Damage:
    """Parts that miss rows, hold them twice, or are there twice."""
    manifest, name = v.manifest(), v.tensor()
    parts = manifest["tensors"][name]["parts"]
    part = parts[v.draw.randrange(len(parts))]
    rows = part["rows"]
    how = v.draw.choice(["twice", "none", "more", "less", "later", "odd row0", "odd rows", "odd crc", "key", "extra"])
    if how == "twice":
        parts.append(dict(part))
    elif how == "none":
        parts.clear()
    elif how in ("more", "less"):
        part["rows"] += 1 if how == "more" else -1
    elif how == "later":
        part["row0"] += v.draw.randrange(1, rows + 1)
    elif how.startswith("odd"):
        part[{"odd row0": "row0", "odd rows": "rows", "odd crc": "crc32"}[how]] = v.draw.choice(NUMBERS)
    elif how == "key":
        part["key"] = v.draw.choice(["", "x", None, 3, f"{name}::7"])
    else:
        part["more"] = 1
    v.reseal(manifest)
    return Damage(f"{name}: {how}", (MANIFEST,))


@kind
def sealed_shape(v: Victim) -> Damage:
    """Wrong, impossible or huge; also where parts and rows agree with it."""
    manifest, name = v.manifest(), v.tensor()
    entry = manifest["tensors"][name]
    shape = list(entry["shape"])
    axis = v.draw.randrange(len(shape))
    entry["shape"] = v.draw.choice([
        [*shape, 2], [*shape, 0], shape[:-1], [2**40, 2**40], [2**62] * 3, [0, *shape[1:]], "x", None, [None], [[1]],
        [*shape[:axis], shape[axis] + 1, *shape[axis + 1:]], [*shape[:axis], -shape[axis], *shape[axis + 1:]],
        [*shape[:axis], shape[axis] * 1_000_003, *shape[axis + 1:]], [*shape[:axis], 1.0, *shape[axis + 1:]], [1] * 9])
    if v.draw.random() < 0.5 and len(entry["parts"]) == 1 and isinstance(entry["shape"], list) and entry["shape"]:
        entry["parts"][0]["rows"] = entry["shape"][0]
    v.reseal(manifest)
    return Damage(f"{name}: shape {str(entry['shape'])[:40]} for {shape}", (MANIFEST, *v.tensor_files), name)


@kind
def sealed_dtype(v: Victim) -> Damage:
    manifest, name = v.manifest(), v.tensor()
    dtype: Any = v.draw.choice(["F64", "BF16", "I32", "U8", "F31", "float32", None, ["F32"], {}, 1])
    manifest["tensors"][name]["dtype"] = dtype
    v.reseal(manifest)
    return Damage(f"{name}: dtype {dtype}", (MANIFEST, *v.tensor_files), "" if isinstance(dtype, list | dict) else name)


@kind
def sealed_file(v: Victim) -> Damage:
    """A part that lies in another file than the one it is said to lie in."""
    manifest, name = v.manifest(), v.tensor()
    part = manifest["tensors"][name]["parts"][0]
    part["file"] = v.draw.choice([*(n for n in v.names if n != part["file"]), "x.safetensors", None, 3])
    v.reseal(manifest)
    return Damage(f"{name} in {part['file']}", (MANIFEST, *v.tensor_files))


@kind
def sealed_number(v: Victim) -> Damage:
    """A count that is none; written as Python writes it, NaN and Infinity too."""
    manifest, value = v.manifest(), v.draw.choice(NUMBERS)
    where = v.draw.choice(["step", "world_size", "version", "bytes"])
    (manifest["files"][v.draw.choice(v.tensor_files)] if where == "bytes" else manifest)[where] = value
    v.reseal(manifest)
    return Damage(f"{where} {str(value)[:20]}", (MANIFEST,))


@kind
def sealed_field(v: Victim) -> Damage:
    """A key too few or too many, or the value of another kind, anywhere in the first two levels. What wrote it is
    only told, and may say anything."""
    manifest = v.manifest()
    at = v.draw.choice([manifest, manifest["files"], next(iter(manifest["files"].values())), manifest["tensors"],
                        manifest["tensors"][v.tensor()]])
    free = {"sha256", "world_size", "nanopoe", "torch"} if at is manifest else set()
    key, how = v.draw.choice(sorted(at.keys() - free)), v.draw.choice(["less", "more", "other"])
    if how == "less":
        del at[key]
    elif how == "more":
        at["x" * v.draw.choice([1, 300])] = at[key]
    else:
        at[key] = v.draw.choice([None, [], {}, "", 7, [1], {"a": 1}])
    v.reseal(manifest)
    return Damage(f"{how} {key}", (MANIFEST, *v.tensor_files, "config.json", v.folder.name))


# -- sealed files ----------------------------------------------------------------------------------------------------

@kind
def sealed_header(v: Victim) -> Damage:
    """The header of a safetensors file says what is not so; some say it at length."""
    name = v.draw.choice(v.tensor_files)
    raw = (v.folder / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:8 + length]), raw[8 + length:]
    key = v.draw.choice([k for k in header if k != "__metadata__" and header[k]["shape"]])
    entry = header[key]
    begin, end = entry["data_offsets"]
    how = v.draw.choice(["beyond", "before", "overlap", "huge", "negative", "nan", "bool", "dtype", "shape", "key",
                         "none", "list", "rename", "drop", "add", "metadata"])
    entry.update({
        "beyond": {"data_offsets": [begin + 2**40, end + 2**40]}, "before": {"data_offsets": [begin - 8, end - 8]},
        "overlap": {"data_offsets": [0, end - begin]} if begin else {"data_offsets": [0, end + 4]},
        "huge": {"shape": [2**47, 2**47]}, "negative": {"shape": [-n for n in entry["shape"]]},
        "nan": {"data_offsets": [float("nan"), float("nan")]}, "bool": {"shape": [True]},
        "dtype": {"dtype": v.draw.choice(["F16", "F128", None, [], 7])}, "shape": {"shape": [*entry["shape"], 2]},
        "none": {"data_offsets": None}, "list": {"data_offsets": [begin, end, end]}}.get(how, {}))
    if how == "key":
        del entry[v.draw.choice(sorted(entry))]
    elif how == "rename":
        header["x" * v.draw.choice([1, 100_000])] = header.pop(key)
    elif how == "drop":
        del header[key]
    elif how == "add":
        header["more"] = {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}
    elif how == "metadata":
        header = {"__metadata__": header}
    text = json.dumps(header).encode()
    v.rewrite(name, len(text).to_bytes(8, "little") + text + body, sealed=True)
    return Damage(f"{name}: {how} of {key}", (name, MANIFEST))


@kind
def sealed_header_text(v: Victim) -> Damage:
    """A header that is no JSON, or an evil one; lengths that lie."""
    name = v.draw.choice(v.tensor_files)
    raw = (v.folder / name).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = v.draw.choice([b"[" * 100_000, b'{"a":' * 50_000, b"{}", b"[]", b"null", b"3", b"\xff" * 100, b"", None,
                          None, b'{"a":1}', b'{"a":' + b"9" * 100_000 + b"}", b"{" + b'"a":{},' * 100_000 + b'"a":{}}'])
    if text is None:
        said = v.draw.choice([2**63, 2**64 - 1, len(raw), 17 << 20, length - 1, length + 8, 0, 1])
        v.rewrite(name, said.to_bytes(8, "little") + raw[8:], sealed=True)
        return Damage(f"{name}: header said to be {said} bytes", (name, MANIFEST))
    v.rewrite(name, len(text).to_bytes(8, "little") + text + raw[8 + length:], sealed=True)
    return Damage(f"{name}: header {text[:20]!r} of {len(text)} bytes", (name, MANIFEST))


EVIL_JSON = (b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"a":' * 50 + b"1" + b"}" * 50, b'{"a":' * 50_000,
             b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1e999}', b'{"a": -1e999}', b'{"a": ' + b"9" * 1_000_000 + b"}",
             b"\xff\xfe{}", b'{"a": "\xc3("}', "\ufeff{}".encode(), "{}".encode("utf-16"), b'{"a": 1} x', b"{'a': 1}",
             b'{"a": "\\ud800"}', b"{}\0", b'{"step": 1e5}', b'{"step": "3"}')


@kind
def sealed_json(v: Victim) -> Damage:
    name = v.draw.choice(["state.json", "config.json"])
    text = v.draw.choice(EVIL_JSON)
    v.rewrite(name, text, sealed=True)
    return Damage(f"{name}: {text[:20]!r} of {len(text)} bytes", (name,))


@kind
def evil_manifest(v: Victim) -> Damage:
    text = v.draw.choice(EVIL_JSON)
    v.rewrite(MANIFEST, text, sealed=False)
    return Damage(f"the manifest: {text[:20]!r} of {len(text)} bytes", (MANIFEST,))


@kind
def sealed_state(v: Victim) -> Damage:
    """A field of the train state that is not there or is of another kind, down to the data position, which the loader
    judges: it cannot tell a damaged position from one of other data."""
    value = json.loads((v.folder / "state.json").read_text())
    lanes = value["position"]["lanes"]
    lane = lanes[v.draw.choice(sorted(lanes))]
    at = v.draw.choice([value, value, value["position"], lanes, lane])
    key = v.draw.choice(sorted(at))
    if v.draw.random() < 0.4:
        how: Any = "no"
        del at[key]
    else:
        how = v.draw.choice([None, "x", -1, 1.5, [None], {"a": 1}, [[]], True, 10**300])
        at[key] = how
    v.rewrite("state.json", json.dumps(value, sort_keys=True).encode() + b"\n", sealed=True)
    inner = at is not value or key == "position"
    return Damage(f"state.json: {str(how)[:20]} for {key}", ("state.json", v.folder.name, "data position"), late=True,
                  kinds=("checkpoint", "data") if inner else ("checkpoint",))


@kind
def sealed_config(v: Victim) -> Damage:
    """A key of the config that is missing, unknown, of another kind, or of another model."""
    value = json.loads((v.folder / "config.json").read_text())
    section = v.draw.choice(["model", "data", "batch", "schedule", "optim"])
    at = value[section]
    key = v.draw.choice([k for k in sorted(at) if at[k] is not None])
    how = v.draw.choice(["less", "more", "other"])
    if how == "less":
        del at[key]
    elif how == "more":
        at["evil"] = at[key]
    else:
        at[key] = v.draw.choice([[], {}, "x", -7, 1e300])
    v.rewrite("config.json", json.dumps(value, indent=1, sort_keys=True).encode() + b"\n", sealed=True)
    return Damage(f"config.json: {how} {section}.{key}", ("config.json", v.folder.name))


# -- bombs -----------------------------------------------------------------------------------------------------------

def bomb(v: Victim) -> Damage:
    """Tens of MiB that cost time and memory to look at: JSON of nothing but brackets, numbers or keys."""
    name = v.draw.choice([MANIFEST, "state.json", "config.json", v.tensor_files[0]])
    size = v.draw.choice([3, 15] if name in v.tensor_files else [3, 60, 70]) << 20
    unit = v.draw.choice([b"[],", b"0,", b"1.5,", b'"",', b"{},"])
    text = b'{"a":[' + unit * (size // len(unit)) + b"0]}"
    if name in v.tensor_files:
        v.rewrite(name, len(text).to_bytes(8, "little") + text, sealed=True)
    else:
        v.rewrite(name, text, sealed=name != MANIFEST)
    return Damage(f"{name}: {size >> 20} MiB of {unit!r}", (name, MANIFEST))
