"""What a task holds in memory, at most."""

from __future__ import annotations

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.outputs import BATCH_BYTES
from raymerge.merge_actors.storage.staged_outputs import PART_BYTES, PARTS_IN_FLIGHT
from raymerge.merge_actors.task import FileTask, MergeTask, SolveTask

#: Greatest number of bytes per pair of input features while a Gram is factorised in float64.
_SOLVE_BYTES_A_PAIR = 20


def buffer_bytes(task: MergeTask | SolveTask | FileTask) -> int:
    """Return the bytes that a task holds: its inputs and a batch of outputs, or a solve's matrices."""
    if isinstance(task, FileTask):
        return max(PARTS_IN_FLIGHT * PART_BYTES, *(buffer_bytes(part) for part in task.parts))
    if isinstance(task, MergeTask):
        # The sum is enough for a bound, and cheap for a plan of 45,000 tensors.
        largest = max(
            piece.num_elements * element_bytes(job.dtype) for piece in task.pieces for job in piece.jobs
        )
        return task.read_bytes + min(task.write_bytes, max(BATCH_BYTES, largest))
    in_features = task.grams[0].in_features
    weights = max(sum(8 * job.num_elements for job in each.jobs) for each in task.sets)
    kept_grams = 2 * in_features**2 * len(task.grams) if len(task.sets) > 1 else 0
    return _SOLVE_BYTES_A_PAIR * in_features**2 + kept_grams + weights * (len(task.grams) + 1)
