"""States are taken over where they would come out the same, and take little room whatever they depend on."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from typing import Any

import pytest

from raymerge.merge_actors.known_states import KnownStates
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.task import Job, Piece, Read, RowRun

TIES = METHODS["ties"]


def _settings(density: float, trim: str = "tensor", sparsify: Any = None) -> Settings:
    defaults = {each.name: each.default for each in TIES.sparsifier.parameters} if TIES.sparsifier else {}
    model = {**defaults, "density": density, "trim": trim}
    if sparsify is not None:
        model["sparsify"] = {**defaults, **sparsify}
    return Settings(shared={}, models=(model, model))


def _tensor(number: int, **changes: Any) -> tuple[Piece, Job]:
    """Return a tensor of two models and a base; its objects are its own."""
    reads = tuple(
        Read(model=name, tensor=f"layers.{number}.weight", file=f"/{name}", offset=64 * number, dtype="BF16")
        for name in ("base", "math", "code")
    )
    job = Job(
        recipe=0, tensor=f"layers.{number}.weight", settings=0, base=0, models=(1, 2), keys=(7, 8), file="out",
        offset=0, dtype="BF16",
    )  # fmt: skip
    job = dataclasses.replace(job, **{name: changes.pop(name) for name in ("keys",) if name in changes})
    if changes:
        reads = (reads[0], dataclasses.replace(reads[1], **changes), reads[2])
    return Piece(shape=(4, 8), begin=0, end=32, reads=reads, jobs=(job,)), job


def _measured(*values: Any) -> TensorState:
    return TensorState(stages={(model, 0): value for model, value in enumerate(values)})


def test_a_state_is_taken_over_where_all_it_depends_on_is_equal() -> None:
    states, nothing = KnownStates(SPARSIFIERS), TensorState()
    states.keep([_tensor(0)], TIES, _settings(0.5), _measured("a", "b"), nothing)
    assert states.recall([_tensor(0)], TIES, _settings(0.5), nothing) == _measured("a", "b")
    first, job = _tensor(0)
    part = dataclasses.replace(first, begin=8, end=16)
    assert states.recall([(part, job), (first, job)], TIES, _settings(0.5), nothing) == _measured("a", "b")
    others = [
        (_tensor(1), _settings(0.5)),
        (_tensor(0), _settings(0.25)),
        (_tensor(0, file="/else", dtype="F32"), _settings(0.5)),
    ]
    for tensor, settings in others:
        assert (0, 0) not in states.recall([tensor], TIES, settings, nothing).stages
    moved = states.recall([_tensor(0, keys=(7, 9))], TIES, _settings(0.5), nothing)
    assert moved.stages == {(0, 0): "a"}, "of the other model the random stream changed"
    assert states.recall([_tensor(0, dtype="F64")], TIES, _settings(0.5), nothing) == nothing


def test_rows_that_are_filled_make_a_state_depend_on_those_who_fill_them() -> None:
    """What a model lacks of the vocabulary is the mean of the others, and so is part of its delta."""
    runs, nothing, settings = (RowRun(0, 0, 3),), TensorState(), _settings(0.5)

    def tensor(file: str, row_runs: tuple[RowRun, ...] | None) -> tuple[Piece, Job]:
        piece, job = _tensor(0)
        one = dataclasses.replace(piece.reads[1], row_runs=row_runs)
        other = dataclasses.replace(piece.reads[2], file=file)
        return dataclasses.replace(piece, reads=(piece.reads[0], one, other)), job

    states = KnownStates(SPARSIFIERS)
    for row_runs in (None, runs):
        states.keep([tensor("/code", row_runs)], TIES, settings, _measured("a", "b"), nothing)
        assert states.recall([tensor("/code", row_runs)], TIES, settings, nothing) == _measured("a", "b")
    assert states.recall([tensor("/else", None)], TIES, settings, nothing).stages == {(0, 0): "a"}
    assert states.recall([tensor("/else", runs)], TIES, settings, nothing) == nothing


def test_a_step_behind_one_over_the_model_depends_on_what_that_found() -> None:
    settings = _settings(0.5, sparsify={"method": "magnitude", "density": 0.9, "trim": "model"})
    known = _measured("wide a", "wide b")
    found = TensorState(stages={**known.stages, (0, 1): "c", (1, 1): "d"})
    states = KnownStates(SPARSIFIERS)
    states.keep([_tensor(0)], TIES, settings, found, known)
    assert states.recall([_tensor(0)], TIES, settings, known) == found
    other = _measured("wide a", "of other tensors")
    assert states.recall([_tensor(0)], TIES, settings, other).stages == {**other.stages, (0, 1): "c"}


@pytest.mark.parametrize("num_tensors", [1, 100])
def test_a_state_takes_the_same_little_room_whatever_it_was_measured_on(num_tensors: int) -> None:
    states = KnownStates(SPARSIFIERS)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for point in range(50):
            tensors = [_tensor(number) for number in range(num_tensors)]
            settings = _settings((point + 1) / 100, "model")
            states.keep(tensors, TIES, settings, _measured(0.5, 0.25), TensorState())
        del tensors, settings
        gc.collect()
        num_bytes = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert num_bytes < 50 * 2 * 500, "two states a point"
