"""Measure how checkpoints differ, out of core: strips of tensors are read, measured, and forgotten.

Memory depends on the number of models and threads, not on their size. Strips are fixed by the
headers and results are added in their order, so that figures do not depend on the threads.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raymerge.cluster.compare import find_tensor
from raymerge.cluster.parallel import map_in_order
from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.dtypes import element_bytes, is_float
from raymerge.merge_actors.files import RangeRead
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.stats.decode import decode
from raymerge.stats.delta import Agreement, DeltaStatistics, measure_agreement, measure_delta
from raymerge.stats.verdict import MatrixRow

QUANTILES = (0.5, 0.9, 0.99, 0.999)
#: Elements that are decoded and measured at once: small enough for a core's cache, and long enough that
#: threads seldom wait for each other between two numpy calls.
_BLOCK_ELEMENTS = 1 << 17
#: Elements that a thread measures before it hands its figures over.
_PIECE_ELEMENTS = 1 << 22
#: Threads where models come over the network: they wait most of the time.
_NUM_WAITING_THREADS = 8
#: Length of a strip when a tensor is sampled, and tensors that are always read whole.
_STRIP_ELEMENTS = 1 << 14


@dataclass(frozen=True, slots=True)
class TensorDelta:
    """How one tensor differs between two models."""

    name: str
    num_elements: int
    """Elements compared: fewer than the tensor has if it was sampled or is not finite."""
    norm: float
    relative_norm: float
    """||delta|| / ||base||."""
    cosine: float
    """Between the weights, not the deltas."""
    equal_fraction: float
    quantiles: tuple[float, ...]
    """Of |delta| at `QUANTILES`."""
    max_magnitude: float


@dataclass(slots=True)
class DeltaFigures:
    """How one model differs from another: all float tensors that both have in one shape."""

    overall: DeltaStatistics = field(default_factory=DeltaStatistics)
    matrices: DeltaStatistics = field(default_factory=DeltaStatistics)
    """The tensors of two or more dimensions among them."""
    matrix_rows: list[MatrixRow] = field(default_factory=list)
    tensors: list[TensorDelta] = field(default_factory=list)

    def add_tensor(self, info: TensorInfo, found: DeltaStatistics) -> None:
        """Take in the statistics of one whole tensor."""
        self.overall.add(found)
        if is_matrix(info):
            self.matrices.add(found)
            self.matrix_rows.append(MatrixRow(info.num_elements, found.relative_norm, found.cosine))
        self.tensors.append(
            TensorDelta(
                name=info.name,
                num_elements=found.num_elements,
                norm=found.norm,
                relative_norm=found.relative_norm,
                cosine=found.cosine,
                equal_fraction=found.equal_fraction,
                quantiles=tuple(found.quantiles(QUANTILES)),
                max_magnitude=found.max_magnitude,
            )
        )


@dataclass(frozen=True, slots=True)
class Selection:
    """One tensor of all models and the strips of it that are measured."""

    infos: tuple[TensorInfo | None, ...]
    """Per model; all that are not None have one shape."""
    strips: tuple[tuple[int, int], ...]
    """Elements [begin, end), ascending."""


@dataclass(slots=True)
class Measurements:
    """Everything that was measured, in the order of the requests."""

    deltas: list[DeltaFigures]
    """Per comparison."""
    agreements: list[Agreement]
    """Per pair of comparisons."""
    read_bytes: int = 0


def is_matrix(info: TensorInfo) -> bool:
    """Tell weight matrices, and stacks of them, from biases and norms."""
    return len(info.shape) >= 2 and min(info.shape[-2:]) > 1


def select_tensors(checkpoints: Sequence[Checkpoint], sample: float | None) -> list[Selection]:
    """Choose what to read of all float tensors: everything, or strips spread over each of them.

    A tensor takes part in the models that have it in the shape of the first that has it.

    Args:
        checkpoints: in the order of the comparisons' indices.
        sample: share of each large tensor to read, in (0, 1]; None for all.
    """
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.tensors)
    selections = []
    for name in names:
        found = [find_tensor(checkpoint, name) for checkpoint in checkpoints]
        first = next(info for info in found if info is not None)
        infos = [
            info if info and info.shape == first.shape and is_float(info.dtype) else None for info in found
        ]
        if sum(info is not None for info in infos) > 1 and first.num_elements:
            count = first.num_elements
            wanted = count if sample is None else math.ceil(count * sample)
            selections.append(Selection(tuple(infos), spread_strips(count, wanted)))
    return selections


def spread_strips(
    num_elements: int, wanted: int, strip: int = _STRIP_ELEMENTS
) -> tuple[tuple[int, int], ...]:
    """Spread strips evenly over a tensor, the first at its begin and the last at its end.

    Args:
        num_elements: of the tensor.
        wanted: how many elements the strips should hold; all of a tensor no longer than a strip are taken.
        strip: length of a strip.
    """
    if wanted >= num_elements or num_elements <= strip:
        return ((0, num_elements),)
    count = max(1, round(wanted / strip))
    if count * strip >= num_elements:
        return ((0, num_elements),)
    last = num_elements - strip
    begins = [last // 2] if count == 1 else [last * i // (count - 1) for i in range(count)]
    return tuple((begin, begin + strip) for begin in begins)


def measure(
    selections: Sequence[Selection],
    comparisons: Sequence[tuple[int, int]],
    pairs: Sequence[tuple[int, int]],
    num_threads: int,
) -> Measurements:
    """Read and measure.

    Args:
        selections: what to read.
        comparisons: (base, model) as indices into `Selection.infos`; the delta is model - base.
        pairs: indices of two comparisons with one base, whose task vectors are compared.
        num_threads: threads that read and measure.
    """
    result = Measurements([DeltaFigures() for _ in comparisons], [Agreement() for _ in pairs])
    reader = _Reader(comparisons, pairs)
    pieces = ((number, strips) for number, each in enumerate(selections) for strips in _cut(each.strips))
    try:
        measured = map_in_order(
            lambda piece: (piece[0], reader.measure(selections[piece[0]], piece[1])),
            pieces,
            max(num_threads, _NUM_WAITING_THREADS) if _are_remote(selections) else num_threads,
        )
        for number, group in itertools.groupby(measured, key=lambda pair: pair[0]):
            sums = _Sums()
            for _, found in group:
                sums.add(found)
            for index, statistics in sums.deltas.items():
                info = selections[number].infos[comparisons[index][0]]
                assert info is not None
                result.deltas[index].add_tensor(info, statistics)
            for index, agreement in sums.agreements.items():
                result.agreements[index].add(agreement)
            result.read_bytes += sums.read_bytes
    finally:
        reader.files.close()
    return result


def _are_remote(selections: Sequence[Selection]) -> bool:
    infos = (info for selection in selections for info in selection.infos)
    return any(info is not None and is_remote(info.file) for info in infos)


@dataclass(slots=True)
class _Sums:
    """Figures of one tensor, or of a piece of it; comparisons that a tensor has no part in are absent."""

    deltas: dict[int, DeltaStatistics] = field(default_factory=dict)
    agreements: dict[int, Agreement] = field(default_factory=dict)
    read_bytes: int = 0

    def add(self, other: _Sums) -> None:
        for index, statistics in other.deltas.items():
            self.deltas.setdefault(index, DeltaStatistics()).add(statistics)
        for index, agreement in other.agreements.items():
            self.agreements.setdefault(index, Agreement()).add(agreement)
        self.read_bytes += other.read_bytes


class _Reader:
    """Measures pieces on any thread; each thread keeps its buffers."""

    def __init__(self, comparisons: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]]) -> None:
        self.comparisons, self.pairs = comparisons, pairs
        self.files = StorageFiles()
        self._local = threading.local()

    def measure(self, selection: Selection, strips: Sequence[tuple[int, int]]) -> _Sums:
        sums = _Sums()
        for begin, end in strips:
            for at in range(begin, end, _BLOCK_ELEMENTS):
                sums.add(self._measure_block(selection, at, min(at + _BLOCK_ELEMENTS, end)))
        return sums

    def _measure_block(self, selection: Selection, begin: int, end: int) -> _Sums:
        sums = _Sums()
        # float64 only where an input has it, and then for all, so that equal values stay equal.
        is_double = any(info is not None and info.dtype == "F64" for info in selection.infos)
        dtype = np.dtype(np.float64 if is_double else np.float32)
        values = self._read(selection.infos, begin, end, dtype, sums)
        deltas: dict[int, NDArray[np.floating]] = {}
        for index, (base, model) in enumerate(self.comparisons):
            base_P, model_P = values[base], values[model]
            if base_P is not None and model_P is not None:
                sums.deltas[index], deltas[index] = measure_delta(base_P, model_P)
        for index, (first, second) in enumerate(self.pairs):
            if first in deltas and second in deltas:
                sums.agreements[index] = measure_agreement(deltas[first], deltas[second])
        return sums

    def _read(
        self,
        infos: Sequence[TensorInfo | None],
        begin: int,
        end: int,
        dtype: np.dtype[np.floating],
        sums: _Sums,
    ) -> list[NDArray[np.floating] | None]:
        """Return elements [begin, end) of every model that has the tensor, read together."""
        reads = []
        raws: list[NDArray[np.uint8] | None] = []
        for index, info in enumerate(infos):
            raws.append(None)
            if info is not None:
                width = element_bytes(info.dtype)
                buffer = self._buffer(f"{index} raw", np.dtype(np.uint8), _BLOCK_ELEMENTS * 8)
                raws[index] = raw = buffer[: (end - begin) * width]
                reads.append(RangeRead(info.file, info.begin + begin * width, raw.data))
                sums.read_bytes += len(raw)
        self.files.read_many(reads)
        return [
            None
            if info is None or raw is None
            else decode(raw, info.dtype, self._buffer(f"{index} {dtype}", dtype, _BLOCK_ELEMENTS))
            for index, (info, raw) in enumerate(zip(infos, raws, strict=True))
        ]

    def _buffer(self, key: str, dtype: np.dtype, num_elements: int) -> NDArray:  # type: ignore[type-arg]
        buffers = self._local.__dict__
        if key not in buffers:
            buffers[key] = np.empty(num_elements, dtype)
        return buffers[key]  # type: ignore[no-any-return]


def _cut(strips: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut strips into pieces of whole blocks, none much longer than a piece should be."""
    piece: list[tuple[int, int]] = []
    length = 0
    for begin, end in strips:
        for at in range(begin, end, _PIECE_ELEMENTS):
            part = (at, min(at + _PIECE_ELEMENTS, end))
            piece.append(part)
            length += part[1] - part[0]
            if length >= _PIECE_ELEMENTS:
                yield piece
                piece, length = [], 0
    if piece:
        yield piece
