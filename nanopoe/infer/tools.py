"""Evaluation of tool calling and arithmetic: greedy replies to the first question of conversations, and what they are.

Of every conversation the prompt is all up to its first assistant message, and that message is the reference. The JSON
of the tools is written in each layout that training uses: a model may know one and fail on another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from nanopoe import dist
from nanopoe.data.conversations import Conversation, Function, Message, Prompt, ToolCall, parse_conversation
from nanopoe.data.render import (
    ASSISTANT_END,
    CALL_START,
    LAYOUTS,
    ONE_LINE,
    RESULT_START,
    ChatTokenizer,
    parse_reply,
    render_prompt,
)
from nanopoe.infer.answers import exact, final_number, numbers_in
from nanopoe.infer.constrain import CallConstraint, CallStats
from nanopoe.infer.engine import Engine
from nanopoe.infer.text import ends
from nanopoe.tokenizer import Tokenizer

LAYOUT_NAMES: dict[str, dict[str, Any]] = {"one": ONE_LINE, "4": LAYOUTS[0], "2": LAYOUTS[1], "compact": LAYOUTS[2]}
# what is counted of the replies to prompts with tools: name -> of which replies
METRICS = {"parse": "replies that open a call", "called": "references with calls", "function": "references with calls",
           "arguments": "references with calls", "hallucinated": "replies with a call that parses",
           "refusal": "references without a call", "false_calls": "references without a call", "stop": "replies"}
Show = Callable[[int, int], None]
Keep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Case:
    """What is asked, the answer that the data has, and where in the data."""

    prompt: Prompt
    answer: Message
    where: str

    @property
    def tools(self) -> Sequence[Function]:
        return self.prompt.tools or ()


def case_of(conversation: Conversation, where: str) -> Case:
    """Up to the first message of the assistant, and that message."""
    first = next(i for i, message in enumerate(conversation.messages) if message.role == "assistant")
    return Case(Prompt(messages=conversation.messages[:first], tools=conversation.tools), conversation.messages[first],
                where)


def cases_of(texts: Iterable[str], name: str, limit: int | None = None) -> tuple[list[Case], list[Case]]:
    """(with tools, arithmetic): conversations with tools; those without whose reference ends in a number that the
    question does not have, since to repeat one is no arithmetic.

    `limit` takes the first so many of each. DataError for a text that is no conversation.
    """
    with_tools: list[Case] = []
    arithmetic: list[Case] = []
    for ordinal, text in enumerate(texts):
        where = f"{name} conversation {ordinal}"
        case = case_of(parse_conversation(text, where), where)
        kept, number = (with_tools if case.tools else arithmetic), final_number(case.answer.content)
        computed = number is not None and number not in numbers_in(case.prompt.messages[-1].content)
        if (case.tools or computed) and (limit is None or len(kept) < limit):
            kept.append(case)
    return with_tools, arithmetic


# -- what a reply is --------------------------------------------------------------------------------------------------

def judge(case: Case, tokenizer: ChatTokenizer, reply: Sequence[int] | str, stopped: bool) -> dict[str, bool | None]:
    """Each of METRICS: true, false, or null where it does not apply. `stopped`: assistant_end came in the budget.

    parse: every call that is opened is JSON with a name and arguments, and is closed. called: a call is opened.
    function: all parse, and names are those of the reference, in order. arguments: those are the same JSON values, too;
    1 is 1.0 and is not true. hallucinated: a call has an argument that `is_hallucinated`. refusal: no call is opened;
    false_calls: one is.
    """
    opened = reply.count(CALL_START) if isinstance(reply, str) else \
        list(reply).count(tokenizer.special_ids[CALL_START])
    calls, wanted = parse_reply(tokenizer, reply).calls, case.answer.tool_calls or []
    parses = len(calls) == opened
    right = parses and [call.name for call in calls] == [call.name for call in wanted]
    same = right and all(same_json(a.arguments, b.arguments) for a, b in zip(calls, wanted, strict=True))
    return {"parse": parses if opened else None,
            "called": opened > 0 if wanted else None,
            "function": right if wanted else None,
            "arguments": same if wanted else None,
            "hallucinated": any(hallucinated(call, case.prompt) for call in calls) if calls else None,
            "refusal": None if wanted else opened == 0,
            "false_calls": None if wanted else opened > 0,
            "stop": stopped}


def same_json(a: Any, b: Any) -> bool:
    """Equal as JSON: keys in any order, 1 is 1.0, and neither is true."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(value, b[key]) for key, value in a.items())
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return bool(a == b)


def hallucinated(call: ToolCall, prompt: Prompt) -> list[str]:
    """Names of the arguments of a call that are made up.

    One is if the schema of the function does not declare its name (and has no additionalProperties); every argument of
    a function that was not given is. Or if it holds a string or number, at any depth, that does not stand in a message
    of the prompt, nor in the schema of the argument as enum, const, default or example. A string stands there, letter
    case aside, as it is or as JSON writes it; a number by its value. The text of the tools is no source of values.
    """
    schema = next((tool.parameters for tool in prompt.tools or () if tool.name == call.name), {})
    declared = schema.get("properties")
    declared = declared if isinstance(declared, dict) else {}
    text = "\n".join(message.content for message in prompt.messages)
    return [name for name, value in call.arguments.items()
            if (name not in declared and not schema.get("additionalProperties"))
            or not _grounded(value, text, list(_stated(declared.get(name))))]


def _grounded(value: Any, text: str, stated: Sequence[Any]) -> bool:
    for leaf in _leaves(value):
        if leaf is None or isinstance(leaf, bool) or any(same_json(leaf, known) for known in stated):
            continue
        if isinstance(leaf, str):
            written = json.dumps(leaf, ensure_ascii=False)[1:-1]
            if leaf.casefold() not in text.casefold() and written.casefold() not in text.casefold():
                return False
        elif Decimal(str(leaf)) not in numbers_in(text):
            return False
    return True


