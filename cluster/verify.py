"""Read an output again and hold it against its manifest: files, headers, index, checksums, loading."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.cluster.heads import label_fault
from raymerge.cluster.load_check import LoadCheck, check_load
from raymerge.cluster.manifest import FORMAT_VERSION
from raymerge.cluster.parallel import map_in_order, num_usable_threads
from raymerge.cluster.remote_verify import REMARK, loadable
from raymerge.cluster.run_folder import MANIFEST_NAME
from raymerge.merge_actors.checkpoint.files import read_json
from raymerge.merge_actors.checkpoint.header import TensorInfo, read_header
from raymerge.merge_actors.checkpoint.layout import INDEX_NAME
from raymerge.merge_actors.checksum import add_checksums, piece_checksum
from raymerge.merge_actors.errors import CheckpointError, VerifyError
from raymerge.merge_actors.storage.folders import entries, exists, map_concurrently, read_bytes
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.uris import absolute, is_remote, without_file_scheme
from raymerge.merge_actors.wording import counted

#: What a thread reads at once, rounded down to whole chunks of a checksum.
_PIECE_BYTES = 16 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedOutput:
    """One output that equals its manifest."""

    folder: str
    num_files: int
    num_tensors: int
    num_bytes: int
    """Of the tensors, all of which were read."""
    seconds: float
    """For reading and summing them."""
    load: LoadCheck | None
    """None if loading was not asked for."""
    remarks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """The outputs of a folder, all as they were written."""

    outputs: tuple[VerifiedOutput, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        return dataclasses.asdict(self)


def verify(
    out: str | os.PathLike[str], *, load: bool = True, trust_remote_code: bool = False
) -> Verification:
    """Read an output, or all outputs of a campaign, and compare them with their manifests.

    Args:
        out: folder of a merge.
        load: also load each output with transformers (see `load_check`).
        trust_remote_code: run code of an output where transformers has no class of its own.

    Raises:
        VerifyError: naming the first file or tensor that differs, and both values.
    """
    place = without_file_scheme(os.fspath(out))
    folders = _or_verify_error(lambda: _outputs_of(absolute(place) if is_remote(place) else place))
    return Verification(
        outputs=tuple(_verify_one(folder, load=load, trust_code=trust_remote_code) for folder in folders)
    )


def _outputs_of(out: str) -> list[str]:
    listing = entries(out)
    if not listing and not os.path.isdir(out):
        raise VerifyError(f"{out} is not a folder; give the folder that a merge wrote")
    if any(entry.name == MANIFEST_NAME for entry in listing):
        return [out]
    folders = [os.path.join(out, entry.name) for entry in listing if entry.is_folder]
    found = [folder for folder in folders if exists(os.path.join(folder, MANIFEST_NAME))]
    if not found:
        raise VerifyError(
            f"neither {out} nor a folder in it holds {MANIFEST_NAME}: it is not an output of raymerge, or "
            "the merge did not finish"
        )
    return found


def _verify_one(folder: str, *, load: bool, trust_code: bool) -> VerifiedOutput:
    manifest = _read_manifest(folder)
    tensors = _check_headers(folder, manifest)
    _check_index(folder, manifest)
    started = time.monotonic()
    _check_checksums(manifest["tensors"], tensors)
    seconds = time.monotonic() - started
    config = _read_small_files(folder)
    if config is not None and (fault := label_fault(config, tensors)) is not None:
        raise VerifyError(f"{folder}: {fault}; mend id2label")
    checked = _load(folder, manifest["files"], tensors, config, trust_code=trust_code) if load else None
    return VerifiedOutput(
        folder=folder,
        num_files=len(manifest["files"]),
        num_tensors=len(tensors),
        num_bytes=sum(info.num_bytes for info in tensors.values()),
        seconds=seconds,
        load=checked,
        remarks=tuple(_remarks(folder, checked)),
    )


def _load(
    folder: str,
    files: Mapping[str, int],
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    *,
    trust_code: bool,
) -> LoadCheck:
    with loadable(folder, files) as local:
        try:
            checked = check_load(local, tensors, config, trust_code=trust_code)
        except VerifyError as error:
            raise VerifyError(str(error).replace(local, folder)) from error
    if checked.how == "loaded" and local != folder:
        return dataclasses.replace(checked, remarks=(*checked.remarks, REMARK))
    return checked


def _read_manifest(folder: str) -> dict[str, Any]:
    """Read the manifest and make sure that everything the checks need is in it."""
    path = os.path.join(folder, MANIFEST_NAME)
    manifest = _or_verify_error(lambda: read_json(path))
    if manifest.get("format_version") != FORMAT_VERSION:
        raise VerifyError(
            f"{path} has the format_version {manifest.get('format_version')!r}, this raymerge reads "
            f"{FORMAT_VERSION}; use the raymerge that wrote it"
        )
    files, rows = manifest.get("files"), manifest.get("tensors")
    is_whole = (
        isinstance(files, dict)
        and isinstance(rows, dict)
        and all(isinstance(num_bytes, int) for num_bytes in files.values())
        and all(_is_whole_row(row) and row["file"] in files for row in rows.values())
    )
    if not is_whole:
        raise VerifyError(f"{path} is damaged: its files or tensors are not as raymerge writes them")
    return manifest  # type: ignore[no-any-return]


def _is_whole_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("dtype"), str)
        and isinstance(row.get("shape"), list)
        and isinstance(row.get("file"), str)
        and re.fullmatch("[0-9a-f]{16}", str(row.get("checksum"))) is not None
        and isinstance(row.get("checksum_chunk_bytes"), int)
        and row["checksum_chunk_bytes"] > 0
    )


def _check_headers(folder: str, manifest: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """Compare files, their lengths, and the tensors in their headers; return the tensors."""
    listing = _or_verify_error(lambda: entries(folder))
    there = {entry.name: entry.num_bytes for entry in listing if not entry.is_folder}
    for name, num_bytes in manifest["files"].items():
        path = os.path.join(folder, name)
        if name not in there:
            raise VerifyError(f"{path} is missing; the manifest has it with {num_bytes:,} bytes")
        if there[name] != num_bytes:
            raise VerifyError(f"{path} has {there[name]:,} bytes; the manifest says {num_bytes:,}")
    stray = [name for name in there if name.endswith(".safetensors") and name not in manifest["files"]]
    if stray:
        raise VerifyError(
            f"{os.path.join(folder, stray[0])} does not belong to the output: the manifest has no such file"
        )
    found: dict[str, TensorInfo] = {}
    paths = [os.path.join(folder, name) for name in manifest["files"]]
    headers = _or_verify_error(lambda: map_concurrently(read_header, paths, paths))
    for path, (tensors, _) in zip(paths, headers, strict=True):
        for info in tensors.values():
            if info.name in found:
                raise VerifyError(f"tensor {info.name} stands in both {found[info.name].file} and {path}")
            found[info.name] = info
    _check_tensors(folder, manifest["tensors"], found)
    return found


def _check_tensors(folder: str, rows: Mapping[str, Any], found: Mapping[str, TensorInfo]) -> None:
    for name, row in rows.items():
        info = found.get(name)
        if info is None:
            raise VerifyError(
                f"tensor {name} is in no file of {folder}; the manifest has it in {row['file']}"
            )
        values = {"dtype": info.dtype, "shape": list(info.shape), "file": os.path.basename(info.file)}
        for key, value in values.items():
            if row[key] != value:
                raise VerifyError(
                    f"{key} of tensor {name} in {info.file} is {value}; the manifest says {row[key]}"
                )
    extra = [name for name in found if name not in rows]
    if extra:
        raise VerifyError(f"tensor {extra[0]} in {found[extra[0]].file} is not in the manifest")


def _check_index(folder: str, manifest: Mapping[str, Any]) -> None:
    path = os.path.join(folder, INDEX_NAME)
    if len(manifest["files"]) == 1 and not _or_verify_error(lambda: exists(path)):
        return
    weight_map = _or_verify_error(lambda: read_json(path)).get("weight_map")
    if not isinstance(weight_map, dict):
        raise VerifyError(f"{path} has no weight_map")
    expected = {name: row["file"] for name, row in manifest["tensors"].items()}
    for name in [*expected, *weight_map]:
        if weight_map.get(name) != expected.get(name):
            raise VerifyError(
                f"{path} puts tensor {name} into {weight_map.get(name, 'no file')}; the manifest says "
                f"{expected.get(name, 'there is no such tensor')}"
            )


def _check_checksums(rows: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Read every byte of every tensor once, a few pieces at a time."""
    sums = dict.fromkeys(rows, 0)
    reader = _Reader()
    try:
        for name, checksum in map_in_order(reader.sum_piece, _pieces(rows, tensors), num_usable_threads()):
            sums[name] = add_checksums(sums[name], checksum)
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
    finally:
        reader.files.close()
    wrong = [name for name, row in rows.items() if sums[name] != int(row["checksum"], 16)]
    if wrong:
        name = wrong[0]
        more = f" ({len(wrong) - 1:,} more tensors differ too)" if len(wrong) > 1 else ""
        raise VerifyError(
            f"checksum of tensor {name} in {tensors[name].file} is {sums[name]:016x}; the manifest says "
            f"{rows[name]['checksum']}{more}: the file has changed since it was written"
        )


