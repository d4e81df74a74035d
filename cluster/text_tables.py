"""Tables for the terminal, in columns or, where they are too wide, on their side."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def best_table(best: Iterable[Mapping[str, Any]]) -> str:
    """Lay winners out as a table for the terminal."""
    rows = []
    for each in best:
        row = {"": each["name"], "point": str(each["point"])}
        row |= {name: cell(value) for name, value in each["axes"].items()}
        for name, value in each["objectives"].items():
            row[name] = cell(value)
        for name, metric in (each["test"] or {}).items():
            row[f"test {name}"] = cell(
                (metric["value"], math.nan if metric["error"] is None else metric["error"])
            )
        rows.append(row)
    return text_table(rows)


def text_table(rows: Sequence[Mapping[str, str]], *, most_columns: int | None = None) -> str:
    """Lay rows out in columns, or, where the terminal is too narrow for that, beside each other, a line a name.

    Args:
        rows: texts by name; a row may lack some.
        most_columns: characters of a line [the terminal's; 120 where there is none].
    """
    if not rows:
        return ""
    most_columns = most_columns or shutil.get_terminal_size((120, 24)).columns
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = _columns([names, *([row.get(name, "") for name in names] for row in rows)])
    head = table[0]
    if len(head) <= most_columns:
        return "\n".join([head, "-" * len(head), *table[1:]])
    widths = [max(map(len, row.values())) + 2 for row in rows]
    room = most_columns - max(map(len, names))
    blocks, begin = [], 0
    while begin < len(rows):
        end = begin + 1
        while end < len(rows) and sum(widths[begin : end + 1]) <= room:
            end += 1
        blocks.append(_columns([[name, *(row.get(name, "") for row in rows[begin:end])] for name in names]))
        begin = end
    return "\n\n".join("\n".join(block) for block in blocks)


def _columns(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.rjust(width) for text, width in zip(line, widths, strict=True)) for line in lines]


def cell(value: Any) -> str:
    """Write a value of a table; (value, standard error) becomes "0.812 +-0.004"."""
    if isinstance(value, tuple):
        number, error = value
        return f"{number:.4g}" + ("" if math.isnan(error) else f" +-{error:.2g}")
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"...{text[-37:]}"
