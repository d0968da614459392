"""The one canonical form of conversations: what is wrong is named; copies with other greetings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.data.conversations import Conversation, Prompt, canonical, conversation_of, parse_conversation, prompt_of
from nanopoe.data.greetings import greeting_copies, with_other_greeting
from nanopoe.data.ingest import Raw
from nanopoe.errors import DataError
from tests.records import F, G, Record, call, result, says, user

# -- the form ---------------------------------------------------------------------------------------------------------

GOOD = [
    [user("a"), says("b")],
    [{"role": "system", "content": "s"}, user("a"), says("b"), user("c"), says("d")],
    [user("a"), says("", call("f", x=1))],                                              # ends with a call
    [user("a"), says("", call("f", x=1), call("g")), result("1"), result(""), says("b")],
    [user("a"), says("t", call("f")), result("1"), says("", call("g")), result("2"), says("b"), user("c"), says("d")],
]
BAD = [
    ([], "messages: List should have at least 1 item"),
    ([user("a")], "messages.0: ends with a user message, not assistant"),
    ([user("a"), says("b"), user("c")], "messages.2: ends with a user message, not assistant"),
    ([user("a"), says("", call("f")), result("1")], "messages.2: ends with a tool message, not assistant"),
    ([says("b"), user("a")], "messages.0: expected a user message, got assistant"),
    ([user("a"), user("b"), says("c")], "messages.1: expected an assistant message, got user"),
    ([user("a"), says("b"), says("c")], "messages.2: expected a user message, got assistant"),
    ([user("a"), {"role": "system", "content": "s"}, says("b")], "messages.1: expected an assistant message, got sys"),
    ([user("a"), says("b"), result("1"), says("c")], "messages.2: expected a user message, got tool"),
    ([user("a"), says("", call("f")), says("b")], "messages.2: expected a tool message, got assistant"),
    ([user("a"), says("", call("f"), call("g")), result("1"), says("b")], "messages.3: expected a tool message"),
    ([user("a"), says("", call("f")), user("b"), says("c")], "messages.2: expected a tool message, got user"),
    ([user("a"), says("", call("h"))], "messages.1: calls h, which is not among the tools"),
    ([user("a"), {**says("b"), "tool_calls": []}], "messages.1.tool_calls: List should have at least 1 item"),
    ([{**user("a"), "tool_calls": [call("f")]}, says("b")], "messages.0: tool calls of a user message"),
    ([user(" \n"), says("b")], "messages.0: empty user message"),
    ([user("a"), says("")], "messages.1: empty assistant message"),
    ([{"role": "system", "content": ""}, user("a"), says("b")], "messages.0: empty system message"),
    ([user("a"), {"role": "bot", "content": "b"}], "messages.1.role: 'bot' is not known, there are 'system',"),
    ([user("a"), {"role": "assistant", "content": None}], "messages.1.content: Input should be a valid string"),
    ([user("a"), {"role": "assistant"}], "messages.1.content: Field required"),
    ([user("a"), {**says("b"), "weight": 1}], "messages.1.weight: Extra inputs are not permitted"),
    ([user("a"), says("", {"name": "f", "arguments": "{}"})], "messages.1.tool_calls.0.arguments: Input should be a"),
]


@pytest.mark.parametrize("messages", GOOD)
def test_good_conversations_round_trip(messages: list[Record]) -> None:
    value = {"messages": messages, "tools": [F, G]}
    text = canonical(conversation_of(value, "x"), "x")
    assert json.loads(text) == value
    assert canonical(parse_conversation(text, "x"), "x") == text
    assert ": " not in text
    assert text.startswith('{"messages":[{"role":')
    shuffled = {"tools": [dict(reversed(list(f.items()))) for f in (F, G)], "messages": messages}
    assert canonical(conversation_of(shuffled, "x"), "x") == text            # our keys have one order
    other = {"tools": [F, {**G, "description": "new"}], "messages": messages}
    assert canonical(conversation_of(other, "x"), "x") != text               # control


@pytest.mark.parametrize("messages, words", BAD)
def test_bad_conversations_are_named(messages: list[Record], words: str) -> None:
    with pytest.raises(DataError) as caught:
        conversation_of({"messages": messages, "tools": [F, G]}, "here")
    assert caught.value.where == "here"
    assert caught.value.what.startswith(words)
    assert "\n" not in str(caught.value)


def test_tools_are_checked() -> None:
    with pytest.raises(DataError, match="two have the same name"):
        conversation_of({"messages": GOOD[0], "tools": [F, F]}, "x")
    with pytest.raises(DataError, match=r"tools: List should have at least 1"):
        conversation_of({"messages": GOOD[0], "tools": []}, "x")
    with pytest.raises(DataError, match=r"calls f, which is not among the tools"):
        conversation_of({"messages": GOOD[2]}, "x")
    with pytest.raises(DataError, match=r"tools.0.parameters: Field required"):
        conversation_of({"messages": GOOD[0], "tools": [{"name": "f"}]}, "x")


def test_text_that_is_no_conversation() -> None:
    for text, words in (("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "valid dictionary"),
                        ('{"messages":[],"x":1}', "messages"), ('{"messages": NaN}', "NaN is no JSON number")):
        with pytest.raises(DataError, match=words) as caught:
            parse_conversation(text, "shard row 3")
        assert caught.value.where == "shard row 3"


def test_what_no_json_can_hold_is_refused() -> None:
    def with_argument(value: Any) -> Conversation:
        return conversation_of({"messages": [user("a"), says("", call("f", x=value))], "tools": [F]}, "x")

    for value in (float("nan"), float("inf")):
        with pytest.raises(DataError, match="cannot be written as JSON"):
            canonical(with_argument(value), "x")
    with pytest.raises(DataError, match="lone surrogate"):
        canonical(with_argument("\ud800"), "x")
    assert '"x":1.5' in canonical(with_argument(1.5), "x")                   # control


def test_prompts_end_where_the_assistant_writes() -> None:
    whole = conversation_of({"messages": GOOD[3], "tools": [F, G]}, "x")
    assert isinstance(whole.prompt(), Prompt)
    assert [m.role for m in whole.prompt().messages] == ["user", "assistant", "tool", "tool"]
    prompt_of({"messages": GOOD[0][:1]}, "x")
    for messages in (GOOD[0], GOOD[3][:3]):
        with pytest.raises(DataError, match=r"ends with an assistant message|1 more calls have no result"):
            prompt_of({"messages": messages, "tools": [F, G]}, "x")


FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | FLOATS | st.text(),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
                    max_leaves=8)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_any_arguments_round_trip(arguments: dict[str, Any]) -> None:
    value = {"messages": [user("a"), says("", {"name": "f", "arguments": arguments})], "tools": [F]}
    text = canonical(conversation_of(value, "x"), "x")
    assert json.loads(text) == value
    assert canonical(parse_conversation(text, "x"), "x") == text


# -- greetings --------------------------------------------------------------------------------------------------------

def chat(first: str, *more: Record) -> str:
    return canonical(conversation_of({"messages": [*more, user(first), says("Hello.")]}, "x"), "x")


@pytest.mark.parametrize("first, forms", [
    ("hi, can you help?", {"HI", "Hi"}), ("Hello", {"hello", "HELLO"}), ("  yo what now", {"YO", "Yo"}),
    ("Good Morning to you", {"good morning", "GOOD MORNING", "Good morning"}), ("hI there!", {"hi there", "HI THERE",
                                                                               "Hi There", "Hi there"}),
    ("what's up?", {"WHAT'S UP", "What's Up", "What's up"}), ("HEY\nyou", {"hey", "Hey"}),
])
def test_greetings_are_copied_in_another_case(first: str, forms: set[str]) -> None:
    seen = set()
    for seed in range(60):
        text = with_other_greeting(chat(first), "x", seed)
        assert text is not None
        copied = json.loads(text)["messages"][0]["content"]
        assert copied.lower() == first.lower()
        assert copied != first
        seen.add(copied.strip()[:len(max(forms, key=len))])
    assert seen == forms


@pytest.mark.parametrize("first", ["You are a poet", "yo-yo tricks", "Hi-fi systems", "His name", "Heyday of x",
                                   "sup's", "Say hello", "Supper", "Yosemite", "hello_world", "Good mornings"])
def test_what_only_begins_like_a_greeting_is_not_copied(first: str) -> None:
    assert with_other_greeting(chat(first), "x") is None


def test_greeting_copies_follow_their_originals() -> None:
    system = {"role": "system", "content": "hi"}
    raws = [Raw(chat("hi, a"), "r0", "g0"), Raw(chat("What?"), "r1"), Raw(chat("Hello b", system), "r2")]
    copies = list(greeting_copies(iter(raws)))
    assert [raw.where for raw in copies] == ["r0", "r0, greeting copy", "r1", "r2", "r2, greeting copy"]
    assert [copies[0], copies[2], copies[3]] == raws
    assert copies[1].group == "g0"                                           # stays in the split of its original
    first, copied = json.loads(raws[2].text)["messages"], json.loads(copies[4].text)["messages"]
    assert (copied[0], copied[2]) == (first[0], first[2])                    # the greeting of the system is none
    assert copied[1]["content"].endswith(" b")
    assert copies == list(greeting_copies(iter(raws)))
    assert {c.text for s in range(20) for c in greeting_copies(iter(raws), s)} > {c.text for c in copies}
