"""What counts as a copy of a conversation: train/ and val/ share none."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from nanopoe.data.greetings import without_greeting


def copy_key(text: str) -> str:
    """A hash of a canonical conversation, the same for its copies: in another case or white space, with or without a
    greeting, or with JSON in another layout or order of keys."""
    value = json.loads(text)
    first = next(message for message in value["messages"] if message["role"] == "user")
    first["content"] = without_greeting(first["content"])
    try:
        plain = json.dumps(_plain(value), sort_keys=True)
    except RecursionError:                                   # nested beyond sense
        plain = text
    return hashlib.blake2b(plain.encode(), digest_size=16).hexdigest()


def _plain(value: Any) -> Any:
    """Texts in one case without white space, but JSON in a text as its value."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    if not isinstance(value, str):
        return value
    if value.lstrip()[:1] in ("{", "["):
        try:
            return _plain(json.loads(value))
        except ValueError:
            pass                                             # a text like any other
    return "".join(value.split()).casefold()
