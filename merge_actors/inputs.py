"""Bring the inputs of a piece into memory: ranges of files, low-rank updates, moved rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raymerge.merge_actors.dtypes import element_bytes, torch_dtype
from raymerge.merge_actors.files import Files
from raymerge.merge_actors.methods.block import unit_elements
from raymerge.merge_actors.task import LowRankRead, Piece, Read

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64


def arena_bytes(pieces: Sequence[Piece]) -> int:
    """Return the bytes that the inputs of some pieces take in one arena."""
    return sum(
        _aligned(piece.num_elements * element_bytes(read.dtype)) for piece in pieces for read in piece.reads
    )


def read_pieces(pieces: Sequence[Piece], files: Files, arena_P: torch.Tensor) -> list[list[torch.Tensor]]:
    """Read every input of some pieces into `arena_P`, by file and offset.

    Args:
        pieces: what to read.
        files: open files.
        arena_P: uint8, at least `arena_bytes(pieces)` long, in host memory.

    Returns:
        Per piece its inputs, flat and in storage dtype: views of the arena.
    """
    view = memoryview(arena_P.numpy())
    wanted: list[tuple[str, int, int, int]] = []
    inputs: list[list[torch.Tensor]] = []
    at = 0
    for piece in pieces:
        of_piece = []
        for read in piece.reads:
            width = element_bytes(read.dtype)
            num_bytes = piece.num_elements * width
            of_piece.append(arena_P[at : at + num_bytes].view(torch_dtype(read.dtype)))
            for first, count, to in _ranges(read, piece):
                wanted.append((read.file, read.offset + first * width, at + to * width, count * width))
            at += _aligned(num_bytes)
        inputs.append(of_piece)
    for file, offset, to, num_bytes in sorted(wanted):
        files.read_into(file, offset, view[to : to + num_bytes])
    for piece, of_piece in zip(pieces, inputs, strict=True):
        for i, read in enumerate(piece.reads):
            if read.low_rank is not None:
                of_piece[i] = _add_low_rank(of_piece[i], read.low_rank, piece, files)
        if any(read.row_runs is not None for read in piece.reads):
            _fill_missing_rows(piece, of_piece)
    return inputs


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def _ranges(read: Read, piece: Piece) -> list[tuple[int, int, int]]:
    """Return (first element in the file's tensor, elements, first element in the piece)."""
    if read.row_runs is None:
        return [(piece.begin, piece.num_elements, 0)] if piece.num_elements else []
    columns = piece.shape[-1]
    first_row, last_row = piece.begin // columns, piece.end // columns
    ranges = []
    for run in read.row_runs:
        begin, end = max(run.to, first_row), min(run.to + run.count, last_row)
        if begin < end:
            source = run.source + begin - run.to
            ranges.append((source * columns, (end - begin) * columns, (begin - first_row) * columns))
    return ranges


def _present_rows(read: Read, piece: Piece) -> torch.Tensor:
    """Return a bool per row of the piece: does the file have it?"""
    import torch

    columns = piece.shape[-1]
    present_R = torch.zeros(piece.num_elements // columns, dtype=torch.bool)
    for _, count, to in _ranges(read, piece):
        present_R[to // columns : (to + count) // columns] = True
    return present_R


def _fill_missing_rows(piece: Piece, inputs: list[torch.Tensor]) -> None:
    """Give a row that a model lacks the base's row, else the mean over the models that have it."""
    import torch

    columns = piece.shape[-1]
    rows = [tensor.view(-1, columns) for tensor in inputs]
    present = [_present_rows(read, piece) for read in piece.reads]
    base = piece.jobs[0].base
    num_present_R = torch.stack(present).sum(dim=0)
    total_RD = torch.zeros(rows[0].shape, dtype=torch.float32)
    for tensor, has_R in zip(rows, present, strict=True):
        total_RD[has_R] += tensor[has_R].float()
    mean_RD = total_RD / num_present_R.clamp(min=1).unsqueeze(1)
    for tensor, has_R in zip(rows, present, strict=True):
        lacks_R = ~has_R
        filled_RD = mean_RD
        if base is not None:
            filled_RD = torch.where(present[base].unsqueeze(1), rows[base].float(), mean_RD)
        tensor[lacks_R] = filled_RD[lacks_R].to(tensor.dtype)


def _add_low_rank(weight_P: torch.Tensor, low_rank: LowRankRead, piece: Piece, files: Files) -> torch.Tensor:
    """Return W + scale * B @ A for the piece's rows, in float32.

    The product is taken unit by unit: a matrix product's rounding may depend on the number of
    its rows, and a unit's rows do not depend on how the tensor was cut.
    """
    import torch

    out_features, in_features = piece.shape if not low_rank.is_transposed else piece.shape[::-1]
    a_RI = _read_matrix(files, low_rank.a_file, low_rank.a_offset, low_rank.dtype, low_rank.rank, in_features)
    b_OR = _read_matrix(
        files, low_rank.b_file, low_rank.b_offset, low_rank.dtype, out_features, low_rank.rank
    )
    left, right = (a_RI.T.contiguous(), b_OR.T) if low_rank.is_transposed else (b_OR, a_RI)
    columns = piece.shape[-1]
    rows_a_unit = unit_elements(piece.shape, "rowwise") // columns
    sum_RC = weight_P.view(-1, columns).to(torch.float32, copy=True)
    first_row = piece.begin // columns
    for row in range(0, len(sum_RC), rows_a_unit):
        part = left[first_row + row : first_row + min(row + rows_a_unit, len(sum_RC))]
        sum_RC[row : row + rows_a_unit].add_(part @ right, alpha=low_rank.scale)
    return sum_RC.view(-1)


def _read_matrix(
    files: Files, file: str, offset: int, dtype: str, num_rows: int, num_columns: int
) -> torch.Tensor:
    """Read a small matrix whole, as float32."""
    import torch

    raw = torch.empty(num_rows * num_columns * element_bytes(dtype), dtype=torch.uint8)
    files.read_into(file, offset, memoryview(raw.numpy()))
    return raw.view(torch_dtype(dtype)).view(num_rows, num_columns).float()
