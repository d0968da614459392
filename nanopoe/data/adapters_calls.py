"""Records of glaive-function-calling-v2 and xlam-function-calling-60k to conversations with tools.

Both keep JSON inside strings, each in a way of its own.
"""

from __future__ import annotations

import json
import re
from typing import Any

from nanopoe.data.conversations import Conversation
from nanopoe.data.fields import (
    NO_PARAMETERS,
    Record,
    assistant,
    bad,
    function_of,
    list_field,
    made,
    parsed_object,
    system,
    text_field,
    user,
)

# -- glaive -----------------------------------------------------------------------------------------------------------

# The system text is one of these two sentences; the first is followed by the functions, JSON with indent 4.
_WITH_TOOLS = "You are a helpful assistant with access to the following functions. Use them if required -"
_ROLE = re.compile(r"(?:\A|\n\n\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")
_STRAY_ROLE = re.compile(r"^(USER|ASSISTANT|FUNCTION RESPONSE): ", re.MULTILINE)
_END, _CALL = "<|endoftext|>", "<functioncall>"
# {"name": "f", "arguments": '{"x": 1}'}: the quotes are single, so it is no JSON
_SINGLE_QUOTED = re.compile(r"\{\s*\"name\":\s*(\"[^\"]+\"),\s*\"arguments\":\s*'(.*)'\s*\}", re.DOTALL)


def glaive(record: Record) -> Conversation:
    """{system: "SYSTEM: ..", chat: "USER: ..\\n\\n\\nASSISTANT: .. <|endoftext|>\\n\\n\\nFUNCTION RESPONSE: .."}.

    The sentence in front of the functions is left out: rendering has its own.
    """
    intro, tools = _glaive_system(text_field(record, "system"))
    messages = system(intro)
    open_text = ""                                           # of an ASSISTANT without end, which the next one goes on
    for role, text in _glaive_turns(text_field(record, "chat")):
        if open_text and role != "ASSISTANT":
            messages.append(assistant(open_text))
            open_text = ""
        if role == "USER":
            messages.append(user(text))
        elif role == "FUNCTION RESPONSE":
            messages.append({"role": "tool", "content": text})
        elif text.endswith(_END) or _CALL in text:
            said = f"{open_text}\n\n{text}" if open_text else text
            messages.append(_glaive_answer(said.removesuffix(_END).rstrip()))
            open_text = ""
        else:
            open_text = f"{open_text}\n\n{text}" if open_text else text
    if open_text:
        messages.append(assistant(open_text))
    return made(messages, tools, "chat")


def _glaive_system(text: str) -> tuple[str, list[Record]]:
    if not text.startswith("SYSTEM:"):
        raise bad("system", "does not begin with SYSTEM:")
    text = text.removeprefix("SYSTEM:").strip()
    if not text.startswith(_WITH_TOOLS):
        return text, []
    rest, decoder = text.removeprefix(_WITH_TOOLS), json.JSONDecoder()
    tools: list[Record] = []
    at = len(rest) - len(rest.lstrip())
    while at < len(rest):
        try:
            tool, at = decoder.raw_decode(rest, at)
        except (ValueError, RecursionError) as error:
            raise bad("system", f"function {len(tools) + 1} is not JSON ({error})") from error
        tools.append(function_of(parsed_object(tool, "system"), "system"))
        while at < len(rest) and rest[at].isspace():
            at += 1
    return "", tools


def _glaive_turns(chat: str) -> list[tuple[str, str]]:
    """(role, stripped text) in order."""
    before, *parts = _ROLE.split(chat)
    if before.strip() or not parts:
        raise bad("chat", "does not begin with USER:")
    turns = [(role, text.strip()) for role, text in zip(parts[0::2], parts[1::2], strict=True)]
    for i, (role, text) in enumerate(turns):
        if stray := _STRAY_ROLE.search(text):
            raise bad("chat", f"turn {i + 1}, of {role}, has a line with {stray[1]}: in it")
        if _END in (text.removesuffix(_END) if role == "ASSISTANT" else text):
            raise bad("chat", f"turn {i + 1}, of {role}, has {_END} in it")
    if turns[-1] == ("ASSISTANT", ""):                       # what the model was asked to go on with
        turns.pop()
    return turns


def _glaive_answer(text: str) -> Record:
    content, *calls = text.split(_CALL)
    return assistant(content.rstrip() if calls else content, [_glaive_call(call.strip()) for call in calls])


