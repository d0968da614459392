"""Measure: what training an experiment costs on this machine, what the data loader gives, how fast a model writes."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
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
  torchrun --nproc_per_node=2 -m scripts.bench stages configs/small_poe.yaml --set parallel.stages=2
  python -m scripts.bench head configs/small_poe.yaml --set model.vocab_size=32768
  python -m scripts.bench attention --length 2048 8192 --window 512   windowed against full causal
  python -m scripts.bench data                                        8 x 512 on ../shared/corpus
  python -m scripts.bench data --rows 8 32 --seq 2048 --data data/stdlib/train --tokenizer data/stdlib/tokenizer
  python -m scripts.bench specialist                                  configs/stage_tool.yaml, scaled down
  python -m scripts.bench specialist configs/stage_tool.yaml --set batch.device_batch_size=4      as it is, for a GPU
  python -m scripts.bench decode out/quickstart --transformers        every mode, and `generate` of the export"""
CORPUS = Path("../shared/corpus")

# stage_tool.yaml with its shape (24 layers and 4, one head in 20 parts of the arithmetic) at a sixth of the width
SCALED = ("model.n_embd=256", "model.n_head=4", "model.n_kv_head=4", "model.vocab_size=4096", "model.sequence_len=512",
          "batch.tokens_per_step=4096", "batch.device_batch_size=4", "runtime.device=cpu")

