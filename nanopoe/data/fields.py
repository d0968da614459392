"""What the adapters share: fields of a record of a dataset, and DataErrors that name the field they are about.

A record is a dict as a jsonl line or a dataset of the hub gives it.
"""

from __future__ import annotations

from typing import Any

from nanopoe.data.conversations import Conversation, conversation_of, parse_json
from nanopoe.errors import DataError

Record = dict[str, Any]
NO_PARAMETERS: Record = {"type": "object", "properties": {}}


def bad(field: str, what: str) -> DataError:
    return DataError(what, f"field '{field}'")


def text_field(record: Record, field: str, empty: bool = False) -> str:
    """The string in `field`; DataError if it is missing, no string, or blank (unless `empty`)."""
    if field not in record:
        raise bad(field, f"is missing, there are: {', '.join(map(str, record))[:200] or 'none'}")
    value = record[field]
    if not isinstance(value, str):
        raise bad(field, f"is {type(value).__name__}, not a string")
    if not empty and not value.strip():
        raise bad(field, "is empty")
    return value


def optional_text(record: Record, field: str) -> str:
    """The string in `field`, "" where it is missing, null or blank."""
    return "" if record.get(field) is None or not text_field(record, field, empty=True).strip() else record[field]


def list_field(record: Record, field: str) -> list[Record]:
    """The list of objects in `field`, which may also be its JSON in a string."""
    value = record.get(field)
    if isinstance(value, str):
        value = parse_json(value, f"field '{field}'")
    if not isinstance(value, list):
        raise bad(field, "is missing" if value is None else f"is {type(value).__name__}, not a list")
    for i, entry in enumerate(value):
        if not isinstance(entry, dict):
            raise bad(f"{field}.{i}", f"is {type(entry).__name__}, not an object")
    return value


def parsed_object(value: Any, field: str) -> Record:
    """An object, or the JSON of one in a string."""
    if isinstance(value, str):
        value = parse_json(value, f"field '{field}'")
    if not isinstance(value, dict):
        raise bad(field, f"is {type(value).__name__}, not an object")
    return value


def user(content: str) -> Record:
    return {"role": "user", "content": content}


def assistant(content: str, calls: list[Record] | None = None) -> Record:
    return {"role": "assistant", "content": content, **({"tool_calls": calls} if calls else {})}


def system(content: str) -> list[Record]:
    """The message, or none of a blank text."""
    return [{"role": "system", "content": content}] if content.strip() else []


def made(messages: list[Record], tools: list[Record] | None, field: str) -> Conversation:
    """The checked conversation of what was read from `field`."""
    return conversation_of({"messages": messages, **({"tools": tools} if tools else {})}, f"field '{field}'")


def function_of(value: Record, field: str) -> Record:
    """A function schema: bare, or wrapped as OpenAI does, {"type": "function", "function": {..}}.

    `strict`, an instruction to OpenAI's servers, is left out; a function without parameters gets the schema of none.
    """
    if value.get("type") == "function" and isinstance(value.get("function"), dict):
        value = value["function"]
    known = {key: value[key] for key in ("name", "description") if value.get(key) is not None}
    other = set(value) - {"name", "description", "parameters", "strict"}
    if other:
        raise bad(field, f"a function with {', '.join(sorted(other))[:200]}")
    return {**known, "parameters": value.get("parameters") or NO_PARAMETERS}
