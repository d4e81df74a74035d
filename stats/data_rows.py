"""Read the rows of a calibration set: Parquet, JSONL, CSV or text, local or in a store, or a `datasets` name.

Only the columns that are asked for are kept. Rows without text are dropped, then a fixed
subset of the rest is taken; nothing depends on how many workers there are.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.storage.uris import without_file_scheme
from raymerge.stats.data_files import FORMATS, read_files
from raymerge.stats.remote_data import local_data

if TYPE_CHECKING:
    import pyarrow

_TRAIN = "train"
#: Seed of the subset that `samples` takes: fixed, so that every model sees the same rows.
_SUBSET_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSpec:
    """What a calibration set is and how it becomes examples."""

    source: str
    """A file or folder, local or in a store, or the name of a data set on the Hugging Face Hub."""
    config: str | None = None
    """Configuration of a data set on the Hub."""
    split: str | None = None
    """Split of a data set, or beginning of the names of the files of a local folder."""
    text_column: str = "text"
    text_pair_column: str | None = None
    """Second text of an encoder's input; for an encoder-decoder what the decoder reads."""
    label_column: str | None = None
    image_column: str | None = None
    """Column of images, for a vision model; a folder of image files needs none."""
    samples: int | None = None
    """Take so many rows (of those with text), evenly at random and always the same ones."""
    samples_at: tuple[int, ...] = ()
    """Ascending numbers of samples at which statistics are kept, the last one instead of `samples`: the rows are
    those that `samples` would take, so that a curve over samples costs one pass."""
    max_length: int | None = None
    """Longest example in tokens [the model's, at most 512]."""
    batch_tokens: int = 4096
    """Tokens of a batch, padding included."""
    chat_template: bool = False
    """The text column holds conversations: lists of {role, content}."""
    packed: bool = False
    """Join the texts of a shard and cut them into examples of `max_length` (language models)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", without_file_scheme(self.source))
        for name in ("samples", "max_length", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} of the data is {value}; it must be at least 1.")
        if self.samples_at and (
            min(self.samples_at) < 1 or list(self.samples_at) != sorted(set(self.samples_at)) or self.samples
        ):
            raise RecipeError(
                f"samples_at of the data is {', '.join(map(str, self.samples_at))}; it must be ascending numbers from "
                "1 on, and stands instead of samples."
            )
        if self.packed and (self.text_pair_column or self.label_column):
            raise RecipeError(
                "packed data have no text_pair_column or label_column: texts are joined; leave one out."
            )

    def to_mapping(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """The rows of a calibration set that are used, in order."""

    texts: Sequence[Any]
    """Strings; with a chat template, lists of messages."""
    pairs: Sequence[str] | None
    labels: Sequence[Any] | None
    remarks: tuple[str, ...]
    """Sentences for the user."""
    tier_ends: tuple[int, ...]
    """Rows [0, end) are those of each of `samples_at`; one end, that of all rows, without it."""


def read_rows(spec: DataSpec) -> Rows:
    """Read and choose the rows.

    Raises:
        RecipeError: there is no such source or column, or no row is left.
    """
    remarks: list[str] = []
    table = read_table(spec, remarks)
    wanted = [spec.text_column, spec.text_pair_column, spec.label_column]
    check_columns(spec, table, [column for column in wanted if column is not None])
    texts, pairs, labels = (None if name is None else table.column(name).to_pylist() for name in wanted)
    assert texts is not None
    _check_texts(spec, texts)
    for row, pair in enumerate(pairs or ()):
        if pair is not None and not isinstance(pair, str):
            raise RecipeError(
                f"row {row} of the data {spec.source!r} holds a value of type {type(pair).__name__} in "
                f"{spec.text_pair_column!r}; text must stand there: name another text_pair_column."
            )
    kept = [
        i for i, text in enumerate(texts) if _has_text(text) and (labels is None or labels[i] is not None)
    ]
    if not kept:
        raise RecipeError(
            f"no row of the data {spec.source!r} is left: of {len(texts):,} rows none has text in "
            f"{spec.text_column!r}" + (f" and a label in {spec.label_column!r}." if labels else ".")
        )
    if len(kept) < len(texts):
        remarks.append(
            f"{len(texts) - len(kept):,} of {len(texts):,} rows without text or label are left out"
        )
    kept, tier_ends = take(spec, kept, remarks)
    return Rows(
        texts=[texts[i] for i in kept],
        pairs=None if pairs is None else [pairs[i] or "" for i in kept],
        labels=None if labels is None else [labels[i] for i in kept],
        remarks=tuple(remarks),
        tier_ends=tier_ends,
    )


def take(spec: DataSpec, kept: list[int], remarks: list[str]) -> tuple[list[int], tuple[int, ...]]:
    """Choose the samples, rows of smaller numbers of samples first; returns them and where each number ends.

    Raises:
        RecipeError: there are fewer rows than `samples_at` asks for.
    """
    numbers = spec.samples_at or ((spec.samples,) if spec.samples is not None else ())
    if not numbers:
        return kept, (len(kept),)
    if numbers[-1] > len(kept):
        if spec.samples_at:
            raise RecipeError(
                f"samples_at of the data asks for {numbers[-1]:,} rows, but {spec.source!r} has {len(kept):,} "
                "with text."
            )
        remarks.append(f"the data have {len(kept):,} rows, fewer than the {numbers[-1]:,} samples asked for")
    taken: list[int] = []
    tier_ends = []
    for number in numbers:
        known = frozenset(taken)
        taken += [row for row in choose(kept, number, _SUBSET_SEED) if row not in known]
        tier_ends.append(len(taken))
    return taken, tuple(tier_ends)


def check_columns(spec: DataSpec, table: pyarrow.Table, columns: Sequence[str]) -> None:
    """Check that the data have some columns.

    Raises:
        RecipeError: naming the column that is missing and those there are.
    """
    for column in columns:
        if column not in table.column_names:
            close = difflib.get_close_matches(column, table.column_names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise RecipeError(
                f"the data {spec.source!r} have no column {column!r}; they have "
                f"{', '.join(map(repr, table.column_names))}{hint}."
            )


def choose(kept: Sequence[int], samples: int, seed: int) -> list[int]:
    """Take `samples` of the rows, in their order; the subset of fewer samples lies in that of more."""
    import numpy as np

    order = np.random.default_rng(seed).permutation(len(kept))
    return [kept[i] for i in sorted(order[:samples].tolist())]


def _has_text(text: Any) -> bool:
    return bool(text.strip()) if isinstance(text, str) else bool(text)


def _check_texts(spec: DataSpec, texts: Sequence[Any]) -> None:
    kind = list if spec.chat_template else str
    for number, text in enumerate(texts):
        if text is not None and not isinstance(text, kind):
            is_list = "a conversation" if isinstance(text, list) else f"a value of type {type(text).__name__}"
            way_out = "conversations need chat_template, or" if isinstance(text, list) else ""
            way_out = "leave out chat_template, or" if spec.chat_template else way_out
            raise RecipeError(
                f"row {number} of the data {spec.source!r} holds {is_list} in {spec.text_column!r}; "
                f"{'conversations (lists of messages)' if spec.chat_template else 'text'} "
                f"must stand there: {way_out + ' ' if way_out else ''}name another column."
            )


def read_table(spec: DataSpec, remarks: list[str]) -> pyarrow.Table:
    """Read all rows and columns.

    Args:
        spec: source, config and split; the name of a text's only column.
        remarks: sentences for the user are added.

    Raises:
        RecipeError: there is no such source, or it cannot be read.
    """
    path = local_data(spec.source)
    if not os.path.exists(path):
        return _read_hub(spec)
    if os.path.isdir(path) and os.path.exists(os.path.join(path, "dataset_info.json")):
        return _read_saved(spec, path)
    files = _local_files(spec, path, remarks)
    kinds = {os.path.splitext(file)[1] for file in files}
    if len({FORMATS[kind] for kind in kinds}) > 1:
        raise RecipeError(
            f"the data folder {spec.source!r} mixes {', '.join(sorted(kinds))} files; name one file or split."
        )
    return read_files(files, FORMATS[kinds.pop()], spec.text_column)


def _local_files(spec: DataSpec, path: str, remarks: list[str]) -> list[str]:
    """Return the data files of a file or folder, those of one split if their names tell splits apart."""
    if os.path.isfile(path):
        if os.path.splitext(path)[1] not in FORMATS:
            raise RecipeError(f"the data file {spec.source!r} is none of {', '.join(FORMATS)}.")
        if spec.split is not None:
            remarks.append(f"{spec.source} is a single file, so the split {spec.split!r} has no effect")
        return [path]
    found = sorted(
        os.path.join(folder, name)
        for folder, _, names in os.walk(path)
        for name in names
        if os.path.splitext(name)[1] in FORMATS and name[0] not in "._"
    )
    if not found:
        raise RecipeError(f"the data folder {spec.source!r} has no file of {', '.join(FORMATS)}.")
    split = spec.split
    if split is None and any(not _is_of_split(path, file, _TRAIN) for file in found):
        if not any(_is_of_split(path, file, _TRAIN) for file in found):
            return found
        split = _TRAIN
        remarks.append(f"of the folder {spec.source} the split {split!r} is taken; --split names another")
    chosen = [file for file in found if split is None or _is_of_split(path, file, split)]
    if not chosen:
        names = ", ".join(os.path.relpath(file, path) for file in found[:5])
        raise RecipeError(
            f"the data folder {spec.source!r} has no file of the split {split!r}; it has {names}."
        )
    return chosen


def _is_of_split(folder: str, file: str, split: str) -> bool:
    return any(
        part == split or part.startswith((split + ".", split + "-", split + "_"))
        for part in os.path.relpath(file, folder).split(os.sep)
    )


def _read_saved(spec: DataSpec, path: str) -> pyarrow.Table:
    """Read what `Dataset.save_to_disk` wrote."""
    import datasets
    import pyarrow

    try:
        return datasets.load_from_disk(path).with_format("arrow")[:]
    except (ValueError, OSError, KeyError, pyarrow.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(f"the saved data set {spec.source!r} cannot be read: {reason}") from error


def _read_hub(spec: DataSpec) -> pyarrow.Table:
    import datasets

    if spec.source.startswith(("/", ".", "~")) or os.path.splitext(spec.source)[1] in FORMATS:
        raise RecipeError(
            f"the data {spec.source!r} do not exist; give a file, a folder, or a data set's name."
        )
    try:
        found = datasets.load_dataset(spec.source, spec.config, split=spec.split or _TRAIN)
    except (ValueError, OSError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RecipeError(
            f"the data {spec.source!r} are neither a local path nor a data set that can be loaded: {reason}"
        ) from error
    return found.with_format("arrow")[:]