COLUMNS = {
    "step": ("experiment", "dtype", "s / step", "spread", "backward", "optimizer", "tokens/s", "GFLOP/s", "of peak",
             "memory MiB"),
    "optimizer": ("experiment", "dtype", "parameters", "sharded ms", "plain ms", "ratio", "largest difference"),
    "memory": ("experiment", "dtype", "ranks", "micro-steps", "MiB weights", "optimizer", "gradients", "measured",
               "planned", "ratio", "fullest at"),
    "stages": ("experiment", "ranks", "micro-steps", "s / step alone", "with stages", "speed-up", "tokens/s",
               "idle by rank", "of the loss", "of a weight", "spread ms"),
    "head": ("experiment", "dtype", "heads", "rows x V", "fused s", "held s", "ratio", "fused MiB", "held MiB", "ratio",
             "of peak", "loss gap"),
    "attention": ("length", "window", "dtype", "full ms", "windowed ms", "of full", "pairs of full", "masked ms"),
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
    if what == "stages":
        return [r["experiment"], f"{r['ranks']} = {r['grid']}", str(r["micro_steps"]), f"{r['alone']:.3f}",
                f"{r['stages']:.3f}", f"{r['speedup']:.2f}x", f"{r['tokens_per_s']['stages']:,.0f}",
                " ".join(f"{share:.1%}" for share in r["idle"]), f"{r['loss_difference']:.0e}",
                f"{r['weight_difference']:.0e}", f"{1e3 * r['spread_seconds']:.1f}"]
    if what == "attention":
        ms = {key: "" if r[key] is None else f"{1e3 * r[key]:.1f}" for key in ("full", "windowed", "masked")}
        return [f"{r['length']:,}", f"{r['window']:,}", r["dtype"], ms["full"], ms["windowed"], f"{r['ratio']:.2f}x",
                f"{r['pairs']:.2f}x", ms["masked"]]
    if what == "head":
        arms = r["arms"].values()
        return [r["experiment"], r["dtype"], str(r["heads"]), f"{r['rows']:,} x {r['vocab_size']:,}",
                *(f"{arm['seconds']:.3f}" for arm in arms), f"{r['time_ratio']:.3f}",
                *(f"{arm['bytes'] / 2**20:,.0f}" for arm in arms), f"{r['memory_ratio']:.3f}", f"{r['mfu']:.0%}",
                f"{r['loss_gap']:.0e}"]
    mib = {key: f"{value / 2**20:,.2f}" for key, value in r.items() if isinstance(value, int)}
    return [r["experiment"], r["dtype"], f"{r['world_size']} {r['grid']}".strip(),
            f"{r['micro_steps']} x {r['device_batch_size']}", mib["weights"], mib["optimizer"], mib["gradients"],
            mib["measured"], mib["planned"], f"{r['ratio']:.3f}", r["peak"]]


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
    elif args.what == "decode":
        results = decode_results(args)
    elif args.what == "specialist":
        results = specialist_results(args)
    elif args.what == "attention":
        results = attention_results(args)
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
    elif args.what == "specialist":
        table = Table("", "trained", "s / step", "spread", "of full, backprop", "activations MiB", "of full, backprop")
        for result in results:
            for name, r in result["arms"].items():
                table.add_row(name, f"{r['trained']:,}", f"{r['seconds']:.3f}", f"{r['spread']:.0%}",
                              f"{r['of_full_time']:.2f}x", f"{r['activations'] / 2**20:,.1f}",
                              f"{r['of_full_activations']:.2f}x")
    elif args.what == "decode":
        table = Table("", "tokens/s", "against plain", "by weights read", "tokens as plain", "")
        for result in results:
            table.add_row(*decode_row(result))
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
                       ("memory", "the fullest moment of a step on the fullest rank (torchrun) against the plan"),
                       ("head", "the fused head and loss against the form that holds all logits"),
                       ("stages", "stages on different ranks (torchrun) against one rank; and what differs")):
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.add_argument("configs", nargs="*", default=["configs/quickstart.yaml"], help="experiment files")
        command.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override, for all")
        command.add_argument("--steps", type=int, default=5, help="timed steps; medians are shown [5]")
    text = "a specialist's step against full fine-tuning of a model as deep"
    command = commands.add_parser("specialist", help=text, description=text, parents=[common])
    command.add_argument("configs", nargs="*", default=[], help="of specialists [stage_tool.yaml, scaled down]")
    command.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override, for all")
    command.add_argument("--steps", type=int, default=5, help="timed steps; medians are shown [5]")
    text = "windowed attention and its gradient against full causal attention"
    command = commands.add_parser("attention", help=text, description=text, parents=[common])
    command.add_argument("--length", type=int, nargs="+", default=[2048, 8192], help="positions [2048 8192]")
    command.add_argument("--window", type=int, default=512, help="a position sees so many before it [512]")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="[float32]")
    command.add_argument("--rounds", type=int, default=7, help="of which the median counts [7]")
    command.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
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
    text = "tokens/s of a trained model, one text at a time: plain, and every mode in turns with plain (needs evaluate)"
    command = commands.add_parser("decode", help=text, description=text, parents=[common])
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    command.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    command.add_argument("--tokens", type=int, default=60, help="written after each of the seven probes [60]")
    command.add_argument("--rounds", type=int, default=5, help="of which the best, or the median, counts [5]")
    command.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of arithmetic [float32]")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--transformers", action="store_true",
                         help="also `generate` of the export under transformers, in turns with plain")
    args = parser.parse_args()
    for name in ("tokens", "rounds", "steps", "rows", "length", "window", "seq",
                 "vocab", "lanes", "buffer", "threads", "seconds"):
        values = getattr(args, name, None)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
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
    from nanopoe.train.bench_head import bench_head
    from nanopoe.train.bench_stages import bench_stages

    with world(experiments[0].runtime.device) as here:
        if here.size > 1 and args.what not in ("memory", "stages"):
            raise ConfigError(f"bench {args.what} measures one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.bench")
        arms = {"step": bench_step, "optimizer": bench_optimizer, "head": bench_head, "stages": bench_stages}
        results = [bench_memory(experiment, here) if args.what == "memory" else
                   arms[args.what](experiment, here, args.steps) for experiment in experiments]
        return results if here.is_main else []


