"""Continue a text with a trained model, in any mode; the text on stdout, tokens/s on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanopoe.errors import ConfigError, entrypoint

if TYPE_CHECKING:
    from nanopoe.infer.batch import Emitted
    from nanopoe.infer.engine import Generation

EXAMPLES = """examples:
  python -m scripts.generate out/quickstart "def read("
  python -m scripts.generate out/quickstart "import os" --tokens 200 --temperature 0.8 --top-p 0.95 --seed 3
  echo "The capital of France is" | python -m scripts.generate out/quickstart --mode speculative --drafts auto
  python -m scripts.generate out/quickstart "class " --mode wand --colour      after scripts.evaluate
  python -m scripts.generate out/quickstart "class " --mode compose:0=1,2=3 --json | jq .stats

without a prompt it is read from stdin; an empty one is a new document. How fast every mode is: scripts.bench decode"""

COLOURS = ("green", "cyan", "yellow", "magenta", "blue", "red")


def parsed() -> argparse.Namespace:
    from nanopoe.infer.modes import MODES, add_arguments

    parser = argparse.ArgumentParser(prog="python -m scripts.generate", description=__doc__,
                                     epilog=f"{MODES}\n\n{EXAMPLES}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("prompt", nargs="?", help="text to continue (default: stdin)")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--tokens", type=int, default=100, help="new tokens at most [100]")
    add_arguments(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of arithmetic [float32]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--colour", action="store_true", help="colour every token by the stage that decided it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


@entrypoint
def main() -> None:
    args = parsed()
    if args.tokens < 1:
        raise ConfigError(f"must be 1 or more, got {args.tokens}", "--tokens")

    import torch

    from nanopoe.checkpoint.evaluation import read_calibration
    from nanopoe.dist import world
    from nanopoe.infer.modes import choose, sampling_of
    from nanopoe.infer.text import check_context, ends, pieces, prompt_ids
    from nanopoe.infer.weights import Weights
    from nanopoe.train.restore import load_trained

    sampling = sampling_of(args)
    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"generates on one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.generate")
        model, tokenizer, checkpoint = load_trained(args.run, args.step, here)
        weights = Weights(model, getattr(torch, args.dtype))
        del model

        def calibration() -> dict[str, Any]:
            return read_calibration(args.run, checkpoint.step, checkpoint.identity)

        choice = choose(weights, args, calibration)
        prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
        ids = prompt_ids(tokenizer, prompt)
        check_context(ids, weights.config, "give a shorter one")
        start = time.perf_counter()
        generation = choice.engine.stream([ids], max_new_tokens=args.tokens,
                                          sampling=sampling, stop=ends(tokenizer), mode=choice.mode)
        tokens: list[Emitted] = []
        show(prompt, pieces(kept(generation, tokens), tokenizer), weights.n_stages, args)
        seconds = time.perf_counter() - start
    if args.json:
        ids = [token for _, token, _ in tokens]
        print(json.dumps({"prompt": prompt, "text": tokenizer.decode(ids), "tokens": ids,
                          "stages": [stage for *_, stage in tokens], "mode": args.mode, "step": checkpoint.step,
                          "seconds": seconds, "tokens_per_s": len(ids) / seconds,
                          "stats": generation.stats.as_dict() if generation.stats else None}, ensure_ascii=False))
    else:
        print(told(generation, len(tokens), seconds), file=sys.stderr)


def kept(generation: Iterable[Emitted], tokens: list[Emitted]) -> Iterator[Emitted]:
    """Pass tokens on and keep them."""
    for emitted in generation:
        tokens.append(emitted)
        yield emitted


def show(prompt: str, parts: Iterable[tuple[str, int]], n_stages: int, args: argparse.Namespace) -> None:
    """Write prompt and text as they come; with --json only exhaust them."""
    from rich.console import Console
    from rich.text import Text

    def write(text: str, stage: int | None = None) -> None:
        if args.json:
            return
        if args.colour and stage is not None:
            console.print(Text(text, COLOURS[stage % len(COLOURS)]), end="")
        else:
            sys.stdout.write(text)                              # as it is: rich would expand tabs
        sys.stdout.flush()

    console = Console(highlight=False, soft_wrap=True, force_terminal=True, color_system="standard")
    write(prompt)
    for text, stage in parts:
        write(text, stage)
    write("\n")
    if args.colour:
        legend = Text()
        for k in range(n_stages):
            legend.append(f"stage {k} ", COLOURS[k % len(COLOURS)])
        Console(stderr=True, force_terminal=True, color_system="standard").print(legend)


def told(generation: Generation, tokens: int, seconds: float) -> str:
    """The line on stderr."""
    line = f"{tokens} tokens, {tokens / seconds:.1f} tokens/s"
    stats = generation.stats.as_dict() if generation.stats else {}
    if "exits" in stats:
        line += f", exits {' '.join(map(str, stats['exits']))}, mean depth {stats['mean_depth']:.2f}"
    if "rounds" in stats:
        line += (f", {stats['rounds']} rounds, {stats['accepted']} of {stats['drafted']} drafts accepted "
                 f"({stats['acceptance']:.1%}, {stats['mean_accepted']:.2f} a round)")
    return line


if __name__ == "__main__":
    main()
