"""Records of public datasets, and of users' own jsonl, to conversations.

An adapter takes one record and gives a Conversation or raises a DataError that names the field. `ADAPTERS` knows each
by name, with the place and the licence of the dataset; `conversations_of` runs one over records. What a dataset says is
not changed, but for what its adapter tells.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from nanopoe.data.adapters_calls import glaive, xlam
from nanopoe.data.conversations import Conversation, canonical
from nanopoe.data.fields import (
    Record,
    assistant,
    bad,
    function_of,
    list_field,
    made,
    optional_text,
    parsed_object,
    system,
    text_field,
    user,
)
from nanopoe.data.ingest import Raw
from nanopoe.errors import ConfigError, DataError

# -- one question, one answer -----------------------------------------------------------------------------------------

_MARK = re.compile(r"<<([^<>]*)=([^<>=]*)>>")                # <<48/2=24>>, in front of the 24
CALCULATOR: Record = {
    "name": "calculator", "description": "Evaluate an arithmetic expression.",
    "parameters": {"type": "object", "properties": {"expression": {"type": "string"}}, "required": ["expression"]}}


def gsm8k(record: Record) -> Conversation:
    """{question, answer}; without the calculator marks. The last line of an answer is `#### number`."""
    answer = _MARK.sub("", _gsm8k_answer(record))
    return made([user(text_field(record, "question")), assistant(answer)], None, "answer")


def gsm8k_calculator(record: Record) -> Conversation:
    """As `gsm8k`, each mark a call of a calculator with its result, inside the text, as nanochat does it."""
    messages = [user(text_field(record, "question"))]
    parts = _MARK.split(_gsm8k_answer(record))               # text, expression, result, text, ..
    for text, expression, result in zip(parts[0::3], parts[1::3], parts[2::3], strict=False):
        call = {"name": CALCULATOR["name"], "arguments": {"expression": expression}}
        messages += [assistant(text, [call]), {"role": "tool", "content": result}]
    return made([*messages, assistant(parts[-1])], [CALCULATOR], "answer")


def _gsm8k_answer(record: Record) -> str:
    answer = text_field(record, "answer")
    if not re.search(r"^#### \S", answer, re.MULTILINE):
        raise bad("answer", "has no line '#### number'")
    if (rest := _MARK.sub("", answer)) and ("<<" in rest or ">>" in rest):
        raise bad("answer", "has a calculator mark that is none")
    return answer


def math_instruct(record: Record) -> Conversation:
    """{instruction, output, source}."""
    return made([user(text_field(record, "instruction")), assistant(text_field(record, "output"))], None, "output")


def magicoder(record: Record) -> Conversation:
    """{instruction, response}."""
    return made([user(text_field(record, "instruction")), assistant(text_field(record, "response"))], None, "response")


def alpaca(record: Record) -> Conversation:
    """{instruction, input, output}; an input that is not blank follows the instruction after an empty line."""
    question, extra = text_field(record, "instruction"), optional_text(record, "input")
    messages = [user(f"{question}\n\n{extra}" if extra else question), assistant(text_field(record, "output"))]
    return made([*system(optional_text(record, "system")), *messages], None, "output")


# -- turns ------------------------------------------------------------------------------------------------------------

_SHAREGPT = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
             "assistant": "assistant", "function_call": "call", "observation": "tool", "tool": "tool"}


def sharegpt(record: Record) -> Conversation:
    """{conversations: [{from, value}], tools}; a value of `function_call` is the JSON of a call, or of several.

    A blank system message is left out.
    """
    messages: list[Record] = []
    for i, turn in enumerate(list_field(record, "conversations")):
        where = f"conversations.{i}"
        said_by = str(turn.get("from"))
        if said_by not in _SHAREGPT:
            raise bad(where, f"from {said_by[:80]!r} is not known")
        role, value = _SHAREGPT[said_by], text_field({f"{where}.value": turn.get("value")}, f"{where}.value", True)
        if role == "system" and i == 0:
            messages += system(value)
        elif role == "call":
            calls = list_field({where: value if value.lstrip().startswith("[") else f"[{value}]"}, where)
            messages.append(assistant("", [_call(call, where) for call in calls]))
        else:
            messages.append({"role": role, "content": value})
    return made(messages, _tools(record), "conversations")


def openai(record: Record) -> Conversation:
    """{messages: [{role, content, tool_calls, tool_call_id}], tools}: as OpenAI's chat API takes it, or canonical.

    Contents may be lists of text parts, arguments may be JSON in a string. Results are put in the order of the calls. A
    blank system message is left out.
    """
    messages: list[Record] = []
    ids: list[list[str]] = []                                # of each message: of its calls, or of the call it answers
    for i, message in enumerate(list_field(record, "messages")):
        where = f"messages.{i}"
        other = {key for key in message if message[key] is not None} - _MESSAGE_KEYS
        if other:
            raise bad(where, f"a message with {', '.join(sorted(other))[:200]}")
        role, content = message.get("role"), _content(message.get("content"), where)
        if role == "system" and i == 0 and not content.strip():
            continue
        calls = list_field(message, "tool_calls") if message.get("tool_calls") else []
        known = [call.get("id") for call in calls] if calls else [message.get("tool_call_id")]
        ids.append([key for key in known if isinstance(key, str)])
        messages.append({"role": role, "content": content,
                         **({"tool_calls": [_call(call, where) for call in calls]} if calls else {})})
    return made(_in_call_order(messages, ids), _tools(record), "messages")


_MESSAGE_KEYS = {"role", "content", "tool_calls", "tool_call_id", "name"}


def _in_call_order(messages: list[Record], ids: list[list[str]]) -> list[Record]:
    """Results behind a message with calls sorted as the calls, where both have ids."""
    ordered = list(messages)
    for i, message in enumerate(messages):
        if "tool_calls" not in message:
            continue
        end = i + 1
        while end < len(messages) and messages[end]["role"] == "tool":
            end += 1
        results, calls = messages[i + 1:end], ids[i]
        answered = [key for result_ids in ids[i + 1:end] for key in result_ids]
        if not answered or not calls:
            continue
        if sorted(answered) != sorted(set(calls)) or len(answered) != len(results):
            raise bad(f"messages.{i}", f"the calls {', '.join(calls)[:90]} have the results {', '.join(answered)[:90]}")
        by_id = dict(zip(answered, results, strict=True))
        ordered[i + 1:end] = [by_id[key] for key in calls]
    return ordered


def _content(content: object, where: str) -> str:
    """A text, or the texts of a list of parts put together; null, of a message with calls, is ""."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{where}.content", f"is {type(content).__name__}, not a string or a list of text parts")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise bad(f"{where}.content", "has a part that is no text")
    return "".join(part["text"] for part in content)


