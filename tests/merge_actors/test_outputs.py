"""Outputs of a task pass through one buffer of bounded length."""

from __future__ import annotations

from raymerge.merge_actors.outputs import OutputBatch, output_batches
from raymerge.merge_actors.task import Job, Piece, Read


def job(recipe: int, dtype: str = "F32") -> Job:
    return Job(
        recipe=recipe,
        tensor="w",
        settings=0,
        base=None,
        models=(0,),
        keys=(1,),
        file="f",
        offset=0,
        dtype=dtype,
    )


def piece(num_elements: int, *jobs: Job) -> Piece:
    read = Read(model="m", tensor="w", file="i", offset=0, dtype="F32")
    return Piece(shape=(num_elements,), begin=0, end=num_elements, reads=(read,), jobs=jobs)


def test_jobs_fill_batches_in_order() -> None:
    jobs = [job(recipe) for recipe in range(5)]
    pieces = [piece(16, *jobs[:3]), piece(32, *jobs[3:])]
    assert output_batches(pieces, most_bytes=128) == [
        OutputBatch([(0, jobs[:2])], 128),
        OutputBatch([(0, jobs[2:3])], 64),
        OutputBatch([(1, jobs[3:4])], 128),
        OutputBatch([(1, jobs[4:])], 128),
    ]


def test_a_batch_may_span_pieces_and_outputs_are_aligned() -> None:
    one, two = job(0, "BF16"), job(0)
    assert output_batches([piece(3, one), piece(1, two)]) == [OutputBatch([(0, [one]), (1, [two])], 128)]


def test_a_job_larger_than_a_batch_stands_alone() -> None:
    small, large = job(0), job(1)
    batches = output_batches([piece(1000, small, large)], most_bytes=64)
    assert [batch.num_bytes for batch in batches] == [4032, 4032]


def test_no_jobs_make_no_batch() -> None:
    assert output_batches([piece(8)]) == []
