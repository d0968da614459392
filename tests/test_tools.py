"""What a reply is worth: by hand-written ones, whole and broken; by a model that has learned some; and as a command."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopoe.config.schema import ObjectiveConfig
from nanopoe.data.conversations import Conversation, conversation_of
from nanopoe.data.ingest import Raw
from nanopoe.data.render import ONE_LINE, SPECIALS, encode_pieces, pieces, render_prompt
from nanopoe.data.shards import CONVERSATION
from nanopoe.errors import ConfigError
from nanopoe.infer.answers import exact, final_number, last_number, numbers_in
from nanopoe.infer.engine import Engine
from nanopoe.infer.tools import (
    LAYOUT_NAMES,
    METRICS,
    Budget,
    Case,
    case_of,
    cases_of,
    evaluate_arithmetic,
    evaluate_calls,
    hallucinated,
    judge,
    same_json,
    tally,
)
from nanopoe.model import GPT
from nanopoe.model.stages import backward_stages
from nanopoe.tokenizer import Tokenizer
from tests.commands import Done, call, refused, write_yaml
from tests.ranks import experiment_dict, model_config
from tests.rows import write

BYTES = Tokenizer({bytes([i]): i for i in range(256)})
WEATHER = {"name": "weather", "parameters": {"type": "object", "required": ["city"], "properties": {
    "city": {"type": "string"}, "days": {"type": "integer", "default": 7}, "unit": {"enum": ["C", "F"]},
    "wind": {"type": "boolean"}, "at": {"type": "array", "items": {"type": "number"}}}}}
NUMBER = {"type": "number"}
ADD = {"name": "add", "parameters": {"type": "object", "properties": {"x": NUMBER, "y": NUMBER}}}
OPEN = {"name": "open", "parameters": {"type": "object", "additionalProperties": True}}


def case(question: str, answer: str, *calls: dict[str, Any]) -> Case:
    said: dict[str, Any] = {"role": "assistant", "content": answer}
    if calls:
        said["tool_calls"] = [*calls]
    messages = [{"role": "user", "content": question}, said]
    return case_of(conversation_of({"messages": messages, "tools": [WEATHER, ADD, OPEN]}, "x"), "x")


def wrote(*calls: Any, text: str = "") -> str:
    return text + "".join(f"<|python_start|>{c if isinstance(c, str) else json.dumps(c)}<|python_end|>" for c in calls)


OSLO = {"name": "weather", "arguments": {"city": "Oslo", "days": 3}}
SUM = {"name": "add", "arguments": {"x": 2, "y": -3.5}}
ASKED = case("Weather of Oslo, 3 days; then 2 plus -3.5", "", OSLO, SUM)
UNFIT = case("Who are you?", "I cannot do that.")
NONE: dict[str, bool | None] = {"refusal": None, "false_calls": None, "stop": True}

# name: (case, reply, parse, called, function, arguments, hallucinated)
REPLIES: dict[str, tuple[Case, str, bool | None, bool, bool, bool, bool | None]] = {
    "the reference": (ASKED, wrote(OSLO, SUM), True, True, True, True, False),
    "with words in front, other layout and order of keys":
        (ASKED, wrote(json.dumps({"arguments": {"days": 3, "city": "Oslo"}, "name": "weather"}, indent=4), SUM,
                      text="Let me see."), True, True, True, True, False),
    "numbers as floats": (ASKED, wrote({**OSLO, "arguments": {"city": "Oslo", "days": 3.0}}, SUM),
                          True, True, True, True, False),
    "another order of calls": (ASKED, wrote(SUM, OSLO), True, True, False, False, False),
    "one call only": (ASKED, wrote(OSLO), True, True, False, False, False),
    "another value that stands there": (ASKED, wrote({**OSLO, "arguments": {"city": "Oslo", "days": 2}}, SUM),
                                        True, True, True, False, False),
    "a value from nowhere": (ASKED, wrote({**OSLO, "arguments": {"city": "Paris", "days": 3}}, SUM),
                             True, True, True, False, True),
    "a function that was not given": (ASKED, wrote({**OSLO, "name": "wether"}, SUM), True, True, False, False, True),
    "true is not 1": (case("1?", "", {"name": "add", "arguments": {"x": 1}}),
                      wrote({"name": "add", "arguments": {"x": True}}), True, True, True, False, False),
    "not JSON": (ASKED, wrote("{'name': 'weather'}", SUM), False, True, False, False, False),
    "no object of arguments": (ASKED, wrote({"name": "weather", "arguments": [1]}), False, True, False, False, None),
    "no end": (ASKED, wrote(OSLO) + "<|python_start|>" + json.dumps(SUM), False, True, False, False, False),
    "opened twice": (ASKED, "<|python_start|>" + wrote(OSLO), False, True, False, False, False),
    "empty call": (ASKED, wrote(""), False, True, False, False, None),
    "words": (ASKED, "It is fine.", None, False, False, False, None),
    "nothing": (ASKED, "", None, False, False, False, None),
}


@pytest.mark.parametrize("name", REPLIES)
def test_replies_where_a_call_is_due(name: str) -> None:
    asked, reply, parse, called, function, arguments, invented = REPLIES[name]
    expected = {**NONE, "parse": parse, "called": called, "function": function, "arguments": arguments,
                "hallucinated": invented}
    assert judge(asked, BYTES, reply, True) == expected
    ids = [i for special, text in _parts(reply) for i in
           ([BYTES.special_ids[special]] if special else []) + BYTES.encode(text)]
    assert judge(asked, BYTES, ids, True) == expected              # ids are judged alike


def _parts(text: str) -> list[tuple[str, str]]:
    """(special or nothing, text after it)."""
    found, special = [], ""
    while text:
        at, following = min(((text.find(s), s) for s in SPECIALS if s in text), default=(len(text), ""))
        found.append((special, text[:at]))
        special, text = following, text[at + len(following):]
    return [*found, (special, "")]


def test_replies_where_no_call_is_due() -> None:
    refusal = judge(UNFIT, BYTES, "No function fits.", True)
    assert refusal == {"parse": None, "called": None, "function": None, "arguments": None, "hallucinated": None,
                       "refusal": True, "false_calls": False, "stop": True}
    wrong = judge(UNFIT, BYTES, wrote(OSLO), False)
    assert (wrong["refusal"], wrong["false_calls"], wrong["parse"], wrong["stop"]) == (False, True, True, False)
    broken = judge(UNFIT, BYTES, "<|python_start|>{", False)
    assert (broken["refusal"], broken["false_calls"], broken["parse"]) == (False, True, False)
    table = tally([refusal, wrong, broken])
    assert table["refusal"] == {"n": 1, "of": 3, "rate": 1 / 3} and table["false_calls"]["n"] == 2
    assert table["parse"] == {"n": 1, "of": 2, "rate": 0.5} and table["stop"]["n"] == 1
    assert table["function"] == {"n": 0, "of": 0, "rate": None} and list(table) == list(METRICS)


@pytest.mark.parametrize(("question", "arguments", "invented"), [
    ('Put "a \\"b\\"" there', {"city": 'a "b"'}, []),              # as JSON writes it
    ("OSLO", {"city": "Oslo"}, []),
    ("Oslo", {"city": "Oslo", "days": 7, "unit": "F", "wind": True, "at": []}, []),     # default, enum, boolean
    ("Oslo", {"city": "Oslo", "days": 8, "unit": "K"}, ["days", "unit"]),
    ("Oslo", {"town": "Oslo"}, ["town"]),
    ("at 1,200 and -3 and 0.50", {"at": [1200, -3, 0.5]}, []),
    ("at 1200 and 3", {"at": [1200, -3]}, ["at"]),
    ("12", {"days": 2}, ["days"]),                                 # 2 is no number of it
    ("null", {"city": None}, []),
])
def test_what_is_made_up(question: str, arguments: dict[str, Any], invented: list[str]) -> None:
    asked = case(question, "", {"name": "weather", "arguments": arguments})
    assert hallucinated((asked.answer.tool_calls or [])[0], asked.prompt) == invented


def test_a_schema_of_any_arguments_declares_them_all() -> None:
    asked = case("see 5", "", {"name": "open", "arguments": {"x": 5, "y": 6}})
    assert hallucinated((asked.answer.tool_calls or [])[0], asked.prompt) == ["y"]


def test_same_json() -> None:
    assert same_json({"a": [1, {"b": None}], "c": "x"}, {"c": "x", "a": [1.0, {"b": None}]})
    for a, b in ((1, True), (0, False), ([1], [1, 1]), ({"a": 1}, {"a": 1, "b": 1}), ("1", 1), (None, False), ([], {})):
        assert not same_json(a, b) and not same_json([a], [b])


def test_numbers() -> None:
    assert list(map(str, numbers_in("7-5 = 2, -3.5 (1,200) 12,34 x-1 a3 −4.")) ) == \
        ["7", "5", "2", "-3.5", "1200", "12", "34", "1", "3", "-4"]
    assert last_number("none") is None
    for text, number in (("#### 42", 42), ("7 + 5 = 12.", 12), ("That is 3 apples.", None), ("**8**", 8), ("12%", 12),
                         ("", None), ("x", None), ("- 1,000", 1000)):
        assert final_number(text) == number, text
    assert exact("so 41 + 1 = 42.0", "#### 42") and exact("1,200", "= 1200") and exact("It is 7 indeed", "7")
    assert not exact("42 or 43", "42") and not exact("", "42") and not exact("-42", "42")


def test_the_embedded_references_are_perfect(embedded: list[Raw]) -> None:
    """What the data answers is right by every count, and nothing in it is made up."""
    texts = [raw.text for raw in embedded[::23]]
    with_tools, arithmetic = cases_of(texts, "embedded")
    assert len(with_tools) > 150 and len(arithmetic) > 40
    judged = [judge(one, BYTES, reply_of(one), True) for one in with_tools]
    table = tally(judged)
    for metric in ("parse", "called", "function", "arguments", "refusal"):
        assert table[metric]["n"] == table[metric]["of"] > 0, metric
    assert (table["hallucinated"]["n"], table["false_calls"]["n"]) == (0, 0) < (table["hallucinated"]["of"], 1)
    assert all(exact(one.answer.content, one.answer.content) for one in arithmetic)
    few, numbers = cases_of(texts, "embedded", limit=3)
    assert few == with_tools[:3] and numbers == arithmetic[:3]


def reply_of(one: Case) -> list[int]:
    """The reference in tokens, without assistant_end."""
    whole = Conversation(messages=[*one.prompt.messages, one.answer], tools=one.prompt.tools)
    row = encode_pieces(BYTES, pieces(whole, "x"))
    return row[len(render_prompt(BYTES, one.prompt)):-1].tolist()


# -- with a model that has learned a few conversations by heart ------------------------------------------------------

def conversation(question: str, *calls: dict[str, Any], answer: str = "", tools: Any = (ADD,)) -> Conversation:
    said = {"role": "assistant", "content": answer, **({"tool_calls": [*calls]} if calls else {})}
    value: dict[str, Any] = {"messages": [{"role": "user", "content": question}, said]}
    return conversation_of({**value, **({"tools": [*tools]} if tools else {})}, "x")


LEARNED = [conversation("2 + 3", {"name": "add", "arguments": {"x": 2, "y": 3}}),
           conversation("hello", answer="No."), conversation("five", tools=(), answer="= 5"),
           conversation("broken", {"name": "add", "arguments": {"x": 9}})]


@pytest.fixture(scope="module")
def learned() -> tuple[Engine, Tokenizer]:
    """A model that writes the answers of LEARNED in each layout, and to "broken" a call that no JSON parser takes."""
    tokenizer = Tokenizer.train([*(json.dumps(ADD, **layout) for layout in LAYOUT_NAMES.values())] * 5, 320)
    rows = []
    for layout in LAYOUT_NAMES.values():
        for one in LEARNED:
            row = encode_pieces(tokenizer, pieces(one, "x", layout))
            if one is LEARNED[3]:
                row[row == tokenizer.encode("9")[0]] = tokenizer.encode("}")[0]
            rows.append(torch.from_numpy(row).long())
    T = max(map(len, rows)) - 1
    ids = torch.zeros(len(rows), T + 1, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = row
        ids[i, len(row):] = ~0
    model = GPT(model_config(n_layer=2, n_embd=64, vocab_size=tokenizer.vocab_size, sequence_len=T,
                             window_sizes=(T, T), poe_mode="none", poe_every=None))
    model.init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.0)
    inputs, targets = torch.where(ids < 0, ~ids, ids)[:, :-1], ids[:, 1:].clamp(min=-1)
    for _ in range(75):
        backward_stages(model, inputs, targets, ObjectiveConfig(kind="ce", alpha=0.0, rho=None), 1 / 300)
        optimizer.step()
        optimizer.zero_grad()
    return Engine(model.eval()), tokenizer


LAYOUTS = list(LAYOUT_NAMES)


def counts(table: dict[str, dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {metric: (found["n"], found["of"]) for metric, found in table.items()}


def test_a_model_that_learned_the_answers(learned: tuple[Engine, Tokenizer]) -> None:
    engine, tokenizer = learned
    cases, seen, replies = [case_of(LEARNED[i], "x") for i in (0, 1, 3)], [], []
    record = evaluate_calls(engine, tokenizer, cases, LAYOUTS, Budget(60, 2), show=lambda *at: seen.append(at),
                            keep=replies.append)
    expected = {"parse": (1, 2), "called": (2, 2), "function": (1, 2), "arguments": (1, 2), "hallucinated": (0, 1),
                "refusal": (1, 1), "false_calls": (0, 1), "stop": (3, 3)}
    assert {name: counts(table) for name, table in record["layouts"].items()} == dict.fromkeys(LAYOUTS, expected)
    assert counts(record["all"]) == {metric: (4 * n, 4 * of) for metric, (n, of) in expected.items()}
    assert (record["prompts"], record["too_long"], record["calls"], seen[-1]) == (12, 0, None, (12, 12))
    assert len(replies) == 12 and sum(reply["parse"] is False for reply in replies) == 4
    for reply in replies:
        assert reply["prompt"].startswith("<|bos|>") and reply["wanted"]["role"] == "assistant"
        right = [call["name"] for call in reply["wanted"].get("tool_calls", [])]
        assert all(name in reply["reply"] for name in right) or not reply["function"]
        assert json.loads(json.dumps(reply)) == reply
    bound = evaluate_calls(engine, tokenizer, cases, LAYOUTS, Budget(60, 3), constrained=True)
    assert counts(bound["all"])["parse"] == (8, 8) and counts(bound["all"])["arguments"][0] == 4
    assert bound["calls"]["opened"] == bound["calls"]["closed"] >= 8 and bound["calls"]["cut"] == 0
    assert counts(bound["all"])["refusal"] == (4, 4)


def test_replies_that_are_cut_do_not_stop(learned: tuple[Engine, Tokenizer]) -> None:
    engine, tokenizer = learned
    record = evaluate_calls(engine, tokenizer, [case_of(LEARNED[0], "x")], ["one"], Budget(5, 1))
    found = counts(record["all"])
    assert (found["stop"], found["parse"], found["called"]) == ((0, 1), (0, 1), (1, 1))


def test_arithmetic_and_prompts_that_are_too_long(learned: tuple[Engine, Tokenizer]) -> None:
    engine, tokenizer = learned
    five = case_of(LEARNED[2], "x")
    wrong = case_of(conversation("five", tools=(), answer="= 6"), "x")
    long = case_of(conversation("five " * 200, tools=(), answer="= 5"), "x")
    record = evaluate_arithmetic(engine, tokenizer, [five, wrong, long], Budget(20, 4))
    assert record == {"prompts": 2, "too_long": 1, "exact": {"n": 1, "of": 2, "rate": 0.5},
                      "stop": {"n": 2, "of": 2, "rate": 1.0}}
    calls = evaluate_calls(engine, tokenizer, [case_of(conversation("a " * 300, answer="b"), "x")], ["one", "2"],
                           Budget(20, 4))
    assert (calls["prompts"], calls["too_long"]) == (0, 2) and calls["all"]["refusal"]["rate"] is None


def test_a_schema_that_cannot_constrain_is_refused_before_anything_is_generated(
        learned: tuple[Engine, Tokenizer]) -> None:
    odd = {"name": "odd", "parameters": {"type": "dict"}}
    cases = [case_of(LEARNED[0], "x"), case_of(conversation("x", answer="y", tools=(ADD, odd)), "x")]
    seen: list[tuple[int, int]] = []
    with pytest.raises(ConfigError, match="function odd: its JSON schema cannot constrain a call"):
        evaluate_calls(*learned, cases, ["one"], Budget(9, 1), constrained=True, show=lambda *at: seen.append(at))
    assert not seen and evaluate_calls(*learned, cases, ["one"], Budget(9, 1))["prompts"] == 2


# -- the command ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text/ and chat/: finished runs; val/: conversations that chat/ validates on. Not to be changed."""
    folder = tmp_path_factory.mktemp("tools")
    texts = [json.dumps(one.model_dump(exclude_none=True)) for one in LEARNED]
    write(folder / "val", [[texts]], column=CONVERSATION)
    write(folder / "plain", [[[texts[2]] * 3]], column=CONVERSATION)
    write(folder / "train", [[texts * 6]], column=CONVERSATION)
    train, val = ([{"name": "chats", "path": str(folder / split)}] for split in ("train", "val"))
    changes = {"data.kind": "conversations", "data.train": train, "data.val": val, "data.packing": "bestfit_pad",
               "data.case_aug_prob": 0.0, "data.json_layout_prob": 0.0, "data.lanes": 2, "data.buffer_documents": 2}
    for name, more in (("text", {}), ("chat", changes)):
        done = call("train", write_yaml(folder / f"{name}.yaml", experiment_dict(data, folder / name, **more)),
                    folder=folder)
        assert done.code == 0, done
    return folder


