"""Dot products between the models of a tensor, and sums of models with given coefficients.

Several methods are rotations and means on a sphere. Their results lie in the span of the
inputs, so they need the inputs only twice: once for all pairwise dots (the Gram matrix), and
once for a weighted sum. What lies between is arithmetic on a few numbers in float64.

Products are formed and added in float64, per unit of the tensor, then with `math.fsum`:
neither slicing nor the number of threads changes a dot.

Shape letters: K vectors (the models, perhaps the base), U units, R rows, P elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.block import sum_rows

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: Which vectors: the models; the models minus the base (the models where there is no base);
#: or both ends of an arc, the base and the models.
Vectors = Literal["models", "offsets", "ends"]


def collect_dots(blocks: Iterable[Block], *, of: Vectors) -> NDArray[np.float64]:
    """Dot every pair of vectors over each unit of a slice: (U, pairs)."""
    parts = [_unit_dots(block, wide_vectors(block, of)) for block in blocks]
    return np.concatenate(parts) if parts else np.zeros((0, 0))


def gram_matrix(summaries: Sequence[NDArray[np.float64]], num_vectors: int) -> NDArray[np.float64]:
    """Add the dots of all slices exactly: a symmetric matrix (K, K), zeros for an empty tensor.

    A NaN or an infinity in an input makes the matrix NaN.
    """
    gram_KK = np.zeros((num_vectors, num_vectors))
    table = np.concatenate(summaries)
    if not len(table):
        return gram_KK
    is_finite = bool(np.isfinite(table).all())
    for column, (i, j) in zip(table.T, _pairs(num_vectors), strict=True):
        gram_KK[i, j] = gram_KK[j, i] = math.fsum(column.tolist()) if is_finite else math.nan
    return gram_KK


def row_grams(block: Block, vectors: Sequence[torch.Tensor]) -> dict[tuple[int, int], torch.Tensor]:
    """Dot every pair of vectors row by row: {(i, j): float64 (R, 1)} for i <= j.

    Args:
        block: a block of rows.
        vectors: float64, (R, C) each.
    """
    import torch

    product_RC = block.scratch(torch.float64)
    return {
        (i, j): sum_rows(torch.mul(vectors[i], vectors[j], out=product_RC)).unsqueeze(1)
        for i, j in _pairs(len(vectors))
    }


def wide_vectors(block: Block, of: Vectors) -> list[torch.Tensor]:
    """Return the vectors in float64, each in scratch of its own."""
    import torch

    narrow = None if block.dtype == torch.float64 else block.scratch()
    vectors = [block.scratch(torch.float64).copy_(block.base())] if of == "ends" else []
    for i in range(block.num_models):
        vector = _read(block, i, of, narrow)
        vectors.append(vector if narrow is None else block.scratch(torch.float64).copy_(vector))
    return vectors


def weighted_sum(block: Block, factors: Sequence[float | torch.Tensor], of: Vectors) -> torch.Tensor:
    """Return sum_i c_i v_i over the models, or base + that sum for offsets from a base.

    Args:
        block: the block.
        factors: per model a number, or a tensor that spreads over the block's shape.
        of: the vectors.
    """
    total = _read(block, 0, of, None).mul_(factors[0])
    other = block.scratch()
    for i, factor in enumerate(factors[1:], start=1):
        vector = _read(block, i, of, other)
        if isinstance(factor, (int, float)):
            total.add_(vector, alpha=factor)
        else:
            total.addcmul_(vector, factor)
    return total.add_(block.base()) if of == "offsets" and block.has_base else total


def _unit_dots(block: Block, vectors: Sequence[torch.Tensor]) -> NDArray[np.float64]:
    return np.stack([block.unit_dots(vectors[i], vectors[j]) for i, j in _pairs(len(vectors))], axis=1)


def _read(block: Block, index: int, of: Vectors, out: torch.Tensor | None) -> torch.Tensor:
    return block.delta(index, out) if of == "offsets" and block.has_base else block.model(index, out)


def _pairs(num_vectors: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(num_vectors) for j in range(i, num_vectors)]
