"""Measure: what training an experiment costs on this machine, what the data loader gives, how fast a model writes."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopoe.config import load_experiment
from nanopoe.errors import ConfigError, entrypoint

if TYPE_CHECKING:                        # a wrong command line is refused before torch is imported
    from nanopoe.dist import World
    from nanopoe.train.bench_decode import DecodeBench

    Work = Callable[[World], list[dict[str, Any]]]

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

MANY_RANKS = ("memory", "stages")        # under torchrun; the others measure one rank
OF_EXPERIMENTS = {
    "step": "forward, backward and optimizer on random tokens",
    "optimizer": "an update against the plain single-process form",
    "memory": "the fullest moment of a step on the fullest rank (torchrun) against the plan",
    "head": "the fused head and loss against the form that holds all logits",
    "stages": "stages on different ranks (torchrun) against one rank; and what differs",
    "specialist": "a specialist's step against full fine-tuning of a model as deep"}


@entrypoint
def main() -> None:
    args = parse()
    device, work = args.prepare(args)
    results = measure(args.what, device, work)
    if not results:                                             # another rank tells
        return
    if args.json:
        for result in results:
            print(json.dumps(result), flush=True)
        return

    from nanopoe.train.bench_tables import show

    show(args.what, results)


def measure(what: str, device: str, work: Work) -> list[dict[str, Any]]:
    """What `work` finds; nothing on ranks other than 0. ConfigError for ranks that have nothing to do."""
    from nanopoe.dist import world

    with world(device) as here:
        if here.size > 1 and what not in MANY_RANKS:
            raise ConfigError(f"bench {what} measures one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.bench")
        results = work(here)
        return results if here.is_main else []


# -- what each command measures: (device, work), and what is wrong with its arguments is refused -----------------------

def experiments(args: argparse.Namespace) -> tuple[str, Work]:
    """One result for each experiment file."""
    files = [(path, args.set) for path in args.configs] or [
        ("configs/stage_tool.yaml", [*SCALED, *args.set]) if args.what == "specialist" else
        ("configs/quickstart.yaml", args.set)]
    loaded = [load_experiment(path, changes) for path, changes in files]

    def work(here: World) -> list[dict[str, Any]]:
        from nanopoe.train.bench import bench_memory, bench_optimizer, bench_step
        from nanopoe.train.bench_head import bench_head
        from nanopoe.train.bench_specialist import bench_specialist
        from nanopoe.train.bench_stages import bench_stages

        bench = {"step": bench_step, "optimizer": bench_optimizer, "memory": bench_memory, "head": bench_head,
                 "stages": bench_stages, "specialist": bench_specialist}[args.what]
        return [bench(experiment, here, args.steps) for experiment in loaded]

    return loaded[0].runtime.device, work


def attention(args: argparse.Namespace) -> tuple[str, Work]:
    """One result for each length."""
    def work(here: World) -> list[dict[str, Any]]:
        import torch

        from nanopoe.train.bench_attention import bench_attention

        return [bench_attention(here, length, args.window, args.rounds, getattr(torch, args.dtype), args.threads,
                                args.document)
                for length in args.length]

    return args.device, work


def data(args: argparse.Namespace) -> tuple[str, Work]:
    """One result for each size and packing."""
    folder, files = (args.data, None) if args.data else (CORPUS, "shard_0000[0-5].parquet")
    if not folder.is_dir():
        raise ConfigError("no such folder", folder, "name a folder of shards with --data")

    def work(_: World) -> list[dict[str, Any]]:
        from nanopoe.data.shards import open_source
        from nanopoe.tokenizer import Tokenizer
        from nanopoe.train.bench_data import DataBench, bench_data

        tokenizer = (Tokenizer.load(args.tokenizer) if args.tokenizer else
                     Tokenizer.train(open_source("data", folder, files).texts(), args.vocab))
        return [bench_data(lambda: [open_source("data", folder, files)], tokenizer,
                           DataBench(rows, seq, packing, args.lanes, args.buffer, args.threads, args.seconds))
                for packing in args.packing for rows in args.rows for seq in args.seq]

    return "cpu", work


def decode(args: argparse.Namespace) -> tuple[str, Work]:
    """Plain decoding first, then transformers if asked for, then every mode."""
    def work(here: World) -> list[dict[str, Any]]:
        import torch

        from nanopoe.train.bench_decode import DecodeBench

        if args.threads:
            torch.set_num_threads(args.threads)
        bench = DecodeBench(args.run, args.step, here, args.tokens, args.rounds, getattr(torch, args.dtype))
        results = [bench.plain()]
        if args.transformers:
            with exported(args, bench, here) as theirs:
                results.append(bench.against("transformers", theirs))
        return results + bench.every_mode()

    return args.device, work


@contextmanager
def exported(args: argparse.Namespace, bench: DecodeBench, here: World) -> Iterator[Callable[[], list[int]]]:
    """Greedy `generate` of the run's export under transformers, after the first probe."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise ConfigError("is not installed", "--transformers", "pip install transformers") from None
    import torch

    from nanopoe.export.run import export_run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    prompt = bench.prompts[0]
    with tempfile.TemporaryDirectory() as folder:
        repo, _ = export_run(args.run, Path(folder) / "repo", step=bench.step, dtype=args.dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(repo, trust_remote_code=True, dtype="auto")
        model.to(here.device)
        model.generation_config.eos_token_id = None              # plain decoding here has no stop either
        ids = torch.tensor([prompt], device=here.device)

        def generate() -> list[int]:
            out = model.generate(ids, max_new_tokens=args.tokens, do_sample=False)
            return [int(token) for token in out[0, len(prompt):]]

        yield generate


# -- the command line --------------------------------------------------------------------------------------------------

def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.bench", epilog=EXAMPLES,
                                     description=f"{__doc__} Every command also takes --json and --debug.",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="what", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON lines, not a table")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def command(name: str, text: str, prepare: Callable[..., Any]) -> argparse.ArgumentParser:
        new: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text, parents=[common])
        new.set_defaults(prepare=prepare)
        return new

    for name, text in OF_EXPERIMENTS.items():
        take_experiments(command(name, text, experiments), name)
    text = "windowed attention, and that within documents, with its gradient against full causal attention"
    take_attention(command("attention", text, attention))
    text = "ready batches against pure encoding, and how long a consumer waits"
    take_data(command("data", text, data))
    text = "tokens/s of a trained model, one text at a time: plain, and every mode in turns with plain (needs evaluate)"
    take_decode(command("decode", text, decode))
    args = parser.parse_args()
    check_numbers(args)
    return args