def _call(call: Record, where: str) -> Record:
    """{"name", "arguments"}, bare or inside {"id", "type": "function", "function": {..}}."""
    if isinstance(call.get("function"), dict):
        call = call["function"]
    return {"name": call.get("name"), "arguments": parsed_object(call.get("arguments", {}), f"{where}.arguments")}


def _tools(record: Record) -> list[Record]:
    if not record.get("tools"):
        return []
    return [function_of(tool, f"tools.{i}") for i, tool in enumerate(list_field(record, "tools"))]


# -- by name ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Adapter:
    """`convert` a record. A dataset of the hub has an id, perhaps a config, and the split to train on."""

    convert: Callable[[Record], Conversation]
    hub_id: str | None = None
    split: str = "train"
    license: str | None = None           # as its page states it; None: none stated, or your own data
    config: str | None = None
    gated: bool = False                  # its terms must be accepted on the hub before it can be read


ADAPTERS = {
    "glaive-function-calling-v2": Adapter(glaive, "glaiveai/glaive-function-calling-v2", license="apache-2.0"),
    "xlam-function-calling-60k": Adapter(xlam, "Salesforce/xlam-function-calling-60k", license="cc-by-4.0", gated=True),
    "gsm8k": Adapter(gsm8k, "openai/gsm8k", license="mit", config="main"),
    "gsm8k-calculator": Adapter(gsm8k_calculator, "openai/gsm8k", license="mit", config="main"),
    "math-instruct": Adapter(math_instruct, "TIGER-Lab/MathInstruct", license="mit"),
    "code-alpaca-20k": Adapter(alpaca, "sahil2801/CodeAlpaca-20k", license="cc-by-4.0"),
    "magicoder-evol-instruct-110k": Adapter(magicoder, "ise-uiuc/Magicoder-Evol-Instruct-110K", license="apache-2.0"),
    "ultrachat-200k": Adapter(openai, "HuggingFaceH4/ultrachat_200k", "train_sft", "mit"),
    "openhermes-2.5": Adapter(sharegpt, "teknium/OpenHermes-2.5"),
    "smoltalk": Adapter(openai, "HuggingFaceTB/smoltalk", license="apache-2.0", config="all"),
    "smol-smoltalk": Adapter(openai, "HuggingFaceTB/smol-smoltalk", license="apache-2.0"),
    "alpaca": Adapter(alpaca),
    "sharegpt": Adapter(sharegpt),
    "messages": Adapter(openai),
}
_CORRECT = "correct or remove it"


def adapter(name: str) -> Adapter:
    if name not in ADAPTERS:
        raise ConfigError(f"no adapter '{name}'", do=f"there are {', '.join(ADAPTERS)}")
    return ADAPTERS[name]


def conversations_of(name: str, rows: Iterable[Record]) -> Iterator[Raw]:
    """Canonical conversations of the records of dataset `name`, in their order.

    A bad row is a DataError that names dataset, row (from 0) and field; who reads many rows one by one, as ingest does,
    can count it and go on. Bad is, too, a conversation that ends with the user: nothing answers that turn.
    """
    convert = adapter(name).convert
    for number, row in enumerate(rows):
        where = f"{name} row {number}"
        if not isinstance(row, dict):
            raise DataError(f"is {type(row).__name__}, not an object", where, _CORRECT)
        try:
            conversation = convert(row)
        except DataError as error:
            raise DataError(f"{error.where}: {error.what}", where, error.do or _CORRECT) from error
        yield Raw(canonical(conversation, where), where)
