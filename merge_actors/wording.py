"""Numbers and names as messages write them."""

from __future__ import annotations

from collections.abc import Sequence


def counted(count: int, noun: str) -> str:
    """Return "1 tensor", "2,000 tensors"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def some_of(names: Sequence[str], most: int = 3) -> str:
    """Return the first names: "a, b", "a, b, c and 1,997 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
