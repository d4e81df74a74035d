"""Bring the inputs of a piece into memory: ranges of files, low-rank updates, moved rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import element_bytes, torch_dtype
from raymerge.merge_actors.files import Files, RangeRead
from raymerge.merge_actors.host_input import HostInput, host_input
from raymerge.merge_actors.methods.block import unit_elements
from raymerge.merge_actors.task import LowRankRead, Piece, Read, RowRun

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64
#: Bytes of matrices by file and offset.
_Factors = dict[tuple[str, int], bytearray]


def arena_bytes(pieces: Sequence[Piece]) -> int:
    """Return the bytes that the inputs of some pieces take in one arena."""
    return sum(
        aligned(piece.num_elements * element_bytes(read.dtype)) for piece in pieces for read in piece.reads
    )


def aligned(num_bytes: int) -> int:
    """Round up, so that what follows in an arena can be viewed as any element type."""
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def read_pieces(pieces: Sequence[Piece], files: Files, arena_P: torch.Tensor) -> list[list[torch.Tensor]]:
    """Do as `read_inputs`, with tensors."""
    return [[each.tensor() for each in of_piece] for of_piece in read_inputs(pieces, files, arena_P.numpy())]


def read_inputs(pieces: Sequence[Piece], files: Files, arena: NDArray[np.uint8]) -> list[list[HostInput]]:
    """Read every input of some pieces into `arena`, by file and offset.

    Args:
        pieces: what to read.
        files: open files.
        arena: at least `arena_bytes(pieces)` long.

    Returns:
        Per piece its inputs, flat and in storage dtype: views of the arena, or of what is in memory anyway.
    """
    view = arena.data
    wanted: list[tuple[str, int, int, int]] = []
    inputs: list[list[HostInput]] = []
    at = 0
    for piece in pieces:
        of_piece = []
        for read in piece.reads:
            width = element_bytes(read.dtype)
            num_bytes = piece.num_elements * width
            resident = _resident(read, piece, files)
            if resident is not None:
                of_piece.append(resident)
                continue
            of_piece.append(HostInput(arena[at : at + num_bytes], read.dtype))
            for first, count, to in _ranges(read, piece):
                wanted.append((read.file, read.offset + first * width, at + to * width, count * width))
            at += aligned(num_bytes)
        inputs.append(of_piece)
    factors = _factor_buffers(pieces)
    files.read_many(
        [
            *(RangeRead(file, offset, view[to : to + num_bytes]) for file, offset, to, num_bytes in wanted),
            *(RangeRead(*place, memoryview(data)) for place, data in factors.items()),
        ]
    )
    for piece, of_piece in zip(pieces, inputs, strict=True):
        for i, read in enumerate(piece.reads):
            if read.row_runs is not None:
                _read_foreign_rows(of_piece[i].tensor(), read, piece, files)
            if read.low_rank is not None:
                of_piece[i] = host_input(_add_low_rank(of_piece[i].tensor(), read, piece, factors), "F32")
        if any(read.row_runs is not None for read in piece.reads):
            _fill_missing_rows(piece, [each.tensor() for each in of_piece])
    return inputs


def _resident(read: Read, piece: Piece, files: Files) -> HostInput | None:
    """Return an input that is in memory anyway, unless it is to be changed or has rows of other models."""
    if read.low_rank is not None or any(each.row_runs is not None for each in piece.reads):
        return None
    width = element_bytes(read.dtype)
    return files.view(read.file, read.offset + piece.begin * width, piece.num_elements * width, read.dtype)


def _ranges(read: Read, piece: Piece) -> list[tuple[int, int, int]]:
    """Return (first element in the file's tensor, elements, first element in the piece)."""
    if read.row_runs is None:
        return [(piece.begin, piece.num_elements, 0)] if piece.num_elements else []
    columns = _num_columns(piece)
    return [
        (source * columns, count * columns, to * columns)
        for run, source, count, to in _runs(read, piece)
        if run.foreign is None
    ]


def _num_columns(piece: Piece) -> int:
    """Return the elements of a row: a bias over the vocabulary has one per row."""
    return piece.shape[-1] if len(piece.shape) > 1 else 1


def _runs(read: Read, piece: Piece) -> list[tuple[RowRun, int, int, int]]:
    """Return the runs that reach into a piece: (run, first source row, rows, first row in the piece)."""
    columns = _num_columns(piece)
    first_row, last_row = piece.begin // columns, piece.end // columns
    runs = []
    for run in read.row_runs or ():
        begin, end = max(run.to, first_row), min(run.to + run.count, last_row)
        if begin < end:
            runs.append((run, run.source + begin - run.to, end - begin, begin - first_row))
    return runs


def _read_foreign_rows(input_P: torch.Tensor, read: Read, piece: Piece, files: Files) -> None:
    """Put rows of zeros and rows borrowed from other models into an input, in its dtype."""
    input_RD = input_P.view(-1, _num_columns(piece))
    columns = input_RD.shape[1]
    for run, source, count, to in _runs(read, piece):
        if run.foreign is None:
            continue
        if not run.foreign.file:
            input_RD[to : to + count] = 0
            continue
        offset = run.foreign.offset + source * columns * element_bytes(run.foreign.dtype)
        rows_RD = _read_matrix(files, run.foreign.file, offset, run.foreign.dtype, count, columns)
        input_RD[to : to + count] = rows_RD.to(input_P.dtype)


def _mark_rows(read: Read, piece: Piece, *, replaced: bool) -> torch.Tensor:
    """Return a bool per row of the piece: is it there, or, with `replaced`, there to be replaced."""
    import torch

    num_rows = piece.num_elements // _num_columns(piece)
    if read.row_runs is None:
        return torch.full((num_rows,), not replaced)
    marked_R = torch.zeros(num_rows, dtype=torch.bool)
    for run, _, count, to in _runs(read, piece):
        marked_R[to : to + count] = run.is_replaced or not replaced
    return marked_R


def _fill_missing_rows(piece: Piece, inputs: list[torch.Tensor]) -> None:
    """Give a row that a model lacks the base's row, else the weighted mean over the models that have it."""
    import torch

    rows = [tensor.view(-1, _num_columns(piece)) for tensor in inputs]
    present = [_mark_rows(read, piece, replaced=False) for read in piece.reads]
    base = piece.jobs[0].base
    total_RD = torch.zeros(rows[0].shape, dtype=torch.float32)
    weight_R = torch.zeros(len(total_RD), dtype=torch.float32)
    # In the order of the models' names, which is the same whatever the order in the recipe.
    for i in sorted(range(len(rows)), key=lambda i: (piece.reads[i].model, piece.reads[i].tensor)):
        weight = piece.reads[i].fill_weight
        total_RD[present[i]] += rows[i][present[i]].float() * weight
        weight_R[present[i]] += weight
    filled_RD = total_RD / weight_R.masked_fill(weight_R == 0, 1).unsqueeze(1)
    if base is not None:
        filled_RD = torch.where(present[base].unsqueeze(1), rows[base].float(), filled_RD)
    for tensor, has_R, read in zip(rows, present, piece.reads, strict=True):
        fill_R = ~has_R | _mark_rows(read, piece, replaced=True)
        tensor[fill_R] = filled_RD[fill_R].to(tensor.dtype)


def _factor_buffers(pieces: Sequence[Piece]) -> _Factors:
    """Return memory for every factor of low-rank updates, by its place: tensors may share one."""
    factors: _Factors = {}
    for piece in pieces:
        for read in piece.reads:
            low_rank = read.low_rank
            if low_rank is None:
                continue
            width = low_rank.rank * element_bytes(low_rank.dtype)
            num_out, num_in = _features(low_rank, piece)
            factors.setdefault((low_rank.a_file, low_rank.a_offset), bytearray(num_in * width))
            factors.setdefault((low_rank.b_file, low_rank.b_offset), bytearray(num_out * width))
    return factors


def _add_low_rank(weight_P: torch.Tensor, read: Read, piece: Piece, factors: _Factors) -> torch.Tensor:
    """Return W + scale * B @ A for the piece's rows, in float32.

    The product is taken unit by unit: a matrix product's rounding may depend on the number of
    its rows, and a unit's rows do not depend on how the tensor was cut.
    """
    import torch

    low_rank = read.low_rank
    assert low_rank is not None
    columns = piece.shape[-1]
    left_RK, right_KC = _low_rank_factors(low_rank, piece, factors)
    rows_a_unit = unit_elements(piece.shape, "rowwise") // columns
    sum_RC = weight_P.view(-1, columns).to(torch.float32, copy=True)
    if read.row_runs is None:
        first_row = piece.begin // columns
        left_RK = left_RK[first_row : first_row + len(sum_RC)]
    else:
        left_RK = _move_rows(left_RK, read, piece)
    for row in range(0, len(sum_RC), rows_a_unit):
        part_RK = left_RK[row : row + rows_a_unit]
        sum_RC[row : row + rows_a_unit].add_(part_RK @ right_KC, alpha=low_rank.scale)
    return sum_RC.view(-1)


def _features(low_rank: LowRankRead, piece: Piece) -> tuple[int, int]:
    """Return the rows of B and the columns of A."""
    rows, columns = low_rank.num_rows or piece.shape[0], piece.shape[1]
    return (columns, rows) if low_rank.is_transposed else (rows, columns)


def _low_rank_factors(
    low_rank: LowRankRead, piece: Piece, factors: _Factors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors (rows of the model's tensor, rank) and (rank, columns)."""
    out_features, in_features = _features(low_rank, piece)
    a_RI = _as_matrix(factors[low_rank.a_file, low_rank.a_offset], low_rank.dtype, low_rank.rank, in_features)
    b_OR = _as_matrix(
        factors[low_rank.b_file, low_rank.b_offset], low_rank.dtype, out_features, low_rank.rank
    )
    return (a_RI.T.contiguous(), b_OR.T) if low_rank.is_transposed else (b_OR, a_RI)


def _move_rows(left_RK: torch.Tensor, read: Read, piece: Piece) -> torch.Tensor:
    """Move rows as `read.row_runs` says, zeros elsewhere."""
    moved_RK = left_RK.new_zeros(piece.num_elements // piece.shape[-1], left_RK.shape[1])
    for run, source, count, to in _runs(read, piece):
        if run.foreign is None:
            moved_RK[to : to + count] = left_RK[source : source + count]
    return moved_RK


def _read_matrix(
    files: Files, file: str, offset: int, dtype: str, num_rows: int, num_columns: int
) -> torch.Tensor:
    """Read a small matrix whole, as float32."""
    data = bytearray(num_rows * num_columns * element_bytes(dtype))
    files.read_into(file, offset, memoryview(data))
    return _as_matrix(data, dtype, num_rows, num_columns)


def _as_matrix(data: bytearray, dtype: str, num_rows: int, num_columns: int) -> torch.Tensor:
    import torch

    if not data:  # torch refuses an empty buffer
        return torch.zeros(num_rows, num_columns)
    raw = torch.frombuffer(data, dtype=torch.uint8)
    return raw.view(torch_dtype(dtype)).view(num_rows, num_columns).float()
