"""Statistics on disk: a folder of safetensors files and a manifest (docs/statistics.md).

A Gram is stored as its packed upper triangle in float32, a Fisher as a tensor like its parameter.
Opening reads headers only; `TensorInfo`s give the byte ranges, so that whoever merges
reads statistics the way it reads checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import xxhash

from raymerge.merge_actors.checkpoint.folder import Checkpoint, fingerprint
from raymerge.merge_actors.checkpoint.header import TensorInfo, read_header
from raymerge.merge_actors.errors import CheckpointError, MismatchError, OutputError
from raymerge.merge_actors.files import write_error
from raymerge.merge_actors.methods.gram_matrix import triangle_elements
from raymerge.merge_actors.storage.folders import exists, map_concurrently, read_bytes
from raymerge.merge_actors.storage.uris import absolute, is_remote
from raymerge.merge_actors.wording import some_of

if TYPE_CHECKING:
    import torch

MANIFEST = "raymerge_statistics.json"
FORMAT_VERSION = 1
StatisticsKind = Literal["gram", "fisher"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Module:
    """Statistics of one weight tensor."""

    tensor: TensorInfo
    """Where they stand: float32, a packed triangle (T,), for experts (E, T), for Fisher the weight's shape."""
    key: str
    """Name in the safetensors files; weights that read the same input share it."""
    kind: Literal["linear", "conv1d", "experts", "parameter"]
    """How the weight is laid out: (O, I), (I, O), a matrix for each expert; or any parameter (Fisher)."""
    in_features: int
    """0 for Fisher."""
    num_rows: tuple[int, ...]
    """Inputs that were summed, one number for each expert; for Fisher, examples."""
    experts_layout: Literal["", "EOI", "EIO"] = ""
    sum_squares: float | None = None
    """Of a Fisher's values; None in statistics that were measured before it was kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """What a statistics folder holds, from its manifest and headers."""

    path: str
    kind: StatisticsKind
    modules: Mapping[str, Module]
    """By the name of the weight tensor in the checkpoint."""
    manifest: Mapping[str, Any]
    fingerprint: str = ""
    """128 bits in hex over headers, lengths and samples of the files, and the manifest."""

    @property
    def num_tokens(self) -> int:
        """Count the tokens that were measured."""
        return int(self.manifest["num_tokens"])

    def check_against(self, checkpoint: Checkpoint, *, expected: Collection[str] | None = None) -> Coverage:
        """Check that these are statistics of a checkpoint, and say what they cover.

        Args:
            checkpoint: the model that is to be merged.
            expected: weight tensors that must have statistics; None for those that the model had
                when it was measured.

        Raises:
            MismatchError: another model's statistics, a module that the model does not have, one
                whose shape differs, or one that is missing.
        """
        measured = self.manifest["model"]
        if measured["fingerprint"] != checkpoint.fingerprint:
            raise MismatchError(
                f"the statistics {self.path} were measured on {measured['path']} "
                f"(fingerprint {measured['fingerprint'][:12]}), not on {checkpoint.path} "
                f"({checkpoint.fingerprint[:12]}), or its files have changed since; measure this model."
            )
        unmatched = [name for name in self.modules if name not in checkpoint.tensors]
        if unmatched:
            raise MismatchError(
                f"the statistics {self.path} name {some_of(list(map(repr, unmatched)))}, which {checkpoint.path} "
                "does not have."
            )
        for name, module in self.modules.items():
            _check_shape(self.path, name, module, checkpoint.tensors[name])
        coverage = self.coverage
        wanted = coverage.covered if expected is None else tuple(expected)
        if missing := [name for name in wanted if name not in self.modules]:
            raise MismatchError(
                f"the statistics {self.path} lack {some_of(list(map(repr, missing)))}; measure the model again, or "
                "exclude them."
            )
        return coverage

    @property
    def coverage(self) -> Coverage:
        """Return which linear maps of the model have statistics."""
        found = self.manifest["coverage"]
        return Coverage(
            linear_maps=tuple(found["linear_maps"]),
            uncovered=tuple(found["uncovered"]),
            tied=tuple(found["tied"]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Coverage:
    """Linear maps of a model and whether they were measured. For Fisher: parameters."""

    linear_maps: tuple[str, ...]
    """Weight tensors in the checkpoint that are linear maps."""
    uncovered: tuple[str, ...]
    """Those of them that the data never reached."""
    tied: tuple[str, ...]
    """Output layers tied to an embedding and treated as one."""

    @property
    def covered(self) -> tuple[str, ...]:
        """Return the linear maps with statistics."""
        left_out = frozenset(self.uncovered)
        return tuple(name for name in self.linear_maps if name not in left_out)


def open_statistics(path: str | os.PathLike[str], samples: int | None = None) -> Statistics:
    """Read the manifest and headers of a statistics folder.

    Args:
        path: the folder.
        samples: take the statistics of so many samples, which were kept on the way (`samples_at`).

    Raises:
        CheckpointError: it is absent, unfinished, or its files do not fit the manifest.
        MismatchError: statistics of so many samples were not kept.
    """
    folder = absolute(os.fspath(path))
    manifest = _read_manifest(folder)
    if samples is not None:
        manifest = _at_samples(folder, manifest, samples)
    kind: StatisticsKind = manifest["kind"]
    modules = read_modules(folder, manifest["files"], manifest["modules"], kind)
    return Statistics(
        path=folder,
        kind=kind,
        modules=modules,
        manifest=manifest,
        fingerprint=_fingerprint([module.tensor for module in modules.values()], manifest),
    )


def _fingerprint(tensors: list[TensorInfo], manifest: Mapping[str, Any]) -> str:
    of_files = fingerprint(tensors, sorted({tensor.file for tensor in tensors}))
    return xxhash.xxh3_128_hexdigest(f"{of_files}{json.dumps(manifest)}".encode())


def _at_samples(folder: str, manifest: dict[str, Any], samples: int) -> dict[str, Any]:
    """Return the manifest that the statistics of fewer samples would have."""
    prefixes = manifest.get("prefixes", {})
    if samples == manifest["num_examples"] or samples == (manifest["data"].get("samples_at") or [None])[-1]:
        return manifest
    if str(samples) not in prefixes:
        kept = [*map(int, prefixes), manifest["num_examples"]]
        raise MismatchError(
            f"the statistics {folder} were kept at {', '.join(f'{each:,}' for each in kept)} samples, not at "
            f"{samples:,}; measure with --samples-at."
        )
    found = prefixes[str(samples)]
    linear_maps = manifest["coverage"]["linear_maps"]
    uncovered = [name for name in linear_maps if name not in found["modules"]]
    return {**manifest, **found, "coverage": {**manifest["coverage"], "uncovered": uncovered}}


def read_modules(
    folder: str, files: Iterable[str], entries: Mapping[str, Mapping[str, Any]], kind: StatisticsKind
) -> dict[str, Module]:
    """Read the headers of statistics files, and find what the entries of a manifest are about.

    Raises:
        CheckpointError: no file holds what an entry names, or it has another shape.
    """
    tensors: dict[str, TensorInfo] = {}
    paths = [os.path.join(folder, file) for file in files]
    for found, _ in map_concurrently(read_header, paths, paths):
        tensors |= found
    modules = {}
    for name, entry in entries.items():
        key = entry["gram" if kind == "gram" else "fisher"]
        tensor = tensors.get(key)
        if tensor is None:
            raise CheckpointError(
                f"the statistics {folder} name {key!r} for {name}, but no file holds it; measure again."
            )
        modules[name] = _module(folder, name, entry, tensor, kind)
    return modules


def _read_manifest(folder: str) -> dict[str, Any]:
    place = os.path.join(folder, MANIFEST)
    try:
        if is_remote(place) and not exists(place):
            raise FileNotFoundError(place)
        manifest = json.loads(read_bytes(place).decode("utf-8"))
    except FileNotFoundError:
        reason = "has no " + MANIFEST if exists(folder) else "does not exist"
        raise CheckpointError(
            f"the statistics folder {folder} {reason}; make it with `raymerge stats`."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {place}: {error}; measure again.") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{place} has the format_version {version!r}; this raymerge reads {FORMAT_VERSION}: measure again."
        )
    assert isinstance(manifest, dict)
    return manifest


def _module(
    folder: str, name: str, entry: Mapping[str, Any], tensor: TensorInfo, kind: StatisticsKind
) -> Module:
    if kind == "fisher":
        return Module(
            tensor=tensor,
            key=entry["fisher"],
            kind="parameter",
            in_features=0,
            num_rows=(int(entry["num_examples"]),),
            sum_squares=entry.get("sum_squares"),
        )
    rows = entry["num_rows"]
    num_rows = tuple(rows) if isinstance(rows, list) else (int(rows),)
    elements = triangle_elements(entry["in_features"])
    shape = (len(num_rows), elements) if entry["kind"] == "experts" else (elements,)
    if (tensor.dtype, tensor.shape) != ("F32", shape):
        raise CheckpointError(
            f"the Gram {tensor.name!r} of {name} in {tensor.file} is {tensor.dtype} {list(tensor.shape)}; "
            f"{entry['in_features']} input features need F32 {list(shape)}: measure again ({folder})."
        )
    return Module(
        tensor=tensor,
        key=entry["gram"],
        kind=entry["kind"],
        in_features=entry["in_features"],
        num_rows=num_rows,
        experts_layout=entry.get("layout", ""),
    )


def _check_shape(path: str, name: str, module: Module, weight: TensorInfo) -> None:
    if module.kind == "parameter":
        fits = weight.shape == module.tensor.shape
    elif module.kind == "experts":
        axis = 2 if module.experts_layout == "EOI" else 1
        fits = len(weight.shape) == 3 and weight.shape[axis] == module.in_features
    else:
        fits = len(weight.shape) == 2 and weight.shape[module.kind == "linear"] == module.in_features
    if not fits:
        raise MismatchError(
            f"the statistics {path} of {name} are for {module.in_features or list(module.tensor.shape)} "
            f"input features, but the weight has the shape {list(weight.shape)}."
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """A tensor that a statistics file will hold."""

    key: str
    shape: tuple[int, ...]
    parts: Iterable[torch.Tensor]
    """Its values in order, cut anywhere; converted to float32 one by one."""


def write_statistics_file(path: str, tensors: list[Written]) -> None:
    """Write a safetensors file of float32 tensors part by part, under a temporary name until it is whole.

    Raises:
        OutputError: the disk is full or the file cannot be written.
    """
    import math

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + 4 * math.prod(tensor.shape)
        header[tensor.key] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path + ".tmp"
    try:
        with open(temporary, "wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                for part in tensor.parts:
                    stream.write(part.float().cpu().contiguous().numpy().data)
        os.replace(temporary, path)
    except OSError as error:
        raise write_error(path, error) from error


def write_json(path: str, value: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name and rename it."""
    try:
        with open(path + ".tmp", "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1)
            stream.write("\n")
        os.replace(path + ".tmp", path)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error
