"""Continue a text with a trained model, in any mode; the text on stdout, tokens/s on stderr."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from nanopoe.errors import ConfigError, entrypoint

if TYPE_CHECKING:
    from nanopoe.infer.batch import Emitted
    from nanopoe.infer.weights import Weights

EXAMPLES = """examples:
  python -m scripts.generate out/quickstart "def read("
  python -m scripts.generate out/quickstart "import os" --tokens 200 --temperature 0.8 --top-p 0.95 --seed 3
  echo "The capital of France is" | python -m scripts.generate out/quickstart --mode speculative --drafts auto
  python -m scripts.generate out/quickstart "class " --mode wand --colour      after scripts.evaluate
  python -m scripts.generate out/quickstart "class " --mode compose:0=1,2=3 --json | jq .stats
  python -m scripts.generate out/stage_tool "2 + 2 =" --with math=out/stage_math --mode route
  python -m scripts.generate out/stage_tool "Is it raining in Rome?" --constrained functions.json

without a prompt it is read from stdin; an empty one is a new document. With --constrained it is a user's question, and
the model's answer is generated. How fast every mode is: scripts.bench decode"""


@entrypoint
def main() -> None:
    from nanopoe.infer.terminal import checked, constraint_of, kept, parser_of, siblings_of, told

    parser = parser_of("scripts.generate", __doc__, EXAMPLES, tokens=100)
    parser.add_argument("prompt", nargs="?", help="text to continue (default: stdin)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the text")
    args = checked(parser.parse_args())

    import torch

    from nanopoe.checkpoint.evaluation import read_calibration
    from nanopoe.dist import world
    from nanopoe.infer.modes import choose, sampling_of
    from nanopoe.infer.text import check_context, ends, pieces, prompt_ids, question_ids
    from nanopoe.infer.weights import Weights
    from nanopoe.train.restore import load_cascade

    sampling = sampling_of(args)
    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"generates on one rank, not {here.size}", "torchrun",
                              "start it with python -m scripts.generate")
        loaded = load_cascade(args.run, args.step, here, siblings_of(args), args.base)
        tokenizer, checkpoint = loaded.tokenizer, loaded.checkpoint
        weights = Weights(loaded.model, getattr(torch, args.dtype), loaded.names)
        del loaded
        choice = choose(weights, args, lambda: read_calibration(args.run, checkpoint.step, checkpoint.identity))
        tools, constraint = constraint_of(args, tokenizer)
        prompt = args.prompt if args.prompt is not None else sys.stdin.read().removesuffix("\n")
        ids = prompt_ids(tokenizer, prompt) if tools is None else question_ids(tokenizer, prompt, tools)
        check_context(ids, weights.config, "give a shorter one")
        start = time.perf_counter()
        generation = choice.engine.stream([ids], max_new_tokens=args.tokens, sampling=sampling, stop=ends(tokenizer),
                                          mode=choice.mode, constraint=constraint)
        tokens: list[Emitted] = []
        show(prompt, pieces(kept(generation, tokens), tokenizer), weights, args)
        seconds = time.perf_counter() - start
    if args.json:
        ids = [token for _, token, _ in tokens]
        print(json.dumps({"prompt": prompt, "text": tokenizer.decode(ids), "tokens": ids,
                          "stages": [stage for *_, stage in tokens], "mode": args.mode, "step": checkpoint.step,
                          "seconds": seconds, "tokens_per_s": len(ids) / seconds,
                          "stats": generation.stats.as_dict() if generation.stats else None,
                          "calls": generation.calls.as_dict() if generation.calls else None}, ensure_ascii=False))
    else:
        print(told(generation, len(tokens), seconds), file=sys.stderr)


def show(prompt: str, parts: Iterable[tuple[str, int]], weights: Weights, args: argparse.Namespace) -> None:
    """Write prompt and text as they come; with --json only exhaust them."""
    from rich.console import Console
    from rich.text import Text

    from nanopoe.infer.terminal import colour_of

    def write(text: str, stage: int | None = None) -> None:
        if args.json:
            return
        if args.colour and stage is not None:
            console.print(Text(text, colour_of(stage)), end="")
        else:
            sys.stdout.write(text)                              # as it is: rich would expand tabs
        sys.stdout.flush()

    console = Console(highlight=False, soft_wrap=True, force_terminal=True, color_system="standard")
    write(prompt if args.constrained is None else f"{prompt}\n")
    for text, stage in parts:
        write(text, stage)
    write("\n")
    if args.colour:
        legend = Text()
        for k, name in enumerate((*(f"stage {k}" for k in range(weights.n_stages)), *weights.names)):
            legend.append(f"{name} ", colour_of(k))
        Console(stderr=True, force_terminal=True, color_system="standard").print(legend)


if __name__ == "__main__":
    main()
