"""Evaluate a checkpoint: bits per byte and accuracy of the full pool, every stage and every prefix; seven probes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nanopoe.errors import ConfigError, entrypoint

EXAMPLES = """examples:
  python -m scripts.evaluate out/quickstart                        the newest checkpoint
  python -m scripts.evaluate out/poe_1p3b --step 20000 --tokens 1048576
  torchrun --nproc_per_node=8 -m scripts.evaluate out/poe_1p3b     each rank reads its share of the rows
  python -m scripts.evaluate out/quickstart --json | jq .bpb

writes RUN/evaluation/step_NNNNNNNN.json and .md; its keys: nanopoe.train.evaluate.evaluate"""


@entrypoint
def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    parser.add_argument("--tokens", type=int, help="of the validation split (default: the run's evaluation.tokens)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, not as a table")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.tokens is not None and args.tokens < 1:
        raise ConfigError(f"must be 1 or more, got {args.tokens}", "--tokens")

    from rich.console import Console

    from nanopoe.checkpoint.evaluation import save_evaluation
    from nanopoe.dist import agree, world
    from nanopoe.report.tables import evaluation_markdown, evaluation_table
    from nanopoe.train.evaluate import evaluate_checkpoint

    with world(args.device) as here:
        result = evaluate_checkpoint(args.run, args.step, args.tokens, here)
        title = f"{result['run']}, step {result['step']}"
        with agree(here.device):
            if here.is_main:
                path = save_evaluation(args.run, result, evaluation_markdown(result, title))
    if here.is_main and args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
    elif here.is_main:
        console = Console(highlight=False)
        console.print(evaluation_table(result, title))
        console.print(f"\nsaved as {path} and .md", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
