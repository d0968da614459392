"""Measure: what training an experiment costs on this machine, and what the data loader gives."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nanopoe.config import load_experiment
from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.bench step                                        configs/quickstart.yaml
  python -m scripts.bench step configs/small_bp.yaml configs/small_poe.yaml --steps 10
  python -m scripts.bench step configs/small_poe.yaml --set runtime.compute_dtype=bfloat16 --json
  python -m scripts.bench optimizer configs/small_poe.yaml
  torchrun --nproc_per_node=4 -m scripts.bench memory configs/small_poe.yaml
  python -m scripts.bench data                                        8 x 512 on ../shared/corpus
  python -m scripts.bench data --rows 8 32 --seq 2048 --data data/stdlib/train --tokenizer data/stdlib/tokenizer"""
CORPUS = Path("../shared/corpus")

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


def data_column(r: dict[str, Any]) -> dict[str, str]:
    """A result of the loader, a line for each measure."""
    return {
        "million tokens/s of ready batches": f"{r['tokens_per_s'] / 1e6:.2f}",
        "million tokens/s of pure encoding": f"{r['encode_per_s'] / 1e6:.2f}",
        "the one over the other": f"{r['ratio']:.0%}",
        "packing, of the CPU time": f"{r['packing_share']:.1%}",
        "the thread that packs, of the CPU time": f"{r['thread_share']:.1%}",
        "first batch after s": f"{r['first_batch']:.2f}",
        "longest wait of next() at half the rate, ms": f"{1e3 * r['wait']:.1f}",
        "waits over 5 ms": f"{r['stalls']} of {r['steps_paced']}",
        "longest that the consumer woke late, ms": f"{1e3 * r['late']:.1f}",
        "fewest steps ready, of those kept": f"{r['ready_share']:.0%}",
        "cropped": f"{r['cropped']:.1%}", "utilisation": f"{r['utilisation']:.1%}",
        "documents in buffers, mean length over all": f"{r['buffered_length']:.3f}",
        "epochs read": f"{r['epochs']:.2f}"}


@entrypoint
def main() -> None:
    args = parse()
    if args.what == "data":
        results = data_results(args)
    else:
        results = experiment_results(args)
    if not results:                                             # another rank tells
        return
    if args.json:
        for result in results:
            print(json.dumps(result), flush=True)
        return

    from rich.console import Console
    from rich.table import Table

    if args.what == "data":
        columns = [data_column(result) for result in results]
        table = Table("", *(f"{r['rows']} x {r['seq']} {r['packing']}" for r in results))
        for name in columns[0]:
            table.add_row(name, *(column[name] for column in columns))
    else:
        table = Table(*COLUMNS[args.what])
        for result in results:
            table.add_row(*row(args.what, result))
    console = Console()
    console.width = max(console.width, 120)                     # a pipe is no reason to cut columns
    console.print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", epilog=EXAMPLES,
                                     description=f"{__doc__} Every command also takes --json and --debug.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON lines, not a table")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for name, text in (("step", "forward, backward and optimizer on random tokens"),
                       ("optimizer", "an update against the plain single-process form"),
                       ("memory", "tensors of the fullest rank (torchrun) against the formula")):
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.add_argument("configs", nargs="*", default=["configs/quickstart.yaml"], help="experiment files")
        command.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override, for all")
        command.add_argument("--steps", type=int, default=5, help="timed steps; medians are shown [5]")
    text = "ready batches against pure encoding, and how long a consumer waits"
    command = commands.add_parser("data", help=text, description=text, parents=[common])
    command.add_argument("--rows", type=int, nargs="+", default=[8], help="rows of a batch [8]")
    command.add_argument("--seq", type=int, nargs="+", default=[512], help="targets of a row [512]")
    command.add_argument("--packing", nargs="+", default=["bestfit_split"], help="[bestfit_split]",
                         choices=["bestfit_crop", "bestfit_split", "concat"])
    command.add_argument("--data", type=Path, help=f"folder of shards [{CORPUS}, but its last shard]")
    command.add_argument("--tokenizer", type=Path, help="folder of a tokenizer [trained on the shards]")
    command.add_argument("--vocab", type=int, default=32768, help="of a tokenizer that is trained [32768]")
    command.add_argument("--lanes", type=int, default=48)
    command.add_argument("--buffer", type=int, default=128, help="documents of a lane to choose from [128]")
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--seconds", type=float, default=2.0, help="of one measurement; three of each are made [2]")
    args = parser.parse_args()
    for name in ("steps", "rows", "seq", "vocab", "lanes", "buffer", "threads", "seconds"):
        values = getattr(args, name, [])
        for value in values if isinstance(values, list) else [values]:
            if name == "seconds" and not 0 < value < 1e6:
                raise ConfigError(f"must be above 0, got {value}", "--seconds")
            if name != "seconds" and value < 1:
                raise ConfigError(f"must be 1 or more, got {value}", f"--{name}")
    return args


def experiment_results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each experiment file; nothing on ranks other than 0."""
    experiments = [load_experiment(path, args.set) for path in args.configs]

    from nanopoe.dist import world
    from nanopoe.train.bench import bench_memory, bench_optimizer, bench_step

    with world(experiments[0].runtime.device) as here:
        if here.size > 1 and args.what != "memory":
            raise ConfigError(f"bench {args.what} measures one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.bench")
        results = [bench_memory(experiment, here) if args.what == "memory" else
                   (bench_step if args.what == "step" else bench_optimizer)(experiment, here, args.steps)
                   for experiment in experiments]
        return results if here.is_main else []


def data_results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each size and packing."""
    folder, files = (args.data, None) if args.data else (CORPUS, "shard_0000[0-5].parquet")
    if not folder.is_dir():
        raise ConfigError("no such folder", folder, "name a folder of shards with --data")

    from nanopoe.data.shards import open_source
    from nanopoe.tokenizer import Tokenizer
    from nanopoe.train.bench_data import DataBench, bench_data

    tokenizer = (Tokenizer.load(args.tokenizer) if args.tokenizer else
                 Tokenizer.train(open_source("data", folder, files).texts(), args.vocab))
    return [bench_data(lambda: [open_source("data", folder, files)], tokenizer,
                       DataBench(rows, seq, packing, args.lanes, args.buffer, args.threads, args.seconds))
            for packing in args.packing for rows in args.rows for seq in args.seq]


if __name__ == "__main__":
    main()