@dataclass(frozen=True, slots=True)
class _Piece:
    info: TensorInfo
    begin: int
    """First byte, from the start of the tensor: a multiple of `chunk_bytes`."""
    end: int
    chunk_bytes: int


def _pieces(rows: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Iterator[_Piece]:
    for name, info in tensors.items():
        chunk_bytes = rows[name]["checksum_chunk_bytes"]
        step = max(1, _PIECE_BYTES // chunk_bytes) * chunk_bytes
        for begin in range(0, info.num_bytes, step):
            yield _Piece(info, begin, min(begin + step, info.num_bytes), chunk_bytes)


class _Reader:
    """Reads and sums pieces on any thread; each thread keeps one buffer."""

    def __init__(self) -> None:
        self.files = StorageFiles()
        self._local = threading.local()

    def sum_piece(self, piece: _Piece) -> tuple[str, int]:
        length = piece.end - piece.begin
        buffer: bytearray = getattr(self._local, "buffer", bytearray())
        if len(buffer) < length:
            buffer = self._local.buffer = bytearray(length)
        data = memoryview(buffer)[:length]
        self.files.read_into(piece.info.file, piece.info.begin + piece.begin, data)
        return piece.info.name, piece_checksum(data, piece.begin, piece.chunk_bytes)


def _read_small_files(folder: str) -> dict[str, Any] | None:
    """Parse every JSON file beside the weights; return config.json, or None."""
    names = [entry.name for entry in _or_verify_error(lambda: entries(folder))]
    for name in names:
        if name.endswith(".json"):
            path = os.path.join(folder, name)
            try:
                json.loads(read_bytes(path).decode("utf-8"))
            except (OSError, ValueError) as error:
                raise VerifyError(f"{path} cannot be read as JSON: {error}") from error
    path = os.path.join(folder, "config.json")
    return _or_verify_error(lambda: read_json(path)) if "config.json" in names else None


def _remarks(folder: str, load: LoadCheck | None) -> Iterator[str]:
    if load is None:
        return
    for remark in load.remarks:
        yield f"{folder}: {remark}"
    if load.missing_keys:
        listed = _listed(load.missing_keys)
        yield f"{folder}: {listed} of {load.architecture} not in the output: random when it is loaded"
    if load.unexpected_keys:
        yield f"{folder}: {_listed(load.unexpected_keys)} of the output unknown to {load.architecture}"


def _listed(names: tuple[str, ...]) -> str:
    return f"{counted(len(names), 'tensor')} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


def _or_verify_error(read: Any) -> Any:
    try:
        return read()
    except CheckpointError as error:
        raise VerifyError(str(error)) from error
