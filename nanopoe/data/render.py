"""Conversations to token ids with masks, in nanochat's layout, and what a model wrote back to messages.

    <|bos|> <|user_start|>system, tools, question<|user_end|>
    <|assistant_start|>text<|python_start|>{"name": .., "arguments": {..}}<|python_end|>
                       <|output_start|>result<|output_end|>text<|assistant_end|> ...

The system message and the tools go in front of the first user text, two newlines between. All calls of a message come
before their results; results stand inside the turn of the assistant. Only what the assistant writes is a target: its
text, its calls with python_start and python_end, and assistant_end. Texts are ordinary text: the name of a special
token in them never becomes that token.

A conversation longer than a row loses its front, and is counted: whole turns (a user message and all up to the next),
the oldest first, until the rest fits; the system message and the tools then stand in front of the first user text left.
If the last turn alone is too long, it is cut from its front, behind BOS. So the last target always stays.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from nanopoe.data.conversations import (
    Conversation,
    Message,
    ToolCall,
    call_json,
    function_json,
    parse_conversation,
    parse_json,
    to_json,
)
from nanopoe.data.order import key64, unit
from nanopoe.data.packing import Document
from nanopoe.data.shards import Source
from nanopoe.errors import DataError

BOS, USER_START, USER_END = "<|bos|>", "<|user_start|>", "<|user_end|>"
ASSISTANT_START, ASSISTANT_END = "<|assistant_start|>", "<|assistant_end|>"
CALL_START, CALL_END = "<|python_start|>", "<|python_end|>"
RESULT_START, RESULT_END = "<|output_start|>", "<|output_end|>"
SPECIALS = (BOS, USER_START, USER_END, ASSISTANT_START, ASSISTANT_END, CALL_START, CALL_END, RESULT_START, RESULT_END)

TOOLS_SENTENCE = "You can call these functions:\n"
ONE_LINE: dict[str, Any] = {}                                # json.dumps as it is: one line, a space after : and ,
LAYOUTS: tuple[dict[str, Any], ...] = ({"indent": 4}, {"indent": 2}, {"separators": (",", ":")})


class ChatTokenizer(Protocol):
    """What rendering needs of nanopoe.tokenizer.Tokenizer."""

    special_ids: dict[str, int]

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


class Piece(NamedTuple):
    """A special token by its name, or a text; a target or not."""

    text: str
    special: bool
    target: bool


def pieces(conversation: Conversation, where: str, layout: dict[str, Any] = ONE_LINE) -> Iterator[Piece]:
    """The conversation in order, its JSON in `layout`. Of a Prompt: up to where the assistant writes."""
    yield Piece(BOS, True, False)
    head, last = _head(conversation, where, layout), conversation.messages[-1]
    for message in conversation.messages:
        if message.role == "user":
            yield Piece(USER_START, True, False)
            yield Piece(head + message.content, False, False)
            yield Piece(USER_END, True, False)
            yield Piece(ASSISTANT_START, True, False)
            head = ""
        elif message.role == "tool":
            yield Piece(RESULT_START, True, False)
            yield Piece(message.content, False, False)
            yield Piece(RESULT_END, True, False)
        elif message.role == "assistant":
            yield Piece(message.content, False, True)
            for call in message.tool_calls or ():
                yield Piece(CALL_START, True, True)
                yield Piece(to_json(call_json(call), where, **layout), False, True)
                yield Piece(CALL_END, True, True)
            if message is last or not message.tool_calls:    # else results follow, in the same turn
                yield Piece(ASSISTANT_END, True, True)


def _head(conversation: Conversation, where: str, layout: dict[str, Any]) -> str:
    """What stands in front of the first user text."""
    first, head = conversation.messages[0], ""
    if first.role == "system":
        head = first.content + "\n\n"
    if conversation.tools is not None:
        tools = to_json([function_json(tool) for tool in conversation.tools], where, **layout)
        head += f"{TOOLS_SENTENCE}{tools}\n\n"
    return head


def encode_pieces(tokenizer: ChatTokenizer, parts: Iterator[Piece]) -> np.ndarray:
    """(n,) int32: ids of targets as they are, every other id as ~id (negative)."""
    ids: list[int] = []
    masked: list[tuple[int, int]] = []
    for text, special, target in parts:
        start = len(ids)
        if special:
            ids.append(tokenizer.special_ids[text])
        elif text:
            ids += tokenizer.encode(text)
        if not target:
            masked.append((start, len(ids)))
    row = np.array(ids, dtype=np.int32)
    for start, end in masked:
        np.invert(row[start:end], out=row[start:end])
    return row


@dataclass(frozen=True)
class Render:
    """Conversations of a source to documents of at most `max_tokens` (T+1) tokens; how many were dropped is kept.

    Of a share `json_layout_prob` of the conversations with tools, by a hash of (seed, source, epoch, ordinal), the JSON
    of tools and calls is laid out with indent 4, indent 2 or compact, equally often: a model that was trained on one
    layout fails silently on another.
    """

    tokenizer: ChatTokenizer
    max_tokens: int
    seed: int
    json_layout_prob: float

    def __call__(self, source: Source, wanted: Sequence[tuple[int, int]]) -> list[Document]:
        """Documents for (epoch, ordinal) pairs, in their order."""
        documents: dict[int, Document] = {}
        for i in sorted(range(len(wanted)), key=lambda i: wanted[i][1]):      # by row group: each is decoded once
            documents[i] = self._document(source, *wanted[i])
        return [documents[i] for i in range(len(wanted))]

    def _document(self, source: Source, epoch: int, ordinal: int) -> Document:
        where = f"source '{source.name}' conversation {ordinal}"
        conversation = parse_conversation(source.text(ordinal), where)
        layout = ONE_LINE
        if conversation.tools is not None and self.json_layout_prob > 0:
            draw = unit(key64(self.seed, "json layout", source.name, epoch), ordinal)
            layout = choose_layout(draw, self.json_layout_prob)
        row = self._row(conversation, where, layout)
        kept = row if len(row) <= self.max_tokens else self._truncated(conversation, where, layout)
        return Document(kept, len(kept), (source.name, epoch, ordinal), len(row) - len(kept))

    def _row(self, conversation: Conversation, where: str, layout: dict[str, Any]) -> np.ndarray:
        return encode_pieces(self.tokenizer, pieces(conversation, where, layout))

    def _truncated(self, conversation: Conversation, where: str, layout: dict[str, Any]) -> np.ndarray:
        """At most max_tokens entries of a conversation that is longer: its last turns, else the end of the last."""
        shorter = list(without_oldest(conversation))         # by turns: the fewer, the fewer tokens
        fits = bisect_left(shorter, True, key=lambda c: len(self._row(c, where, layout)) <= self.max_tokens)
        if fits < len(shorter):
            return self._row(shorter[fits], where, layout)
        row = self._row(shorter[-1] if shorter else conversation, where, layout)
        return np.concatenate([row[:1], row[len(row) - self.max_tokens + 1:]])


def without_oldest(conversation: Conversation) -> Iterator[Conversation]:
    """The conversation without its oldest turn, without its two oldest, ... down to its last turn."""
    messages = conversation.messages
    starts = [i for i, message in enumerate(messages) if message.role == "user"]
    for start in starts[1:]:
        yield conversation.model_copy(update={"messages": [*messages[:starts[0]], *messages[start:]]})


def choose_layout(draw: float, prob: float) -> dict[str, Any]:
    """The layout of a draw in [0, 1): one line, or of a share `prob` each of LAYOUTS equally often."""
    return LAYOUTS[int(draw / prob * len(LAYOUTS))] if draw < prob else ONE_LINE


def render_prompt(tokenizer: ChatTokenizer, prompt: Conversation, layout: dict[str, Any] = ONE_LINE) -> list[int]:
    """Ids, none masked, after which the assistant writes: up to assistant_start, or to the last result of its calls.

    `prompt` is a Prompt (`prompt_of`, or `Conversation.prompt`); DataError if it ends with the assistant.
    """
    if prompt.messages[-1].role == "assistant":
        raise DataError("ends with an assistant message", "prompt", "leave it out with Conversation.prompt()")
    row = encode_pieces(tokenizer, pieces(prompt, "prompt", layout))
    return np.where(row < 0, ~row, row).tolist()


# -- what a model wrote -----------------------------------------------------------------------------------------------

@dataclass
class Reply:
    """Messages of the assistant (and results, if the text has them); what was wrong with it; whether it ended."""

    messages: list[Message] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    ended: bool = False

    @property
    def text(self) -> str:
        return "".join(message.content for message in self.messages if message.role == "assistant")

    @property
    def calls(self) -> list[ToolCall]:
        return [call for message in self.messages for call in message.tool_calls or ()]


def parse_reply(tokenizer: ChatTokenizer, reply: Sequence[int] | str) -> Reply:
    """What follows assistant_start, up to assistant_end or bos. A model may write anything, so nothing is raised.

    Ids are exact. In a str the names of special tokens count as these tokens.
    """
    found, inside, text = Reply(), "", ""
    for special, between in _segments(tokenizer, reply):
        text += between
        if special is None or special in (ASSISTANT_END, BOS):
            found.ended = special == ASSISTANT_END
            break
        if not inside and special in (CALL_START, RESULT_START):
            _add_text(found, text)
            inside, text = special, ""
        elif (inside, special) == (CALL_START, CALL_END):
            _add_call(found, text)
            inside = text = ""
        elif (inside, special) == (RESULT_START, RESULT_END):
            found.messages.append(Message(role="tool", content=text))
            inside = text = ""
        else:
            found.faults.append(f"{special} where it means nothing")
    if inside:
        found.faults.append(f"{inside} without an end")
    else:
        _add_text(found, text)
    return found


def _segments(tokenizer: ChatTokenizer, reply: Sequence[int] | str) -> Iterator[tuple[str | None, str]]:
    """(special, text before it), the last special None."""
    if isinstance(reply, str):
        parts = re.split(f"({'|'.join(map(re.escape, SPECIALS))})", reply)
        yield from zip(parts[1::2], parts[0:-1:2], strict=True)
        yield None, parts[-1]
        return
    names = {i: name for name, i in tokenizer.special_ids.items()}
    start = 0
    for at, token in enumerate(reply):
        if token in names:
            yield names[token], tokenizer.decode(reply[start:at])
            start = at + 1
    yield None, tokenizer.decode(reply[start:])


def _add_text(found: Reply, text: str) -> None:
    if not text:
        return
    if found.messages and found.messages[-1].role == "assistant":
        found.faults.append("text after a call, before its result")
    found.messages.append(Message(role="assistant", content=text))


def _add_call(found: Reply, text: str) -> None:
    try:
        value = parse_json(text, "call")
        call = ToolCall.model_validate(value)
    except (DataError, ValueError) as error:                 # pydantic's error is a ValueError
        reason = error.what if isinstance(error, DataError) else "needs a name and arguments, an object"
        found.faults.append(f"a call that is none: {reason}")
        return
    last = found.messages[-1] if found.messages else None
    if last is None or last.role != "assistant":
        found.messages.append(Message(role="assistant", content="", tool_calls=[call]))
    else:
        found.messages[-1] = Message(role="assistant", content=last.content,
                                     tool_calls=[*(last.tool_calls or ()), call])

