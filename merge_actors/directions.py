"""Merged task vectors, kept from merge to merge: what a lambda axis multiplies.

The task-vector methods end in out = base + scale * direction, and the direction does not depend on lambda. The
points of a grid that differ in lambda alone form it once: the others are one pass over base and direction, with
the same bits, since the direction is kept as the formula has it, in float32.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.methods.interface import Method, Settings, Sparsifier
from raymerge.merge_actors.methods.kernel_formula import KernelFormula
from raymerge.merge_actors.methods.prepare import TensorState, model_wide_steps, steps_of
from raymerge.merge_actors.task import Job, Piece

#: A plain sum over models of so few bytes per element is formed as fast as it is read.
_CHEAP_BYTES = 8


@dataclass(slots=True)
class _Tensor:
    """The direction of one tensor."""

    values: NDArray[np.float32]
    group: str
    """Points that it was formed for."""
    formed: set[tuple[int, int]] = field(default_factory=set)
    """Ranges of elements [begin, end) that are there."""


class Direction(NamedTuple):
    """A part of a tensor's direction."""

    values: NDArray[np.float32]
    """Where it is, or is to be put."""
    is_known: bool
    tensor: _Tensor
    begin: int

    def formed(self) -> None:
        """Note that the values are there."""
        self.tensor.formed.add((self.begin, self.begin + len(self.values)))


class Directions:
    """Directions by everything that they depend on, up to a bound."""

    def __init__(self, sparsifiers: Mapping[str, Sparsifier], budget_bytes: int) -> None:
        """Take the registry of steps and the bound."""
        self._sparsifiers, self._left = sparsifiers, budget_bytes
        self._tensors: dict[Hashable, _Tensor] = {}
        self._spare: dict[int, list[NDArray[np.float32]]] = {}
        self._group: str | None = None
        self._lock = threading.Lock()
        self.num_reused = 0
        """Parts that were taken over."""

    def begin(self, group: str | None) -> None:
        """Begin a merge.

        Args:
            group: name of the points that share directions with this one; None if there are no others,
                so that nothing is kept for them.
        """
        self._group = group

    def find(
        self,
        piece: Piece,
        job: Job,
        method: Method,
        settings: Settings,
        formula: KernelFormula,
        state: TensorState,
    ) -> Direction | None:
        """Return a part of a direction, or where to keep it; None if it is not worth it, or there is no room.

        Args:
            piece: which part of which tensor.
            job: of the piece.
            method: the method.
            settings: its settings for the tensor.
            formula: the method's formula with these settings.
            state: what is known of the tensor; of it only what was measured on other tensors too counts,
                since the rest follows from the inputs.
        """
        steps = steps_of(method, settings, self._sparsifiers)
        widths = [element_bytes(piece.reads[i].dtype) for i in job.models]
        if formula.kind == "average":
            return None
        if formula.kind == "sum" and not any(steps) and sum(widths) <= _CHEAP_BYTES:
            return None
        asked = tuple(
            tuple(
                (step.name, *(parameters[each.name] for each in step.parameters))
                for step, parameters in of_model
            )
            for of_model in steps
        )
        # Rows that a model lacks are filled from the others.
        others = piece.reads if any(each.row_runs is not None for each in piece.reads) else ()
        reads = tuple(piece.reads[i] for i in job.models)
        base = None if job.base is None else piece.reads[job.base]
        unscaled = dataclasses.replace(formula, scale=1.0)
        wide = tuple(
            state.stages.get(place) for place in model_wide_steps(method, settings, self._sparsifiers)
        )
        key = (unscaled, asked, base, reads, others, job.keys, piece.shape, wide)
        with self._lock:
            tensor = self._tensors.get(key) or self._make(key, piece.shape)
            if tensor is None:
                return None
            if self._group is not None:
                tensor.group = self._group
            is_known = (piece.begin, piece.end) in tensor.formed
            self.num_reused += is_known
        return Direction(tensor.values[piece.begin : piece.end], is_known, tensor, piece.begin)

    def _make(self, key: Hashable, shape: Sequence[int]) -> _Tensor | None:
        """Make room for a tensor, if need be where that of another group was."""
        if self._group is None:
            return None
        num_elements = int(np.prod(shape, dtype=np.int64))
        spare = self._spare.get(num_elements)
        while not spare and 4 * num_elements > self._left:
            old = next((each for each in self._tensors.items() if each[1].group != self._group), None)
            if old is None:
                return None
            del self._tensors[old[0]]
            if old[1].values.size == num_elements:
                spare = self._spare.setdefault(num_elements, [])
                spare.append(old[1].values)
            else:
                self._left += old[1].values.nbytes
        if spare:
            values = spare.pop()
        else:
            values = np.empty(num_elements, np.float32)
            self._left -= values.nbytes
        tensor = self._tensors[key] = _Tensor(values, self._group)
        return tensor