@pytest.fixture
def command(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    def here(run: str, *arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["scripts.evaluate_tools", str(folder / run), *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            importlib.import_module("scripts.evaluate_tools").main()
        return Done(left.value.code, *capsys.readouterr())               # type: ignore[arg-type]

    return here


def test_the_command(command: Callable[..., Done], folder: Path, tmp_path: Path) -> None:
    """Prompts are too long for the tiny models; that is told, and the short ones are answered."""
    done = command("chat", "--json", "--tokens", "6", "--layouts", "one,compact", "--replies", tmp_path / "replies")
    assert done.code == 0, done
    record = json.loads(done.out)
    tools = record["tools"]
    assert record["conversations"] == 3 and tools["prompts"] + tools["too_long"] == 6
    assert list(tools["layouts"]) == ["one", "compact"] and record["arithmetic"]["exact"]["of"] == 1
    assert "arithmetic: 1 of 1" in done.err
    assert len((tmp_path / "replies").read_text().splitlines()) == tools["prompts"]
    done = command("text", "--data", folder / "val", "--limit", "1", "--tokens", "6", "--constrained",
                   "--view", "stage:0")
    assert done.code == 0, done
    assert "step 8, stage:0, constrained: 1 conversations with tools" in done.out
    assert "references without a call" in done.out and "0 cut" in done.out and "arithmetic: exact 0/1" in done.out


def test_bad_input_is_one_line(command: Callable[..., Done], folder: Path, data: Path) -> None:
    for run, arguments, code, kind, words in (
            ("text", ("--view", "best"), 2, "config", "unknown view 'best'"),
            ("text", (), 2, "config", "trained on text: its data.val has no conversations; name a folder"),
            ("text", ("--data", folder / "plain"), 3, "data", "no conversations with tools"),
            ("text", ("--data", folder / "nowhere"), 3, "data", "no such folder"),
            ("text", ("--data", data / "val"), 3, "data", "no column 'conversation'"),
            ("none", (), 4, "checkpoint", "none"),
            ("chat", ("--step", "77"), 4, "checkpoint", "77"),
            ("chat", ("--layouts", "one,3"), 2, "config", "no layout '3'"),
            ("chat", ("--layouts", "2,2"), 2, "config", "a layout twice"),
            ("chat", ("--replies", folder), 2, "config", "cannot be written: Is a directory"),
            ("chat", ("--limit", "0"), 2, "config", "must be 1 or more, got 0"),
            ("chat", ("--batch", "-1"), 2, "config", "must be 1 or more, got -1"),
            ("chat", ("--tokens", "0"), 2, "config", "must be 1 or more, got 0")):
        refused(command(run, *arguments), code, kind, words)
    assert ONE_LINE == LAYOUT_NAMES["one"]
