"""Evaluate tool calling and arithmetic: a model's greedy replies to the prompts of validation conversations."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopoe.errors import ConfigError, DataError, entrypoint

if TYPE_CHECKING:
    from nanopoe.config import Experiment
    from nanopoe.data.shards import Source
    from nanopoe.infer.tools import Case

EXAMPLES = """examples:
  python -m scripts.evaluate_tools out/stage_tool_quickstart                    the run's own validation split
  python -m scripts.evaluate_tools out/stage_tool_quickstart --view base        as before training
  python -m scripts.evaluate_tools out/sft_quickstart --data data/chat/val      another model
  python -m scripts.evaluate_tools out/stage_tool_quickstart --limit 50 --layouts one,compact
  python -m scripts.evaluate_tools out/stage_tool_quickstart --constrained      a call is valid JSON of its function
  python -m scripts.evaluate_tools out/stage_tool_quickstart --json | jq .tools.all.parse
  python -m scripts.evaluate_tools out/stage_tool_quickstart --limit 50 --replies replies.jsonl      to read them
  jq -r 'select(.parse == false).reply' replies.jsonl                           those that do not parse

adds to RUN/evaluation/tools_step_NNNNNNNN.jsonl, a line for each way of asking; scripts.report shows it.

--limit takes the first so many conversations with tools, and as many of arithmetic. What is counted: see
nanopoe.infer.tools. No function of the embedded set's val/ is in its train/: made with --val-percent 5 on Python
3.11, the 24 functions of val/ are none of the 268 of train/"""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.evaluate_tools", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--data", type=Path, help="folder of shards of conversations (default: the run's data.val)")
    parser.add_argument("--limit", type=int, metavar="N", help="so many prompts of each kind (default: all)")
    parser.add_argument("--layouts", default="one,4,2,compact",
                        help="of the JSON in prompts: one line, indent 4, indent 2, compact [one,4,2,compact]")
    parser.add_argument("--constrained", action="store_true", help="the given functions constrain the calls")
    parser.add_argument("--view", metavar="VIEW",
                        help="who answers: base, dual, specialist:NAME, stage:0, .. (default: the specialist, or all)")
    parser.add_argument("--tokens", type=int, default=256, help="of a reply at most [256]")
    parser.add_argument("--batch", type=int, default=16, help="replies at a time [16]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of arithmetic [float32]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True,
                        help="keep the record with the run [yes]")
    parser.add_argument("--replies", type=Path, metavar="FILE",
                        help="write every reply to a call's prompt, with what was wanted and found, as a JSON line")
    parser.add_argument("--json", action="store_true", help="print the record as JSON, not as tables")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


@entrypoint
def main() -> None:
    args = parsed()
    for option, value in (("--limit", args.limit), ("--tokens", args.tokens), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise ConfigError(f"must be 1 or more, got {value}", option)

    import torch

    from nanopoe.checkpoint.cascade import is_delta
    from nanopoe.checkpoint.evaluation import save_tools
    from nanopoe.dist import world
    from nanopoe.infer.engine import Engine
    from nanopoe.infer.tools import METRICS, Budget, evaluate_arithmetic, evaluate_calls
    from nanopoe.infer.weights import Weights
    from nanopoe.model.pool import View
    from nanopoe.train.restore import load_cascade

    layouts, view = chosen_layouts(args.layouts), None if args.view is None else View.parse(args.view)
    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"generates on one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.evaluate_tools")
        loaded = load_cascade(args.run, args.step, here)
        tokenizer, checkpoint = loaded.tokenizer, loaded.checkpoint
        weights = Weights(loaded.model, getattr(torch, args.dtype), loaded.names)
        del loaded
        engine, budget = Engine(weights, view), Budget(args.tokens, args.batch)
        sources = opened(args.data, checkpoint.experiment)
        with_tools, arithmetic = read(sources, args.data or "data.val", args.limit)
        with shown("tool calls") as show, kept(args.replies) as keep:
            tools = evaluate_calls(engine, tokenizer, with_tools, layouts, budget, args.constrained, show, keep)
        with shown("arithmetic") as show:
            numbers = evaluate_arithmetic(engine, tokenizer, arithmetic, budget, show)
    request = {"checkpoint": checkpoint.identity, "data": {source.name: source.digest for source in sources},
               "limit": args.limit, "layouts": layouts, "constrained": args.constrained, "view": args.view,
               "tokens": args.tokens, "dtype": args.dtype}
    record = {"run": checkpoint.experiment.name, "step": checkpoint.step, "request": request,
              "conversations": len(with_tools), "metrics": METRICS, "tools": tools, "arithmetic": numbers}
    tell(record, args.json)
    if args.save and is_delta(args.run):
        print(f"not saved: {args.run} is a delta, its run keeps evaluations", file=sys.stderr)
    elif args.save:
        path = save_tools(args.run, record)
        print(f"saved in {path}", file=sys.stderr if args.json else sys.stdout)


def chosen_layouts(text: str) -> list[str]:
    """Names of layouts, each once, from `one,compact`."""
    from nanopoe.infer.tools import LAYOUT_NAMES

    names = text.split(",")
    unknown = [name for name in names if name not in LAYOUT_NAMES]
    if unknown or len(set(names)) < len(names):
        what = f"no layout '{unknown[0]}'" if unknown else "a layout twice"
        raise ConfigError(what, "--layouts", f"use any of {','.join(LAYOUT_NAMES)}")
    return names


def read(sources: list[Source], where: Path | str, limit: int | None) -> tuple[list[Case], list[Case]]:
    """(with tools, arithmetic) of the sources; DataError, naming where they are, without any with tools."""
    from nanopoe.infer.tools import cases_of

    with_tools: list[Case] = []
    arithmetic: list[Case] = []
    for source in sources:
        some, others = cases_of(source.texts(), source.name, limit)
        with_tools += some
        arithmetic += others
    if not with_tools:
        raise DataError("no conversations with tools", where,
                        "name another folder with --data, such as data/chat/val")
    return with_tools[:limit], arithmetic[:limit]


def opened(folder: Path | None, experiment: Experiment) -> list[Source]:
    """Of the folder, or of the experiment's validation split."""
    from nanopoe.data.loader import open_sources
    from nanopoe.data.shards import CONVERSATION, open_source

    if folder is not None:
        return [open_source(folder.name, folder, column=CONVERSATION)]
    if experiment.data.kind != "conversations":
        raise ConfigError(f"the run was trained on {experiment.data.kind}: its data.val has no conversations",
                          experiment.name, "name a folder of them with --data, such as data/chat/val")
    return open_sources(experiment.data.val, experiment.data.kind)


@contextmanager
def kept(path: Path | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Writes what it is given as JSON lines, or nothing."""
    if path is None:
        yield lambda reply: None
        return
    try:
        file = path.open("w", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", path, "name another file with --replies") from error
    with file:
        yield lambda reply: print(json.dumps(reply, ensure_ascii=False), file=file, flush=True)


@contextmanager
def shown(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal; elsewhere a line now and then, on stderr."""
    if not sys.stderr.isatty():
        told = [0]

        def line(done: int, total: int) -> None:
            if done * 10 // total > told[0]:
                told[0] = done * 10 // total
                print(f"{label}: {done:,} of {total:,}", file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    with Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(),
                  console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def tell(record: dict[str, Any], as_json: bool) -> None:
    from nanopoe.checkpoint.tables import print_json, print_table
    from nanopoe.report.tools import tools_record, tools_rows

    if as_json:
        print_json(record)
        return
    found = tools_record(record, "this evaluation")
    print(f"{found.run}, step {found.step}{found.request.how}: {found.said}\n")
    head, rows = tools_rows(found)
    print_table(head, rows, right=range(2, len(head)))
    print(*("", *found.more), sep="\n")


if __name__ == "__main__":
    main()
