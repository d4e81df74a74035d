"""Remarks for the user: sentences without a prefix, but that quiet ones open with "note:".

Whoever prints them says "warning:" before the others (`raymerge.cli.main.remark`), so each has one prefix.
"""

from __future__ import annotations

_QUIET = "note: "


def as_note(line: str) -> str:
    """Return a remark that needs no attention: "note: LINE"."""
    return line if line.startswith(_QUIET) else _QUIET + line


def of_recipe(name: str, line: str) -> str:
    """Return a remark about a recipe: "NAME: LINE", or "note: NAME: LINE"."""
    quiet, sentence = _parts(line)
    return f"{quiet}{name}: {sentence}"


def without_recipe(name: str, line: str) -> str:
    """Return what `of_recipe` was told."""
    quiet, sentence = _parts(line)
    return quiet + sentence.removeprefix(f"{name}: ")


def _parts(line: str) -> tuple[str, str]:
    return (_QUIET, line.removeprefix(_QUIET)) if line.startswith(_QUIET) else ("", line)
