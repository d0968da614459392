"""Conversations as ids and masks: the layout, what is a target, JSON layouts, and back from what a model wrote.

The golden file holds 20 conversations as runs of [kind, text]: `special` or `text`, `masked` or `target`. It is
compared with what the ids alone say, so that it tells the whole way. After a change that is meant, write it again with
`python -m tests.test_render` and read the difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopoe.data.conversations import Conversation, canonical, conversation_of, parse_conversation, prompt_of
from nanopoe.data.loader import Loader, Sizes, summary
from nanopoe.data.render import (
    LAYOUTS,
    ONE_LINE,
    SPECIALS,
    TOOLS_SENTENCE,
    Render,
    choose_layout,
    encode_pieces,
    parse_reply,
    pieces,
    render_prompt,
)
from nanopoe.data.shards import CONVERSATION, Source, open_source
from nanopoe.errors import DataError
from nanopoe.tokenizer import SPECIALS as TOKENIZER_SPECIALS
from nanopoe.tokenizer import Tokenizer
from tests.records import F, G, call, function, result, says, user

GOLDEN = Path(__file__).with_name("golden_conversations.json")
TEMPLATE = Path(__file__).parents[1] / "nanopoe/export/hub_code/chat_template.jinja"
BYTES = Tokenizer({bytes([i]): i for i in range(256)})
LAYOUT_NAMES = {"one line": ONE_LINE, "indent 4": LAYOUTS[0], "indent 2": LAYOUTS[1], "compact": LAYOUTS[2]}
SYSTEM = {"role": "system", "content": "Be brief."}
W = function("weather", "The weather of a city.", city={"type": "string"}, days={"type": "integer", "default": 1})
CALC = function("calculator", None, expression={"type": "string"})
NAMES = " ".join(SPECIALS)

# name: (layout, messages, tools)
CONVERSATIONS: dict[str, tuple[str, list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "question and answer": ("one line", [user("Hi"), says("Hello.")], None),
    "several turns": ("one line", [user("a"), says("b"), user("c"), says("d"), user("e"), says("f")], None),
    "system in front of the first user text": ("one line", [SYSTEM, user("a"), says("b"), user("c"), says("d")], None),
    "white space and other scripts stay": ("one line", [user(" Grüße\n\n"), says("\t世界 😀 ")], None),
    "names of special tokens are text": ("one line", [
        {"role": "system", "content": f"s {NAMES}"}, user(f"u {NAMES}"), says(f"a {NAMES}", call("f", x=NAMES)),
        result(f"r {NAMES}"), says(f"z {NAMES}")], [function("f", f"d {NAMES}")]),
    "tools, none called": ("one line", [user("Sing."), says("I have no function for that.")], [W]),
    "a call at the end": ("one line", [user("Weather in Lima?"), says("", call("weather", city="Lima"))], [W]),
    "call, result, answer": ("one line", [
        user("Weather in Lima?"), says("", call("weather", city="Lima")), result('{"sky": "clear"}'),
        says("It is clear.")], [W]),
    "text before a call": ("one line", [
        user("Weather?"), says("Let me look.", call("weather", city="Riga")), result("rain"), says("Rain.")], [W]),
    "two calls at once, two results": ("one line", [
        user("Lima and Riga?"), says("", call("weather", city="Lima"), call("weather", city="Riga")), result("clear"),
        result("rain"), says("Clear and rain.")], [W]),
    "two calls at the end": ("one line", [
        user("Both?"), says("Both.", call("weather", city="Lima"), call("calculator", expression="1+1"))], [W, CALC]),
    "two calls one after the other": ("one line", [
        user("?"), says("", call("weather", city="Lima")), result("20"),
        says("", call("calculator", expression="20*2")), result("40"), says("40.")], [W, CALC]),
    "a call in the second turn": ("one line", [
        user("Hi"), says("Hello."), user("Weather in Oslo?"), says("", call("weather", city="Oslo")), result("snow"),
        says("Snow."), user("Thanks"), says("Welcome.")], [W]),
    "system and tools": ("one line", [SYSTEM, user("2+2?"), says("4")], [CALC]),
    "a call without arguments, an empty result": ("one line", [
        user("Go."), says("", call("g")), result(""), says("Done.")], [G]),
    "arguments of all types": ("one line", [
        user("Go."), says("", call("f", x=1, y=[1.5, None, {"é": True}], z={"deep": {"er": "\n\"'"}}))], [F]),
    "calls inside a text": ("one line", [
        user("3 bags of 4?"), says("3*4 = ", call("calculator", expression="3*4")), result("12"),
        says("12.\n#### 12")], [CALC]),
    "indent 4": ("indent 4", [user("a"), says("", call("weather", city="Lima", days=2)), result('{"x": [1]}'),
                              says("b")], [W]),
    "indent 2": ("indent 2", [user("a"), says("", call("weather", city="Lima", days=2)), result('{"x": [1]}'),
                              says("b")], [W]),
    "compact": ("compact", [user("a"), says("", call("weather", city="Lima", days=2)), result('{"x": [1]}'),
                            says("b")], [W]),
}


def made(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Conversation:
    return conversation_of({"messages": messages, **({"tools": tools} if tools else {})}, "test")


def row_of(conversation: Conversation, layout: dict[str, Any] = ONE_LINE) -> np.ndarray:
    return encode_pieces(BYTES, pieces(conversation, "test", layout))


def runs(row: np.ndarray, tokenizer: Tokenizer = BYTES) -> list[list[str]]:
    """[kind, text] of the entries of a row, from the ids alone."""
    names = {i: name for name, i in tokenizer.special_ids.items()}
    found: list[tuple[str, list[int]]] = []
    for entry in row.tolist():
        token = entry if entry >= 0 else ~entry
        kind = f"{'special' if token in names else 'text'} {'target' if entry >= 0 else 'masked'}"
        if token not in names and found and found[-1][0] == kind:
            found[-1][1].append(token)
        else:
            found.append((kind, [token]))
    return [[kind, tokenizer.decode(ids)] for kind, ids in found]


def golden_entry(name: str) -> dict[str, Any]:
    layout, messages, tools = CONVERSATIONS[name]
    conversation = made(messages, tools)
    return {"name": name, "layout": layout, "conversation": canonical(conversation, name),
            "runs": runs(row_of(conversation, LAYOUT_NAMES[layout]))}


def write_golden() -> None:
    lines = []
    for name in CONVERSATIONS:
        entry = golden_entry(name)
        rows = ",\n".join(f"   {json.dumps(run, ensure_ascii=False)}" for run in entry.pop("runs"))
        head = ",\n  ".join(f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in entry.items())
        lines.append(f' {{{head},\n  "runs": [\n{rows}]}}')
    GOLDEN.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")


# -- layout and masks -------------------------------------------------------------------------------------------------

def test_specials_are_those_of_the_tokenizer() -> None:
    assert SPECIALS == TOKENIZER_SPECIALS


def test_golden_conversations() -> None:
    golden = json.loads(GOLDEN.read_text("utf-8"))
    assert [entry["name"] for entry in golden] == list(CONVERSATIONS)
    assert len(golden) == 20
    for entry in golden:
        conversation = parse_conversation(entry["conversation"], entry["name"])
        assert canonical(conversation, "x") == entry["conversation"]
        row = row_of(conversation, LAYOUT_NAMES[entry["layout"]])
        assert runs(row) == entry["runs"], entry["name"]
        assert golden_entry(entry["name"]) == entry
        assert runs(~row) != entry["runs"]                                   # control: masks count
    kinds = {(kind, text) for entry in golden for kind, text in entry["runs"] if kind.startswith("special")}
    assert kinds == {("special target", name) for name in ("<|assistant_end|>", "<|python_start|>", "<|python_end|>")
                     } | {("special masked", name) for name in ("<|bos|>", "<|user_start|>", "<|user_end|>",
                                                                "<|assistant_start|>", "<|output_start|>",
                                                                "<|output_end|>")}


def test_a_call_written_out() -> None:
    conversation = made([SYSTEM, user("Weather?"), says("Look.", call("weather", city="Lima")), result("rain"),
                         says("Rain.")], [W])
    tools = json.dumps([W])
    assert runs(row_of(conversation)) == [
        ["special masked", "<|bos|>"], ["special masked", "<|user_start|>"],
        ["text masked", f"Be brief.\n\n{TOOLS_SENTENCE}{tools}\n\nWeather?"], ["special masked", "<|user_end|>"],
        ["special masked", "<|assistant_start|>"], ["text target", "Look."], ["special target", "<|python_start|>"],
        ["text target", '{"name": "weather", "arguments": {"city": "Lima"}}'], ["special target", "<|python_end|>"],
        ["special masked", "<|output_start|>"], ["text masked", "rain"], ["special masked", "<|output_end|>"],
        ["text target", "Rain."], ["special target", "<|assistant_end|>"]]


def test_layouts_change_white_space_alone() -> None:
    conversation = made(CONVERSATIONS["indent 4"][1], [W])
    rows = {name: row_of(conversation, layout) for name, layout in LAYOUT_NAMES.items()}
    texts = {name: "".join(text for _, text in runs(row)) for name, row in rows.items()}
    assert len(set(texts.values())) == 4
    assert '\n        "name": "weather"' in texts["indent 4"]
    assert '\n    "name": "weather"' in texts["indent 2"]
    assert '[{"name":"weather"' in texts["compact"]
    assert '{"x": [1]}' in texts["compact"]                                  # a result is as it came
    assert len({re.sub(r"\s", "", text) for text in texts.values()}) == 1


def test_the_export_template_writes_the_same_ids() -> None:
    source = re.sub(r"\{%-? *(end)?generation *-?%\}", "", TEMPLATE.read_text("utf-8"))
    template = jinja2.Environment().from_string(source)
    for name in ("question and answer", "several turns", "system in front of the first user text",
                 "white space and other scripts stay"):
        messages = CONVERSATIONS[name][1]
        said = template.render(messages=messages, bos_token="<|bos|>")
        row = row_of(made(messages))
        assert BYTES.decode(np.where(row < 0, ~row, row).tolist()) == said
        prompt = prompt_of({"messages": messages[:-1]}, "x")
        asked = template.render(messages=messages[:-1], bos_token="<|bos|>", add_generation_prompt=True)
        assert BYTES.decode(render_prompt(BYTES, prompt)) == asked
        assert asked != said                                                 # control


TEXTS = st.text(max_size=8)
WORDS = st.text(min_size=1, max_size=8).filter(str.strip)
CALLS = st.lists(st.builds(lambda name, x: call(name, **x), st.sampled_from("fg"), st.dictionaries(
    WORDS, st.integers() | TEXTS | st.lists(TEXTS, max_size=2), max_size=2)), min_size=1, max_size=3)
ROUND = st.tuples(TEXTS, CALLS, st.lists(TEXTS, min_size=3, max_size=3))
TURN = st.tuples(WORDS, st.lists(ROUND, max_size=2), WORDS)


def turn_of(question: str, rounds: list[Any], answer: str) -> list[dict[str, Any]]:
    inner = [m for text, calls, results in rounds
             for m in (says(text, *calls), *(result(r) for r in results[:len(calls)]))]
    return [user(question), *inner, says(answer)]


@settings(max_examples=300, deadline=None)
@given(st.lists(TURN, min_size=1, max_size=3), st.sampled_from(list(LAYOUT_NAMES)))
def test_any_turn_is_read_back(turns: list[Any], layout: str) -> None:
    messages = [m for turn in turns for m in turn_of(*turn)]
    conversation = made(messages, [F, G])
    row = row_of(conversation, LAYOUT_NAMES[layout])
    ids = np.where(row < 0, ~row, row).tolist()
    starts = [i for i, token in enumerate(ids) if token == BYTES.special_ids["<|assistant_start|>"]]
    assert len(starts) == len(turns)
    for start, turn in zip(starts, turns, strict=True):
        reply = parse_reply(BYTES, ids[start + 1:])
        assert [m.model_dump(exclude_defaults=True) for m in reply.messages] == [
            {k: v for k, v in m.items() if v is not None} for m in turn_of(*turn)[1:]]
        assert (reply.faults, reply.ended) == ([], True)
    said = "".join(m["content"] for m in messages if m["role"] == "assistant")
    calls = [c for m in messages for c in m.get("tool_calls", ())]
    targets = "".join(text for kind, text in runs(row) if kind == "text target")
    written = [json.dumps(c, ensure_ascii=False, **LAYOUT_NAMES[layout]) for c in calls]
    assert len(targets) == len(said) + sum(map(len, written))
    assert int((row >= 0).sum()) == len((said + "".join(written)).encode()) + len(turns) + 2 * len(calls)


# -- a source ---------------------------------------------------------------------------------------------------------

MakeSource = Callable[[list[Conversation]], Source]


@pytest.fixture
def source_of(tmp_path: Path) -> MakeSource:
    """A source of these conversations."""
    def make(conversations: list[Conversation]) -> Source:
        table = pa.table({CONVERSATION: [canonical(c, "x") for c in conversations]})
        pq.write_table(table, tmp_path / "shard_00000.parquet", row_group_size=512)
        return open_source("chats", tmp_path, column=CONVERSATION)

    return make


TOOLED = made(CONVERSATIONS["indent 4"][1], [W])
PLAIN = made([user("Hi"), says("Hello.")])


def test_documents_in_order_read_by_row_group(source_of: MakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of([made([user(f"q{i}"), says(f"a{i}")]) for i in range(5)])
    read, text = [], source.text
    monkeypatch.setattr(source, "text", lambda ordinal: (read.append(ordinal), text(ordinal))[1])
    wanted = [(2, 4), (0, 1), (7, 3), (0, 0)]
    documents = Render(BYTES, 100, 0, 0.0)(source, wanted)
    assert [tuple(d.ref) for d in documents] == [("chats", e, o) for e, o in wanted]
    assert read == [0, 1, 3, 4]
    for document, (_, ordinal) in zip(documents, wanted, strict=True):
        assert document.ids.dtype == np.int32
        assert document.length == len(document.ids)
        assert ["text target", f"a{ordinal}"] in runs(document.ids)


def test_long_conversations_lose_their_oldest_turns(source_of: MakeSource) -> None:
    """At every length: the row is that of the last turns that fit, head in front, else the end of the last turn."""
    turns = [[user(f"question {i} " + "q" * (i * 7 % 11)), *(
        [says("", call("weather", city="Lima")), result("rain")] if i % 2 else []), says(f"answer {i}")]
        for i in range(6)]
    long = made([SYSTEM, *(m for turn in turns for m in turn)], [W])
    lasts = [row_of(made([SYSTEM, *(m for turn in turns[i:] for m in turn)], [W])) for i in range(6)]
    source, kinds = source_of([long]), set()
    for most in range(2, len(lasts[0]) + 2):
        document = Render(BYTES, most, 0, 0.0)(source, [(0, 0)])[0]
        fitting = [row for row in lasts if len(row) <= most]
        expected = fitting[0] if fitting else np.concatenate([lasts[5][:1], lasts[5][1 - most:]])
        assert np.array_equal(document.ids, expected), most
        assert document.length == len(document.ids) == document.whole - document.dropped <= most
        assert document.whole == len(lasts[0])
        assert (document.ids[0], document.ids[-1]) == (~BYTES.bos_id, BYTES.special_ids["<|assistant_end|>"])
        assert document.ids.base is None                                     # holds no memory of what was cut off
        kinds.add(len(fitting))
    assert kinds == set(range(7))                                            # control: every number of turns left
    assert document.dropped == 0


def test_what_is_dropped_is_counted(source_of: MakeSource) -> None:
    """Rows of 60: of three conversations one loses a turn, one the front of its only turn."""
    small, turns = made([user("a"), says("b")]), made([user("q" * 30), says("x"), user("c"), says("d" * 30)])
    huge = made([user("q"), says("w" * 99)])
    source = source_of([small, turns, huge] * 2)
    sizes = Sizes(2, 4, 59, 2, 2, 1)
    with Loader([source], Render(BYTES, 60, 0, 0.0), BYTES.bos_id, sizes, packing="bestfit_pad", seed=0,
                union=True) as batches:
        rows, position = zip(*(next(batches) for _ in range(30)), strict=True)
    ids = torch.stack(rows).flatten()
    ends = ids[(ids == BYTES.special_ids["<|assistant_end|>"]).nonzero() - 1].flatten().tolist()
    came = {letter: ends.count(ord(letter)) for letter in "bdw"}             # by the last letter of the answer
    lost = {"d": len(row_of(turns)) - len(row_of(made([user("c"), says("d" * 30)]))), "w": len(row_of(huge)) - 60}
    told = summary(position[-1])
    assert len(row_of(turns)) > 60 and min(came.values()) > 5
    assert (told["documents"], told["truncated"]) == (sum(came.values()), came["d"] + came["w"])
    assert told["cropped_tokens"] == came["d"] * lost["d"] + came["w"] * lost["w"]
    with Loader([source_of([small] * 4)], Render(BYTES, 60, 0, 0.0), BYTES.bos_id, sizes, packing="bestfit_pad", seed=0,
                union=True) as batches:                                      # control
        told = summary(next(batches)[1])
    assert told["documents"] > 0 == told["truncated"] == told["cropped_tokens"]


def test_a_conversation_of_many_turns_is_not_rendered_for_each(source_of: MakeSource,
                                                               monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of([made([m for i in range(500) for m in (user(f"q{i}"), says(f"a{i}"))])])
    rendered = []
    monkeypatch.setattr(Render, "_row", lambda self, *args, _row=Render._row: rendered.append(1) or _row(self, *args))
    document = Render(BYTES, 100, 0, 0.0)(source, [(0, 0)])[0]
    assert runs(document.ids)[-2] == ["text target", "a499"]
    assert len(rendered) < 15


def test_layouts_are_drawn_for_each_visit(source_of: MakeSource) -> None:
    source = source_of([TOOLED] * 2000 + [PLAIN] * 100)
    by_layout = {row_of(TOOLED, layout).tobytes(): name for name, layout in LAYOUT_NAMES.items()}

    def drawn(render: Render, epoch: int) -> list[str]:
        return [by_layout[d.ids.tobytes()] for d in render(source, [(epoch, i) for i in range(2000)])]

    render = Render(BYTES, 10_000, 5, 0.6)
    found = drawn(render, 0)
    assert found == drawn(render, 0)
    assert found != drawn(render, 1)
    assert found != drawn(replace(render, seed=6), 0)
    shares = {name: found.count(name) / 2000 for name in LAYOUT_NAMES}
    assert shares == pytest.approx({"one line": 0.4, "indent 4": 0.2, "indent 2": 0.2, "compact": 0.2}, abs=0.04)
    assert set(drawn(replace(render, json_layout_prob=0.0), 0)) == {"one line"}
    assert set(drawn(replace(render, json_layout_prob=1.0), 0)) == {"indent 4", "indent 2", "compact"}
    plain = render(source, [(0, i) for i in range(2000, 2100)])
    assert {d.ids.tobytes() for d in plain} == {row_of(PLAIN).tobytes()}     # nothing to lay out
    assert [choose_layout(d, 1.0) for d in (0.0, 0.34, 0.99999)] == list(LAYOUTS)


def test_a_row_that_is_no_conversation_is_named(source_of: MakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    source, render = source_of([PLAIN, PLAIN]), Render(BYTES, 100, 0, 0.0)
    assert len(render(source, [(0, 0), (0, 1)])) == 2                        # control
    text = source.text
    monkeypatch.setattr(source, "text", lambda ordinal: text(0) if ordinal == 0 else '{"messages":[]}')
    with pytest.raises(DataError, match=r"source 'chats' conversation 1: messages.*scripts.prepare_data"):
        render(source, [(0, 0), (0, 1)])


# -- prompts and replies ----------------------------------------------------------------------------------------------

def test_prompts_are_the_beginning_of_the_conversation() -> None:
    for _, messages, tools in CONVERSATIONS.values():
        whole = made(messages, tools)
        row = row_of(whole)
        ids = render_prompt(BYTES, whole.prompt())
        assert ids == np.where(row < 0, ~row, row)[:len(ids)].tolist()
        assert (row[len(ids):] >= 0).all()                                   # all that follows is the answer
        names = {BYTES.special_ids[name] for name in ("<|assistant_start|>", "<|output_end|>")}
        assert ids[-1] in names
        with pytest.raises(DataError, match="ends with an assistant message"):
            render_prompt(BYTES, whole)


@pytest.mark.parametrize("text, texts, calls, faults, ended", [
    ("Hello.<|assistant_end|>junk", ["Hello."], [], [], True),
    ("Hello.", ["Hello."], [], [], False),
    ("Hello.<|bos|>next", ["Hello."], [], [], False),
    ("", [], [], [], False),
    ('<|python_start|>{"name": "f", "arguments": {"x": 1}}<|python_end|><|assistant_end|>', [""], ["f"], [], True),
    ('a<|python_start|>{"name":"f","arguments":{}}<|python_end|><|python_start|>{"name":"g","arguments":{}}'
     "<|python_end|>", ["a"], ["f", "g"], [], False),
    ("a<|python_start|>f(1)<|python_end|><|assistant_end|>", ["a"], [], ["a call that is none: not JSON"], True),
    ('<|python_start|>{"name": "f"}<|python_end|>', [], [], ["a call that is none: needs a name"], False),
    ('<|python_start|>{"name": "f", "arguments": NaN}<|python_end|>', [], [], ["a call that is none: not JSON"], False),
    ("a<|python_start|>[", ["a"], [], ["<|python_start|> without an end"], False),
    ("a<|python_start|>[<|assistant_end|>", ["a"], [], ["<|python_start|> without an end"], True),
    ("a<|user_start|>b", ["ab"], [], ["<|user_start|> where it means nothing"], False),
    ("a<|python_end|>", ["a"], [], ["<|python_end|> where it means nothing"], False),
    ('<|python_start|>{"name":"f","arguments":{}}<|python_end|>b', ["", "b"], ["f"], ["text after a call"], False),
])
def test_replies_of_any_kind_are_read(text: str, texts: list[str], calls: list[str], faults: list[str],
                                      ended: bool) -> None:
    ids: list[int] = []
    for part in re.split(r"(<\|\w+\|>)", text):
        ids += [BYTES.special_ids[part]] if part in BYTES.special_ids else BYTES.encode(part)
    for reply in (parse_reply(BYTES, text), parse_reply(BYTES, ids)):
        assert [m.content for m in reply.messages] == texts
        assert reply.text == "".join(texts)
        assert [c.name for c in reply.calls] == calls
        assert len(reply.faults) == len(faults)
        assert all(a.startswith(b) for a, b in zip(reply.faults, faults, strict=True))
        assert reply.ended == ended


def test_names_of_specials_in_a_reply_of_ids_are_text() -> None:
    ids = BYTES.encode("a <|assistant_end|> b")
    assert parse_reply(BYTES, ids).text == "a <|assistant_end|> b"
    assert parse_reply(BYTES, "a <|assistant_end|> b").text == "a "          # control: a str cannot tell


if __name__ == "__main__":
    write_golden()
