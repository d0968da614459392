"""Numbers in texts: whether an answer ends in the right one."""

from __future__ import annotations

import re
from decimal import Decimal

# 12, -3.5, 1,200. A sign belongs to its number unless it stands behind a number, a word or a bracket, as in 7-5.
_NUMBER = re.compile(r"(?:(?<![\w)\].])[-−])?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_NOTHING_MORE = re.compile(r"[^\w]*\Z")


def numbers_in(text: str) -> list[Decimal]:
    """All numbers of `text` in order. 1e5 is two of them, 3/4 too."""
    return [_value(found[0]) for found in _NUMBER.finditer(text)]


def last_number(text: str) -> Decimal | None:
    return next(reversed(numbers_in(text)), None)


def final_number(text: str) -> Decimal | None:
    """The number that `text` ends in: no letter or digit follows it, as in "#### 42" and "7 + 5 = 12."; else None."""
    *_, last = (None, *_NUMBER.finditer(text))
    return _value(last[0]) if last is not None and _NOTHING_MORE.match(text, last.end()) else None


def exact(reply: str, reference: str) -> bool:
    """The last number of the reply is that of the reference: 42 is 42.0, and 1,200 is 1200."""
    wanted = last_number(reference)
    return wanted is not None and last_number(reply) == wanted


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", "").replace("−", "-"))
