"""Lay out the output: which tensor stands in which file at which bytes, before any is written.

Pure: names, dtypes and shapes in, headers and offsets out. Writing is elsewhere. The files are
those that `save_pretrained` would name: `model.safetensors`, or `model-00001-of-000NN.safetensors`
with `model.safetensors.index.json`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.errors import RecipeError

INDEX_NAME = "model.safetensors.index.json"
_ALIGNMENT = 8
_BYTES = {
    "": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_PARAMETERS = {"K": 10**3, "M": 10**6, "B": 10**9}


@dataclass(frozen=True, slots=True)
class ShardLimit:
    """The most that one output file holds."""

    kind: Literal["bytes", "parameters"]
    count: int


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written."""

    name: str
    dtype: str
    """safetensors' name of the element type."""
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Count the elements: 1 for a scalar."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Count the bytes on disk."""
        return self.num_elements * element_bytes(self.dtype)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One safetensors file: its header as bytes and the place of each tensor."""

    name: str
    header: bytes
    """The first bytes of the file: length, JSON, padding. The data follow."""
    num_bytes: int
    """Of the whole file."""
    tensors: dict[str, tuple[int, int]]
    """[begin, end) of each tensor, counted from the start of the file; in that order."""


@dataclass(frozen=True, slots=True)
class Layout:
    """All files of an output checkpoint."""

    files: tuple[OutputFile, ...]
    index: dict[str, Any] | None
    """What goes into `model.safetensors.index.json`; None when there is one file."""

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all files."""
        return sum(file.num_bytes for file in self.files)


def lay_out(tensors: Iterable[OutputTensor], limit: ShardLimit | int) -> Layout:
    """Cut the tensors into files and compute every header and offset.

    Tensors fill the files in the order given. Within a file wider dtypes come first, so that
    each tensor begins at a multiple of its element's width. A tensor over the limit has a file
    of its own.

    Args:
        tensors: in the order of the output, names unique.
        limit: the most that a file holds; an int counts bytes. Headers are not counted.
    """
    if isinstance(limit, int):
        limit = ShardLimit("bytes", limit)
    groups = _cut(tensors, limit)
    if len(groups) == 1:
        return Layout((_file("model.safetensors", groups[0]),), None)
    files = tuple(
        _file(f"model-{number:05d}-of-{len(groups):05d}.safetensors", group)
        for number, group in enumerate(groups, start=1)
    )
    weight_map = {name: file.name for file in files for name in file.tensors}
    metadata = {
        "total_parameters": sum(tensor.num_elements for group in groups for tensor in group),
        "total_size": sum(tensor.num_bytes for group in groups for tensor in group),
    }
    return Layout(files, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def write_header(
    tensors: Sequence[OutputTensor], metadata: dict[str, str]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Compute the header of one file, and [begin, end) of each tensor from the start of the file.

    Args:
        tensors: in the order of the file, but that wider dtypes come first.
        metadata: strings for `__metadata__`.
    """
    entries: dict[str, Any] = {"__metadata__": metadata}
    places = {}
    offset = 0
    for tensor in sorted(tensors, key=lambda tensor: -element_bytes(tensor.dtype)):
        assert tensor.name not in entries, f"{tensor.name} is laid out twice"
        end = offset + tensor.num_bytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, end]}
        places[tensor.name] = (offset, end)
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: (len(header) + begin, len(header) + end) for name, (begin, end) in places.items()}


def parse_size(value: str | int) -> ShardLimit:
    """Read a shard size: "5GB" and "500MiB" are bytes, "5B" and "500M" count parameters.

    The second form is the one that recipes for mergekit use (`--out-shard-size 5B`). A bare
    number counts bytes.

    Raises:
        RecipeError: the text is none of these, or less than one.
    """
    text = str(value).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    unit = match[2].upper() if match else ""
    scale = _PARAMETERS.get(unit) or _BYTES.get(unit)
    # In integers: 0.7 TB through a float would be off by bytes.
    count = _scaled(match[1], scale) if match and scale else 0
    if count < 1:
        raise RecipeError(
            f"shard size {text!r} is not a size; write bytes as 5GB, 500MiB or a whole number, "
            "or parameters as 5B, 500M."
        )
    return ShardLimit("parameters" if unit in _PARAMETERS else "bytes", count)


def _scaled(number: str, scale: int) -> int:
    whole, _, fraction = number.partition(".")
    return int(whole + fraction) * scale // int("1" + "0" * len(fraction))


def _cut(tensors: Iterable[OutputTensor], limit: ShardLimit) -> list[list[OutputTensor]]:
    groups: list[list[OutputTensor]] = [[]]
    filled = 0
    for tensor in tensors:
        amount = tensor.num_bytes if limit.kind == "bytes" else tensor.num_elements
        if groups[-1] and filled + amount > limit.count:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += amount
    return groups


def _file(name: str, tensors: Sequence[OutputTensor]) -> OutputFile:
    header, places = write_header(tensors, {"format": "pt"})
    num_bytes = len(header) + sum(tensor.num_bytes for tensor in tensors)
    return OutputFile(name, header, num_bytes, places)
