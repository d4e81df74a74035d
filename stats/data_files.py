"""Read local data files of one format, and say in one sentence, with the line, why one cannot be read."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from raymerge.merge_actors.errors import RecipeError

if TYPE_CHECKING:
    import pyarrow

Format = Literal["parquet", "json", "csv", "text"]
#: Ending of a data file -> its format.
FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".csv": "csv",
    ".txt": "text",
}
_CHUNK_BYTES = 1 << 20
_SHOWN = 60
#: Python's types of JSON values -> what people call them.
_JSON_TYPES = {str: "a text", bool: "true or false", int: "a number", float: "a number", list: "a list"}


def read_files(files: Sequence[str], kind: Format, text_column: str) -> pyarrow.Table:
    """Read all rows and columns of some files.

    Args:
        files: paths.
        kind: their format.
        text_column: name of the only column of text files, a row for each line.

    Raises:
        RecipeError: naming the file, the line, and what is wrong with it.
    """
    import pyarrow
    import pyarrow.dataset

    if kind == "text":
        lines = [line for file in files for line in _text_lines(file)]
        return pyarrow.table({text_column: pyarrow.array(lines, pyarrow.string())})
    for file in files:
        if not os.path.getsize(file):
            raise RecipeError(f"the data file {file!r} is empty.")
    try:
        table = pyarrow.dataset.dataset(list(files), format=kind).to_table()
        table.validate(full=True)
    except (pyarrow.ArrowException, OSError) as error:
        for file in files:
            _diagnose(file, kind)
        reason = str(error).rpartition("input source ")[2].removeprefix(f"{files[0]!r}: ")
        reason = reason.removeprefix("Invalid: ")
        raise RecipeError(f"the data {_named(files)} cannot be read as {kind}: {reason}") from error
    if kind == "csv" and any(pyarrow.types.is_binary(field.type) for field in table.schema):
        for file in files:
            _check_utf8(file)
    return table


def _text_lines(file: str) -> list[str]:
    _check_utf8(file)
    with open(file, encoding="utf-8-sig", newline=None) as stream:
        return [line.rstrip("\n") for line in stream]


def _diagnose(file: str, kind: Format) -> None:
    """Raise what is wrong with a file, if it can be said better than its reader does."""
    if kind == "parquet":
        with open(file, "rb") as stream:
            begin = stream.read(4)
            stream.seek(-4, os.SEEK_END)
            end = stream.read(4)
        if begin != b"PAR1":
            raise RecipeError(f"the data file {file!r} is no Parquet file: it begins with {begin!r}.")
        if end != b"PAR1":
            raise RecipeError(
                f"the data file {file!r} was cut: a Parquet file ends with its footer; copy it again."
            )
        return
    _check_utf8(file)
    if kind == "json":
        _check_json_lines(file)


def _check_json_lines(file: str) -> None:
    """Hold each line against the rule of JSONL: an object, whose values have the types of those before."""
    seen: dict[str, tuple[str, int]] = {}
    for number, line in _numbered_lines(file):
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == 1 and line.strip() in ("[", "{"):
                raise RecipeError(
                    f"the data file {file!r} is one JSON document over many lines; write an object on each line "
                    "(jq -c '.[]')."
                ) from error
            raise RecipeError(
                f"line {number:,} of the data file {file!r} is not JSON ({_reason(error)}): {_shown(line)}; write an "
                "object on each line."
            ) from error
        if not isinstance(value, dict):
            raise RecipeError(
                f"line {number:,} of the data file {file!r} is no object: {_shown(line)}; write one such as "
                '{"text": "..."} on each line.'
            )
        for name, each in value.items():
            kind = _kind(each)
            before, at = seen.setdefault(name, (kind, number)) if kind else ("", 0)
            if kind and kind != before:
                raise RecipeError(
                    f"line {number:,} of the data file {file!r} has {kind} in {name!r}, line {at:,} {before}; a "
                    "column has values of one type."
                )


def _kind(value: Any) -> str:
    """Return what people call the type of a JSON value; "" for null."""
    return "" if value is None else _JSON_TYPES.get(type(value), "an object")


def _numbered_lines(file: str) -> Iterator[tuple[int, str]]:
    with open(file, encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def _check_utf8(file: str) -> None:
    """Refuse a file that is not UTF-8.

    Raises:
        RecipeError: naming the line and the byte.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_lines = 1
    with open(file, "rb") as stream:
        begin = stream.read(2)
        if begin in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise RecipeError(
                f"the data file {file!r} is UTF-16; it must be UTF-8: iconv -f utf-16 -t utf-8 OLD > NEW."
            )
        stream.seek(0)
        while True:
            chunk = stream.read(_CHUNK_BYTES)
            try:
                decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                num_lines += error.object[: error.start].count(b"\n")
                byte = error.object[error.start]
                raise RecipeError(
                    f"line {num_lines:,} of the data file {file!r} is not UTF-8 (byte 0x{byte:02x}); convert it, from "
                    "Latin-1 for one: iconv -f latin1 -t utf-8 OLD > NEW."
                ) from error
            if not chunk:
                return
            num_lines += chunk.count(b"\n")


def _reason(error: ValueError) -> str:
    return f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)


def _shown(line: str) -> str:
    line = line.strip()
    return repr(line if len(line) <= _SHOWN else line[:_SHOWN] + "...")


def _named(files: Sequence[str]) -> str:
    return repr(files[0]) if len(files) == 1 else f"{files[0]!r} and {len(files) - 1:,} more"
