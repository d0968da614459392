"""What the commands that write text have in common: their arguments, colours, and what they tell at the end."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from nanopoe.data.conversations import Function, parse_json, prompt_of
from nanopoe.errors import ConfigError, DataError
from nanopoe.infer.batch import Emitted
from nanopoe.infer.constrain import CallConstraint
from nanopoe.infer.engine import Generation
from nanopoe.infer.modes import MODES, add_arguments
from nanopoe.tokenizer import Tokenizer

COLOURS = ("green", "cyan", "yellow", "magenta", "blue", "red")


def parser_of(prog: str, description: str | None, examples: str, tokens: int) -> argparse.ArgumentParser:
    """With all that both commands take; `tokens` are the most new ones if nothing is said."""
    parser = argparse.ArgumentParser(prog=f"python -m {prog}", description=description, epilog=f"{MODES}\n\n{examples}",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or of a specialist's delta")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--with", dest="siblings", action="append", default=[], metavar="NAME=PATH",
                        help="a specialist's run or delta on the same base, beside RUN; can be given again")
    parser.add_argument("--base", type=Path, metavar="PATH", help="where the base is, instead of where specialists say")
    parser.add_argument("--tokens", type=int, default=tokens, help=f"new tokens at most [{tokens}]")
    add_arguments(parser)
    parser.add_argument("--constrained", type=Path, metavar="FILE.json",
                        help="a list of functions, which the prompt says the model can call, and only as declared")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of arithmetic [float32]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--colour", action="store_true", help="colour every token by the stage that decided it")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def checked(args: argparse.Namespace) -> argparse.Namespace:
    if args.tokens < 1:
        raise ConfigError(f"must be 1 or more, got {args.tokens}", "--tokens")
    return args


def siblings_of(args: argparse.Namespace) -> dict[str, Path]:
    """--with by name."""
    found: dict[str, Path] = {}
    for text in args.siblings:
        name, _, path = text.partition("=")
        if not name or not path or name in found:
            raise ConfigError(f"expected NAME=PATH, each name once, got {text!r}", "--with",
                              "write it as --with tool=out/stage_tool")
        found[name] = Path(path)
    return found


def functions_of(path: Path) -> list[Function]:
    """The functions in a JSON file: a list of {"name", "description", "parameters"}. DataError for anything else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot be read ({error})", path, "give a JSON file, a list of functions") from error
    value = {"messages": [{"role": "user", "content": "?"}], "tools": parse_json(text, str(path))}
    return prompt_of(value, str(path)).tools or []


def constraint_of(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[list[Function] | None, Any]:
    """(functions, constraint for one row) of --constrained; (None, None) without."""
    if args.constrained is None:
        return None, None
    functions = functions_of(args.constrained)
    return functions, [CallConstraint(functions, tokenizer)]


def kept(generation: Iterable[Emitted], tokens: list[Emitted]) -> Iterator[Emitted]:
    """Pass tokens on and keep them."""
    for emitted in generation:
        tokens.append(emitted)
        yield emitted


def colour_of(stage: int) -> str:
    return COLOURS[stage % len(COLOURS)]


def told(generation: Generation, tokens: int, seconds: float) -> str:
    """The line below an answer; the generation is at its end."""
    line = f"{tokens} tokens, {tokens / seconds:.1f} tokens/s"
    stats = generation.stats.as_dict() if generation.stats else {}
    if "exits" in stats:
        line += f", exits {' '.join(map(str, stats['exits']))}, mean depth {stats['mean_depth']:.2f}"
    if "rounds" in stats:
        line += (f", {stats['rounds']} rounds, {stats['accepted']} of {stats['drafted']} drafts accepted "
                 f"({stats['acceptance']:.1%}, {stats['mean_accepted']:.2f} a round)")
    for name, perplexity in zip(stats.get("chosen", ()), stats.get("perplexity", ()), strict=True):
        line += f", by {name} (perplexity of the prompt: {', '.join(f'{n} {p:.4g}' for n, p in perplexity.items())})"
    if generation.calls is not None and generation.calls.opened:
        line += f", {generation.calls.closed} of {generation.calls.opened} calls ended"
    return line
