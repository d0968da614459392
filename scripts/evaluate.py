"""Evaluate checkpoints: bits per byte and accuracy of every view and every source of conversations, calibration, every
mode, seven probes. What a specialist is on top of its base; the base's own stages belong to the base's run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopoe.errors import ConfigError, entrypoint

if TYPE_CHECKING:
    from nanopoe.dist import World
    from nanopoe.train.trajectory import Request

EXAMPLES = """examples:
  python -m scripts.evaluate out/quickstart                        the newest checkpoint
  python -m scripts.evaluate out/quickstart --steps all            the trajectory: what is finished is not done again
  python -m scripts.evaluate out/poe_1p3b --steps 5000,10000-20000 --tokens 1048576
  torchrun --nproc_per_node=8 -m scripts.evaluate out/poe_1p3b     each rank reads its share of the rows
  python -m scripts.evaluate out/quickstart --json | jq .bpb
  python -m scripts.evaluate out/stage_tool_quickstart --json | jq .specialists.bpb,.sources

writes RUN/evaluation/step_NNNNNNNN.json and .md; its keys: nanopoe.train.trajectory. scripts.report draws them"""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="checkpoint to evaluate (default: the newest)")
    which.add_argument("--steps", help="several: all, or steps and ranges as in 100,300-500")
    parser.add_argument("--tokens", type=int, help="of the validation split (default: the run's evaluation.tokens)")
    parser.add_argument("--calibration-tokens", type=int, default=131072, help="the first of these [131072]")
    parser.add_argument("--no-speed", action="store_true",
                        help="leave out times of modes: on a busy machine they say nothing")
    parser.add_argument("--again", action="store_true", help="also what is finished")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", action="store_true", help="print the records as JSON lines, not as tables")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


@entrypoint
def main() -> None:
    args = parsed()
    for option, value in (("--tokens", args.tokens), ("--calibration-tokens", args.calibration_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"must be 1 or more, got {value}", option)

    from nanopoe.dist import agree, gather_json, world
    from nanopoe.train.trajectory import Request, finished

    request = Request(args.tokens, args.calibration_tokens, not args.no_speed)
    with world(args.device) as here:
        plan: list[tuple[int, dict[str, Any] | None]] = []
        with agree(here.device):
            if here.is_main:
                plan = [(step, None if args.again else finished(args.run, step, request)) for step in chosen(args)]
        for step, record in gather_json(plan, here.device)[0]:
            old = record is not None
            record = record or make(args, step, request, here)
            if here.is_main:
                tell(args, record, len(plan), old)


def chosen(args: argparse.Namespace) -> list[int]:
    """The steps asked for. CheckpointError for one that is not there."""
    from nanopoe.checkpoint import list_steps, open_checkpoint
    from nanopoe.checkpoint.evaluation import select_steps
    from nanopoe.checkpoint.store import checkpoints_of

    if args.steps is None:
        return [open_checkpoint(args.run, args.step).step]
    there = list_steps(args.run)
    return select_steps(args.steps, there, checkpoints_of(args.run)) or [open_checkpoint(args.run).step]


def make(args: argparse.Namespace, step: int, request: Request, here: World) -> dict[str, Any]:
    """Evaluate one checkpoint and save its record. Collective."""
    from nanopoe.checkpoint.evaluation import save_evaluation
    from nanopoe.dist import agree
    from nanopoe.report.tables import evaluation_markdown
    from nanopoe.train.trajectory import evaluate_checkpoint

    with shown(f"step {step}", here.is_main) as show:
        record = evaluate_checkpoint(args.run, step, request, here, show)
    with agree(here.device):
        if here.is_main:
            save_evaluation(args.run, record, evaluation_markdown(record, f"{record['run']}, step {step}"))
    return record


@contextmanager
def shown(label: str, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere nothing."""
    if not wanted or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total,
                       description=label if done < total else f"{label}: probes and modes")

        yield show


def tell(args: argparse.Namespace, record: dict[str, Any], steps: int, old: bool) -> None:
    """One record whole, several as a line each."""
    from rich.console import Console

    from nanopoe.checkpoint.evaluation import evaluation_path
    from nanopoe.report.record import record_of
    from nanopoe.report.tables import evaluation_table

    console, path = Console(highlight=False), evaluation_path(args.run, record["step"])
    if args.json:
        print(json.dumps(record, ensure_ascii=False), flush=True)
        return
    if record["tokens"] < record["request"]["tokens"]:
        print(f"the validation split fills {record['tokens']:,} of {record['request']['tokens']:,} tokens",
              file=sys.stderr)
    if record.get("truncated"):
        print(f"{record['truncated']:,} conversations lost their front, being longer than a row", file=sys.stderr)
    if steps > 1:
        done = "already evaluated" if old else f"{record['seconds']:.1f} s"
        found = record_of(record, path)
        against = f" (base {found.bpb.full:.6f})" if found.specialists else ""
        print(f"step {found.step}: bpb {found.trained.bpb:.6f}{against}, accuracy {found.trained.accuracy:.2%}, {done}",
              flush=True)
        return
    console.print(evaluation_table(record, f"{record['run']}, step {record['step']}"))
    console.print(f"\n{'evaluated before; --again repeats it:' if old else 'saved as'} {path} and .md", markup=False,
                  soft_wrap=True)


if __name__ == "__main__":
    main()
