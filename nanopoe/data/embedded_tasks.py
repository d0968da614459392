"""Generated questions of arithmetic and text with computed answers, and requests that no function of Python fits.

Each is a template with drawn values. An answer shows its steps as `expression = value`, so that they can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

from nanopoe.data.order import key64, unit

T = TypeVar("T")


class Draws:
    """Deterministic draws for one purpose: the same on any machine and in any version of Python."""

    def __init__(self, seed: int, purpose: str, *parts: int | str):
        self._key, self._count = key64(seed, purpose, *parts), 0

    def integer(self, low: int, high: int) -> int:
        """Uniform in low..high."""
        self._count += 1
        return low + int(unit(self._key, self._count) * (high - low + 1))

    def one(self, choices: Sequence[T]) -> T:
        return choices[self.integer(0, len(choices) - 1)]

    def some(self, choices: Sequence[T], n: int) -> list[T]:
        """n different ones, in drawn order."""
        left = list(choices)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in range(n)]


class Task(NamedTuple):
    question: str
    answer: str
    problem: str                 # the same for the same problem in other words: what a split goes by


NAMES = ("Ana", "Ben", "Chidi", "Dana", "Emil", "Farah", "Goran", "Hana", "Ines", "Jun", "Kofi", "Lena", "Mira", "Noor",
         "Omar", "Petra", "Quinn", "Rosa", "Sven", "Tala")
WORDS = ("amber", "anchor", "apple", "basket", "bridge", "candle", "canyon", "carpet", "castle", "cedar", "circle",
         "cloud", "copper", "coral", "cotton", "desert", "dolphin", "ember", "falcon", "feather", "forest", "garden",
         "ginger", "glacier", "hammer", "harbor", "hazel", "island", "ivory", "jacket", "kettle", "ladder", "lantern",
         "lemon", "level", "linen", "marble", "meadow", "melon", "mirror", "needle", "noon", "ocean", "olive", "orchid",
         "paper", "pebble", "pepper", "pillow", "planet", "pocket", "prairie", "quartz", "radar", "river", "rocket",
         "saddle", "salt", "shadow", "silver", "spring", "stone", "summer", "table", "temple", "thunder", "timber",
         "tulip", "valley", "velvet", "violet", "walnut", "water", "willow", "window", "winter", "wonder", "yellow")
CITIES = ("Accra", "Bergen", "Cusco", "Dakar", "Graz", "Hanoi", "Izmir", "Kyoto", "Lima", "Lyon", "Oslo", "Porto",
          "Quito", "Riga", "Seoul", "Tunis", "Utrecht", "Vilnius")
THINGS = ("apples", "books", "candles", "coins", "cups", "pencils", "shells", "stamps", "stickers", "tickets")


def listed(arguments: dict[str, Any], equals: str = " = ") -> str:
    """`x = 3 and y = "a"`, the values as JSON."""
    parts = [f"{name}{equals}{json.dumps(value, ensure_ascii=False)}" for name, value in arguments.items()]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


# -- arithmetic -------------------------------------------------------------------------------------------------------

def _two_numbers(draws: Draws) -> Task:
    sign = draws.one("+-*")
    a, b = draws.integer(2, 999), draws.integer(2, 99 if sign == "*" else 999)
    asked = {"+": f"{a} plus {b}", "-": f"{a} minus {b}", "*": f"{a} times {b}"}[sign]
    value = {"+": a + b, "-": a - b, "*": a * b}[sign]
    question = draws.one((f"What is {a} {sign} {b}?", f"What is {asked}?", f"Work out {a} {sign} {b}.",
                          f"Please compute {asked}."))
    answer = draws.one((f"{a} {sign} {b} = {value}", f"The answer is {value}, as {a} {sign} {b} = {value}."))
    return Task(question, answer, f"{a} {sign} {b}")


def _remainder(draws: Draws) -> Task:
    a, b = draws.integer(20, 999), draws.integer(3, 19)
    question = draws.one((f"Divide {a} by {b}. What are the quotient and the remainder?",
                          f"What is left over when {a} is divided by {b}, and how often does {b} fit?"))
    return Task(question, f"{b} fits {a // b} times: {b} * {a // b} = {b * (a // b)}. What is left is "
                          f"{a} - {b * (a // b)} = {a % b}.", f"{a} divmod {b}")


def _sum_of_list(draws: Draws) -> Task:
    numbers = [draws.integer(1, 99) for _ in range(draws.integer(3, 5))]
    terms = ", ".join(map(str, numbers))
    question = draws.one((f"Add up {terms}.", f"What is the sum of {terms}?"))
    return Task(question, f"{' + '.join(map(str, numbers))} = {sum(numbers)}", f"sum {terms}")


def _average(draws: Draws) -> Task:
    numbers = [draws.integer(1, 60) for _ in range(draws.one((2, 4, 5)))]
    terms, total = ", ".join(map(str, numbers)), sum(numbers)
    mean = Fraction(total, len(numbers))
    shown = str(mean.numerator) if mean.denominator == 1 else f"{float(mean):g}"     # halves, quarters, fifths: exact
    question = draws.one((f"What is the average of {terms}?", f"Find the mean of these numbers: {terms}."))
    return Task(question, f"The sum is {' + '.join(map(str, numbers))} = {total}. The average is "
                          f"{total} / {len(numbers)} = {shown}.", f"mean {terms}")


def _percent(draws: Draws) -> Task:
    p, n = draws.one((5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80)), 20 * draws.integer(2, 60)
    value = p * n // 100
    question = draws.one((f"What is {p} percent of {n}?", f"How much is {p}% of {n}?"))
    return Task(question, f"{n} * {p} / 100 = {value}", f"{p} percent of {n}")


def _bags(draws: Draws) -> Task:
    name, thing = draws.one(NAMES), draws.one(THINGS)
    have, bags, each = draws.integer(2, 60), draws.integer(2, 12), draws.integer(2, 15)
    question = (f"{name} has {have} {thing} and buys {bags} bags with {each} {thing} in each. "
                f"How many {thing} does {name} have now?")
    return Task(question, f"The bags hold {bags} * {each} = {bags * each} {thing}. Together with the {have} that makes "
                          f"{have} + {bags * each} = {have + bags * each} {thing}.", f"{have} + {bags} * {each}")


def _change(draws: Draws) -> Task:
    name, thing = draws.one(NAMES), draws.one(THINGS)
    count, price = draws.integer(2, 9), draws.integer(2, 9)
    paid = count * price + draws.integer(1, 40)
    question = f"{name} buys {count} {thing} for {price} coins each and pays with {paid}. How much comes back?"
    return Task(question, f"The {thing} cost {count} * {price} = {count * price}. What comes back is "
                          f"{paid} - {count * price} = {paid - count * price}.", f"{paid} - {count} * {price}")


def _minutes(draws: Draws) -> Task:
    hours, minutes = draws.integer(1, 23), draws.integer(1, 59)
    question = draws.one((f"How many minutes are {hours} hours and {minutes} minutes?",
                          f"Convert {hours} h {minutes} min to minutes."))
    return Task(question, f"{hours} * 60 + {minutes} = {hours * 60 + minutes}", f"{hours} h {minutes} min")


# -- text -------------------------------------------------------------------------------------------------------------

def _reverse(draws: Draws) -> Task:
    word = "".join(draws.some(WORDS, draws.integer(1, 2)))
    question = draws.one((f'Write "{word}" backwards.', f'Reverse the letters of "{word}".'))
    return Task(question, word[::-1], f"reverse {word}")


def _count_letter(draws: Draws) -> Task:
    words = draws.some(WORDS, draws.integer(1, 3))
    text, letter = " ".join(words), draws.one(words[0])
    question = draws.one((f'How often does the letter "{letter}" occur in "{text}"?',
                          f'Count the letter "{letter}" in "{text}".'))
    return Task(question, str(text.count(letter)), f"count {letter} in {text}")


def _sort_words(draws: Draws) -> Task:
    words = draws.some(WORDS, draws.integer(3, 6))
    question = draws.one((f"Sort these words by the alphabet: {', '.join(words)}",
                          f"Put in alphabetical order: {', '.join(words)}"))
    return Task(question, ", ".join(sorted(words)), f"sort {' '.join(words)}")


def _initials(draws: Draws) -> Task:
    words = draws.some(WORDS, draws.integer(3, 6))
    question = f"Take the first letter of each word: {' '.join(words)}"
    return Task(question, "".join(word[0] for word in words), f"initials {' '.join(words)}")


def _longest(draws: Draws) -> Task:
    words = draws.some(WORDS, 4)
    while len({len(word) for word in words}) < 4:            # one is the longest, without doubt
        words = draws.some(WORDS, 4)
    question = draws.one((f"Which is the longest of these words: {', '.join(words)}?",
                          f"Tell me the longest word: {', '.join(words)}?"))
    return Task(question, max(words, key=len), f"longest {' '.join(words)}")


def _case(draws: Draws) -> Task:
    text, case = " ".join(draws.some(WORDS, draws.integer(2, 4))), draws.one(("capital", "small"))
    given = text if case == "capital" else text.upper()
    return Task(f'Write "{given}" in {case} letters.', given.upper() if case == "capital" else given.lower(),
                f"case {given}")


def _replace(draws: Draws) -> Task:
    words = draws.some(WORDS, draws.integer(4, 6))
    old, new, text = words[draws.integer(0, 2)], words[-1], " ".join(words[:-1])
    return Task(f'Replace "{old}" by "{new}" in "{text}".', " ".join(new if w == old else w for w in words[:-1]),
                f"replace {old} {new} {text}")


TASKS: dict[str, Callable[[Draws], Task]] = {
    "two numbers": _two_numbers, "remainder": _remainder, "sum": _sum_of_list, "average": _average, "percent": _percent,
    "bags": _bags, "change": _change, "minutes": _minutes, "reverse": _reverse, "count letter": _count_letter,
    "sort words": _sort_words, "initials": _initials, "longest": _longest, "case": _case, "replace": _replace}


# -- what no function does --------------------------------------------------------------------------------------------

def unfit_request(draws: Draws) -> str:
    """Something that nothing in a standard library could do."""
    name, city, there = draws.one(NAMES), *draws.some(CITIES, 2)
    n, thing = draws.integer(2, 9), draws.one(THINGS)
    return draws.one((
        f"What is the weather in {city} right now?", f"Book a table for {n} in {city} tonight.",
        f"Tell {name} that I come {n} minutes late.", f"How much is a flight from {city} to {there}?",
        f"Order {n} {thing} and have them sent to {name}.", f"Call {name} and ask about the {thing}.",
        f"Which trains leave {city} for {there} after {n} o'clock?", f"Turn off the lights in {n} minutes.",
        f"Who won the football match in {city} yesterday?", f"Remind {name} to buy {n} {thing}.",
        f"Find me a flat with {n} rooms in {city}.", f"Take a photo of the {thing} for {name}."))
