"""Talk to a trained model in the terminal, in any mode, to a base or to specialists on it."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from nanopoe.errors import ConfigError, NanopoeError, entrypoint

if TYPE_CHECKING:
    from nanopoe.data.conversations import Function
    from nanopoe.infer.batch import Emitted
    from nanopoe.infer.modes import Choice
    from nanopoe.infer.sampling import Sampling
    from nanopoe.infer.weights import Weights
    from nanopoe.tokenizer import Tokenizer

EXAMPLES = """examples:
  python -m scripts.chat out/chat
  python -m scripts.chat out/chat --mode speculative --temperature 0.7 --top-k 50
  python -m scripts.chat out/chat --mode wand --colour                after scripts.evaluate
  python -m scripts.chat out/stage_chat --with tool=out/stage_tool --mode route

/mode NAME changes the mode, /with lists the specialists, /specialist NAME (or base, dual, route) changes who answers,
/clear forgets the conversation, /quit or the end of input leaves. A model that was trained on text alone answers, but
does not know what a turn is."""

COMMANDS = "/mode NAME, /specialist NAME|base|dual|route, /with, /clear, /quit"


@entrypoint
def main() -> None:
    from nanopoe.infer.terminal import checked, constraint_of, parser_of, siblings_of

    args = checked(parser_of("scripts.chat", __doc__, EXAMPLES, tokens=256).parse_args())

    import torch
    from rich.console import Console

    from nanopoe.checkpoint.evaluation import read_calibration
    from nanopoe.dist import world
    from nanopoe.infer.modes import choose, sampling_of
    from nanopoe.infer.weights import Weights
    from nanopoe.train.restore import load_cascade

    with world(args.device) as here:
        if here.size > 1:
            raise ConfigError(f"talks on one rank, not {here.size}", "torchrun", "start it with python -m scripts.chat")
        loaded = load_cascade(args.run, args.step, here, siblings_of(args), args.base)
        tokenizer, checkpoint = loaded.tokenizer, loaded.checkpoint
        weights = Weights(loaded.model, getattr(torch, args.dtype), loaded.names)
        del loaded

        def choice() -> Choice:
            return choose(weights, args, lambda: read_calibration(args.run, checkpoint.step, checkpoint.identity))

        tools, constraint = constraint_of(args, tokenizer)
        chat = Chat(Console(highlight=False, soft_wrap=True), tokenizer, sampling_of(args), args, tools, constraint)
        chosen = choice()
        chat.say(f"{checkpoint.experiment.name}, step {checkpoint.step}, {args.mode}. {COMMANDS}")
        while (said := chat.hear()) is not None:
            mode = mode_asked(said, weights)
            if said == "/clear":
                chat.turns = []
            elif said == "/with":
                chat.say(f"base{''.join(f', {name}' for name in weights.names)}; {args.mode} answers")
            elif mode is not None:
                before, args.mode = args.mode, mode
                try:
                    chosen = choice()
                except NanopoeError as error:                     # the conversation goes on in the mode it was in
                    chat.complain(error.render())
                    args.mode = before
            elif said.startswith("/"):
                chat.complain(f"unknown command {said}; {COMMANDS}")
            elif said:
                try:
                    chat.answer(said, chosen)
                except NanopoeError as error:
                    chat.complain(error.render())


def mode_asked(said: str, weights: Weights) -> str | None:
    """The mode that /mode or /specialist asks for; None of anything else."""
    command, _, name = said.partition(" ")
    name = name.strip()
    if command == "/mode" and name:
        return name
    if command == "/specialist" and name:
        plain = name in ("base", "dual", "route") or name.startswith("dual:")
        return name if plain and name not in weights.names else f"specialist:{name}"
    return None


class Chat:
    """A conversation on a console: `turns` are questions with the tokens of their answers."""

    def __init__(self, console: Any, tokenizer: Tokenizer, sampling: Sampling, args: argparse.Namespace,
                 tools: list[Function] | None, constraint: Any):
        self.console, self.tokenizer, self.sampling, self.args = console, tokenizer, sampling, args
        self.tools, self.constraint = tools, constraint
        self.turns: list[tuple[str, list[int] | None]] = []

    def hear(self) -> str | None:
        """The next line; None at the end."""
        try:
            said = str(self.console.input("[bold]> [/bold]")).strip()
        except EOFError:
            return None
        return None if said in ("/quit", "/exit") else said

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", markup=False)

    def complain(self, line: str) -> None:
        self.console.print(line, style="red", markup=False)

    def answer(self, said: str, chosen: Choice) -> None:
        """Write the answer as it comes, and its speed below."""
        from rich.text import Text

        from nanopoe.infer.terminal import colour_of, kept, told
        from nanopoe.infer.text import chat_ids, check_context, ends, pieces

        ids = chat_ids(self.tokenizer, [*self.turns, (said, None)], self.tools)
        check_context(ids, chosen.engine.weights.config, "/clear begins anew")
        start = time.perf_counter()
        tokens: list[Emitted] = []
        generation = chosen.engine.stream([ids], max_new_tokens=self.args.tokens, sampling=self.sampling,
                                          stop=ends(self.tokenizer), mode=chosen.mode, constraint=self.constraint)
        for text, stage in pieces(kept(generation, tokens), self.tokenizer):
            self.console.print(Text(text, colour_of(stage) if self.args.colour else ""), end="")
            self.console.file.flush()
        self.turns.append((said, [emitted.token for emitted in tokens]))
        self.say(f"\n{told(generation, len(tokens), time.perf_counter() - start)}")


if __name__ == "__main__":
    main()
