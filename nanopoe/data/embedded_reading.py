"""Generated exercises in reading: what a call needs besides its form.

Find a name or a value in the text and write it again, letter by letter. Values are of all kinds that arguments have, so
that a kind which only few functions take is no surprise, and of lists, which are long; JSON is also compact, where what
is copied is cut into other tokens; words are made up, so that none can be known by heart.
"""

from __future__ import annotations

import builtins
import json
import keyword
import sys
from collections.abc import Callable, Sequence
from typing import Any

from nanopoe.data.embedded_functions import BY_NAME, KINDS
from nanopoe.data.embedded_tasks import WORDS, Draws, T, Task, listed

# built-in names, keywords, modules: other tokens than those of made-up words
_NAMES_OF_PYTHON = tuple(sorted(name for name in {*dir(builtins), *keyword.kwlist, *sys.stdlib_module_names}
                                if name.isalpha() and len(name) > 2))
# few that begin with one plain consonant: the words should be none
_SYLLABLE = (("bl", "br", "d", "dr", "fl", "gl", "gr", "kl", "kr", "l", "m", "pl", "pr", "r", "sk", "sl", "sn", "sp",
              "st", "t", "tr", "v", "z"), ("a", "e", "i", "o", "u"), ("", "", "", "l", "n", "r", "s"))


LISTS = "ints", "sorted", "words"
ONE_LINE, COMPACT = (", ", ": "), (",", ":")        # separators of JSON


class Inventive(Draws):
    """Draws that make up a word wherever one of WORDS is asked for: who is to write it again must have read it."""

    def one(self, choices: Sequence[T]) -> T:
        return self.word() if choices is WORDS else super().one(choices)                  # type: ignore[return-value]

    def some(self, choices: Sequence[T], n: int) -> list[T]:
        if choices is not WORDS:
            return super().some(choices, n)
        made: dict[str, None] = {}
        while len(made) < n:
            made[self.word()] = None
        return list(made)                                                                 # type: ignore[arg-type]

    def word(self) -> str:
        """A name of Python's own, or two or three syllables: "shutil", "trelori"."""
        if self.integer(0, 1):
            return super().one(_NAMES_OF_PYTHON)
        return "".join(super(Inventive, self).one(part) for _ in range(self.integer(2, 3)) for part in _SYLLABLE)


def _value(draws: Draws) -> Any:
    kind = draws.integer(0, 4)
    if kind >= 3:
        return KINDS[draws.one(sorted(KINDS) if kind == 3 else LISTS)].draw(draws)
    return draws.integer(2, 9999) if kind == 0 else " ".join(draws.some(WORDS, draws.integer(1, 3)))


def _names(draws: Draws, n: int) -> list[str]:
    """Names of values: made up, or those that parameters have."""
    return draws.some(WORDS if draws.integer(0, 1) else sorted(BY_NAME), n)


def made_up_names(draws: Draws, n: int, most: int = 2) -> list[str]:
    """n different ones as functions have, of up to `most` words: some times they begin alike, as those of a module."""
    words, before = iter(draws.some(WORDS, most * n + 1)), ""
    if draws.integer(0, 3) == 0:
        before = f"{next(words)}_"
    return [before + "_".join(next(words) for _ in range(draws.integer(1, most))) for _ in range(n)]


def _json(value: Any, separators: tuple[str, str] = ONE_LINE) -> str:
    return json.dumps(value, ensure_ascii=False, separators=separators)


def _repeat(draws: Draws) -> Task:
    values = [_value(draws) for _ in range(draws.integer(1, 10))]
    text = " ".join(value if isinstance(value, str) else _json(value) for value in values)
    question = draws.one((f"Repeat: {text}", f'Say "{text}" again.', f"Write this once more: {text}"))
    return Task(question, text, f"repeat {text}")


def _as_json(draws: Draws) -> Task:
    values = {name: _value(draws) for name in _names(draws, draws.integer(1, 5))}
    given = listed(values, draws.one((" is ", " = ")))
    layout, what = draws.one(((ONE_LINE, "JSON"), (COMPACT, "compact JSON")))
    question = draws.one((f"Write as {what}: {given}", f"Write as {what}: {given}.",       # the full stop is no value's
                          f"{given}. Make that a {what} object."))
    return Task(question, _json(values, layout), f"json {given}")


def _look_up(draws: Draws) -> Task:
    values = {name: _value(draws) for name in _names(draws, draws.integer(2, 5))}
    layout = draws.one((ONE_LINE, COMPACT))
    text, names = _json(values, layout), draws.some(list(values), draws.integer(1, min(3, len(values))))
    question = draws.one((f"{text}\nGive me {', '.join(names)} of that.", f"Take {', '.join(names)} from {text}."))
    return Task(question, _json({name: values[name] for name in names}, layout), f"look up {names} {text}")


def _choose(draws: Draws) -> Task:
    names = made_up_names(draws, draws.integer(2, 5), 3)
    wanted = draws.one(names)
    question = draws.one((f"Of {', '.join(names)}: which begins with {wanted[:4]}?",
                          f"{', '.join(names)}. Give me the one that ends in {wanted[-4:]}."))
    by_start = question.startswith("Of")
    same = [name for name in names if (name[:4] == wanted[:4] if by_start else name[-4:] == wanted[-4:])]
    return Task(question, wanted, f"choose {question}") if len(set(same)) == 1 else _choose(draws)


def _described(draws: Draws) -> Task:
    """The name that stands with a description, as a function's does in its schema."""
    n = draws.integer(2, 4)
    things = {name: " ".join(draws.some(WORDS, draws.integer(2, 4))).capitalize() + "."
              for name in made_up_names(draws, n, 3)}
    wanted = draws.one(list(things))
    given = draws.one((_json([{"name": name, "description": text} for name, text in things.items()]),
                        "\n".join(_json({"name": name, "description": text}) for name, text in things.items()),
                        "\n".join(f"{name}: {text}" for name, text in things.items())))
    asked, small = things[wanted], things[wanted][:-1].lower()
    question = draws.one((f"{given}\n\nWhich one is described as \"{asked}\"", f"{given}\n\nWhat is named {small}?",
                          f"{given}\n\nGive me the name: {small}."))
    return Task(question, draws.one((wanted, _json({"name": wanted}))), f"described {question}")


READING: dict[str, Callable[[Draws], Task]] = {
    "repeat": _repeat, "as json": _as_json, "look up": _look_up, "choose": _choose, "described": _described}
