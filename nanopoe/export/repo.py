"""Write a Hugging Face repo that stock transformers loads: weights, config, code, tokenizer, card (SPEC 10)."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from nanopoe.config.schema import ModelConfig
from nanopoe.errors import ConfigError, StorageError
from nanopoe.export.card import card
from nanopoe.export.card_specialist import specialist_card
from nanopoe.export.hub_config import generation_config, model_config
from nanopoe.export.hub_tokenizer import hub_tokenizer, tokenizer_config
from nanopoe.export.names import check_tensors, hub_shapes, to_hub
from nanopoe.tokenizer import Tokenizer

TEMPLATES = Path(__file__).parent / "hub_code"       # copied as they are
Dtype = Literal["bfloat16", "float32"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
METADATA = {"format": "pt"}                          # the loader of transformers insists on it


def export(m: ModelConfig, tensors: Mapping[str, Tensor], tokenizer: Tokenizer, out_dir: str | os.PathLike[str], *,
           step: int, name: str, dtype: Dtype = "bfloat16", evaluation: dict[str, Any] | None = None,
           specialists: Sequence[str] = (), tools: bool = False, max_shard_size: str = "5GB",
           overwrite: bool = False) -> Path:
    """Write the repo of one checkpoint and return its folder.

    `tensors` are the model's, by our names (SPEC 1), on any device and of any float dtype; they are written in
    `dtype`, the rows that pad the vocabulary cropped. `evaluation` is the record of the step, for the card; what was
    calibrated in it goes to config.json. `specialists` names those of the model; `tools`: the last one calls tools.

    Everything is written to a temporary folder beside `out_dir` and renamed at the end, so a failure leaves nothing.
    ConfigError when the tokenizer does not fit or `out_dir` is in use (`overwrite` replaces an earlier export and
    nothing else), CheckpointError for wrong tensors, DataError for a tokenizer that cannot be converted or a
    calibration that is none, StorageError when the disk refuses.
    """
    check_request(m, tokenizer, out_dir, dtype, overwrite)
    limit = shard_bytes(max_shard_size)
    check_tensors(m, tensors)
    config = model_config(m, tokenizer.special_ids, dtype, name, step, (evaluation or {}).get("calibration"),
                          specialists)
    shapes = hub_shapes(m)
    shards = plan_shards({name: math.prod(shape) * DTYPES[dtype].itemsize for name, shape in shapes.items()}, limit)
    facts: dict[str, Any] = dict(name=name, step=step, repo=Path(os.path.abspath(out_dir)).name, dtype=dtype,
                                 parameters=sum(math.prod(shape) for shape in shapes.values()))
    readme = specialist_card(m, names=specialists, parent=None, tools=tools, evaluation=evaluation,
                             **facts) if m.specialists else card(m, evaluation=evaluation, **facts)
    return write_repo(m, tokenizer, out_dir, config, readme,
                      lambda folder: _write_weights(folder, to_hub(m, tensors, DTYPES[dtype]), shards))


def check_request(m: ModelConfig, tokenizer: Tokenizer, out_dir: str | os.PathLike[str], dtype: str,
                  overwrite: bool) -> None:
    """What can be refused before a tensor is read; ConfigError."""
    _check_target(Path(os.path.abspath(out_dir)), out_dir, overwrite)
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r}", "export", f"use one of {', '.join(DTYPES)}")
    if tokenizer.vocab_size != m.vocab_size:
        raise ConfigError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {m.vocab_size}", "export",
                          "use the tokenizer the model was trained with")


def write_repo(m: ModelConfig, tokenizer: Tokenizer, out_dir: str | os.PathLike[str], config: dict[str, Any],
               readme: str, write_weights: Callable[[Path], None]) -> Path:
    """Code, configuration, tokenizer, card and weights, all or nothing; the folder."""
    out = Path(os.path.abspath(out_dir))
    hub = hub_tokenizer(tokenizer)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for source in sorted(TEMPLATES.iterdir()):
            if source.is_file():
                shutil.copyfile(source, partial / source.name)
        _write_json(partial / "config.json", config)
        _write_json(partial / "generation_config.json", generation_config(tokenizer.special_ids))
        _write_json(partial / "tokenizer_config.json", tokenizer_config(m.sequence_len))
        hub.save(str(partial / "tokenizer.json"))
        (partial / "README.md").write_text(readme, encoding="utf-8")
        write_weights(partial)
        _publish(partial, out)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write the export: {getattr(error, 'strerror', None) or error}", out_dir,
                           "free space or choose another --out") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def shard_bytes(text: str) -> int:
    """"5GB" -> 5_000_000_000; units KB, MB, GB. ConfigError for anything else."""
    match = re.fullmatch(r"(\d+)(KB|MB|GB)", text)
    if match is None or int(match[1]) == 0:
        raise ConfigError(f"shard size {text!r}", "export", "write it as 5GB, 500MB or 100KB")
    return int(match[1]) * UNITS[match[2]]


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensor names in order, cut into files of at most `limit` bytes; a larger tensor gets a file of its own."""
    shards: list[list[str]] = []
    held = 0
    for name, size in sizes.items():
        if not shards or held + size > limit:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _write_weights(folder: Path, stream: Iterator[tuple[str, Tensor]], shards: list[list[str]]) -> None:
    """model.safetensors, or numbered shards and their index; one shard is in memory at a time."""
    weight_map: dict[str, str] = {}
    total = 0
    for i, names in enumerate(shards):
        file = "model.safetensors" if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        held = dict(next(stream) for _ in names)
        assert list(held) == names
        write_file(held, folder, file)
        weight_map |= dict.fromkeys(names, file)
        total += sum(t.nbytes for t in held.values())
    if len(shards) > 1:
        _write_json(folder / "model.safetensors.index.json",
                    {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_file(tensors: dict[str, Tensor], folder: Path, name: str) -> None:
    save_file(tensors, folder / name, metadata=METADATA)
    shutil.copymode(folder / "config.json", folder / name)         # safetensors makes files for their owner alone


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_target(out: Path, given: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse a folder in use, `given` by the user so; with `overwrite`, anything that is not an export of ours."""
    if out.is_dir() and not out.is_symlink():
        if not any(out.iterdir()) or (overwrite and _is_export(out)):
            return
        do = "choose a folder that is new or empty" if overwrite else "choose another folder or pass --overwrite"
        raise ConfigError("is not empty" + (" and not an earlier export" if overwrite else ""), given, do)
    if os.path.lexists(out):
        raise ConfigError("exists and is not a folder", given, "choose another one")


def _is_export(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("model_type") == "nanopoe"


def _publish(partial: Path, out: Path) -> None:
    """Rename the finished folder to its place; what was there is removed only after that."""
    retired = out.with_name(f".{out.name}.retired-{os.getpid()}")
    if out.exists():
        os.rename(out, retired)
    try:
        os.rename(partial, out)
    except OSError:
        if retired.exists():
            os.rename(retired, out)
        raise
    shutil.rmtree(retired, ignore_errors=True)