def _stated(schema: Any) -> Iterator[Any]:
    """Values that a JSON schema names, at any depth."""
    if isinstance(schema, list):
        for part in schema:
            yield from _stated(part)
    elif isinstance(schema, dict):
        for key, part in schema.items():
            if key in ("enum", "const", "default", "example", "examples"):
                yield from _leaves(part)
            else:
                yield from _stated(part)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (dict, list)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value


# -- of many ----------------------------------------------------------------------------------------------------------

def tally(judged: Sequence[Mapping[str, bool | None]]) -> dict[str, dict[str, Any]]:
    """Of each metric `n` of `of`, the replies it applies to, and the rate n / of, null of none."""
    return {metric: share([one[metric] for one in judged]) for metric in METRICS}


def share(found: Sequence[bool | None]) -> dict[str, Any]:
    n, of = sum(value is True for value in found), sum(value is not None for value in found)
    return {"n": n, "of": of, "rate": n / of if of else None}


@dataclass(frozen=True)
class Budget:
    """`tokens` a reply at most, `batch` replies at a time."""

    tokens: int
    batch: int


def evaluate_calls(engine: Engine, tokenizer: Tokenizer, cases: Sequence[Case], layouts: Sequence[str], budget: Budget,
                   constrained: bool = False, show: Show = lambda done, total: None,
                   keep: Keep = lambda reply: None) -> dict[str, Any]:
    """METRICS as of `tally`: `layouts` has each of these names of LAYOUT_NAMES, `all` those together.

    too_long: prompts that the model was not trained to see the whole of, left out. With constrained also `calls`, the
    sums of CallStats. `show` is told how many of how many prompts are answered, `keep` is given every reply with what
    was wanted and found. ConfigError for a schema that cannot constrain a call.
    """
    for case in cases if constrained else ():
        CallConstraint(case.tools, tokenizer)                # refused now, not after an hour; kept, many are gigabytes
    tools = {i: case.tools for i, case in enumerate(cases)} if constrained else {}
    total, done, too_long = len(layouts) * len(cases), 0, 0
    everything: list[dict[str, bool | None]] = []
    found: dict[str, Any] = {}
    calls = CallStats()
    for name in layouts:
        prompts = [render_prompt(tokenizer, case.prompt, LAYOUT_NAMES[name]) for case in cases]
        fit = [i for i, prompt in enumerate(prompts) if len(prompt) <= engine.weights.config.sequence_len]
        too_long += len(prompts) - len(fit)
        judged = []
        for i, ids, stopped in answered(engine, tokenizer, {i: prompts[i] for i in fit}, budget, tools, calls):
            judged.append(judge(cases[i], tokenizer, ids, stopped))
            keep({"conversation": i, "layout": name, **judged[-1], "prompt": tokenizer.decode(prompts[i]),
                  "reply": tokenizer.decode(ids),
                  "wanted": cases[i].answer.model_dump(mode="json", exclude_none=True)})
            show(done + len(judged), total)
        done += len(prompts)
        found[name] = tally(judged)
        everything += judged
    return {"prompts": len(everything), "too_long": too_long, "layouts": found, "all": tally(everything),
            "calls": calls.as_dict() if constrained else None}


def evaluate_arithmetic(engine: Engine, tokenizer: Tokenizer, cases: Sequence[Case], budget: Budget,
                        show: Show = lambda done, total: None) -> dict[str, Any]:
    """exact: the last number of a reply is that of the reference; stop as of METRICS; too_long as of evaluate_calls."""
    prompts = [render_prompt(tokenizer, case.prompt) for case in cases]
    fit = {i: prompt for i, prompt in enumerate(prompts) if len(prompt) <= engine.weights.config.sequence_len}
    right: list[bool | None] = []
    stops: list[bool | None] = []
    for i, ids, stopped in answered(engine, tokenizer, fit, budget):
        right.append(exact(parse_reply(tokenizer, ids).text, cases[i].answer.content))
        stops.append(stopped)
        show(len(right), len(fit))
    return {"prompts": len(fit), "too_long": len(prompts) - len(fit), "exact": share(right), "stop": share(stops)}


def answered(engine: Engine, tokenizer: Tokenizer, prompts: Mapping[int, Sequence[int]], budget: Budget,
             tools: Mapping[int, Sequence[Function]] | None = None, calls: CallStats | None = None
             ) -> Iterator[tuple[int, list[int], bool]]:
    """(key of the prompt, greedy reply, whether assistant_end ended it), short prompts first.

    A reply also ends where a result would begin, or another document. `tools` of a prompt constrain its calls; `calls`
    gets what was counted of them.
    """
    order = sorted(prompts, key=lambda i: (len(prompts[i]), i))
    stop = ends(tokenizer) | {tokenizer.special_ids[RESULT_START]}
    for start in range(0, len(order), budget.batch):
        dist.mark("replies")
        rows = order[start:start + budget.batch]
        constraint = [CallConstraint(tools[i], tokenizer) for i in rows] if tools else None
        generation = engine.stream([prompts[i] for i in rows], max_new_tokens=budget.tokens, stop=stop,
                                   constraint=constraint)
        replies: list[list[int]] = [[] for _ in rows]
        for row, token, _ in generation:
            replies[row].append(token)
        if calls is not None and generation.calls is not None:
            calls.add(generation.calls)
        for i, reply, end in zip(rows, replies, generation.ends, strict=True):
            yield i, reply, end == tokenizer.special_ids[ASSISTANT_END]
