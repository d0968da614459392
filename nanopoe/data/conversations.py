"""A conversation in its one canonical form, checked when it is made and when it is read.

    {"messages":[{"role":"user","content":".."},
                 {"role":"assistant","content":"","tool_calls":[{"name":"f","arguments":{"x":1}}]},
                 {"role":"tool","content":"2"},
                 {"role":"assistant","content":".."}],
     "tools":[{"name":"f","description":"..","parameters":{"type":"object","properties":{"x":{"type":"integer"}}}}]}

A shard holds it as one compact JSON string a row: keys in this order, those of arguments and parameters as the source
has them, UTF-8. An optional system message comes first; then user and assistant take turns. The turn of the assistant
is one message, or messages with calls, each followed by one result per call, and a last message. That last message may
end the conversation with calls that have no results.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import Field, JsonValue, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from nanopoe.config.schema import Strict
from nanopoe.errors import DataError

_REDO = "write the folder again with scripts.prepare_data"
Name = Annotated[str, Field(min_length=1, max_length=256)]


class ToolCall(Strict):
    """A call the assistant writes; `arguments` by name, any JSON."""

    name: Name
    arguments: dict[str, JsonValue]


class Message(Strict):
    """What one role says. Only an assistant calls tools; a tool message is the result of one call."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str
    tool_calls: list[ToolCall] | None = Field(default=None, min_length=1)


class Function(Strict):
    """A tool: `parameters` is a JSON schema of type object."""

    name: Name
    description: str | None = None
    parameters: dict[str, JsonValue]


class Conversation(Strict):
    """Messages in a valid order, ending with the assistant; the tools its calls may name."""

    messages: list[Message] = Field(min_length=1)
    tools: list[Function] | None = Field(default=None, min_length=1)

    ends_with: ClassVar[tuple[str, ...]] = ("assistant",)

    @model_validator(mode="after")
    def _in_order(self) -> Conversation:
        _check_messages(self.messages, self.ends_with)
        _check_tools(self.messages, self.tools or ())
        return self

    def prompt(self) -> Prompt:
        """All but the last message: what the assistant answered with it."""
        return Prompt(messages=self.messages[:-1], tools=self.tools)


class Prompt(Conversation):
    """A conversation in which the assistant is to write next: it ends with a user or with results."""

    ends_with: ClassVar[tuple[str, ...]] = ("user", "tool")


AnyConversation = TypeVar("AnyConversation", bound=Conversation)


def _check_messages(messages: Sequence[Message], ends_with: tuple[str, ...]) -> None:
    """The order of roles, what each may hold, and a result for every call that is followed by anything."""
    expected, calls = "user", 0                     # calls: those of the last message with calls, without result yet
    for i, message in enumerate(messages):
        role = message.role
        if role == "system" and i == 0:
            _check_content(message, i)
            continue
        if role != expected:
            _wrong(i, f"expected {_ARTICLE[expected]} message, got {role}")
        _check_content(message, i)
        if role == "user":
            expected = "assistant"
        elif role == "assistant":
            calls = len(message.tool_calls or ())
            expected = "tool" if calls else "user"
        else:
            calls -= 1
            expected = "tool" if calls else "assistant"
    last = messages[-1]
    if last.role not in ends_with:
        _wrong(len(messages) - 1, f"ends with {_ARTICLE[last.role]} message, not {' or '.join(ends_with)}")
    if last.role == "tool" and calls:
        _wrong(len(messages) - 1, f"{calls} more calls have no result")


_ARTICLE = {"system": "a system", "user": "a user", "assistant": "an assistant", "tool": "a tool"}


def _check_content(message: Message, i: int) -> None:
    if message.tool_calls and message.role != "assistant":
        _wrong(i, f"tool calls of {_ARTICLE[message.role]} message")
    if message.role != "tool" and not message.tool_calls and not message.content.strip():
        _wrong(i, f"empty {message.role} message")


def _check_tools(messages: Iterable[Message], tools: Sequence[Function]) -> None:
    names = {tool.name for tool in tools}
    if len(names) < len(tools):
        raise PydanticCustomError("tools", "tools: two have the same name")
    for i, message in enumerate(messages):
        for call in message.tool_calls or ():
            if call.name not in names:
                _wrong(i, f"calls {call.name}, which is not among the tools")


def _wrong(i: int, what: str) -> NoReturn:
    raise PydanticCustomError("conversation", "{what}", {"what": f"messages.{i}: {what}"})


# -- to and from text -------------------------------------------------------------------------------------------------

def conversation_of(value: Any, where: str, do: str | None = None) -> Conversation:
    """`value`, as json.loads gives it, checked; DataError naming `where`, the message and what is wrong with it."""
    return _checked(Conversation, value, where, do)


def prompt_of(value: Any, where: str) -> Prompt:
    """As `conversation_of`, of a conversation in which the assistant is to write next."""
    return _checked(Prompt, value, where, None)


def _checked(kind: type[AnyConversation], value: Any, where: str, do: str | None) -> AnyConversation:
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        at = ".".join(map(str, first["loc"]))
        if first["type"] == "literal_error":                 # a role that is not known
            raise DataError(f"{at}: {str(first['input'])[:80]!r} is not known, there are {first['ctx']['expected']}",
                            where, do) from error
        raise DataError(f"{at}: {first['msg']}" if at else first["msg"], where, do) from error


def parse_conversation(text: str, where: str) -> Conversation:
    """The conversation of one row of a shard; DataError if it is none."""
    return conversation_of(parse_json(text, where, _REDO), where, do=_REDO)


def parse_json(text: str, where: str, do: str | None = None) -> Any:
    """json.loads as a DataError naming `where`; NaN and infinities, which are no JSON, are refused."""
    try:
        return json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON ({error})", where, do) from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def canonical(conversation: Conversation, where: str) -> str:
    """The one text of `conversation`: equal conversations, with keys in the same order, have equal texts."""
    value: dict[str, Any] = {"messages": [_message(message) for message in conversation.messages]}
    if conversation.tools is not None:
        value["tools"] = [function_json(tool) for tool in conversation.tools]
    text = to_json(value, where, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError("a lone surrogate, which is no Unicode text", where, "remove the character") from error
    return text


def _message(message: Message) -> dict[str, Any]:
    value: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls is not None:
        value["tool_calls"] = [call_json(call) for call in message.tool_calls]
    return value


def call_json(call: ToolCall) -> dict[str, Any]:
    return {"name": call.name, "arguments": call.arguments}


def function_json(tool: Function) -> dict[str, Any]:
    description = {} if tool.description is None else {"description": tool.description}
    return {"name": tool.name, **description, "parameters": tool.parameters}


def to_json(value: Any, where: str, **layout: Any) -> str:
    """json.dumps, not escaped to ASCII; a DataError for a number that JSON has not, or endless nesting."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, **layout)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot be written as JSON ({error})", where, "correct or remove it") from error
