"""Measure: what a training step of an experiment costs on this machine."""

from __future__ import annotations

import argparse
import json

from nanopoe.config import load_experiment
from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.bench step                                        configs/quickstart.yaml
  python -m scripts.bench step configs/small_bp.yaml configs/small_poe.yaml --steps 10
  python -m scripts.bench step configs/small_poe.yaml --set runtime.compute_dtype=bfloat16 --json"""


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step"], help="step: forward, backward and optimizer on random tokens")
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
    from nanopoe.train.bench import bench_step

    table = Table("experiment", "dtype", "s / step", "spread", "backward", "optimizer", "tokens/s", "GFLOP/s",
                  "of peak", "memory MiB")
    for experiment in experiments:
        with world(experiment.runtime.device) as here:
            r = bench_step(experiment, here, args.steps)
        if args.json:
            print(json.dumps(r), flush=True)
        table.add_row(r["experiment"], r["dtype"], f"{r['seconds']:.3f}", f"{r['spread']:.0%}",
                      f"{r['backward'] / r['seconds']:.0%}", f"{r['optimizer'] / r['seconds']:.0%}",
                      f"{r['tokens_per_s']:,.0f}", f"{r['flops_per_s'] / 1e9:,.0f}", f"{r['mfu']:.0%}",
                      f"{r['memory_bytes'] / 2**20:,.0f}")
    if not args.json:
        console = Console()
        console.width = max(console.width, 120)             # a pipe is no reason to cut columns
        console.print(table)


if __name__ == "__main__":
    main()
