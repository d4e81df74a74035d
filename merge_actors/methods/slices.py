"""Run a method over a slice: elements [begin, end) of one tensor held in memory.

This is the whole compute side of a merge worker, without files or Ray; tests and other code
that has tensors at hand use `merge_tensors`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from raymerge.merge_actors.methods.block import UNIT, Block, Pool, Stage, unit_elements
from raymerge.merge_actors.methods.interface import Measure, Method, Settings, Sparsifier, Summary
from raymerge.merge_actors.methods.prepare import (
    TensorState,
    needs_preparation,
    preparation,
    steps_of,
)
from raymerge.merge_actors.randomness import stream_key

if TYPE_CHECKING:
    import torch

#: On a GPU a block spans many units: one kernel launch then serves 16 Mi elements.
_CUDA_BLOCK_UNITS = 256


@dataclass(frozen=True, kw_only=True)
class TensorSlice:
    """One slice of one tensor, ready to be measured or merged by one method."""

    method: Method
    settings: Settings
    sparsifiers: Mapping[str, Sparsifier]
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    begin: int
    """Index in the tensor of the slice's first element; a multiple of the method's unit."""
    base_P: torch.Tensor | None
    """The base's elements, flat, in storage dtype; None without a base."""
    models_P: Sequence[torch.Tensor]
    """Each model's elements, flat, in storage dtype."""
    keys: Sequence[int]
    """Key of each model's random stream for this tensor."""
    pool: Pool
    statistics_P: Sequence[torch.Tensor | None] | None = None
    """Of each model what was measured per element (Fisher), flat, any float dtype; None without."""

    @property
    def num_elements(self) -> int:
        """Elements of the slice."""
        return self.models_P[0].numel()

    @property
    def split(self) -> str:
        """How this method with these sparsifying steps may cut a tensor."""
        return split_of(self.method, self.settings, self.sparsifiers)

    def blocks(self, state: TensorState) -> Iterator[Block]:
        """Walk over the slice block by block; a block's scratch dies with the next one."""
        split = self.split
        unit = unit_elements(self.shape, split)
        total = self.models_P[0].numel()
        stages = [
            [Stage(step, parameters, state.stages.get((i, s))) for s, (step, parameters) in enumerate(steps)]
            for i, steps in enumerate(steps_of(self.method, self.settings, self.sparsifiers))
        ]
        whole = total // unit * unit
        step = unit * (max(1, _CUDA_BLOCK_UNITS * UNIT // unit) if self.pool.device.type == "cuda" else 1)
        edges = [*range(0, whole, step), whole] if whole else [0]
        if whole < total:
            edges.append(total)
        for at, stop in itertools.pairwise(edges):
            self.pool.reset()
            yield Block(
                raw_base_P=None if self.base_P is None else self.base_P[at:stop],
                raw_models_P=[model[at:stop] for model in self.models_P],
                begin=self.begin + at,
                shape=self.shape,
                unit=unit,
                settings=self.settings,
                stages=stages,
                keys=self.keys,
                state=state.method,
                pool=self.pool,
                is_rowwise=split == "rowwise",
                raw_statistics_P=None
                if self.statistics_P is None
                else [None if each is None else each[at:stop] for each in self.statistics_P],
            )

    def measure(self, measure: Measure, state: TensorState) -> Summary:
        """Answer one question of a preparation for this slice."""
        return measure.collect(self.blocks(state), **measure.arguments)

    def merged_blocks(self, state: TensorState) -> Iterator[tuple[int, torch.Tensor]]:
        """Merge block by block: yields (first element within the slice, merged block, flat)."""
        at = 0
        for block in self.blocks(state):
            merged = self.method.merge(block).reshape(-1)
            yield at, merged
            at += merged.numel()


def split_of(method: Method, settings: Settings, sparsifiers: Mapping[str, Sparsifier]) -> str:
    """Return "rowwise" if the method or any of its sparsifying steps needs whole rows."""
    steps = steps_of(method, settings, sparsifiers)
    own = method.split if isinstance(method.split, str) else method.split(settings)
    kinds = {own, *(step.split for of_model in steps for step, _ in of_model)}
    return "rowwise" if "rowwise" in kinds else "elementwise"


class Measurable(Protocol):
    """A slice that can answer the questions of a preparation, eagerly or by the kernels."""

    @property
    def method(self) -> Method:
        """The method that asks."""

    @property
    def settings(self) -> Settings:
        """Its settings for this tensor."""

    @property
    def sparsifiers(self) -> Mapping[str, Sparsifier]:
        """The registry of sparsifying steps."""

    @property
    def num_elements(self) -> int:
        """Elements of the slice."""

    def measure(self, measure: Measure, state: TensorState) -> Summary:
        """Answer one question of a preparation for this slice."""


def prepare_slices(slices: Sequence[Measurable], known: TensorState | None = None) -> TensorState:
    """Measure a tensor whose slices are all at hand."""
    first = slices[0]
    if not needs_preparation(first.method, first.settings, first.sparsifiers):
        return known or TensorState()
    num_elements = sum(s.num_elements for s in slices)
    questions = preparation(first.method, first.settings, num_elements, first.sparsifiers, known)
    try:
        asked = next(questions)
        while True:
            asked = questions.send([[s.measure(m, asked.state) for s in slices] for m in asked.measures])
    except StopIteration as stop:
        state = stop.value
        assert isinstance(state, TensorState)
        return state


def merge_tensors(
    method: Method,
    models: Sequence[torch.Tensor],
    base: torch.Tensor | None,
    settings: Settings,
    *,
    sparsifiers: Mapping[str, Sparsifier],
    seed: int = 0,
    tensor_name: str = "tensor",
    model_names: Sequence[str] | None = None,
    slice_units: int | None = None,
    statistics: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Merge whole tensors in memory: what a run does, for one tensor, without files.

    Args:
        method: the method.
        models: one tensor per model, equal shapes, any float dtype, one device.
        base: the base's tensor, or None.
        settings: resolved parameters, one entry of `settings.models` per model.
        sparsifiers: the registry of sparsifying steps.
        seed: of the random methods.
        tensor_name: enters the random streams.
        model_names: enter the random streams; default "0", "1", ...
        slice_units: cut into slices of so many units (the result does not depend on it).
        statistics: per model what was measured for each element, of the tensor's shape.

    Returns:
        The merged tensor, in the compute dtype (float32, or float64 for float64 inputs).
    """
    import torch

    names = model_names or [str(i) for i in range(len(models))]
    shape, total = tuple(models[0].shape), models[0].numel()
    pool = Pool(models[0].device)
    unit = unit_elements(shape, split_of(method, settings, sparsifiers))
    step = unit * slice_units if slice_units else max(1, total)
    slices = [
        TensorSlice(
            method=method,
            settings=settings,
            sparsifiers=sparsifiers,
            shape=shape,
            begin=at,
            base_P=None if base is None else base.reshape(-1)[at : at + step],
            models_P=[model.reshape(-1)[at : at + step] for model in models],
            keys=[stream_key(seed, name, tensor_name) for name in names],
            pool=pool,
            statistics_P=None
            if statistics is None
            else [each.reshape(-1)[at : at + step] for each in statistics],
        )
        for at in range(0, max(1, total), step)
    ]
    state = prepare_slices(slices)
    parts = [merged.clone() for piece in slices for _, merged in piece.merged_blocks(state)]
    if not parts:
        is_double = torch.float64 in {tensor.dtype for tensor in (*models, base) if tensor is not None}
        return models[0].new_empty(shape, dtype=torch.float64 if is_double else torch.float32)
    return torch.cat(parts).view(shape)
