"""Convert PyTorch `.bin` checkpoints to safetensors once, in a cache folder.

A pickle can run code when it is read. Files are opened only when the user allows it, and then
through torch's restricted unpickler (`weights_only`), mapped rather than loaded, one shard
at a time. The converted files carry the modification time of the originals, so that a
fingerprint is the same on every node that converts.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import zipfile
from typing import TYPE_CHECKING, Any

import filelock
import xxhash

from raymerge.merge_actors.checkpoint.files import DataFiles
from raymerge.merge_actors.checkpoint.layout import OutputTensor, write_header
from raymerge.merge_actors.dtypes import from_torch_name
from raymerge.merge_actors.errors import CheckpointError

if TYPE_CHECKING:
    import torch

#: Metadata of a converted file: JSON of alias -> kept name, for tensors that shared their storage.
TIED_KEY = "raymerge.tied"


def cache_folder() -> str:
    """Return $RAYMERGE_CACHE, or ~/.cache/raymerge."""
    return os.environ.get("RAYMERGE_CACHE") or os.path.expanduser("~/.cache/raymerge")


def converted(data_files: DataFiles, path: str, *, allow_pickle: bool) -> DataFiles:
    """Return the safetensors files of pickled ones, converting them unless the cache has them.

    Args:
        data_files: the `.bin` files.
        path: the model as the user gave it, for messages.
        allow_pickle: has the user allowed it?

    Raises:
        CheckpointError: not allowed, refused by the restricted unpickler, or not a state dict.
    """
    if not allow_pickle:
        raise CheckpointError(
            f"model {path!r} holds only PyTorch pickles ({os.path.basename(data_files.paths[0])}), which can "
            "run code when opened; if you trust them, pass --allow-pickle to convert them to safetensors."
        )
    target = os.path.join(cache_folder(), "pickle", _key(data_files.paths))
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with filelock.FileLock(target + ".lock"):
        if not os.path.isdir(target):
            _convert_all(data_files.paths, target)
    return DataFiles(
        paths=tuple(os.path.join(target, _new_name(path)) for path in data_files.paths), is_pickle=True
    )


def _key(paths: tuple[str, ...]) -> str:
    status = [(os.path.realpath(path), os.stat(path)) for path in paths]
    rows = [(path, entry.st_size, entry.st_mtime_ns) for path, entry in status]
    return xxhash.xxh3_128_hexdigest(repr(rows).encode())


def _new_name(path: str) -> str:
    return os.path.basename(path).removesuffix(".bin").replace("pytorch_model", "model") + ".safetensors"


def _convert_all(paths: tuple[str, ...], target: str) -> None:
    """Convert into a temporary folder beside the target, then rename it."""
    temporary = tempfile.mkdtemp(prefix="converting-", dir=os.path.dirname(target))
    try:
        for path in paths:
            _convert(path, os.path.join(temporary, _new_name(path)))
        os.rename(temporary, target)
    except OSError as error:
        raise CheckpointError(
            f"cannot convert {paths[0]} in {temporary}: {error.strerror}; "
            "free space there or set RAYMERGE_CACHE to another folder."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _convert(source: str, destination: str) -> None:
    tensors = _load(source)
    outputs = {
        name: OutputTensor(name, _dtype(name, tensor, source), tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    # An embedding comes before its output layer in state dicts, and so keeps the name.
    for name, tensor in tensors.items():
        view = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        kept = first.setdefault((*view, tensor.dtype), name) if tensor.numel() else name
        if kept != name:
            tied[name] = kept
    metadata = {"format": "pt"} | ({TIED_KEY: json.dumps(tied)} if tied else {})
    kept_outputs = [output for name, output in outputs.items() if name not in tied]
    header, places = write_header(kept_outputs, metadata)
    with open(destination, "wb") as stream:
        stream.write(header)
        for name in places:
            stream.write(_as_bytes(tensors[name]))
    status = os.stat(source)
    os.utime(destination, ns=(status.st_atime_ns, status.st_mtime_ns))


def _load(source: str) -> dict[str, torch.Tensor]:
    import torch

    try:
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except Exception as error:  # corrupt bytes make the unpickler raise whatever they make it do
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"torch refuses to load {source} with weights_only: {reason} "
            "Convert it to safetensors with the program that wrote it."
        ) from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{source} holds a {type(loaded).__name__}; it must hold a dict of tensors.")
    for name, tensor in loaded.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise CheckpointError(
                f"{source} holds a {type(tensor).__name__} under {name!r}; every entry must be a tensor: "
                "save the model's state_dict() alone."
            )
    return loaded


def _dtype(name: str, tensor: torch.Tensor, source: str) -> str:
    dtype = from_torch_name(str(tensor.dtype))
    if dtype is None or str(tensor.layout) != "torch.strided":
        raise CheckpointError(
            f"tensor {name!r} in {source} is {tensor.dtype} and {tensor.layout}, which raymerge does not "
            "read; convert it to a dense tensor of a common dtype."
        )
    return dtype


def _as_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
