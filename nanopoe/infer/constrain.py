"""Calls that are always valid: a mask on the next token while a call of a function is open.

Free text is left as it is. From <|python_start|> on a grammar holds, made by llguidance from the functions:

    {"name": <one of them>, "arguments": <by its JSON schema>}

and then <|python_end|>, the only control token that can end a call. Several calls in a turn work. White space between
tokens of the JSON is at most that of the layouts of data/render.py. Arguments come in the order of the schema. One the
schema does not declare cannot be written, unless it says additionalProperties.

A row that has little left of its budget ends its call in time: every token is checked to leave enough for the shortest
end that is found, else that end is written; and a call that cannot end in the budget is not opened.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from nanopoe.data.conversations import Function, to_json
from nanopoe.data.render import ASSISTANT_END, CALL_END, CALL_START
from nanopoe.errors import ConfigError
from nanopoe.tokenizer import Tokenizer

# Of one line, or a line end with up to 64 spaces: indent 4 to a depth of 16. Optional, and no two in a row.
SPACE = r" |\n( {2}){0,32}"
HORIZON = 256                    # tokens left of the budget, from which on the end of a call is watched
_ENDS = b'}],:"0tnf'              # in this order: what gets an open JSON text to its end
_JOINED = ("$ref", "allOf", "anyOf", "oneOf")                # arguments that are declared elsewhere: not ours to close


@dataclass
class CallStats:
    """Calls that rows `opened` and `closed`; `hurried` were ended to stay in the budget, `cut` are open at its end."""

    opened: int = 0
    closed: int = 0
    hurried: int = 0

    @property
    def cut(self) -> int:
        return self.opened - self.closed

    def add(self, other: CallStats) -> None:
        self.opened += other.opened
        self.closed += other.closed
        self.hurried += other.hurried

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "cut": self.cut}


class CallConstraint:
    """What a call may be: one of `tools`, by its schema. Serves any number of rows.

    ConfigError naming the function whose schema the library cannot take (an unknown type, format or keyword such as
    `not`; a schema that nothing satisfies).
    """

    def __init__(self, tools: Sequence[Function], tokenizer: Tokenizer):
        if not tools:
            raise ConfigError("no functions", "constraint", "give some, or no constraint")
        self.vocab_size = tokenizer.vocab_size
        self.start, self.end = tokenizer.special_ids[CALL_START], tokenizer.special_ids[CALL_END]
        self.turn_end = tokenizer.special_ids[ASSISTANT_END]
        self.names = ", ".join(tool.name for tool in tools)
        self._single = [tokenizer.mergeable_ranks[bytes([i])] for i in range(256)]
        vocabulary = _vocabulary(tokenizer)
        self._matcher = LLMatcher(vocabulary, _grammar(tools), log_level=0)
        if self._matcher.is_error():
            _name_the_fault(tools, vocabulary)
            raise ConfigError(f"no grammar can be made ({_first_line(self._matcher)})", f"functions {self.names}",
                              "give fewer functions")
        # from <|python_start|> on
        self.shortest = self.ending(self._matcher)

    def new_matcher(self) -> LLMatcher:
        return self._matcher.deep_copy()

    def mask(self, matcher: LLMatcher) -> Tensor:
        """(vocab_size,) bool: what may come next."""
        bits = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little")
        return torch.from_numpy(bits[:self.vocab_size].view(np.bool_))

    def ending(self, matcher: LLMatcher) -> list[int] | None:
        """Few tokens, the last <|python_end|>, that end the call; None if HORIZON are not enough."""
        copy = matcher.deep_copy()
        tokens: list[int] = []
        while len(tokens) < HORIZON:
            step = copy.compute_ff_tokens() or self._towards_end(copy.compute_bitmask())
            tokens += step
            if step == [self.end]:
                return tokens
            if not step or not copy.consume_tokens(step):
                return None
        return None

    def _towards_end(self, bits: bytes) -> list[int]:
        """One token of those allowed; empty if none is."""
        def free(token: int) -> bool:
            return bool(bits[token >> 3] >> (token & 7) & 1)

        single = self._single
        if free(self.end):
            return [self.end]
        if free(single[ord("~")]) and free(single[ord('"')]):        # inside a string, where } is just a character
            return [single[ord('"')]]
        return next(([single[byte]] for byte in (*_ENDS, *range(33, 256), 32) if free(single[byte])), [])


class Row:
    """Where one row stands in its calls. `text` is its prompt, which may end inside a call."""

    def __init__(self, constraint: CallConstraint, text: Sequence[int], stats: CallStats):
        self.constraint, self.stats = constraint, stats
        self.matcher: LLMatcher | None = None                # of the open call
        self.plan: list[int] = []                            # tokens that will end it, once there is no time for others
        opened = max((i for i, token in enumerate(text) if token == constraint.start), default=None)
        if opened is None or {constraint.end, constraint.turn_end} & set(text[opened:]):
            return
        self._open()
        assert self.matcher is not None
        if not self.matcher.consume_tokens(list(text[opened + 1:])):
            raise ConfigError(f"has an open call that is none of {constraint.names}", "prompt",
                              "end it, or leave it out")

    def allowed(self, left: int) -> Tensor | None:
        """(vocab_size,) bool: what may be the next token of `left`; None is anything."""
        c = self.constraint
        if self.matcher is not None:
            return c.mask(self.matcher)
        if left > HORIZON or c.shortest is None or left > len(c.shortest):
            return None
        mask = torch.ones(c.vocab_size, dtype=torch.bool)
        mask[c.start] = False                                # this call could not end
        return mask

    def take(self, token: int, left: int) -> int:
        """The token, drawn by the mask, becomes part of the text; `left` counts it. Another one if time is up."""
        if self.matcher is None:
            if token == self.constraint.start:
                self._open()
            return token
        token = self._in_time(token, left)
        if token == self.constraint.end:
            self.matcher = None
            self.stats.closed += 1
        elif not self.matcher.consume_token(token):
            raise ConfigError(f"the grammar gave up ({_first_line(self.matcher)})",
                              f"functions {self.constraint.names}", "simplify their schemas")
        return token

    def _open(self) -> None:
        self.matcher = self.constraint.new_matcher()
        self.stats.opened += 1

    def _in_time(self, token: int, left: int) -> int:
        if self.plan:
            return self.plan.pop(0)
        if left > HORIZON or token == self.constraint.end:
            return token
        assert self.matcher is not None
        after = self.matcher.deep_copy()
        after.consume_token(token)
        rest = self.constraint.ending(after)
        if rest is None or len(rest) >= left:
            now = self.constraint.ending(self.matcher)
            if now is not None and len(now) <= left:         # else it will be cut, whatever is written
                self.plan = now
                self.stats.hurried += 1
                return self.plan.pop(0)
        return token


@lru_cache(maxsize=2)
def _vocabulary(tokenizer: Tokenizer) -> LLTokenizer:
    """Ours as the library sees it. Its end of text is the end of a call; our other control tokens never match."""
    return LLTokenizer.from_tiktoken(                        # type: ignore[attr-defined]
        encoder=tokenizer.mergeable_ranks, special_tokens=tokenizer.special_ids, pattern=tokenizer.pattern,
        eos_token=tokenizer.special_ids[CALL_END], n_vocab=tokenizer.vocab_size, slices=None)


def _grammar(tools: Sequence[Function]) -> str:
    """In llguidance's Lark: one JSON schema for a call of each function."""
    rules = [f"call{i}: %json {to_json(_call_schema(tool), tool.name)}" for i, tool in enumerate(tools)]
    return "\n".join([f"start: {' | '.join(f'call{i}' for i in range(len(tools)))}", *rules])


def _call_schema(tool: Function) -> dict[str, Any]:
    arguments: dict[str, Any] = {"type": "object", **tool.parameters}
    shared: dict[str, Any] = {key: arguments.pop(key) for key in ("$defs", "definitions") if key in arguments}
    if "additionalProperties" not in arguments and not any(key in arguments for key in _JOINED):
        arguments["additionalProperties"] = False
    return {"x-guidance": {"whitespace_pattern": SPACE}, "type": "object", "additionalProperties": False,
            "properties": {"name": {"const": tool.name}, "arguments": arguments},
            "required": ["name", "arguments"], **shared}     # at the root, where "#/$defs/.." looks for them


def _name_the_fault(tools: Sequence[Function], vocabulary: LLTokenizer) -> None:
    for tool in tools:
        alone = LLMatcher(vocabulary, _grammar([tool]), log_level=0)
        if alone.is_error():
            raise ConfigError(f"its JSON schema cannot constrain a call ({_first_line(alone)})",
                              f"function {tool.name}", "correct the schema, or generate without a constraint")


def _first_line(matcher: LLMatcher) -> str:
    return json.dumps(matcher.get_error().split("\n")[0], ensure_ascii=False)[1:-1]
