"""Conversations made from the running Python, so that SFT and tool calling run with no network.

They are generated: each begins from a template here. The tools are functions of the standard library, with the
signatures and docstrings this installation has; results are what these functions return; answers of arithmetic and text
tasks are computed. A model trained on them learns the form of a conversation and of a call, and little else.

Functions are cut into families of neighbours, and the tools of a conversation all come from one family. The family is
its `group`, so that a function seen in train/ is not in val/. Tasks go by their problem.

In two of three conversations with tools the functions have made-up names and the values are made-up words: a model
that only knows the names and words it was trained on fails there, so it must learn to read them (arXiv 2410.04587
masks functions so).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

from nanopoe.data.conversations import canonical, conversation_of
from nanopoe.data.embedded_functions import Tool, standard_tools
from nanopoe.data.embedded_reading import READING, Inventive, made_up_names
from nanopoe.data.embedded_tasks import TASKS, Draws, listed, unfit_request
from nanopoe.data.fields import Record, assistant, system, user
from nanopoe.data.ingest import Raw

FAMILY = 4                               # functions shown together at most
# of each, at most
TRIES = {"answered": 18, "called": 18, "at once": 9, "again": 6, "unfit": 12, "task": 150, "reading": 3000}
_SYSTEM = ("",) * 8 + ("You are a helpful assistant.", "You are a careful assistant. Answer briefly.",
                       "Use a function where one helps.")
_OPENING = ("",) * 20 + ("Hello! ", "Hi, one question. ", "Hey, ", "Good morning. ")


def embedded_conversations(seed: int = 0) -> Iterator[Raw]:
    """Several thousand distinct conversations, the same for one seed and one installation of Python."""
    seen: set[str] = set()
    for raw in _all(seed):
        if raw.text not in seen:
            seen.add(raw.text)
            yield raw


def _all(seed: int) -> Iterator[Raw]:
    tools = iter(standard_tools())
    while family := list(islice(tools, FAMILY)):
        group = "functions " + " ".join(tool.path for tool in family)
        for what, messages, shown in _of_family(seed, family):
            yield _raw(messages, shown, f"embedded {what}", group)
    for kind, make in {**TASKS, **READING}.items():
        for i in range(TRIES["reading" if kind in READING else "task"]):
            draws = (Inventive if kind in READING else Draws)(seed, "task", kind, i)
            task = make(draws)
            messages = [user(draws.one(_OPENING) + task.question), assistant(task.answer)]
            yield _raw(messages, [], f"embedded {kind} {i}", f"task {task.problem}")


Made = tuple[str, list[Record], list[Tool]]                  # what it is, messages, tools shown


def _of_family(seed: int, family: list[Tool]) -> Iterator[Made]:
    names = " ".join(tool.path for tool in family)
    for at, tool in enumerate(family):
        what = "answered" if tool.pure else "called"
        for i in range(TRIES[what]):
            draws, here = _begin(seed, what, tool.path, i, family)
            yield f"{what} {tool.path} {i}", _one_call(draws, here[at]), _shown(draws, here, [here[at]])
    for i in range(TRIES["at once"] if len(family) > 1 else 0):
        draws, here = _begin(seed, "at once", names, i, family)
        pure = [tool for tool in here if tool.pure]
        chosen = _told_apart(draws.some(pure if len(pure) > 1 else here, 2))
        if len(chosen) == 2:
            yield f"at once {names} {i}", _two_at_once(draws, chosen), _shown(draws, here, chosen)
    for i in range(TRIES["again"] if any(tool.pure for tool in family) else 0):
        draws, here = _begin(seed, "again", names, i, family)
        tool = draws.one([tool for tool in here if tool.pure])
        yield f"again {names} {i}", _asked_again(draws, tool), _shown(draws, here, [tool])
    for i in range(TRIES["unfit"]):
        draws, here = _begin(seed, "unfit", names, i, family)
        shown = _shown(draws, here, [draws.one(here)])
        yield f"unfit {names} {i}", _no_tool_fits(draws, shown), shown


def _begin(seed: int, what: str, names: str, i: int, family: list[Tool]) -> tuple[Draws, list[Tool]]:
    """Draws of a conversation and the family as it is named there: in one of three as it is, else with made-up names
    and words."""
    if i % 3 == 0:
        return Draws(seed, what, names, i), family
    draws = Inventive(seed, what, names, i)
    names_made = iter(made_up_names(draws, len(family)))
    return draws, [replace(tool, schema={**tool.schema, "name": next(names_made)}) for tool in family]


def _raw(messages: list[Record], tools: list[Tool], where: str, group: str) -> Raw:
    value: dict[str, Any] = {"messages": messages}
    if tools:
        value["tools"] = [tool.schema for tool in tools]
    return Raw(canonical(conversation_of(value, where), where), where, group)


def _shown(draws: Draws, family: list[Tool], needed: list[Tool]) -> list[Tool]:
    """The needed tools among some others of the family, in drawn order; none that is described like another one."""
    others = _told_apart([*needed, *family])[len(needed):]
    shown = needed + draws.some(others, draws.integer(0, len(others)))
    return draws.some(shown, len(shown))


def _told_apart(tools: list[Tool]) -> list[Tool]:
    """The first of those with the same sentence: under made-up names nothing else tells them apart."""
    found: dict[str, Tool] = {}
    for tool in tools:
        found.setdefault(tool.sentence, tool)
    return list(found.values())


# -- conversations ----------------------------------------------------------------------------------------------------

def _first(draws: Draws, question: str) -> list[Record]:
    return [*system(draws.one(_SYSTEM)), user(draws.one(_OPENING) + question)]


def _one_call(draws: Draws, tool: Tool) -> list[Record]:
    """Question, call; of a function that can be called its result and an answer, too."""
    arguments = tool.arguments(draws)
    return [*_first(draws, _request(draws, tool, arguments)), *_answered(draws, [(tool, arguments)])]


def _two_at_once(draws: Draws, tools: list[Tool]) -> list[Record]:
    both = [(tool, tool.arguments(draws)) for tool in tools]
    requests = [_request(draws, tool, arguments) for tool, arguments in both]
    joined = draws.one((f"Two things. {requests[0]} {requests[1]}", f"{requests[0]} Then: {requests[1]}",
                        f"1. {requests[0]}\n2. {requests[1]}"))
    return [*_first(draws, joined), *_answered(draws, both)]


def _asked_again(draws: Draws, tool: Tool) -> list[Record]:
    """A second question with other values, about the same."""
    messages = _one_call(draws, tool)
    arguments = tool.arguments(draws)
    follow = draws.one(("And with {}?", "Now the same with {}.", "What about {}?")).format(listed(arguments))
    return [*messages, user(follow), *_answered(draws, [(tool, arguments)])]


def _no_tool_fits(draws: Draws, shown: list[Tool]) -> list[Record]:
    names = [tool.name for tool in shown]
    had = " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    answer = draws.one((f"I cannot do that: none of the functions I have fits. I can only call {had}.",
                        f"That is beyond the functions I was given, {had}.",
                        f"None of my functions can do that. What I have is {had}.",
                        f"Sorry, I have no function for that, only {had}."))
    return [*_first(draws, unfit_request(draws)), assistant(answer)]


def _answered(draws: Draws, calls: list[tuple[Tool, dict[str, Any]]]) -> list[Record]:
    """The message with the calls; if all can be called, the results and an answer that tells them."""
    said = draws.one(("",) * 5 + ("Let me call a function for that.", "I will look that up."))
    messages = [assistant(said, [{"name": tool.name, "arguments": arguments} for tool, arguments in calls])]
    if not all(tool.pure for tool, _ in calls):
        return messages
    results = [json.dumps(tool.call(arguments), ensure_ascii=False) for tool, arguments in calls]
    if len(results) == 1:
        answer = draws.one(("The result is {}.", "That gives {}.", "It is {}.", "{}")).format(results[0])
    else:
        answer = draws.one(("The first gives {}, the second {}.", "{} and {}.", "1. {}\n2. {}")).format(*results)
    return [*messages, *({"role": "tool", "content": result} for result in results), assistant(answer)]


# first words of docstrings that can stand in a request
_VERBS = {"add", "build", "calculate", "check", "collapse", "compare", "compile", "compute", "convert", "copy",
          "create", "deserialize", "encode", "escape", "execute", "expand", "extract", "fill", "find", "get", "guess",
          "join", "list", "log", "look", "move", "normalize", "open", "pad", "parse", "partition", "quote", "remove",
          "replace", "retrieve", "return", "serialize", "split", "test", "transform", "translate", "unpack", "unquote",
          "wrap"}


def _request(draws: Draws, tool: Tool, arguments: dict[str, Any]) -> str:
    """In words of the docstring, or by the name of the function; with all values the call needs."""
    task = tool.sentence.rstrip(".")
    given = f" with {listed(arguments)}" if arguments else ""
    named = (f"Call {tool.name}{given}.", f"Please run {tool.name}{given}.", f"What does {tool.name} give{given}?")
    small = task[0].lower() + task[1:]
    if task.split()[0].lower() not in _VERBS:
        return draws.one((*named, f'There is a function described as "{task}". Call it{given}.',
                          f'I need this: "{task}". Do it{given}.'))
    values = f" {listed(arguments, ' is ')}." if arguments else ""
    return draws.one((*named[:2], f"{task}.{values}", f"Please {small}.{values}", f"I need you to {small}.{values}",
                      f"Can you {small}?{values}"))
