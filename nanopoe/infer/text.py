"""Tokens to text while they come, and a conversation to tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from nanopoe.config.schema import ModelConfig
from nanopoe.data.conversations import Function, prompt_of
from nanopoe.data.render import render_prompt
from nanopoe.errors import ConfigError
from nanopoe.infer.batch import Emitted
from nanopoe.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
LONGEST_CHARACTER = 4    # bytes of a UTF-8 character, and so the most tokens that can make up one


def pieces(tokens: Iterable[Emitted], tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    """(text, deciding stage) of one row's tokens; bytes wait for the rest of their character."""
    held: list[int] = []
    stage = 0
    for _, token, stage in tokens:
        held.append(token)
        text = tokenizer.decode(held)
        if text.endswith(REPLACEMENT) and len(held) < LONGEST_CHARACTER:
            continue
        held = []
        yield text, stage
    if held:
        yield tokenizer.decode(held), stage


def prompt_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """A new document that begins with `text`; of an empty one, the <|bos|> alone."""
    return [tokenizer.bos_id, *tokenizer.encode(text)]


def check_context(ids: Sequence[int], config: ModelConfig, do: str) -> None:
    """ConfigError, with what to `do`, for a prompt longer than the model was trained to see."""
    if len(ids) > config.sequence_len:
        raise ConfigError(f"{len(ids)} tokens, the model was trained to see {config.sequence_len}", "prompt", do)


def question_ids(tokenizer: Tokenizer, question: str, tools: list[Function] | None = None) -> list[int]:
    """A conversation that begins with `question`, up to where the answer is to come; `tools` can be called in it.

    DataError for an empty question.
    """
    prompt = {"messages": [{"role": "user", "content": question}], "tools": tools}
    return render_prompt(tokenizer, prompt_of(prompt, "prompt"))


def chat_ids(tokenizer: Tokenizer, turns: Iterable[tuple[str, Sequence[int] | None]],
             tools: list[Function] | None = None) -> list[int]:
    """Questions and the tokens of their answers, as conversations are trained; the last answer, None, is to come."""
    special = tokenizer.special_ids
    ids: list[int] = []
    for question, answer in turns:
        ids += question_ids(tokenizer, question, None if ids else tools)[bool(ids):]          # one <|bos|> is enough
        if answer is not None:
            ids += [*answer, special["<|assistant_end|>"]]
    return ids


def ends(tokenizer: Tokenizer) -> set[int]:
    """Tokens that end an answer: the end of the turn, or where a new document would begin."""
    return {tokenizer.special_ids["<|assistant_end|>"], tokenizer.bos_id}
