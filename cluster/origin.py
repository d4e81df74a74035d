"""Where something in a recipe was written: the file, and the line of every key.

Errors and warnings about a recipe are made here, so that all of them open alike:
"merge.yaml:7: key models[1].parameters.density is 1.5; it must be in [0, 1]."
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from raymerge.merge_actors.errors import RecipeError


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """The file of one recipe and the lines of its keys."""

    file: str = "recipe"
    """Path of the file as the user gave it; "recipe" for a mapping made in Python."""
    line: int = 0
    """First line of the document in the file, counted from 1; 0 when there is no file."""
    lines: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Key path ("models[1].parameters.density") -> line, for every key of the document."""

    def at(self, key: str = "") -> str:
        """Return "file:line" of a key, or of its nearest ancestor that has a line."""
        while key and key not in self.lines:
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        line = self.lines.get(key, self.line)
        return f"{self.file}:{line}" if line else self.file

    def error(self, key: str, sentence: str) -> RecipeError:
        """Return the error "file:line: key KEY SENTENCE"."""
        return RecipeError(f"{self.at(key)}: key {key} {sentence}")


def join(parent: str, key: str) -> str:
    """Return the path of a key below another: "models[0]", "weight" -> "models[0].weight"."""
    return f"{parent}.{key}" if parent else key


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'ties'?)" for the nearest known name, or nothing.

    Short names are matched more loosely: one slip in `lamda` is a larger share of the word.
    """
    names = sorted(set(known))
    by_lower = {each.lower(): each for each in names}
    close = difflib.get_close_matches(name.lower(), list(by_lower), n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""
