"""Read and check the header of one safetensors file, without torch and without its data.

A safetensors file is: the header's length N (8 bytes, little endian), N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end)}}` padded with spaces, then the data.
Offsets in the JSON count from the start of the data; in `TensorInfo` they count from the start
of the file. What this accepts the safetensors library accepts too; a few files that the library
tolerates (duplicate keys, unknown fields of a tensor) are refused, because they have two readings.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from raymerge.merge_actors.dtypes import element_bytes, is_known
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.folders import reading
from raymerge.merge_actors.storage.uris import absolute, is_remote

#: The limit of the safetensors library.
MAX_HEADER_BYTES = 100_000_000
_LENGTH_BYTES = 8
_FIRST_REMOTE_BYTES = 64 << 10
_FIELDS = {"dtype", "shape", "data_offsets"}
#: torch counts elements in int64.
_MAX_ELEMENTS = 2**63 - 1
_AGAIN = "download or copy the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a named tensor stands on disk."""

    name: str
    dtype: str
    """safetensors' name of the element type: "BF16"."""
    shape: tuple[int, ...]
    file: str
    """Absolute path, or a URI."""
    begin: int
    """First byte in the file."""
    end: int
    """One past the last byte in the file."""

    @property
    def num_elements(self) -> int:
        """Count the elements: 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Count the bytes on disk."""
        return self.end - self.begin


def read_header(path: str | os.PathLike[str]) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Read the header of a safetensors file: its tensors in the order of their bytes, its metadata.

    Args:
        path: the file; relative to the working directory if it is not absolute.

    Returns:
        tensors by name, ordered by offset, and the `__metadata__` strings.

    Raises:
        CheckpointError: the file is absent, truncated or breaks the format.
    """
    file = absolute(os.fspath(path))
    raw, file_bytes = _read_raw(file)
    entries = _parse(raw, file)
    metadata = _metadata(entries.pop("__metadata__", {}), file)
    data_begin = _LENGTH_BYTES + len(raw)
    tensors = [_tensor(name, entry, file, data_begin) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_contiguous(tensors, file, data_begin, file_bytes)
    return {tensor.name: tensor for tensor in tensors}, metadata


def _read_raw(file: str) -> tuple[bytes, int]:
    """Return the JSON bytes and the number of bytes in the whole file."""
    try:
        with reading(file) as reader:
            file_bytes = reader.num_bytes
            # Of a remote file enough for most headers at once: a request costs more than its bytes.
            begin = reader.read(0, _FIRST_REMOTE_BYTES if is_remote(file) else _LENGTH_BYTES)
            first = begin[:_LENGTH_BYTES]
            if len(first) < _LENGTH_BYTES:
                raise CheckpointError(
                    f"{file} has {file_bytes} bytes; a safetensors file has at least 8; {_AGAIN}."
                )
            if first == b"version ":
                raise CheckpointError(
                    f"{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder."
                )
            num_header_bytes = int.from_bytes(first, "little")
            if num_header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} claims a header of {num_header_bytes:,} bytes; the limit is "
                    f"{MAX_HEADER_BYTES:,}: it is corrupt or no safetensors file; {_AGAIN}."
                )
            if _LENGTH_BYTES + num_header_bytes > file_bytes:
                raise CheckpointError(
                    f"{file} is truncated: its header needs {_LENGTH_BYTES + num_header_bytes:,} bytes, "
                    f"the file has {file_bytes:,}; {_AGAIN}."
                )
            if len(begin) >= _LENGTH_BYTES + num_header_bytes:
                return begin[_LENGTH_BYTES : _LENGTH_BYTES + num_header_bytes], file_bytes
            return reader.read(_LENGTH_BYTES, num_header_bytes), file_bytes
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}; check the path and its access."
        ) from error


def _parse(raw: bytes, file: str) -> dict[str, Any]:
    if raw[:1] != b"{":
        raise CheckpointError(
            f"the header of {file} begins with {raw[:1]!r}; it must begin with b'{{': "
            f"it is corrupt or no safetensors file; {_AGAIN}."
        )
    try:
        entries = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_int=_natural,
            parse_float=_refuse_number,
            parse_constant=_refuse_number,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"the header of {file} is not UTF-8 (byte {error.start} is {raw[error.start]:#04x}); {_AGAIN}."
        ) from error
    except (_BadValue, json.JSONDecodeError) as error:
        raise CheckpointError(f"the header of {file} is not valid JSON: {error}; {_AGAIN}.") from error
    except RecursionError as error:
        raise CheckpointError(
            f"the header of {file} is nested too deeply; it holds one object per tensor: {_AGAIN}."
        ) from error
    assert isinstance(entries, dict)  # the text begins with "{"
    return entries


class _BadValue(ValueError):
    """JSON that Python would accept and the format does not."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _BadValue(f"the key {twice!r} occurs twice")
    return found


