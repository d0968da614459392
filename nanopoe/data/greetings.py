"""Case augmentation of conversations (SPEC 8): users greet in any case, so a greeting is learned in several."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from nanopoe.data.conversations import canonical, parse_conversation
from nanopoe.data.ingest import Raw
from nanopoe.data.order import key64

GREETINGS = ("good afternoon", "good evening", "good morning", "good day", "hello there", "hi there",
             "hey there", "salutations", "greetings", "what's up", "howdy", "hello", "hiya", "hey", "sup",
             "hi", "yo")
# at the very beginning, as a whole word: "yo" is in neither "You are", "yo-yo" nor "yo's"; longer ones stand first
_OPENING = re.compile(rf"\s*({'|'.join(map(re.escape, GREETINGS))})(?![\w'’-])", re.IGNORECASE)


def greeting_copies(documents: Iterator[Raw], seed: int = 0) -> Iterator[Raw]:
    """Every conversation, and behind one whose first user text opens with a greeting, a copy in another case.

    Lower, upper, title or capitalised, by a hash of the conversation among those that change it; the rest stays as it
    is. Only for a training split: a copy in the other split would be what was trained on.
    """
    for document in documents:
        yield document
        copied = with_other_greeting(document.text, document.where, seed)
        if copied is not None:
            yield replace(document, text=copied, where=f"{document.where}, greeting copy")


def with_other_greeting(text: str, where: str, seed: int = 0) -> str | None:
    """A canonical conversation with its opening greeting in another case; None if it opens with none."""
    conversation = parse_conversation(text, where)
    at = next(i for i, message in enumerate(conversation.messages) if message.role == "user")
    first = conversation.messages[at].content
    opening = _OPENING.match(first)
    if opening is None:
        return None
    greeting = opening[1]
    cases = (greeting.lower(), greeting.upper(), _title(greeting), greeting.capitalize())
    others = [case for case in dict.fromkeys(cases) if case != greeting]
    chosen = others[key64(seed, "greeting", text) % len(others)]
    messages = list(conversation.messages)
    content = first[:opening.start(1)] + chosen + first[opening.end(1):]
    messages[at] = messages[at].model_copy(update={"content": content})
    return canonical(conversation.model_copy(update={"messages": messages}), where)


def without_greeting(text: str) -> str:
    """`text` without an opening greeting and the punctuation behind it."""
    opening = _OPENING.match(text)
    return text if opening is None else text[opening.end():].lstrip(" ,.!")


def _title(words: str) -> str:
    """str.title, which would make "What'S up" of an apostrophe."""
    return " ".join(word.capitalize() for word in words.split(" "))
