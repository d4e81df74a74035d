"""Read the rows that a task scores: which file or split, which columns, which of the rows."""

from __future__ import annotations

import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.data_rows import DataSpec, check_columns, choose, read_table
from raymerge.stats.evaluation.task_spec import Split, TaskSpec
from raymerge.stats.remote_data import local_data

#: Names that the files or folders of a split have.
_SPLIT_NAMES: dict[Split, tuple[str, ...]] = {
    "validation": ("validation", "valid", "val", "dev", "validation_matched"),
    "test": ("test", "test_matched"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """The rows of a split that are scored, in the order of the data."""

    columns: Mapping[str, Sequence[Any]]
    """Column -> its values."""
    rows: Sequence[int]
    """Number of each row in the data, for errors."""
    source: str
    """The data as the user named them."""
    remarks: tuple[str, ...]
    """Sentences for the user."""

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> dict[str, Any]:
        """Return the columns of one row."""
        return {name: values[index] for name, values in self.columns.items()}

    def place(self, index: int) -> str:
        """Name a row for an error."""
        return f"row {self.rows[index]} of {self.source!r}"


def read_table_of(
    task: TaskSpec, split: Split, columns: Sequence[str], *, all_columns: bool = False
) -> Table:
    """Read and choose the rows of a split.

    Args:
        task: names the data, and how many of the rows.
        split: which data.
        columns: which have to be there; rows without a value in one of them are left out.
        all_columns: keep the other columns too.

    Raises:
        RecipeError: there are no such data or column, or no row is left.
    """
    _check_apart(task)
    remarks: list[str] = []
    spec = _data_spec(task, split, columns)
    try:
        table = read_table(spec, remarks)
        check_columns(spec, table, columns)
    except RecipeError as error:
        raise task.error(split, str(error)) from error
    names = list(table.column_names) if all_columns else list(dict.fromkeys(columns))
    values = {name: table.column(name).to_pylist() for name in names}
    kept = [i for i in range(table.num_rows) if all(_is_there(values[name][i]) for name in columns)]
    if not kept:
        raise task.error(
            split,
            f"no row of the data {spec.source!r} is left: of {table.num_rows:,} rows none has a value in each of "
            f"{', '.join(map(repr, columns))}.",
        )
    if len(kept) < table.num_rows:
        remarks.append(
            f"{table.num_rows - len(kept):,} of {table.num_rows:,} rows without a value are left out"
        )
    if task.samples is not None:
        if task.samples > len(kept):
            remarks.append(f"there are {len(kept):,} rows, fewer than the {task.samples:,} samples asked for")
        kept = kept[: task.samples] if task.take == "first" else choose(kept, task.samples, task.seed)
    return Table(
        columns={name: [values[name][i] for i in kept] for name in names},
        rows=kept,
        source=spec.source,
        remarks=tuple(f"{task.name}, {split}: {remark}" for remark in remarks),
    )


def template_columns(task: TaskSpec, key: str, template: str) -> list[str]:
    """Return the columns that a template such as "Q: {question}" names.

    Raises:
        RecipeError: the template is malformed.
    """
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise task.error(
            key, f"{template!r} is no template: {error}; write braces as {{{{ and }}}}."
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    if bad := [name for name in names if not name or not name.replace("_", "a").isalnum()]:
        raise task.error(key, f"{{{bad[0]}}} names no column; write {{column}}, and braces as {{{{ and }}}}.")
    return list(dict.fromkeys(names))


def check_text(task: TaskSpec, table: Table, column: str, kind: type = str) -> None:
    """Check that a column holds texts (or lists).

    Raises:
        RecipeError: naming the first row that holds something else.
    """
    for index, value in enumerate(table.columns[column]):
        if not isinstance(value, kind):
            wanted = "a text" if kind is str else f"a {kind.__name__}"
            raise task.error(
                "",
                f"{table.place(index)} holds a {type(value).__name__} in {column!r} where {wanted} is needed.",
            )


def numbers_of(task: TaskSpec, table: Table, column: str) -> NDArray[np.float64]:
    """Return a column of numbers.

    Raises:
        RecipeError: naming the first row that holds something else.
    """
    for i, value in enumerate(table.columns[column]):
        if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value):
            raise task.error(
                "label_column", f"{table.place(i)} has {value!r} in {column!r} where a number is needed."
            )
    return np.array(table.columns[column], dtype=np.float64)


def _is_there(value: Any) -> bool:
    return bool(value.strip()) if isinstance(value, str) else value is not None


def _data_spec(task: TaskSpec, split: Split, columns: Sequence[str]) -> DataSpec:
    """Find out what a split is on disk or on the Hub: a file, files of a folder, a split of a data set."""
    parts = task.data(split)
    source = local_data(parts["source"])
    name = parts.get("split")
    if os.path.isdir(source):
        name = name or _split_of_folder(source, split)
        if name and os.path.isfile(os.path.join(source, name, "dataset_info.json")):  # of a saved DatasetDict
            source = os.path.join(source, name)
    elif not os.path.exists(source):
        source, name = parts["source"], name or split
    text_column = columns[0] if columns else "text"
    return DataSpec(source=source, config=parts.get("config"), split=name, text_column=text_column)


def _check_apart(task: TaskSpec) -> None:
    """Refuse a test split that is the validation split under the same or another spelling."""
    if task.validation is None or task.test is None:
        return
    validation, test = _data_spec(task, "validation", ()), _data_spec(task, "test", ())
    if os.path.exists(test.source):
        validation, test = (
            replace(each, source=os.path.realpath(each.source)) for each in (validation, test)
        )
    if validation == test:
        raise task.error(
            "test",
            f"{test.source!r} holds the data of `validation` too, by which models are chosen; a test needs others "
            "(two files, or a folder with files named validation* and test*).",
        )


def _split_of_folder(folder: str, split: Split) -> str | None:
    """Return the name by which a folder's files belong to a split; None where nothing tells splits apart."""
    names = [
        part
        for parent, folders, files in os.walk(folder)
        for part in (*os.path.relpath(parent, folder).split(os.sep), *folders, *files)
    ]

    def has(name: str) -> bool:
        return any(part == name or part.startswith((name + ".", name + "-", name + "_")) for part in names)

    found = [name for name in _SPLIT_NAMES[split] if has(name)]
    if found:
        return found[0]
    others = ["train", *(name for each in _SPLIT_NAMES.values() for name in each)]
    return split if any(has(name) for name in others) else None
