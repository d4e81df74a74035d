"""The results of a grid: one row per point, in OUT/results.parquet, readable at any time.

A finished point is one line of OUT/journal.jsonl at once. Every few hundred points, and at the
end, the journal moves into results.parquet: a new file is written and renamed, then the journal
is emptied. A kill between any two of these steps loses nothing: a row that stands in both counts
once. The driver holds no rows.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.files import write_error

if TYPE_CHECKING:
    import pyarrow

RESULTS_NAME = "results.parquet"
JOURNAL_NAME = "journal.jsonl"
#: Rows of the journal that are moved into the Parquet file together.
_ROWS_PER_COMPACTION = 500

Row = Mapping[str, Any]


class ResultsWriter:
    """Appends rows to the results in a folder."""

    def __init__(self, folder: str, *, rows_per_compaction: int = _ROWS_PER_COMPACTION) -> None:
        """Open the results of a folder, which may hold some already."""
        self.folder = folder
        self._journal_path = os.path.join(folder, JOURNAL_NAME)
        self._rows_per_compaction = rows_per_compaction
        self._num_in_journal = 0
        self._file: io.FileIO | None = None
        self.compact()

    def append(self, row: Row) -> None:
        """Record a finished point.

        Raises:
            OutputError: the disk is full or not writable.
        """
        assert self._file is not None
        data = (json.dumps(row, default=str) + "\n").encode()
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise write_error(self._journal_path, error) from error
        self._num_in_journal += 1
        if self._num_in_journal >= self._rows_per_compaction:
            self.compact()

    def compact(self) -> None:
        """Move the journal into the Parquet file."""
        rows = _read_journal(self._journal_path)
        if rows:
            self._write(read_results(self.folder))
        self._empty_journal()

    def replace(self, rows: Sequence[Row]) -> None:
        """Let these rows be all results there are: what a resumed run keeps."""
        assert not self._num_in_journal, "what stands in the journal would win over the table"
        if rows:
            self._write(_table(rows))
        elif os.path.exists(path := os.path.join(self.folder, RESULTS_NAME)):
            os.remove(path)

    def close(self) -> None:
        """Move the journal into the Parquet file and close it."""
        if self._file is not None:
            self.compact()
            assert self._file is not None
            self._file.close()
            self._file = None

    def _empty_journal(self) -> None:
        if self._file is not None:
            self._file.close()
        try:
            self._file = open(self._journal_path, "wb", buffering=0)
        except OSError as error:
            raise write_error(self._journal_path, error) from error
        self._num_in_journal = 0

    def _write(self, table: pyarrow.Table) -> None:
        import pyarrow.parquet

        path = os.path.join(self.folder, RESULTS_NAME)
        try:
            with open(f"{path}.new", "wb") as file:
                pyarrow.parquet.write_table(table, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(f"{path}.new", path)
        except OSError as error:
            raise write_error(path, error) from error


def read_results(folder: str) -> pyarrow.Table:
    """Read the results of a running, finished or killed run: one row per point and split, by number.

    Raises:
        OutputError: the folder holds no results.
    """
    import pyarrow
    import pyarrow.parquet

    path = os.path.join(folder, RESULTS_NAME)
    journal = os.path.join(folder, JOURNAL_NAME)
    if not os.path.exists(path) and not os.path.exists(journal):
        raise OutputError(f"{folder} holds no results of a grid or a search: no {RESULTS_NAME} in it")
    rows = _read_journal(journal)
    parts: list[pyarrow.Table] = []
    if os.path.exists(path):
        try:
            parts.append(pyarrow.parquet.read_table(path))
        except (OSError, pyarrow.ArrowException) as error:
            raise OutputError(f"{path} is no table of results: {error}") from error
    if rows:
        parts.append(_table(rows))
    table = _concatenated(parts) if parts else _table([])
    return _once_each(table)


def read_rows(folder: str, columns: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Read the results as mappings; `columns` are those wanted, of which some may be absent."""
    table = read_results(folder)
    if columns is not None:
        wanted = set(columns)
        table = table.select([name for name in table.column_names if name in wanted])
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def metric_columns(names: Iterable[str]) -> list[str]:
    """Return the columns that choosing among points needs."""
    needed = ("metric.", "stderr.", "axis.")
    return [
        name for name in names if name.startswith(needed) or name in ("point", "status", "same_as", "split")
    ]


def _read_journal(path: str) -> list[dict[str, Any]]:
    if not os.path.exists(path):
        return []
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break  # the line that was being written when the driver was killed
    return rows


def _table(rows: Sequence[Row]) -> pyarrow.Table:
    import pyarrow

    names = list(dict.fromkeys(name for row in rows for name in row))
    if not names:
        return pyarrow.table({"point": pyarrow.array([], pyarrow.int64())})
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        kind = _type_of(values)
        if kind == pyarrow.string():
            values = [
                value if value is None or isinstance(value, str) else json.dumps(value) for value in values
            ]
        columns[name] = pyarrow.array(values, kind)
    return pyarrow.table(columns)


def _type_of(values: Sequence[Any]) -> pyarrow.DataType:
    """Return the narrowest type that holds all values: boolean, integer, float, else text."""
    import pyarrow

    kinds = {type(value) for value in values if value is not None}
    if not kinds:
        return pyarrow.null()
    if kinds == {bool}:
        return pyarrow.bool_()
    if kinds == {int}:
        is_small = all(value is None or -(1 << 63) <= value < 1 << 63 for value in values)
        return pyarrow.int64() if is_small else pyarrow.string()
    return pyarrow.float64() if kinds <= {int, float} else pyarrow.string()


def _concatenated(parts: Sequence[pyarrow.Table]) -> pyarrow.Table:
    """Join tables whose columns may differ: missing ones are null, types are widened."""
    import pyarrow

    names = list(dict.fromkeys(name for part in parts for name in part.column_names))
    fields = []
    for name in names:
        kinds = {part.schema.field(name).type for part in parts if name in part.column_names}
        fields.append(pyarrow.field(name, _widest(kinds)))
    schema = pyarrow.schema(fields)
    return pyarrow.concat_tables(
        [
            pyarrow.table(
                [
                    part.column(field.name).cast(field.type)
                    if field.name in part.column_names
                    else pyarrow.nulls(part.num_rows, field.type)
                    for field in schema
                ],
                schema=schema,
            )
            for part in parts
        ]
    )


def _widest(kinds: set[pyarrow.DataType]) -> pyarrow.DataType:
    import pyarrow

    kinds = kinds - {pyarrow.null()}
    if not kinds:
        return pyarrow.null()
    if len(kinds) == 1:
        return kinds.pop()
    return pyarrow.float64() if kinds == {pyarrow.int64(), pyarrow.float64()} else pyarrow.string()


def _once_each(table: pyarrow.Table) -> pyarrow.Table:
    """Keep the last row of each point and split, in the order of the points."""
    if "split" not in table.column_names:
        return table.sort_by("point")
    splits = table.column("split").to_pylist()
    last: dict[tuple[str, int], int] = {}
    for index, (point, split) in enumerate(zip(table.column("point").to_pylist(), splits, strict=True)):
        last[split or "validation", point] = index
    order = sorted(last, key=lambda name: (name[0] != "validation", name[1]))
    return table.take([last[name] for name in order])
