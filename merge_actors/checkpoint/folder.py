"""Open a checkpoint folder: every tensor's place on disk and what the config says, no data.

Which files make the checkpoint is decided in `files.py`; PyTorch pickles become safetensors in
`pickles.py`. Here the headers are read, checked against the index and against each other, and
summed up in a fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import xxhash

from raymerge.merge_actors.checkpoint.files import DataFiles, find_data_files, read_json
from raymerge.merge_actors.checkpoint.header import TensorInfo, read_header
from raymerge.merge_actors.checkpoint.pickles import TIED_KEY, converted
from raymerge.merge_actors.checkpoint.ties import find_tied
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.folders import entries, map_concurrently, reading
from raymerge.merge_actors.storage.mirror import mirrored
from raymerge.merge_actors.storage.uris import absolute, is_remote

if TYPE_CHECKING:
    from raymerge.merge_actors.checkpoint.adapter import LowRank

#: Of a model at least so many pieces of so many bytes enter the fingerprint, evenly spread over each file ...
_NUM_SAMPLES = 32
_SAMPLE_BYTES = 4096
#: ... but of no file more than this, and of every file one: in a store each is a request.
_MOST_SAMPLES_A_FILE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """What a folder holds, from headers alone."""

    path: str
    """As the user gave it."""
    folder: str
    """Absolute, symbolic links resolved: where config and tokenizer are. Of a remote checkpoint the
    copies of these on this machine."""
    tensors: dict[str, TensorInfo]
    """By name, ordered by file and offset; without the aliases in `tied`."""
    config: dict[str, Any]
    """config.json, or {}."""
    tied: dict[str, str]
    """alias -> name of the tensor in `tensors` that it shares its values with."""
    fingerprint: str
    """128 bits in hex over headers, lengths and samples of the data files."""
    updates: Mapping[str, LowRank] = field(default_factory=dict)
    """Of a model with an adapter: tensor -> the product that whoever reads it adds."""
    is_adapted: bool = False
    """Is an adapter in it? Then its tensors are not all in the files of `path`."""
    adapter_folder: str | None = None
    """Of an adapter that brings its own tokenizer."""

    @property
    def inputs_folder(self) -> str:
        """Where tokenizer or image processor are."""
        return self.adapter_folder or self.folder

    @property
    def num_parameters(self) -> int:
        """Count the elements of all tensors, tied ones once."""
        return sum(tensor.num_elements for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Count the bytes of all tensors on disk, tied ones once."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())


def open_checkpoint(folder: str | os.PathLike[str], *, allow_pickle: bool = False) -> Checkpoint:
    """Read the headers of a checkpoint folder.

    Args:
        folder: a local folder or a URI with safetensors files (one, or shards with an index), or
            a local folder with PyTorch `.bin` files.
        allow_pickle: convert `.bin` files to safetensors in the cache, through torch's
            restricted unpickler; without it they are refused.

    Raises:
        CheckpointError: the folder is absent, incomplete, corrupt, or holds no model.
    """
    path = os.fspath(folder)
    data_folder, small_files = resolve_folder(path, "model")
    config_path = os.path.join(small_files, "config.json")
    config = read_json(config_path) if os.path.exists(config_path) else {}
    data_files = find_data_files(data_folder)
    if data_files.is_pickle:
        refuse_remote_pickle(data_folder, path)
        data_files = converted(data_files, path, allow_pickle=allow_pickle)
    tensors, tied = _read_all(data_files)
    tied |= find_tied(tensors, config)
    return Checkpoint(
        path=path,
        folder=small_files,
        tensors={name: tensor for name, tensor in tensors.items() if name not in tied},
        config=config,
        tied=tied,
        fingerprint=fingerprint(tensors.values(), data_files.paths),
    )


def resolve_folder(path: str, kind: str) -> tuple[str, str]:
    """Return where a model's weights are, and the local folder with its small files.

    Args:
        path: a local folder, or a URI.
        kind: "model" or "adapter", for the message.

    Raises:
        CheckpointError: there is no such folder.
    """
    if is_remote(path):
        uri = absolute(path)
        listing = entries(uri)
        if not listing:
            raise CheckpointError(
                f"{kind} {path!r} does not exist, or is empty; give the URI of the folder that holds its files"
            )
        return uri, mirrored(uri, listing)
    resolved = os.path.realpath(path)
    if not os.path.isdir(resolved):
        reason = "is a file; give the folder that holds it" if os.path.exists(resolved) else "does not exist"
        raise CheckpointError(f"{kind} {path!r} {reason} (looked at {resolved}).")
    return resolved, resolved


def refuse_remote_pickle(folder: str, path: str) -> None:
    """Refuse PyTorch pickles that are not on this machine: they cannot be read by range.

    Raises:
        CheckpointError: the folder is a URI.
    """
    if is_remote(folder):
        raise CheckpointError(
            f"model {path!r} holds only PyTorch pickles, which cannot be read by range; copy it to a local folder, or "
            "convert it to safetensors"
        )


def _read_all(data_files: DataFiles) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Merge the headers of all files and check them against the index."""
    tensors: dict[str, TensorInfo] = {}
    tied: dict[str, str] = {}
    headers = map_concurrently(read_header, data_files.paths, data_files.paths)
    for path, (found, metadata) in zip(data_files.paths, headers, strict=True):
        if twice := tensors.keys() & found.keys():
            name = min(twice)
            raise CheckpointError(
                f"tensor {name!r} stands in both {tensors[name].file} and {path}; "
                "a name must occur once: move the file that does not belong to the model."
            )
        tensors |= found
        if data_files.is_pickle:
            tied |= json.loads(metadata.get(TIED_KEY, "{}"))
    if data_files.weight_map is not None:
        _check_index(tensors, data_files.weight_map, data_files)
    if not tensors:
        raise CheckpointError(f"{', '.join(data_files.paths)} holds no tensors; a model has at least one.")
    return tensors, tied


