"""In which order the outputs of a task are merged and written, so that few are held at once.

A campaign of many recipes has many outputs per slice of input. They pass through one buffer of
bounded length, batch after batch, while the inputs stay where they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.inputs import aligned
from raymerge.merge_actors.task import Job, Piece

#: The most output bytes of a batch, unless one job alone has more.
BATCH_BYTES = 64 << 20


class OutputBatch(NamedTuple):
    """Jobs whose outputs lie in the buffer together."""

    jobs: list[tuple[int, list[Job]]]
    """Number of the piece in the task, and jobs of it."""
    num_bytes: int
    """Length of the buffer, every output aligned."""


def output_batches(pieces: Sequence[Piece], most_bytes: int = BATCH_BYTES) -> list[OutputBatch]:
    """Cut the jobs of some pieces into batches, in order."""
    batches: list[OutputBatch] = []
    jobs: list[tuple[int, list[Job]]] = []
    filled = 0
    for number, piece in enumerate(pieces):
        for job in piece.jobs:
            num_bytes = aligned(piece.num_elements * element_bytes(job.dtype))
            if jobs and filled + num_bytes > most_bytes:
                batches.append(OutputBatch(jobs, filled))
                jobs, filled = [], 0
            if not jobs or jobs[-1][0] != number:
                jobs.append((number, []))
            jobs[-1][1].append(job)
            filled += num_bytes
    return [*batches, OutputBatch(jobs, filled)] if jobs else batches
