"""The embedded conversations: many, distinct, the same every time, and right in what they say."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from nanopoe.data.conversations import Conversation, canonical, parse_conversation
from nanopoe.data.embedded import FAMILY
from nanopoe.data.embedded_functions import PURE, standard_tools
from nanopoe.data.embedded_reading import READING
from nanopoe.data.embedded_tasks import TASKS, WORDS, Draws
from nanopoe.data.greetings import greeting_copies
from nanopoe.data.ingest import Raw

ROOT = Path(__file__).parents[1]
Pair = tuple[Raw, Conversation]


@pytest.fixture(scope="module")
def pairs(embedded: list[Raw]) -> list[Pair]:
    return [(raw, parse_conversation(raw.text, raw.where)) for raw in embedded]


def digest(raws: list[Raw]) -> str:
    return hashlib.sha256("\n".join(f"{raw.text}\0{raw.group}" for raw in raws).encode()).hexdigest()


def test_thousands_of_distinct_canonical_conversations(embedded: list[Raw], pairs: list[Pair]) -> None:
    assert len(embedded) >= 5000
    assert len({raw.text for raw in embedded}) == len(embedded)
    assert all(canonical(conversation, "x") == raw.text for raw, conversation in pairs)
    what = Counter(raw.where.split()[1] for raw in embedded)
    assert min(what[kind] for kind in ("answered", "called", "at", "again", "unfit")) >= 100
    assert min(what[kind.split()[0]] for kind in TASKS) >= 100
    assert sum(len(list(greeting_copies(iter([raw])))) == 2 for raw in embedded[:500]) > 50


def test_they_are_the_same_every_time(embedded: list[Raw]) -> None:
    code = ("from itertools import islice; from tests.test_embedded import digest; "
            "from nanopoe.data.embedded import embedded_conversations as e; "
            "print(digest(list(e())), digest(list(islice(e(1), 500))))")
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
                             check=True)
    first, second = process.stdout.split()
    assert first == digest(embedded)
    assert second != digest(embedded[:500])                                                 # control


# -- calls ------------------------------------------------------------------------------------------------------------

JSON_TYPES = {"string": str, "integer": int, "number": (int, float), "boolean": bool, "array": list, "object": dict}


def test_calls_fit_their_schemas_and_their_questions(pairs: list[Pair]) -> None:
    checked = 0
    for raw, conversation in pairs:
        schemas = {tool.name: tool.parameters for tool in conversation.tools or ()}
        asked = " ".join(m.content for m in conversation.messages if m.role == "user")
        for call in (c for m in conversation.messages for c in m.tool_calls or ()):
            schema: dict = schemas[call.name]
            assert set(schema["required"]) <= set(call.arguments) <= set(schema["properties"]), raw.where
            for name, value in call.arguments.items():
                assert isinstance(value, JSON_TYPES[schema["properties"][name]["type"]]), raw.where
                assert json.dumps(value, ensure_ascii=False) in asked, raw.where     # nothing is made up
                checked += 1
    assert checked > 3000


def test_results_are_what_the_functions_return(pairs: list[Pair]) -> None:
    tools = {tool.path: tool for tool in standard_tools()}
    checked = 0
    for raw, conversation in pairs:
        messages = conversation.messages
        families = [tools[path] for path in str(raw.group).split() if path in tools]
        named = {tool.name: [t for t in families if t.sentence == tool.description]
                 for tool in conversation.tools or ()}
        assert len({tool.description for tool in conversation.tools or ()}) == len(named), raw.where
        for i, message in enumerate(messages):
            calls = message.tool_calls or []
            if not calls or i == len(messages) - 1:
                assert not calls or raw.where.split()[1] in ("called", "at"), raw.where
                continue
            for j, call in enumerate(calls):
                returned = messages[i + 1 + j].content
                of_them = [t for t in named[call.name] if t.name == call.name] or named[call.name]
                assert json.loads(returned) in [t.call(call.arguments) for t in of_them], raw.where
                assert returned in messages[i + 1 + len(calls)].content, raw.where   # and the answer tells it
                checked += 1
    assert checked > 2000


def test_only_listed_functions_are_called() -> None:
    tools = {tool.path: tool for tool in standard_tools()}
    assert set(PURE) <= set(tools), "a function that this Python does not have, or has without a signature"
    assert len(tools) - len(PURE) > 100
    with pytest.raises(ValueError, match=r"shutil.rmtree is not among"):
        tools["shutil.rmtree"].call({"path": "/nothing"})
    draws = Draws(0, "test")
    for path in PURE:                                                        # the same value twice: nothing else counts
        arguments = tools[path].arguments(draws)
        assert json.dumps(tools[path].call(arguments)) == json.dumps(tools[path].call(arguments))
    assert tools["math.gcd"].call({"integers": [12, 18]}) == 6
    assert tools["posixpath.join"].call({"a": "/a", "p": ["b", "c"]}) == "/a/b/c"
    assert tools["calendar.monthrange"].call({"year": 2024, "month": 2}) == [3, 29]


def test_tools_say_what_the_functions_say() -> None:
    tools = {tool.path: tool.schema for tool in standard_tools()}
    assert tools["textwrap.shorten"] == {
        "name": "textwrap_shorten", "description": "Collapse and truncate the given text to fit in the given width.",
        "parameters": {"type": "object", "properties": {"text": {"type": "string"}, "width": {"type": "integer"},
                                                        "kwargs": {}}, "required": ["text", "width"]}}
    assert tools["shutil.rmtree"]["parameters"]["properties"]["ignore_errors"] == {"type": "boolean", "default": False}
    assert tools["str.upper"]["parameters"]["required"] == ["str"]


def test_where_no_tool_fits_none_is_called(pairs: list[Pair]) -> None:
    unfit = [conversation for raw, conversation in pairs if raw.where.split()[1] == "unfit"]
    assert len(unfit) > 400
    for conversation in unfit:
        answer = conversation.messages[-1]
        assert answer.tool_calls is None
        assert all(tool.name in answer.content for tool in conversation.tools or ())


def test_a_function_belongs_to_one_group(pairs: list[Pair]) -> None:
    groups: dict[str, set[str | None]] = {}
    real = {tool.name for tool in standard_tools()}
    for raw, conversation in pairs:
        assert raw.group is not None
        for tool in conversation.tools or ():
            if tool.name in real:                                            # not a made-up one
                groups.setdefault(tool.name, set()).add(raw.group)
    assert {len(found) for found in groups.values()} == {1}
    assert len({group for found in groups.values() for group in found}) >= len(groups) / FAMILY
    assert len({raw.group for raw, _ in pairs}) > 1500


def test_made_up_names_are_read_not_known(pairs: list[Pair]) -> None:
    """Two of three conversations with tools have them, and few come twice; those of functions come often."""
    real = {tool.name for tool in standard_tools()}
    with_tools = [{tool.name for tool in conversation.tools} for _, conversation in pairs if conversation.tools]
    made = [names for names in with_tools if not names & real]
    assert all(names <= real for names in with_tools if names & real)          # one or the other
    assert 0.6 < len(made) / len(with_tools) < 0.73
    counts = Counter(name for names in made for name in names)
    usual = Counter(name for names in with_tools for name in names & real)
    assert len(counts) > 0.75 * counts.total() and len(usual) < 0.1 * usual.total()


# -- tasks ------------------------------------------------------------------------------------------------------------

def value_of(expression: str) -> Fraction:
    """Exact value of + - * / on numbers, by a parser of its own."""
    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(str(node.value))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        assert isinstance(node, ast.BinOp), ast.dump(node)
        a, b = walk(node.left), walk(node.right)
        return {ast.Add: a + b, ast.Sub: a - b, ast.Mult: a * b, ast.Div: a / b if b else a}[type(node.op)]

    return walk(ast.parse(expression.strip(), mode="eval").body)


EQUATION = re.compile(r"(-?\d[\d.+*/ -]*?) = (-?\d+(?:\.\d+)?)")


def of_kind(pairs: list[Pair], kind: str) -> list[tuple[str, str]]:
    """(question, answer) of the tasks of this kind."""
    return [(c.messages[0].content, c.messages[-1].content) for raw, c in pairs
            if re.fullmatch(rf"embedded {kind} \d+", raw.where)]


# what the question asks for, from its numbers in order
ARITHMETIC: dict[str, Callable[[list[int]], Fraction | int]] = {
    "remainder": lambda n: n[0] % n[1], "sum": sum, "average": lambda n: Fraction(sum(n), len(n)),
    "percent": lambda n: Fraction(n[0] * n[1], 100), "bags": lambda n: n[0] + n[1] * n[2],
    "change": lambda n: n[2] - n[0] * n[1], "minutes": lambda n: n[0] * 60 + n[1]}
WORDED = {"plus": "+", "minus": "-", "times": "*"}


@pytest.mark.parametrize("kind", ["two numbers", *ARITHMETIC])
def test_arithmetic_is_right(pairs: list[Pair], kind: str) -> None:
    found = of_kind(pairs, kind)
    assert len(found) >= 100
    for question, answer in found:
        equations = [(left, Fraction(right)) for left, right in EQUATION.findall(answer)]
        assert equations
        assert all(value_of(left) == right for left, right in equations), answer
        if kind == "two numbers":
            a, sign, b = re.search(r"(\d+) (\S+) (\d+)", question).groups()              # type: ignore[union-attr]
            expected = value_of(f"{a} {WORDED.get(sign, sign)} {b}")
        else:
            numbers = [int(n) for n in re.findall(r"\d+", question)]
            if kind == "remainder" and question.endswith("fit?"):
                numbers = numbers[:2]
            expected = Fraction(ARITHMETIC[kind](numbers))
        assert equations[-1][1] == expected, (question, answer)


def quoted(text: str) -> list[str]:
    return re.findall(r'"([^"]*)"', text)


def listed(question: str) -> list[str]:
    return re.findall(r"[a-z]+", question.rpartition(":")[2])


def written(value: Any, compact: bool) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":") if compact else None)


def braced(question: str) -> dict[str, str | int]:
    return json.loads(re.search(r"\{.*\}", question)[0])                       # type: ignore[index, no-any-return]


def chosen(question: str) -> str:
    """The one of the names that begins, or ends, as asked."""
    names, _, rest = question.removeprefix("Of ").partition(": " if question.startswith("Of ") else ". ")
    part = rest.rstrip("?.").split()[-1]
    return next(name for name in names.split(", ")
                if (name.startswith(part) if "begins" in rest else name.endswith(part)))


def pairs_in(question: str) -> dict[str, Any]:
    """`a is 3, b = "x" and c = [1]` behind "Write as JSON: ", "Write as compact JSON: ", or at the beginning."""
    text, found = re.sub("^Write as (compact )?JSON: ", "", question), {}
    while name := re.match(r"(?:, | and )?(\w+)(?: is | = )", text):
        value, end = json.JSONDecoder().raw_decode(text, name.end())
        found[name[1]], text = value, text[end:]
    return found


def repeated(question: str) -> str:
    if question.startswith('Say "'):
        return question.removeprefix('Say "').removesuffix('" again.')
    return question.partition(": ")[2]


def described(question: str) -> str:
    """The name that stands with the description that is asked for."""
    listed, _, asked = question.rpartition("\n\n")
    if listed.startswith("["):
        things = {thing["name"]: thing["description"] for thing in json.loads(listed)}
    elif listed.startswith("{"):
        things = {thing["name"]: thing["description"] for thing in map(json.loads, listed.splitlines())}
    else:
        things = dict(line.split(": ", 1) for line in listed.splitlines())
    small = re.search(r'(?:as "|named |name: )(.*?)[.?"]', asked)[1].lower()         # type: ignore[index]
    (name,) = (name for name, text in things.items() if text.lower() == f"{small}.")
    return name


def asked_for(question: str) -> list[str]:
    return re.search(r"(?:Give me|Take) ([\w, ]+) (?:of that|from)", question)[1].split(", ")  # type: ignore[index, no-any-return]


def without_opening(question: str) -> str:
    return re.sub(r"^(Hello! |Hi, one question. |Hey, |Good morning. )", "", question)


TEXT: dict[str, Callable[[str], str]] = {
    "repeat": lambda q: repeated(without_opening(q)),
    "as json": lambda q: written(pairs_in(without_opening(q)), "compact JSON" in q),
    "look up": lambda q: written({name: braced(q)[name] for name in asked_for(q)}, written(braced(q), True) in q),
    "choose": lambda q: chosen(without_opening(q)),
    "reverse": lambda q: "".join(reversed(quoted(q)[0])),
    "count letter": lambda q: str(sum(letter == quoted(q)[0] for letter in quoted(q)[1])),
    "sort words": lambda q: ", ".join(sorted(listed(q))),
    "initials": lambda q: "".join(word[0] for word in listed(q)),
    "longest": lambda q: sorted(listed(q), key=len)[-1],
    "case": lambda q: quoted(q)[0].swapcase(),
    "replace": lambda q: re.sub(rf"\b{quoted(q)[0]}\b", quoted(q)[1], quoted(q)[2])}


@pytest.mark.parametrize("kind", list(TEXT))
def test_text_tasks_are_right(pairs: list[Pair], kind: str) -> None:
    found = of_kind(pairs, kind)
    assert len(found) >= 100
    for question, answer in found:
        assert answer == TEXT[kind](question), question


def test_names_by_their_descriptions_are_right(pairs: list[Pair]) -> None:
    found = of_kind(pairs, "described")
    assert len(found) >= 1000
    for question, answer in found:
        name = described(without_opening(question))
        assert answer in (name, json.dumps({"name": name})), question


def test_every_task_is_checked() -> None:
    assert {"two numbers", "described", *ARITHMETIC, *TEXT} == {*TASKS, *READING}
    assert len(set(WORDS)) == len(WORDS)


def test_one_problem_is_in_one_group(embedded: list[Raw]) -> None:
    groups: dict[str, set[str | None]] = {}
    for i in range(3000):
        task = TASKS["two numbers"](Draws(0, "worded", i))
        a, sign, b = re.search(r"(\d+) (\S+) (\d+)", task.question).groups()           # type: ignore[union-attr]
        groups.setdefault(f"{a} {WORDED.get(sign, sign)} {b}", set()).add(task.problem)
    assert {len(found) for found in groups.values()} == {1}
    tasks = [raw for raw in embedded if raw.group is not None and raw.group.startswith("task ")]
    assert len({raw.group for raw in tasks}) > 0.9 * len(tasks)              # control: not all in one