def take_experiments(command: argparse.ArgumentParser, name: str) -> None:
    default = "configs/stage_tool.yaml, scaled down" if name == "specialist" else "configs/quickstart.yaml"
    steps, shown = (2, "the fullest is shown") if name == "memory" else (5, "medians are shown")
    command.add_argument("configs", nargs="*", help=f"experiment files [{default}]")
    command.add_argument("--set", action="append", default=[], metavar="key.sub=value", help="override, for all")
    command.add_argument("--steps", type=int, default=steps, help=f"measured steps; {shown} [{steps}]")


def take_attention(command: argparse.ArgumentParser) -> None:
    command.add_argument("--length", type=int, nargs="+", default=[2048, 8192], help="positions [2048 8192]")
    command.add_argument("--window", type=int, default=512, help="a position sees so many before it [512]")
    command.add_argument("--document", type=int, default=512, help="of data.document_mask: tokens of each [512]")
    command.add_argument("--rounds", type=int, default=7, help="of which the median counts [7]")
    take_machine(command)


def take_data(command: argparse.ArgumentParser) -> None:
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


def take_decode(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    command.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    command.add_argument("--tokens", type=int, default=60, help="written after each of the seven probes [60]")
    command.add_argument("--rounds", type=int, default=5, help="of which the median counts [5]")
    take_machine(command)
    command.add_argument("--transformers", action="store_true",
                         help="also `generate` of the export under transformers, in turns with plain")


def take_machine(command: argparse.ArgumentParser) -> None:
    command.add_argument("--threads", type=int, help="of torch (default: its own choice)")
    command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of arithmetic [float32]")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def check_numbers(args: argparse.Namespace) -> None:
    """ConfigError for what must be positive and is not."""
    for name in ("tokens", "rounds", "steps", "rows", "length", "window", "document", "seq",
                 "vocab", "lanes", "buffer", "threads", "seconds"):
        values = getattr(args, name, None)
        for value in values if isinstance(values, list) else [] if values is None else [values]:
            if name == "seconds" and not 0 < value < 1e6:
                raise ConfigError(f"must be above 0, got {value}", "--seconds")
            if name != "seconds" and value < 1:
                raise ConfigError(f"must be 1 or more, got {value}", f"--{name}")


if __name__ == "__main__":
    main()