def _glaive_call(text: str) -> Record:
    quoted = _SINGLE_QUOTED.fullmatch(text)
    if quoted is None:
        call = parsed_object(text, "chat")
        arguments = call.get("arguments", {})
        if set(call) - {"name", "arguments"}:
            raise bad("chat", f"a call with {', '.join(sorted(call))}, not name and arguments")
        return {"name": call.get("name"), "arguments": parsed_object(arguments, "chat")}
    name, inner = json.loads(quoted[1]), quoted[2]
    try:                                                     # strict=False: line ends in strings are not escaped
        arguments = json.loads(inner, strict=False)
    except (ValueError, RecursionError):
        try:
            arguments = json.loads(inner.replace("\\'", "'"), strict=False)
        except (ValueError, RecursionError) as error:
            raise bad("chat", f"arguments of {name} are not JSON ({error})") from error
    return {"name": name, "arguments": parsed_object(arguments, "chat")}


# -- xlam -------------------------------------------------------------------------------------------------------------

_TYPES = {"str": "string", "string": "string", "int": "integer", "integer": "integer", "float": "number",
          "number": "number", "bool": "boolean", "boolean": "boolean", "list": "array", "array": "array",
          "tuple": "array", "set": "array", "dict": "object", "object": "object", "none": "null"}


def xlam(record: Record) -> Conversation:
    """{query, tools, answers}; the last two are JSON in strings. The answer is all the calls at once, no results."""
    tools = [_xlam_tool(tool, i) for i, tool in enumerate(list_field(record, "tools"))]
    calls = list_field(record, "answers")
    if not calls:
        raise bad("answers", "is empty")
    return made([user(text_field(record, "query")), assistant("", calls)], tools, "answers")


def _xlam_tool(tool: Record, i: int) -> Record:
    """Parameters are flat, {x: {"description": .., "type": "str, optional", "default": ..}}, and become a schema."""
    tool = function_of(tool, f"tools.{i}")
    flat = tool["parameters"]
    if flat == NO_PARAMETERS or not isinstance(flat, dict) or flat.get("type") == "object":
        return tool                                          # already one; what is none fails with the conversation
    schema: Record = {"type": "object", "properties": {}}
    required = []
    for name, about in flat.items():
        where = f"tools.{i}.parameters.{name}"
        about = parsed_object(about, where)
        kind, is_optional = _without_optional(text_field(about, "type", empty=True))
        entry = json_type(kind, where)
        schema["properties"][name] = {**entry, **{key: about[key] for key in ("description", "default", "enum")
                                                  if about.get(key) is not None}}
        if not is_optional:
            required.append(name)
    if required:
        schema["required"] = required
    return {**tool, "parameters": schema}


def _without_optional(kind: str) -> tuple[str, bool]:
    """`str, optional` and `Optional[str]` are a str that may be left out."""
    bare = kind.strip()
    short = re.sub(r",\s*(optional|default\b.*)$", "", bare, flags=re.IGNORECASE | re.DOTALL)
    inside = re.fullmatch(r"(?i:optional)\[(.*)\]", short, flags=re.DOTALL)
    return (inside[1] if inside else short).strip(), inside is not None or short != bare


def json_type(kind: str, where: str) -> dict[str, Any]:
    """The JSON schema of a Python type as text: `str`, `List[int]`, `Dict[str, float]`, `Union[int, str]`, `Any`."""
    head, _, rest = kind.strip().partition("[")
    head, inside = head.strip().lower(), _arguments(rest.removesuffix("]")) if rest else []
    if head in ("", "any"):
        return {}
    if head == "union" and inside:
        return {"anyOf": [json_type(part, where) for part in inside]}
    if head == "optional" and len(inside) == 1:
        return {"anyOf": [json_type(inside[0], where), {"type": "null"}]}
    if head == "callable":
        return {"type": "string"}                            # its name or its source
    if head not in _TYPES:
        raise bad(where, f"type {kind[:80]!r} is not known")
    found: dict[str, Any] = {"type": _TYPES[head]}
    if head in ("list", "array", "set") and len(inside) == 1 and (items := json_type(inside[0], where)):
        found["items"] = items
    return found


def _arguments(text: str) -> list[str]:
    """`str, List[int]` cut at the commas that are in no brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(character, 0)
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]
