"""Entities in a sequence of labels: B-PER I-PER O, also with E/L (end) and S/U (single).

Read as conlleval does (Tjong Kim Sang and Buchholz 2000): an I that does not go on with the entity before it
begins one of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_OUTSIDE = "O"
_BEGINS, _ENDS = "BSU", "ESLU"


def is_entity_label(name: str) -> bool:
    """Tell whether a label is O or a prefix and a type."""
    prefix, dash, kind = name.partition("-")
    return name == _OUTSIDE or bool(dash and kind and prefix in tuple("BIESLU"))


def find_entities(labels: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return the type, begin and end of each entity, in order."""
    found: list[tuple[str, int, int]] = []
    kind, begin = "", 0
    for i, label in enumerate([*labels, _OUTSIDE]):
        prefix, _, new_kind = label.partition("-")
        goes_on = bool(kind) and label != _OUTSIDE and new_kind == kind and prefix not in _BEGINS
        if kind and not goes_on:
            found.append((kind, begin, i))
        if not goes_on:
            kind, begin = ("" if label == _OUTSIDE else new_kind), i
        if kind and prefix in _ENDS:
            found.append((kind, begin, i + 1))
            kind = ""
    return found


def count_entities(predicted: Sequence[str], gold: Sequence[str]) -> tuple[int, int, int]:
    """Count the entities that are in both, the predicted and the true ones."""
    found, wanted = set(find_entities(predicted)), set(find_entities(gold))
    return len(found & wanted), len(found), len(wanted)


def all_entity_labels(names: Iterable[str]) -> bool:
    """Tell whether labels mark entities."""
    return all(is_entity_label(name) for name in names)
