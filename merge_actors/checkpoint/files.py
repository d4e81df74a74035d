"""Find the data files of a checkpoint folder, local or remote, and read its small JSON files.

The order of preference is transformers': `model.safetensors`, an index of safetensors shards,
then any other safetensors files; PyTorch pickles only when there are none of these.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.folders import entries, read_bytes
from raymerge.merge_actors.storage.store import Entry
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.wording import some_of

#: Weights of an adapter, which is no model by itself.
ADAPTER_NAMES = ("adapter_model.safetensors", "adapter_model.bin")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<rest>\..+)")
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True, kw_only=True, slots=True)
class DataFiles:
    """The files that hold a checkpoint's tensors."""

    paths: tuple[str, ...]
    """Absolute paths or URIs, sorted."""
    is_pickle: bool = False
    """Are, or were before their conversion, PyTorch pickles."""
    index: str | None = None
    """The index file, when there is one."""
    weight_map: dict[str, str] | None = None
    """The index: tensor -> file name."""


def find_data_files(folder: str, listing: Sequence[Entry] | None = None) -> DataFiles:
    """Decide which files of a folder are the checkpoint.

    Args:
        folder: absolute and resolved, or a URI.
        listing: what is in it, if that is known.

    Raises:
        CheckpointError: a shard is absent, the index is not to be trusted, or nothing is found.
    """
    names = [entry.name for entry in (entries(folder) if listing is None else listing)]
    if "model.safetensors" in names:
        return DataFiles(paths=(os.path.join(folder, "model.safetensors"),))
    if index := _only(folder, names, "*.safetensors.index.json"):
        return _from_index(folder, names, index, is_pickle=False)
    if paths := _matching(folder, names, "*.safetensors"):
        _check_complete(folder, paths)
        return DataFiles(paths=paths)
    if index := _only(folder, names, "pytorch_model*.bin.index.json"):
        return _from_index(folder, names, index, is_pickle=True)
    if paths := _matching(folder, names, "pytorch_model*.bin"):
        _check_complete(folder, paths)
        return DataFiles(paths=paths, is_pickle=True)
    raise _nothing_found(folder, names)


def read_json(path: str) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Raises:
        CheckpointError: it cannot be read, is not JSON or holds something else.
    """
    try:
        value = json.loads(read_bytes(path).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}: {error.strerror}; check the path and its access."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; {_AGAIN}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}; it must hold a JSON object: {_AGAIN}.")
    return value


def _matching(folder: str, names: Sequence[str], pattern: str) -> tuple[str, ...]:
    # As a shell's pattern does, "*" leaves out what begins with a dot.
    found = [name for name in names if name[0] != "." and fnmatchcase(name, pattern)]
    return tuple(os.path.join(folder, name) for name in sorted(found) if name not in ADAPTER_NAMES)


def _only(folder: str, names: Sequence[str], pattern: str) -> str | None:
    matching = _matching(folder, names, pattern)
    found = [path for path in matching if not os.path.basename(path).startswith("adapter_")]
    if len(found) > 1:
        names = ", ".join(os.path.basename(path) for path in found)
        raise CheckpointError(
            f"{folder} holds {len(found)} indexes ({names}); one folder is one model: move the others away."
        )
    return found[0] if found else None


def _from_index(folder: str, listed: Sequence[str], index: str, *, is_pickle: bool) -> DataFiles:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"weight_map in {index} must map tensor names to file names: {_AGAIN}.")
    names = sorted(set(weight_map.values()))
    for name in names:
        _check_inside(folder, name, index)
    there = set(listed)
    absent = [name for name in names if name not in there or os.path.isdir(os.path.join(folder, name))]
    if absent:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of the {len(names)} files in {os.path.basename(index)}: "
            f"{some_of(absent)}; {_AGAIN}."
        )
    paths = tuple(os.path.join(folder, name) for name in names)
    return DataFiles(paths=paths, is_pickle=is_pickle, index=index, weight_map=weight_map)


def _check_inside(folder: str, name: str, index: str) -> None:
    """Let an index name only files of its own folder, or of the Hub cache behind it."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise CheckpointError(
            f"{index} names the file {name!r}; it must be a plain file name in the folder of the index: "
            f"{_AGAIN}."
        )
    if is_remote(folder):  # an object store has no links
        return
    target = os.path.realpath(os.path.join(folder, name))
    if os.path.dirname(target) not in (folder, _blobs(folder)):
        raise CheckpointError(
            f"{name}, which {index} names, is a symbolic link to {target} outside the folder; "
            "give the folder that holds the files themselves, or copy them."
        )


def _blobs(folder: str) -> str | None:
    """Return the folder of contents that a snapshot of the Hub cache links to.

    The layout is models--org--name/{blobs/<hash>, snapshots/<commit>/<file> -> ../../blobs/<hash>}.
    """
    parts = folder.split(os.sep)
    if "snapshots" not in parts[:-1]:
        return None
    last = len(parts) - 1 - parts[::-1].index("snapshots")
    return os.sep.join([*parts[:last], "blobs"])


def _check_complete(folder: str, paths: tuple[str, ...]) -> None:
    """Without an index, the names of shards still say how many there are."""
    names = {os.path.basename(path) for path in paths}
    for name in sorted(names):
        match = _SHARD.fullmatch(name)
        if match is None:
            continue
        count = match["count"]
        expected = [f"{match['stem']}-{n:05d}-of-{count}{match['rest']}" for n in range(1, int(count) + 1)]
        absent = [other for other in expected if other not in names]
        if absent:
            raise CheckpointError(
                f"{folder} lacks {len(absent)} of {int(count)} shards and has no index: {some_of(absent)}; "
                f"{_AGAIN}."
            )


def _nothing_found(folder: str, names: Sequence[str]) -> CheckpointError:
    if any(name in names for name in ADAPTER_NAMES):
        return CheckpointError(
            f"{folder} holds an adapter, not a model; write the model as base+adapter, with this folder "
            "after the plus."
        )
    below = [
        each.name
        for each in entries(folder)
        if each.is_folder
        and any(inner.name.endswith(".safetensors") for inner in entries(os.path.join(folder, each.name)))
    ]
    hint = f"; there are some in {some_of(below)}: give that folder" if below else ""
    return CheckpointError(
        f"{folder} holds no *.safetensors and no pytorch_model*.bin{hint or ': check the path'}."
    )