def specialist_results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each experiment file."""
    files = [(path, args.set) for path in args.configs] or [("configs/stage_tool.yaml", [*SCALED, *args.set])]
    experiments = [load_experiment(path, changes) for path, changes in files]

    from nanopoe.dist import world
    from nanopoe.train.bench_specialist import bench_specialist

    with world(experiments[0].runtime.device) as here:
        if here.size > 1:
            raise ConfigError(f"bench specialist measures one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.bench")
        return [bench_specialist(experiment, here, args.steps) for experiment in experiments]


def attention_results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """One result for each length."""
    import torch

    from nanopoe.dist import world
    from nanopoe.train.bench_attention import bench_attention

    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"bench attention measures one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.bench")
        return [bench_attention(here, length, args.window, args.rounds, getattr(torch, args.dtype), args.threads)
                for length in args.length]


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


def decode_results(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Plain decoding first, then transformers if asked for, then every mode."""
    import tempfile

    import torch

    from nanopoe.checkpoint.evaluation import read_calibration
    from nanopoe.dist import world
    from nanopoe.export.run import export_run
    from nanopoe.infer.engine import Engine
    from nanopoe.infer.measure import calibrated_modes, compare, decode_speed, in_turns
    from nanopoe.infer.probes import PROBES
    from nanopoe.infer.text import prompt_ids
    from nanopoe.infer.weights import Weights
    from nanopoe.train.restore import load_trained

    if args.threads:
        torch.set_num_threads(args.threads)
    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"bench decode measures one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.bench")
        model, tokenizer, checkpoint = load_trained(args.run, args.step, here)
        poe = model.config.poe_mode != "none" and model.layout.n_stages > 1
        calibration = read_calibration(args.run, checkpoint.step, checkpoint.identity) if poe else None
        engine = Engine(Weights(model, getattr(torch, args.dtype)))
        prompts = [prompt_ids(tokenizer, probe) for probe in PROBES]
        results = [{"name": "plain", **decode_speed(engine, prompts[0], args.tokens, args.rounds)}]
        if args.transformers:
            with tempfile.TemporaryDirectory() as folder:
                repo, _ = export_run(args.run, Path(folder) / "repo", step=checkpoint.step, dtype=args.dtype)
                theirs = exported(repo, prompts[0], args.tokens, here.device)
                results.append({"name": "transformers", **in_turns(lambda: engine.generate(
                    prompts[:1], max_new_tokens=args.tokens)[0], theirs, args.rounds)})
        modes = calibrated_modes(calibration) if calibration else {}
        found = compare(engine, modes, prompts, args.tokens, args.rounds)
        return results + [{"name": name, **figures} for name, figures in found.items()]


def exported(repo: Path, prompt: list[int], tokens: int, device: Any) -> Callable[[], list[int]]:
    """Greedy `generate` of an export under transformers."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError("is not installed", "--transformers", "pip install transformers") from None
    import torch

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype="auto").to(device)
    model.generation_config.eos_token_id = None              # plain decoding here has no stop either
    ids = torch.tensor([prompt], device=device)

    def generate() -> list[int]:
        out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
        return [int(token) for token in out[0, len(prompt):]]

    return generate


def decode_row(r: dict[str, Any]) -> list[str]:
    """A way to write, as a line of the table."""
    if r["name"] == "plain":
        return ["plain", f"{r['tokens_per_s']:.1f}", "", "", "", f"{r['of_bound']:.0%} of the bound: "
                f"{r['bytes_per_token'] / 1e6:.1f} MB a token at {r['bandwidth'] / 1e9:.1f} GB/s"]
    if r["name"] == "transformers":
        return ["transformers", f"{r['their_tokens_per_s']:.1f}", f"{1 / r['ratio']:.2f}x", "",
                "all" if r["equal"] else "not all", f"plain is {r['ratio']:.2f} times as fast"]
    what = f"exits {' '.join(map(str, r['exits']))}" if "exits" in r else \
        f"{r['acceptance']:.1%} accepted, {r['mean_accepted']:.2f} a round"
    return [r["name"], f"{r['tokens_per_s']:.1f}", f"{r['measured_speedup']:.2f}x", f"{r['predicted_speedup']:.2f}x",
            f"{r['agreement']:.1%}", what]


if __name__ == "__main__":
    main()