def _natural(text: str) -> int:
    # 20 digits hold 2**64; Python refuses to convert thousands of digits with an error of its own.
    if text[0] == "-" or len(text) > 20:
        raise _BadValue(f"the number {text[:24]} is not an unsigned 64-bit integer")
    return int(text)


def _refuse_number(text: str) -> None:
    raise _BadValue(f"the number {text[:24]} is not an unsigned 64-bit integer")


def _metadata(value: Any, file: str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(
            f"__metadata__ in {file} must map strings to strings; write the file again without it."
        )
    return value


def _tensor(name: str, entry: Any, file: str, data_begin: int) -> TensorInfo:
    """Check one entry by itself: fields, dtype, shape, and that the bytes fit the shape."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        has = f"the fields {sorted(entry)}" if isinstance(entry, dict) else repr(entry)
        raise CheckpointError(
            f"tensor {name!r} in {file} has {has}; it must have {sorted(_FIELDS)}: write the file again."
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not name.isascii():
        _check_encodable(name, file)
    if not isinstance(dtype, str) or not is_known(dtype):
        raise CheckpointError(
            f"tensor {name!r} in {file} has the dtype {dtype!r}, which raymerge does not read; "
            "convert the checkpoint to a common dtype (BF16, F16, F32, F8_E4M3, I64, ...)."
        )
    if not _are_ints(shape):
        raise CheckpointError(
            f"tensor {name!r} in {file} has the shape {shape!r}; it must be a list of integers: "
            "write the file again."
        )
    if not _are_ints(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"tensor {name!r} in {file} has the data_offsets {offsets!r}; "
            "they must be [begin, end) with begin <= end: write the file again."
        )
    width = element_bytes(dtype)
    num_elements = 1
    for length in shape:
        # Checked at every step as the library does: [2**40, 2**40, 0] is refused though its product is 0.
        num_elements *= length
        if num_elements * width > _MAX_ELEMENTS or length > _MAX_ELEMENTS:
            raise CheckpointError(
                f"tensor {name!r} in {file} has the shape {shape!r}, whose bytes exceed 2**63 - 1; "
                "the header is corrupt: write the file again."
            )
    begin, end = offsets
    if num_elements * width != end - begin:
        raise CheckpointError(
            f"tensor {name!r} in {file} has {end - begin:,} bytes at offsets {offsets!r}, "
            f"but {dtype} of shape {shape!r} needs {num_elements * width:,}; the header is corrupt: {_AGAIN}."
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_begin + begin, data_begin + end)


def _are_ints(value: Any) -> bool:
    # type() rather than isinstance: JSON's true is an int to isinstance
    return type(value) is list and all(type(item) is int for item in value)


def _check_encodable(name: str, file: str) -> None:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"the name {name!r} in {file} holds a lone surrogate, which is not UTF-8: rename the tensor."
        ) from error


def _check_contiguous(tensors: Iterable[TensorInfo], file: str, data_begin: int, file_bytes: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    expected = data_begin
    previous = "the header"
    for tensor in tensors:
        if tensor.begin != expected:
            kind = "leaves a hole after" if tensor.begin > expected else "overlaps"
            raise CheckpointError(
                f"tensor {tensor.name!r} in {file} begins at byte {tensor.begin:,} and {kind} {previous}, "
                f"which ends at byte {expected:,}; the header is corrupt: {_AGAIN}."
            )
        expected = tensor.end
        previous = repr(tensor.name)
    if file_bytes < expected:
        raise CheckpointError(
            f"{file} is truncated: {previous} ends at byte {expected:,}, the file has {file_bytes:,} bytes; "
            f"{_AGAIN}."
        )
    if file_bytes > expected:
        raise CheckpointError(
            f"{file} has {file_bytes:,} bytes, but its last tensor, {previous}, ends at byte {expected:,}; "
            f"the file is corrupt: {_AGAIN}."
        )
