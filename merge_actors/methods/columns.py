"""Sums over a tensor's first axis, and factors that vary along all the others.

A column of a tensor of shape (A, ...) is the vector of its A elements at one place of the
other axes; element i of the flat tensor belongs to column i modulo the number of columns.
A column runs through every slice, so its sum is kept as five integers in units of 2^80, 2^40,
1, 2^-40 and 2^-80: integer sums do not depend on how the tensor was cut. What a unit of the
tensor adds is cut off below 2^-80, about 1e-24.

Shape letters: V columns, P elements of a block, L limbs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

_LIMBS = [2.0**power for power in (80, 40, 0, -40, -80)]
#: What no summand may reach: the first integer would be too long for a float64.
_TOO_LARGE = 2.0**133


def num_columns(block: Block) -> int:
    """Return the number of columns of the block's tensor."""
    return math.prod(block.tensor_shape[1:])


def empty_sums(columns: int) -> NDArray[np.int64]:
    """Return sums of nothing: (6, V), five limbs and a count of what is not finite."""
    return np.zeros((len(_LIMBS) + 1, columns), dtype=np.int64)


def add_to_sums(sums_LV: NDArray[np.int64], values_P: torch.Tensor, block: Block) -> None:
    """Add a block's values to the sums of their columns.

    Args:
        sums_LV: from `empty_sums`, changed in place.
        values_P: float64, one value per element of the block; overwritten.
        block: says where the values lie in the tensor.
    """
    flat_P = values_P.reshape(-1)
    for at in range(0, flat_P.numel(), block.unit):
        unit_P = flat_P[at : at + block.unit]
        for first, added in _column_pieces(unit_P, block.begin + at, sums_LV.shape[1]):
            _add_limbs(sums_LV[:, first : first + len(added)], added)


def read_sums(sums_LV: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the sums of all columns as numbers (V,); NaN where a value was not finite or 2^133 and more."""
    sums_V = np.zeros(sums_LV.shape[1])
    for limb_V, unit in reversed(list(zip(sums_LV[:-1], _LIMBS, strict=True))):  # the smallest first
        sums_V += limb_V * unit
    return np.where(sums_LV[-1] > 0, np.nan, sums_V)


def spread(factors_V: NDArray[np.float64], block: Block) -> torch.Tensor:
    """Return, in scratch of the block's shape, each element's factor."""
    import torch

    out = block.scratch()
    flat_P = out.view(-1)
    for at, stop, first, rows in _runs(block.begin, flat_P.numel(), len(factors_V)):
        values = torch.from_numpy(factors_V[first : first + (stop - at) // rows])
        flat_P[at:stop].view(rows, -1).copy_(values)
    return out


def _column_pieces(
    values_P: torch.Tensor, begin: int, columns: int
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Sum a unit's values column by column: yields (first column, sums of the columns from there)."""
    for at, stop, first, rows in _runs(begin, values_P.numel(), columns):
        matrix = values_P[at:stop].view(rows, -1)
        while rows > 1:  # adds of whole rows, in the same order on every device
            half = rows // 2
            matrix[:half] += matrix[rows - half : rows]
            rows -= half
        yield first, matrix[0].cpu().numpy()


def _runs(begin: int, num_elements: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut elements into runs of whole rounds through the columns, and what is left at the ends.

    Yields:
        begin and end of the run, its first column, and the number of rounds (1 for a part of one).
    """
    at = 0
    while at < num_elements:
        first = (begin + at) % columns
        rows = (num_elements - at) // columns if first == 0 else 0
        length = rows * columns if rows else min(num_elements - at, columns - first)
        yield at, at + length, first, max(1, rows)
        at += length


def _add_limbs(sums_LV: NDArray[np.int64], values_V: NDArray[np.float64]) -> None:
    is_good = np.abs(values_V) < _TOO_LARGE
    sums_LV[-1] += ~is_good
    rest_V = np.where(is_good, values_V, 0.0)
    for limb_V, unit in zip(sums_LV[:-1], _LIMBS, strict=True):
        whole_V = np.trunc(rest_V / unit)
        limb_V += whole_V.astype(np.int64)
        rest_V = rest_V - whole_V * unit
