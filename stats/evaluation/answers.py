"""Find the answer in a generated text and compare it with the right ones."""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Sequence
from typing import Literal

#: What may be ignored when answers are compared.
Ignored = Literal["case", "punctuation", "articles", "commas"]

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.IGNORECASE)
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),(?=\d{3})")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def extract(text: str, pattern: re.Pattern[str] | None, which: Literal["first", "last"]) -> str | None:
    """Return what a pattern matches: its first group, or all of it; None if it matches nowhere."""
    if pattern is None:
        return text
    found = list(pattern.finditer(text))
    if not found:
        return None
    match = found[0 if which == "first" else -1]
    groups = [group for group in match.groups() if group is not None]
    return groups[0] if groups else match.group()


def normalise(text: str, ignored: Collection[Ignored]) -> str:
    """Return the text without what is ignored; runs of white space count as one space."""
    if "commas" in ignored:
        text = _COMMA_IN_NUMBER.sub("", text)
    if "case" in ignored:
        text = text.lower()
    if "punctuation" in ignored:
        text = text.translate(_NO_PUNCTUATION)
    if "articles" in ignored:
        text = _ARTICLES.sub(" ", text)
    return " ".join(text.split())


def is_exact_match(answer: str | None, gold: Sequence[str], ignored: Collection[Ignored]) -> bool:
    """Tell whether an answer is one of the right ones."""
    if answer is None:
        return False
    found = normalise(answer, ignored)
    return any(found == normalise(each, ignored) for each in gold)
