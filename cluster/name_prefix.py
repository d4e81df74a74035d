"""Find out whether two models hold the same tensors, one of them behind a prefix (`encoder.x`, `bert.encoder.x`).

transformers saves a bare encoder without the prefix that the same encoder has under a head. Such models cannot be
merged as they stand, and no policy for missing tensors helps: every tensor is missing.
"""

from __future__ import annotations

from collections.abc import Collection


def prefix_between(short: Collection[str], long: Collection[str]) -> str | None:
    """Return the prefix behind which `long` holds more than half of `short`'s tensors; None if there is none.

    Args:
        short: names of one model's tensors.
        long: names of another's, in any order.
    """
    parts = [name.split(".", 2) for name in long]
    for prefix in sorted({".".join(part[:depth]) + "." for part in parts for depth in range(1, len(part))}):
        if 2 * sum(prefix + name in long for name in short) > len(short):
            return prefix
    return None


def prefix_hint(present: tuple[str, Collection[str]], lacking: tuple[str, Collection[str]]) -> str:
    """Say that two models name the same tensors otherwise, and the way out; empty if they do not.

    Args:
        present: a model that has the tensor in question, and the names of its tensors.
        lacking: one that lacks it.
    """
    for (short, short_names), (long, long_names) in ((present, lacking), (lacking, present)):
        prefix = prefix_between(short_names, long_names)
        if prefix is not None:
            return (
                f"{long} has the tensors of {short} under names that begin with {prefix!r}; load both with one class "
                "of transformers and save them again"
            )
    return ""
