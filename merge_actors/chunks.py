"""Cut a task's pieces into chunks that are read, merged and written one after the other.

A task is as large as Ray's cost per call wants it; a chunk is as small as a processor's cache
wants it, so that what was read is still there when it is merged. A piece whose method measures
the whole tensor first stays in one chunk.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.methods.block import unit_elements
from raymerge.merge_actors.task import Piece, PieceReport

#: Bytes of one input in a chunk on a CPU: those of four inputs and an output, twice per worker, stay in cache.
CHUNK_BYTES = 1 << 20


def chunks_of(
    pieces: Sequence[Piece], must_stay_whole: Callable[[Piece], bool], chunk_bytes: int
) -> Iterator[list[Piece]]:
    """Yield lists of pieces, large ones cut at units and small ones together.

    Args:
        pieces: of one task.
        must_stay_whole: may a piece not be cut?
        chunk_bytes: of one input; a unit, or a piece that stays whole, may be more.
    """
    chunk: list[Piece] = []
    filled = 0
    for piece in pieces:
        for part in [piece] if must_stay_whole(piece) else _cut(piece, chunk_bytes):
            amount = part.num_elements * _widest(part)
            if chunk and filled + amount > chunk_bytes:
                yield chunk
                chunk, filled = [], 0
            chunk.append(part)
            filled += amount
    if chunk:
        yield chunk


def join_reports(reports: Sequence[PieceReport]) -> tuple[PieceReport, ...]:
    """Add the reports on parts of one tensor of one recipe."""
    joined: dict[tuple[int, str], PieceReport] = {}
    for report in reports:
        key = (report.recipe, report.tensor)
        joined[key] = joined[key].plus(report) if key in joined else report
    return tuple(joined.values())


def _cut(piece: Piece, chunk_bytes: int) -> list[Piece]:
    unit = math.lcm(*(unit_elements(piece.shape, split) for split in ("elementwise", "rowwise")))
    step = max(1, chunk_bytes // (unit * _widest(piece))) * unit
    if step >= piece.num_elements:
        return [piece]
    return [
        dataclasses.replace(piece, begin=begin, end=min(begin + step, piece.end))
        for begin in range(piece.begin, piece.end, step)
    ]


def _widest(piece: Piece) -> int:
    return max(element_bytes(read.dtype) for read in piece.reads)
