"""train/ and val/ of prepared conversations: no copy of the one is in the other, however it was repeated."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nanopoe.data import embedded
from nanopoe.data.filters import WriteOptions
from nanopoe.data.greetings import GREETINGS
from nanopoe.data.ingest import Bad, Origin, Raw, Unit
from nanopoe.data.origins import chat_origin
from nanopoe.data.shards import CONVERSATION, open_source
from nanopoe.data.write import write_dataset

CHATS = WriteOptions(val_share=0.2, max_chars=None, column=CONVERSATION, greeting_copies=True, shard_bytes=50_000)


def normal(value: Any) -> Any:
    """Texts in lower case without white space, JSON in a text parsed, keys sorted."""
    if isinstance(value, dict):
        return {key: normal(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [normal(entry) for entry in value]
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = None
        return normal(parsed) if isinstance(parsed, dict | list) else re.sub(r"\s+", "", value.lower())
    return value


def hash_of(text: str) -> str:
    """Of a conversation as a shard has it: the same for its copies in another case, JSON layout or with a greeting."""
    value = json.loads(text)
    first = next(message for message in value["messages"] if message["role"] == "user")
    for greeting in sorted(GREETINGS, key=len, reverse=True):
        found = re.match(rf"\s*{re.escape(greeting)}(?![\w'’-])", first["content"], re.IGNORECASE)
        if found:
            first["content"] = first["content"][found.end():].lstrip(" ,.!")
            break
    return hashlib.sha256(json.dumps(normal(value)).encode()).hexdigest()


def hashes(folder: Path) -> dict[str, list[str]]:
    """Of every conversation of each split."""
    return {split: [hash_of(text) for text in open_source(split, folder / split, column=CONVERSATION).texts()]
            for split in ("train", "val")}


@dataclass(frozen=True)
class ByText:
    """The first 1000 conversations of a unit and a copy of each, all split by their own text: repeated before it."""

    origin: Origin
    label: str = ""

    @property
    def source(self) -> dict[str, Any]:
        return {"kind": "test"}

    def units(self) -> list[Unit]:
        return self.origin.units()

    def read(self, unit: Unit, start: int) -> Iterator[tuple[Raw | Bad, int]]:
        for row, size in islice(self.origin.read(unit, start), 1000):
            assert isinstance(row, Raw)
            yield replace(row, group=None), size
            yield replace(row, text=row.text.replace('"content":"', '"content":"Hello, ', 1), group=None), size


def variants(i: int) -> list[dict[str, Any]]:
    """Conversation `i` in every form of it that a source may have, as records of OpenAI's form."""
    tools = [{"name": "add", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
             {"parameters": {"properties": {"x": {"type": "integer"}}, "type": "object"}, "name": "add"}]

    def chat(question: str, arguments: Any, tool: dict[str, Any], result: str, answer: str) -> dict[str, Any]:
        return {"messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": arguments}]},
            {"role": "tool", "content": result}, {"role": "assistant", "content": answer}], "tools": [tool]}

    def forms(question: str) -> Iterator[dict[str, Any]]:
        value, told, end = {"x": i, "y": [1, 2]}, {"sum": i + 1}, f"It is {i + 1}."
        yield chat(question, value, tools[0], json.dumps(told), end)
        yield chat(question, json.dumps(value, indent=4), tools[1], json.dumps(told, indent=2), end)
        yield chat(question, {"y": [1, 2], "x": i}, tools[1], json.dumps(told), end.upper())

    asked = f"what is {i} plus 1?"
    return [form for question in (asked, asked.upper(), f"Hello, {asked}", f"hello {asked}", f"HEY! {asked}", asked)
            for form in forms(question)]


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Origin:
    """A folder with 100 conversations, each in 18 forms, far from each other."""
    folder = tmp_path_factory.mktemp("chats")
    rows = [form for forms in zip(*(variants(i) for i in range(100)), strict=True) for form in forms]
    for part in range(2):
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[part::2]))
    return chat_origin("messages", folder, None)


@pytest.mark.parametrize("source", ["chats", "embedded"])
def test_no_copy_of_a_training_conversation_is_in_val(source: str, chats: Origin, tmp_path: Path,
                                                      request: pytest.FixtureRequest,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    if source == "embedded":                                                 # made once, not for every reading
        made = request.getfixturevalue("embedded")
        monkeypatch.setattr(embedded, "embedded_conversations", lambda: iter(made))
    origin = chats if source == "chats" else chat_origin("embedded", None, None)
    options = CHATS if source == "chats" else replace(CHATS, shard_bytes=1 << 20)
    manifest = write_dataset(origin, tmp_path / "d", options)
    found = hashes(tmp_path / "d")
    train, val = set(found["train"]), set(found["val"])
    assert not train & val
    assert len(found["train"]) > len(train)                                  # repeated, by the input or as greetings
    assert 0.1 < len(val) / len(train | val) < 0.3
    if source == "chats":
        assert len(train | val) == 100
        assert len(found["train"]) + len(found["val"]) > 1800 == manifest["counts"]["documents"]
    write_dataset(ByText(origin), tmp_path / "e", options)                   # control
    leaked = hashes(tmp_path / "e")
    assert len(set(leaked["train"]) & set(leaked["val"])) > 50


def test_the_hash_tells_conversations_apart(chats: Origin) -> None:
    found = {hash_of(row.text) for unit in chats.units() for row, _ in chats.read(unit, 0) if isinstance(row, Raw)}
    assert len(found) == 100
