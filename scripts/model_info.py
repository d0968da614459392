"""What a model is and costs: parameters, stages, windows, FLOPs, steps, and memory of a rank.

The figures are arithmetic; the real model is built on the meta device (no memory) and must have the same parameters.
"""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from nanopoe.config import Experiment, config_hash, layout_of, load_experiment, make_plan, valid_world_sizes
from nanopoe.config.counts import (
    count_parameters,
    flops_per_token,
    forward_flops_per_stage,
    parameter_shapes,
    trained_shapes,
)
from nanopoe.config.memory import GIB, largest_batch, memory_per_rank
from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.model_info configs/poe_3b.yaml --world-size 12
  python -m scripts.model_info configs/poe_1p3b.yaml --json
  python -m scripts.model_info configs/poe_1p3b.yaml --world-size 4 --gpu-memory 80
  python -m scripts.model_info configs/quickstart.yaml model.n_layer=12 model.poe_every=3"""


def describe(exp: Experiment, world_size: int) -> dict[str, Any]:
    """The figures as JSON-able data; memory in bytes, FLOPs per token of training. Raises ConfigError."""
    plan, counts, layout = make_plan(exp, world_size), count_parameters(exp.model), layout_of(exp.model)
    return {
        "name": exp.name,
        "config_hash": config_hash(exp),
        "parameters": counts.total,
        "tensors": counts.tensors,
        "trained_parameters": sum(map(math.prod, trained_shapes(exp.model).values())),
        "parameters_by_group": counts.by_group,
        "scaling_parameters": counts.scaling,
        "stage_boundaries": list(layout.boundaries),
        "value_embedding_layers": list(layout.ve_layers),
        "window_sizes": list(layout.window_sizes),
        "flops_per_token": flops_per_token(exp.model),
        "forward_flops_per_stage": forward_flops_per_stage(exp.model),
        "tokens_per_step": plan.tokens_per_step,
        "total_steps": plan.total_steps,
        "total_tokens": plan.total_tokens,
        "world_size": world_size,
        "valid_world_sizes": valid_world_sizes(exp),
        "micro_steps": plan.micro_steps,
        "memory_per_rank": memory_per_rank(exp, world_size).as_dict(),
    }


def assert_built(exp: Experiment) -> None:
    """Build the model on the meta device; its parameters must be the counted ones, name by name (else our bug)."""
    import torch

    from nanopoe.model import GPT

    with torch.device("meta"):
        model = GPT(exp.model)
    built = {name: tuple(p.shape) for name, p in model.named_parameters()}
    counted = parameter_shapes(exp.model)
    differ = sorted(name for name in built.keys() | counted.keys() if built.get(name) != counted.get(name))
    assert not differ, f"counts.py and the model disagree on {differ[:5]}"


def print_table(info: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{info['name']} ({info['config_hash']})", show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in info.items():
        if key in ("name", "config_hash"):
            continue
        label = key.replace("_", " ")
        if key == "memory_per_rank":
            for kind, size in value.items():
                table.add_row(f"{label}, {kind}", size if isinstance(size, str) else f"{size / GIB:,.2f} GiB")
        elif key == "largest_batch":
            table.add_row(label, fit_line(value))
        elif isinstance(value, dict):
            for kind, count in value.items():
                table.add_row(f"{label}, {kind}", f"{count:,}")
        elif isinstance(value, list):
            table.add_row(label, " ".join(f"{v:,}" for v in value))
        else:
            table.add_row(label, f"{value:,}")
    Console().print(table)


def fit_line(fit: dict[str, Any]) -> str:
    """The proposal in words."""
    memory = fit["memory"]
    planned = f"plans {memory['total'] / GIB:,.2f} of {fit['usable'] / GIB:,.2f} GiB, fullest at {memory['peak']}"
    if fit["device_batch_size"] is None:
        return f"none fits: the smallest {planned}; {fit['do']}"
    return f"{fit['do']} {planned}, in {fit['micro_steps']} micro-steps"


@entrypoint
def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.model_info", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="experiment file (YAML)")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key.sub=value",
                        help="set a key; list items by index")
    parser.add_argument("--world-size", type=int, default=1, metavar="N", help="ranks to plan for (default 1)")
    parser.add_argument("--gpu-memory", type=float, metavar="GIB",
                        help="propose the largest batch.device_batch_size that plans within 90 %% of so many GiB")
    parser.add_argument("--json", action="store_true", help="print JSON; memory in bytes")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    args = parser.parse_intermixed_args()
    exp = load_experiment(args.file, args.overrides)
    info = describe(exp, args.world_size)
    if args.gpu_memory is not None:
        if not 0 < args.gpu_memory < 1e6:
            raise ConfigError(f"must be above 0, got {args.gpu_memory:g}", "--gpu-memory", "give GiB, such as 80")
        info["largest_batch"] = largest_batch(exp, args.world_size, int(args.gpu_memory * GIB)).as_dict()
    assert_built(exp)
    if args.json:
        print(json.dumps(info, indent=2))
    else:
        print_table(info)
    return 0


if __name__ == "__main__":
    main()
