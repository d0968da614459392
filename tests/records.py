"""Records of conversations in the canonical form, in few words."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]


def user(content: str) -> Record:
    return {"role": "user", "content": content}


def says(content: str, *calls: Record) -> Record:
    return {"role": "assistant", "content": content, **({"tool_calls": list(calls)} if calls else {})}


def call(name: str, /, **arguments: Any) -> Record:
    return {"name": name, "arguments": arguments}


def result(content: str) -> Record:
    return {"role": "tool", "content": content}


def function(name: str, description: str | None = None, **properties: Any) -> Record:
    about = {} if description is None else {"description": description}
    return {"name": name, **about, "parameters": {"type": "object", "properties": properties}}


F, G = function("f", "Does f.", x={"type": "integer"}), function("g")
