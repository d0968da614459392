"""Measure: what training an experiment costs on this machine."""

from __future__ import annotations

import argparse
import json
from typing import Any

from nanopoe.config import load_experiment
from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.bench step                                        configs/quickstart.yaml
  python -m scripts.bench step configs/small_bp.yaml configs/small_poe.yaml --steps 10
  python -m scripts.bench step configs/small_poe.yaml --set runtime.compute_dtype=bfloat16 --json
  python -m scripts.bench optimizer configs/small_poe.yaml
  torchrun --nproc_per_node=4 -m scripts.bench memory configs/small_poe.yaml"""

COLUMNS = {
    "step": ("experiment", "dtype", "s / step", "spread", "backward", "optimizer", "tokens/s", "GFLOP/s", "of peak",
             "memory MiB"),
    "optimizer": ("experiment", "dtype", "parameters", "sharded ms", "plain ms", "ratio", "largest difference"),
    "memory": ("experiment", "ranks", "micro-steps", "MiB weights", "formula", "optimizer", "formula",
               "gradients, peak", "bound"),
}


def row(what: str, r: dict[str, Any]) -> list[str]:
    """A result as a line of the table."""
    if what == "step":
        return [r["experiment"], r["dtype"], f"{r['seconds']:.3f}", f"{r['spread']:.0%}",
                f"{r['backward'] / r['seconds']:.0%}", f"{r['optimizer'] / r['seconds']:.0%}",
                f"{r['tokens_per_s']:,.0f}", f"{r['flops_per_s'] / 1e9:,.0f}", f"{r['mfu']:.0%}",
                f"{r['memory_bytes'] / 2**20:,.0f}"]
    if what == "optimizer":
        return [r["experiment"], r["dtype"], f"{r['parameters']:,}", f"{1e3 * r['sharded']:.1f}",
                f"{1e3 * r['plain']:.1f}", f"{r['ratio']:.3f}", f"{r['difference']:.1e}"]
    mib = {key: f"{value / 2**20:,.2f}" for key, value in r.items() if isinstance(value, int)}
    return [r["experiment"], str(r["world_size"]), str(r["micro_steps"]), mib["weights"], mib["weights_formula"],
            mib["optimizer"], mib["optimizer_formula"], mib["gradients"], mib["gradients_formula"]]


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(COLUMNS), help="step: forward, backward and optimizer on random tokens; "
                        "optimizer: an update against the plain single-process form; memory: tensors of the fullest "
                        "rank (torchrun) against the formula")
    parser.add_argument("configs", nargs="*", default=["configs/quickstart.yaml"], help="experiment files")
    parser.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override, for all files")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; medians are shown [5]")
    parser.add_argument("--json", action="store_true", help="print JSON lines, not a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.steps < 1:
        raise ConfigError(f"must be 1 or more, got {args.steps}", "--steps")
    experiments = [load_experiment(path, args.set) for path in args.configs]

    from rich.console import Console
    from rich.table import Table

    from nanopoe.dist import world
    from nanopoe.train.bench import bench_memory, bench_optimizer, bench_step

    table = Table(*COLUMNS[args.what])
    with world(experiments[0].runtime.device) as here:
        if here.size > 1 and args.what != "memory":
            raise ConfigError(f"bench {args.what} measures one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.bench")
        for experiment in experiments:
            result = (bench_memory(experiment, here) if args.what == "memory" else
                      (bench_step if args.what == "step" else bench_optimizer)(experiment, here, args.steps))
            if args.json and here.is_main:
                print(json.dumps(result), flush=True)
            table.add_row(*row(args.what, result))
        if here.is_main and not args.json:
            console = Console()
            console.width = max(console.width, 120)             # a pipe is no reason to cut columns
            console.print(table)


if __name__ == "__main__":
    main()
