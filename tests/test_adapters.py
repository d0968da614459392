"""From records as the sources have them to the one canonical form; what is wrong is named, and nothing is guessed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nanopoe.data.adapters import ADAPTERS, CALCULATOR, adapter, conversations_of
from nanopoe.data.adapters_calls import json_type
from nanopoe.data.filters import WriteOptions
from nanopoe.data.origins import chat_origin
from nanopoe.data.shards import CONVERSATION
from nanopoe.data.write import write_dataset
from nanopoe.errors import ConfigError, DataError
from tests.records import F, G, Record, call, result, says, user
from tests.test_conversations import GOOD

GLAIVE_RATE = {"name": "get_exchange_rate", "description": "Rate between two currencies", "parameters": {
    "type": "object", "properties": {"base": {"type": "string", "description": "From"}, "note": {"type": "string"}},
    "required": ["base"]}}
GLAIVE_NOW = {"name": "now", "description": "The time"}
GLAIVE_SYSTEM = ("SYSTEM: You are a helpful assistant with access to the following functions. Use them if required -\n"
                 + json.dumps(GLAIVE_RATE, indent=4) + "\n\n" + json.dumps(GLAIVE_NOW, indent=4) + "\n")
GLAIVE_CHAT = (
    "USER: Hi! What's a dollar in euros?\n\n\n"
    "ASSISTANT: Let me look. <functioncall> {\"name\": \"get_exchange_rate\", \"arguments\": '{\"base\": \"USD\", "
    "\"note\": \"it\\'s\nurgent\"}'} <|endoftext|>\n\n\n"
    "FUNCTION RESPONSE: {\"rate\": 0.82}\n\n\n"
    "ASSISTANT: It is 0.82.\n\nAnything else? <|endoftext|>\n\n\n"
    "USER: The time?\n\n\n"
    "ASSISTANT: <functioncall> {\"name\": \"now\", \"arguments\": '{}'} <|endoftext|>\n\n\n"
    "FUNCTION RESPONSE: {\"now\": \"12:00\"}\n\n\n"
    "ASSISTANT: Noon. <|endoftext|>\n\n\n")
NO_PARAMETERS = {"type": "object", "properties": {}}
XLAM_TOOLS = [{"name": "f", "description": "Does f.", "parameters": {
    "x": {"description": "An x", "type": "int"},
    "names": {"description": "Names", "type": "List[str], optional", "default": ""}}},
    {"name": "g", "description": "Does g.", "parameters": {}}]
XLAM_SCHEMAS = [{"name": "f", "description": "Does f.", "parameters": {
    "type": "object", "properties": {
        "x": {"type": "integer", "description": "An x"},
        "names": {"type": "array", "items": {"type": "string"}, "description": "Names", "default": ""}},
    "required": ["x"]}}, {"name": "g", "description": "Does g.", "parameters": NO_PARAMETERS}]
GSM8K = {"question": "Ana has 3 bags of 4 and eats 2.", "answer":
         "She has 3*4 = <<3*4=12>>12.\nThen 12-2 = $<<12-2=10>>10.\n#### 10"}
OPENAI_CALLS = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": ""}}]
SHARE_TOOLS = json.dumps([F, G])

CASES: list[tuple[str, Record, list[Record], list[Record] | None]] = [
    ("glaive-function-calling-v2", {"system": GLAIVE_SYSTEM, "chat": GLAIVE_CHAT}, [
        user("Hi! What's a dollar in euros?"),
        says("Let me look.", call("get_exchange_rate", base="USD", note="it's\nurgent")), result('{"rate": 0.82}'),
        says("It is 0.82.\n\nAnything else?"), user("The time?"), says("", call("now")), result('{"now": "12:00"}'),
        says("Noon.")], [GLAIVE_RATE, {**GLAIVE_NOW, "parameters": NO_PARAMETERS}]),
    ("glaive-function-calling-v2",
     {"system": "SYSTEM: You are a helpful assistant, with no access to external functions.",
      "chat": "USER: Why?\n\n\nASSISTANT: Because. <|endoftext|>\n\n\nUSER: And?\n\n\nASSISTANT: So.\n\n\nASSISTANT: "},
     [{"role": "system", "content": "You are a helpful assistant, with no access to external functions."},
      user("Why?"), says("Because."), user("And?"), says("So.")], None),
    ("glaive-function-calling-v2",           # a turn in two pieces, arguments that are an object, or missing
     {"system": GLAIVE_SYSTEM, "chat": "USER: Now?\n\n\nASSISTANT: Sure.\n\n\nASSISTANT: <functioncall> "
      "{\"name\": \"now\", \"arguments\": {\"zone\": \"UTC\"}} <functioncall> {\"name\": \"now\"} <|endoftext|>"},
     [user("Now?"), says("Sure.", call("now", zone="UTC"), call("now"))],
     [GLAIVE_RATE, {**GLAIVE_NOW, "parameters": NO_PARAMETERS}]),
    ("xlam-function-calling-60k", {"id": 0, "query": "f of 1, and g?", "tools": json.dumps(XLAM_TOOLS),
                                   "answers": json.dumps([call("f", x=1), call("g")])},
     [user("f of 1, and g?"), says("", call("f", x=1), call("g"))], XLAM_SCHEMAS),
    ("xlam-function-calling-60k", {"query": "g?", "tools": XLAM_SCHEMAS, "answers": [call("g")]},    # as lists
     [user("g?"), says("", call("g"))], XLAM_SCHEMAS),
    ("gsm8k", GSM8K, [user(GSM8K["question"]), says("She has 3*4 = 12.\nThen 12-2 = $10.\n#### 10")], None),
    ("gsm8k-calculator", GSM8K, [
        user(GSM8K["question"]), says("She has 3*4 = ", call("calculator", expression="3*4")), result("12"),
        says("12.\nThen 12-2 = $", call("calculator", expression="12-2")), result("10"), says("10.\n#### 10")],
     [CALCULATOR]),
    ("math-instruct", {"source": "data/CoT/x.json", "instruction": "1+1?", "output": "2"},
     [user("1+1?"), says("2")], None),
    ("code-alpaca-20k", {"instruction": "Sort.", "input": "3, 1", "output": "1, 3"},
     [user("Sort.\n\n3, 1"), says("1, 3")], None),
    ("code-alpaca-20k", {"instruction": "Say hi.", "input": "", "output": "hi"}, [user("Say hi."), says("hi")], None),
    ("magicoder-evol-instruct-110k", {"instruction": "A loop.", "response": "for _ in x: ..."},
     [user("A loop."), says("for _ in x: ...")], None),
    ("ultrachat-200k", {"prompt": "a", "prompt_id": "0", "messages": [
        {"content": "a", "role": "user"}, {"content": "b", "role": "assistant"}]}, [user("a"), says("b")], None),
    ("openhermes-2.5", {"source": "x", "title": None, "system_prompt": None, "conversations": [
        {"from": "system", "value": "s", "weight": None}, {"from": "human", "value": "a", "weight": 0},
        {"from": "gpt", "value": "b", "weight": 1}]}, [{"role": "system", "content": "s"}, user("a"), says("b")], None),
    ("smoltalk", {"source": "x", "messages": [
        {"content": "", "role": "system"}, {"content": "a", "role": "user"}, {"content": "b", "role": "assistant"},
        {"content": "c", "role": "user"}, {"content": "d", "role": "assistant"}]},
     [user("a"), says("b"), user("c"), says("d")], None),
    ("smol-smoltalk", {"source": "x", "messages": [user("a"), says("b")]}, [user("a"), says("b")], None),
    ("alpaca", {"instruction": "a", "output": "b", "system": "s"},
     [{"role": "system", "content": "s"}, user("a"), says("b")], None),
    ("sharegpt", {"id": "x", "tools": SHARE_TOOLS, "conversations": [
        {"from": "human", "value": "a"}, {"from": "function_call", "value": json.dumps(call("f", x=1))},
        {"from": "observation", "value": "1"}, {"from": "gpt", "value": "b"}]},
     [user("a"), says("", call("f", x=1)), result("1"), says("b")], [F, G]),
    ("messages", {"tools": [{"type": "function", "function": {**F, "strict": True}}, G], "messages": [
        {"role": "system", "content": "s"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [
            OPENAI_CALLS[0], {**OPENAI_CALLS[1], "function": {"name": "g", "arguments": "{}"}}]},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},                              # not as called
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1"},
        {"role": "assistant", "content": "b", "tool_calls": None}]},
     [{"role": "system", "content": "s"}, user("ab"), says("", call("f", x=1), call("g")), result("1"), result("2"),
      says("b")], [F, G]),
    ("messages", {"messages": GOOD[4], "tools": [F, G]}, GOOD[4], [F, G]),                   # canonical already
]


@pytest.mark.parametrize("name, record, messages, tools", CASES, ids=[f"{i} {c[0]}" for i, c in enumerate(CASES)])
def test_adapters(name: str, record: Record, messages: list[Record], tools: list[Record] | None) -> None:
    before = json.dumps(record)
    [raw] = conversations_of(name, [record])
    assert json.loads(raw.text) == {"messages": messages, **({"tools": tools} if tools else {})}
    assert raw.where == f"{name} row 0"
    assert raw.group is None
    assert json.dumps(record) == before                                      # the record is left as it is


def test_every_adapter_has_a_fixture() -> None:
    assert set(ADAPTERS) == {case[0] for case in CASES}
    for name, known in ADAPTERS.items():
        assert (known.hub_id is None) == (name in ("alpaca", "sharegpt", "messages"))
    assert adapter("ultrachat-200k").split == "train_sft"
    assert adapter("xlam-function-calling-60k").gated
    with pytest.raises(ConfigError, match=r"no adapter 'gsm'.*gsm8k"):
        adapter("gsm")


def glaive_chat(chat: str) -> Record:
    return {"system": GLAIVE_SYSTEM, "chat": chat}


def openai(*messages: Record, **more: Any) -> Record:
    return {"messages": list(messages), **more}


BAD_ROWS: list[tuple[str, Any, str]] = [
    ("math-instruct", "text", "is str, not an object"),
    ("math-instruct", {"instruction": "a"}, "field 'output': is missing, there are: instruction"),
    ("math-instruct", {"instruction": "a", "output": None}, "field 'output': is NoneType, not a string"),
    ("math-instruct", {"instruction": " ", "output": "b"}, "field 'instruction': is empty"),
    ("alpaca", {"instruction": "a", "input": 3, "output": "b"}, "field 'input': is int, not a string"),
    ("magicoder-evol-instruct-110k", {"instruction": "a", "response": "\udc00"}, "lone surrogate"),
    ("gsm8k", {"question": "a", "answer": "no number"}, "field 'answer': has no line '#### number'"),
    ("gsm8k", {"question": "a", "answer": "<<1+1>>\n#### 2"}, "field 'answer': has a calculator mark that is none"),
    ("glaive-function-calling-v2", {"system": "You", "chat": "x"}, "field 'system': does not begin with SYSTEM:"),
    ("glaive-function-calling-v2", {"system": GLAIVE_SYSTEM[:-20], "chat": GLAIVE_CHAT},
     "field 'system': function 2 is not JSON"),
    ("glaive-function-calling-v2", glaive_chat("ASSISTED: x"), "field 'chat': does not begin with USER:"),
    ("glaive-function-calling-v2", glaive_chat("USER: a\n\n\nASSISTANT: b <|endoftext|>\n\n\nUSER: thanks"),
     "field 'chat': messages.2: ends with a user message"),
    ("glaive-function-calling-v2", glaive_chat("USER: a\nASSISTANT: b <|endoftext|>"),
     "field 'chat': turn 1, of USER, has a line with ASSISTANT: in it"),
    ("glaive-function-calling-v2", glaive_chat("USER: a\n\n\nASSISTANT: b <|endoftext|> c <|endoftext|>"),
     "field 'chat': turn 2, of ASSISTANT, has <|endoftext|> in it"),
    ("glaive-function-calling-v2", glaive_chat("USER: a\n\n\nASSISTANT: b <|endoftext|>\n\n\nASSISTANT: c"),
     "field 'chat': messages.2: expected a user message"),
    ("glaive-function-calling-v2", glaive_chat("USER: a\n\n\nASSISTANT: <functioncall> {\"name\": \"now\", "
                                               "\"arguments\": '{\"x\": }'} <|endoftext|>"),
     "field 'chat': arguments of now are not JSON"),
    ("glaive-function-calling-v2", glaive_chat("USER: a\n\n\nASSISTANT: <functioncall> now() <|endoftext|>"),
     "field 'chat': not JSON"),
    ("glaive-function-calling-v2", glaive_chat("USER: a\n\n\nASSISTANT: <functioncall> {\"name\": \"later\"}"),
     "field 'chat': messages.1: calls later, which is not among the tools"),
    ("xlam-function-calling-60k", {"query": "a", "tools": "[", "answers": "[]"}, "field 'tools': not JSON"),
    ("xlam-function-calling-60k", {"query": "a", "tools": "[1]", "answers": "[]"}, "field 'tools.0': is int, not an"),
    ("xlam-function-calling-60k", {"query": "a", "tools": json.dumps(XLAM_TOOLS), "answers": "[]"},
     "field 'answers': is empty"),
    ("xlam-function-calling-60k", {"query": "a", "tools": json.dumps(XLAM_TOOLS)}, "field 'answers': is missing"),
    ("xlam-function-calling-60k", {"query": "a", "answers": json.dumps([call("f")]), "tools": json.dumps(
        [{"name": "f", "description": "", "parameters": {"x": {"type": "Foo[int]"}}}])},
     "field 'tools.0.parameters.x': type 'Foo[int]' is not known"),
    ("sharegpt", {"conversations": [{"from": "bing", "value": "a"}]}, "field 'conversations.0': from 'bing' is not"),
    ("sharegpt", {"conversations": [{"from": "human"}]}, "field 'conversations.0.value': is NoneType"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "f(1)"}]},
     "field 'conversations.1': not JSON"),
    ("messages", openai(user("a"), {**says("b"), "function_call": {}}), "field 'messages.1': a message with function_"),
    ("messages", openai(user("a"), {"role": "developer", "content": "b"}),
     "field 'messages': messages.1.role: 'developer' is not known, there are 'system', 'user', 'assistant' or 'tool'"),
    ("messages", openai({"role": "user", "content": [{"type": "image_url"}]}),
     "field 'messages.0.content': has a part that is no text"),
    ("messages", openai(user("a"), {"role": "assistant", "content": None, "tool_calls": OPENAI_CALLS},
                        tools=[F, G]), "field 'messages.1.arguments': not JSON"),
    ("messages", openai(user("a"), {"role": "assistant", "content": "", "tool_calls": OPENAI_CALLS[:1]},
                        {"role": "tool", "tool_call_id": "c9", "content": "1"}, says("b"), tools=[F]),
     "field 'messages.1': the calls c1 have the results c9"),
    ("messages", openai(user("a"), says("b"), tools=[{**F, "returns": "x"}]),
     "field 'tools.0': a function with returns"),
    ("messages", {"messages": "no"}, "field 'messages': not JSON"),
    ("messages", {}, "field 'messages': is missing"),
]


@pytest.mark.parametrize("name, record, words", BAD_ROWS, ids=[f"{i} {b[0]}" for i, b in enumerate(BAD_ROWS)])
def test_bad_rows_are_named(name: str, record: Any, words: str) -> None:
    good = next(case[1] for case in CASES if case[0] == name)
    made = conversations_of(name, [good, record, good])
    next(made)                                                               # control
    with pytest.raises(DataError) as caught:
        next(made)
    assert caught.value.where == f"{name} row 1"
    assert words in caught.value.what
    assert caught.value.do
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, row, words", [
    ("messages", openai(user("a"), {"role": "developer", "content": "b"}), "messages.1.role: 'developer' is not known"),
    ("messages", openai(user("a"), {"content": "b"}), "messages.1.role: 'None' is not known"),
    ("sharegpt", {"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]},
     "conversations.1': from 'bing' is not known"),
    ("sharegpt", {"conversations": [{"from": ["human"], "value": "a"}]},
     r"conversations.0': from \"\['human'\]\" is not"),
    ("messages", openai({"role": ["user"], "content": "a"}), r"messages.0.role: \"\['user'\]\" is not known"),
])
def test_unknown_roles_are_an_error_or_counted_by_name(tmp_path: Path, name: str, row: Record, words: str) -> None:
    good = [{"messages": [user(f"{i}?"), says("b")],
             "conversations": [{"from": "human", "value": f"{i}?"}, {"from": "gpt", "value": "b"}]} for i in range(30)]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(json.dumps({key: r[key] for key in row}) for r in good))
    options = WriteOptions(max_chars=None, column=CONVERSATION, val_share=0.3)
    origin = chat_origin(name, tmp_path / "in", None)
    assert write_dataset(origin, tmp_path / "c", options)["counts"]["bad"] == {}                 # control
    with open(tmp_path / "in" / "a.jsonl", "a") as file:
        file.write(f"\n{json.dumps(row)}" * 2)
    with pytest.raises(DataError, match=rf"a.jsonl line 31: no conversation .*{words}.*--skip-bad") as caught:
        write_dataset(origin, tmp_path / "d", options)
    assert "\n" not in str(caught.value)
    counts = write_dataset(origin, tmp_path / "d", replace(options, skip_bad=2))["counts"]
    assert (counts["documents"], counts["bad"]) == (30, {"no conversation": 2})
    assert len(counts["left_out"]) == 2
    assert all(re.search(rf"no conversation .*{words}", left["reason"]) for left in counts["left_out"])


@pytest.mark.parametrize("kind, schema", [
    ("str", {"type": "string"}), ("float", {"type": "number"}), ("List[int]", {"type": "array", "items": {
        "type": "integer"}}), ("list", {"type": "array"}), ("Dict[str, List[int]]", {"type": "object"}), ("Any", {}),
    ("Union[int, List[str]]", {"anyOf": [{"type": "integer"}, {"type": "array", "items": {"type": "string"}}]}),
    ("Tuple[int, int]", {"type": "array"}), ("Callable[[float], float]", {"type": "string"}), ("List[Any]", {
        "type": "array"}), ("List[Optional[bool]]", {"type": "array", "items": {"anyOf": [{"type": "boolean"}, {
            "type": "null"}]}}),
])
def test_types_of_xlam(kind: str, schema: Record) -> None:
    assert json_type(kind, "x") == schema


def test_optional_types_of_xlam() -> None:
    kinds = {"a": "str", "b": "str, optional", "c": "Optional[int]", "d": "int, default 3", "e": "Dict[str, int]"}
    tool = {"name": "f", "description": "", "parameters": {k: {"type": t} for k, t in kinds.items()}}
    [raw] = conversations_of("xlam-function-calling-60k", [{"query": "q", "tools": [tool], "answers": [call("f")]}])
    schema = json.loads(raw.text)["tools"][0]["parameters"]
    assert schema["required"] == ["a", "e"]
    assert [p.get("type") for p in schema["properties"].values()] == ["string", "string", "integer", "integer",
                                                                      "object"]