def _check_index(tensors: dict[str, TensorInfo], weight_map: dict[str, str], data_files: DataFiles) -> None:
    for name, shard in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None or os.path.basename(tensor.file) != shard:
            where = "in no shard" if tensor is None else f"in {os.path.basename(tensor.file)}"
            raise CheckpointError(
                f"{data_files.index} puts tensor {name!r} into {shard}, but it stands {where}; "
                "download the index and the shards again from one revision."
            )
    for name, tensor in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"tensor {name!r} stands in {tensor.file} but not in {data_files.index}; "
                "download the index and the shards again from one revision."
            )


def fingerprint(tensors: Iterable[TensorInfo], paths: Sequence[str]) -> str:
    """Return 128 bits in hex over headers, lengths and samples of the data files.

    Not over modification times: a model copied to another machine is the same model, to
    which statistics measured elsewhere belong.
    """
    digest = xxhash.xxh3_128()
    count = min(_MOST_SAMPLES_A_FILE, max(1, -(-_NUM_SAMPLES // max(1, len(paths)))))
    sampled = map_concurrently(lambda path: _samples(path, count), paths, paths)
    for path, (num_bytes, samples) in zip(paths, sampled, strict=True):
        digest.update(repr((os.path.basename(path), num_bytes)).encode())
        for sample in samples:
            digest.update(sample)
    for tensor in tensors:
        row = (
            tensor.name,
            tensor.dtype,
            tensor.shape,
            os.path.basename(tensor.file),
            tensor.begin,
            tensor.end,
        )
        digest.update(repr(row).encode())
    return digest.hexdigest()


def _samples(path: str, count: int) -> tuple[int, list[bytes]]:
    """Return the length of a file and so many pieces of it, which enter the fingerprint."""
    with reading(path) as reader:
        num_bytes = reader.num_bytes
        places = [num_bytes * part // (2 * count) for part in range(1, 2 * count, 2)]
        return num_bytes, [reader.read(at, _SAMPLE_BYTES) for at in places]
