"""Talk to a trained model in the terminal, in any mode."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nanopoe.errors import ConfigError, NanopoeError, entrypoint

EXAMPLES = """examples:
  python -m scripts.chat out/chat
  python -m scripts.chat out/chat --mode speculative --temperature 0.7 --top-k 50
  python -m scripts.chat out/chat --mode wand --colour                after scripts.evaluate

/mode NAME changes the mode, /clear forgets the conversation, /quit or the end of input leaves. A model that was
trained on text alone answers, but does not know what a turn is."""

COLOURS = ("green", "cyan", "yellow", "magenta", "blue", "red")


def parsed() -> argparse.Namespace:
    from nanopoe.infer.modes import MODES, add_arguments

    parser = argparse.ArgumentParser(prog="python -m scripts.chat", description=__doc__,
                                     epilog=f"{MODES}\n\n{EXAMPLES}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--tokens", type=int, default=256, help="of an answer at most [256]")
    add_arguments(parser)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of arithmetic [float32]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--colour", action="store_true", help="colour every token by the stage that decided it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args()


@entrypoint
def main() -> None:
    args = parsed()
    if args.tokens < 1:
        raise ConfigError(f"must be 1 or more, got {args.tokens}", "--tokens")

    import torch
    from rich.console import Console

    from nanopoe.checkpoint.evaluation import read_calibration
    from nanopoe.dist import world
    from nanopoe.infer.modes import choose, sampling_of
    from nanopoe.infer.weights import Weights
    from nanopoe.train.restore import load_trained

    console = Console(highlight=False, soft_wrap=True)
    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"talks on one rank, not {here.size}", "torchrun", "start it with python -m scripts.chat")
        model, tokenizer, checkpoint = load_trained(args.run, args.step, here)
        weights = Weights(model, getattr(torch, args.dtype))
        del model

        def choice() -> Any:
            return choose(weights, args, lambda: read_calibration(args.run, checkpoint.step,
                                                                  checkpoint.identity))

        chosen, sampling = choice(), sampling_of(args)
        turns: list[tuple[str, list[int] | None]] = []
        console.print(f"{checkpoint.experiment.name}, step {checkpoint.step}, {args.mode}. /mode NAME, /clear, /quit",
                      style="dim", markup=False)
        while True:
            try:
                said = console.input("[bold]> [/bold]").strip()
            except EOFError:
                break
            if said in ("/quit", "/exit"):
                break
            if said == "/clear":
                turns = []
            elif said.startswith("/mode "):
                before, args.mode = args.mode, said.removeprefix("/mode ").strip()
                try:
                    chosen = choice()
                except NanopoeError as error:                     # the conversation goes on in the mode it was in
                    console.print(error.render(), style="red", markup=False)
                    args.mode = before
            elif said.startswith("/"):
                console.print(f"unknown command {said}; /mode NAME, /clear, /quit", style="red", markup=False)
            elif said:
                try:
                    turns.append((said, answer(console, tokenizer, chosen, sampling, [*turns, (said, None)], args)))
                except ConfigError as error:
                    console.print(error.render(), style="red", markup=False)


def answer(console: Any, tokenizer: Any, chosen: Any, sampling: Any, turns: Any, args: argparse.Namespace) -> list[int]:
    """Write the answer to the last turn as it comes, and its speed below; returns its tokens."""
    from rich.text import Text

    from nanopoe.infer.text import chat_ids, check_context, ends, pieces

    ids = chat_ids(tokenizer, turns)
    check_context(ids, chosen.engine.weights.config, "/clear begins anew")
    start, tokens = time.perf_counter(), []
    generation = chosen.engine.stream([ids], max_new_tokens=args.tokens, sampling=sampling,
                                      stop=ends(tokenizer), mode=chosen.mode)

    def counted() -> Iterator[Any]:
        for emitted in generation:
            tokens.append(emitted.token)
            yield emitted

    for text, stage in pieces(counted(), tokenizer):
        console.print(Text(text, COLOURS[stage % len(COLOURS)] if args.colour else ""), end="")
        console.file.flush()
    seconds = time.perf_counter() - start
    stats = generation.stats.as_dict() if generation.stats else {}
    shown = "".join(f", {name} {round(value, 2) if isinstance(value, float) else value}"
                    for name, value in stats.items() if name in ("exits", "mean_depth", "acceptance", "mean_accepted"))
    console.print(f"\n{len(tokens)} tokens, {len(tokens) / seconds:.1f} tokens/s{shown}", style="dim", markup=False)
    return tokens


if __name__ == "__main__":
    main()
